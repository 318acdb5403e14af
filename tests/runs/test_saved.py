"""An ensemble that was saved from Python and is opened by the verbs; pictures, read by `predict`."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from neuralsde_ito.cli import cli
from PIL import Image

import neuralsde_ito as ito
from neuralsde_ito import ItoEnsemble, files
from neuralsde_ito.audits import bundle
from neuralsde_ito.files import write_atomically
from neuralsde_ito.models.voting import Prediction


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ItoEnsemble:
    """A folder with the run `runs/mine`, whose noise is too strong for clear votes, and six pictures."""
    torch.manual_seed(0)
    nets = [ito.load_resnet("resnet8", None, 10, 1) for _ in range(2)]
    ensemble = ItoEnsemble([ito.recast(net, omega=3.0) for net in nets], 5, "flat").eval()
    monkeypatch.chdir(tmp_path)
    ito.save_ensemble("runs/mine", ensemble, ito.load_config("digits", assignments=["ensemble.members=2"]), nets[0])
    _, x, _ = next(ito.load_data("digits").test.batches(6))
    for name, image in zip("abcdef", x, strict=True):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(f"{name}.png")
    return ensemble


def ito_sde(*words: str) -> Result:
    done = CliRunner().invoke(cli, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


ATTACK = ["--norm", "linf", "--eps", "0.1", "--limit", "4", "--steps", "2", "--eot", "2"]


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--limit", "8"],
        ["predict", "a.png"],
        ["attack", *ATTACK],
        ["audit", "--norm", "linf", "--eps", "0.1", "--limit", "4"],
        ["compare", "--limit", "2", "--steps", "1"],
    ],
    ids=lambda words: words[0],
)
def test_every_verb_opens_what_was_saved(user: ItoEnsemble, words: list[str]) -> None:
    done = ito_sde(*words)
    assert "runs/mine" in done.stderr  # the newest finished run


def test_the_verbs_vote_as_the_saved_ensemble_did(user: ItoEnsemble) -> None:
    index, x, _ = next(ito.load_data("digits", test_limit=30).test.batches(30))
    labels = user.predict(x, seed=4, index=index).labels
    report = json.loads(ito_sde("evaluate", "--limit", "30", "--seed", "4", "--json").stdout)
    assert (report["members"], report["inferences"], report["rule"]) == (2, 5, "flat")
    assert report["ito"]["counts"]["abstained"] == int((labels == ito.ABSTAIN).sum())


def test_members_are_loaded_with_the_shape_of_their_images(user: ItoEnsemble, tmp_path: Path) -> None:
    ensemble, config = ito.load_ensemble("runs/mine")
    assert [sde.shape for sde in ensemble.members[0].sdes] == [(16, 8, 8), (32, 4, 4), (64, 2, 2)]
    sized = ito.load_config(assignments=["data.name=imagefolder", "data.size=24", "ensemble.members=2"], base=config)
    ito.save_ensemble("runs/sized", user, sized)
    members = ito.load_ensemble("runs/sized")[0].members
    assert [sde.shape for sde in members[0].sdes] == [(16, 24, 24), (32, 12, 12), (64, 6, 6)]


def test_a_run_on_a_folder_keeps_the_size_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        for name, grey in (("dark", 40), ("müde", 200)):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (12, 12), (grey, grey, 10 * i)).save(tmp_path / "images" / part / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    untrained = ["--set", "resnet.epochs=0", "--epochs", "0", "--members", "1", "--inferences", "1"]
    ito_sde("train", "--data", "images/", *untrained, "--run", "folder")
    ensemble, config = ito.load_ensemble("runs/folder")
    assert config.data.size == 12
    assert [sde.shape for sde in ensemble.members[0].sdes] == [(16, 12, 12), (32, 6, 6), (64, 3, 3)]
    first = min((tmp_path / "images" / "test").rglob("*.png"))
    Image.new("RGB", (30, 30)).save(first)  # it would decide the size, if the run did not keep it
    ito_sde("evaluate")
    ito_sde("train", "--resume", "--run", "folder")
    assert json.loads(Path("runs/folder/evaluation.json").read_text(encoding="utf-8"))["config"]["data"]["size"] == 12


def votes_of(*words: str) -> dict[str, list[list[int]]]:
    images = json.loads(ito_sde("predict", *words, "--json").stdout)["images"]
    return {record["image"]: record["member_votes"] for record in images}


def test_a_pictures_votes_do_not_depend_on_what_is_beside_it(user: ItoEnsemble) -> None:
    together = votes_of(*(f"{name}.png" for name in "abcdef"))
    assert len({str(votes) for votes in together.values()}) > 1
    assert votes_of(*(f"{name}.png" for name in "fdbeca")) == together
    assert {name: votes for file in together for name, votes in votes_of(file).items()} == together
    assert votes_of(*together, "--seed", "1") != together
    Path("c.png").rename("other.png")
    assert votes_of("a.png", "other.png", "a.png")["other.png"] == together["c.png"]


def test_pictures_that_differ_in_a_pixel_get_other_noise() -> None:
    from neuralsde_ito.noise.keys import content_index

    x = torch.rand(3, 1, 8, 8)
    x[1] = x[0]
    x[1, 0, 3, 3] = 0.5
    x[2] = x[0]
    index = content_index(x)
    assert index.dtype == torch.int64
    assert (index >= 0).all()
    assert index[0] == index[2] != index[1]
    assert torch.equal(content_index(x.flip(0)), index.flip(0))
    assert torch.equal(content_index(x.contiguous(memory_format=torch.channels_last)), index)
    assert content_index(torch.zeros(1, 1, 4, 4)) != content_index(torch.zeros(1, 1, 2, 8))


def test_inferences_that_voted_for_nobody_are_told(user: ItoEnsemble, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "invalid" not in ito_sde("predict", "a.png").output

    def invalid(self: ItoEnsemble, x: torch.Tensor, *_: object, **__: object) -> Prediction:
        votes = torch.zeros(2, len(x), 10, dtype=torch.int64)
        votes[0, :, 7] = 3
        return Prediction(torch.full((len(x),), ito.ABSTAIN), votes, torch.tensor([10]), torch.tensor([7]))

    monkeypatch.setattr(ItoEnsemble, "predict", invalid)
    assert "7 of 10 inferences were invalid" in ito_sde("predict", "a.png").output
    record = json.loads(ito_sde("predict", "a.png", "--json").stdout)["images"][0]
    assert record["invalid"] == 7
    assert record["top"]["7"] == 0.3  # a share of all inferences, also of the invalid ones


def test_predict_says_that_a_picture_is_read_on_white(user: ItoEnsemble) -> None:
    Image.new("LA", (8, 8), (0, 0)).save("ink.png")
    Image.new("L", (8, 8), 255).save("white.png")
    with pytest.warns(UserWarning, match=r"'ink\.png' is transparent in places: read on a white ground") as caught:
        votes = votes_of("ink.png", "white.png")
    assert len(caught) == 1
    assert votes["ink.png"] == votes["white.png"]


# --- systems that open no folders -----------------------------------------------------------------------


def test_runs_and_bundles_are_saved_where_folders_cannot_be_opened(
    user: ItoEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def like_windows(path, flags, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return really(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", like_windows)
    ito.save_ensemble("runs/windows", user, ito.load_config("digits", assignments=["ensemble.members=2"]))
    assert torch.equal(ito.load_ensemble("runs/windows")[0].members[0].head[-1].weight, user.members[0].head[-1].weight)
    assert bundle.sync_folder is files.sync_folder  # the one other place that renames


def test_a_folder_that_cannot_be_synced_for_another_reason_is_told(tmp_path: Path, monkeypatch) -> None:
    really = os.fsync
    calls: list[int] = []

    def fail_on_the_folder(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        really(handle)

    monkeypatch.setattr(os, "fsync", fail_on_the_folder)
    with pytest.raises(OSError, match=r"(?i)input/output error"):
        write_atomically(tmp_path / "file", b"content")
