"""Command lines that nobody would type: the program answers with a sentence, and a code that says whose fault it is.

``RANDOM_LINES`` is the number of random lines (default 120, some 30 s), ``RANDOM_LINES_SEED`` their seed:

    RANDOM_LINES=400 RANDOM_LINES_SEED=3 pytest tests/cli/test_command_lines.py -k random
"""

import errno
import json
import os
import random
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

LINES, SEED = int(os.environ.get("RANDOM_LINES", "120")), int(os.environ.get("RANDOM_LINES_SEED", "0"))
LONG = "x" * 3000
REPRODUCE = ["--limit", "8", "--set", "ensemble.members=1", "--set", "resnet.epochs=1", "--set", "finetune.epochs=1"]
TINY = ["--limit", "60", "--set", "resnet.epochs=1", "--epochs", "1", "--members", "2", "--inferences", "3"]


def ito_sde(line: str | list[str], capfd: pytest.CaptureFixture) -> tuple[int, str, str]:
    """One command line (or its words) in this process, as `main` runs it: exit code, stdout, stderr."""
    from neuralsde_ito.cli import main

    argv = sys.argv
    sys.argv = ["ito-sde", *(line.split() if isinstance(line, str) else line)]
    capfd.readouterr()
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = argv
    out, err = capfd.readouterr()
    return stop.value.code or 0, out, err


def complaint(code: int, err: str) -> str:
    """The sentence on stderr of a line that failed, checked for what all of them have in common."""
    assert code in (1, 2), err
    assert "Traceback" not in err
    assert "not foreseen" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(line) <= 400
    assert err.rstrip().endswith(line)  # it stands last, and on one line
    return line


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished runs ``tiny`` and ``single``, and with whatever else a word may name."""
    folder = tmp_path_factory.mktemp("home")
    from neuralsde_ito.cli import main

    for name, few in (("tiny", []), ("single", ["--members", "1", "--inferences", "1"])):
        done = _quietly(main, ["train", *TINY, *few, "--runs", str(folder / "runs"), "--run", name])
        assert done == 0
    return folder


def _quietly(main, words: list[str]) -> int:
    argv, sys.argv = sys.argv, ["ito-sde", *words]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = argv
    return stop.value.code or 0


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder for one test, and the working directory."""
    folder = tmp_path / "home"
    shutil.copytree(home, folder)
    monkeypatch.chdir(folder)
    return folder


