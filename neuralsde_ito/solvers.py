"""Solvers of a block: one table, and `integrate`, which takes a state through one block.

Our own Euler is the hot path. All else is torchsde's and torchdiffeq's, on our Brownian path, one call a
block: the drift jumps to the next block's weights at the integers, which no step may cross.
"""

from __future__ import annotations

import math
import operator
import random
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torchdiffeq
import torchsde
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from . import fused
from .noise import BrownianPath
from .sde import BlockSDE, mixes_images, well_known
from .validation import ItoError, nearest


@dataclass(frozen=True)
class Solver:
    """A row of the table.

    Attributes:
        library: ``native``, ``torchsde`` or ``torchdiffeq``.
        method: its name there.
        order: strong order for additive and for multiplicative noise (for ``ode:``, the classical order, twice).
        evaluations: drift evaluations a step, for additive and for multiplicative noise; 0 if adaptive.
        stratonovich: whether it solves the Stratonovich form.
        starts: drift evaluations before the first step of a block; if any, a block cannot be cut between steps.
        adaptive: whether it chooses its own steps, jointly for the whole batch.
    """

    library: str
    method: str
    order: tuple[float, float]
    evaluations: tuple[int, int]
    stratonovich: bool = False
    starts: int = 0
    adaptive: bool = False


def _ode(method: str, order: float, evaluations: int) -> Solver:
    return Solver("torchdiffeq", method, (order, order), (evaluations, evaluations), adaptive=evaluations == 0)


# Orders: Kloeden & Platen 1992 (Euler, Milstein), Rössler 2010 (SRK: SRA1 and SRID2), torchsde's own
# declarations for the Stratonovich methods. Diagonal noise commutes, hence order 1 without Lévy areas.
SOLVERS: dict[str, Solver] = {
    "euler": Solver("native", "euler", (1.0, 0.5), (1, 1)),
    "torchsde:euler": Solver("torchsde", "euler", (1.0, 0.5), (1, 1)),
    "milstein": Solver("torchsde", "milstein", (1.0, 1.0), (1, 1)),
    "srk": Solver("torchsde", "srk", (1.5, 1.5), (3, 10)),
    "heun": Solver("torchsde", "heun", (1.0, 1.0), (2, 2), stratonovich=True),
    "midpoint": Solver("torchsde", "midpoint", (1.0, 1.0), (2, 2), stratonovich=True),
    "euler_heun": Solver("torchsde", "euler_heun", (1.0, 1.0), (1, 1), stratonovich=True),
    "reversible_heun": Solver("torchsde", "reversible_heun", (1.0, 0.5), (1, 1), stratonovich=True, starts=1),
    "ode:euler": _ode("euler", 1, 1),
    "ode:midpoint": _ode("midpoint", 2, 2),
    "ode:heun3": _ode("heun3", 3, 3),
    "ode:rk4": _ode("rk4", 4, 4),
    "ode:adaptive_heun": _ode("adaptive_heun", 2, 0),
    "ode:bosh3": _ode("bosh3", 3, 0),
    "ode:dopri5": _ode("dopri5", 5, 0),
    "ode:dopri8": _ode("dopri8", 8, 0),
}


