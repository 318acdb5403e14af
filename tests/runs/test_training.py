"""Training, configuration and files of a run, in this process."""

import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import neuralsde_ito as ito
from neuralsde_ito.files import write_atomically
from neuralsde_ito.models.ensemble import ItoEnsemble
from neuralsde_ito.runs import weights as weight_files
from neuralsde_ito.runs.build import build_resnet, load_dataset, pick_device
from neuralsde_ito.runs.config import Fit, differing_keys, parse_config
from neuralsde_ito.runs.run import Run, new_run_name
from neuralsde_ito.runs.training import Interrupted, Trainer, learning_rate, member_seed
from neuralsde_ito.runs.weights import save_weights, to_resnet

TINY = {
    "data.train_limit": 96,
    "data.test_limit": 32,
    "resnet.epochs": 2,
    "resnet.batch_size": 32,
    "finetune.epochs": 2,
    "finetune.batch_size": 32,
    "ensemble.members": 2,
    "ensemble.inferences": 3,
}


def tiny(**changes: object) -> ito.Config:
    return ito.load_config("digits", overrides={**TINY, **{key.replace("__", "."): v for key, v in changes.items()}})


def run(folder: Path, config: ito.Config, **callbacks) -> Run:
    """A run that is trained; where there is one, it is resumed."""
    if (folder / "config.yaml").exists():
        made = Run.open(folder)
        made.check_config(config)
    else:
        made = Run.create(folder, config)
    made.train(load_dataset(config), torch.device("cpu"), **callbacks)
    return made


def run_and_leave(folder: Path, config: ito.Config, every: int) -> None:
    """A run that is left after each ``every`` steps, in the middle of epochs and at their ends, and goes on."""
    steps = [0]

    def stop_now_and_then() -> bool:
        steps[0] += 1
        return steps[0] % every == 0

    for _ in range(40):
        try:
            run(folder, config, should_stop=stop_now_and_then)
            break
        except Interrupted:
            assert len(list(folder.rglob("*.state.pt"))) == 1
    else:
        pytest.fail("the run never ended")
    assert steps[0] > 2 * every
    assert not list(folder.rglob("*.state.pt"))


def test_a_run_that_is_left_at_any_step_ends_like_one_that_was_not(tmp_path: Path) -> None:
    config = tiny()
    run(tmp_path / "alone", config)
    run_and_leave(tmp_path / "left", config, every=4)
    assert_same_trainings(tmp_path / "alone", tmp_path / "left")


