"""The command line as a user runs it: in processes of its own, from another directory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

PROGRAM = [sys.executable, "-c", "from neuralsde_ito.cli import main; main()"]
# One thread: on a busy machine two threads wait for each other and are slower; the result is the same.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--limit", "120", "--set", "resnet.epochs=3", "--epochs", "2", "--members", "2", "--inferences", "4"]


def ito_sde(*words: str, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*PROGRAM, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**ENVIRONMENT, **(environment or {})},
    )


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    files = [run / "resnet.safetensors", *sorted((run / "members").glob("*.safetensors"))]
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `ito-sde train` has made the run `runs/small`."""
    folder = tmp_path_factory.mktemp("user")
    done = ito_sde("train", *SMALL, "--run", "small", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "train.txt").write_text(done.stdout)
    return folder


def test_train_prints_the_table_and_leaves_the_run(trained: Path) -> None:
    text = (trained / "train.txt").read_text()
    header = next(line for line in text.splitlines() if line.startswith("model"))
    assert header.split("  ")[0] == "model"
    for column in ("correct", "incorrect", "abstained", "correct + abstained"):
        assert column in header
    run = trained / "runs" / "small"
    report = json.loads((run / "evaluation.json").read_text())
    counts = report["ito"]["counts"]
    assert counts["n"] == 120 == counts["correct"] + counts["wrong"] + counts["abstained"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        *(("resnet", e) for e in (1, 2, 3)),
        *((f"member {m}", e) for m in (0, 1) for e in (1, 2)),
    ]
    assert (run / "evaluation.png").stat().st_size > 10_000
    assert not list(run.rglob("*.state.pt"))
    members = [load_file(run / "members" / f"0{m}.safetensors") for m in (0, 1)]
    base = load_file(run / "resnet.safetensors")
    assert all(set(member) == set(base) for member in members)
    assert not torch.equal(members[0]["fc.weight"], members[1]["fc.weight"])  # each has its own order and noise
    assert not torch.equal(members[0]["fc.weight"], base["fc.weight"])


def test_evaluate_gives_the_same_numbers_at_any_batch_size(trained: Path) -> None:
    first = ito_sde("evaluate", "--json", cwd=trained)
    second = ito_sde("evaluate", "--json", "--batch-size", "7", cwd=trained)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "newest finished" in first.stderr
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    saved = json.loads((trained / "runs/small/evaluation.json").read_text())
    assert one == two
    assert one["ito"] == saved["ito"]
    assert one["resnet"] == saved["resnet"]


def test_attack_prints_both_models_and_saves_images_inside_the_ball(trained: Path) -> None:
    words = ["attack", "--norm", "linf", "--eps", "8/255", "--limit", "16", "--steps", "3", "--eot", "2"]
    done = ito_sde(*words, "--save", "adversarial", cwd=trained)
    assert done.returncode == 0, done.stderr
    # On digits the table also holds radii at which something is to be seen.
    for word in ("(clean)", "8/255", "0.1", "0.2", "ensemble", "member", "noise-free", "resnet", "strongest", "ResNet"):
        assert word in done.stdout, word
    assert "eot=1" not in done.stderr
    saved = load_file(trained / "adversarial" / "linf-8of255.safetensors")
    clean = {
        int(i): x
        for index, x, _ in __import__("neuralsde_ito").load_data("digits").test.batches(500)
        for i, x in zip(index, x, strict=True)
    }
    for name in ("ensemble", "member", "noise-free", "resnet"):
        assert saved[name].shape == (16, 1, 8, 8)
        delta = saved[name] - torch.stack([clean[int(i)] for i in saved["index"]])
        assert 0 < float(delta.abs().max()) <= 8 / 255 + 1e-6
    report = json.loads(sorted((trained / "runs/small").glob("attack-linf-*.json"))[-1].read_text())
    assert [entry["written"] for entry in report["attacked"]] == ["8/255", "0.1", "0.2"]
    worst = [entry["ito"]["counts"]["correct"] for entry in report["attacked"]]
    assert worst == sorted(worst, reverse=True)


