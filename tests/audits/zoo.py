"""A zoo of models of digits whose robustness is known: sound ones, and ones whose gradients mislead a white-box attack.

A model is an `nn.Module` from images ``(N, 1, 8, 8)`` in [0, 1] to logits, trained in seconds. All that misleads is in
layers of the class `Masking`. `honest` gives the same model with gradients that mislead nobody: an attack along these
knows what an attacker knows who has read the model's code, and its figure is the model's true one.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuralsde_ito as ito

Function = Callable[[Tensor], Tensor]


# --- layers that mask gradients -------------------------------------------------------------------------------


class Masking(nn.Module):
    """A layer whose gradient misleads. With ``honest`` it gives the same values, and a gradient that does not."""

    honest = False


def honest(model: nn.Module) -> nn.Module:
    """A copy of the model in which no layer misleads."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Masking):
            module.honest = True
    return model


class Hard(Masking):
    """``hard(x)``, with the gradient that autograd finds in ``hard``. Honest: with the gradient of ``soft``.

    ``leak``: a function of ``x`` whose gradient is passed on as well, and whose value is not.
    """

    def __init__(self, hard: Function, soft: Function = lambda x: x, leak: Function | None = None) -> None:
        super().__init__()
        self.hard, self.soft, self.leak = hard, soft, leak

    def forward(self, x: Tensor) -> Tensor:
        hard = self.hard(x)
        if self.honest:
            soft = self.soft(x)
            return soft + (hard - soft).detach()
        if self.leak is not None:
            leak = self.leak(x)
            hard = hard.detach() + leak - leak.detach()
        return hard


class After(Masking):
    """A function of the logits. Honest: not there, where the function changes no decision."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return z if self.honest else self.function(z)


class Detached(Masking):
    """``net(x)`` without a gradient, plus a little of an untrained network. Honest: ``net`` has its gradient."""

    def __init__(self, net: nn.Module, other: nn.Module, size: float) -> None:
        super().__init__()
        self.net, self.other, self.size = net, other.requires_grad_(False), size

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return (out if self.honest else out.detach()) + self.size * self.other(x)


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Function) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


class Backward(Masking):
    """The identity with a gradient that is changed on its way back."""

    def __init__(self, change: Function) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return x if self.honest else _Changed.apply(x, self.change)


class Ripple(Masking):
    """Waves too small to change an image and too steep for its gradient."""

    def __init__(self, height: float, frequency: float) -> None:
        super().__init__()
        self.height, self.frequency = height, frequency

    def forward(self, x: Tensor) -> Tensor:
        wave = self.height * torch.sin(self.frequency * x)
        return x + (wave.detach() if self.honest else wave)


class Winners(Masking):
    """k winners take all (Xiao et al. 2020): the largest ``share`` of the activations pass, the others are 0.

    Honest: the gradient passes where an activation is above 0, as through a ReLU.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, round(self.share * flat.shape[1])), 1).values[:, -1:]
        won = torch.where(flat >= least, flat, 0).view_as(x)
        return _pass_through(won, F.softplus(4 * x) / 4) if self.honest else won


class Steep(Masking):
    """Sigmoids so steep that they are 0 or 1. Honest: with the gradient of gentle ones."""

    def __init__(self, slope: float, gentle: float = 2.0) -> None:
        super().__init__()
        self.slope, self.gentle = slope, gentle

    def forward(self, x: Tensor) -> Tensor:
        hard = (self.slope * x).sigmoid()
        return _pass_through(hard, (self.gentle * x).sigmoid()) if self.honest else hard


class Gate(Masking):
    """Stochastic binary neurons: 1 with probability ``sigmoid(slope x)``. Honest: with this probability's gradient."""

    def __init__(self, slope: float, keep: bool = False) -> None:
        super().__init__()
        self.slope, self.keep = slope, keep

    def forward(self, x: Tensor) -> Tensor:
        chance = (self.slope * x).sigmoid()
        hard = (torch.rand_like(x) < chance).to(x)
        gate = _pass_through(hard, chance) if self.honest else hard
        return x * gate if self.keep else gate + 0 * x


