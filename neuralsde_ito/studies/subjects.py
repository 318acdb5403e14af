"""What `compare_solvers` solves: a recast network on images, or a user's SDE on first states."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torchsde
from torch import Tensor
from torch.nn import functional as F

from ..models.recast import ItoResNet
from ..models.votes import winners
from ..noise.brownian import BrownianPath
from ..sde.integrate import integrate
from ..sde.solvers import SOLVERS, check_solver, find_solver, solvers_for
from ..validation import ItoError

Result = TypeVar("Result")


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What ``run()`` returns, and its seconds; a GPU's queued work is waited for."""
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


class NotFinite(Exception):
    """A state ceased to be finite; the message says where, as ``block 3 (t = 4)`` or ``t = 0.25``."""


class Subject(Protocol):
    """What is solved.

    Attributes:
        name: ``network``, or the SDE's class.
        noise: its kind, in words.
        additive: whether the noise is known not to depend on the state.
        grid: what steps are counted in, ``steps a block`` or ``steps``.
        x: images ``(N, C, H, W)``, or first states ``(N, D)``.
        unit_seconds: seconds of the unit of cost, the network's own forward pass or one evaluation of drift and
            diffusion.
    """

    name: str
    noise: str
    additive: bool
    grid: str
    x: Tensor
    unit_seconds: float

    def check(self, solver: str, steps: int) -> None:
        """Raise an `ItoError` if this solver with so many steps does not fit."""
        ...

    def solvers(self) -> list[str]:
        """Names of the solvers that fit."""
        ...

    def reference(self, finest: int) -> tuple[str, int]:
        """Solver and steps that count as exact when up to ``finest`` steps are compared."""
        ...

    def order(self, solver: str) -> float:
        """The solver's strong order in theory."""
        ...

    def solve(self, x: Tensor, solver: str, steps: int, checkpoint: bool) -> tuple[Tensor, Tensor]:
        """The last state ``(N, ...)``, and the output ``(N, K)`` that is read from it.

        Raises:
            NotFinite: a state is not finite.
        """
        ...

    def loss(self, output: Tensor) -> Tensor:
        """A scalar whose gradient with respect to ``x`` is compared."""
        ...

    def evaluations(self, solver: str, steps: int) -> int:
        """Drift evaluations of one path."""
        ...

    def errors(self, output: Tensor, fine: Tensor) -> dict[str, Any]:
        """Fields of a `SolverRow` that compare an output with the reference's."""
        ...


class Network:
    """A recast network: its stem, every block, its head. Implements `Subject`; the output is the logits.

    Args:
        model: the network, in eval mode.
        x: images ``(N, C, H, W)``.
        y: labels ``(N,)`` for accuracies; without them the loss takes the noise-free network's answers.
        keys: ``(N,)``, from `make_keys`.
    """

    name = "network"
    grid = "steps a block"

    def __init__(self, model: ItoResNet, x: Tensor, y: Tensor | None, keys: Tensor) -> None:
        self.model, self.x, self.y, self.keys = model, x, y, keys
        schedule = model.schedule
        self.noise, self.additive = f"{schedule.name}, omega {schedule.omega:g}", not schedule.multiplicative
        if model.input_sigma:
            self.noise += f", input_sigma {model.input_sigma:g}"
        with torch.no_grad():
            model.base(x)  # the first call is slower
            answers, self.unit_seconds = timed(lambda: model.base(x).argmax(1), x.device)
        self.labels = answers if y is None else y

    def check(self, solver: str, steps: int) -> None:
        """See `Subject`."""
        check_solver(solver, self.model.schedule.omega, steps)

    def solvers(self) -> list[str]:
        """All solvers of SDEs; without noise, those of ODEs that take fixed steps."""
        noise_free = self.model.schedule.omega == 0
        return [name for name, s in SOLVERS.items() if (s.form == "ode") == noise_free and not s.adaptive]

    def reference(self, finest: int) -> tuple[str, int]:
        """See `Subject`."""
        return ("srk" if self.model.schedule.omega else "ode:rk4", 4 * finest)

    def order(self, solver: str) -> float:
        """See `Subject`."""
        return find_solver(solver).order.given(multiplicative=self.model.schedule.multiplicative)

    def solve(self, x: Tensor, solver: str, steps: int, checkpoint: bool) -> tuple[Tensor, Tensor]:
        """See `Subject`."""
        state = self.model.stem(self.model.diffused(x, self.keys))
        for sde in self.model.sdes:
            state = integrate(sde, state, self.keys, solver, steps, checkpoint)
            if not bool(state.isfinite().all()):
                raise NotFinite(f"block {sde.index} (t = {sde.t1:g})")
        return state, self.model.head(state)

    def loss(self, logits: Tensor) -> Tensor:
        """The sum of cross entropies."""
        return F.cross_entropy(logits, self.labels, reduction="sum")

    def evaluations(self, solver: str, steps: int) -> int:
        """Blocks with a drift, times steps, times stages; a jump counts once."""
        method = find_solver(solver)
        drifts = sum(not sde.jump for sde in self.model.sdes)
        a_step = method.evaluations.given(multiplicative=self.model.schedule.multiplicative)
        a_block = steps * a_step + method.initial_evaluations
        return drifts * a_block + len(self.model.sdes) - drifts

    def errors(self, logits: Tensor, fine: Tensor) -> dict[str, Any]:
        """See `Subject`."""
        answers = winners(logits)
        return {
            "mean_error": float((logits.softmax(1).mean(0) - fine.softmax(1).mean(0)).abs().max()),
            "logit_error": float((logits - fine).norm() / fine.norm()),
            "agreement": float((answers == winners(fine)).cpu().double().mean()),
            "accuracy": None if self.y is None else float((answers == self.y).cpu().double().mean()),
        }


