"""A recast network is the network where there is no noise, and takes its noise from its keys where there is."""

import math
import sys
from pathlib import Path

import pytest
import torch
from problems import random_images, random_resnet, trained
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

from neuralsde_ito.benchmarks.memory import bench_memory
from neuralsde_ito.models.recast import Chain, ItoResNet, as_chain, recast
from neuralsde_ito.models.resnets import ARCHITECTURES, MEAN, STD, Normalize, load_resnet
from neuralsde_ito.noise.keys import make_keys

Z = 4.9  # a correct statistic lies beyond it with probability 1e-6


def keys_of(n: int, seed: int = 0) -> torch.Tensor:
    return make_keys(seed, "report", index=torch.arange(n))


def digits(n: int) -> torch.Tensor:
    """scikit-learn's digits as images of three equal channels, ``(n, 3, 8, 8)``."""
    images = torch.tensor(load_digits().images[:n], dtype=torch.float32) / 16
    return images[:, None].expand(-1, 3, -1, -1).contiguous()


# --- without noise it is the network --------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_without_noise_it_is_the_network_bit_for_bit(arch, request):
    net = random_resnet(arch)
    model = recast(net, omega=0)
    size = 64 if "cifar" not in arch and int(arch.removeprefix("resnet")) in (18, 34, 50, 101, 152) else 32
    batches = [random_images(2, size), random_images(1, size), digits(3)]
    real = Path.home() / ".cache" / "cifar10-jpeg" / "test"
    if real.is_dir() or arch == "resnet20":
        batches.append(request.getfixturevalue("cifar10_test")[0][::4000])
    for x in batches:
        logits = net(x)
        assert torch.equal(model(x), logits)
        assert torch.equal(model.base(x), logits)
        assert not torch.equal(logits[0], logits[-1]) or len(x) == 1