class Pruned(Masking):
    """Stochastic activation pruning (Dhillon et al. 2018): the survivors are drawn by size and scaled, all detached."""

    def __init__(self, share: float, leak: float) -> None:
        super().__init__()
        self.share, self.leak = share, leak

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).detach()
        chance = flat.abs() / flat.abs().sum(1, keepdim=True).clamp_min(1e-12)
        kept = 1 - (1 - chance) ** (self.share * flat.shape[1])
        mask = ((torch.rand_like(kept) < kept) / kept.clamp_min(1e-6)).view_as(x)
        if self.honest:
            return x * mask
        return (x * mask).detach() + self.leak * (x.roll(1, 1) - x.roll(1, 1).detach())


class Drowned(Masking):
    """A term of value 0 whose gradient is random and large, another at every call."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if self.honest:
            return x
        away = (torch.randn_like(x) * (x - x.detach())).flatten(1).sum(1).view(-1, 1, 1, 1)
        return x + self.size * away * torch.randn_like(x)


class Prototypes(Masking):
    """Votes of the ``k`` nearest training images, and a slope that says little. Honest: a kernel's votes."""

    def __init__(self, count: int = 400, k: int = 5) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("images", torch.zeros(count, 64))
        self.register_buffer("labels", torch.zeros(count, dtype=torch.int64))

    def learn(self, x: Tensor, y: Tensor) -> None:
        self.images.copy_(x[: len(self.images)].flatten(1))
        self.labels.copy_(y[: len(self.images)])

    def forward(self, x: Tensor) -> Tensor:
        squares = (x.flatten(1)[:, None] - self.images).square().sum(2)
        classes = F.one_hot(self.labels, 10).to(x)
        soft = (-4 * squares).softmax(1) @ classes
        nearest = squares.topk(self.k, 1, largest=False).indices
        hard = classes[nearest].sum(1)
        if self.honest:
            hard = _pass_through(hard, 10 * soft)
        return hard + 1e-3 * x.flatten(1)[:, :10]


class OneOf(nn.Module):
    """Every call is answered by one of several networks, drawn by chance."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return self.nets[int(torch.randint(len(self.nets), ()))](x)


def _pass_through(hard: Tensor, soft: Tensor) -> Tensor:
    return soft + (hard - soft).detach()


# --- layers that do not ---------------------------------------------------------------------------------------


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Mean(nn.Module):
    """The mean logits of several networks, or their log mean probability."""

    def __init__(self, nets: list[nn.Module], probabilities: bool = False) -> None:
        super().__init__()
        self.nets, self.probabilities = nn.ModuleList(nets), probabilities

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([net(x) for net in self.nets])
        if self.probabilities:
            return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
        return logits.mean(0)


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Normal(nn.Module):
    """Gaussian noise of standard deviation ``sigma``, from torch's generator, numpy's or one of its own."""

    def __init__(self, sigma: float, source: str = "torch") -> None:
        super().__init__()
        self.sigma, self.source = sigma, source
        self.own = np.random.default_rng(7)

    def forward(self, x: Tensor) -> Tensor:
        if self.source == "torch":
            return x + self.sigma * torch.randn_like(x)
        if self.source == "random":
            normals = torch.tensor([random.gauss(0, 1) for _ in range(x.numel())]).view_as(x)
        else:
            draw = np.random.standard_normal if self.source == "numpy" else self.own.standard_normal
            normals = torch.from_numpy(draw(x.shape))
        return x + self.sigma * normals.to(x)


class ResizePad(nn.Module):
    """Random resizing and padding (Xie et al. 2018): ``small`` to ``large`` pixels, then padded to ``large``."""

    def __init__(self, small: int, large: int) -> None:
        super().__init__()
        self.small, self.large = small, large

    def forward(self, x: Tensor) -> Tensor:
        side = int(torch.randint(self.small, self.large + 1, ()))
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        left, top = (int(torch.randint(self.large - side + 1, ())) for _ in range(2))
        return F.pad(x, (left, self.large - side - left, top, self.large - side - top))


class Shift(nn.Module):
    """A random shift by at most one pixel, the same for a batch, or rotation by a random angle (nearest pixels)."""

    def __init__(self, degrees: float = 0.0) -> None:
        super().__init__()
        self.degrees = degrees

    def forward(self, x: Tensor) -> Tensor:
        if not self.degrees:
            down, right = torch.randint(-1, 2, (2,)).tolist()
            return F.pad(x, (1, 1, 1, 1))[:, :, 1 + down : 9 + down, 1 + right : 9 + right]
        angle = math.radians(self.degrees) * float(2 * torch.rand(()) - 1)
        turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]).to(x)
        grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="nearest", align_corners=False)


class MedianFilter(nn.Module):
    """The median of 3 x 3 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3).median(1).values.view_as(x)


