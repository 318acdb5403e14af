"""`ito-sde frontier` on tiny runs that `ito-sde suite` has attacked, and its picture."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from neuralsde_ito.cli import output, pictures
from PIL import Image

from neuralsde_ito import ABSTAIN, Outcomes, Paired, Run
from neuralsde_ito.runs.frontier import Decisions, Frontier, read_frontier

TRAIN = ["--limit", "60", "--set", "resnet.epochs=3", "--epochs", "1", "--members", "2", "--inferences", "3"]
SUITE = ["--norm", "linf", "--eps", "0.02", "--eps", "0.1", "--limit", "12", "--effort", "0.01"]


def run_main(words: list[str]) -> int:
    from neuralsde_ito.cli import main

    argv, sys.argv = sys.argv, ["ito-sde", *words]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = argv
    return stop.value.code or 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``noisy`` and ``still``, twins that the suite has attacked, and ``other``."""
    folder = tmp_path_factory.mktemp("home")
    for name, words in (("noisy", []), ("still", ["--omega", "0"]), ("other", ["--seed", "1"])):
        assert run_main(["train", *TRAIN, *words, "--runs", str(folder / "runs"), "--run", name]) == 0
    for name in ("noisy", "still"):
        assert run_main(["suite", *SUITE, "--runs", str(folder / "runs"), "--run", name]) == 0
    return folder


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder for one test, and the working directory."""
    folder = tmp_path / "home"
    shutil.copytree(home, folder)
    monkeypatch.chdir(folder)
    return folder


Said = Callable[[str | list[str]], tuple[int, str, str]]


@pytest.fixture
def ito_sde(capfd: pytest.CaptureFixture) -> Said:
    """Runs a command line in this process: exit code, stdout, stderr."""

    def run(line: str | list[str]) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_main(line.split() if isinstance(line, str) else line)
        return code, *capfd.readouterr()

    return run


def record_of(name: str) -> tuple[Path, dict[str, Any]]:
    [file] = Path("runs", name).glob("suite-*.json")
    return file, json.loads(file.read_text())


def test_a_suites_record_holds_the_labels_that_its_counts_count(here):
    abstained = 0
    for name in ("noisy", "still"):
        file, record = record_of(name)
        truth = torch.tensor(record["truth"])
        assert len(set(record["index"])) == len(truth) == record["images"] == 12
        entries = [
            *record["clean"].values(),
            *(level[who] for level in record["attacked"] for who in ("ito", "resnet")),
        ]
        assert len(entries) == 6
        for entry in entries:
            counted = Outcomes.of(torch.tensor(entry["labels"]), truth)
            assert counted.as_dict()["counts"] == entry["counts"]
            abstained += entry["labels"].count(ABSTAIN)
        for level in record["attacked"]:
            right = [torch.tensor(level[who]["labels"]) == truth for who in ("resnet", "ito")]
            assert output.paired_json(Paired.of(*right), "resnet") == level["paired"]
        lines = file.read_text().splitlines()
        assert sum(line.strip().startswith('"labels": [') and line.endswith(("]", "],")) for line in lines) == len(
            entries
        )
    assert abstained


def test_lists_of_whole_numbers_stand_on_one_line():
    content = {
        "a": [1, -1, 20],
        "b": [[1, 2], [3]],
        "c": [],
        "d": [1, 2.5],
        "e": "[\n  1,\n  2\n]",
        "f": [True],
        "g": [1],
    }
    text = output.json_bytes(content).decode()
    assert json.loads(text) == content
    assert '"a": [1, -1, 20],' in text
    assert '"g": [1]\n' in text
    assert "    [1, 2],\n    [3]\n" in text
    assert "    2.5\n" in text


def test_the_table_the_picture_and_the_record(here, ito_sde):
    code, out, err = ito_sde(["frontier", "noisy", "still", "--label", "noisy=with noise", "--out", "new/f.png"])
    assert code == 0, err
    table, _, rest = out.partition("What the noise adds")
    assert "12 test images of digits, linf, eps 0.1 in pixel units; % with 95 % Wilson intervals" in table
    lines = table.splitlines()
    [head] = [line for line in lines if line.startswith("label ")]
    first = " ".join(line[: head.index("omega")].strip() for line in lines[lines.index(head) + 2 :])
    assert first.strip() == "with noise still twin of with noise at omega 0 original ResNet"
    assert next(line for line in lines if line.startswith("with noise")).endswith("reference")
    assert max(len(line) for line in out.splitlines()) <= 120
    report = json.loads(Path("new/f.json").read_text())
    truth = torch.tensor(record_of("noisy")[1]["truth"])
    right = {
        name: torch.tensor(record_of(name)[1]["attacked"][1]["ito"]["labels"]) == truth for name in ("noisy", "still")
    }
    paired = Paired.of(right["noisy"], right["still"])
    noisy, still, resnet = report["points"]
    assert still["paired"] == {"only_reference": paired.only_first, "only_this": paired.only_second, "p": paired.p}
    assert noisy["honest"]["counts"]["correct"] == int(right["noisy"].sum())
    assert "paired" not in noisy
    assert (noisy["omega"], still["omega"], resnet["omega"]) == (0.2, 0, None)
    assert (report["eps"], report["effort"], report["reference"]) == (0.1, 0.01, "with noise")
    [twins] = report["twins"]
    assert (twins["noisy"], twins["still"]) == ("with noise", "still")
    assert twins["paired"] == {"only_noisy": paired.only_first, "only_still": paired.only_second, "p": paired.p}
    assert "Next: 'ito-sde audit --run runs/" in rest.replace("\n", " ")
    assert "Picture   new/f.png\nRecord    new/f.json\n" in rest
    picture = Image.open("new/f.png").convert("L")
    assert picture.width > 900
    assert len(set(picture.getdata())) > 50


def test_without_a_name_the_picture_lies_in_the_references_run(here, ito_sde):
    code, out, _ = ito_sde("frontier noisy still --against still --eps 1/50 --json")
    assert code == 0
    [file] = Path("runs/still").glob("frontier-linf-*.json")
    assert json.loads(file.read_text()) == json.loads(out)
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert json.loads(out)["eps"] == 0.02
    assert not list(Path("runs/noisy").glob("frontier-*"))


def test_what_the_sentence_about_a_missing_record_says_mends_it(here, ito_sde):
    code, out, err = ito_sde("frontier noisy other")
    assert (code, out) == (2, "")
    assert "The run 'runs/other' has no record of a suite under linf; make it: ito-sde suite --run runs/other" in err
    line = err.partition("make it: ito-sde ")[2].strip().rstrip(".")
    assert line == "suite --run runs/other --norm linf --eps 0.1 --limit 12 --effort 0.01 --seed 0"
    assert ito_sde(line)[0] == 0
    code, out, err = ito_sde("frontier noisy other")
    assert code == 0, err
    assert "cannot be paired" not in out
    assert "original ResNet of noisy" in out  # another seed has trained another ResNet
    assert "Train its twin ('ito-sde train --config runs/noisy/config.yaml --omega 0 --run noisy-omega0')" in " ".join(
        out.split()
    )


def test_a_record_of_the_old_form_is_drawn_and_cannot_be_paired(here, ito_sde):
    file, record = record_of("still")
    for entry in (
        record,
        *record["clean"].values(),
        *(e[who] for e in record["attacked"] for who in ("ito", "resnet")),
    ):
        for key in ("index", "truth", "labels"):
            entry.pop(key, None)
    file.write_text(json.dumps(record))
    code, out, err = ito_sde("frontier noisy still")
    assert code == 0, err
    text = " ".join(out.split())
    assert text.count("cannot be paired") == 1
    assert f"still cannot be paired with noisy: the record {file.name} is of an earlier version" in text
    assert "make it again: ito-sde suite --run runs/still --norm linf --eps 0.02 --eps 0.1 --limit 12" in text
    assert next(line for line in out.splitlines() if line.startswith("still  ")).rstrip().endswith(" -")


def test_a_record_of_other_weights_is_refused(here, ito_sde):
    words = ["train", *TRAIN, "--set", "finetune.lr=0.002", "--run", "noisy", "--overwrite"]
    assert ito_sde(words)[0] == 0
    code, out, err = ito_sde("frontier noisy still")
    assert (code, out) == (2, "")
    assert "is not of the weights that the run has now; delete it, and make it again: ito-sde suite --run" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "RUN"),
        (["noisy", "stil"], "did you mean 'still'"),
        (["noisy", "runs/noisy"], "name each run once"),
        (["noisy", "noisy"], "name each run once"),
        (["noisy", "still", "--against", "other"], "Unknown run in --against 'other'"),
        (["noisy", "still", "--label", "still"], "RUN=TEXT"),
        (["noisy", "still", "--label", "stil=x"], "did you mean 'still'"),
        (["noisy", "still", "--label", "still=noisy"], "Two runs are called 'noisy'"),
        (["noisy", "--eps", "8"], "8/255"),
        (["noisy", "--eps", "0.3"], "no record of a suite under linf at eps 0.3"),
        (["noisy", "--out", "f.xyz"], "format"),
        (["noisy", "--out", "taken.png"], "taken.json"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(words, said, here, ito_sde):
    Path("taken.json").mkdir()
    code, out, err = ito_sde(["frontier", *words])
    assert (code, out) == (2, "")
    assert said in err
    assert "not foreseen" not in err


def test_runs_of_one_name_are_told_apart_by_their_paths(here, ito_sde):
    shutil.copytree("runs/noisy", "more/noisy")
    code, out, _ = ito_sde("frontier noisy more/noisy --json")
    assert code == 0
    assert [point["label"] for point in json.loads(out)["points"]] == ["runs/noisy", "more/noisy", "original ResNet"]


# --- the picture ----------------------------------------------------------------------------------------


def crowded(home: Path, n: int = 9) -> Frontier:
    """Many ensembles near each other, some with noise, and two ResNets."""
    frontier = read_frontier({name: Run.open(home / "runs" / name) for name in ("noisy", "still")})
    noisy, still, resnet = frontier.points
    labels = ["a name that is so long that the legend must break it", "_a $x$ & <b>", "日本", "Itô", *"fghijklm"][:n]
    points = [
        replace(
            (noisy, still)[i % 2],
            label=label,
            clean=Decisions(Outcomes(100, 96 - i % 3, 2, 2 + i % 3), None),
            honest=Decisions(Outcomes(100, 50 + i, 50 - 2 * i, i), None),
        )
        for i, label in enumerate(labels)
    ]
    resnets = [replace(resnet, label=f"original ResNet of {name}") for name in "ab"]
    return replace(frontier, points=(*points, *resnets), reference=points[0], twins=((points[0], points[1]),))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_labels_do_not_overlap_and_hide_no_data(home, tmp_path, canvas):
    frontier = crowded(home)
    pictures.frontier_picture(tmp_path / "f.png", frontier)
    canvas().draw_without_rendering()
    [legend], [axis] = canvas().legends, canvas().axes
    texts = legend.get_texts()
    said = [" ".join(text.get_text().split()) for text in texts]
    assert said[: len(frontier.points)] == [point.label.replace("$", r"\$") for point in frontier.points]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    assert not legend.get_window_extent().overlaps(axis.get_window_extent())
    width, height = canvas().get_size_inches() * canvas().dpi
    for text in [*texts, axis.title, axis.xaxis.label, axis.yaxis.label]:
        box = text.get_window_extent()
        assert -1 <= box.x0 <= box.x1 <= width + 1, text.get_text()
        assert -1 <= box.y0 <= box.y1 <= height + 1, text.get_text()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_points_differ_without_colour_and_are_filled_where_there_is_noise(home, tmp_path, canvas):
    frontier = crowded(home)
    pictures.frontier_picture(tmp_path / "f.png", frontier)
    handles = canvas().legends[0].legend_handles[: len(frontier.points)]
    looks = [(handle.get_marker(), handle.get_markerfacecolor() == "white") for handle in handles]
    assert len(set(looks)) == len(looks)
    assert [hollow for _, hollow in looks] == [not point.omega for point in frontier.points]


def test_bars_are_the_intervals_and_light_segments_the_abstentions(home, tmp_path, canvas):
    frontier = read_frontier({"noisy": Run.open(home / "runs/noisy")})
    point = replace(
        frontier.points[0],
        clean=Decisions(Outcomes(100, 90, 10, 0), None),
        honest=Decisions(Outcomes(100, 40, 35, 25), None),
    )
    pictures.frontier_picture(tmp_path / "f.png", replace(frontier, points=(point,), reference=point))
    [axis] = canvas().axes
    light = [line for line in axis.lines if line.get_linewidth() == 5]
    assert [[list(map(round, values)) for values in line.get_data()] for line in light] == [[[90, 90], [40, 65]]]
    across, upright = (c.get_segments()[0] for c in axis.collections)
    for segment, i, rate in ((across, 0, point.clean), (upright, 1, point.honest)):
        wilson = rate.outcomes.rate("correct")
        assert segment[:, i] == pytest.approx([100 * wilson.low, 100 * wilson.high])