# --- the paper's tables and figures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tabel4", "did you mean 'table4'"),
        ("table4 --scale smal", "did you mean 'small'"),
        ("table4 --scale small", "--scale small --data FOLDER --weights FILE"),
        ("table4 --scale small --data folder", "needs --weights"),
        ("table6 --scale paper", "needs ImageNet: ito-sde reproduce table6 --scale paper --imagenet FOLDER"),
        ("table6 --imagenet folder", "--imagenet is for the scale paper"),
        ("table2 --set sde.omega=1", "items say which omega"),
        ("table2 --set attack.images=5", "items and scales say what is attacked"),
        ("table2 --weights runs/tiny/resnet.safetensors --set resnet.lr=1", "weights are given"),
        ("table2 --set ensemble.member=1", "ensemble.members"),
        ("table2 --set ensemble.members=0", "ensemble.members"),
        ("table2 --scale small --data folder --weights runs/tiny/resnet.safetensors", "resnet.safetensors"),
        ("table2 --out runs/tiny/config.yaml", "config.yaml"),
    ],
)
def test_a_reproduction_that_cannot_be_is_refused_before_any_work(words: str, said: str, here: Path, capfd) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog", "emu"):  # three classes: the weights have ten
            Path("folder", split, name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(f"folder/{split}/{name}/0.png")
    code, out, err = ito_sde(f"reproduce {words}", capfd)
    assert code == 2
    assert said in complaint(code, err)
    assert out == ""
    assert not list(Path("reproduction").rglob("*.safetensors"))


def test_a_reproduction_writes_its_page_goes_on_and_names_what_it_does_not_use(here: Path, capfd) -> None:
    line = ["reproduce", "table2", "figure1", "table5", *REPRODUCE]
    code, out, err = ito_sde([*line, "--dry-run"], capfd)
    assert (code, "Leave --dry-run out" in out) == (0, True), err
    assert not Path("reproduction").exists()
    code, out, err = ito_sde(line, capfd)
    assert code == 0, err
    assert "Table 2: CIFAR-10 without attack" in out
    folder = Path("reproduction/smoke")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert list(results["items"]) == ["table2", "table5", "figure1"]
    for name in ("report.html", "report.md", *results["items"]["figure1"]["figures"][0]["files"].values()):
        assert (folder / name).stat().st_size > 500
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    first, *_ = sorted((folder / "cache").glob("vote-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-5])
    code, out, err = ito_sde([*line, "--json"], capfd)
    assert code == 0, err
    assert f"1 kept result in {folder / 'cache'} of another version, or damaged" in err
    assert first.stem in err
    again = json.loads(out)
    assert again["items"] == results["items"]
    changed = {file for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert changed == {first}


# --- options that do nothing ----------------------------------------------------------------------------

IDLE = {
    **{
        f"bench {words}": (f"bench --part training {words}", words.split()[0])
        for words in ("--eps 0.1", "--images 4", "--steps 2", "--eot 2", "--compile")
    },
    "bench --part memory --batch": ("bench --arch resnet8 --part memory --batch 4", "--batch"),
    "bench --arch --run": ("bench --arch resnet8 --run tiny", "--run"),
    "bench --arch --eps": ("bench --arch resnet8 --eps 0.1", "--eps"),
    "evaluate --full": ("evaluate --limit 4 --full --confidence 0.9", "--confidence"),
    **{
        f"print-config {words}": (f"train --print-config {words}", words.split()[0])
        for words in ("--json", "--overwrite", "--device cpu", "--run other", "--runs others")
    },
}


@pytest.mark.parametrize("case", IDLE)
def test_an_option_that_would_do_nothing_is_refused(case: str, here: Path, capfd: pytest.CaptureFixture) -> None:
    line, name = IDLE[case]
    code, out, err = ito_sde(line, capfd)
    said = complaint(code, err)
    assert code == 2
    assert name in said
    assert "would do nothing" in said
    assert out == ""


OTHERS = {  # options that another verb has, also where that verb was an option before
    "attack": ("--bundle b", "--noise known", "--repeat 2", "--effort 2", "--resume", "--peer foolbox"),
    "suite": (
        *("--save s", "--steps 3", "--step-size 0.1", "--eot 2", "--restarts 2", "--objective dlr"),
        *("--random-start", "--no-random-start", "--preset fgsm", "--surrogate resnet"),
    ),
    "attack --suite standard": ("--save s",),
    "orders": ("--csv c.csv", "--save c.png", "--limit 4", "--run tiny", "--seed 1", "--versus single"),
    "depth": ("--csv c.csv", "--no-gradients", "--peer torchsde"),
    "compare": ("--versus single", "--schedule constant", "--horizon 2", "--peer diffrax"),
    "compare --depth": ("--csv c.csv",),
}


@pytest.mark.parametrize("line", [f"{verb} {words}" for verb, every in OTHERS.items() for words in every])
def test_an_option_of_another_verb_is_refused(line: str, here: Path, capfd: pytest.CaptureFixture) -> None:
    option = next(word for word in reversed(line.split()) if word.startswith("--"))
    code, out, err = ito_sde(line, capfd)
    assert code == 2
    assert re.search(f"No such option:? '?{option}\\b|has no {option}: it is an option of", complaint(code, err))
    assert out == ""


def test_options_that_go_together_are_taken(here: Path, capfd: pytest.CaptureFixture) -> None:
    for line in (
        "train --print-config --resume --run tiny",
        "depth --run tiny --versus single --schedule constant --horizon 2 --limit 4 --steps 1 --save d.png",
        "orders --problem geometric-brownian --peer torchsde --solver euler --steps 8",
        "attack --eps 0.1 --limit 2 --objective targeted-vote --steps 1 --eot 2 --surrogate resnet --no-random-start",
    ):
        code, _, err = ito_sde(line, capfd)
        assert code == 0, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--weights runs/tiny/resnet.safetensors --set resnet.epochs=3", "resnet.epochs would do nothing"),
        ("--set data.size=16", "data.size is for image folders"),
        ("--set data.path=folder", "data.path is for CIFAR and image folders"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(words: str, said: str, here: Path, capfd) -> None:
    code, out, err = ito_sde(f"train --limit 20 {words}", capfd)
    assert code == 2
    assert said in complaint(code, err)
    assert out == ""
    assert sorted(folder.name for folder in Path("runs").iterdir()) == ["single", "tiny"]


README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("line", re.findall(r"^\$ ito-sde (.+?)(?: +#.*)?$", README, re.MULTILINE))
def test_the_command_lines_of_the_readme_are_taken(line: str, tmp_path: Path, capfd, monkeypatch) -> None:
    from neuralsde_ito.cli import options

    from neuralsde_ito.audits import bundle
    from neuralsde_ito.reproduction import reproduce
    from neuralsde_ito.studies import orders as convergence
    from neuralsde_ito.validation import ItoError

    def reached(*_: object, **__: object) -> None:
        raise ItoError("the work was reached.")

    monkeypatch.chdir(tmp_path)
    for folder in ("linf-8of255", "l2-0.5"):
        Path("evidence", folder).mkdir(parents=True)
    Path("scan.png").touch()
    begins = (
        (options, "find_run"),
        (options, "open_run"),
        (options, "open_model"),
        (bundle, "load_bundle"),
        (convergence, "measure_order"),
        (reproduce, "make_plan"),
    )
    for module, name in begins:
        monkeypatch.setattr(module, name, reached)
    if line.startswith("train") and "print-config" not in line:
        # The images, the weights and the run that it names are not here.
        code, _, err = ito_sde(f"{line.replace('--resume', '')} --print-config", capfd)
        assert code == 0, err
        return
    code, _, err = ito_sde(line, capfd)
    assert code == 2
    assert complaint(code, err) == "Error: the work was reached."


def test_the_readme_has_command_lines() -> None:
    assert README.count("\n$ ito-sde ") > 10


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (
            "compare --solver euler --problem double-well --steps 8",
            "orders --solver euler --problem double-well --steps 8",
        ),
        ("compare --problem=all", "orders --problem=all"),
        ("attack --suite standard --eps 0.1", "suite --eps 0.1"),
        ("attack --eps 0.1 --suite=standard", "suite --eps 0.1"),
        ("compare --depth --versus single", "depth --versus single"),
        ("compare --versus single --depth", "depth --versus single"),
    ],
)
def test_an_option_that_became_a_verb_is_forwarded_with_a_hint(before: str, now: str, capfd) -> None:
    from neuralsde_ito.cli import forwarded

    assert forwarded(before.split()) == now.split()
    out, err = capfd.readouterr()
    assert out == ""
    (hint,) = err.splitlines()
    assert hint.endswith(f"is now 'ito-sde {now.split()[0]}'.")
    assert forwarded(now.split()) == now.split()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("words", ["--suite other", "--suite=other", "--suite", "--suite --json"])
def test_another_suite_is_refused_and_the_verb_is_named(words: str, capfd) -> None:
    code, out, err = ito_sde(f"attack {words}", capfd)
    assert code == 2
    assert "'ito-sde suite'" in complaint(code, err)
    assert out == ""


# --- files that cannot be written -----------------------------------------------------------------------

WRITERS = {
    "compare --save": ("compare --limit 2 --steps 1 --save", ".png"),
    "compare --csv": ("compare --limit 2 --steps 1 --csv", ".csv"),
    "depth --save": ("depth --limit 2 --steps 1 --save", ".png"),
    "bench --save": ("bench --part training --repeats 1 --save", ".png"),
    "audit --html": ("audit --limit 2 --steps 1 --html", ".html"),
    "attack --save": ("attack --limit 2 --steps 1 --eps 0.1 --save", ""),
    "suite --bundle": ("suite --limit 2 --effort 0.1 --eps 0.1 --bundle", ""),
    "train --run": ("train --limit 20 --run", ""),
}
CANNOT = {
    "a file for a folder": "file/{}",
    "a file below a file": "file/below/{}",
    "a long name": LONG,
    "a long folder": f"new/{LONG}/x",
}


def _fails_if_it_works(*_: object, **__: object) -> None:
    raise AssertionError("the work began")


@pytest.mark.parametrize("path", CANNOT)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_be_written_is_noticed_before_the_work(
    writer: str, path: str, here: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuralsde_ito.attacks import sweep as evaluation
    from neuralsde_ito.attacks.base import Attack
    from neuralsde_ito.benchmarks import costs as benchmark
    from neuralsde_ito.runs.training import Trainer
    from neuralsde_ito.studies import compare as comparison
    from neuralsde_ito.studies import depth

    monkeypatch.setattr(Attack, "run", _fails_if_it_works)
    monkeypatch.setattr(Trainer, "fit", _fails_if_it_works)
    for module, name in (
        (benchmark, "bench_training"),
        (comparison, "compare_solvers"),
        (depth, "read_depths"),
        (evaluation, "attack_sweep"),
    ):
        monkeypatch.setattr(module, name, _fails_if_it_works)
    Path("file").write_text("")
    words, ending = WRITERS[writer]
    before = sorted(here.rglob("*"))
    code, out, err = ito_sde([*words.split(), CANNOT[path].format("x") + ending], capfd)
    assert code == 2, err
    complaint(code, err)
    assert out == ""
    assert sorted(here.rglob("*")) == before


def test_missing_folders_of_an_output_file_are_made(here: Path, capfd: pytest.CaptureFixture) -> None:
    code, _, err = ito_sde(
        [
            "compare",
            "--limit",
            "2",
            "--steps",
            "1",
            "--solver",
            "euler",
            "--save",
            "new/a/c.svg",
            "--csv",
            "new/b/c.csv",
        ],
        capfd,
    )
    assert code == 0, err
    assert "<svg" in Path("new/a/c.svg").read_text()
    assert len(Path("new/b/c.csv").read_text().splitlines()) == 2


def test_a_picture_in_a_format_that_is_not_there_is_told_those_that_are(
    here: Path, capfd: pytest.CaptureFixture
) -> None:
    for name in ("c.txt", "c", "c.", "", "c.pgf"):
        for line in ("compare --limit 2 --steps 1 --save", "bench --part training --save"):
            code, out, err = ito_sde([*line.split(), name], capfd)
            assert code == 2
            assert "pdf, png" in complaint(code, err)
            assert out == ""


def test_a_folder_or_a_pipe_is_no_file(here: Path, capfd: pytest.CaptureFixture) -> None:
    Path("folder.csv").mkdir()
    os.mkfifo("pipe.csv")
    for name in ("folder.csv", "pipe.csv"):
        code, _, err = ito_sde(f"compare --limit 2 --steps 1 --csv {name}", capfd)
        assert code == 2
        assert name in complaint(code, err)


def test_a_check_leaves_what_is_there_as_it_is(here: Path, capfd: pytest.CaptureFixture) -> None:
    Path("c.csv").write_text("mine")
    code, _, err = ito_sde("compare --limit 2 --steps 3 --csv c.csv", capfd)
    assert code == 2, err
    assert Path("c.csv").read_text() == "mine"


@pytest.mark.parametrize(
    "line",
    [
        "compare --limit 2 --steps 1 --solver euler --save c.png",
        "compare --limit 2 --steps 1 --solver euler --csv c.csv",
        "attack --limit 2 --steps 1 --eot 2 --eps 0.1 --surrogate resnet",
        "train --limit 20 --run new",
        f"reproduce table2 {' '.join(REPRODUCE)}",
    ],
)
def test_a_disk_that_fills_up_meanwhile_is_told(line: str, here: Path, capfd, monkeypatch) -> None:
    from neuralsde_ito import files

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    code, _, err = ito_sde(line, capfd)
    assert code == 2, err
    assert "no space left on device" in complaint(code, err)


def test_a_bundle_of_before_is_noticed_before_the_work(here: Path, capfd, monkeypatch) -> None:
    from neuralsde_ito.attacks.base import Attack

    monkeypatch.setattr(Attack, "run", _fails_if_it_works)
    Path("evidence/linf-0.1").mkdir(parents=True)
    Path("evidence/linf-0.1/mine").write_text("")
    code, _, err = ito_sde("suite --limit 2 --eps 0.1 --bundle evidence", capfd)
    assert code == 2
    assert "evidence/linf-0.1" in complaint(code, err)


def test_a_run_whose_folder_cannot_be_written_into_is_noticed_before_the_attack(here: Path, capfd, monkeypatch) -> None:
    import tempfile

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refused)  # root may write everywhere
    code, _, err = ito_sde("attack --limit 2 --steps 1 --eps 0.1", capfd)
    assert code == 2
    assert "runs/single" in complaint(code, err)
    assert "permission denied" in err


@pytest.mark.parametrize("fooled", [0, 1, 2])
def test_a_picture_of_an_attack_is_drawn_for_any_number_of_fooled_images(fooled: int, tmp_path: Path) -> None:
    from neuralsde_ito.cli.pictures import attack_picture

    import neuralsde_ito as ito
    from neuralsde_ito.attacks.sweep import Sweep
    from neuralsde_ito.outcomes import WorstCase

    data = ito.load_data("digits", test_limit=4)
    index, x, y = next(data.test.batches(4))
    labels = y.clone()
    labels[:fooled] = -1
    case = WorstCase(x, torch.zeros_like(y), labels, torch.zeros(1, 4, 10).long())
    settings = {"denial": [case], "evasion": [case]}
    sweep = Sweep([0.0], y, index, {"resnet": y, "ito": y}, [{"resnet": labels}], [y], [{"resnet": x}], **settings)
    attack_picture(tmp_path / "a.png", sweep, {0.0: "0"}, "linf", data)
    assert (tmp_path / "a.png").stat().st_size > 10_000


# --- long names, and names that are no UTF-8 ------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "attack --{}",
        "attack --run {}",
        "attack --runs {}",
        "attack --norm {}",
        "attack --eps {}",
        "attack --eps 1/{}",
        "attack --preset {}",
        "attack --surrogate {}",
        "attack --objective {}",
        "attack --rule {}",
        "attack --limit {}",
        "attack --suite {}",
        "suite --peer {}",
        "suite --noise {}",
        "attack {}",
        "attack --device {}",
        "evaluate --confidence {}",
        "predict {}",
        "predict {}.png {}.png",
        "verify {}",
        "compare --solver {}",
        "orders --problem {}",
        "depth --versus {}",
        "depth --schedule {}",
        "compare --save {}",
        "bench --arch {}",
        "bench --part {}",
        "train --config {}",
        "train --config {}.yaml",
        "train --set {}",
        "train --set {}=1",
        "train --set sde.{}=1",
        "train --set sde.omega={}",
        "train --set seed={}",
        "train --set ensemble.rule={}",
        "train --data {}",
        "train --data ./{}",
        "train --weights {}",
        "train --weights {}.pth",
        "train --arch {}",
        "train --run {}",
        "train --runs {}",
    ],
)
def test_a_long_name_is_not_echoed_whole(line: str, here: Path, capfd: pytest.CaptureFixture) -> None:
    for word in (LONG, "ß→\udcff" * 1000):
        code, out, err = ito_sde(line.format(*[word] * 2).split(" "), capfd)
        assert code == 2, err
        complaint(code, err)
        assert out == ""


def test_a_run_whose_name_is_not_utf_8_works(here: Path, capfd: pytest.CaptureFixture) -> None:
    name = "r\udcff"
    try:
        shutil.copytree("runs/tiny", Path("runs") / name)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system has no such names")
    for line in (
        "evaluate --limit 2",
        "attack --eps 0.1 --limit 2 --steps 1 --save a",
        "audit --limit 2 --steps 1 --queries 2 --draws 4 --html a.html",
    ):
        for form in ([], ["--json"]):
            code, out, err = ito_sde([*line.split(), "--run", name, *form], capfd)
            assert code == 0, err
            assert "r\\udcff" in out
            if form:
                assert json.loads(out)["run"] == f"runs/{name}"


# --- whose fault ----------------------------------------------------------------------------------------


def test_what_was_not_foreseen_exits_with_1_and_says_so(here: Path, capfd, monkeypatch) -> None:
    from neuralsde_ito.runs import evaluate as evaluation

    def broken(*_: object, **__: object) -> None:
        raise ValueError("a fault\nof ours")

    monkeypatch.setattr(evaluation, "evaluate", broken)
    code, _, err = ito_sde(["evaluate", "--limit", "2"], capfd)
    assert code == 1
    assert "Error: a fault of ours" in err.splitlines()
    assert "not foreseen" in err


def test_a_training_that_diverges_exits_with_1_and_its_own_reason(here: Path, capfd: pytest.CaptureFixture) -> None:
    code, _, err = ito_sde(["train", *TINY, "--set", "resnet.lr=1e30"], capfd)
    assert code == 1
    assert "diverged" in complaint(code, err)


def _torn(run: Path, how: str) -> None:
    member = run / "members" / "00.safetensors"
    if how == "truncated member":
        member.write_bytes(member.read_bytes()[:1000])
    elif how == "empty member":
        member.write_bytes(b"")
    elif how == "member is a folder":
        member.unlink()
        member.mkdir()
    elif how == "member missing":
        member.unlink()
    elif how == "member of another network":
        save_file({"weight": torch.ones(3)}, member)
    elif how == "truncated resnet":
        (run / "resnet.safetensors").write_bytes((run / "resnet.safetensors").read_bytes()[:1000])
    elif how == "resnet missing":
        (run / "resnet.safetensors").unlink()
    elif how == "config is a list":
        (run / "config.yaml").write_text("- 1\n- 2\n")
    elif how == "config is empty":
        (run / "config.yaml").write_text("")
    elif how == "config is not YAML":
        (run / "config.yaml").write_text("{[")
    elif how == "config is not UTF-8":
        (run / "config.yaml").write_bytes(b"name: \xff\xfe")
    elif how == "config is a folder":
        (run / "config.yaml").unlink()
        (run / "config.yaml").mkdir()
    elif how == "members is a file":
        shutil.rmtree(run / "members")
        (run / "members").write_text("")


TORN = [
    "truncated member",
    "empty member",
    "member is a folder",
    "member missing",
    "member of another network",
    "truncated resnet",
    "resnet missing",
    "config is a list",
    "config is empty",
    "config is not YAML",
    "config is not UTF-8",
    "config is a folder",
    "members is a file",
]


@pytest.mark.parametrize("how", TORN)
def test_a_torn_run_is_told_what_is_wrong_with_it(how: str, here: Path, capfd: pytest.CaptureFixture) -> None:
    shutil.copytree("runs/tiny", "runs/torn")
    _torn(Path("runs/torn"), how)
    code, out, err = ito_sde("evaluate --run torn --limit 2", capfd)
    assert code == 2, err
    assert "torn" in complaint(code, err)
    assert out == ""


@pytest.mark.parametrize("how", ["truncated", "not JSON", "not UTF-8", "a folder"])
def test_torn_metrics_do_not_stop_a_resume(how: str, here: Path, capfd: pytest.CaptureFixture) -> None:
    shutil.copytree("runs/tiny", "runs/torn")
    Path("runs/torn/members/01.safetensors").unlink()
    metrics = Path("runs/torn/metrics.jsonl")
    text = metrics.read_text()
    if how == "a folder":
        metrics.unlink()
        metrics.mkdir()
    else:
        metrics.write_bytes({"truncated": text[:-20].encode(), "not JSON": b"[\n", "not UTF-8": b"\xff\xfe"}[how])
    code, _, err = ito_sde("train --run torn --resume", capfd)
    if code:
        assert code == 2, err
        assert "metrics.jsonl" in complaint(code, err)


def test_a_run_with_weights_that_are_not_finite_is_evaluated(here: Path, capfd: pytest.CaptureFixture) -> None:
    for member in Path("runs/tiny/members").iterdir():
        save_file({k: v * float("nan") if v.is_floating_point() else v for k, v in load_file(member).items()}, member)
    code, out, err = ito_sde("evaluate --run tiny --limit 2 --full", capfd)
    assert code == 0, err
    assert "12 inferences had logits that are not finite and voted for nobody." in out
    code, out, _ = ito_sde("evaluate --run tiny --limit 2 --full --json", capfd)
    assert json.loads(out)["invalid_inferences"] == 12
    assert json.loads(out)["ito"]["counts"]["abstained"] == 2


def test_evaluate_says_how_many_inferences_voted_for_nobody(here: Path, capfd, monkeypatch) -> None:
    from neuralsde_ito.models.ensemble import ItoEnsemble

    predict = ItoEnsemble.predict

    def partly_invalid(self, x, *rest, **settings):
        prediction = predict(self, x, *rest, **settings)
        return replace(prediction, invalid=torch.full_like(prediction.drawn, 2))

    said = "inferences had logits that are not finite and voted for nobody."
    code, out, _ = ito_sde("evaluate --run tiny --limit 3", capfd)
    assert code == 0
    assert said not in out
    monkeypatch.setattr(ItoEnsemble, "predict", partly_invalid)
    code, out, _ = ito_sde("evaluate --run tiny --limit 3 --untrained", capfd)
    assert f"\n6 {said}" in out
    assert f"Before fine-tuning: 6 {said}" in out
    code, out, _ = ito_sde("evaluate --run tiny --limit 3 --json", capfd)
    assert json.loads(out)["invalid_inferences"] == 6


def test_a_suite_of_a_run_whose_name_is_not_utf_8_leaves_its_evidence(here: Path, capfd) -> None:
    name = "r\udcff"
    try:
        shutil.copytree("runs/tiny", Path("runs") / name)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system has no such names")
    line = f"suite --effort 0.02 --eps 0.1 --limit 2 --bundle evidence --run {name}"
    code, _, err = ito_sde(line, capfd)
    assert code == 0, err
    assert json.loads(Path("evidence/linf-0.1/records.json").read_text())["config"]["run"] == f"runs/{name}"


def test_json_holds_no_nan(here: Path, capfd: pytest.CaptureFixture) -> None:
    from neuralsde_ito.cli.output import json_bytes

    content = {"a": [1.5, float("nan")], "b": {"c": (float("inf"), None)}, "d": "r\udcff"}
    assert json.loads(json_bytes(content)) == {"a": [1.5, None], "b": {"c": [None, None]}, "d": "r\udcff"}


# --- words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        ({}, [1.5 * 0.25, 0.5 * 0.25]),  # 5 eps / steps on average
        ({"step_size": "0.02"}, [0.02, 0.02]),
        ({"preset": "madry20"}, [0.125, 0.125]),
    ],
)
def test_the_default_attacks_steps_shrink_unless_their_length_is_typed(words: dict, lengths: list[float]) -> None:
    from neuralsde_ito.cli.attack import Asked

    rest = dict.fromkeys(("step_size", "eot", "restarts", "objective", "random_start"))
    attack = Asked(**{"norm": "linf", "radii": (), "preset": "default", "steps": 2, **rest, **words}).at(0.1)
    assert [attack.length(step) for step in range(2)] == pytest.approx(lengths)