class MaxOut(nn.Module):
    """The largest of every four features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 4)).amax(2)


class Attention(nn.Module):
    """A small transformer: 16 patches of 2 x 2 pixels, one layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 10)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        return self.head(self.layer(self.embed(patches) + self.position).mean(1))


# --- networks -------------------------------------------------------------------------------------------------


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU, side: int = 8, scale: int = 1) -> nn.Sequential:
    """A network of dense layers."""
    sizes = [scale * side * side, *widths]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), act())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], 10))


def cnn(
    width: int = 16,
    act: Callable[[], nn.Module] = nn.ReLU,
    norm: bool = False,
    pool: type[nn.Module] = nn.MaxPool2d,
    channels: int = 1,
    before_last: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """A network of two convolutions; any even side of the images from 8 to 12."""
    layers: list[nn.Module] = []
    for a, b in ((channels, width), (width, 2 * width)):
        layers += [nn.Conv2d(a, b, 3, padding=1), *([nn.BatchNorm2d(b)] if norm else []), act()]
        layers += [pool(2)]
    last = [before_last()] if before_last else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *last, nn.Linear(8 * width, 10))


def resnet(width: int = 16, norm: bool = True) -> nn.Sequential:
    """Two residual blocks."""

    def block() -> nn.Module:
        norms = [nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(2)]
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        return Residual(convs[0], norms[0], nn.ReLU(), convs[1], norms[1])

    stem, head = nn.Conv2d(1, width, 3, padding=1), nn.Linear(4 * width, 10)
    return nn.Sequential(
        stem, nn.ReLU(), block(), nn.ReLU(), nn.MaxPool2d(2), block(), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), head
    )


def chain(*parts: nn.Module | Function) -> nn.Sequential:
    """Modules and functions, one after the other."""
    return nn.Sequential(*(part if isinstance(part, nn.Module) else Apply(part) for part in parts))


def lipschitz(width: int = 64) -> nn.Module:
    """A network whose layers have spectral norm 1, scaled at its end."""
    normed = [nn.utils.parametrizations.spectral_norm(nn.Linear(a, b)) for a, b in ((64, width), (width, width))]
    return chain(nn.Flatten(), normed[0], nn.ReLU(), normed[1], nn.ReLU(), nn.Linear(width, 10), lambda z: 5 * z)


def weight_normed() -> nn.Module:
    """Dense layers with weight normalisation."""
    normed = [nn.utils.parametrizations.weight_norm(nn.Linear(a, b)) for a, b in ((64, 64), (64, 64))]
    return nn.Sequential(nn.Flatten(), normed[0], nn.Tanh(), normed[1], nn.Tanh(), nn.Linear(64, 10))


def random_features() -> nn.Module:
    """Random features, of which only the last layer is trained."""
    net = mlp(512)
    net[1].requires_grad_(False)
    return net


def dropped(net: nn.Module) -> nn.Module:
    """The network in eval mode with its dropout left on."""
    net.eval()
    for module in net.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.train()
    return net


