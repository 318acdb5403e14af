"""Several processes, really started: the same tensors and files as one process, and a sentence where one fails."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from neuralsde_ito.cli import cli
from safetensors.torch import load_file

import neuralsde_ito as ito
from neuralsde_ito import cli as command_line
from neuralsde_ito import distributed
from neuralsde_ito.attacks import PGD
from neuralsde_ito.attacks.sweep import attack_sweep
from neuralsde_ito.certificates.certify import Sampling, smoothed, with_input_sigma
from neuralsde_ito.certificates.certify_run import certify_split
from neuralsde_ito.distributed import ALONE, World
from neuralsde_ito.runs.evaluate import evaluate
from neuralsde_ito.runs.run import Run

pytest.importorskip("accelerate", reason="several processes need accelerate: pip install 'ito-sde[distributed]'")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process, see conftest.py
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"],
}
TRAIN = ["train", "--limit", "60", "--set", "resnet.epochs=2", "--epochs", "2", "--members", "3", "--inferences", "3"]
SUITE = ["suite", "--run", "one", "--eps", "0.1", "--effort", "0.05", "--limit", "5", "--json"]


def started(launcher: str, size: int, words: list[str], cwd: Path) -> subprocess.Popen:
    """The processes of one command; ``words`` is a script, or ``-m`` and a module, and what follows."""
    if launcher == "torchrun":
        script = 2 if words[0] == "-m" else 1
        words = [*words[:script], "--", *words[script:]]  # else torchrun takes --run for its own --run-path
    called = [sys.executable, "-m", *LAUNCHERS[launcher], str(size), *words]
    return subprocess.Popen(called, cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr that are the program's own, not the launcher's."""
    out, err = process.communicate(timeout=120)
    own = [line for line in err.splitlines() if line.startswith(("Error: ", "Warning: ", "Interrupted"))]
    return process.returncode, out, own


