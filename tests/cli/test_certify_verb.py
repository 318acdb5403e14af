"""``ito-sde certify``: its table, its record, its resumption, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from test_command_lines import TINY, complaint, ito_sde

import neuralsde_ito as ito

FEW = "--limit 6 --n 200 --n0 20 --alpha 0.05"

MINE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Digits by the distance from the mean image of each class."""

    def __init__(self):
        super().__init__()
        import neuralsde_ito as ito
        data = ito.load_data("digits").train
        _, x, y = next(data.batches(len(data), torch.device("cpu")))
        self.register_buffer("means", torch.stack([x[y == c].mean(0).flatten() for c in range(10)]))

    def forward(self, x):
        return -4 * (x.flatten(1)[:, None] - self.means).square().sum(2)


def plain():
    return Net().eval()


def dropping():
    return nn.Sequential(nn.Dropout(0.1), Net())


def smoothed():
    import neuralsde_ito as ito
    return ito.recast(ito.load_resnet("resnet8", in_channels=1), 0.1, image_shape=(1, 8, 8), input_sigma=0.1)
'''


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``noisy``, whose images have noise, and ``plain``, and with a module."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine_to_certify.py").write_text(MINE)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Path:
    monkeypatch.chdir(made)
    for name, sigma in (("plain", "0"), ("noisy", "0.2")):
        if not (made / "runs" / name).exists():
            code, _, err = ito_sde(["train", *TINY, "--set", f"sde.input_sigma={sigma}", "--run", name], capfd)
            assert code == 0, err
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_the_table_and_the_record(here: Path, capfd: pytest.CaptureFixture) -> None:
    code, out, err = ito_sde(f"certify --run noisy {FEW} --radius 0.1 --radius 0 --radius 51/255", capfd)
    assert code == 0, err
    assert "Image     x + 0.2 W before the stem" in out
    assert "Samples   20 choose the class, 200 count, 100 of each of 2 members; alpha 0.05, seed 0" in out
    assert "6 test images of digits; radius in pixel units, L2; % with 95 % Wilson intervals" in out
    rows = [line.split()[0] for line in out.splitlines() if " of 6" in line and "[" in line]
    assert rows == ["0", "0.1", "51/255"]
    said = " ".join(out.split())
    assert "Each is false with probability 0.05 at most" in said
    assert "Average certified radius" in said
    assert "Next ito-sde suite --norm l2 --eps 0.2" in said
    (record,) = Path("runs/noisy").glob("certify-l2-*.json")
    assert record.with_suffix(".png").stat().st_size > 10_000
    assert not list(Path("runs/noisy").glob("certify-*/"))
    report = json.loads(record.read_text())
    assert [row["written"] for row in report["certified"]] == ["0", "0.1", "51/255"]
    assert report["certified"][2]["radius"] == pytest.approx(0.2)
    assert (report["sigma"], report["n"], report["alpha"], report["beta"], report["seed"]) == (0.2, 200, 0.05, 0.001, 0)
    assert report["command"].startswith("ito-sde certify --run noisy")
    assert report["device"] == "cpu"
    assert report["environment"]["packages"]["torch"]
    assert len(report["each"]) == 6
    for row in report["each"]:
        assert (row["radius"] is None) == (row["label"] is None)
        assert row["count"] == row["votes"].get(str(row["candidate"]), 0)
        assert sum(row["votes"].values()) == row["drawn"]
        assert sum(row["selected"].values()) == 20
    right = sum(row["label"] == row["truth"] for row in report["each"])
    assert report["certified"][0]["count"] == right == report["outcomes"]["correct"]["count"]
    # The record is what the library gives.
    split, ensemble = ito.load_data("digits").test.first(6), ito.Run.open("runs/noisy").ensemble()
    index, x, _ = next(split.batches(6))
    found = ito.certify(ensemble, x, n0=20, n=200, alpha=0.05, index=index)
    assert [row["radius"] or 0 for row in report["each"]] == found.radii.tolist()


def test_another_sigma_than_the_runs_is_recast_and_said(here: Path, capfd: pytest.CaptureFixture) -> None:
    code, out, err = ito_sde(f"certify --run plain --sigma 0.3 {FEW} --beta 0", capfd)
    assert code == 0, err
    assert "Image     x + 0.3 W before the stem" in out
    said = " ".join(out.split())
    assert "had sigma 0 on their images and were recast with 0.3" in said
    assert "ito-sde train --set sde.input_sigma=0.3" in said
    assert [line.split()[0] for line in out.splitlines() if " of 6" in line and "[" in line] == [
        "0",
        "0.3",
        "0.6",
        "0.9",
    ]
    code, out, err = ito_sde(f"certify --run noisy --sigma 0.2 {FEW} --json", capfd)
    assert code == 0, err
    assert json.loads(out)["recast_from_input_sigma"] is None


def test_a_network_of_the_users(here: Path, capfd: pytest.CaptureFixture) -> None:
    words = f"--data digits {FEW}"
    code, out, err = ito_sde(f"certify --model mine_to_certify:plain --sigma 0.25 {words}", capfd)
    assert code == 0, err
    assert "Model     mine_to_certify:plain(), in eval mode" in out
    assert "Image     x + 0.25 W before the model" in out
    assert list(Path("runs/mine_to_certify.plain").glob("certify-l2-*.json"))
    results = []
    for _ in range(2):
        code, out, err = ito_sde(f"certify --model mine_to_certify:dropping --sigma 0.25 {words} --json", capfd)
        assert code == 0, err
        results.append(json.loads(out)["each"])
    assert results[0] == results[1]
    code, out, err = ito_sde(f"certify --model mine_to_certify:smoothed {words} --json", capfd)
    assert code == 0, err
    assert json.loads(out)["sigma"] == 0.1
    code, _, err = ito_sde(f"certify --model mine_to_certify:plain {words}", capfd)
    assert "give sigma" in complaint(code, err)


def test_an_interrupted_command_goes_on_and_mixes_no_settings(here: Path, capfd, monkeypatch) -> None:
    from neuralsde_ito.certificates.certify import Certifier

    words = f"certify --run noisy {FEW} --batch-size 2 --json"
    code, out, err = ito_sde(words, capfd)
    assert code == 0, err
    alone, kept, calls = json.loads(out), Certifier.certify, []

    def certify(self, x, index):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return kept(self, x, index)

    monkeypatch.setattr(Certifier, "certify", certify)
    code, _, err = ito_sde(words, capfd)
    assert code == 130
    assert "go on: the same command with --resume" in err
    assert len(list(Path("runs/noisy").glob("certify-*/*.safetensors"))) == 2
    code, _, err = ito_sde(f"{words} --resume --n0 21", capfd)
    assert "nothing to resume" in complaint(code, err)
    code, out, err = ito_sde(f"{words} --resume", capfd)
    assert code == 0, err
    assert calls == [2, 2, 2, 2]
    again = json.loads(out)
    for changing in ("command", "seconds", "environment"):
        alone.pop(changing)
        again.pop(changing)
    assert again == alone
    assert not list(Path("runs/noisy").glob("certify-*/"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--run plain", "has no noise on its images"),
        ("--run noisy --n 9", "take 10 or more"),
        ("--run noisy --sigma inf", "finite"),
        ("--run noisy --sigma 0", "--sigma"),
        ("--run noisy --alpha 0.3", "--alpha"),
        ("--run noisy --beta 0.3", "--beta"),
        ("--run noisy --radius 1/0", "--radius '1/0' divides by zero"),
        ("--run noisy --data digits", "--data"),
        ("--run nosy", "noisy"),
        ("--run noisy --resume", "nothing to resume"),
        ("--run noisy --inferences 3", "--inferences"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(words: str, said: str, here: Path, capfd) -> None:
    code, out, err = ito_sde(f"certify --limit 2 {words}", capfd)
    assert code == 2
    assert said in complaint(code, err)
    assert out == ""