def test_the_names_of_the_options_are_those_of_the_library() -> None:
    from neuralsde_ito import names
    from neuralsde_ito.attacks import BALLS, PRESETS
    from neuralsde_ito.attacks.objectives import OBJECTIVES
    from neuralsde_ito.attacks.other_libraries import PEERS
    from neuralsde_ito.attacks.report import NOISES
    from neuralsde_ito.attacks.sweep import SURROGATES
    from neuralsde_ito.data import DATASETS
    from neuralsde_ito.models.resnets import ARCHITECTURES

    assert tuple(BALLS) == names.NORMS
    assert tuple(PRESETS) == names.PRESETS
    assert tuple(OBJECTIVES) == names.OBJECTIVES
    assert tuple(SURROGATES) == names.SURROGATES
    assert tuple(NOISES) == names.NOISES
    assert tuple(PEERS) == names.PEERS
    assert tuple(DATASETS) == names.DATA_SETS
    assert tuple(ARCHITECTURES) == names.ARCHITECTURES


def test_help_names_all_objectives_and_all_are_taken(here: Path, capfd: pytest.CaptureFixture) -> None:
    from neuralsde_ito.attacks.objectives import OBJECTIVES

    code, out, _ = ito_sde(["attack", "--help"], capfd)
    assert code == 0
    assert all(name in "".join(out.split()) for name in OBJECTIVES)  # a line may end at a hyphen
    for name in OBJECTIVES:
        words = f"attack --objective {name} --eps 0.1 --limit 2 --steps 1 --eot 2 --surrogate ensemble --json"
        code, out, err = ito_sde(words, capfd)
        assert code == 0, err
        assert json.loads(out)["attacked"][0]["attack"]["objective"] == name
    code, _, err = ito_sde("attack --objective denail", capfd)
    assert "denial" in complaint(code, err)


