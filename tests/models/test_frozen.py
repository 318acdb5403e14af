"""Frozen blocks by hand are what autograd makes of them: the same logits, masks and gradients."""

import copy
import itertools

import pytest
import torch
from problems import rectify, trained
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import neuralsde_ito as ito
from neuralsde_ito import kernels
from neuralsde_ito.models.frozen import FrozenResNet
from neuralsde_ito.models.inference import quicken
from neuralsde_ito.models.recast import ItoResNet
from neuralsde_ito.models.resnets import CifarResNet

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the package was built without a C compiler")

PADDED, PROJECTED, WIDE = "padded shortcuts", "projected shortcuts", "more channels than are channels_last"
DEEP = "bottlenecks, one of them in groups"


def frozen(name: str, **settings) -> FrozenResNet:
    torch.manual_seed(0)
    widths = {PADDED: (16, 32), PROJECTED: (6, 10, 14), WIDE: (8, 130), DEEP: (4, 8)}[name]
    kind = Bottleneck if name == DEEP else BasicBlock
    net = CifarResNet(kind, (2,) * len(widths), widths, 5, 3, option_a=name == PADDED)
    if name == DEEP:
        net.layer2[0].conv2 = nn.Conv2d(8, 8, 3, 2, 1, groups=2, bias=False)  # as in ResNeXt
    quick = quicken(ito.recast(trained(net), **({"omega": 0.3} | settings)))
    assert isinstance(quick, FrozenResNet)
    return quick


class ByAutograd(FrozenResNet):
    solve_blocks = ItoResNet.solve_blocks


def by_autograd(quick: FrozenResNet) -> ItoResNet:
    """The same modules, and autograd through them."""
    twin = copy.copy(quick)
    twin.__class__ = ByAutograd
    return twin