def assert_same_trainings(alone: Path, other: Path) -> None:
    """The same weights, bit for bit, and the same rows of metrics."""
    for name in ("resnet.safetensors", "members/00.safetensors", "members/01.safetensors"):
        one, two = load_file(alone / name), load_file(other / name)
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert (alone / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def test_members_train_in_any_order_each_interrupted_on_its_own(tmp_path: Path) -> None:
    config, cpu = tiny(), torch.device("cpu")
    data = load_dataset(config)
    run(tmp_path / "alone", config)
    left = Run.create(tmp_path / "left", config)
    with pytest.raises(ito.ItoError, match=r"has no resnet\.safetensors"):
        left.train_member(0, data, cpu)
    left.train_resnet(data, cpu)
    rows = []
    for m in (1, 0, 2, 1, 0):  # by turns, as if each had a process; member 2 is beyond the configuration's
        with pytest.raises(Interrupted):
            Run.open(left.folder).train_member(m, data, cpu, on_epoch=rows.append, should_stop=lambda: bool(rows))
        rows.clear()
    assert len(list(left.folder.rglob("*.state.pt"))) == 3
    seen: list[str] = []
    for m in (1, 2, 0):
        left.train_member(m, data, cpu, on_phase=lambda phase, epochs: seen.append(phase))
    left.train_member(2, data, cpu, on_step=lambda *_: pytest.fail("it is trained"))
    assert seen == ["member 1", "member 2", "member 0"]
    assert left.is_complete
    assert not list(left.folder.rglob("*.state.pt"))
    phases = [json.loads(line)["phase"] for line in left.metrics_file.read_text().splitlines()]
    assert phases == ["resnet"] * 2 + ["member 0"] * 2 + ["member 1"] * 2 + ["member 2"] * 2
    beyond = load_file(left.member_file(2))
    assert not any(torch.equal(beyond["fc.weight"], load_file(left.member_file(m))["fc.weight"]) for m in (0, 1))
    lines = left.metrics_file.read_text().splitlines(keepends=True)
    left.metrics_file.write_text("".join(lines[:-2]))  # those of member 2
    assert_same_trainings(tmp_path / "alone", left.folder)


def test_processes_that_write_metrics_at_the_same_time_lose_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Run.create(tmp_path / "a", tiny())
    names = [f"{m:02d}" for m in (10, 2, 0)]

    def another_training_ends_first(path: Path, content: bytes) -> None:
        """Between reading and writing ``metrics.jsonl``, another process writes its rows, and merges them."""
        if names:
            name = names.pop()
            write_atomically(made.folder / f"metrics/{name}.jsonl", f'{{"phase": "member {int(name)}"}}\n'.encode())
            made.merge_metrics()
        write_atomically(path, content)

    monkeypatch.setattr("neuralsde_ito.runs.run.write_atomically", another_training_ends_first)
    made.merge_metrics()
    phases = [json.loads(line)["phase"] for line in made.metrics_file.read_text().splitlines()]
    assert phases == ["member 0", "member 2", "member 10"]


def test_rows_of_an_earlier_version_stay_and_its_state_is_refused(alone_and_left: Path, tmp_path: Path) -> None:
    """Earlier versions wrote one state and one file of metrics for all trainings."""
    old = tmp_path / "old"
    shutil.copytree(alone_and_left / "left", old)
    shutil.rmtree(old / "metrics")
    (old / "members/01.state.pt").rename(old / "state.pt")
    with pytest.raises(ito.ItoError, match=r"state\.pt.*earlier version.*delete it, and resume"):
        run(old, tiny(resnet__epochs=1))
    (old / "state.pt").unlink()
    run(old, tiny(resnet__epochs=1))
    assert_same_trainings(alone_and_left / "alone", old)


def test_training_through_the_sde_is_the_stated_recipe(tmp_path: Path) -> None:
    """Two steps by hand: the member's order, the keys of (seed, member, epoch, image), Adam at the stated rate."""
    config = tiny(finetune__epochs=1, finetune__batch_size=48)
    data, settings = load_dataset(config), config.finetune
    net = build_resnet(config, data)
    model, by_hand = ito.recast(net), ito.recast(net)
    Trainer(tmp_path / "state.pt").fit(model, data.train, settings, seed=5, phase="member", member=3)
    by_hand.train()
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=settings.lr)
    for index, x, y in data.train.batches(48, epoch=(member_seed(5, 3), 0)):
        loss = torch.nn.functional.cross_entropy(by_hand(x, ito.make_keys(5, "train", 3, 0, index)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))
    assert not torch.equal(next(model.parameters()), next(ito.recast(net).parameters()))
    assert not model.training