def test_one_is_singular(here: Path, capfd: pytest.CaptureFixture) -> None:
    _, out, _ = ito_sde("evaluate --run single --limit 1", capfd)
    assert "Ensemble  1 member x 1 inference, hierarchical" in out
    assert "1 test image of digits" in out
    assert "trained 1 epoch\n" in out
    _, out, _ = ito_sde("evaluate --run tiny --limit 2", capfd)
    assert "Ensemble  2 members x 3 inferences" in out
    _, out, _ = ito_sde("attack --run tiny --limit 1 --steps 1 --eot 1 --eps 0.1 --surrogate resnet", capfd)
    assert "from a random start, 1 restart, 1 path a gradient" in " ".join(out.split())


# --- random lines ---------------------------------------------------------------------------------------


def _odd(draw: random.Random) -> str:
    """A word that few options expect."""
    return draw.choice(ODD)


# fmt: off
ODD = [
    "", " ", ".", "..", "/", "-", "--", "-1", "0", "1", "2", "3", "0.5", "1e-3", "1e400", "-1e400", "nan", "inf",
    "-inf", "1/0", "8/255", "0/1", "1/3/5", "0x10", "1_0", "٣", "½", "ß", "Itô", "日本語", "\u202e", "a\x1bb", "\udcff",
    "a b", "a\nb", "*", "~", "$HOME", "%s", "{}", "{0}", "'", '"', "\\", "null", "true", "[]", "{a: 1}", "!!python/x",
    "&a [*a]", "digits", "resnet8", "tiny", "single", "torn", "runs", "runs/tiny", "file", "file/x", "folder",
    "bundle", "picture.png", "torn.png", "torn.pth", "torn.safetensors", "torn.yaml", "list.yaml", "good.yaml",
    "binary.yaml", "/proc/x", "/dev/null", "new/x.png", "new/x.csv", "new.svg", "x.xyz", "euler", "srk", "ode:rk4",
    "linf", "l2", "flat", "hierarchical", "cpu", "cuda:9", "auto", "all", "constant", "dlr", "fgsm", "-h", "--json",
    "--run", LONG, "é" * 3000, "9" * 3000, "9" * 30,
]
# fmt: on