def both_ways(quick: FrozenResNet, state: Tensor, keys: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Logits of the state and the gradient in it: by hand, and by autograd."""
    found = []
    for model in (quick, by_autograd(quick)):
        at = state.clone().requires_grad_()
        logits = model.along_paths(at, keys)
        weights = torch.linspace(-1, 2, logits.numel()).view(logits.shape)
        found.append((logits.detach(), torch.autograd.grad((weights * logits.log_softmax(-1)).sum(), at)[0]))
    return found


@pytest.mark.parametrize("name", [PADDED, PROJECTED, WIDE, DEEP])
@pytest.mark.parametrize(
    ("omega", "copies", "size"), [(0.3, 3, 16), (0.3, 1, 12), (0.0, 1, 16), (0.0, 2, 16), (0.3, 4, 15)]
)
def test_logits_are_equal_and_gradients_to_rounding(name, omega, copies, size):
    quick = frozen(name, omega=omega, image_shape=(3, 16, 16))
    x = torch.rand(4, 3, size, size)
    keys = ito.make_keys(0, "report", inference=torch.arange(copies)[:, None], index=torch.arange(4))
    assert quick.manual_gradient
    with torch.no_grad():
        state = quick.before_noise(x)
    before = state.clone()
    (logits, gradient), (wanted, slope) = both_ways(quick, state, keys)
    assert logits.shape == (copies, 4, 5)
    assert torch.equal(logits, wanted)
    assert slope.abs().max() > 1e-3
    assert torch.allclose(gradient, slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))
    assert torch.equal(state, before)
    with torch.no_grad():
        assert torch.equal(quick.along_paths(state, keys), wanted)
        assert torch.allclose(quick.along_paths(state, keys[0]), wanted[0], rtol=0, atol=1e-5)  # another batch
    with torch.inference_mode():
        assert torch.equal(quick.along_paths(state, keys), wanted)


def test_keys_that_do_not_fit_are_refused_on_both_ways():
    quick = frozen(PADDED)
    state = torch.rand(4, 16, 16, 16)
    for model, keys in itertools.product((quick, by_autograd(quick)), [torch.arange(3), torch.ones(4, 2).long()]):
        with pytest.raises(ValueError, match="One key an image"):
            model.along_paths(state, keys)


@pytest.mark.parametrize(
    ("change", "by_hand"),
    [
        (lambda q: None, True),
        (lambda q: setattr(q, "steps", 2), False),
        (lambda q: setattr(q, "solver", "milstein"), False),
        (lambda q: setattr(q, "checkpoint", True), False),
        (lambda q: q.sdes[1].block.conv2.register_forward_hook(lambda *_: None), False),
        (lambda q: q.sdes[1].block.register_full_backward_hook(lambda *_: None), False),
        (lambda q: setattr(q.sdes[2].block, "relu", nn.SiLU()), False),
        (lambda q: setattr(q.sdes[2].block, "bn1", nn.InstanceNorm2d(32)), False),
        (lambda q: setattr(q.sdes[2].block.conv1, "padding_mode", "circular"), False),
        (lambda q: setattr(q.sdes[3].block.conv1, "padding", "same"), False),
        (lambda q: setattr(q.sdes[2].block, "downsample", nn.AvgPool2d(2)), True),  # a shortcut may be anything
        (lambda q: setattr(q.sdes[0], "block", nn.Softplus()), True),  # and so may what is before the first noise
        (lambda q: setattr(q.sdes[1], "block", nn.Softplus()), False),
    ],
)
def test_whatever_else_a_block_does_autograd_follows(change, by_hand):
    quick = frozen(PADDED)
    change(quick)
    assert quick.manual_gradient == by_hand
    if isinstance(quick.sdes[2].block.downsample, nn.AvgPool2d):  # it does not widen
        quick.sdes[2].block.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 32, 1)).requires_grad_(False)
    with torch.no_grad():
        state = quick.before_noise(torch.rand(3, 3, 16, 16))
    (logits, gradient), (wanted, slope) = both_ways(quick, state, torch.arange(3))
    assert torch.equal(logits, wanted)
    assert torch.allclose(gradient, slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


def test_float64_and_autocast_are_autograd_s():
    quick = frozen(PADDED)
    x, keys = torch.rand(3, 3, 16, 16), torch.arange(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quick(x, keys), by_autograd(quick)(x, keys))
    exact = frozen(PADDED).double()(x.double(), keys)
    assert exact.dtype == torch.float64
    assert torch.allclose(quick(x, keys).double(), exact, rtol=0, atol=1e-4)


def test_without_the_compiled_pass_results_stay(monkeypatch):
    quick = frozen(PADDED)
    x, keys = torch.rand(3, 3, 16, 16), torch.arange(3)
    wanted = quick(x, keys)
    monkeypatch.setattr(kernels, "library", None)
    assert not quick.manual_gradient
    assert torch.allclose(quick(x, keys), wanted, rtol=0, atol=1e-4)


def test_a_gradient_may_be_asked_for_twice_but_not_its_own():
    quick = frozen(PROJECTED)
    x = torch.rand(3, 3, 16, 16).requires_grad_()
    loss = quick(x, torch.arange(3)).logsumexp(1).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_an_image_that_is_no_number_stays_so():
    quick = frozen(PADDED)
    x = torch.rand(3, 3, 16, 16)
    x[1, 0, 5, 5] = torch.nan
    logits = quick(x, torch.arange(3))
    assert logits.isnan().all(1).tolist() == [False, True, False]


VALUES = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan])


@pytest.mark.parametrize("shape", [(1, 9, 1, 9), (2, 9, 3, 9), (0, 9, 2, 9)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("skipped", [None, "same order", "other order"])
def test_rectifying_and_its_way_back_are_torch_s(shape, order, skipped):
    grid = torch.stack(torch.meshgrid(VALUES, VALUES, indexing="ij")).view(2, 1, 9, 1, 9).expand(2, *shape)
    x = grid[0].contiguous(memory_format=order)
    other = {torch.contiguous_format: torch.channels_last, torch.channels_last: torch.contiguous_format}[order]
    skip = grid[1].contiguous(memory_format=order if skipped == "same order" else other) if skipped else None
    at = (x if skip is None else x + skip).requires_grad_()
    wanted = at.relu()
    (slope,) = torch.autograd.grad(wanted, at, grid[1])
    silent = x.clone()
    passed = rectify(x, skip)
    assert rectify(silent, skip, remember=False) is None
    for found in (x, silent):
        assert torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert passed.stride() == x.stride()
    gradient = grid[1].contiguous(memory_format=other)
    assert torch.allclose(kernels.gate_(gradient, passed), slope, rtol=0, atol=0, equal_nan=True)
    if skip is not None:
        (slope,) = torch.autograd.grad(at.relu(), at, grid[1] + grid[0])
        gradient, skip = (part.contiguous(memory_format=order) for part in (grid[1], grid[0]))
        if skipped == "other order":
            skip = skip.contiguous(memory_format=other)
        assert torch.allclose(kernels.gate_(gradient, passed, skip), slope, rtol=0, atol=0, equal_nan=True)
