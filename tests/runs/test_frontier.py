"""Honest against clean accuracy: hand-made records, paired, compared and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from neuralsde_ito import ABSTAIN, ItoError, Outcomes, Run, load_config
from neuralsde_ito.runs.frontier import Frontier, adversary, read_frontier

TRUTH = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
NONE = ABSTAIN


def part(labels: list[int], lists: bool = True) -> dict[str, Any]:
    counts = Outcomes.of(torch.tensor(labels), torch.tensor(TRUTH[: len(labels)])).as_dict()
    return {**counts, **({"labels": labels} if lists else {})}


def right(count: int, abstained: int = 0) -> list[int]:
    """Labels of which the first ones are right and the last ones abstentions."""
    return [*TRUTH[:count], *[(t + 1) % 10 for t in TRUTH[count : 10 - abstained]], *[NONE] * abstained]


def record(honest: dict[str, list[int]], clean: list[int] = TRUTH, lists: bool = True, **changes: Any) -> dict:
    """A record of a suite; ``honest`` holds the ensemble's labels by written radius."""
    return {
        "norm": "linf", "noise": "fresh", "repeat": 1, "effort": 1.0, "seed": 0, "precision": "float32",
        "data": "digits", "images": len(clean), "vote": {"members": 5, "inferences": 20, "rule": "hierarchical"},
        **({"index": list(range(100, 110)), "truth": TRUTH} if lists else {}),
        "clean": {"Itô ensemble": part(clean, lists), "original ResNet": part(TRUTH, lists)},
        "attacked": [
            {"eps": float(written), "written": written, "ito": part(labels, lists), "resnet": part(right(1), lists)}
            for written, labels in honest.items()
        ],
        **changes,
    }  # fmt: skip


Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a run by its name, records (the oldest first) and what its configuration has besides the default."""

    def run(name: str, *records: Any, weights: bytes = b"the same", **config: Any) -> Run:
        keys = {key.replace("__", "."): value for key, value in config.items()}
        made = Run.create(tmp_path / name, load_config(overrides={"name": name, **keys}))
        made.resnet_file.write_bytes(weights)
        for i, content in enumerate(records):
            text = content if isinstance(content, str) else json.dumps(content)
            (made.folder / f"suite-linf-20260101-00000{i}.json").write_text(text)
        return made

    return run


def labels_of(frontier: Frontier) -> list[str]:
    return [point.label for point in frontier.points]


def test_points_are_the_counts_of_the_records(make):
    run = make("a", record({"0.1": right(4, 3)}, right(8, 1)))
    [ensemble, resnet] = read_frontier({"mine": run}).points
    assert (ensemble.label, ensemble.omega, ensemble.members, ensemble.adversary) == ("mine", 0.2, 5, "none")
    assert ensemble.clean.outcomes == Outcomes(10, 8, 1, 1)
    assert ensemble.honest.outcomes == Outcomes(10, 4, 3, 3)
    assert (resnet.label, resnet.defender, resnet.omega, resnet.members) == ("original ResNet", "resnet", None, None)
    assert (resnet.clean.outcomes.correct, resnet.honest.outcomes.correct) == (10, 1)


def test_points_are_paired_image_by_image(make):
    one = record({"0.1": [0, 1, 2, 3, 4, 5, 6, 0, 0, NONE]}, right(9))
    two = record({"0.1": [0, 0, 0, 0, 0, 0, NONE, 7, 0, 0]})
    frontier = read_frontier({"a": make("a", one), "b": make("b", two)})
    first, second, resnet = frontier.points
    paired = first.paired(second)
    assert (paired.only_first, paired.only_second) == (6, 1)
    assert paired.p == pytest.approx(binomtest(6, 7).pvalue)
    clean = first.paired(second, clean=True)
    assert (clean.only_first, clean.only_second, clean.p) == (0, 1, 1)
    assert (second.paired(resnet).only_first, second.paired(resnet).only_second) == (1, 0)
    assert frontier.remarks == ()


def test_the_reference_is_the_first_or_the_one_that_is_named(make):
    runs = {name: make(name, record({"0.1": right(4)})) for name in "abc"}
    assert read_frontier(runs).reference.label == "a"
    assert read_frontier(runs, against="c").reference.label == "c"
    assert labels_of(read_frontier(runs, against="c"))[:3] == ["a", "b", "c"]
    with pytest.raises(ItoError, match="Unknown run 'd'"):
        read_frontier(runs, against="d")


def test_the_default_radius_is_the_largest_that_all_share(make):
    runs = {
        "a": make("a", record({"0.05": right(9), "0.1": right(8), "0.2": right(7)})),
        "b": make("b", record({"0.3": right(1)}), record({"0.05": right(6), "0.1": right(5)})),
    }
    frontier = read_frontier(runs)
    assert (frontier.eps, frontier.written) == (0.1, "0.1")
    assert [point.honest.outcomes.correct for point in frontier.points[:2]] == [8, 5]
    assert [p.honest.outcomes.correct for p in read_frontier(runs, eps="1/20").points[:2]] == [9, 6]
    runs["c"] = make("c", record({"0.3": right(1)}))
    with pytest.raises(ItoError, match=r"share no radius under linf \(a: 0.05, 0.1, 0.2; b: .*; c: 0.3\): give --eps"):
        read_frontier(runs)


def test_the_newest_record_counts_that_has_the_radius(make):
    run = make("a", record({"0.1": right(1)}), record({"0.1": right(2)}), record({"0.3": right(3)}))
    assert read_frontier({"a": run}).points[0].honest.outcomes.correct == 3
    assert read_frontier({"a": run}, eps=0.1).points[0].honest.outcomes.correct == 2


def test_a_run_without_a_record_names_the_command_that_makes_it(make):
    some = make("a", record({"0.2": right(1)}, seed=3))
    none = make("b", attack__images=50)
    for eps, at, written in ((None, "", "0.2"), ("8/255", " at eps 8/255", "8/255")):
        with pytest.raises(ItoError) as error:
            read_frontier({"b": none} if eps else {"a": some, "b": none}, eps=eps)
        like = "" if eps else " --limit 10 --seed 3"
        assert f"has no record of a suite under linf{at}; make it: ito-sde suite --run " in str(error.value)
        assert str(error.value).endswith(f"/b --norm linf --eps {written}{like}.")
    with pytest.raises(ItoError, match=r"--norm l2 --eps 0\.5\."):  # the run's own radius
        read_frontier({"b": none}, "l2")
    with pytest.raises(ItoError, match=r"--norm l1 --eps EPS\."):
        read_frontier({"b": none}, "l1")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"noise": "known"}, "noise known and fresh"),
        ({"repeat": 5}, "repeat 5 and 1"),
        ({"effort": 0.1}, "effort 0.1 and 1.0"),
        ({"data": "cifar10"}, "data cifar10 and digits"),
    ],
)
def test_records_of_other_attacks_are_refused(make, change, said):
    runs = {"a": make("a", record({"0.1": right(4)})), "b": make("b", record({"0.1": right(3)}, **change))}
    with pytest.raises(ItoError) as error:
        read_frontier(runs)
    assert f"The suites of b and a differ ({said}) and cannot be compared" in str(error.value)
    assert ("--limit 10." in str(error.value)) == ("data" not in change)
    with pytest.raises(ItoError, match="The suites of a and b differ"):
        read_frontier(runs, against="b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": list(range(10))}, "the images are not the same (10 and 10)"),
        ({"seed": 1}, "the seeds of the noise are 1 and 0"),
    ],
)
def test_other_images_and_other_noise_are_not_paired(make, change, said):
    runs = {"a": make("a", record({"0.1": right(4)})), "b": make("b", record({"0.1": right(3)}, **change))}
    frontier = read_frontier(runs)
    [remark] = frontier.remarks
    assert remark.startswith(f"b cannot be paired with a: {said}; make the first again like the second: ito-sde suite")
    first, second, *resnets = frontier.points
    assert first.paired(second) is second.paired(first) is first.paired(second, clean=True) is None
    # The ResNets' figures are of other images or noise, so both stand there; one can be paired.
    assert [point.label for point in resnets] == ["original ResNet of a", "original ResNet of b"]
    assert first.paired(resnets[0]) is not None
    assert first.paired(resnets[1]) is None


def test_records_of_earlier_versions_have_points_but_no_pairs(make):
    new, old = (make(name, record({"0.1": right(4, 2)}, lists=name == "new")) for name in ("new", "old"))
    frontier = read_frontier({"new": new, "old": old})
    assert frontier.points[1].honest.outcomes == Outcomes(10, 4, 4, 2)
    assert frontier.points[0].paired(frontier.points[1]) is None
    [remark] = frontier.remarks
    assert remark.startswith(
        "old cannot be paired with new: the record suite-linf-20260101-000000.json is of an earlier"
    )
    assert f"make it again: ito-sde suite --run {old.folder} --norm linf --eps 0.1 --limit 10." in remark
    [remark] = read_frontier({"new": new, "old": old}, against="old").remarks  # one sentence, not one a run
    assert remark.startswith("Nothing can be paired with old: ")
    [remark] = read_frontier({"old": old}).remarks
    assert remark.startswith("Nothing can be paired with old: ")


def test_different_precisions_are_said(make):
    runs = {p: make(p, record({"0.1": right(4)}, precision=p)) for p in ("float32", "bfloat16")}
    [remark] = read_frontier(runs).remarks
    assert "float32 (float32), bfloat16 (bfloat16)" in remark


def test_different_smaller_radii_are_said(make):
    runs = {
        "a": make("a", record({"0.05": right(9), "0.1": right(4), "0.2": right(1)})),
        "b": make("b", record({"0.1": right(4)})),
    }
    [remark] = read_frontier(runs).remarks
    assert "(a: 0.05; b: none)" in remark
    runs["b"] = make("c", record({"0.05": right(9), "0.1": right(4)}))
    assert read_frontier(runs).remarks == ()


def test_twins_differ_in_omega_only(make):
    def run(name: str, **config: Any) -> Run:
        return make(name, record({"0.1": right(4)}), **config)

    runs = {
        "still": run("still", sde__omega=0),
        "noisy": run("noisy"),
        "loud": run("loud", sde__omega=1.0, attack__images=7),  # how it is attacked by default does not matter
        "longer": run("longer", finetune__epochs=11),
        "seed": run("seed", sde__omega=0, seed=1),
    }
    twins = [(noisy.label, still.label) for noisy, still in read_frontier(runs).twins]
    assert twins == [("noisy", "still"), ("loud", "still")]
    vote = {"members": 5, "inferences": 3, "rule": "flat"}
    runs["noisy"] = make("asked", record({"0.1": right(4)}, vote=vote))
    assert [noisy.label for noisy, _ in read_frontier(runs).twins] == ["loud"]


def test_a_resnet_that_runs_share_stands_once(make):
    def names(*weights: bytes) -> list[str]:
        runs = {
            f"{name}{len(weights)}": make(f"{name}{len(weights)}", record({"0.1": right(4)}), weights=some)
            for name, some in zip("abcd", weights, strict=False)
        }
        return labels_of(read_frontier(runs))[len(weights) :]

    assert names(b"1", b"1") == ["original ResNet"]
    assert names(b"1", b"2", b"1") == ["original ResNet of a3, c3", "original ResNet of b3"]
    assert names(b"1", b"1", b"2", b"1") == ["original ResNet of a4, b4 and 1 more", "original ResNet of c4"]


def broken(change: Callable[[dict], object]) -> str:
    content = record({"0.1": right(4)})
    change(content)
    return json.dumps(content)


DAMAGED = {
    "not JSON": "{",
    "not UTF-8": "\udcff",
    "a list": "[]",
    "no settings": broken(lambda c: c.pop("effort")),
    "no ensemble": broken(lambda c: c["clean"].pop("Itô ensemble")),
    "no members": broken(lambda c: c.update(vote={})),
    "odd labels": broken(lambda c: c["attacked"][0]["ito"]["labels"].pop()),
    "labels that are no numbers": broken(lambda c: c["attacked"][0]["ito"].update(labels=["0"] * 10)),
    "labels against counts": broken(lambda c: c["clean"]["Itô ensemble"].update(labels=right(3))),
    "no radius": broken(lambda c: c["attacked"][0].pop("eps")),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_record_is_told_in_a_sentence(make, content):
    run = make("a")
    file = run.folder / "suite-linf-20260101-000000.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ItoError, match=r"The record '.*suite-linf-20260101-000000\.json' is damaged; delete it"):
        read_frontier({"a": run})


def test_an_adversary_is_named_by_what_it_does_and_to_whom():
    def trained(resnet: str = "none", members: str = "none", weights: str | None = None, epochs: int = 1) -> tuple:
        def fit(written: str) -> dict[str, Any]:
            method, *rest = written.split()
            norm, eps = rest if len(rest) == 2 else ("linf", rest[0] if rest else "8/255")
            return {"epochs": epochs, "adversary": {"method": method, "norm": norm, "eps": eps}}

        overrides = {
            "network.weights": weights,
            "resnet": fit(resnet) | {"lr": 0.1},
            "finetune": fit(members) | {"lr": 0.1},
        }
        return adversary(load_config(overrides=overrides))

    assert trained() == ("none", "none")
    assert trained("pgd 8/255", "pgd 8/255") == ("pgd 8/255", "pgd 8/255")
    assert trained("pgd 8/255") == ("pgd 8/255", "pgd 8/255, then none")
    assert trained("none", "trades l2 0.5") == ("none", "none, then trades l2 0.5")
    assert trained("pgd 8/255", "pgd 8/255", weights="given.pth") == ("unknown", "unknown, then pgd 8/255")
    assert trained("pgd 8/255", "none", epochs=0) == ("pgd 8/255", "pgd 8/255")
    assert adversary(load_config()) == ("none", "none")


def test_what_cannot_be_asked(make):
    run = make("a", record({"0.1": right(4)}))
    with pytest.raises(ItoError, match="at least one run"):
        read_frontier({})
    with pytest.raises(ItoError, match="Unknown norm 'linfty'"):
        read_frontier({"a": run}, "linfty")
    with pytest.raises(ItoError, match="at most 1 under linf"):
        read_frontier({"a": run}, eps=8)