def find_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        ItoError: there is none; the nearest name is offered.
    """
    if name not in SOLVERS:
        raise ItoError(nearest("solver", name, SOLVERS))
    return SOLVERS[name]


def solvers_for(noise_type: str, sde_type: str) -> list[str]:
    """Names of the solvers for an SDE in torchsde's protocol.

    Args:
        noise_type: ``diagonal``, ``additive``, ``scalar`` or ``general``.
        sde_type: ``ito`` or ``stratonovich``.
    """
    fitting = []
    for name, solver in SOLVERS.items():
        both = name == "milstein"  # torchsde has it in either form
        if solver.library == "torchdiffeq" or name == "torchsde:euler":
            continue
        if (both or solver.stratonovich == (sde_type == "stratonovich")) and not (
            noise_type == "general" and name in ("milstein", "srk")  # they would need Lévy areas
        ):
            fitting.append(name)
    return fitting


def check_solver(name: str, omega: float, steps: int) -> None:
    """Refuse what cannot be solved: an unknown solver, an ODE method under noise, steps that are no power of two.

    Raises:
        ItoError: with the value it saw and the mend.
    """
    solver = find_solver(name)
    if solver.library == "torchdiffeq" and omega != 0:
        raise ItoError(f"{name!r} solves the ODE, without noise: it needs omega = 0, got {omega}.")
    number = 0 if isinstance(steps, bool) or not hasattr(steps, "__index__") else operator.index(steps)
    if number < 1 or number & (number - 1) or number > 1 << 20:
        raise ItoError(f"steps a block must be a power of two from 1 to {1 << 20}, got {steps!r}.")


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
            then that of one step and of a few states, for three to four times the forward evaluations. A
            second derivative is not offered then. The block must compute the same again: a block that draws random
            numbers is refused, and so is a backward pass after its weights or modes have changed.

    Returns:
        States at ``t1``. Their gradient is autograd's through every step as it was taken, never the
        adjoint's: with unit steps and block weights that has a relative error of 70 %.

    Raises:
        ItoError: unknown solver; with ``checkpoint`` also a block that cannot be repeated.
    """
    method = find_solver(solver)
    if not (checkpoint and torch.is_grad_enabled()):
        return _Block(sde, keys, method, steps)(x, 0, steps)
    if not fused.ordinary(x):
        raise ItoError(
            "Checkpointing does not go with forward-mode derivatives and the transforms of torch.func; "
            "use checkpoint=False."
        )
    if any(_draws(module) for module in sde.block.modules()):
        raise ItoError(
            f"Block {sde.index} drops out at random, which checkpointing cannot repeat; use checkpoint=False."
        )
    parameters = [p for p in sde.block.parameters() if p.requires_grad]
    # Images that know nothing of each other go one slice after another: all that is transient shrinks with the slice.
    limit = _SLICE.get(x.device.type, 1 << 27)
    slices = 1 if method.adaptive or mixes_images(sde.block) else math.ceil(x.numel() / limit)
    pairs = zip(x.tensor_split(min(slices, len(x))), keys.tensor_split(min(slices, len(x))), strict=True)
    parts = [_Recomputed.apply(_Block(sde, k, method, steps), part, *parameters) for part, k in pairs]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def diffuse(sde: BlockSDE, x: Tensor, keys: Tensor, in_place: bool = False) -> Tensor:
    """The end of an Euler step over a whole block with additive noise: from ``B(x)``, which many paths may share."""
    sigma = sde.schedule.sigma(sde.t0)
    path = BrownianPath(keys, math.prod(x.shape[1:]), sde.index, sde.t0, sde.t1, dtype=x.dtype)
    return path.add_to(x, sigma, in_place) if sigma else x


_SLICE = {"cpu": 1 << 19}  # elements of the state that are checkpointed at a time: on a CPU what its caches hold


class _Block:
    """Any run of a block's steps, on one Brownian path."""

    def __init__(self, sde: BlockSDE, keys: Tensor, solver: Solver, steps: int) -> None:
        self.sde, self.keys, self.solver, self.steps = sde, keys, solver, steps
        self.path: BrownianPath | None = None

    def __call__(self, x: Tensor, first: int, last: int, only_slope: bool = False) -> Tensor:
        """Steps ``first`` to ``last``; the jump comes before step 0.

        With ``only_slope`` noise is left out where it adds nothing to the derivative.
        """
        sde = self.sde
        if sde.jump and first == 0:
            x = sde.block(x)
        if self.path is None:
            size = math.prod(x.shape[1:])
            self.path = BrownianPath(self.keys, size, sde.index, sde.t0, sde.t1, dtype=x.dtype)
        if self.solver.library == "native" and only_slope and not sde.schedule.multiplicative:
            return _euler(sde, None, self.solver, self.steps, x, first, last)
        solve = {"native": _euler, "torchsde": solve_torchsde, "torchdiffeq": _torchdiffeq}[self.solver.library]
        x = solve(sde, self.path, self.solver, self.steps, x, first, last)
        if last == self.steps:
            self.path.forget()  # the cells that it kept for the next step
        return x