# By verb: words that keep the work small, and options with values that fit (None: a flag; one is often replaced).
RUN = {"--run": ["tiny", "single", "runs/tiny"], "--runs": ["runs"], "--device": ["cpu", "auto"], "--seed": ["0", "5"]}
VOTE = {"--inferences": ["1", "2"], "--rule": ["flat", "hierarchical"]}
VERBS = {
    "evaluate": (
        ["--limit", "3"],
        {**RUN, **VOTE, "--full": None, "--confidence": ["0.9"], "--untrained": None, "--batch-size": ["1", "2"],
         "--json": None},
    ),
    "attack": (
        ["--limit", "2", "--steps", "1", "--eot", "2"],
        {**RUN, **VOTE, "--norm": ["linf", "l2"], "--eps": ["0.1", "8/255", "0"], "--preset": ["fgsm", "default"],
         "--step-size": ["0.1"], "--objective": ["dlr", "denial", "targeted-dlr"], "--restarts": ["2"],
         "--random-start": None, "--no-random-start": None, "--surrogate": ["resnet", "member"], "--batch-size": ["1"],
         "--save": ["adversarial"], "--json": None, "--bundle": ["evidence"]},
    ),
    "suite": (
        ["--limit", "2", "--effort", "0.02", "--eps", "0.1"],
        {**RUN, **VOTE, "--norm": ["linf"], "--noise": ["fresh", "fixed", "known"], "--repeat": ["1", "2"],
         "--resume": None, "--bundle": ["evidence"], "--peer": ["foolbox"], "--batch-size": ["1"], "--json": None,
         "--save": ["x"], "--effort": ["0.01", "nan", "inf", "-1"]},
    ),
    "audit": (
        ["--limit", "2", "--steps", "1", "--eot", "2", "--queries", "2", "--draws", "4"],
        {**RUN, **VOTE, "--norm": ["linf", "l2"], "--eps": ["0.1"], "--step-size": ["0.1"], "--restarts": ["1"],
         "--html": ["audit.html"], "--strict": None, "--json": None},
    ),
    "frontier tiny": (
        [],
        {"--runs": ["runs"], "--norm": ["linf", "l2"], "--eps": ["0.1"], "--against": ["tiny", "single"],
         "--label": ["tiny=a", "single=b"], "--out": ["f.png", "new/f.svg"], "--json": None, "RUN": ["single", "tiny"]},
    ),
    "certify": (
        ["--limit", "2", "--n", "20", "--n0", "5", "--sigma", "0.25"],
        {**RUN, "--n": ["30"], "--n0": ["3"], "--sigma": ["0.1", "1"], "--alpha": ["0.1"], "--beta": ["0", "0.01"],
         "--radius": ["0", "0.5", "64/255"], "--batch-size": ["1"], "--resume": None, "--json": None},
    ),
    "reproduce": (
        ["table2", "--limit", "6", "--dry-run"],
        {"--scale": ["smoke", "small", "paper"], "--data": ["folder"], "--weights": ["runs/tiny/resnet.safetensors"],
         "--imagenet": ["folder"], "--set": ["ensemble.members=1", "sde.omega=1"], "--seed": ["1"], "--out": ["made"],
         "--device": ["cpu"], "--json": None, "ITEM": ["density", "table4", "all"]},
    ),
    "predict picture.png": (
        [],
        {**RUN, **VOTE, "--json": None, "PICTURE": ["picture.png", "torn.png", "file"]},
    ),
    "compare": (
        ["--limit", "2", "--steps", "1", "--solver", "euler"],
        {**RUN, "--gradients": None, "--no-gradients": None, "--save": ["c.png", "new/c.svg"], "--csv": ["c.csv"],
         "--json": None, "--solver": ["euler", "srk", "heun"]},
    ),
    "orders": (
        ["--problem", "geometric-brownian", "--steps", "8", "--solver", "euler"],
        {"--problem": ["geometric-brownian"], "--solver": ["euler", "milstein"], "--peer": ["torchsde"],
         "--json": None},
    ),
    "depth": (
        ["--limit", "2", "--steps", "1"],
        {**RUN, "--versus": ["single", "tiny"], "--schedule": ["constant"], "--horizon": ["2", "0.3"],
         "--solver": ["euler", "srk"], "--save": ["d.png", "new/d.svg"], "--json": None},
    ),
    "bench": (
        ["--repeats", "1"],
        {**RUN, "--part": ["training", "inference", "vote", "suite"], "--arch": ["resnet8"], "--batch": ["2"],
         "--eps": ["0.1"], "--images": ["2"], "--steps": ["1"], "--eot": ["1"], "--save": ["b.png"], "--json": None},
    ),
    "train": (
        TINY,
        {"--config": ["digits", "good.yaml"], "--set": ["sde.omega=0.1", "sde.steps=2", "finetune.lr=1e30"],
         "--data": ["digits", "folder"], "--arch": ["resnet8"], "--weights": ["runs/tiny/resnet.safetensors"],
         "--omega": ["0.1", "0"], "--seed": ["1"], "--run": ["new", "tiny"], "--runs": ["runs"], "--resume": None,
         "--adversary": ["n-fgsm", "trades"], "--norm": ["l2"], "--eps": ["0.1", "9"],
         "--overwrite": None, "--device": ["cpu"], "--json": None, "--print-config": None},
    ),
    "verify bundle": (
        [],
        {**RUN, "--sample": ["1", "2"], "--batch-size": ["1"], "--json": None, "BUNDLE": ["bundle"]},
    ),
}  # fmt: skip