def test_training_does_not_depend_on_the_global_random_state(tmp_path: Path) -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        run(tmp_path / str(seed), tiny())
        weights.append(load_file(tmp_path / str(seed) / "members/01.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_members_differ_and_other_seeds_give_other_runs(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", tiny()), run(tmp_path / "b", tiny(seed=1))
    a0, a1, b0 = (load_file(made.member_file(m))["fc.weight"] for made, m in ((a, 0), (a, 1), (b, 0)))
    assert not torch.equal(a0, a1)
    assert not torch.equal(a0, b0)
    assert len({member_seed(seed, member) for seed in range(50) for member in range(50)}) == 2500


def test_weights_skip_the_first_training_and_members_are_plain_resnets(tmp_path: Path) -> None:
    weights = str(run(tmp_path / "a", tiny()).member_file(0))
    config = tiny(network__weights=weights, finetune__epochs=0)
    run(tmp_path / "b", config)
    assert torch.equal(load_file(tmp_path / "b/resnet.safetensors")["fc.weight"], load_file(weights)["fc.weight"])
    assert torch.equal(load_file(tmp_path / "b/members/01.safetensors")["fc.weight"], load_file(weights)["fc.weight"])
    net = ito.load_resnet("resnet8", weights, in_channels=1)
    ensemble, _ = ito.load_ensemble(tmp_path / "b")
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(ensemble.members[0].base(x), net(x))


def test_save_and_load_an_ensemble_without_a_run(tmp_path: Path) -> None:
    config = ito.load_config("cifar10-resnet20", overrides={"ensemble.members": 2, "ensemble.inferences": 3})
    nets = [ito.load_resnet("resnet20") for _ in range(2)]
    ensemble = ito.ItoEnsemble([ito.recast(net) for net in nets], inferences=3)
    ito.save_ensemble(tmp_path / "saved", ensemble, config)
    again, read = ito.load_ensemble(tmp_path / "saved")
    x = torch.rand(3, 3, 32, 32)
    assert read == config
    assert torch.equal(again.predict(x).votes, ensemble.predict(x).votes)
    with pytest.raises(ValueError, match="members"):
        ito.save_ensemble(tmp_path / "other", ito.ItoEnsemble([ito.recast(nets[0])]), config)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="one architecture"):
        to_resnet(ito.recast(nets[0]), ito.load_resnet("resnet32"))


def small_ensemble(members: int = 2, norm: tuple[float, float] = (0.4, 0.3), inferences: int = 3, **sde) -> ItoEnsemble:
    """Members of digits' architecture with weights of their own, in a setting that is not the configuration's."""
    torch.manual_seed(0)
    nets = [ito.load_resnet("resnet8", None, 10, 1, norm[:1], norm[1:]) for _ in range(members)]
    return ItoEnsemble([ito.recast(net, image_shape=(1, 8, 8), **sde) for net in nets], inferences, "flat", 2).eval()


