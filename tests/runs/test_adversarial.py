"""Adversarial training: perturbed images, losses, perturbed and averaged weights, the choice of an epoch."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import assert_same_trainings, run, run_and_leave, tiny
from torch import nn
from torch.nn import functional as F

import neuralsde_ito as ito
from neuralsde_ito.attacks.pgd import PGD
from neuralsde_ito.attacks.targets import EnsembleTarget
from neuralsde_ito.data import load_data
from neuralsde_ito.models.ensemble import ItoEnsemble
from neuralsde_ito.noise.keys import PathRange, make_keys
from neuralsde_ito.runs.adversarial import (
    as_training_target,
    consistency_loss,
    kept_buffers,
    perturb,
    perturbed_weights,
    training_loss,
)
from neuralsde_ito.runs.build import load_dataset
from neuralsde_ito.runs.config import Adversary, Fit
from neuralsde_ito.runs.run import Run
from neuralsde_ito.runs.training import Interrupted, Trainer, training_precision
from neuralsde_ito.validation import ItoError

ROBUST = {
    "finetune__adversary.method": "pgd",
    "finetune__adversary.eps": "0.1",
    "finetune__adversary.steps": 2,
    "resnet__adversary.method": "n-fgsm",
    "resnet__adversary.eps": "0.1",
    "resnet__average": 0.9,
    "finetune__average": 0.9,
    "finetune__awp": 0.01,
    "finetune__held_out": 20,
    "resnet__held_out": 20,
}


@pytest.fixture(scope="module")
def model() -> ito.models.recast.ItoResNet:
    torch.manual_seed(3)
    return ito.recast(ito.load_resnet("resnet8", num_classes=10, in_channels=1), omega=0.5, image_shape=(1, 8, 8))


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    _, x, y = next(load_data("digits").test.batches(12))
    return x, y


class OnTrainingPaths:
    """A target whose gradient number ``k`` takes the training's path ``k + 1``."""

    def __init__(self, model, paths):
        self.inner, self.paths, self.distinct = as_training_target(model, "float32"), paths, None

    def path_logits(self, x, paths):
        return self.inner.path_logits(x, paths)

    def ascend(self, objective, x, y, paths):
        return self.inner.ascend(objective, x, y, replace(self.paths, first=self.paths.first + 1 + paths.first))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5)])
def test_pgd_of_the_training_is_that_of_the_attacks_on_the_same_keys(model, batch, norm, eps):
    x, y = batch
    adversary = Adversary(method="pgd", norm=norm, eps=eps, steps=4, start=0.0)
    paths = PathRange(7, "adversary", torch.arange(12), first=30)
    ours = perturb(as_training_target(model, "float32"), x, y, adversary, paths)
    attack = PGD(
        norm=norm, eps=eps, steps=4, step_size=eps / 4, random_start=False, eot=1, selection=1, keep="last", stop=False
    )
    with pytest.warns(UserWarning, match="one path a gradient"):
        theirs = attack.run(OnTrainingPaths(model, paths), x, y).images
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, x)


def test_each_gradient_has_a_path_of_its_own_and_they_are_replayed(model, batch):
    x, y = batch
    adversary = Adversary(method="pgd", eps=0.1, steps=3)
    seen = []

    class Watched(EnsembleTarget):
        def ascend(self, objective, x, y, paths):
            seen.append(paths.first)
            return super().ascend(objective, x, y, paths)

    target = Watched(ItoEnsemble([model], inferences=1))
    paths = PathRange(7, "adversary", torch.arange(12), first=8)
    assert torch.equal(perturb(target, x, y, adversary, paths), perturb(target, x, y, adversary, paths))
    assert seen == [9, 10, 11] * 2
    later = perturb(target, x, y, adversary, replace(paths, first=12))
    assert not torch.equal(later, perturb(target, x, y, adversary, paths))


def test_n_fgsm_is_one_step_from_a_start_outside_of_the_ball(model, batch):
    x, y = batch
    paths = PathRange(1, "adversary", torch.arange(12))
    target = as_training_target(model, "float32")
    moved = perturb(target, x, y, Adversary(method="n-fgsm", eps=0.05), paths)
    start = ito.attacks.norms.BALLS["linf"].start(x, 0.1, make_keys(1, "adversary", index=torch.arange(12))).clamp(0, 1)
    with torch.enable_grad():
        begun = start.clone().requires_grad_()
        logits = copy.deepcopy(model).eval()(begun, make_keys(1, "adversary", 0, 1, torch.arange(12)))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), begun)
    expected = (start + 0.05 * gradient.sign()).clamp(0, 1)
    same = (moved - expected).abs() < 1e-6
    assert same.float().mean() > 0.99  # the sign of a gradient that is all but zero may differ
    assert 0.05 < (moved - x).abs().max() <= 0.15 + 1e-6