def _euler(sde: BlockSDE, path: BrownianPath | None, _: Solver, steps: int, x: Tensor, first: int, last: int) -> Tensor:
    """Euler-Maruyama, written so that one step without noise is the block itself, bit for bit."""
    h = (sde.t1 - sde.t0) / steps
    for k in range(first, last):
        sigma = sde.schedule.sigma(sde.t0 + k * h)
        multiplicative = sde.schedule.multiplicative
        one = steps == 1 and not multiplicative  # the hot path
        dw = path.increment(steps.bit_length() - 1, k).view(x.shape) if path and sigma and not one else None
        y = x if sde.jump else sde.block(x)
        if steps > 1 and not sde.jump:
            y = torch.lerp(x, y, 1 / steps)  # x + h f(x)
        if dw is not None:
            y = torch.add(y, x * dw if multiplicative else dw, alpha=sigma)
        elif path and sigma:
            # Even then not what is the caller's: a block may hand back its input.
            own = sde.in_place and (sde.jump or y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr())
            y = path.add_to(y, sigma, in_place=own)
        x = y
    return x


class _Unchecked(nn.Module):
    """torchsde calls ``f`` once before the first step, only to see its shape.

    On a network that is a whole forward pass, and a second update of BatchNorm: this answers with zeros.
    """

    def __init__(self, sde: nn.Module) -> None:
        super().__init__()
        self.sde, self.checked = sde, False
        self.noise_type, self.sde_type = sde.noise_type, sde.sde_type
        self.state: Tensor | None = None
        if hasattr(sde, "g"):
            self.g = sde.g
        if hasattr(sde, "g_prod"):
            self.g_prod = self._product

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        if not self.checked:
            self.checked = True
            self.state = torch.cuda.get_rng_state(y.device) if y.is_cuda else torch.get_rng_state()
            return torch.zeros_like(y)
        return self.sde.f(t, y)  # type: ignore[operator]

    def _product(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        if self.state is not None:  # torchsde has drawn a vector, only to see the product's shape
            if y.is_cuda:
                torch.cuda.set_rng_state(self.state, y.device)
            else:
                torch.set_rng_state(self.state)
            self.state = None
        return self.sde.g_prod(t, y, v)  # type: ignore[operator]


def solve_torchsde(
    sde: BlockSDE, path: torchsde.BaseBrownian, solver: Solver, steps: int, x: Tensor, first: int, last: int
) -> Tensor:
    """Steps ``first`` to ``last`` of a block by torchsde, on any path in its protocol."""
    additive = solver.method == "srk" and not sde.schedule.multiplicative
    kind = "stratonovich" if solver.stratonovich else "additive" if additive else "ito"
    form = sde.view(kind, tuple(x.shape[1:]))
    h = (sde.t1 - sde.t0) / steps
    # float64 times: in float32 their sum may miss the end, and torchsde then adds a step.
    ts = torch.tensor([sde.t0 + first * h, sde.t0 + last * h], dtype=torch.float64, device=x.device)
    y = rearrange(x, "n ... -> n (...)")
    if solver.method == "milstein" and not fused.ordinary(y):
        raise ItoError(
            "Milstein's correction is computed by autograd, which does not go with forward-mode derivatives and the "
            "transforms of torch.func; use another solver."
        )
    if kind == "additive" and torch._C._functorch.is_batchedtensor(y):
        raise ItoError(
            "torch.func.vmap does not go through SRK, for which torchsde draws a vector; use solver 'euler'."
        )
    if torch.is_grad_enabled() or not fused.ordinary(y):
        y = torchsde.sdeint(_Unchecked(form), y, ts, bm=path, method=solver.method, dt=h)[-1]
    else:
        # Milstein's correction is autograd's, even where nobody wants a gradient: from a state that cannot begin
        # a graph (inference mode; the inside of an autograd function) torchsde gets zero, without a word.
        with torch.inference_mode(False), torch.no_grad():
            start = y.detach().clone()
            y = torchsde.sdeint(_Unchecked(form), start, ts, bm=path, method=solver.method, dt=h)[-1]
    return y.reshape(x.shape).to(x.dtype)


def _torchdiffeq(sde: BlockSDE, keys: Tensor, solver: Solver, steps: int, x: Tensor, first: int, last: int) -> Tensor:
    if sde.jump:
        return x
    h = (sde.t1 - sde.t0) / steps
    ts = torch.tensor([sde.t0 + first * h, sde.t0 + last * h], dtype=torch.float64, device=x.device)
    # torchdiffeq's default tolerances (1e-7) are below float32's rounding: steps shrink without end.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if solver.adaptive else {"options": {"step_size": h}}

    def drift(t: Tensor, y: Tensor) -> Tensor:
        return (sde.block(y) - y) / (sde.t1 - sde.t0)

    return torchdiffeq.odeint(drift, x, ts, method=solver.method, **tolerance)[-1].to(x.dtype)


@contextmanager
def _frozen_statistics(block: nn.Module):
    """BatchNorm normalises as before but does not update: the recomputation is not a second pass over the data."""
    norms = [m for m in block.modules() if getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]


def _draws(module: nn.Module) -> bool:
    """Whether a module of torch's or torchvision's draws random numbers, in the mode in which it is."""
    kinds = (nn.modules.dropout._DropoutNd, nn.RReLU, StochasticDepth)
    attention = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    return module.training and (attention or isinstance(module, kinds))


def _versions(block: nn.Module) -> list[object]:
    """What the block's output depends on beside its input: weights and buffers by version, and modes.

    The running statistics of a BatchNorm in train mode are left out: it writes them and does not read them.
    """
    found: list[object] = []
    for module in block.modules():
        found.append(module.training)
        own: list[Tensor] = list(module.parameters(recurse=False))
        if not (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training):
            own += module.buffers(recurse=False)
        found += [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in own]
    return found


def _random_states(block: nn.Module, device: torch.device) -> list[object]:
    """The generators that a block of unknown code may draw from without naming one."""
    if well_known(block):
        return []  # `_draws` knows; and other threads may draw meanwhile
    states: list[object] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    name, key, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  (a block may use the old interface)
    states += [name, key.tobytes(), *rest]  # type: ignore[union-attr]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return states


class _Recomputed(torch.autograd.Function):
    """A block that keeps its first state only, and goes through its steps again in the backward pass.

    Written out because torch's checkpoints, nested to this depth, kept five times the memory (measured).
    """

    @staticmethod
    def forward(ctx, run: _Block, x: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(x)
        kind = x.device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        before = _versions(run.sde.block), _random_states(run.sde.block, x.device)
        y = run(x, 0, run.steps)
        ctx.versions = _versions(run.sde.block)
        if (ctx.versions, _random_states(run.sde.block, x.device)) != before:
            raise ItoError(
                f"Block {run.sde.index} draws random numbers or changes its own weights at every call (dropout, "
                "stochastic depth, spectral norm), which checkpointing cannot repeat; use checkpoint=False."
            )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        run = ctx.run
        if _versions(run.sde.block) != ctx.versions:
            raise ItoError(
                f"The weights or the mode of block {run.sde.index} changed between the forward and the backward pass, "
                "so that checkpointing would compute another gradient; go backward first, or use checkpoint=False."
            )
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        whole = run.solver.starts or run.solver.adaptive  # cannot be cut between steps

        def pull(x: Tensor, first: int, last: int, gradient: Tensor) -> Tensor:
            """The gradient at ``first`` from that at ``last``: four pieces, each from its own first state."""
            if last - first == 1 or whole:
                with torch.enable_grad(), ctx.autocast:
                    x = x.detach().requires_grad_()
                    inputs = (x, *ctx.parameters)
                    y = run(x, first, last, only_slope=True)
                    found = torch.autograd.grad(y, inputs, gradient, allow_unused=True)
                sums[:] = [a if b is None else b if a is None else a + b for a, b in zip(sums, found[1:], strict=True)]
                return torch.zeros_like(x) if found[0] is None else found[0]
            size = max(1, (last - first) // 4)
            starts, states = range(first, last, size), [x]
            with torch.no_grad(), ctx.autocast:
                for start in starts[:-1]:
                    states.append(run(states[-1], start, start + size))
            for start in reversed(starts):
                gradient = pull(states.pop(), start, start + size, gradient)
            return gradient

        with _frozen_statistics(run.sde.block):
            gradient = pull(ctx.saved_tensors[0], 0, run.steps, gradient)
        run.path.forget()
        return None, gradient, *sums