SETTINGS = {
    "as the preset": {"omega": 0.2},
    "omega and schedule": {"omega": 0.7, "schedule": "constant"},
    "steps and solver": {"omega": 0.5, "solver": "srk", "steps": 2},
    "milstein on multiplicative noise": {"omega": 0.3, "schedule": "multiplicative", "solver": "milstein", "steps": 4},
    "no noise": {"omega": 0, "solver": "ode:rk4"},
    "a horizon": {"omega": 0.5, "horizon": 5.3},
    "a horizon that rounds": {"omega": 0.5, "horizon": 1 / 3},
    "checkpoint": {"omega": 0.5, "checkpoint": True},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_what_is_saved_is_the_ensemble_not_the_configuration(case: str, tmp_path: Path) -> None:
    ensemble, config = small_ensemble(**SETTINGS[case]), tiny()
    ito.save_ensemble(tmp_path / "saved", ensemble, config)
    again, read = ito.load_ensemble(tmp_path / "saved")
    x, keys = torch.rand(5, 1, 8, 8), ito.make_keys(3, "report", index=torch.arange(5))
    for one, two in zip(ensemble.members, again.members, strict=True):
        assert torch.equal(one(x, keys), two(x, keys))
        assert [(s.t0, s.t1, s.schedule, s.shape, s.jump) for s in one.sdes] == [
            (s.t0, s.t1, s.schedule, s.shape, s.jump) for s in two.sdes
        ]
        assert (one.solver, one.steps, one.checkpoint) == (two.solver, two.steps, two.checkpoint)
    assert (again.inferences, again.rule, again.paths_per_call) == (3, "flat", 2)
    assert (read.name, read.data, read.network.arch, read.resnet) == (
        config.name,
        config.data,
        "resnet8",
        config.resnet,
    )
    typed = SETTINGS[case].get("horizon")
    assert read.sde.horizon == (typed if typed is None else pytest.approx(typed, abs=2**-20))
    assert typed != 5.3 or read.sde.horizon == 5.3  # as it was typed, not as times are rounded
    ito.save_ensemble(tmp_path / "twice", again, read)
    assert ito.load_ensemble(tmp_path / "twice")[1] == read


def spoil_norm(ensemble: ItoEnsemble) -> None:
    ensemble.members[1].stem[0].mean += 0.1


def spoil_one_schedule(ensemble: ItoEnsemble) -> None:
    ensemble.members[0].sdes[1].schedule = ito.Schedule(0.9)


def spoil_one_time(ensemble: ItoEnsemble) -> None:
    ensemble.members[1].sdes[0].t1 += 0.25
    ensemble.members[1].sdes[1].t0 += 0.25


def spoil_activation(ensemble: ItoEnsemble) -> None:
    ensemble.members[1].sdes[0].block.relu = torch.nn.ReLU6()  # no weight tells, and on most images no logit


def spoil_stem(ensemble: ItoEnsemble) -> None:
    ensemble.members[1].stem.append(torch.nn.Dropout())


def spoil_normalisation_layer(ensemble: ItoEnsemble) -> None:
    for member in ensemble.members:
        member.stem[0] = torch.nn.Identity()


def spoil_hook(ensemble: ItoEnsemble) -> None:
    ensemble.members[1].head.register_forward_hook(lambda module, args, out: out * 2)


def spoil_ensemble_hook(ensemble: ItoEnsemble) -> None:
    ensemble.register_forward_pre_hook(lambda module, args: args)


def spoil_forward(ensemble: ItoEnsemble) -> None:
    block = ensemble.members[1].sdes[0].block
    block.forward = lambda x: torch.relu(x)


def spoil_diffusion(ensemble: ItoEnsemble) -> None:
    ensemble.members[1].sdes[0].g = lambda t, y: 0 * y  # which Euler does not ask


def spoil_tensors(ensemble: ItoEnsemble) -> None:
    ensemble.members[1].sdes[0].extra = torch.nn.Parameter(torch.ones(3))


def spoil_dtype(ensemble: ItoEnsemble) -> None:
    ensemble.double()


def spoil_class(ensemble: ItoEnsemble) -> None:
    class Mine(type(ensemble.members[1])):
        pass

    ensemble.members[1].__class__ = Mine


def spoil_ensemble_class(ensemble: ItoEnsemble) -> None:
    class Mine(ItoEnsemble):
        pass

    ensemble.__class__ = Mine


def spoil_spectral_norm(ensemble: ItoEnsemble) -> None:
    torch.nn.utils.parametrizations.spectral_norm(ensemble.members[1].sdes[0].block.conv1)


def spoil_statistics(ensemble: ItoEnsemble) -> None:
    ensemble.members[1].sdes[0].block.bn1.eps = 0.5


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_norm, "differ in mean"),
        (spoil_one_schedule, "sdes.1"),
        (spoil_one_time, "sdes.0"),
        (spoil_activation, r"sdes.0.block.relu.*ReLU6"),
        (spoil_stem, "stem.*Dropout"),
        (spoil_normalisation_layer, "Normalize"),
        (spoil_hook, "head.*hook"),
        (spoil_ensemble_hook, "hook"),
        (spoil_forward, "sdes.0.block.*forward"),
        (spoil_diffusion, "sdes.0.* a g of its own"),
        (spoil_tensors, "sdes.0.extra"),
        (spoil_dtype, "float64.*float32"),
        (spoil_class, "Mine"),
        (spoil_ensemble_class, "Mine"),
        (spoil_spectral_norm, r"sdes.0.block.conv1.*ParametrizedConv2d"),
        (spoil_statistics, r"sdes.0.block.bn1.*eps=0.5"),
    ],
)
def test_an_ensemble_that_the_format_cannot_tell_is_refused(spoil, said: str, tmp_path: Path) -> None:
    ensemble = small_ensemble()
    spoil(ensemble)
    with pytest.raises(ito.ItoError, match=said) as caught:
        ito.save_ensemble(tmp_path / "other", ensemble, tiny())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400
    assert not (tmp_path / "other").exists()


def test_members_of_different_settings_are_refused(tmp_path: Path) -> None:
    members = [small_ensemble(1, omega=omega).members[0] for omega in (0.2, 0.4)]
    with pytest.raises(ito.ItoError, match=r"differ in omega \(0.2 and 0.4\)"):
        ito.save_ensemble(tmp_path / "other", ItoEnsemble(members), tiny())
    with pytest.raises(ito.ItoError, match=r"sdes\.1.*'resnet14'"):
        ito.save_ensemble(tmp_path / "other", small_ensemble(), tiny(network__arch="resnet14"))
    assert not (tmp_path / "other").exists()


