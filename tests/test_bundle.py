"""Evidence that can be checked: bundles bit for bit, and claims that fall when somebody has been at them."""

import hashlib
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from neuralsde_ito.cli import cli
from problems import random_resnet
from safetensors.torch import save_file
from torch import Tensor

import neuralsde_ito as ito
from neuralsde_ito import Evidence, ItoEnsemble, bundle, load_bundle, save_bundle, verify_bundle
from neuralsde_ito.bundle import Altered
from neuralsde_ito.verification import Verification

EPS, SEED = 0.06, 7


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    """A random ResNet-8 whose logits are centred on digits, so that it decides for many classes."""
    net = random_resnet("resnet8", in_channels=1)
    head = net[-1].fc
    with torch.no_grad():
        logits = net(next(ito.load_data("digits").test.batches(200))[1])
        head.weight.div_(logits.std(0)[:, None])
        head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))
    return net


@pytest.fixture(scope="module")
def ensemble(net) -> ItoEnsemble:
    return ItoEnsemble([ito.recast(net, omega=0.01, image_shape=(1, 8, 8)) for _ in range(2)], inferences=3)


def attacked(ensemble: ItoEnsemble, index: Tensor, x: Tensor, truth: Tensor, **also) -> Evidence:
    """What an honest attacker writes down, of one attack."""
    clean = ensemble.predict(x, SEED, index).labels
    found = ito.attacks.PGD(norm="linf", eps=EPS, steps=3, eot=2, selection=4).run(ensemble, x, truth, SEED, index)
    images = torch.where((clean == truth)[:, None, None, None], found.images, x)
    report = ensemble.predict(images, SEED, index, full=True)
    winner = torch.where(report.labels == truth, -1, 0).where(clean == truth, torch.tensor(-2))
    return Evidence(
        norm="linf",
        eps=EPS,
        attacks=("pgd",),
        index=index,
        truth=truth,
        clean=clean,
        labels=report.labels,
        winner=winner,
        originals=x,
        images=images,
        forwards=(found.forwards,),
        backwards=(found.backwards,),
        votes=report.votes,
        seed=SEED,
        command="ito-sde attack --norm linf",
        **also,
    )


@pytest.fixture(scope="module")
def evidence(ensemble) -> Evidence:
    """80 digits under other numbers; "true" is what the ensemble says of them, but for three of them."""
    index, x, _ = next(ito.load_data("digits").test.batches(200))
    own = ensemble.predict(x, seed=99, index=index, full=True)
    sure = (own.votes.sum(0).amax(-1) == 6).nonzero()[:80, 0]
    truth = own.labels[sure].clone()
    truth[:3] = (truth[:3] + 1) % 10
    return attacked(ensemble, index[sure], x[sure], truth, config={"data": "digits", "note": {"π": [1, 0.1, None]}})


@pytest.fixture
def saved(evidence, tmp_path) -> Path:
    save_bundle(tmp_path / "evidence", evidence)
    return tmp_path / "evidence"


def alike(one: Evidence, two: Evidence) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in fields(Evidence)]
    return all(
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b and type(a) is type(b)
        for a, b in pairs
    )


def fallen(verification: Verification) -> set[str]:
    assert verification.stands == all(claim.stands for claim in verification.claims)
    return {claim.name for claim in verification.claims if not claim.stands}


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- the folder -----------------------------------------------------------------------------------------


def test_a_bundle_is_read_back_bit_for_bit(evidence, saved):
    assert (evidence.images != evidence.originals).any()
    assert set(evidence.winner.tolist()) == {-2, -1, 0}  # the fixture has all fates
    assert alike(load_bundle(saved), evidence)
    assert sorted(path.name for path in saved.iterdir()) == ["images.safetensors", "records.json", "summary.json"]
    assert [path.name for path in saved.parent.iterdir()] == ["evidence"]
    two = replace(evidence, attacks=("a", "b"), forwards=(1, 2), backwards=(3, 4), norm="l2", eps=9.5, seed=2**64 - 1)
    save_bundle(saved.parent / "deep" / "er", replace(two, winner=evidence.winner.where(evidence.winner != 0, 1)))
    again = load_bundle(saved.parent / "deep" / "er")
    assert (again.attacks, again.backwards, again.eps, again.seed) == (("a", "b"), (3, 4), 9.5, 2**64 - 1)
    assert set(again.winner.tolist()) == {-2, -1, 1}