def test_trades_is_its_paper_s_loss(batch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    x, y = batch[0].double(), batch[1]
    perturbed = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    settings = Fit(epochs=1, lr=0.1, adversary=Adversary(method="trades", beta=6.0))
    loss, logits = training_loss(net, x, perturbed, y, torch.zeros(12, dtype=torch.int64), settings)
    clean, attacked = net(x).float(), net(perturbed).float()
    kl = nn.KLDivLoss(reduction="sum")(F.log_softmax(attacked, 1), F.softmax(clean, 1)) / len(x)
    written_out = F.cross_entropy(clean, y) + 6.0 * kl
    assert torch.allclose(loss, written_out, rtol=1e-6, atol=0)
    assert torch.equal(logits, attacked)
    ours, theirs = (torch.autograd.grad(value, net.parameters(), retain_graph=True) for value in (loss, written_out))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(ours, theirs, strict=True))


def test_clean_and_perturbed_images_of_trades_ride_one_path(model, batch):
    x, y = batch
    keys = make_keys(0, "train", index=torch.arange(12))
    evaluated = copy.deepcopy(model).eval()
    settings = Fit(epochs=1, lr=0.1, adversary=Adversary(method="trades", beta=100.0))
    loss, _ = training_loss(evaluated, x, x, y, keys, settings)  # not perturbed at all: nothing diverges
    assert torch.allclose(loss, F.cross_entropy(evaluated(x, keys), y))