def ito_ensemble(omega: float, members: int = 1) -> nn.Module:
    """Itô networks that vote."""
    nets = [ito.recast(ito.load_resnet("resnet8", in_channels=1), omega, image_shape=(1, 8, 8)) for _ in range(members)]
    return ito.ItoEnsemble(nets)


# --- functions without a useful gradient ----------------------------------------------------------------------

_SINES = torch.tensor([[math.cos(math.pi * (2 * i + 1) * k / 16) for i in range(8)] for k in range(8)])
_DCT = _SINES * torch.tensor([math.sqrt(1 / 8)] + [0.5] * 7)[:, None]  # orthonormal


def quantised(levels: int) -> Function:
    return lambda x: (x * (levels - 1)).round() / (levels - 1)


def jpeg(step: float) -> Function:
    """An image's cosine transform, rounded to multiples of ``step``, coarser for high frequencies."""

    def function(x: Tensor) -> Tensor:
        dct = _DCT.to(x)
        steps = step * (1 + 0.3 * (torch.arange(8)[:, None] + torch.arange(8))).to(x)
        return dct.T @ ((dct @ x @ dct.T / steps).round() * steps) @ dct

    return function


def thermometer(levels: int) -> tuple[Function, Function]:
    """Hard and soft thermometer codes ``(N, 1, 8, 8) -> (N, levels, 8, 8)`` (Buckman et al. 2018)."""

    def bars(x: Tensor) -> Tensor:
        return (torch.arange(levels).to(x) + 0.5)[:, None, None] / levels

    return lambda x: (x > bars(x)).to(x) + 0 * x, lambda x: (8 * (x - bars(x))).sigmoid()


def dithered(levels: int) -> Function:
    """Rounded up or down by chance, so that the mean is the image."""
    return lambda x: torch.floor(x * levels + torch.rand_like(x)) / levels


def one_hot_and_slope(size: float, slope: float) -> Function:
    """A large number for the class that wins, and logits that hardly tell."""
    return lambda z: size * F.one_hot(z.argmax(1), 10).to(z) + slope * z.roll(1, 1)


def underflow(temperature: float) -> Function:
    """The logarithm of a softmax that is 0 or 1 in float32."""
    return lambda z: (temperature * z).softmax(1).clamp_min(1e-30).log()


def with_nan(x: Tensor) -> Tensor:
    """The image; its gradient is not a number."""
    return x + 0 * (x - x.detach()).sqrt()


def times_noise(h: Tensor) -> Tensor:
    """Features times normal noise of mean 1."""
    return h * (1 + 0.5 * torch.randn_like(h))


def loud_scale(z: Tensor) -> Tensor:
    """Logits times a number that is drawn at every call, from 1 to 10,000: the decision is the same."""
    return z * 10 ** (4 * torch.rand(len(z), 1).to(z))


def turned(x: Tensor) -> Tensor:
    """The image turned by chance, by indexing."""
    return Shift(25)(x)


def without_peak(g: Tensor) -> Tensor:
    """1 at every pixel, and 0 where the gradient is largest."""
    return (g.abs() < g.abs().amax((1, 2, 3), keepdim=True)).to(g)


def random_sign(g: Tensor) -> Tensor:
    """The gradient or its opposite, by chance for each image."""
    return g * torch.sign(torch.rand(len(g), 1, 1, 1) - 0.5)