def test_records_and_summary_say_what_was_done(evidence, saved):
    records = json.loads((saved / "records.json").read_text())
    assert records["sha256"] == hashlib.sha256((saved / "images.safetensors").read_bytes()).hexdigest()
    assert records["versions"]["torch"] == torch.__version__
    assert records["attacks"] == [{"name": "pgd", "forwards": evidence.forwards[0], "backwards": evidence.backwards[0]}]
    assert records["command"] == "ito-sde attack --norm linf"
    rows = records["images"]
    delta = (evidence.images.double() - evidence.originals.double()).abs().flatten(1).amax(1)
    assert [row["norm"] for row in rows] == delta.tolist()
    assert {row["winner"] for row in rows} == {"pgd", "(survived)", "(wrong without attack)"}
    assert all(sum(sum(counts.values()) for counts in row["votes"]) == 6 for row in rows)
    summary = json.loads((saved / "summary.json").read_text())
    assert summary["dataset"] == "digits"
    assert summary["threat_model"] == "Linf"
    right, refused = int((evidence.clean == evidence.truth).sum()), int((evidence.clean == ito.ABSTAIN).sum())
    assert right >= 70
    assert summary["clean_counts"] == {"correct": right, "wrong": 80 - right - refused, "abstained": refused}
    assert summary["clean_acc"] == round(100 * right / 80, 2)
    low, high = summary["clean_acc_interval"]
    assert low == round(100 * ito.Rate.of(right, 80).low, 2) < summary["clean_acc"] < high
    assert summary["robust_counts"]["correct"] == int((evidence.labels == evidence.truth).sum())
    assert "autoattack_acc" not in summary
    assert "pgd" in summary["robust_acc_attack"]


