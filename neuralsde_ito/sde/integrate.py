"""`integrate` takes a state through one block by a solver of the table in `solvers.py`.

Our own methods are the functions in `NATIVE`; Euler is the hot path. The other methods are torchsde's and
torchdiffeq's, on our Brownian path. They are called once a block, because the drift jumps to the next block's weights
at the block's end, and no step may cross that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torchsde
from einops import rearrange
from torch import Tensor, nn

from .. import kernels
from ..modules import mixes_images
from ..noise.brownian import BrownianPath
from ..validation import ItoError
from .block import BlockSDE
from .checkpointing import RecomputedBlock, draws_random_numbers
from .solvers import Solver, find_solver

# Elements of the state that are checkpointed at a time: on a CPU as many as its caches hold.
_CHECKPOINTED_ELEMENTS = {"cpu": 1 << 19}


def integrate(
    sde: BlockSDE, x: Tensor, keys: Tensor, solver: str = "euler", steps: int = 1, checkpoint: bool = False
) -> Tensor:
    """Take states through one block.

    Args:
        sde: the block.
        x: states ``(N, ...)`` at ``t0``, before the jump if the block has one.
        keys: int64 ``(N,)``, the names of the paths.
        solver: a name in `SOLVERS`.
        steps: solver steps in the block, a power of two.
        checkpoint: recompute in the backward pass instead of storing activations. The memory of the block is
            then that of one step and of a few states, for three to four times the forward evaluations. There is no
            second derivative then. The block must compute the same again: a block that draws random
            numbers is refused, and so is a backward pass after its weights or modes have changed.

    Returns:
        States at ``t1``. Their gradient is autograd's through every step as it was taken, never the
        adjoint's: with unit steps and block weights that has a relative error of 70 %.

    Raises:
        ItoError: unknown solver; with ``checkpoint`` also a block that cannot be repeated.
    """
    method = find_solver(solver)
    if not (checkpoint and torch.is_grad_enabled()):
        return BlockSteps(sde, keys, method, steps)(x, 0, steps)
    if not kernels.ordinary(x):
        raise ItoError(
            "Checkpointing does not go with forward-mode derivatives and the transforms of torch.func; "
            "use checkpoint=False."
        )
    if any(draws_random_numbers(module) for module in sde.block.modules()):
        raise ItoError(
            f"Block {sde.index} drops out at random, which checkpointing cannot repeat; use checkpoint=False."
        )
    parameters = [p for p in sde.block.parameters() if p.requires_grad]
    # Images that do not influence each other go slice by slice: transient memory shrinks with the slice.
    limit = _CHECKPOINTED_ELEMENTS.get(x.device.type, 1 << 27)
    slices = 1 if method.adaptive or mixes_images(sde.block) else math.ceil(x.numel() / limit)
    pairs = zip(x.tensor_split(min(slices, len(x))), keys.tensor_split(min(slices, len(x))), strict=True)
    parts = [RecomputedBlock.apply(BlockSteps(sde, k, method, steps), part, *parameters) for part, k in pairs]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def diffuse(
    sde: BlockSDE, x: Tensor, keys: Tensor, in_place: bool = False, relu: kernels.Rectifier | None = None
) -> Tensor:
    """The second half of an Euler step over a whole block with additive noise: from ``B(x)`` to ``B(x) + sigma W``.

    Many paths may share one ``B(x)``. With ``in_place`` the result may be written into ``x``. With ``relu``, only in
    place and without a gradient, ``x`` is what the block's last ReLU is yet to take.
    """
    sigma = sde.schedule.sigma(sde.t0)
    path = BrownianPath(keys, math.prod(x.shape[1:]), sde.index, sde.t0, sde.t1, dtype=x.dtype)
    if sigma:
        return path.add_to(x, sigma, in_place, relu)
    return x if relu is None else kernels.rectify_(x, relu)


class BlockSteps:
    """Any range of a block's steps, on one Brownian path."""

    def __init__(self, sde: BlockSDE, keys: Tensor, solver: Solver, steps: int) -> None:
        self.sde, self.keys, self.solver, self.steps = sde, keys, solver, steps
        self.path: BrownianPath | None = None

    def __call__(self, x: Tensor, first: int, last: int, only_slope: bool = False) -> Tensor:
        """Steps ``first`` to ``last``; the jump comes before step 0.

        With ``only_slope`` the noise is left out where it changes nothing in the derivative of a step.
        """
        sde, solver = self.sde, self.solver
        if sde.jump and first == 0:
            x = sde.block(x)
        if self.path is None:
            size = math.prod(x.shape[1:])
            self.path = BrownianPath(self.keys, size, sde.index, sde.t0, sde.t1, dtype=x.dtype)
        if solver.library == "torchsde":
            x = solve_torchsde(sde, self.path, solver, self.steps, x, first, last)
        elif solver.library == "torchdiffeq":
            x = _solve_torchdiffeq(sde, solver, self.steps, x, first, last)
        else:
            noise_free = only_slope and solver.slope_without_noise and not sde.schedule.multiplicative
            x = NATIVE[solver.method](sde, None if noise_free else self.path, self.steps, x, first, last)
        if last == self.steps:
            self.path.forget()  # the cells that it kept for the next step
        return x