@torch.no_grad()
def test_a_published_network_is_kept_bit_for_bit(shared_weights, cifar10_test):
    x = cifar10_test[0][::50]
    net = load_resnet("resnet20", weights=shared_weights)
    model = recast(net, omega=0)
    assert torch.equal(model(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("horizon", [0.5, 1.0, 7.3, 1000.0])
@torch.no_grad()
def test_without_noise_the_horizon_changes_nothing(horizon, dtype):
    net, x = random_resnet("resnet14").to(dtype), random_images(3, 16, dtype=dtype)
    assert torch.equal(recast(net, omega=0, horizon=horizon)(x), net(x))
    # More steps are another flow, but the same one at every horizon: only time is rescaled.
    at_one = recast(net, omega=0, solver="torchsde:euler", steps=4, horizon=6.0)(x)
    torch.testing.assert_close(
        recast(net, omega=0, solver="torchsde:euler", steps=4, horizon=horizon)(x),
        at_one,
        rtol=1e-4 if dtype == torch.float32 else 1e-11,
        atol=1e-5 if dtype == torch.float32 else 1e-12,
    )
    assert not torch.allclose(at_one, net(x))


def test_in_train_mode_too_it_is_the_network():
    net = random_resnet("resnet8").train()
    model = recast(net, omega=0)
    x = random_images(8, 16)
    assert torch.equal(model(x), net(x))
    for ours, theirs in zip(model.base.buffers(), as_chain(net).buffers(), strict=True):
        assert torch.equal(ours, theirs), "BatchNorm's statistics differ"


@torch.no_grad()
def test_the_memory_format_changes_no_path():
    x, keys = random_images(4), keys_of(4)
    model = recast(random_resnet("resnet8"), omega=0.5)
    other = model(x.contiguous(memory_format=torch.channels_last), keys)
    torch.testing.assert_close(other, model(x, keys), rtol=1e-4, atol=1e-4)


# --- noise ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fresh_paths_differ_and_named_paths_replay():
    x = random_images(4)
    model = recast(random_resnet("resnet8"), omega=0.2)
    assert not model.training
    first = model(x)
    assert not (first == model(x)).any()
    replayed = model(x, keys=keys_of(4))
    assert torch.equal(replayed, model(x, keys=keys_of(4)))
    assert not (replayed == model(x, keys=keys_of(4, seed=1))).any()


@torch.no_grad()
def test_reseeding_the_global_generator_does_not_foretell_the_noise():
    x = random_images(4)
    model = recast(random_resnet("resnet8"), omega=0.2)
    outcomes = []
    for _ in range(2):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        outcomes.append(model(x))
        assert torch.equal(state, torch.get_rng_state())
    assert not (outcomes[0] == outcomes[1]).any()


@pytest.mark.parametrize("solver", ["euler", "srk"])
@torch.no_grad()
def test_an_inference_does_not_depend_on_its_batch(solver):
    x, keys = random_images(9), keys_of(9)
    model = recast(random_resnet("resnet8").double(), omega=0.5, solver=solver).double()
    whole = model(x.double(), keys)
    order = torch.tensor([7, 2, 4, 0])
    torch.testing.assert_close(model(x[order].double(), keys[order]), whole[order], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model(x[3:4].double(), keys[3:4]), whole[3:4], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_images_alike_under_one_key_are_alike_and_under_two_keys_are_not():
    x = random_images(1).expand(4, -1, -1, -1)
    model = recast(random_resnet("resnet8"), omega=0.2)
    logits = model(x, torch.tensor([5, 5, 6, 5]))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[0], logits[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "horizon", "steps"),
    [
        ("constant", None, 1),
        ("constant", 0.75, 1),
        ("constant", 12.0, 4),
        ("inverse-time", None, 1),
        ("inverse-time", 6.0, 2),
        ("inverse-time", 0.3, 64),
    ],
)
@torch.no_grad()
def test_the_variance_follows_the_clock(schedule, horizon, steps):
    # Three blocks that do nothing: the state is the noise alone. 131,072 elements; chi-square to its z.
    omega, n = 0.7, 2**17
    chain = Chain(nn.Identity(), [nn.Identity() for _ in range(3)], nn.Flatten())
    model = recast(chain, omega, schedule, steps=steps, horizon=horizon, image_shape=(1, 8, 16))
    out = model(torch.zeros(n // 128, 1, 8, 16), keys_of(n // 128)).double()
    end = 3.0 if horizon is None else horizon
    assert model.sdes[-1].t1 == pytest.approx(end, abs=1e-6)
    h = end / (3 * steps)
    sigma = {"constant": lambda t: omega, "inverse-time": lambda t: omega / (1 + t)}[schedule]
    variance = sum(sigma(k * h) ** 2 * h for k in range(3 * steps))
    if schedule == "constant":
        assert variance == pytest.approx(omega**2 * end)
    assert abs(float(out.square().mean()) / variance - 1) * math.sqrt(n / 2) < Z
    assert abs(float(out.mean())) * math.sqrt(n / variance) < Z


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_a_wrong_number_of_keys_is_refused(shape):
    model = recast(random_resnet("resnet8"), omega=0.2)
    with pytest.raises(ValueError, match=r"One key an image.*4 images"):
        model(random_images(4, 8), torch.zeros(shape, dtype=torch.int64))


def test_keys_that_are_no_integers_are_refused():
    model = recast(random_resnet("resnet8"), omega=0.2)
    with pytest.raises(ValueError, match="int64"):
        model(random_images(4, 8), torch.zeros(4))


@pytest.mark.parametrize("solver", ["euler", "srk"])
@torch.no_grad()
def test_an_empty_batch_has_empty_logits(solver):
    # An attack ends with one, when every image is fooled.
    model = recast(random_resnet("resnet8"), omega=0.2, solver=solver)
    assert model(torch.zeros(0, 3, 8, 8)).shape == (0, 10)


# --- whose networks ------------------------------------------------------------------------------------


class TwoStages(nn.Module):
    """Somebody's own network: torchvision's blocks, other names, a flatten without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.stage1 = nn.Sequential(BasicBlock(6, 6), BasicBlock(6, 6))
        shrink = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.stage2 = nn.Sequential(BasicBlock(6, 8, 2, shrink), BasicBlock(8, 8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        return self.classifier(torch.flatten(self.pool(self.stage2(self.stage1(self.entry(x)))), 1))


def flat_sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), BasicBlock(6, 6), BasicBlock(6, 6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def wide_head() -> nn.Sequential:
    # No pooling: the flatten that `as_chain` puts before the first Linear is missing from the modules.
    class Net(nn.Sequential):
        def forward(self, x):
            return self[4](self[3](torch.flatten(self[2](self[1](self[0](x))), 1)))

    return Net(nn.Conv2d(3, 2, 3, 4, 1), BasicBlock(2, 2), nn.ReLU(), nn.Linear(2 * 64, 7), nn.Linear(7, 5))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        return x + self.inner(x)


def dense_chain() -> Chain:
    # The second block is no residual block: of y = x + r, x + (y - x) is y again to the last bit, of another y not.
    stem = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 12))
    far = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
    return Chain(stem, [Residual(12), far, nn.Linear(12, 6), Residual(6)], nn.Linear(6, 5))


USERS = {
    "torchvision": (lambda: resnet18(num_classes=5), [2, 4, 6]),
    "normalised torchvision": (lambda: nn.Sequential(Normalize(MEAN, STD), resnet18(num_classes=5)), [2, 4, 6]),
    "own module": (TwoStages, [2]),
    "flat Sequential": (flat_sequential, []),
    "wide head": (wide_head, []),
    "Chain of dense layers": (dense_chain, [2]),
}


@pytest.mark.parametrize("name", list(USERS))
@torch.no_grad()
def test_networks_of_users(name):
    make, jumps = USERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = trained(make())
    x, keys = random_images(3), keys_of(3)
    model = recast(net, omega=0)
    assert torch.equal(model(x), net(x))
    assert [i for i, sde in enumerate(model.sdes) if sde.jump] == jumps
    assert [sde.index for sde in model.sdes] == list(range(len(model.sdes)))
    assert [(sde.t0, sde.t1) for sde in model.sdes] == [(i, i + 1) for i in range(len(model.sdes))]
    noisy = recast(net, omega=0.3, steps=2)
    assert torch.equal(noisy(x, keys), noisy(x, keys))
    assert not torch.allclose(noisy(x, keys), net(x), atol=1e-4)


@torch.no_grad()
def test_bottlenecks_first_block_is_a_jump():
    # Its stride is 1, but it widens 64 channels to 256.
    model = recast(random_resnet("resnet50"), omega=0)
    assert [i for i, sde in enumerate(model.sdes) if sde.jump] == [0, 3, 7, 13]


@torch.no_grad()
def test_a_recast_network_can_be_recast_again():
    net, x, keys = random_resnet("resnet8"), random_images(3, 16), keys_of(3)
    once = recast(net, omega=0.5)
    again = recast(once, omega=0.2, schedule="constant", steps=2)
    assert torch.equal(again(x, keys), recast(net, omega=0.2, schedule="constant", steps=2)(x, keys))
    assert once.schedule.omega == 0.5
    assert torch.equal(recast(once, omega=0)(x), net(x))


@torch.no_grad()
def test_images_of_other_sizes_than_the_probes():
    net = random_resnet("resnet8")
    model = recast(net, omega=0, solver="torchsde:euler")
    for size in (8, 32, 20):
        x = random_images(2, size)
        torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------------


class Scaled(TwoStages):
    def forward(self, x):
        return super().forward(x) * 2


class SkipsOver(TwoStages):
    def forward(self, x):
        x = self.entry(x)
        return self.classifier(torch.flatten(self.pool(self.stage2(x + self.stage1(x))), 1))


class Reordered(TwoStages):
    def __init__(self) -> None:
        super().__init__()
        self.stage1.append(BasicBlock(6, 6))

    def forward(self, x):
        x = self.stage1[2](self.stage1[0](self.stage1[1](self.entry(x))))
        return self.classifier(torch.flatten(self.pool(self.stage2(x)), 1))


class Functional(TwoStages):
    def forward(self, x):
        return super().forward(F.avg_pool2d(x, 3, 1, 1))


@pytest.mark.parametrize("make", [Scaled, SkipsOver, Reordered, Functional])
def test_a_forward_that_does_more_than_call_its_modules_is_refused(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = trained(make())
    with pytest.raises(ValueError, match=rf"{make.__name__}\.forward does more.*ito\.Chain"):
        recast(net)


def test_networks_that_are_no_chain_of_blocks_are_refused():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"Sequential has no single unbroken run of .*BasicBlock.*ito\.Chain"):
        recast(plain)
    broken = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), BasicBlock(6, 6), nn.Dropout(), BasicBlock(6, 6))
    with pytest.raises(ValueError, match="unbroken run"):
        recast(broken)
    with pytest.raises(ValueError, match="at least one block"):
        recast(Chain(nn.Identity(), [], nn.Flatten()))


def test_a_block_that_runs_in_two_places_is_refused_by_its_names():
    stem, block = nn.Conv2d(3, 6, 3, padding=1), trained(BasicBlock(6, 6))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    with pytest.raises(ValueError, match=r"Sequential runs one block in two places, 1 and 2; give each .* a block of"):
        recast(nn.Sequential(stem, block, block, *head))
    # A chain says that it is meant.
    net = Chain(stem, [block, block], nn.Sequential(*head)).eval()
    x = random_images(2, 8)
    assert torch.equal(recast(net, omega=0)(x), net(x))


def test_a_block_that_changes_its_input_in_place_is_refused():
    inplace = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1))
    chain = Chain(nn.Identity(), [nn.Sequential(nn.Conv2d(3, 3, 1)), inplace], nn.Flatten())
    with pytest.raises(ValueError, match=r"Block 1 changes its input in place.*inplace=False"):
        recast(chain)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 32), (6, 0, 8)])
def test_a_test_image_that_does_not_fit_is_refused(shape):
    net = nn.Sequential(BasicBlock(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="give image_shape") as error:
        recast(net, image_shape=shape)
    assert str(shape) in str(error.value)
    assert isinstance(recast(net, image_shape=(6, 8, 8)), ItoResNet)


@pytest.mark.parametrize("horizon", [0, -1.0, math.inf, math.nan])
def test_a_horizon_that_is_no_positive_number_is_refused(horizon):
    with pytest.raises(ValueError, match=f"positive number, got {horizon}"):
        recast(random_resnet("resnet8"), horizon=horizon)


def test_a_horizon_too_short_for_the_blocks_is_refused():
    with pytest.raises(ValueError, match="leaves no time for 3 blocks"):
        recast(random_resnet("resnet8"), horizon=1e-7)


@pytest.mark.parametrize("omega", [-0.1, math.inf, math.nan, "0.2", True])
def test_an_omega_that_is_no_strength_is_refused(omega):
    with pytest.raises(ValueError, match="omega must be"):
        recast(random_resnet("resnet8"), omega=omega)


# --- the network stays as it is -------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_the_network_is_left_as_it_is(train):
    net = random_resnet("resnet8").train(train)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    storages = {value.data_ptr() for value in net.state_dict().values()}
    model = recast(net, omega=0.3).train()
    F.cross_entropy(model(random_images(4, 8)), torch.arange(4)).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert net.training == train
    assert all(module.training == train for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not storages & {value.data_ptr() for value in model.state_dict().values()}


@pytest.mark.parametrize("train", [False, True])
def test_the_mode_is_kept(train):
    net = random_resnet("resnet8").train(train)
    model = recast(net)
    assert all(module.training == train for module in model.modules())


def test_frozen_batchnorm_stays_frozen():
    # Fine-tuning with BatchNorm in eval mode is common; recast must not thaw it.
    net = random_resnet("resnet8").train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model = recast(net)
    assert model.training
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(not m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_dtype_is_kept():
    model = recast(random_resnet("resnet8").double(), omega=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(random_images(2, 8, dtype=torch.float64)).dtype == torch.float64


# --- memory ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")
def test_checkpointed_steps_need_no_more_memory_than_one_plain_step(monkeypatch):
    # At this small batch glibc's heap keeps as much as the tensors need, more in one run than in another;
    # tensors that are mapped, each by itself, are given back at once.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    plain, one, sixteen = bench_memory("resnet20", 32, torch.device("cpu"), (1, 16))
    assert plain.seconds > 32, "MiB: the measurement missed the activations"
    assert one.ratio < 0.75
    assert sixteen.ratio < 1


def test_a_network_whose_logits_are_not_finite_is_cut_like_any_other():
    net = load_resnet("resnet8")
    with torch.no_grad():
        net.resnet.conv1.weight[0, 0, 0, 0] = torch.nan
    assert recast(net, omega=0.2)(torch.rand(2, 3, 32, 32)).isnan().any()