ENDLESS = {
    "--inferences",
    "--repeat",
    "--restarts",
    "--effort",
    "--batch",
    "--images",
    "--steps",
    "--eot",
    "--omega",
    "--n",
    "--n0",
}


def _value(draw: random.Random, option: str, fitting: list[str]) -> str:
    """A value of an option; not one that is right and asks for work without end."""
    word = draw.choice(fitting) if draw.random() < 0.55 else _odd(draw)
    return "0" if option in ENDLESS and set(word) == {"9"} else word


def _line(draw: random.Random) -> list[str]:
    """A command line: a verb, what keeps it small, some of its options, and one or two odd words."""
    verb = draw.choice([*VERBS, *VERBS, _odd(draw)])
    if verb not in VERBS:
        return [verb, *(_odd(draw) for _ in range(draw.randrange(3)))]
    small, options = VERBS[verb]
    words = verb.split()
    if verb.startswith("predict") and draw.random() < 0.5:
        words = ["predict", _odd(draw)]
    if verb.startswith("verify") and draw.random() < 0.5:
        words = ["verify", _odd(draw)]
    if verb == "bench":
        words += ["--part", draw.choice(["training", "path"]), "--arch", "resnet8"] if draw.random() < 0.5 else [
            "--part", "training"
        ]  # fmt: skip
    words += small
    for name in draw.sample(sorted(options), draw.randint(0, 4)):
        values = options[name]
        value = [] if values is None else [_value(draw, name, values)]
        words += [*([name] if name.startswith("-") else []), *value]
    if draw.random() < 0.15:
        words.insert(draw.randrange(len(words) + 1), _odd(draw))
    if draw.random() < 0.1:
        del words[draw.randrange(len(words))]
    return words


