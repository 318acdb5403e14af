"""One residual block ``B`` as a torchsde module: ``dx = (B(x) - x) dt + g(t, x) dW`` (paper, section 3).

The diffusion ``g`` is ``sigma(t)``, or ``sigma(t) x`` for multiplicative noise; see `Schedule`.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ..validation import ItoError, one_of
from .schedules import Schedule


class BlockSDE(nn.Module):
    """Block ``i`` of a residual network as an Itô SDE with diagonal noise on ``[t0, t1]``.

    - A block that keeps the shape drifts towards its output: ``f(t, x) = (B(x) - x) / (t1 - t0)``. The paper's
      blocks have length 1; with another length time is rescaled, and the noise-free result stays the same.
      ``B`` holds the ReLU after the addition, so the drift is ``B(x) - x``, not the residual branch.
    - A block that changes the shape (``jump``) moves the state to ``B(x)`` at ``t0`` and then only diffuses:
      ``f = 0``.

    It follows torchsde's protocol on flat states ``(N, D)``, so ``torchsde.sdeint(sde, y0, ts)`` works on it.
    For a jump block ``y0`` is the state after the jump. For states of another ``shape`` take ``view("ito", shape)``.

    Args:
        block: the module ``B``, on states of any shape ``(N, ...)``.
        schedule: the diffusion.
        index: the block's number in the network, from 0; part of the noise's address.
        t0, t1: its interval of time.
        shape: of one state without the batch, ``(C, H, W)``; after the jump, if there is one.
        jump: whether the block changes the shape.
    """

    block: nn.Module
    noise_type = "diagonal"
    sde_type = "ito"
    overwrite_output = False  # whether a solver may write into what the block returns; set in the quick copies only

    def __init__(
        self,
        block: nn.Module,
        schedule: Schedule,
        index: int = 0,
        t0: float = 0.0,
        t1: float = 1.0,
        shape: tuple[int, ...] = (),
        jump: bool = False,
    ) -> None:
        super().__init__()
        self.block, self.schedule = block, schedule
        self.index, self.t0, self.t1 = index, t0, t1
        self.shape, self.jump = tuple(shape), jump

    def extra_repr(self) -> str:
        """The block's number, interval and noise, for ``print(model)``."""
        kind = "jump, then diffusion" if self.jump else "drift and diffusion"
        return f"{self.index}: [{self.t0:g}, {self.t1:g}], {kind}, {self.schedule}"

    def f(self, t: float | Tensor, y: Tensor) -> Tensor:
        """Drift ``(N, D) -> (N, D)``; it does not depend on ``t`` inside the block."""
        return self.drift(y, self.shape)

    def drift(self, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`f` for flat states of any ``shape``: ``(N, D) -> (N, D)``.

        Raises:
            ItoError: ``D`` is not the number of elements of ``shape``.
        """
        if self.jump:
            return torch.zeros_like(y)
        if math.prod(y.shape[1:]) != math.prod(shape):
            raise ItoError(
                f"The states have {math.prod(y.shape[1:])} elements, and block {self.index} expects {tuple(shape)}; "
                'for images of another size take sde.view("ito", shape).'
            )
        x = y.reshape(y.shape[0], *shape)  # (N, D) -> (N, C, H, W)
        return rearrange(self.block(x) - x, "n ... -> n (...)") / (self.t1 - self.t0)

    def g(self, t: float | Tensor, y: Tensor) -> Tensor:
        """Diagonal of the diffusion ``(N, D) -> (N, D)``."""
        return self.schedule.g(t, y)

    def view(self, form: str, shape: tuple[int, ...] | None = None) -> nn.Module:
        """The same SDE in the form that another solver needs, or for states of another shape.

        Args:
            form: ``"ito"`` (the SDE as it is), ``"additive"`` (noise that does not depend on the state; with it
                torchsde's SRK is the cheap SRA1) or ``"stratonovich"`` (for multiplicative noise the drift minus
                ``sigma(t)^2 x / 2``).
            shape: of one state without the batch; default `shape`. The view keeps it and the block does not change,
                so several threads may solve one block for images of different sizes.

        Raises:
            ItoError: unknown form, or ``"additive"`` for multiplicative noise.
        """
        one_of("form", form, _VIEWS)
        if form == "additive" and self.schedule.multiplicative:
            raise ItoError(f"Schedule {self.schedule.name!r} is multiplicative: it has no additive view.")
        return _VIEWS[form](self, self.shape if shape is None else tuple(shape))


class _View(nn.Module):
    """A `BlockSDE` for states of another shape: what all forms have in common."""

    sde_type = "ito"

    def __init__(self, sde: BlockSDE, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.sde, self.shape = sde, shape

    def f(self, t: float | Tensor, y: Tensor) -> Tensor:
        """Drift ``(N, D) -> (N, D)``."""
        return self.sde.drift(y, self.shape)


class ItoView(_View):
    """The SDE as it is."""

    noise_type = "diagonal"

    def g(self, t: float | Tensor, y: Tensor) -> Tensor:
        """Diagonal of the diffusion ``(N, D) -> (N, D)``."""
        return self.sde.g(t, y)


class AdditiveView(_View):
    """torchsde's ``additive`` noise without its dense ``(D, D)`` matrix: only the product ``g dW`` is given."""

    noise_type = "additive"

    def g_prod(self, t: float | Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times ``v``: ``(N, D), (N, D) -> (N, D)``."""
        return self.sde.g(t, y) * v


class StratonovichView(ItoView):
    """The Stratonovich form: ``f - (1/2) g g'``, which for ``g = sigma x`` is ``f - sigma^2 x / 2``."""

    sde_type = "stratonovich"

    def f(self, t: float | Tensor, y: Tensor) -> Tensor:
        """Corrected drift ``(N, D) -> (N, D)``."""
        drift = super().f(t, y)
        schedule = self.sde.schedule
        return drift - 0.5 * schedule.sigma(float(t)) ** 2 * y if schedule.multiplicative else drift


_VIEWS: dict[str, type[_View]] = {
    "ito": ItoView,
    "additive": AdditiveView,
    "stratonovich": StratonovichView,
}