class UnitTime:
    """A user's SDE as ``f`` and ``g`` alone, on the clock ``s`` from 0 to 1, with the evaluations of ``f`` counted.

    With ``t = t0 + (t1 - t0) s`` the same process is ``dy = (t1 - t0) f ds + sqrt(t1 - t0) g dB(s)``. On this clock a
    power of two of steps adds up to 1 exactly; where rounding misses the end, torchsde adds a step.
    """

    def __init__(self, sde: Any, t0: float, t1: float) -> None:
        self.sde, self.noise_type, self.sde_type, self.count = sde, sde.noise_type, sde.sde_type, 0
        self.t0, self.t1 = t0, t1

    def _time(self, s: Tensor) -> Tensor:
        return torch.lerp(s.new_tensor(self.t0), s.new_tensor(self.t1), s)  # exact at both ends

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """Drift ``(N, D) -> (N, D)``."""
        self.count += 1
        t = self._time(s)
        return (self.t1 - self.t0) * (self.sde.f(t, y) if hasattr(self.sde, "f") else self.sde.f_and_g(t, y)[0])

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """Diffusion ``(N, D) -> (N, D)``, or ``(N, D, M)`` where the noise is not diagonal."""
        t = self._time(s)
        scale = math.sqrt(self.t1 - self.t0)
        return scale * (self.sde.g(t, y) if hasattr(self.sde, "g") else self.sde.f_and_g(t, y)[1])


def _precise(y: Tensor) -> torch.dtype:
    """The dtype of times: float64, which MPS does not have."""
    return torch.float32 if y.device.type == "mps" else torch.float64