def shuffled(seed: int) -> Function:
    """A gradient whose pixels have changed places, always the same way."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    return lambda g: g.flatten(1)[:, order].view_as(g)


# --- the zoo --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specimen:
    """One model of the zoo.

    Attributes:
        name: what it is.
        masked: whether its gradients mislead.
        randomised: whether two answers to one image differ.
        build: makes it, untrained.
        training: settings of `fit`.
    """

    name: str
    masked: bool
    randomised: bool
    build: Callable[[], nn.Module]
    training: dict[str, Any] = field(default_factory=dict)


SOUND: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "mlp 32": (lambda: mlp(32), {}),
    "mlp 128": (lambda: mlp(128), {}),
    "mlp 64 64 64": (lambda: mlp(64, 64, 64), {}),
    "cnn 8": (lambda: cnn(8), {}),
    "cnn 32": (lambda: cnn(32), {}),
    "cnn, BatchNorm": (lambda: cnn(16, norm=True), {}),
    "residual": (lambda: resnet(16, norm=False), {}),
    "residual, BatchNorm": (lambda: resnet(16), {}),
    "tanh": (lambda: mlp(64, 64, act=nn.Tanh), {}),
    "softplus": (lambda: mlp(64, act=nn.Softplus), {}),
    "gelu cnn, average pooling": (lambda: cnn(16, nn.GELU, pool=nn.AvgPool2d), {}),
    "maxout": (lambda: chain(nn.Flatten(), nn.Linear(64, 128), MaxOut(), nn.Linear(32, 10)), {}),
    "linear": (lambda: mlp(), {}),
    "attention": (lambda: Attention(), {"steps": 600}),
    "weight decay": (lambda: mlp(128), {"decay": 0.3}),
    "label smoothing": (lambda: cnn(16), {"smoothing": 0.2}),
    "trained long": (lambda: mlp(128), {"steps": 3000}),
    "Lipschitz": (lambda: lipschitz(), {"steps": 600}),
    "weight norm": (lambda: weight_normed(), {}),
    "random features": (lambda: random_features(), {"steps": 600}),
    "median filter": (lambda: chain(MedianFilter(), cnn(16)), {"steps": 500}),
    "blurred": (lambda: chain(nn.AvgPool2d(3, 1, 1), cnn(16)), {}),
    "ensemble of mlps": (lambda: Mean([mlp(64) for _ in range(5)]), {}),
    "ensemble, probabilities": (lambda: Mean([cnn(8) for _ in range(3)], probabilities=True), {}),
    "ensemble, other kinds": (lambda: Mean([mlp(64, act=nn.Tanh), cnn(16), mlp()]), {}),
    "adversarial 0.05": (lambda: cnn(16), {"adversarial": 0.05}),
    "adversarial 0.1": (lambda: mlp(128), {"adversarial": 0.1}),
    "adversarial, L2 0.8": (lambda: mlp(128), {"adversarial": 0.8, "norm": "l2"}),
    "Itô, omega 0": (lambda: ito_ensemble(0.0), {"steps": 200}),
}
SOUND_RANDOM: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "noise 0.05": (lambda: chain(Normal(0.05), mlp(64)), {}),
    "noise 0.1": (lambda: chain(Normal(0.1), cnn(16)), {}),
    "noise 0.25": (lambda: chain(Normal(0.25), cnn(16)), {"steps": 600}),
    "noise 0.25, untrained with it": (lambda: chain(Normal(0.15), mlp(128)), {"quiet": True}),
    "noise 0.1, adversarial": (lambda: chain(Normal(0.1), mlp(128)), {"adversarial": 0.1}),
    "uniform noise": (lambda: chain(lambda x: x + 0.4 * (torch.rand_like(x) - 0.5), mlp(128)), {}),
    "noise in features": (
        lambda: chain(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), Normal(0.5), nn.Linear(64, 10)),
        {},
    ),
    "noise times features": (
        lambda: chain(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), times_noise, nn.Linear(64, 10)),
        {},
    ),
    "dropout 0.2": (lambda: chain(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)), {}),
    "dropout 0.5": (lambda: cnn(16, norm=True, before_last=lambda: nn.Dropout(0.5)), {"steps": 600}),
    "dropout of pixels": (lambda: chain(nn.Dropout(0.2), mlp(128)), {"steps": 600}),
    "resize and pad": (lambda: chain(ResizePad(8, 10), cnn(16)), {"steps": 600}),
    "resize and pad, wide": (lambda: chain(ResizePad(6, 10), cnn(16, norm=True)), {"steps": 800}),
    "random shift": (lambda: chain(Shift(), cnn(16)), {"steps": 600}),
    "random rotation": (lambda: chain(Shift(20), cnn(16)), {"steps": 600}),
    "one of three nets": (lambda: OneOf([mlp(64), mlp(32), cnn(8)]), {"steps": 900}),
    "noise from numpy": (lambda: chain(Normal(0.1, "numpy"), mlp(64)), {}),
    "noise, probabilities": (lambda: chain(Normal(0.1), mlp(64), lambda z: z.log_softmax(1)), {}),
    "Itô, omega 0.2": (lambda: ito_ensemble(0.2), {"steps": 200}),
    "Itô, omega 0.6, 3 members": (lambda: ito_ensemble(0.6, 3), {"steps": 150}),
    "Itô, omega 1.5": (lambda: ito_ensemble(1.5), {"steps": 250}),
}
_CODE = thermometer(10)
MASKED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "6 levels": (lambda: chain(Hard(quantised(6)), cnn(16)), {}),
    "4 levels, a leak of noise": (
        lambda: chain(Hard(quantised(4), leak=lambda x: 0.05 * x.flip(2, 3)), mlp(128)), {},
    ),
    "black and white": (lambda: chain(Hard(quantised(2)), cnn(16)), {}),
    "JPEG": (lambda: chain(Hard(jpeg(0.3)), cnn(16)), {}),
    "JPEG, leaky": (lambda: chain(Hard(jpeg(0.3), leak=lambda x: 0.05 * x.roll(2, 3)), mlp(128)), {}),
    "thermometer": (lambda: chain(Hard(*_CODE), cnn(16, channels=10)), {"steps": 500}),
    "k-WTA": (lambda: cnn(16, act=lambda: Winners(0.1)), {"steps": 600}),
    "k-WTA mlp": (lambda: mlp(256, 256, act=lambda: Winners(0.05)), {"steps": 600}),
    "steep sigmoids": (lambda: mlp(128, act=lambda: Steep(200)), {"steps": 600}),
    "steep sigmoids, two layers": (lambda: mlp(128, 64, act=lambda: Steep(100)), {"steps": 800}),
    "staircase activations": (
        lambda: mlp(128, act=lambda: Hard(lambda h: h.clamp(0, 3).round(), lambda h: h.clamp(0, 3))), {"steps": 500},
    ),
    "sign activations": (
        lambda: mlp(256, act=lambda: Hard(lambda h: h.sign(), lambda h: h.tanh())), {"steps": 600},
    ),
    "logits x 1e4": (lambda: chain(mlp(128), After(lambda z: 1e4 * z)), {}),
    "logits x 1e3, cnn": (lambda: chain(cnn(16), After(lambda z: 1e3 * z)), {}),
    "underflow": (lambda: chain(cnn(16), After(underflow(100.0))), {}),
    "one-hot and slope": (lambda: chain(mlp(128), After(one_hot_and_slope(100, 0.1))), {}),
    "detached": (lambda: Detached(cnn(16), mlp(32), 1e-2), {}),
    "detached features": (
        lambda: chain(
            nn.Flatten(),
            Detached(chain(nn.Linear(64, 128), nn.ReLU()), nn.Linear(64, 128), 0.02),
            nn.Linear(128, 10),
        ),
        {},
    ),
    "wrong sign": (lambda: chain(Backward(lambda g: -g), cnn(16)), {}),
    "shuffled gradient": (lambda: chain(Backward(shuffled(3)), mlp(128)), {}),
    "gradient without its peak": (
        lambda: chain(Backward(without_peak), cnn(16)), {},
    ),
    "ripple": (lambda: chain(Ripple(0.01, 3000.0), cnn(16)), {}),
    "ripple of features": (
        lambda: chain(nn.Flatten(), nn.Linear(64, 64), Ripple(0.05, 800.0), nn.ReLU(), nn.Linear(64, 10)), {},
    ),
    "not a number": (lambda: chain(Hard(with_nan), mlp(128)), {}),
    "nearest neighbours": (lambda: Prototypes(), {"steps": 0}),
    "drowned": (lambda: chain(Drowned(200.0), cnn(16)), {}),
    "median, then 5 levels": (lambda: chain(MedianFilter(), Hard(quantised(5)), cnn(16)), {"steps": 500}),
}  # fmt: skip
MASKED_RANDOM: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "noise, 4 levels": (lambda: chain(Normal(0.1), Hard(quantised(4)), cnn(16)), {"steps": 500}),
    "noise, 3 levels, leaky": (
        lambda: chain(Normal(0.1), Hard(quantised(3), leak=lambda x: 0.05 * x.flip(3)), mlp(128)), {"steps": 500},
    ),
    "noise, JPEG": (lambda: chain(Normal(0.1), Hard(jpeg(0.3)), cnn(16)), {"steps": 500}),
    "noise, k-WTA": (lambda: chain(Normal(0.05), cnn(16, act=lambda: Winners(0.08))), {"steps": 700}),
    "noise, steep sigmoids": (lambda: chain(Normal(0.1), mlp(128, act=lambda: Steep(300))), {"steps": 700}),
    "noise, steep sigmoids, two layers": (
        lambda: chain(Normal(0.03), mlp(128, 64, act=lambda: Steep(100))),
        {"steps": 800},
    ),
    "noise, one-hot and slope": (lambda: chain(Normal(0.1), mlp(128), After(one_hot_and_slope(50, 0.1))), {}),
    "noise, thermometer": (lambda: chain(Normal(0.1), Hard(*_CODE), cnn(16, channels=10)), {"steps": 600}),
    "noise, black and white": (lambda: chain(Normal(0.15), Hard(quantised(2)), mlp(128)), {"steps": 600}),
    "noise, sign activations": (
        lambda: chain(Normal(0.1), mlp(256, act=lambda: Hard(lambda h: h.sign(), lambda h: h.tanh()))), {"steps": 700},
    ),
    "noise, logits x 1e4": (lambda: chain(Normal(0.02), mlp(128), After(lambda z: 1e4 * z)), {}),
    "noise, underflow": (lambda: chain(Normal(0.05), cnn(16), After(underflow(200.0))), {}),
    "noise, detached": (lambda: chain(Normal(0.1), Detached(cnn(16), mlp(32), 1e-2)), {}),
    "noise, wrong sign": (lambda: chain(Normal(0.1), Backward(lambda g: -g), mlp(128)), {}),
    "noise, shuffled gradient": (lambda: chain(Normal(0.05), Backward(shuffled(5)), cnn(16)), {}),
    "noise, ripple": (lambda: chain(Normal(0.05), Ripple(0.01, 3000.0), cnn(16)), {}),
    "numpy noise, 4 levels": (lambda: chain(Normal(0.1, "numpy"), Hard(quantised(4)), mlp(128)), {"steps": 500}),
    "own noise, steep sigmoids": (
        lambda: chain(Normal(0.1, "own"), mlp(128, act=lambda: Steep(200))), {"steps": 600},
    ),
    "random's noise, JPEG": (lambda: chain(Normal(0.05, "random"), Hard(jpeg(0.3)), mlp(64)), {"steps": 400}),
    "dithered, 3 levels": (lambda: chain(Hard(dithered(3)), cnn(16)), {"steps": 600}),
    "stochastic gates": (
        lambda: chain(nn.Flatten(), nn.Linear(64, 128), Gate(2.0), nn.Linear(128, 10)), {"steps": 700},
    ),
    "stochastic gates of features": (
        lambda: chain(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), Gate(1.0, keep=True), Hard(torch.round), nn.Linear(128, 10)
        ),
        {"steps": 700},
    ),
    "pruned, detached": (
        lambda: chain(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            Pruned(0.5, 0.05),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 10),
        ),
        {"steps": 600},
    ),
    "turned without a gradient": (
        lambda: chain(Hard(turned, leak=lambda x: 0.1 * x.transpose(2, 3)), cnn(16)), {"steps": 700},
    ),
    "noise, drowned": (lambda: chain(Normal(0.05), Drowned(200.0), mlp(128)), {}),
    "random sign": (
        lambda: chain(Backward(random_sign), Normal(0.02), mlp(128)), {},
    ),
    "one of three quantised nets": (
        lambda: OneOf([chain(Hard(quantised(k)), net) for k, net in ((3, mlp(64)), (4, cnn(16)), (5, mlp(128)))]),
        {"steps": 1000},
    ),
    "dropout, logits x 1e4": (
        lambda: chain(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10), After(lambda z: 1e4 * z)
        ),
        {},
    ),
    "dropout, 4 levels": (
        lambda: chain(
            Hard(quantised(4)), nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
        ),
        {"steps": 500},
    ),
    "loud scale": (lambda: chain(Normal(0.05), cnn(16), After(lambda z: 100 * loud_scale(z))), {}),
    "resize and pad, 4 levels": (lambda: chain(ResizePad(8, 10), Hard(quantised(4)), cnn(16)), {"steps": 800}),
    "noise, nearest neighbours": (lambda: chain(Normal(0.1), Prototypes()), {"steps": 0}),
}  # fmt: skip

ZOO: dict[str, Specimen] = {
    name: Specimen(name, masked, randomised, build, training)
    for masked, randomised, group in (
        (False, False, SOUND), (False, True, SOUND_RANDOM), (True, False, MASKED), (True, True, MASKED_RANDOM)
    )
    for name, (build, training) in group.items()
}  # fmt: skip


# --- training -------------------------------------------------------------------------------------------------


def digits(part: str = "test") -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 8, 8)`` in [0, 1] and labels ``(N,)``: ``train`` or ``test``."""
    split = getattr(ito.load_data("digits", augment="none"), part)
    return split.pixels.float() / 255, split.labels


