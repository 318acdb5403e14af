"""Solvers of a block: one table, and `integrate`, which takes a state through one block.

Our own Euler is the hot path. All else is torchsde's and torchdiffeq's, on our Brownian path, one call a
block: the drift jumps to the next block's weights at the integers, which no step may cross.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torchdiffeq
import torchsde
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .names import nearest
from .noise import BrownianPath
from .sde import BlockSDE


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
        ValueError: there is none; the nearest name is offered.
    """
    if name not in SOLVERS:
        raise ValueError(nearest("solver", name, SOLVERS))
    return SOLVERS[name]


def check_solver(name: str, omega: float, steps: int) -> None:
    """Refuse what cannot be solved: an unknown solver, an ODE method under noise, steps that are no power of two.

    Raises:
        ValueError: with the value it saw and the mend.
    """
    solver = find_solver(name)
    if solver.library == "torchdiffeq" and omega != 0:
        raise ValueError(f"{name!r} solves the ODE, without noise: it needs omega = 0, got {omega}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or steps & (steps - 1) or steps > 1 << 20:
        raise ValueError(f"steps a block must be a power of two from 1 to {1 << 20}, got {steps!r}.")


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
            then that of one step and of a few states, for three to four times the forward evaluations.

    Returns:
        States at ``t1``. Their gradient is autograd's through every step as it was taken, never the
        adjoint's: with unit steps and block weights that has a relative error of 70 %.
    """
    run = functools.partial(_steps, sde, keys, find_solver(solver), steps)
    if not (checkpoint and torch.is_grad_enabled()):
        return run(x, 0, steps)
    whole = bool(find_solver(solver).starts or find_solver(solver).adaptive)
    return _checkpointed(run if whole else functools.partial(_nested, sde, run), sde, x, 0, steps)


def _steps(sde: BlockSDE, keys: Tensor, solver: Solver, steps: int, x: Tensor, first: int, last: int) -> Tensor:
    """Steps ``first`` to ``last`` of a block; the jump comes before step 0."""
    if sde.jump and first == 0:
        x = sde.block(x)
    sde.shape = tuple(x.shape[1:])
    solve = {"native": _euler, "torchsde": _torchsde, "torchdiffeq": _torchdiffeq}[solver.library]
    return solve(sde, keys, solver, steps, x, first, last)


def _path(sde: BlockSDE, keys: Tensor, x: Tensor) -> BrownianPath:
    return BrownianPath(keys, x[0].numel(), sde.index, sde.t0, sde.t1, dtype=x.dtype)


def _euler(sde: BlockSDE, keys: Tensor, _: Solver, steps: int, x: Tensor, first: int, last: int) -> Tensor:
    """Euler-Maruyama, written so that one step without noise is the block itself, bit for bit."""
    path = _path(sde, keys, x)
    h = (sde.t1 - sde.t0) / steps
    for k in range(first, last):
        y = x if sde.jump else sde.block(x)
        if steps > 1 and not sde.jump:
            y = torch.lerp(x, y, 1 / steps)  # x + h f(x)
        sigma = sde.schedule.sigma(sde.t0 + k * h)
        if sigma:
            dw = path.increment(steps.bit_length() - 1, k).view(x.shape)
            y = torch.add(y, x * dw if sde.schedule.multiplicative else dw, alpha=sigma)
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
        for name in ("g", "g_prod"):
            if hasattr(sde, name):
                setattr(self, name, getattr(sde, name))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        if not self.checked:
            self.checked = True
            return torch.zeros_like(y)
        return self.sde.f(t, y)  # type: ignore[operator]


def _torchsde(sde: BlockSDE, keys: Tensor, solver: Solver, steps: int, x: Tensor, first: int, last: int) -> Tensor:
    form: nn.Module = sde
    if solver.stratonovich:
        form = sde.view("stratonovich")
    elif solver.method == "srk" and not sde.schedule.multiplicative:
        form = sde.view("additive")
    h = (sde.t1 - sde.t0) / steps
    # float64 times: in float32 their sum may miss the end, and torchsde then adds a step.
    ts = torch.tensor([sde.t0 + first * h, sde.t0 + last * h], dtype=torch.float64, device=x.device)
    y = rearrange(x, "n ... -> n (...)")
    # Milstein asks autograd for g g', so it needs a graph of its own even where nobody wants a gradient.
    with nullcontext() if torch.is_grad_enabled() else torch.no_grad():
        y = torchsde.sdeint(_Unchecked(form), y, ts, bm=_path(sde, keys, x), method=solver.method, dt=h)[-1]
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


def _checkpointed(run: Callable[..., Tensor], sde: BlockSDE, x: Tensor, first: int, last: int) -> Tensor:
    return torch_checkpoint(
        run,
        x,
        first,
        last,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _frozen_statistics(sde.block)),
    )


def _nested(sde: BlockSDE, run: Callable[..., Tensor], x: Tensor, first: int, last: int) -> Tensor:
    """Checkpoints inside checkpoints, four to a level: memory grows with the logarithm of the steps."""
    if last - first == 1:
        return run(x, first, last)
    size = max(1, (last - first) // 4)
    for start in range(first, last, size):
        x = _checkpointed(functools.partial(_nested, sde, run), sde, x, start, start + size)
    return x
