"""Training, configuration and files of a run, in this process."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import neuralsde_ito as ito
from neuralsde_ito.checkpoints import load_base, member_path, save_weights, to_resnet, write_atomically
from neuralsde_ito.config import Fit, differing_keys, parse_config
from neuralsde_ito.recipes import (
    build_resnet,
    find_run,
    load_dataset,
    new_run_name,
    pick_device,
    prepare_run,
    train_run,
)
from neuralsde_ito.training import Interrupted, Trainer, learning_rate, member_seed

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


def run(folder: Path, config: ito.Config, **callbacks) -> None:
    prepare_run(folder, config, resume=(folder / "config.yaml").exists(), overwrite=False)
    train_run(folder, config, load_dataset(config), torch.device("cpu"), **callbacks)


def test_a_run_that_is_left_at_any_step_ends_like_one_that_was_not(tmp_path: Path) -> None:
    config = tiny()
    run(tmp_path / "alone", config)
    steps = [0]

    def stop_now_and_then() -> bool:
        steps[0] += 1
        return steps[0] % 4 == 0  # in the middle of epochs and at their ends

    for _ in range(40):
        try:
            run(tmp_path / "left", config, should_stop=stop_now_and_then)
            break
        except Interrupted:
            assert (tmp_path / "left" / "state.pt").exists()
    else:
        pytest.fail("the run never ended")
    for name in ("resnet.safetensors", "members/00.safetensors", "members/01.safetensors"):
        one, two = load_file(tmp_path / "alone" / name), load_file(tmp_path / "left" / name)
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert (tmp_path / "alone/metrics.jsonl").read_text() == (tmp_path / "left/metrics.jsonl").read_text()


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
        weights.append(load_file(member_path(tmp_path / str(seed), 1)))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_members_differ_and_other_seeds_give_other_runs(tmp_path: Path) -> None:
    run(tmp_path / "a", tiny())
    run(tmp_path / "b", tiny(seed=1))
    a0, a1, b0 = (load_file(member_path(tmp_path / name, m))["fc.weight"] for name, m in (("a", 0), ("a", 1), ("b", 0)))
    assert not torch.equal(a0, a1)
    assert not torch.equal(a0, b0)
    assert len({member_seed(seed, member) for seed in range(50) for member in range(50)}) == 2500


def test_weights_skip_the_first_training_and_members_are_plain_resnets(tmp_path: Path) -> None:
    run(tmp_path / "a", tiny())
    weights = str(member_path(tmp_path / "a", 0))
    config = tiny(network__weights=weights, finetune__epochs=0)
    run(tmp_path / "b", config)
    assert torch.equal(load_file(tmp_path / "b/resnet.safetensors")["fc.weight"], load_file(weights)["fc.weight"])
    assert torch.equal(load_file(member_path(tmp_path / "b", 1))["fc.weight"], load_file(weights)["fc.weight"])
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


def test_unfinished_missing_and_foreign_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished run"):
        find_run(tmp_path, None)
    prepare_run(tmp_path / "begun", tiny(), resume=False, overwrite=False)
    with pytest.raises(ValueError, match=r"2 of 2 members are missing.*--resume"):
        ito.load_ensemble(tmp_path / "begun")
    with pytest.raises(ValueError, match="no run in"):
        ito.load_ensemble(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'begun'"):
        find_run(tmp_path, "begum")
    assert find_run(tmp_path, None, complete=False) == tmp_path / "begun"
    with pytest.raises(ValueError, match=r"differs in: sde\.omega\."):
        prepare_run(tmp_path / "begun", tiny(sde__omega=0.3), resume=True, overwrite=False)
    with pytest.raises(ValueError, match="not empty"):
        prepare_run(tmp_path / "begun", tiny(), resume=False, overwrite=False)


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    run(tmp_path / "a", tiny())
    prepare_run(tmp_path / "a", tiny(ensemble__members=1), resume=False, overwrite=True)
    assert not (tmp_path / "a" / "resnet.safetensors").exists()
    assert not list((tmp_path / "a" / "members").glob("*"))


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
    config = tiny()
    run(tmp_path, config)
    base = load_base(tmp_path, config)
    ensemble, _ = ito.load_ensemble(tmp_path)
    assert base[0].mean.shape == (1, 1, 1)
    assert len(ensemble.members) == 2
    assert not any(torch.equal(m.head[-1].weight, base[-1].fc.weight) for m in ensemble.members)