def test_perturbed_weights_are_those_of_a_proxy(batch):
    """The reference: a proxy takes a step of SGD up the loss; its change is scaled to gamma times the weight's norm."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).double()
    x, y = batch[0].double(), batch[1]
    proxy = copy.deepcopy(net)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-F.cross_entropy(proxy(x), y)).backward()
    optimizer.step()
    expected = copy.deepcopy(net)
    with torch.no_grad():
        for name, value in expected.named_parameters():
            change = proxy.get_parameter(name) - value
            if value.dim() > 1:
                value += 0.01 * value.norm() / change.norm() * change
    before = {name: value.clone() for name, value in net.state_dict().items()}
    F.cross_entropy(net(x), y).backward()
    with perturbed_weights(net, 0.01):
        assert all(p.grad is None for p in net.parameters())
        for name, value in net.named_parameters():
            assert torch.allclose(value, expected.get_parameter(name), rtol=1e-6, atol=1e-9), name
        assert F.cross_entropy(net(x), y) > F.cross_entropy(proxy(x), y)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_perturbed_weights_come_back_after_an_error(batch):
    net = nn.Linear(4, 3)
    before = net.weight.clone()
    net(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="in the middle"), perturbed_weights(net, 0.5):
        raise RuntimeError("in the middle")
    assert torch.equal(net.weight, before)


def test_kept_buffers():
    norm = nn.BatchNorm2d(3)
    with kept_buffers(norm):
        norm(torch.randn(4, 3, 5, 5))
        assert bool(norm.running_mean.any())
    assert not bool(norm.running_mean.any())
    assert norm.num_batches_tracked == 0


def test_consistency_is_its_paper_s_loss():
    torch.manual_seed(2)
    logits = torch.randn(2, 7, 10, dtype=torch.float64)
    probabilities = logits.softmax(-1)
    mean = probabilities.mean(0)
    kl = sum(F.kl_div(p.log(), mean, reduction="batchmean") for p in probabilities) / 2
    entropy = -(mean * mean.log()).sum(1).mean()
    assert torch.allclose(consistency_loss(logits, 10.0), 10 * kl + 0.5 * entropy, rtol=1e-6)
    assert torch.allclose(
        consistency_loss(logits[:1].repeat(2, 1, 1), 1e6),
        -0.5 * (probabilities[0] * probabilities[0].log()).sum(1).mean(),
    )


def test_a_robust_run_that_is_left_at_any_step_ends_like_one_that_was_not(tmp_path: Path) -> None:
    config = tiny(**ROBUST)
    run(tmp_path / "alone", config)
    run_and_leave(tmp_path / "left", config, every=3)
    assert_same_trainings(tmp_path / "alone", tmp_path / "left")
    rows = (tmp_path / "alone" / "metrics.jsonl").read_text()
    assert rows.count("held_out_attacked") == 6


@pytest.mark.parametrize("change", [{}, {"awp": 0.02}, {"average": 0.5}, {"adversary": Adversary(method="trades")}])
def test_each_setting_changes_the_weights(model, tmp_path, change):
    data = load_data("digits").train.first(64)
    ends = []
    for settings in (Fit(epochs=1, lr=0.01, batch_size=16), Fit(epochs=1, lr=0.01, batch_size=16, **change)):
        if "adversary" not in change:
            settings = settings.model_copy(update={"adversary": Adversary(method="pgd", eps=0.1, steps=1)})
        trained = copy.deepcopy(model)
        Trainer(tmp_path / f"{len(ends)}.pt").fit(trained, data, settings, 0, "x")
        ends.append(trained.state_dict()["sdes.1.block.conv1.weight"])
    assert torch.equal(*ends) == (not change)


def test_the_average_is_a_moving_one(model, tmp_path):
    """With one batch an epoch the weights after each step are known from shorter trainings."""
    data = load_data("digits").train.first(32)
    fit = Fit(epochs=1, lr=0.01, batch_size=32, optimizer="sgd")
    name, weights = "sdes.1.block.conv1.weight", []
    for epochs in (1, 2, 3):
        trained = copy.deepcopy(model)
        Trainer(tmp_path / f"{epochs}.pt").fit(trained, data, fit.model_copy(update={"epochs": epochs}), 0, "x")
        weights.append(trained.state_dict()[name])
    averaged = copy.deepcopy(model)
    Trainer(tmp_path / "a.pt").fit(averaged, data, fit.model_copy(update={"epochs": 3, "average": 0.2}), 0, "x")
    expected = model.state_dict()[name]
    for step, value in enumerate(weights, 1):
        expected = torch.lerp(expected, value, 1 - min(0.2, (1 + step) / (10 + step)))
    assert torch.allclose(averaged.state_dict()[name], expected, atol=1e-6)


def test_the_best_epoch_is_kept(model, tmp_path):
    """A learning rate that destroys the network: the first epochs are the best ones."""
    data = load_data("digits").train.first(160)
    settings = Fit(epochs=4, lr=3.0, batch_size=16, optimizer="sgd", held_out=40, decay="constant")
    trained = copy.deepcopy(model)
    trainer = Trainer(tmp_path / "x.pt")
    trainer.fit(trained, data, settings, 0, "x")
    held = [row["held_out"] for row in trainer.rows]
    _, x, y = next(data.first(40).batches(40))
    keys = make_keys(0, "train", 0, -1, data.first(40).names)
    with torch.no_grad():
        right = (trained.eval()(x, keys).argmax(1) == y).float().mean()
    assert float(right) == pytest.approx(max(held))


def test_held_out_images_are_not_trained_on():
    data = load_data("digits").train
    held, rest = data.first(100), data.without(100)
    assert len(rest) == len(data) - 100
    assert torch.equal(torch.cat([held.names, rest.names]).sort().values, torch.arange(len(data)))
    with pytest.raises(ItoError, match="none would be left"):
        data.without(len(data))


def processor(monkeypatch, cuda: tuple[int, int] = (8, 0), **capabilities: object) -> None:
    """As if the processor had these instructions, and a card this capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)


@pytest.mark.parametrize(
    ("asked", "device", "capabilities", "taken"),
    [
        ("native", "cpu", {"avx512_bf16": True}, "bfloat16"),
        ("native", "cpu", {"amx_bf16": True}, "bfloat16"),
        ("native", "cpu", {"avx512_bf16": False, "cpu_name": "x", "l2_cache_size": 1}, "float32"),
        ("native", "cpu", {}, "float32"),
        ("native", "cuda", {}, "bfloat16"),
        ("native", "cuda", {"cuda": (7, 5)}, "float32"),  # a card of 2018 imitates it
        ("native", "mps", {"avx512_bf16": True}, "float32"),
        ("auto", "cpu", {"avx512_bf16": True}, "float32"),
        ("auto", "cuda", {}, "bfloat16"),
        ("auto", "cuda", {"cuda": (7, 0)}, "float32"),
        ("bfloat16", "cpu", {"avx512_bf16": True}, "bfloat16"),
        ("float32", "cuda", {}, "float32"),
    ],
)
def test_the_precision_of_a_training(asked, device, capabilities, taken, monkeypatch):
    processor(monkeypatch, **capabilities)
    assert training_precision(asked, torch.device(device)) == taken