def test_a_frozen_copy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ito.ItoError, match="FrozenResNet"):
        ito.save_ensemble(tmp_path / "other", small_ensemble().quick(), tiny())


def test_a_saved_ensemble_holds_a_resnet_to_compare_with(tmp_path: Path) -> None:
    ensemble, x = small_ensemble(), torch.rand(5, 1, 8, 8)
    ito.save_ensemble(tmp_path / "saved", ensemble, tiny())
    base = Run.open(tmp_path / "saved").resnet()
    assert torch.equal(base(x), ensemble.members[0].base(x))
    net = ito.load_resnet("resnet8", None, 10, 1, (0.4,), (0.3,))
    ito.save_ensemble(tmp_path / "given", ensemble, tiny(), resnet=net)
    assert torch.equal(Run.open(tmp_path / "given").resnet()(x), net(x))
    for wrong, said in (
        (ito.load_resnet("resnet8", None, 10, 1), "mean"),
        (ito.load_resnet("resnet14", None, 10, 1, (0.4,), (0.3,)), r"sdes\.1.*'resnet8'"),
        (net[-1], "Normalize"),
    ):
        with pytest.raises(ito.ItoError, match=said):
            ito.save_ensemble(tmp_path / "wrong", ensemble, tiny(), resnet=wrong)
    assert not (tmp_path / "wrong").exists()


