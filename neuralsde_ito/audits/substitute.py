"""A small network that an audit fits to the answers of a model, so that an attack can take its gradients.

A masked model answers much like a plain one; only its gradients are hidden. Adversarial images of a network that gives
the same answers often fool the model too (Papernot et al. 2017, https://arxiv.org/abs/1602.02697).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attacks.norms import BALLS
from ..noise.keys import make_keys

_STEPS, _BATCH = 120, 128  # of one round of training


class Substitute(nn.Module):
    """Two small networks, a dense and a convolutional one, whose log probabilities are averaged."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 16) -> None:
        super().__init__()
        channels, height, width_of_image = shape
        strides = [1 if max(height, width_of_image) <= 16 else 2, 2, 2]
        layers: list[nn.Module] = []
        for stride, out in zip(strides, (width, 2 * width, 2 * width), strict=True):
            layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.GELU()]
            channels = out
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes)]
        self.convolutional = nn.Sequential(*layers)
        size = shape[0] * height * width_of_image
        self.dense = nn.Sequential(nn.Flatten(), nn.Linear(size, 4 * width), nn.GELU(), nn.Linear(4 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        x = x - 0.5
        return (self.convolutional(x).log_softmax(1) + self.dense(x).log_softmax(1)) / 2


def fit_substitute(
    answers: Callable[[Tensor], Tensor],
    x: Tensor,
    norm: str,
    eps: float,
    seed: int,
    rounds: int = 3,
    copies: int = 8,
) -> Substitute:
    """Fit a substitute to a model around some images.

    The first round learns the answers at the images, at random points around them and on the way from an image to
    others. Each further round adds points of attacks on the substitute.

    Args:
        answers: from images ``(K, C, H, W)`` to the model's mean probabilities or shares of votes, ``(K, classes)``.
        x: images ``(N, C, H, W)``.
        norm, eps: the ball.
        seed: of points, weights and batches.
        rounds: of questions to the model, each followed by training.
        copies: points around an image that a round asks about.
    """
    ball = BALLS[norm]
    generator = torch.Generator().manual_seed(seed)
    clean = answers(x)
    classes = clean.shape[1]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the same weights on all devices
        torch.default_generator.manual_seed(seed)
        network = Substitute((x.shape[1], x.shape[2], x.shape[3]), classes).to(x)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    points, targets = [x], [clean]

    def ask(images: Tensor) -> None:
        points.append(images)
        targets.append(answers(images))

    for round_ in range(rounds):
        rows = torch.arange(len(x), device=x.device).repeat(copies)
        if round_ == 0:
            keys = make_keys(seed, "gradient", -5, torch.arange(len(rows), device=x.device))
            ask(ball.start(x[rows], 2 * eps, keys).clamp(0, 1))
            others = torch.randperm(len(rows), generator=generator, device="cpu").to(x.device)
            share = (0.6 * torch.rand(len(rows), 1, 1, 1, generator=generator, device="cpu")).to(x)
            ask(torch.lerp(x[rows], x[rows][others], share))
        else:
            ask(_steps_on(network, x, clean, norm, eps))
        _train(network, optimizer, torch.cat(points), torch.cat(targets), generator)
    return network.eval().requires_grad_(False)


def _steps_on(network: nn.Module, x: Tensor, clean: Tensor, norm: str, eps: float) -> Tensor:
    """Iterates of an attack on the substitute: away from the answer, and towards every likely other class."""
    ball, images = BALLS[norm], []
    right = clean.argmax(1)
    wrong = network(x).detach().scatter(1, right[:, None], -torch.inf)
    for aim in (None, 1, 2):
        target = right if aim is None else wrong.topk(aim, 1).indices[:, -1]
        z = x
        for step in range(6):
            z = z.detach().requires_grad_()
            loss = F.cross_entropy(network(z), target, reduction="sum")
            (gradient,) = torch.autograd.grad(loss if aim is None else -loss, z)
            z = ball.project(z + 0.35 * eps * ball.steepest(gradient, z), x, 1.2 * eps).clamp(0, 1)
            if step in (1, 3, 5):
                images.append(z.detach())
    return torch.cat(images)


def _train(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, p: Tensor, generator: torch.Generator
) -> None:
    """Steps of Adam on the cross-entropy between the model's answers and those of each part of the substitute."""
    with torch.enable_grad():
        for _ in range(_STEPS):
            rows = torch.randint(len(x), (_BATCH,), generator=generator, device="cpu").to(x.device)
            images, target = x[rows] - 0.5, p[rows]
            loss = sum(-(target * part(images).log_softmax(1)).sum(1).mean() for part in network.children())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
