"""What the benchmark counts, and that its slow parts run; the figures themselves are in docs/speed.md."""

import pytest
import torch

import neuralsde_ito as ito
from neuralsde_ito.benchmarks import attacks, turns
from neuralsde_ito.benchmarks.attacks import bench_attack, bench_suite
from neuralsde_ito.benchmarks.costs import bf16_peak, operations
from neuralsde_ito.benchmarks.turns import run_in_turns

pytestmark = pytest.mark.filterwarnings("ignore:This processor has no instructions for bfloat16")
CPU = torch.device("cpu")


def test_operations_of_resnet20_are_those_of_its_paper():
    net = ito.load_resnet("resnet20").eval()  # He et al. 2015 and its reimplementations: 41 million products an image
    assert operations(net, torch.rand(2, 3, 32, 32)) == pytest.approx(2 * 2 * 41e6, rel=0.02)


def test_the_peak_is_measured():
    assert 1e6 < bf16_peak(CPU, 64) < 1e15


def test_cases_take_turns_and_none_is_charged_for_the_others(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])

    def case(name, steps, length):
        def run(pause):
            for _ in range(steps):
                order.append(name)
                clock[0] += length
                pause()
            return name

        return run

    results = run_in_turns({"a": case("a", 2, 1.0), "b": case("b", 4, 5.0), "c": case("c", 3, 0.5)}, CPU)
    assert order == list("abcabcbcb")
    assert results == {"a": ("a", 2.0), "b": ("b", 20.0), "c": ("c", 1.5)}


def test_an_error_of_a_turn_is_raised_and_the_others_end():
    ended = []

    def wrong(pause):
        pause()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_in_turns({"wrong": wrong, "right": lambda pause: ended.append(pause())}, CPU)
    assert ended == [None]


@pytest.fixture
def ensemble():
    torch.manual_seed(0)
    return ito.ItoEnsemble([ito.recast(ito.load_resnet("resnet8"), omega=0.2)], inferences=4)


def test_attacks_are_measured_beside_torchattacks(ensemble, monkeypatch):
    pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    monkeypatch.setattr(attacks, "computes_in_bfloat16", lambda device: True)
    x = torch.rand(4, 3, 32, 32)
    modes = [module.training for module in ensemble.modules()]
    rows = bench_attack(ensemble, x, ensemble.predict(x).labels, [0.01, 0.02], steps=3, eot=2)
    assert [row.ratio for row in rows[::6]] == [1, 1]
    assert all(" 24 gradients" in row.note for row in rows if "to the end" in row.name)  # images x steps x paths
    assert [module.training for module in ensemble.modules()] == modes


def test_the_suite_is_measured_beside_autoattack(ensemble, monkeypatch):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    monkeypatch.setattr(attacks, "computes_in_bfloat16", lambda device: True)
    x = torch.rand(3, 3, 32, 32)
    y = ensemble.predict(x, 0, torch.arange(3)).labels
    y[0] = (y[0] + 1) % 10  # wrong without attack: nobody attacks it
    rows = bench_suite(ensemble.members[0].base, ensemble, x, y, [8 / 255])
    names = ["AutoAttack", "ours, standard", "ours, gradients in bfloat16"]
    assert [row.name for row in rows] == [f"8/255: {name}" for name in names]
    assert all(int(row.note.split()[0]) <= 2 for row in rows)
    assert not bench_suite(ensemble.members[0].base, ensemble, x[:1], y[:1], [8 / 255])