class Equation:
    """An SDE in torchsde's protocol, solved by torchsde on our paths. Implements `Subject`; the output is the state.

    Args:
        sde: has ``f`` and ``g``, or ``f_and_g``, and ``noise_type`` and ``sde_type``.
        y0: the first states ``(N, D)``.
        keys: ``(N,)``, from `make_keys`.
        interval: start and end of time.

    Raises:
        ItoError: the SDE lacks something, or ``y0`` or ``interval`` does not fit.
    """

    grid = "steps"

    def __init__(self, sde: Any, y0: Tensor, keys: Tensor, interval: tuple[float, float]) -> None:
        check_sde(sde, y0, interval)
        self.x, self.keys, (self.t0, self.t1) = y0, keys, (float(interval[0]), float(interval[1]))
        self.sde = UnitTime(sde, self.t0, self.t1)
        self.kind = (sde.noise_type, sde.sde_type)
        self.name = type(sde).__name__
        self.noise = f"{sde.noise_type} noise, {'Itô' if sde.sde_type == 'ito' else 'Stratonovich'}"
        self.additive = sde.noise_type == "additive"
        begin = torch.zeros((), dtype=_precise(y0), device=y0.device)
        with torch.no_grad():
            self.channels = self.sde.g(begin, y0).shape[-1]
            _, self.unit_seconds = timed(lambda: (self.sde.f(begin, y0), self.sde.g(begin, y0)), y0.device)
        self.counts: dict[tuple[str, int], int] = {}

    def check(self, solver: str, steps: int) -> None:
        """See `Subject`."""
        method = find_solver(solver)
        fitting = solvers_for(*self.kind)
        if (method.same_as or solver) not in fitting:
            raise ItoError(f"{solver!r} does not solve {self.noise}; these do: {', '.join(fitting)}.")
        check_solver(solver, 0.0 if method.form == "ode" else 1.0, steps)

    def solvers(self) -> list[str]:
        """See `Subject`."""
        return solvers_for(*self.kind)

    def reference(self, finest: int) -> tuple[str, int]:
        """See `Subject`."""
        # Without a solver of order 1.5, the reference has the order of the others: only many more steps make it exact.
        fitting = solvers_for(*self.kind)
        return ("srk", 4 * finest) if "srk" in fitting else (fitting[0], 16 * finest)

    def order(self, solver: str) -> float:
        """See `Subject`."""
        if self.kind[0] == "general":
            return 0.5
        return find_solver(solver).order.given(multiplicative=not self.additive)

    def solve(self, x: Tensor, solver: str, steps: int, checkpoint: bool) -> tuple[Tensor, Tensor]:
        """See `Subject`; the output is the last state again."""
        self.sde.count = 0
        y = self._states(x, solver, steps, 1)[-1]
        self.counts[solver, steps] = self.sde.count - 1  # torchsde calls the drift once to see its shape
        if not bool(y.isfinite().all()):
            with torch.no_grad():
                states = self._states(x.detach(), solver, steps, steps)
            broken = (~states.isfinite().flatten(1).all(1)).nonzero()[0].item()
            raise NotFinite(f"t = {self.t0 + (self.t1 - self.t0) * broken / steps:g}")
        return y, y

    def _states(self, y0: Tensor, solver: str, steps: int, parts: int) -> Tensor:
        """The states at ``parts + 1`` equidistant times, ``(parts + 1, N, D)``."""
        ts = torch.linspace(0, 1, parts + 1, dtype=_precise(y0), device=y0.device)
        path = BrownianPath(self.keys, self.channels, 0, 0.0, 1.0, dtype=y0.dtype)
        return torchsde.sdeint(self.sde, y0, ts, bm=path, method=find_solver(solver).method, dt=1 / steps).to(y0.dtype)

    def loss(self, y: Tensor) -> Tensor:
        """The sum of the last states."""
        return y.sum()

    def evaluations(self, solver: str, steps: int) -> int:
        """As counted when this solver was run with so many steps; 0 before."""
        return self.counts.get((solver, steps), 0)

    def errors(self, y: Tensor, fine: Tensor) -> dict[str, Any]:
        """See `Subject`."""
        return {"mean_error": float((y - fine).mean(0).abs().max())}


_KINDS = {"noise_type": ("diagonal", "additive", "scalar", "general"), "sde_type": ("ito", "stratonovich")}


def check_sde(sde: Any, y0: Tensor, interval: tuple[float, float]) -> None:
    """Refuse an SDE that lacks a part of torchsde's protocol, first states that are not ``(N, D)``, an empty interval.

    Raises:
        ItoError: says what is missing or wrong.
    """
    name = type(sde).__name__
    if not (hasattr(sde, "f") or hasattr(sde, "f_and_g")):
        raise ItoError(f"{name} has no drift: define f(t, y), from states (N, D) to (N, D).")
    if not (hasattr(sde, "g") or hasattr(sde, "f_and_g")):
        raise ItoError(
            f"{name} has no diffusion: define g(t, y), from states (N, D) to (N, D) for diagonal noise, else (N, D, M)."
        )
    for attribute, known in _KINDS.items():
        value = getattr(sde, attribute, None)
        if value not in known:
            raise ItoError(f"{name}.{attribute} must be one of {', '.join(known)}; it is {value!r}.")
    if not isinstance(y0, Tensor) or y0.dim() != 2 or not y0.is_floating_point():
        raise ItoError("The first states of an SDE must be a floating-point tensor (N, D): paths, components.")
    if not (math.isfinite(interval[0]) and math.isfinite(interval[1]) and interval[0] < interval[1]):
        raise ItoError(f"interval must be (start, end) with start < end, got {interval}.")