def test_saving_leaves_the_ensemble_and_the_random_state_alone(tmp_path: Path) -> None:
    ensemble = small_ensemble().train()
    ensemble.members[0].sdes[0].block.bn1.eval()
    modes = [module.training for module in ensemble.modules()]
    weights = [value.clone() for value in ensemble.state_dict().values()]
    state = torch.get_rng_state()
    ito.save_ensemble(tmp_path, ensemble, tiny())
    ito.load_ensemble(tmp_path)
    assert [module.training for module in ensemble.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights, ensemble.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_save_over_a_run_that_is_cut_off_is_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ito.save_ensemble(tmp_path / "saved", small_ensemble(), tiny())
    assert Run.open(tmp_path / "saved").is_complete

    def cut_off(path: Path, content: bytes) -> None:
        if path.name == "01.safetensors":
            raise KeyboardInterrupt
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "write_atomically", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ito.save_ensemble(tmp_path / "saved", small_ensemble(), tiny())
    assert len(list((tmp_path / "saved/members").iterdir())) == 2  # of two ensembles
    with pytest.raises(ito.ItoError, match="no run in"):
        ito.load_ensemble(tmp_path / "saved")


def test_a_run_is_finished_when_the_verbs_can_open_it(tmp_path: Path) -> None:
    ito.save_ensemble(tmp_path / "saved", small_ensemble(), tiny())
    assert Run.find(tmp_path).folder == tmp_path / "saved"
    for lost in ("resnet.safetensors", "members/01.safetensors"):
        content = (tmp_path / "saved" / lost).read_bytes()
        (tmp_path / "saved" / lost).unlink()
        assert not Run.open(tmp_path / "saved").is_complete
        with pytest.raises(ValueError, match="no finished run"):
            Run.find(tmp_path)
        (tmp_path / "saved" / lost).write_bytes(content)


def test_a_run_without_its_resnet_says_so_and_is_not_given_another(tmp_path: Path) -> None:
    """Members whose ResNet is lost must not stand beside one that is trained anew."""
    config = tiny()
    run(tmp_path / "a", config)
    (tmp_path / "a" / "resnet.safetensors").unlink()
    with pytest.raises(ito.ItoError, match=r"resnet\.safetensors.*save_ensemble"):
        Run.open(tmp_path / "a").resnet()
    with pytest.raises(ito.ItoError, match=r"resnet\.safetensors.*--overwrite"):
        run(tmp_path / "a", config)


@pytest.mark.parametrize("content", [b"a: [", b"- a", b"", b"\xff\xfe\x00", b"sde: {omgea: 1}"])
def test_a_torn_configuration_is_one_sentence_and_hides_no_other_run(content: bytes, tmp_path: Path) -> None:
    ito.save_ensemble(tmp_path / "good", small_ensemble(), tiny())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.yaml").write_bytes(content)
    with pytest.raises(ito.ItoError) as caught:
        ito.load_ensemble(tmp_path / "torn")
    assert "\n" not in str(caught.value)
    assert Run.find(tmp_path).folder == tmp_path / "good"


def test_the_newest_run_of_a_kind_is_taken(tmp_path: Path) -> None:
    for name in ("old", "new"):
        ito.save_ensemble(tmp_path / name, small_ensemble(), tiny())
    Run.create(tmp_path / "begun", tiny())
    for name, written in (("old", 1e9), ("new", 1.1e9), ("begun", 1.2e9)):
        os.utime(tmp_path / name / "config.yaml", (written, written))
    assert Run.find(tmp_path).folder.name == "new"
    assert Run.find(tmp_path, complete=False).folder.name == "begun"
    assert Run.find(tmp_path, "old") == Run.open(tmp_path / "old") == Run.find(Path("nowhere"), str(tmp_path / "old"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.yaml").write_text("[]")
    assert Run.find(tmp_path).folder.name == "new"
    with pytest.raises(ito.ItoError, match="damaged"):  # to resume an older one instead would surprise
        Run.find(tmp_path, complete=False)


def test_a_run_names_all_of_its_files(tmp_path: Path) -> None:
    assert ito.Run is Run
    made = Run.create(tmp_path / "a", tiny())
    assert sorted(file.name for file in made.folder.iterdir()) == ["config.yaml", "environment.json"]
    assert [file.relative_to(made.folder).as_posix() for file in made.member_files] == [
        "members/00.safetensors",
        "members/01.safetensors",
    ]
    record = made.result_file("attack", "linf")
    assert re.fullmatch(r"attack-linf-\d{8}-\d{6}\.json", record.name)
    assert record.parent == made.evaluation_file.parent == made.folder
    assert Run.find(str(tmp_path), "a") == Run.open(str(made.folder)) == made
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(ito.ItoError, match="is a file, not a folder"):
            Run.create(str(tmp_path / "file"), tiny(), overwrite)


def test_unfinished_missing_and_foreign_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished run"):
        Run.find(tmp_path)
    begun = Run.create(tmp_path / "begun", tiny())
    with pytest.raises(ValueError, match=r"2 of 2 members are missing.*--resume"):
        ito.load_ensemble(tmp_path / "begun")
    with pytest.raises(ValueError, match="no run in"):
        ito.load_ensemble(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'begun'"):
        Run.find(tmp_path, "begum")
    assert Run.find(tmp_path, complete=False).folder == tmp_path / "begun"
    with pytest.raises(ValueError, match=r"differs in: sde\.omega\."):
        begun.check_config(tiny(sde__omega=0.3))
    with pytest.raises(ValueError, match="not empty"):
        Run.create(tmp_path / "begun", tiny())


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    run(tmp_path / "a", tiny())
    for state in ("state.pt", "resnet.state.pt", "members/01.state.pt"):  # of trainings that were interrupted
        (tmp_path / "a" / state).write_bytes(b"")
    Run.create(tmp_path / "a", tiny(ensemble__members=1), overwrite=True)
    left = {file.name for file in (tmp_path / "a").rglob("*") if file.is_file()}
    assert left == {"config.yaml", "environment.json"}


def test_names_of_new_runs_are_unique(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        names.append(new_run_name(tmp_path, tiny()))
        (tmp_path / names[-1]).mkdir()
    assert len(set(names)) == 3


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_weights_of_another_class_count_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", ito.load_resnet("resnet8", num_classes=7, in_channels=1)[-1])
    config = tiny(network__weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"fc.weight: \(7, 64\) in the file, \(10, 64\) in the network"):
        build_resnet(config, load_dataset(config))


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    config = tiny()
    data = load_dataset(config)
    net = build_resnet(config, data)
    with torch.no_grad():
        net[-1].fc.weight.fill_(math.inf)
    with pytest.raises(RuntimeError, match="diverged in epoch 1"):
        Trainer(tmp_path / "state.pt").fit(net, data.train, config.resnet, 0, "resnet")


def one_pixel_net() -> torch.nn.Sequential:
    """A network whose BatchNorm gets one number for an image and channel, as a deep ResNet's does on small images."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(1, 4, 8), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("n", [33, 32, 34, 17, 2])
def test_a_last_batch_of_one_image_joins_the_one_before_it(n: int, tmp_path: Path) -> None:
    data = ito.load_data("digits", train_limit=n).train
    settings = Fit(epochs=2, lr=0.1, optimizer="sgd", batch_size=16)
    seen: list[tuple[int, int, int]] = []
    net, left = one_pixel_net(), one_pixel_net()
    alone = Trainer(tmp_path / "alone.pt", on_step=lambda *step: seen.append(step))
    alone.fit(net, data, settings, 0, "resnet")
    steps = {33: 2, 32: 2, 34: 3, 17: 1, 2: 1}[n]
    assert seen == [(epoch, step, steps) for epoch in (0, 1) for step in range(1, steps + 1)]
    for _ in range(2 * steps):  # left after every step
        trainer = Trainer(tmp_path / "left.pt", should_stop=lambda: True)
        with pytest.raises(Interrupted):
            trainer.fit(left, data, settings, 0, "resnet")
    assert trainer.rows == alone.rows
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), left.state_dict().values(), strict=True))


@pytest.mark.parametrize(("n", "size"), [(1, 16), (3, 1)])
def test_one_image_that_cannot_be_normalised_is_a_sentence(n: int, size: int, tmp_path: Path) -> None:
    data = ito.load_data("digits", train_limit=n).train
    with pytest.raises(ito.ItoError, match=r"batch of one image.*batch_size") as caught:
        Trainer(tmp_path / "state.pt").fit(one_pixel_net(), data, Fit(epochs=1, lr=0.1, batch_size=size), 0, "resnet")
    assert "\n" not in str(caught.value)


TORN = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"no state",
    "a byte": lambda content: content[:3000] + bytes([content[3000] ^ 255]) + content[3001:],
    "something else": lambda content: _saved({"model": 1}),
    "no mapping": lambda content: _saved([1, 2]),
    "another network": lambda content: _saved({**_loaded(content), "model": one_pixel_net().state_dict()}),
    "another training": lambda content: _saved({**_loaded(content), "phase": "member 0"}),
    "another optimiser": lambda content: _saved({**_loaded(content), "optimizer": {}}),
}


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _loaded(content: bytes) -> dict:
    return torch.load(io.BytesIO(content), weights_only=True)


@pytest.fixture(scope="module")
def alone_and_left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone, and the same one interrupted in its second member."""
    folder, config = tmp_path_factory.mktemp("runs"), tiny(resnet__epochs=1)
    run(folder / "alone", config)
    metrics = folder / "left" / "metrics.jsonl"
    with pytest.raises(Interrupted):
        run(folder / "left", config, should_stop=lambda: metrics.is_file() and "member 1" in metrics.read_text())
    return folder


@pytest.mark.parametrize("how", TORN)
def test_a_torn_training_state_is_one_sentence_and_its_mend_works(
    how: str, alone_and_left: Path, tmp_path: Path
) -> None:
    config, alone, left = tiny(resnet__epochs=1), alone_and_left / "alone", tmp_path / "left"
    shutil.copytree(alone_and_left / "left", left)
    state = left / "members/01.state.pt"
    state.write_bytes(TORN[how](state.read_bytes()))
    with pytest.raises(ito.ItoError, match=r"01\.state\.pt.*cannot be.*delete it") as caught:
        run(left, config)
    assert "\n" not in str(caught.value)
    assert "miniz" not in str(caught.value)
    assert len(str(caught.value)) <= 400
    state.unlink()  # as it says
    run(left, config)
    assert_same_trainings(alone, left)


def test_a_training_state_of_more_images_is_refused(tmp_path: Path) -> None:
    settings = Fit(epochs=1, lr=0.1, batch_size=8)
    calls: list[int] = []

    def stop_at_the_third() -> bool:
        calls.append(1)
        return len(calls) >= 3

    many, fewer = (ito.load_data("digits", train_limit=n).train for n in (40, 16))
    trainer = Trainer(tmp_path / "state.pt", should_stop=stop_at_the_third)
    with pytest.raises(Interrupted):
        trainer.fit(one_pixel_net(), many, settings, 0, "resnet")
    with pytest.raises(ito.ItoError, match=r"3 batches into an epoch of 2.*delete it"):
        Trainer(tmp_path / "state.pt").fit(one_pixel_net(), fewer, settings, 0, "resnet")


def test_torn_metrics_are_one_sentence(tmp_path: Path) -> None:
    Run.create(tmp_path / "a", tiny())
    (tmp_path / "a" / "metrics.jsonl").write_text('{"phase": "resnet", "ep')
    with pytest.raises(ito.ItoError, match=r"metrics\.jsonl.*delete it"):
        run(tmp_path / "a", tiny())


def test_learning_rates() -> None:
    constant = Fit(epochs=1, lr=0.1)
    assert {learning_rate(constant, step, 10) for step in range(10)} == {0.1}
    cycle = Fit(epochs=1, lr=0.1, decay="one-cycle")
    rates = [learning_rate(cycle, step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(0.1)
    assert rates.index(max(rates)) in (19, 20)
    assert all(rate > 0 for rate in rates)
    assert rates[-1] < 0.002


def test_precedence_and_differences_of_configurations(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nsde: {omega: 0.1, steps: 2}\nensemble: {members: 4}\n")
    config = ito.load_config(
        file,
        environ={"ITO_SDE_SDE__OMEGA": "0.2", "ITO_SDE_SDE__STEPS": "4", "HOME": "/"},
        assignments=["sde.steps=8", "ensemble.members=6"],
        overrides={"ensemble.members": 7, "seed": None},
    )
    assert (config.sde.omega, config.sde.steps, config.ensemble.members, config.seed) == (0.2, 8, 7, 0)
    assert differing_keys(config, config) == []
    assert differing_keys(config, ito.load_config(file)) == ["ensemble.members", "sde.omega", "sde.steps"]
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sde.omgea=1", "did you mean 'sde.omega'"),
        ("omega=1", "did you mean 'sde.omega'"),
        ("sde.omega=-1", "sde.omega.*-1"),
        ("sde.omega=.nan", "sde.omega"),
        ("sde.omega=much", "sde.omega.*'much'"),
        ("sde.steps=3", "power of two"),
        ("sde.solver=eular", "did you mean 'euler'"),
        ("sde.schedule=inverse", "did you mean 'inverse-time'"),
        ("data.name=cifar", "did you mean 'cifar10"),
        ("network.arch=resnet21", "did you mean 'resnet20'"),
        ("ensemble.members=0", "ensemble.members.*0"),
        ("ensemble.rule=flatt", "did you mean 'flat'"),
        ("finetune.lr=0", "finetune.lr"),
        ("seed.x=1", "seed"),
        ("nonsense", "looks like sde.omega=0.4"),
        ("sde.omega=[", "not YAML"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ito.load_config("digits", assignments=[assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [("- a\n- b\n", "keys and values"), ("a: [", "not YAML"), ("data: 3\n", "data")]
)
def test_a_wrong_configuration_file_is_one_sentence(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        ito.load_config(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="no configuration file"):
        ito.load_config(tmp_path / "missing.yaml")


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"cuda:99.*There is: cpu"):
        pick_device("cuda:99")
    with pytest.raises(ValueError, match="Unknown device 'gpu'"):
        pick_device("gpu")


def test_the_base_of_a_run_is_the_resnet_it_began_with(tmp_path: Path) -> None:
    trained = run(tmp_path, tiny())
    base, ensemble = trained.resnet(), trained.ensemble()
    assert base[0].mean.shape == (1, 1, 1)
    assert len(ensemble.members) == 2
    assert not any(torch.equal(m.head[-1].weight, base[-1].fc.weight) for m in ensemble.members)