def _furnish(here: Path) -> None:
    """Things that words of the pool name."""
    Path("file").write_bytes(b"\x00\xff not much")
    Path("folder/train/a").mkdir(parents=True)
    Path("folder/test/a").mkdir(parents=True)
    Image.fromarray(np.full((9, 12), 99, np.uint8)).save("picture.png")
    Path("torn.png").write_bytes(Path("picture.png").read_bytes()[:60])
    Path("folder/test/a/torn.png").write_bytes(Path("torn.png").read_bytes())
    Path("folder/train/a/picture.png").write_bytes(Path("picture.png").read_bytes())
    weights = Path("runs/tiny/resnet.safetensors").read_bytes()
    for name in ("torn.safetensors", "torn.pth"):
        Path(name).write_bytes(weights[:500])
    Path("torn.yaml").write_text("sde: {omega: [")
    Path("list.yaml").write_text("- 1\n")
    Path("binary.yaml").write_bytes(b"\x00\xff")
    Path("good.yaml").write_text("sde: {omega: 0.1}\n")
    shutil.copytree("runs/tiny", "runs/torn")
    Path("runs/torn/config.yaml").write_text("[]")
    Path("bundle").mkdir()
    Path("bundle/records.json").write_text("{")


def test_random_lines_end_in_a_result_or_a_sentence(here: Path, capfd: pytest.CaptureFixture) -> None:
    _furnish(here)
    draw = random.Random(SEED)
    ends = {0: 0, 1: 0, 2: 0}
    failed = []
    for number in range(LINES):
        words = _line(draw)
        written = f"{number}: ito-sde {shlex.join(words)}"[:600]
        try:
            code, out, err = ito_sde(words, capfd)
            assert code in ends
            ends[code] += 1
            if code == 2 or (code == 1 and "DOES NOT STAND" not in out and "--strict" not in words):
                complaint(code, err)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.append(f"{written}\n    {type(error).__name__}: {str(error)[:1500]}")
    assert not failed, f"{len(failed)} of {LINES} lines (seed {SEED}):\n" + "\n".join(failed)
    print(f"{LINES} lines, seed {SEED}, by exit code: {ends}")
    assert min(ends[0], ends[2]) > LINES / 10, ends  # both ends occur


@pytest.mark.parametrize("verb", ["attack", "suite"])
def test_a_run_without_a_radius_for_the_norm_asks_for_one(verb: str, here: Path, capfd: pytest.CaptureFixture) -> None:
    shutil.copytree("runs/tiny", "runs/noeps")
    config = Path("runs/noeps/config.yaml")
    content = yaml.safe_load(config.read_text())
    content["attack"]["eps"], content["attack"]["also"] = {"l2": ["0.5"]}, {}
    config.write_text(yaml.safe_dump(content))
    code, out, err = ito_sde(f"{verb} --run noeps --limit 2", capfd)
    assert (code, out) == (2, "")
    assert "no radius for linf: give --eps" in complaint(code, err)
    shutil.rmtree("runs/noeps")


def test_an_older_form_typed_twice_is_forwarded(capsys: pytest.CaptureFixture) -> None:
    from neuralsde_ito.cli import forwarded

    words = ["attack", "--suite", "standard", "--norm", "l2", "--suite=standard", "--eps", "1"]
    assert forwarded(words) == ["suite", "--norm", "l2", "--eps", "1"]
    assert forwarded(["compare", "--depth", "--limit", "3"]) == ["depth", "--limit", "3"]
    assert capsys.readouterr().err.count("is now") == 2