def test_attack_with_one_path_a_gradient_warns(trained: Path) -> None:
    words = ["attack", "--norm", "l2", "--eps", "0.5", "--limit", "4", "--preset", "madry20", "--steps", "2", "--json"]
    done = ito_sde(*words, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert "Warning" in done.stderr
    assert "eot=1" in done.stderr
    assert json.loads(done.stdout)["attacked"][0]["attack"]["norm"] == "l2"


def test_predict_labels_a_picture(trained: Path) -> None:
    import neuralsde_ito as ito

    _, x, _ = next(ito.load_data("digits").test.batches(2))
    for i in range(2):
        Image.fromarray((x[i, 0] * 255).round().byte().numpy()).save(trained / f"{i}.png")
    done = ito_sde("predict", "0.png", "1.png", "--json", cwd=trained)
    assert done.returncode == 0, done.stderr
    images = json.loads(done.stdout)["images"]
    assert [record["image"] for record in images] == ["0.png", "1.png"]
    assert all(record["label"] in {*"0123456789", None} for record in images)
    assert all(sum(sum(votes) for votes in record["member_votes"]) == 8 for record in images)
    assert "share of 8 inferences" in ito_sde("predict", "0.png", cwd=trained).stdout


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL in the ResNet's training and in a member's; the weights are those of a run left alone, bit for bit."""
    words = [
        "train",
        "--limit",
        "200",
        "--set",
        "resnet.epochs=6",
        "--set",
        "resnet.batch_size=20",
        "--epochs",
        "6",
        "--set",
        "finetune.batch_size=20",
        "--members",
        "2",
        "--inferences",
        "1",
    ]
    alone = ito_sde(*words, "--run", "alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    run = tmp_path / "runs" / "killed"
    started = subprocess.Popen(
        [*PROGRAM, *words, "--run", "killed"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _kill_when(started, lambda: (run / "metrics.jsonl").exists() and not (run / "resnet.safetensors").exists())
    resume = ["train", "--run", "killed", "--resume"]
    started = subprocess.Popen(
        [*PROGRAM, *resume], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _kill_when(started, lambda: (run / "metrics.jsonl").read_text().count("member 0") >= 2)
    assert not (run / "members" / "01.safetensors").exists()
    done = ito_sde(*resume, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = weights_of(tmp_path / "runs" / "alone"), weights_of(run)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (run / "metrics.jsonl").read_text() == (tmp_path / "runs" / "alone" / "metrics.jsonl").read_text()


def test_a_killed_suite_goes_on_to_the_same_table_and_its_evidence_stands(trained: Path, tmp_path: Path) -> None:
    words = ["suite", "--run", "small", "--eps", "0.1", "--limit", "8", "--effort", "0.1"]
    words += ["--batch-size", "4", "--json"]
    alone = ito_sde(*words, cwd=trained)
    assert alone.returncode == 0, alone.stderr
    run = trained / "runs" / "small"

    def begun() -> bool:
        return len(list(run.glob("suite-*/ito/*.safetensors"))) >= 3

    started = subprocess.Popen(
        [*PROGRAM, *words], cwd=trained, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _kill_when(started, begun)
    assert begun()
    evidence = tmp_path / "evidence"
    done = ito_sde(*words, "--resume", "--bundle", str(evidence), cwd=trained)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["attacked"] == json.loads(alone.stdout)["attacked"]
    assert json.loads(done.stdout)["clean"] == json.loads(alone.stdout)["clean"]
    assert not list(run.glob("suite-*/"))  # a finished suite leaves its record only
    verified = ito_sde("verify", str(evidence / "linf-0.1"), "--run", "small", "--json", cwd=trained)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    text = ito_sde(*words[:-1], cwd=trained).stdout
    for said in ("step by step", "transfer, noise-free", "Square", "report", "An upper bound on robustness"):
        assert said in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--noise", "frsh"], "fresh"),
        (["--peer", "autoatack"], "autoattack"),
        (["--repeat", "0"], "repeat"),
    ],
)
def test_a_suite_that_cannot_be_is_told_in_a_sentence(trained: Path, words: list[str], said: str) -> None:
    done = ito_sde("suite", "--run", "small", "--limit", "4", *words, cwd=trained)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def _kill_when(process: subprocess.Popen, ready) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = ["train", "--limit", "200", "--set", "resnet.epochs=2000", "--run", "long"]
    process = subprocess.Popen(
        [*PROGRAM, *words], cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run = tmp_path / "runs" / "long"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "ito-sde train --run runs/long --resume" in errors
    assert (run / "resnet.state.pt").exists()
    assert "Traceback" not in errors


def imported(words: list[str], cwd: Path) -> tuple[subprocess.CompletedProcess, set[str]]:
    """What `ito-sde` answers in a process of its own, and the modules that it has imported at its end."""
    code = "import sys; from neuralsde_ito.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    called = [sys.executable, "-c", code, *words]
    done = subprocess.run(called, cwd=cwd, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    return done, set(done.stderr.splitlines()[-1].split())


def test_help_and_version_do_not_wait_for_torch(tmp_path: Path) -> None:
    from neuralsde_ito.cli import VERBS

    for words in (["--help"], ["--version"], ["nonsense"], *([verb, "--help"] for verb in VERBS)):
        done, modules = imported(words, tmp_path)
        assert done.returncode == (2 if words == ["nonsense"] else 0)
        assert "torch" not in modules
        assert "Traceback" not in done.stderr
        if words == ["--help"]:
            assert all(verb in done.stdout for verb in ("train", "evaluate", "attack", "predict"))


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        ("predict nosuchfile.png", "nosuchfile.png"),
        ("predict --run smal picture.png", "small"),
        ("evaluate --run smal", "small"),
        ("attack --run smal", "small"),
        ("attack --eps 9", "8/255"),
        ("suite --eps 8/0", "8/0"),
        ("certify --radius 1/0", "1/0"),
        ("certify --run small", "--sigma"),
        ("certify --alpha 0.3", "--alpha"),
        ("audit --eps 0", "above 0"),
        ("audit --model mymodels:make_net", "--data"),
        ("bench --eps 9", "8/255"),
        ("bench --arch resnet21", "resnet20"),
        ("bench --against nosuchfile.json", "nosuchfile.json"),
        ("compare --run smal", "small"),
        ("depth --versus smal", "small"),
        ("verify nosuchfolder", "nosuchfolder"),
        ("frontier small smal", "small"),
        ("frontier small --norm l2", "ito-sde suite --run runs/small --norm l2 --eps 0.5"),
        ("reproduce tabel4", "table4"),
        ("train --set sde.omgea=0.4", "sde.omega"),
        ("train --data digit", "digits"),
        ("train --run small", "--resume"),
    ],
)
def test_wrong_words_are_refused_before_torch_is_imported(words: str, mend: str, trained: Path) -> None:
    Image.new("L", (8, 8)).save(trained / "picture.png")
    done, modules = imported(words.split(), trained)
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(message) == 1
    assert mend in message[0]
    assert not modules & {"torch", "numpy", "scipy", "sklearn", "matplotlib"}


def test_predict_imports_neither_data_sets_nor_attacks(trained: Path) -> None:
    Image.new("L", (8, 8)).save(trained / "picture.png")
    done, modules = imported(["predict", "picture.png"], trained)
    assert done.returncode == 0, done.stderr
    assert "torch" in modules
    assert not modules & {"scipy", "sklearn", "matplotlib", "torchdiffeq", "jinja2"}
    rooms = {name.split(".")[1] for name in modules if name.startswith("neuralsde_ito.")}
    assert not rooms & {"attacks", "audits", "studies", "benchmarks", "reproduction"}
    assert "neuralsde_ito.runs.training" not in modules


def test_predict_does_not_need_the_data_with_which_a_run_was_trained(trained: Path, tmp_path: Path, capfd) -> None:
    shutil.copytree(trained / "runs" / "small", tmp_path / "runs" / "small")
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    config = tmp_path / "runs" / "small" / "config.yaml"
    config.write_text(config.read_text().replace("path: null", "path: no/such/folder", 1))
    code, out, err = in_process(["predict", "picture.png", "--json"], tmp_path, capfd)
    assert code == 0, err
    assert set(json.loads(out)["images"][0]["top"]) <= set("0123456789")
    images = tmp_path / "runs" / "small" / "images.json"
    images.write_text("[]")
    code, _, err = in_process(["predict", "picture.png"], tmp_path, capfd)
    assert code == 2
    assert "images.json" in err
    images.unlink()  # as in a run of an earlier version: the data say what the classes are
    code, _, err = in_process(["predict", "picture.png"], tmp_path, capfd)
    assert code == 2
    assert "data.path" in err


BAD = {
    "unknown verb": (["trian"], "train"),
    "unknown preset": (["train", "--config", "cifar10-resnet19"], "cifar10-resnet18"),
    "unknown key": (["train", "--set", "sde.omgea=0.4"], "sde.omega"),
    "unknown architecture": (["train", "--arch", "resnet21"], "resnet20"),
    "unknown data set": (["train", "--data", "digit"], "digits"),
    "unknown solver": (["train", "--set", "sde.solver=milsten"], "milstein"),
    "unknown solver by flag": (["train", "--solver", "milsten"], "milstein"),
    "unknown schedule by flag": (["train", "--schedule", "inverse"], "inverse-time"),
    "steps 3 by flag": (["train", "--steps", "3"], "power of two"),
    "unknown rule": (["evaluate", "--rule", "flatt"], "flat"),
    "unknown schedule": (["train", "--set", "sde.schedule=inverse"], "inverse-time"),
    "omega negative": (["train", "--omega", "-0.1"], "omega"),
    "omega not a number": (["train", "--set", "sde.omega=nan"], "omega"),
    "omega a word": (["train", "--omega", "much"], "omega"),
    "steps 0": (["train", "--set", "sde.steps=0"], "power of two"),
    "members 0": (["train", "--members", "0"], "members"),
    "inferences 0": (["train", "--inferences", "0"], "inferences"),
    "ode solver with noise": (["train", "--set", "sde.solver=ode:rk4"], "omega = 0"),
    "unknown adversary": (["train", "--set", "finetune.adversary.method=pdg"], "pgd"),
    "unknown adversary by flag": (["train", "--adversary", "pdg"], "pgd"),
    "eps of no adversary": (["train", "--eps", "0.1"], "--adversary"),
    "eps of the adversary above 1": (["train", "--adversary", "pgd", "--eps", "8"], "8/255"),
    "consistency without noise": (["train", "--omega", "0", "--set", "finetune.consistency=5"], "sde.input_sigma"),
    "held out, all": (["train", "--limit", "20", "--set", "resnet.held_out=20"], "none would be left"),
    "resume by a trial": (["suite", "--resume", "--precision", "auto"], "--resume"),
    "missing weights": (["train", "--weights", "none.pth"], "none.pth"),
    "missing folder": (["train", "--data", "no/such/folder"], "no/such/folder"),
    "missing device": (["train", "--device", "cuda:7"], "cuda:7"),
    "unknown device": (["train", "--device", "gpu"], "gpu"),
    "eps negative": (["attack", "--eps", "-1/255"], "eps"),
    "eps by zero": (["attack", "--eps", "8/0"], "8/0"),
    "eps above 1": (["attack", "--eps", "8"], "8/255"),
    "eps a word": (["attack", "--eps", "large"], "large"),
    "unknown norm": (["attack", "--norm", "linff"], "linf"),
    "unknown attack preset": (["attack", "--preset", "madry"], "madry20"),
    "unknown surrogate": (["attack", "--surrogate", "ensembl"], "ensemble"),
    "attack steps 0": (["attack", "--steps", "0"], "steps"),
    "unknown run": (["attack", "--run", "smal"], "small"),
    "missing picture": (["predict", "nothing.png"], "nothing.png"),
    "run not empty": (["train", "--run", "small"], "not empty"),
    "resume of another configuration": (["train", "--run", "small", "--resume", "--omega", "0.3"], "sde.omega"),
    "resume and overwrite": (["train", "--resume", "--overwrite"], "--overwrite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(case: str, trained: Path, capfd: pytest.CaptureFixture) -> None:
    words, mend = BAD[case]
    before = sorted((str(p), p.stat().st_mtime_ns) for p in trained.rglob("*"))
    code, out, err = in_process(words, trained, capfd)
    assert code == 2, err
    message = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(message) == 1, err
    assert mend in message[0]
    assert "Traceback" not in err
    assert out == ""
    assert sorted((str(p), p.stat().st_mtime_ns) for p in trained.rglob("*")) == before


def in_process(words: list[str], cwd: Path, capfd: pytest.CaptureFixture) -> tuple[object, str, str]:
    """`ito-sde` without the seconds that importing torch takes."""
    from neuralsde_ito.cli import main

    before, argv = os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = ["ito-sde", *words]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        os.chdir(before)
        sys.argv = argv
    out, err = capfd.readouterr()
    return stop.value.code, out, err


def test_environment_variables_come_between_file_and_flags(trained: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("ITO_SDE_SDE__OMEGA", "0.3")
    monkeypatch.setenv("ITO_SDE_ENSEMBLE__MEMBERS", "7")
    code, out, _ = in_process(["train", "--members", "9", "--print-config"], trained, capfd)
    assert code == 0
    assert "omega: 0.3" in out
    assert "members: 9" in out
    monkeypatch.setenv("ITO_SDE_SDE__OMEGAA", "0.3")
    code, _, err = in_process(["train", "--print-config"], trained, capfd)
    assert code == 2
    assert "sde.omega" in err


def test_flags_set_keys_of_the_configuration(trained: Path, capfd) -> None:
    flags = ["--solver", "srk", "--steps", "4", "--schedule", "multiplicative", "--omega", "0.1", "--limit", "50"]
    assignments = ["--set", "sde.solver=euler", "--set", "sde.horizon=2.0"]
    code, out, err = in_process(["train", *assignments, *flags, "--print-config"], trained, capfd)
    assert code == 0, err
    import yaml

    tree = yaml.safe_load(out)
    sde = {"omega": 0.1, "schedule": "multiplicative", "solver": "srk", "steps": 4, "horizon": 2.0}
    assert tree["sde"] == {**sde, "checkpoint": False, "input_sigma": 0.0}  # a flag comes before --set
    assert (tree["data"]["train_limit"], tree["data"]["test_limit"]) == (50, 50)


@pytest.mark.parametrize(
    "name",
    [
        *("digits", "cifar10-resnet18", "cifar10-resnet20", "cifar10-resnet34", "cifar10-resnet50"),
        *("imagenet-resnet50", "digits-robust", "cifar10-resnet20-robust", "cifar10-resnet18-robust"),
        *(
            "digits-smooth",
            "cifar10-resnet20-smooth",
            "enresnet",
            "neural-sde-additive",
            "neural-sde-multiplicative",
            "rse",
        ),
    ],
)
def test_every_preset_loads_through_the_command_line(name: str, trained: Path, capfd) -> None:
    import neuralsde_ito as ito
    from neuralsde_ito.runs.config import parse_config, preset_names

    assert name in preset_names()
    code, out, err = in_process(["train", "--config", name, "--print-config"], trained, capfd)
    assert code == 0, err
    (trained / f"{name}.yaml").write_text(out)
    assert ito.load_config(trained / f"{name}.yaml") == ito.load_config(name)  # what it prints, it reads
    assert parse_config(ito.load_config(name).model_dump(mode="json")).name == name
    text = (Path(ito.load_config.__globals__["files"]("neuralsde_ito.configs")) / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 40
    assert text.startswith("#")
    assert "Table" in text or "et al." in text or "arxiv.org" in text  # names its table in the paper, or its source


def test_bench_measures_beside_the_plain_network(trained: Path, capfd, tmp_path) -> None:
    picture = tmp_path / "bench.png"
    parts = ["--part", "inference", "--part", "vote", "--part", "training"]
    words = ["bench", *parts, "--batch", "12", "--repeats", "1", "--save", str(picture)]
    code, out, err = in_process([*words, "--json"], trained, capfd)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {row["part"] for row in rows} == {"inference", "vote", "training"}
    for part in ("inference", "vote", "training"):
        mine = [row for row in rows if row["part"] == part]
        assert mine[0]["ratio"] == 1  # what all others are relative to
        assert all(row["seconds"] > 0 for row in mine)
    assert all("same labels" in row["note"] for row in rows if row["name"].startswith("decision"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, err = in_process(words, trained, capfd)
    assert code == 0, err
    assert "decision, hierarchical" in out


def test_bench_of_a_network_without_a_run(trained: Path, capfd) -> None:
    words = ["bench", "--arch", "resnet8", "--batch", "2", "--repeats", "1"]
    code, out, err = in_process([*words, "--part", "inference"], trained, capfd)
    assert code == 0, err
    assert "Itô, engine" in out
    code, _, err = in_process([*words, "--part", "vote"], trained, capfd)
    assert code == 2
    assert "needs a run" in err


def test_evaluate_says_what_the_votes_cost(trained: Path, capfd) -> None:
    answers = {}
    for words in ([], ["--full"], ["--confidence", "0.9"]):
        code, out, err = in_process(["evaluate", "--limit", "40", "--json", *words], trained, capfd)
        assert code == 0, err
        answers[tuple(words)] = json.loads(out)
    full = answers["--full",]
    assert full["inferences_per_image"] == full["members"] * full["inferences"]
    assert answers[()]["ito"] == full["ito"]
    assert answers[()]["inferences_per_image"] < full["inferences_per_image"]
    assert answers["--confidence", "0.9"]["inferences_per_image"] <= answers[()]["inferences_per_image"]
    code, _, err = in_process(["evaluate", "--confidence", "1.5"], trained, capfd)
    assert code == 2


def test_compare_prints_a_table_and_writes_a_picture(trained: Path, capfd, tmp_path) -> None:
    picture = tmp_path / "compare.svg"
    words = ["compare", "--limit", "4", "--steps", "1", "--steps", "2", "--steps", "4", "--solver", "euler"]
    words += ["--solver", "srk", "--save", str(picture)]
    code, out, err = in_process(words, trained, capfd)
    assert code == 0, err
    assert "evals" in out.split()  # the column
    assert "More steps change the model" in out
    assert "<svg" in picture.read_text()
    code, out, err = in_process([*words, "--json"], trained, capfd)
    assert code == 0, err
    assert len(json.loads(out)["rows"]) == 6


def test_orders_are_measured(trained: Path, capfd) -> None:
    words = ["orders", "--problem", "geometric-brownian", "--solver", "milstein", "--steps", "8", "--steps", "16"]
    code, out, err = in_process([*words, "--steps", "32", "--json"], trained, capfd)
    assert code == 0, err
    (order,) = json.loads(out)["problems"]["geometric-brownian"]
    assert abs(order["fit"] - order["theory"]) < 0.15
    code, _, err = in_process(["orders", "--problem", "double-wall"], trained, capfd)
    assert code == 2
    assert "double-well" in err
