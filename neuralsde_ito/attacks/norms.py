"""Norm balls: an attack needs of a norm a random start, the steepest direction, a projection and a length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..noise.normals import normals

Radius = float | Tensor  # of all balls, or of each, (N, 1, 1, 1)


class Linf:
    """The change of every pixel is at most ``eps``, in pixel units (images are in [0, 1])."""

    def start(self, x: Tensor, eps: float, keys: Tensor) -> Tensor:
        """A uniform point of the ball around each image, ``(N, ...) -> (N, ...)``, by the image's key ``(N,)``."""
        uniform = torch.special.ndtr(normals(keys, x[0].numel(), dtype=x.dtype)).view(x.shape)
        return x + eps * (2 * uniform - 1)

    def steepest(self, gradient: Tensor, at: Tensor | None = None) -> Tensor:
        """The direction of length 1 in which the loss rises fastest from the images ``at``, both ``(N, ...)``."""
        return gradient.sign()

    def project(self, x: Tensor, origin: Tensor, eps: Radius) -> Tensor:
        """The nearest point of the ball around ``origin``, all ``(N, ...)``."""
        if isinstance(eps, Tensor):  # the same by another signature: type checkers know no union of both
            return origin + (x - origin).clamp(-eps, eps)
        return origin + (x - origin).clamp(-eps, eps)

    def length(self, delta: Tensor) -> Tensor:
        """The norm of every perturbation, ``(N, ...) -> (N,)``."""
        return delta.flatten(1).abs().amax(1)

    def diameter(self, size: int) -> float:
        """The norm of a change of 1 in each of ``size`` pixels: with this radius a ball holds every image."""
        return 1.0


class L2:
    """The Euclidean length of the whole perturbation is at most ``eps``, in pixel units."""

    def start(self, x: Tensor, eps: float, keys: Tensor) -> Tensor:
        """As `Linf.start`: a uniform direction, and a radius whose ``d``-th power is uniform (of ``d`` pixels)."""
        size = x[0].numel()
        draws = normals(keys, size + 1, dtype=x.dtype)
        radius = torch.special.ndtr(draws[:, -1:]).pow(1 / size)
        return x + (eps * radius * self._unit(draws[:, :-1])).view(x.shape)

    def steepest(self, gradient: Tensor, at: Tensor | None = None) -> Tensor:
        """The gradient of every image, scaled to length 1; a zero gradient stays zero."""
        return self._unit(gradient.flatten(1)).view(gradient.shape)

    @staticmethod
    def _unit(v: Tensor) -> Tensor:
        # Divide by the largest entry first: the squares of a tiny gradient (confident logits) would underflow, and
        # the usual floor of 1e-12 would then shorten the step.
        largest = v.abs().amax(1, keepdim=True)
        v = v / largest.where(largest > 0, torch.ones_like(largest))
        return v / v.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def project(self, x: Tensor, origin: Tensor, eps: Radius) -> Tensor:
        """The nearest point of the ball around ``origin``, all ``(N, ...)``."""
        delta = (x - origin).flatten(1)
        eps = eps.flatten(1) if isinstance(eps, Tensor) else eps
        shrink = (eps / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
        return origin + (delta * shrink).view(x.shape)

    def length(self, delta: Tensor) -> Tensor:
        """The norm of every perturbation, ``(N, ...) -> (N,)``."""
        return delta.flatten(1).norm(dim=1)

    def diameter(self, size: int) -> float:
        """As `Linf.diameter`."""
        return math.sqrt(size)


class L1:
    """The changes of all pixels add up to at most ``eps``, in pixel units.

    Unlike the other balls this one is projected onto together with the box [0, 1]: where few pixels change by much, a
    point that is clipped afterwards lies far inside the ball (Croce and Hein 2021, https://arxiv.org/abs/2103.01208).
    """

    # Of the pixels, at least one, that one step changes. Digits, 100 images, eps 1, PGD and APGD leave 50 and 47 with a
    # pixel, 56 and 49 with 5 %, 83 and 74 with 20 %; CIFAR-10, 45 images, eps 2: 3 and 2 with 1 %, 8 with 5 %.
    share = 0.01

    def start(self, x: Tensor, eps: float, keys: Tensor) -> Tensor:
        """As `Linf.start`: exponential numbers with random signs, divided by their sum and one number more."""
        size = x[0].numel()
        draws = normals(keys, size + 1, dtype=x.dtype)
        lengths = -torch.special.log_ndtr(-draws.abs()) - math.log(2)  # exponential, by the size of a normal
        delta = lengths[:, :-1] * draws[:, :-1].sign() / lengths.sum(1, keepdim=True)
        return x + (eps * delta).view(x.shape)

    def steepest(self, gradient: Tensor, at: Tensor | None = None) -> Tensor:
        """The signs of the largest entries, scaled to length 1; a zero gradient stays zero.

        A step along the largest entry alone would change one pixel. A pixel that would leave [0, 1] does not count.
        """
        if at is not None:
            gradient = gradient.masked_fill((at <= 0) & (gradient < 0) | (at >= 1) & (gradient > 0), 0)
        flat = gradient.flatten(1)
        largest = flat.abs().topk(max(1, round(self.share * flat.shape[1])), 1).indices
        signs = flat.gather(1, largest).sign()
        signs = signs / signs.abs().sum(1, keepdim=True).clamp_min(1)
        return torch.zeros_like(flat).scatter_(1, largest, signs).view(gradient.shape)

    def project(self, x: Tensor, origin: Tensor, eps: Radius) -> Tensor:
        """The nearest point of the ball around ``origin`` that lies in [0, 1], all ``(N, ...)``.

        Each entry of the change shrinks by the same number ``t``, but not beyond 0, and is clipped at ``limit``. The
        length falls linearly in ``t`` between the numbers at which an entry ceases to be clipped, or becomes 0.
        """
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # which MPS does not have
        delta, base = (x - origin).flatten(1).to(wide), origin.flatten(1).to(wide)
        size, limit = delta.abs(), torch.where(delta > 0, 1 - base, base)
        eps = (eps.flatten(1) if isinstance(eps, Tensor) else eps) * (
            1 - 1e-6
        )  # for what rounding to the images' precision adds up to
        turns, order = torch.cat([size, size - limit], 1).sort(1, descending=True)
        slope = torch.where(order < size.shape[1], 1.0, -1.0).cumsum(1)  # below each turn: entries that still move
        gained = (slope[:, :-1] * (turns[:, :-1] - turns[:, 1:])).cumsum(1)
        length = torch.cat([torch.zeros_like(gained[:, :1]), gained], 1)  # at each turn
        last = (length <= eps).sum(1, keepdim=True) - 1  # the last turn at which the change is inside the ball
        slope, turn, length = (values.gather(1, last) for values in (slope, turns, length))
        t = (turn - (eps - length) / slope.clamp_min(1)).clamp_min(0)
        shrunk = torch.minimum((size - t).clamp_min(0), limit)
        return origin + (shrunk * delta.sign()).to(x.dtype).view(x.shape)

    def length(self, delta: Tensor) -> Tensor:
        """The norm of every perturbation, ``(N, ...) -> (N,)``."""
        return delta.flatten(1).abs().sum(1)

    def diameter(self, size: int) -> float:
        """As `Linf.diameter`."""
        return float(size)


BALLS: dict[str, Linf | L2 | L1] = {"linf": Linf(), "l2": L2(), "l1": L1()}