def fit(
    model: nn.Module,
    steps: int = 300,
    lr: float = 3e-3,
    decay: float = 0.0,
    smoothing: float = 0.0,
    adversarial: float = 0.0,
    norm: str = "linf",
    quiet: bool = False,
) -> None:
    """Train a model on digits.

    Args:
        model: in train mode afterwards.
        steps: of Adam, 128 images each.
        lr, decay: learning rate and decoupled weight decay.
        smoothing: of the labels.
        adversarial, norm: radius of the PGD images (5 steps) that are trained on; 0: clean images.
        quiet: whether layers of noise are left out in training.
    """
    x, y = digits("train")
    for module in model.modules():
        if isinstance(module, Prototypes):
            module.learn(x, y)
    noises = [(m, m.sigma) for m in model.modules() if isinstance(m, Normal)] if quiet else []
    for noise, _ in noises:
        noise.sigma = 0.0
    weights = [p for p in model.parameters() if p.requires_grad]
    if steps and weights:
        optimizer = torch.optim.AdamW(weights, lr, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * lr, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (128,))
            images, labels = x[rows], y[rows]
            if adversarial:
                images = _adversarial(model, images, labels, adversarial, norm)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels, label_smoothing=smoothing).backward()
            optimizer.step()
            schedule.step()
    for noise, sigma in noises:
        noise.sigma = sigma


def _adversarial(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str) -> Tensor:
    ball = ito.attacks.BALLS[norm]
    moved = x
    for _ in range(5):
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
        moved = ball.project(moved.detach() + eps / 2.5 * ball.steepest(gradient), x, eps).clamp(0, 1)
    return moved


def load(specimen: Specimen, cache: Path | None = None) -> nn.Module:
    """The trained model, in eval mode with its dropout on; trained first where ``cache`` does not have its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(specimen.name.encode()))
        model = specimen.build()
        file = cache / f"{zlib.crc32(specimen.name.encode()):08x}.pt" if cache else None
        if file and file.exists():
            model.load_state_dict(torch.load(file))
        else:
            teacher = honest(model)
            if isinstance(teacher, ito.ItoEnsemble):
                for member in teacher.members:
                    fit(member.train(), **specimen.training)
            else:
                fit(teacher.train(), **specimen.training)
            model.load_state_dict(teacher.state_dict())
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), file)
    return dropped(model)