def euler(sde: BlockSDE, path: BrownianPath | None, steps: int, x: Tensor, first: int, last: int) -> Tensor:
    """Euler-Maruyama, ``x + h f(x) + sigma W``, in a form in which one step without noise is the block, bit for bit.

    Without a ``path`` the noise is left out.
    """
    h = (sde.t1 - sde.t0) / steps
    for k in range(first, last):
        sigma = sde.schedule.sigma(sde.t0 + k * h)
        multiplicative = sde.schedule.multiplicative
        whole_block = steps == 1 and not multiplicative  # the hot path: never holds all the normals
        dw = path.increment(steps.bit_length() - 1, k).view(x.shape) if path and sigma and not whole_block else None
        y = x if sde.jump else sde.block(x)
        if steps > 1 and not sde.jump:
            y = torch.lerp(x, y, 1 / steps)  # x + h f(x)
        if dw is not None:
            y = torch.add(y, x * dw if multiplicative else dw, alpha=sigma)
        elif path and sigma:
            # A block may return its input, which belongs to the caller and must not be overwritten.
            own = sde.overwrite_output and (
                sde.jump or y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            )
            y = path.add_to(y, sigma, in_place=own)
        x = y
    return x


# Our own methods: (block, path, steps a block, states, first step, last step) -> states after the last step.
NATIVE: dict[str, Callable[[BlockSDE, BrownianPath | None, int, Tensor, int, int], Tensor]] = {"euler": euler}


class _WithoutShapeCheck(nn.Module):
    """A form of a block whose first drift is not computed.

    torchsde calls ``f`` once before the first step, only to see its shape. On a network that is a whole forward pass,
    and a second update of BatchNorm; here that call returns zeros.
    """

    def __init__(self, sde: Any) -> None:
        super().__init__()
        self.sde, self.checked = sde, False
        self.noise_type, self.sde_type = sde.noise_type, sde.sde_type
        self.random_state: Tensor | None = None
        if hasattr(sde, "g"):
            self.g = sde.g
        if hasattr(sde, "g_prod"):
            self.g_prod = self._diffusion_product

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        if not self.checked:
            self.checked = True
            self.random_state = torch.cuda.get_rng_state(y.device) if y.is_cuda else torch.get_rng_state()
            return torch.zeros_like(y)
        return self.sde.f(t, y)

    def _diffusion_product(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        if self.random_state is not None:  # torchsde has drawn a random vector, only to see the product's shape
            if y.is_cuda:
                torch.cuda.set_rng_state(self.random_state, y.device)
            else:
                torch.set_rng_state(self.random_state)
            self.random_state = None
        return self.sde.g_prod(t, y, v)


def solve_torchsde(
    sde: BlockSDE, path: torchsde.BaseBrownian, solver: Solver, steps: int, x: Tensor, first: int, last: int
) -> Tensor:
    """Steps ``first`` to ``last`` of a block by torchsde, on any path in its protocol."""
    form = "additive" if solver.additive_view and not sde.schedule.multiplicative else solver.form
    view = sde.view(form, tuple(x.shape[1:]))
    h = (sde.t1 - sde.t0) / steps
    # float64 times: in float32 their sum may miss the end, and torchsde then adds a step. On a CPU, because torchsde
    # reads them at each step, which would wait for a GPU, and because MPS has no float64.
    ts = torch.tensor([sde.t0 + first * h, sde.t0 + last * h], dtype=torch.float64, device="cpu")
    y = rearrange(x, "n ... -> n (...)")
    if solver.method == "milstein" and not kernels.ordinary(y):
        raise ItoError(
            "Milstein's correction is computed by autograd, which does not go with forward-mode derivatives and the "
            "transforms of torch.func; use another solver."
        )
    if form == "additive" and torch._C._functorch.is_batchedtensor(y):
        raise ItoError(
            "torch.func.vmap does not go through SRK, for which torchsde draws a vector; use solver 'euler'."
        )
    if torch.is_grad_enabled() or not kernels.ordinary(y):
        y = torchsde.sdeint(_WithoutShapeCheck(view), y, ts, bm=path, method=solver.method, dt=h)[-1]
    else:
        # Autograd computes Milstein's correction even where no gradient is recorded. From a state that cannot begin
        # a graph (inference mode; the inside of an autograd function) torchsde would silently get zero.
        with torch.inference_mode(False), torch.no_grad():
            start = y.detach().clone()
            y = torchsde.sdeint(_WithoutShapeCheck(view), start, ts, bm=path, method=solver.method, dt=h)[-1]
    return y.reshape(x.shape).to(x.dtype)


def _solve_torchdiffeq(sde: BlockSDE, solver: Solver, steps: int, x: Tensor, first: int, last: int) -> Tensor:
    """Steps ``first`` to ``last`` of a block without noise by torchdiffeq; a block that jumps has no drift."""
    import torchdiffeq  # it imports scipy, which takes half a second

    if sde.jump:
        return x
    h = (sde.t1 - sde.t0) / steps
    kind = torch.float32 if x.device.type == "mps" else torch.float64  # which MPS does not have
    ts = torch.tensor([sde.t0 + first * h, sde.t0 + last * h], dtype=kind, device=x.device)
    # torchdiffeq's default tolerances (1e-7) are below float32's rounding: steps shrink without end.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if solver.adaptive else {}
    options = {"dtype": kind} if solver.adaptive else {"step_size": h}

    def drift(t: Tensor, y: Tensor) -> Tensor:
        return (sde.block(y) - y) / (sde.t1 - sde.t0)

    return torchdiffeq.odeint(drift, x, ts, method=solver.method, options=options, **tolerance)[-1].to(x.dtype)