def test_bfloat16_that_a_processor_imitates_is_obeyed_and_said(monkeypatch):
    processor(monkeypatch, cuda=(7, 5))
    for device in ("cpu", "cuda"):
        with pytest.warns(UserWarning, match="no instructions for bfloat16.*precision native"):
            assert training_precision("bfloat16", torch.device(device)) == "bfloat16"


def test_a_training_that_goes_on_with_another_processor_keeps_its_precision(model, tmp_path, monkeypatch):
    data, settings = load_data("digits").train.first(64), Fit(epochs=2, lr=0.01, batch_size=32, precision="native")
    processor(monkeypatch, avx512_bf16=True)
    whole = Trainer(tmp_path / "whole.pt")
    whole.fit(first := copy.deepcopy(model), data, settings, 0, "x")
    left = Trainer(tmp_path / "left.pt", should_stop=lambda: True)
    with pytest.raises(Interrupted):
        left.fit(copy.deepcopy(model), data, settings, 0, "x")
    processor(monkeypatch)
    rest = Trainer(tmp_path / "left.pt")
    rest.fit(second := copy.deepcopy(model), data, settings, 0, "x")
    assert rest.rows == whole.rows
    assert {row["precision"] for row in rest.rows} == {"bfloat16"}
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:This processor has no instructions")
def test_training_in_bfloat16(model, tmp_path):
    data, losses = load_data("digits").train.first(256), []
    for precision in ("float32", "bfloat16"):
        settings = Fit(
            epochs=3, lr=0.01, batch_size=32, precision=precision, adversary=Adversary(method="pgd", steps=2)
        )
        trainer = Trainer(tmp_path / f"{precision}.pt")
        trainer.fit(copy.deepcopy(model), data, settings, 0, "x")
        losses.append([row["loss"] for row in trainer.rows])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_resnet_of_a_robust_run_is_saved_as_a_resnet(tmp_path):
    config = tiny(**ROBUST)
    made = run(tmp_path / "run", config)
    net, data = made.resnet(), load_dataset(config)
    _, x, _ = next(data.test.batches(8))
    member = ito.recast(net, omega=0.0, image_shape=(1, 8, 8)).eval()
    assert torch.equal(net(x), member(x))
    assert Run.open(tmp_path / "run").config.finetune.adversary.steps == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune__adversary.method": "pdg"}, "pgd"),
        ({"finetune__adversary.eps": "8"}, "at most 1 under linf"),
        ({"finetune__adversary.method": "n-fgsm", "finetune__adversary.steps": 3}, "one step"),
        ({"finetune__adversary.step_size": "0"}, "above 0"),
        ({"finetune__adversary.step_size": "long"}, "step_size must be a number"),
        ({"finetune__adversary.method": "pgd", "finetune__consistency": 5.0}, "consistency"),
        ({"finetune__average": 1.0}, "average"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ItoError, match=message):
        tiny(**changes)


def test_a_network_to_be_smoothed_trains_on_noisy_images(tmp_path):
    """The ResNet's own training sees the noise of the image, too: without it, its weights are others."""
    files = []
    for sigma in (0.0, 0.25, 0.25):
        config = tiny(resnet__epochs=1, finetune__epochs=0, sde__omega=0.0, sde__input_sigma=sigma)
        made = run(tmp_path / str(len(files)), config)
        files.append(made.resnet_file.read_bytes())
    assert files[0] != files[1]
    assert files[1] == files[2]


def test_consistency_trains_and_resumes(tmp_path):
    changes = {"finetune__consistency": 10.0, "resnet__consistency": 5.0, "sde__input_sigma": 0.25}
    config = tiny(**changes)
    run(tmp_path / "alone", config)
    run_and_leave(tmp_path / "left", config, every=4)
    assert_same_trainings(tmp_path / "alone", tmp_path / "left")


@pytest.mark.parametrize("phase", ["resnet", "finetune"])
def test_consistency_without_noise_is_refused(phase):
    with pytest.raises(ItoError, match=f"{phase}.consistency compares paths"):
        tiny(**{f"{phase}__consistency": 1.0, "sde__omega": 0.0})


@pytest.mark.parametrize("change", [{"adversary": Adversary(method="pgd")}, {"consistency": 1.0}])
def test_a_network_that_is_not_recast_is_refused(tmp_path, change):
    net = ito.load_resnet("resnet8", num_classes=10, in_channels=1)
    with pytest.raises(ItoError, match="not the network"):
        Trainer(tmp_path / "x.pt").fit(net, load_data("digits").train.first(8), Fit(epochs=1, lr=0.1, **change), 0, "x")