BAD = {
    "norm above eps": ({"eps": EPS - 1e-4}, "more than eps"),
    "unknown norm": ({"norm": "linff"}, "linf"),
    "eps no number": ({"eps": float("nan")}, "eps"),
    "two attacks of one name": ({"attacks": ("pgd", "pgd"), "forwards": (1, 1), "backwards": (1, 1)}, "one name"),
    "no attacks": ({"attacks": (), "forwards": (), "backwards": ()}, "needs attacks"),
    "a cost too many": ({"forwards": (1, 2)}, "each of the 1 attacks"),
    "labels too short": ({"labels": torch.zeros(79, dtype=torch.int64)}, r"labels must be int64 \(80,\)"),
    "labels as floats": ({"labels": torch.zeros(80)}, "labels must be int64"),
    "a label of no class": ({"truth": torch.full((80,), 10)}, "truth must be from 0 to below 10"),
    "an unknown winner": ({"winner": torch.full((80,), 1)}, "winner must be from -2 to below 1"),
    "an image twice": ({"index": torch.zeros(80, dtype=torch.int64)}, "twice"),
    "images of another shape": ({"images": torch.zeros(80, 1, 8, 9)}, "images must be float32"),
    "images in float64": ({"images": torch.zeros(80, 1, 8, 8, dtype=torch.float64)}, "images must be float32"),
    "images out of range": ({"images": torch.full((80, 1, 8, 8), 1.1), "eps": 1.0}, r"in \[0, 1\]"),
    "votes of fewer images": ({"votes": torch.zeros(2, 79, 10, dtype=torch.int64)}, "votes must be"),
    "config no JSON": ({"config": {"path": Path("x")}}, "JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_and_nothing_written(case, evidence, tmp_path):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        save_bundle(tmp_path / "evidence", replace(evidence, **change))
    assert not list(tmp_path.iterdir())


def test_evidence_is_never_written_over(evidence, saved):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match="not empty"):
        save_bundle(saved, evidence)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    (saved.parent / "empty").mkdir()
    save_bundle(saved.parent / "empty", evidence)
    assert alike(load_bundle(saved.parent / "empty"), evidence)


@pytest.mark.parametrize("written", range(4))
@pytest.mark.parametrize("cleans_up", [True, False])
def test_a_half_written_bundle_never_looks_whole(written, cleans_up, evidence, tmp_path, monkeypatch):
    """Stopped before each of the files and before the rename; without the clearing up, as a kill would."""
    left = iter(range(written))

    def write(path: Path, content: bytes) -> None:
        if next(left, None) is None:
            path.write_bytes(content[: len(content) // 2])
            raise KeyboardInterrupt
        path.write_bytes(content)

    def rename(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "write_atomically", write)
        patch.setattr(Path, "replace", rename)
        if not cleans_up:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            save_bundle(tmp_path / "evidence", evidence)
    assert not (tmp_path / "evidence").exists()
    remains = list(tmp_path.iterdir())
    assert len(remains) == (not cleans_up)
    if remains and written < 3:
        with pytest.raises(ValueError, match=r"it has no (records|summary|images)|is not JSON"):
            load_bundle(remains[0])
    save_bundle(tmp_path / "evidence", evidence)  # what is left is in nobody's way
    assert alike(load_bundle(tmp_path / "evidence"), evidence)


@pytest.mark.parametrize("name", ["images.safetensors", "records.json", "summary.json"])
def test_missing_damaged_and_alien_files_are_one_sentence(name, saved):
    path = saved / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name):
        load_bundle(saved)
    path.write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(ValueError, match=name):
        load_bundle(saved)
    path.unlink()
    with pytest.raises(ValueError, match=f"it has no {name}"):
        load_bundle(saved)


def test_records_of_something_else_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="no evidence bundle"):
        load_bundle(tmp_path / "nowhere")
    whole = (saved / "records.json").read_text()
    changes = {
        "reads bundles of 1": lambda head: head.update(format=2),
        "format None": lambda head: head.clear(),
        "it has no 'seed'": lambda head: head.pop("seed"),
        "damaged: There are 80 original images for 79": lambda head: head["images"].pop(),
        "damaged.*truth": lambda head: head["images"][0].update(truth=10),
        "has no 'nobody'": lambda head: head["images"][0].update(winner="nobody"),
        "damaged.*config": lambda head: head.update(config=[]),
        "has no 'pgd'": lambda head: head.update(attacks=[]),
        "damaged: index": lambda head: head.update(classes=0),
    }
    for message, change in changes.items():
        edit(saved / "records.json", change)
        with pytest.raises(ValueError, match=message):
            load_bundle(saved)
        (saved / "records.json").write_text(whole)
    (saved / "images.safetensors").write_bytes(b"rubbish, but with its own hash")
    digest = hashlib.sha256(b"rubbish, but with its own hash").hexdigest()
    edit(saved / "records.json", lambda head: head.update(sha256=digest))
    with pytest.raises(ValueError, match="no safetensors"):
        load_bundle(saved)


# --- verification ---------------------------------------------------------------------------------------


def test_an_honest_bundle_stands_on_fresh_noise(evidence, ensemble, saved):
    read = load_bundle(saved)
    found = verify_bundle(read, ensemble, seed=SEED - 1, repeats=3, x=evidence.originals, y=evidence.truth)
    assert not fallen(found)
    names = ["inside the ball", "no gain from attacks", "true labels", "original images", "clean accuracy"]
    assert [claim.name for claim in found.claims] == [*names, "accuracy under attack", "worst of 3 reports"]
    assert found.seeds == (6, 8, 9)  # never the bundle's
    assert all("/80 = " in claim.found for claim in found.claims[-3:])
    assert json.loads(json.dumps(found.as_dict()))["stands"] is True
    done: list[int] = []
    assert not fallen(verify_bundle(read, ensemble, seed=0, batch_size=30, tick=done.append))
    assert done == [30, 30, 20, 30, 30, 20]


def test_the_paths_are_not_those_of_the_report(evidence, ensemble, monkeypatch):
    seeds = []
    predict = ItoEnsemble.predict

    def watch(self, x, seed, index):
        seeds.append(seed)
        return predict(self, x, seed, index)

    monkeypatch.setattr(ItoEnsemble, "predict", watch)
    verify_bundle(evidence, ensemble, repeats=2)
    first, *rest = seeds
    assert rest == [first, first + 1]
    assert evidence.seed not in seeds
    verify_bundle(evidence, ensemble)
    assert seeds[3] != first  # nobody can foretell it


def test_flipped_bytes_are_found(saved):
    path = saved / "images.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(Altered, match="SHA-256"):
        load_bundle(saved)


def test_harmless_images_under_a_new_hash_are_found_by_the_figures(evidence, ensemble, saved):
    """The attack's images put back to the originals: harmless, inside the ball, and not what was claimed."""
    path = saved / "images.safetensors"
    save_file({"originals": evidence.originals, "images": evidence.originals.clone()}, path)
    edit(saved / "records.json", lambda head: head.update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    found = verify_bundle(load_bundle(saved), ensemble, seed=0, y=evidence.truth, x=evidence.originals)
    assert fallen(found) == {"accuracy under attack"}


def test_altered_originals_are_found(evidence, ensemble):
    originals = evidence.originals.clone()
    originals[5] = (originals[5] + 0.01).clamp(0, 1)
    found = verify_bundle(replace(evidence, originals=originals), ensemble, seed=0, x=evidence.originals)
    assert "original images" in fallen(found)
    assert next(c.found for c in found.claims if c.name == "original images") == "1 differ"


def test_images_outside_the_ball_or_the_range_are_found(evidence, ensemble):
    images = evidence.images.clone()
    images[3, 0, 0, 0] = evidence.originals[3, 0, 0, 0] + EPS + 1e-4
    found = verify_bundle(replace(evidence, images=images), ensemble, seed=0)
    assert fallen(found) == {"inside the ball"}
    for value in (1.05, -0.05, float("nan")):
        images = evidence.images.clone()
        images[3, 0, 0, 0] = value
        assert "inside the ball" in fallen(verify_bundle(replace(evidence, images=images), ensemble, seed=0))
    long = (evidence.images - evidence.originals).flatten(1).norm(dim=1).max()
    assert "inside the ball" in fallen(verify_bundle(replace(evidence, norm="l2", eps=float(long) - 1e-4), ensemble))
    assert "inside the ball" not in fallen(verify_bundle(replace(evidence, norm="l2", eps=float(long)), ensemble))


def test_swapped_labels_are_found(evidence, ensemble, saved):
    order = evidence.truth.roll(1)
    # With the data set's labels, one by one.
    found = verify_bundle(replace(evidence, truth=order), ensemble, seed=0, y=evidence.truth)
    assert "true labels" in fallen(found)
    one = evidence.truth.clone()
    one[10] = (one[10] + 1) % 10
    assert "true labels" in fallen(verify_bundle(replace(evidence, truth=one), ensemble, seed=0, y=evidence.truth))
    # Without them, where the figures no longer follow: the same claims of other labels,
    swapped = replace(evidence, truth=order, clean=evidence.clean.roll(1), labels=evidence.labels.roll(1))
    found = verify_bundle(swapped, ensemble, seed=0)
    assert "clean accuracy" in fallen(found)
    assert "swapped" in next(claim.note for claim in found.claims if claim.name == "clean accuracy")
    # labels made to fit what the attack has led to,
    fitted = replace(evidence, truth=evidence.labels.where(evidence.labels >= 0, evidence.truth))
    assert "no gain from attacks" in fallen(verify_bundle(fitted, ensemble, seed=0))

    # or records whose summary still speaks of the others.
    def swap(head: dict) -> None:
        for row, label in zip(head["images"], order.tolist(), strict=True):
            row["truth"] = label

    edit(saved / "records.json", swap)
    with pytest.raises(Altered, match="summary"):
        load_bundle(saved)


def test_better_figures_than_the_ensemble_has_are_found(evidence, ensemble):
    unharmed = replace(evidence, labels=evidence.clean)
    found = verify_bundle(unharmed, ensemble, seed=0, repeats=2)
    assert fallen(found) == {"accuracy under attack", "worst of 2 reports"}


def test_who_asks_often_enough_wins(evidence, net):
    """With much noise and one inference every report is another; no image is right in all of them."""
    noisy = ItoEnsemble(
        [ito.recast(net, omega=0.1, image_shape=(1, 8, 8)) for _ in range(2)], inferences=1, rule="flat"
    )
    clean = noisy.predict(evidence.originals, SEED, evidence.index)
    claims = replace(evidence, images=evidence.originals, labels=clean.labels, clean=clean.labels)
    found = verify_bundle(claims, noisy, seed=0, repeats=12)
    counts = [int(claim.found.split("/")[0]) for claim in found.claims[-2:]]
    assert counts[1] < counts[0]
    assert "worst of 12 reports" in fallen(found)


def test_what_cannot_be_verified_is_refused(evidence, ensemble):
    refused = {
        "the bundle's own": {"seed": SEED},
        "repeats": {"repeats": 0},
        "y must be": {"y": evidence.truth[1:]},
        "x must be": {"x": evidence.originals[1:]},
    }
    for message, words in refused.items():
        with pytest.raises(ValueError, match=message):
            verify_bundle(evidence, ensemble, **words)
    with pytest.raises(ValueError, match="2 members; this ensemble has 1"):
        verify_bundle(evidence, ItoEnsemble([ensemble.members[0]]))
    with pytest.raises(ValueError, match="'fixed'"):
        verify_bundle(replace(evidence, noise="fixed"), ensemble)


# --- the command line -----------------------------------------------------------------------------------


@pytest.fixture
def user(net, tmp_path, monkeypatch) -> Path:
    """A folder with a finished run and a bundle that names it: 30 digits, their labels, a network that never learnt."""
    config = ito.load_config("digits", assignments=["ensemble.members=2", "ensemble.inferences=9", "sde.omega=0.01"])
    members = [ito.recast(net, **config.sde.model_dump()) for _ in range(2)]
    ensemble = ItoEnsemble(members, inferences=3)
    run = Path("runs/tiny")
    monkeypatch.chdir(tmp_path)
    ito.save_ensemble(run, ensemble, config, net)
    again = ItoEnsemble(ito.load_ensemble(run)[0].members, inferences=3)
    index, x, y = next(ito.load_data("digits", test_limit=30).test.batches(30))
    vote = {"members": 2, "inferences": 3, "rule": "hierarchical"}
    save_bundle("evidence", attacked(again, index, x, y, config={"run": str(run), "vote": vote}))
    return tmp_path


def test_the_command_line_says_which_claims_stand(user):
    call = CliRunner().invoke
    done = call(cli, ["verify", "evidence", "--seed", "1", "--repeat", "2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for word in ("files unaltered", "true labels", "original images", "worst of 2 reports", "All 8 claims stand"):
        assert word in done.output, word
    assert "NOT" not in done.output
    # Claims whose labels are not the data set's, and no longer of the whole fixed choice of so many images.
    evidence = load_bundle("evidence")
    few = {name: getattr(evidence, name)[:20] for name in ("index", "clean", "labels", "winner", "originals", "images")}
    shifted = {"truth": (evidence.truth[:20] + 1) % 10, "votes": evidence.votes[:, :20]}
    save_bundle("swapped", replace(evidence, **few, **shifted))
    done = call(cli, ["verify", "swapped", "--run", "tiny", "--seed", "1", "--json"], catch_exceptions=False)
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    assert report["stands"] is False
    assert report["run"] == "runs/tiny"
    verdicts = {claim["name"]: (claim["stands"], claim["found"]) for claim in report["claims"]}
    assert verdicts["true labels"] == (False, "20 differ")
    assert verdicts["original images"] == (True, "0 differ")


def test_the_command_line_finds_altered_files(user):
    path = Path("evidence/images.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    done = CliRunner().invoke(cli, ["verify", "evidence"])
    assert done.exit_code == 1
    assert "DOES NOT STAND" in done.output
    assert "SHA-256" in done.output
    assert cli.main(["verify", "evidence"], standalone_mode=False) == 1  # as `main` calls it
    done = CliRunner().invoke(cli, ["verify", "evidense"])
    assert isinstance(done.exception, ValueError)  # which `main` makes a sentence and exit code 2
    assert "no evidence bundle" in str(done.exception)