def ito_sde(*words: str) -> str:
    """Stdout of a command in this process."""
    done = CliRunner().invoke(cli, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `runs/one`, which one process has trained."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "one.json").write_text(ito_sde(*TRAIN, "--run", "one", "--json"))
    return folder


@pytest.fixture(scope="module")
def alone(user: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """What `work` gives in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(user)
        return work(ALONE)


@pytest.fixture
def here(user: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(user)
    return user


# --- the same as one process -----------------------------------------------------------------------------

WORK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from test_distributed import work
from neuralsde_ito.distributed import world
torch.set_num_threads(1)
among = world()
done = work(among)
seen = among.gather((among.rank, among.size))
assert seen == [(rank, among.size) for rank in range(among.size)], seen
assert all(again[0].keys() == done[0].keys() for again in among.gather(done))  # each process has the whole
if among.first:
    torch.save(done, "of-{size}.pt")
    print(among.size, flush=True)
among.leave()
os._exit(0)
"""


def work(among: World) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Tensors and figures of the clean table, a sweep, a suite and certificates, on 5 images in batches of 2."""
    run, data = Run.open("runs/one"), ito.load_data("digits").test.first(5)
    both = (run.ensemble(), run.resnet())
    clean = evaluate(*both, data, batch_size=2, among=among)
    sweep = attack_sweep(*both, data, [PGD(eps=0.1, steps=2, eot=2)], ("ensemble", "resnet"), batch_size=2, among=among)
    settings = ito.SuiteSettings(radii=(0.1,), effort=0.01, batch_size=2)
    suite = ito.run_suite(*both, data, settings, among=among)
    noisy = smoothed(with_input_sigma(both[0], 0.25))[0]
    certified = certify_split(noisy, data, Sampling(0.25, 5, 20), batch_size=2, among=among).certificate
    tensors = {f"certified {name}": getattr(certified, name) for name in ("index", "selected", "votes", "drawn")}
    tensors |= {f"clean {name}": getattr(clean, name) for name in ("index", "truth", "labels", "votes", "drawn")}
    tensors |= {f"sweep {name}": images for name, images in sweep.images[0].items()}
    figures: dict[str, object] = {"cost": [vars(cost) for cost in sweep.cost[0].values()], "invalid": sweep.invalid}
    for goal in ("denial", "evasion"):
        cases = {"sweep": getattr(sweep, goal)[0]}
        cases |= {name: getattr(run.results[0], goal) for name, run in suite.runs.items()}
        tensors |= {f"{of} {goal} {name}": value for of, case in cases.items() for name, value in vars(case).items()}
    for name, defender in suite.runs.items():
        tensors |= {f"{name} clean votes": defender.clean_votes}
        result = defender.results[0]
        figures[name] = [result.attacked, result.fooled, result.queries, result.gradients, result.blind]
    return tensors, figures


@pytest.mark.parametrize(("launcher", "size"), [("accelerate", 2), ("torchrun", 3)])
def test_votes_adversarial_images_and_costs_are_those_of_one_process(
    launcher: str, size: int, here: Path, alone
) -> None:
    Path("work.py").write_text(WORK.format(tests=str(Path(__file__).parent), size=size))
    code, out, own = ended(started(launcher, size, ["work.py"], here))
    assert (code, out, own) == (0, f"{size}\n", [])
    (tensors, figures), (expected, counted) = torch.load(f"of-{size}.pt", weights_only=False), alone
    assert figures == counted
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


def test_members_that_are_trained_side_by_side_are_those_of_one_process(here: Path) -> None:
    code, out, own = ended(started("torchrun", 2, ["-m", "neuralsde_ito.cli", *TRAIN, "--run", "two", "--json"], here))
    assert (code, own) == (0, [])
    one, two = json.loads(Path("one.json").read_text()), json.loads(out)
    assert two.pop("run") == "runs/two"
    assert {**one, "run": "", "seconds": 0} == {**two, "run": "", "seconds": 0}
    for name in ("resnet", "members/00", "members/01", "members/02"):
        expected, value = (load_file(f"runs/{run}/{name}.safetensors") for run in ("one", "two"))
        assert all(torch.equal(expected[key], value[key]) for key in expected), name
    assert Path("runs/one/metrics.jsonl").read_text() == Path("runs/two/metrics.jsonl").read_text()


def test_a_reproduction_of_two_processes_is_that_of_one(here: Path) -> None:
    few = [f"--set={change}" for change in ("ensemble.members=2", "resnet.epochs=1", "finetune.epochs=1")]
    line = ["reproduce", "table2", "table5", "figure1", "--limit", "8", *few]
    ito_sde(*line, "--out", "by-one")
    code, out, own = ended(started("torchrun", 2, ["-m", "neuralsde_ito.cli", *line, "--out", "by-two"], here))
    assert (code, own) == (0, [])
    assert "Table 2: CIFAR-10 without attack" in out
    one, two = (json.loads(Path(folder, "results.json").read_text()) for folder in ("by-one", "by-two"))
    for results in (one, two):
        for record in results["records"].values():
            del record["seconds"], record["date"]
    assert one["items"] == two["items"]
    assert one["records"] == two["records"]
    networks = sorted(file.relative_to("by-one") for file in Path("by-one/models").rglob("*.safetensors"))
    assert len(networks) == 1 + 4 * (1 + 2)  # the ResNet; at four omegas the ResNet again, and two members
    for file in networks:
        first, second = load_file("by-one" / file), load_file("by-two" / file)
        assert all(torch.equal(first[name], second[name]) for name in first), file


def test_a_killed_process_ends_all_and_the_suite_goes_on_with_another_number_of_them(here: Path) -> None:
    alone = json.loads(ito_sde(*SUITE, "--bundle", "one"))
    run = Path("runs/one")
    process = started("torchrun", 2, ["-m", "neuralsde_ito.cli", *SUITE], here)
    deadline = time.monotonic() + 60
    while len(list(run.glob("suite-*/ito/*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed = time.monotonic()
    os.kill(child_of(process.pid, rank=1), 9)
    code, out, own = ended(process)
    assert time.monotonic() - killed < 30  # and not until a barrier gives up
    assert code
    assert out == ""
    assert len(own) == 1
    assert "One of 2 processes was lost" in own[0]
    assert "--resume" in own[0]
    finished = {file: file.stat().st_mtime_ns for file in run.glob("suite-*/*/*")}
    assert finished
    (state,) = run.glob("suite-*/")
    keep = [
        "from neuralsde_ito import cli",
        "from neuralsde_ito.attacks.suite_run import SuiteComparison",
        "SuiteComparison.discard_state = lambda both: None",
        "cli.main()",
    ]
    Path("keep.py").write_text("\n".join(keep))
    code, out, own = ended(started("torchrun", 3, ["keep.py", *SUITE, "--resume", "--bundle", "three"], here))
    assert (code, own) == (0, [])
    same = ("attacked", "clean", "invalid", "images", "batch_size", "weights")
    assert {key: json.loads(out)[key] for key in same} == {key: alone[key] for key in same}
    assert all(file.stat().st_mtime_ns == written for file, written in finished.items())  # none was made again
    assert len(list(state.glob("ito/*-clean.safetensors"))) == 2  # the pieces of two processes
    for file in Path("one/linf-0.1").glob("*.safetensors"):
        expected, value = load_file(file), load_file(Path("three/linf-0.1") / file.name)
        assert all(torch.equal(expected[key], value[key]) for key in expected), file.name


def child_of(parent: int, rank: int) -> int:
    """The process that a launcher has started with this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
        except OSError:  # it has ended
            continue
    pytest.skip("this system does not show which process has which rank")


# --- one that fails --------------------------------------------------------------------------------------


def test_a_process_that_fails_ends_all_with_its_one_sentence(here: Path) -> None:
    fault = "\n".join(
        [
            "import os",
            "from neuralsde_ito import ItoError, cli, data",
            "def broken(self, *_):",
            "    raise ItoError('The image is damaged.')",
            "if os.environ['RANK'] == '1':",
            "    data.InMemory.batches = broken",
            "cli.main()",
        ]
    )
    Path("fault.py").write_text(fault)
    begun = time.monotonic()
    code, out, own = ended(started("torchrun", 2, ["fault.py", "evaluate", "--run", "one"], here))
    assert code
    assert (out, own) == ("", ["Error: The image is damaged."])
    assert time.monotonic() - begun < 60


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of process 0 of 2."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_world", ALONE)


def test_a_port_in_use_is_one_sentence(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ito.ItoError, match=rf"Port {taken.getsockname()[1]} is in use.*--master-port"):
            distributed.world()


def test_without_accelerate_one_sentence_says_what_to_install(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ito.ItoError, match=r"2 processes need accelerate: pip install 'ito-sde\[distributed\]'"):
        distributed._join_group(World(0, 2), None)


@pytest.mark.parametrize("verb", sorted(command_line.VERBS.keys() - command_line.SHARED.keys()))
def test_verbs_that_several_processes_cannot_share_refuse_them(two: None, verb: str) -> None:
    done = CliRunner().invoke(cli, [verb])
    assert done.exit_code == 2
    assert f"'ito-sde {verb}' has no work for 2 processes" in done.stderr


def test_accelerate_that_starts_one_process_only_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    command_line._meet_the_others()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MASTER_PORT", "29500")  # accelerate sets it if --num_processes is above 1
    command_line._meet_the_others()
    assert "accelerate launch --cpu starts one process" in capsys.readouterr().err


# --- shares ----------------------------------------------------------------------------------------------


def test_one_process_needs_no_others() -> None:
    code = (
        "import sys; from neuralsde_ito.distributed import world; w = world(); w.barrier(); assert w.gather(3) == [3]"
    )
    code += "\nassert w.first and w.dealt(w.own('abc')) == list('abc')"
    code += "\nassert not {'torch', 'accelerate'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_and_pieces_hold_each_image_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, worlds = ito.load_data("digits").test.first(7), [World(rank, size) for rank in range(size)]
    shares = [world.share(data) for world in worlds]
    assert torch.cat([share.names for share in shares]).tolist() == data.names.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    cards = list("abcdefghij")
    hands = [world.own(cards) for world in worlds]
    monkeypatch.setattr(World, "gather", lambda self, thing: hands)
    assert all(world.dealt(hands[world.rank]) == cards for world in worlds)


@pytest.mark.parametrize(
    ("n", "most", "size", "piece"),
    [(100, 250, 1, 250), (100, 250, 2, 50), (101, 250, 2, 51), (750, 250, 2, 188), (1000, 250, 2, 250), (2, 250, 3, 1)],
)
def test_pieces_are_as_many_for_each_process(n: int, most: int, size: int, piece: int) -> None:
    assert World(0, size).pieces(n, most) == piece


def test_an_image_that_is_missing_or_there_twice_is_an_error() -> None:
    data, two = ito.load_data("digits").test.first(4), World(0, 2)
    names = data.names
    two.check_complete(names, data)
    for wrong in (names[:3], names[[0, 1, 2, 2]], names[[0, 1, 3, 2]], names[[0, 1, 2, 3, 3]]):
        with pytest.raises(RuntimeError, match="2 processes gave"):
            two.check_complete(wrong, data)


def test_a_run_is_trained_with_the_threads_it_began_with(tmp_path: Path) -> None:
    """The last bits of weights depend on that number, and each of several processes has fewer."""
    config = ito.load_config("digits", overrides={"data.train_limit": 64, "resnet.epochs": 1, "data.test_limit": 8})
    run, data, seen = Run.create(tmp_path / "a", config), ito.load_data("digits", train_limit=64), set()
    file = run.folder / "environment.json"
    begun = json.loads(file.read_text())
    assert begun["threads"] == torch.get_num_threads()
    file.write_text(json.dumps({**begun, "threads": 2}))
    run.train_resnet(data, torch.device("cpu"), on_step=lambda *_: seen.add(torch.get_num_threads()))
    assert seen == {2}
    assert torch.get_num_threads() == begun["threads"]
    file.write_text("{}")
    with pytest.raises(ito.ItoError, match=r"environment\.json.*damaged"):
        run.train_member(0, data, torch.device("cpu"))
