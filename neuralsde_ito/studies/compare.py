"""Which solver, at how many steps: a network or an SDE against a fine reference on the same Brownian paths.

Strong errors are root mean squares of the distance to the reference on the same path, weak ones distances of means
(Kloeden and Platen 1992, chapter 9).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torchsde
from torch import Tensor
from torch.nn import functional as F

from ..memory import Live
from ..models.recast import ItoResNet
from ..models.votes import winners
from ..modules import evaluating
from ..noise.brownian import BrownianPath
from ..noise.keys import make_keys
from ..sde.integrate import integrate
from ..sde.solvers import SOLVERS, check_solver, find_solver, solvers_for
from ..validation import ItoError, check_labels, image_names, recordable
from .orders import slope


@dataclass(frozen=True)
class SolverRow:
    """One solver at one number of steps, against the reference on the same paths.

    Attributes:
        solver, steps: steps a block; for an SDE, in the whole interval.
        evaluations: of the drift (for a network: of all its blocks), for one path.
        state_error: strong, of the last state, relative to the reference's size.
        mean_error: weak. For a network the largest distance of a class's mean probability, for an SDE that of a
            component's mean.
        logit_error: strong, relative; None for an SDE, as are ``agreement``, the share of images with the reference's
            label, and ``accuracy``, the share of right labels.
        gradient_cosine: mean over paths of the cosine to the reference's gradient with respect to the input (loss of
            the labels; for an SDE the sum of the last state); None if not asked for.
        seconds: of one inference of all paths; ``cost``, relative to the network's own forward pass (for an SDE, to
            one evaluation of drift and diffusion).
        memory: bytes, the most that tensors held at a time beyond the model and its input; in the gradient's pass if
            there is one (checkpointed above one step), else in an inference.
        diverged: where states ceased to be finite, as ``block 3 (t = 4)``; the errors are NaN then.
    """

    solver: str
    steps: int
    evaluations: int
    state_error: float = math.nan
    mean_error: float = math.nan
    logit_error: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    gradient_cosine: float | None = None
    seconds: float = math.nan
    cost: float = math.nan
    memory: int = 0
    diverged: str | None = None


@dataclass(frozen=True)
class Slope:
    """The slope of the strong error over the steps that were tried.

    Attributes:
        theory: the solver's strong order.
        fit: the slope; None with fewer than three finite errors.
        standard_error: over at most 16 groups of paths; None with fewer than two paths.
    """

    theory: float
    fit: float | None
    standard_error: float | None


@dataclass(frozen=True)
class SolverComparison:
    """Solvers on one network or SDE and its paths.

    Attributes:
        subject: ``network``, or the SDE's class.
        noise: what kind, in words; ``additive``: whether it is known not to depend on the state.
        reference: the solver and steps that all are held against.
        rows: one a solver and number of steps.
        orders: the slope of each solver's state error, beside theory.
    """

    subject: str
    noise: str
    additive: bool
    reference: tuple[str, int]
    rows: list[SolverRow]
    orders: dict[str, Slope] = field(default_factory=dict)

    def remarks(self) -> list[str]:
        """What the figures mean, in words."""
        unit = "steps a block" if self.subject == "network" else "steps"
        by = {(row.solver, row.steps): row for row in self.rows if row.diverged is None}
        said = []
        if self.additive and any(solver == "milstein" for solver, _ in by):
            said.append("Milstein is Euler here: the noise is additive, and its correction is zero.")
        for row in self.rows:
            if row.diverged:
                said.append(f"{row.solver} at {row.steps} {unit}: states are not finite after {row.diverged}.")
        eulers = sorted((n for solver, n in by if solver == "euler"), reverse=True)
        if eulers and (finest := by["euler", eulers[0]]).steps > 1:
            better = [row for row in by.values() if row.solver != "euler" and row.state_error <= finest.state_error]
            better = [row for row in better if row.evaluations < finest.evaluations]
            if better:
                best = min(better, key=lambda row: row.evaluations)
                said.append(
                    f"{best.solver} reaches Euler's error at {finest.steps} steps with {best.steps}, "
                    f"for {best.evaluations} drift evaluations instead of {finest.evaluations}."
                )
        if self.subject == "network" and (one := by.get(("euler", 1))):
            said.append(
                "More steps change the model: at 1 step a block it is the ResNet (with noise), whose last state is "
                f"{100 * one.state_error:.0f} % away from that of the SDE's fine solution."
            )
        return said


class NotFinite(Exception):
    """Says where a state ceased to be finite."""


class _Network:
    """A recast network on images: its stem, every block, its head."""

    name = "network"

    def __init__(self, model: ItoResNet, x: Tensor, y: Tensor | None, keys: Tensor) -> None:
        self.model, self.x, self.y, self.keys = model, x, y, keys
        schedule = model.schedule
        self.noise, self.additive = f"{schedule.name}, omega {schedule.omega:g}", not schedule.multiplicative
        with torch.no_grad():
            model.base(x)  # the first call is slower
            start = time.perf_counter()
            found = model.base(x).argmax(1)
            _wait(x)
            self.unit = time.perf_counter() - start
        self.labels = found if y is None else y

    def check(self, solver: str, steps: int) -> None:
        check_solver(solver, self.model.schedule.omega, steps)

    def solvers(self) -> list[str]:
        without = self.model.schedule.omega == 0
        return [name for name, s in SOLVERS.items() if (s.library == "torchdiffeq") == without and not s.adaptive]

    def reference(self, finest: int) -> tuple[str, int]:
        return ("srk" if self.model.schedule.omega else "ode:rk4", 4 * finest)

    def theory(self, solver: str) -> float:
        return find_solver(solver).order[self.model.schedule.multiplicative]

    def solve(self, x: Tensor, solver: str, steps: int, checkpoint: bool) -> tuple[Tensor, Tensor]:
        """The last state and the logits."""
        state = self.model.stem(x)
        for sde in self.model.sdes:
            state = integrate(sde, state, self.keys, solver, steps, checkpoint)
            if not bool(state.isfinite().all()):
                raise NotFinite(f"block {sde.index} (t = {sde.t1:g})")
        return state, self.model.head(state)

    def loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.labels, reduction="sum")

    def evaluations(self, solver: str, steps: int) -> int:
        """Blocks with a drift, times steps, times stages; jumps count once."""
        method = find_solver(solver)
        drifts = sum(not sde.jump for sde in self.model.sdes)
        a_block = steps * method.evaluations[self.model.schedule.multiplicative] + method.starts
        return drifts * a_block + len(self.model.sdes) - drifts

    def errors(self, logits: Tensor, fine: Tensor) -> dict[str, Any]:
        found = winners(logits)
        return {
            "mean_error": float((logits.softmax(1).mean(0) - fine.softmax(1).mean(0)).abs().max()),
            "logit_error": float((logits - fine).norm() / fine.norm()),
            "agreement": float((found == winners(fine)).double().mean()),
            "accuracy": None if self.y is None else float((found == self.y).double().mean()),
        }


class _UnitTime:
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
        self.count += 1
        t = self._time(s)
        return (self.t1 - self.t0) * (self.sde.f(t, y) if hasattr(self.sde, "f") else self.sde.f_and_g(t, y)[0])

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        t = self._time(s)
        scale = math.sqrt(self.t1 - self.t0)
        return scale * (self.sde.g(t, y) if hasattr(self.sde, "g") else self.sde.f_and_g(t, y)[1])


class _Equation:
    """An SDE in torchsde's protocol on states ``(N, D)``, solved by torchsde on our paths."""

    def __init__(self, sde: Any, y0: Tensor, keys: Tensor, interval: tuple[float, float]) -> None:
        _check_sde(sde, y0, interval)
        self.x, self.keys, (self.t0, self.t1) = y0, keys, (float(interval[0]), float(interval[1]))
        self.sde = _UnitTime(sde, self.t0, self.t1)
        self.kind = (sde.noise_type, sde.sde_type)
        self.name = type(sde).__name__
        self.noise = f"{sde.noise_type} noise, {'Itô' if sde.sde_type == 'ito' else 'Stratonovich'}"
        self.additive = sde.noise_type == "additive"
        begin = torch.zeros((), dtype=torch.float64, device=y0.device)
        with torch.no_grad():
            self.channels = self.sde.g(begin, y0).shape[-1]
            start = time.perf_counter()
            self.sde.f(begin, y0), self.sde.g(begin, y0)
            _wait(y0)
            self.unit = time.perf_counter() - start
        self.counts: dict[tuple[str, int], int] = {}

    def check(self, solver: str, steps: int) -> None:
        method = find_solver(solver)
        fitting = solvers_for(*self.kind)
        if solver not in fitting and not (solver == "torchsde:euler" and "euler" in fitting):
            raise ItoError(f"{solver!r} does not solve {self.noise}; these do: {', '.join(fitting)}.")
        check_solver(solver, 1.0 if method.library != "torchdiffeq" else 0.0, steps)

    def solvers(self) -> list[str]:
        return solvers_for(*self.kind)

    def reference(self, finest: int) -> tuple[str, int]:
        # Where order 1.5 is not to be had, a reference of the same order must be much finer to count as exact.
        fitting = solvers_for(*self.kind)
        return ("srk", 4 * finest) if "srk" in fitting else (fitting[0], 16 * finest)

    def theory(self, solver: str) -> float:
        if self.kind[0] == "general":
            return 0.5
        return find_solver(solver).order[not self.additive]

    def solve(self, x: Tensor, solver: str, steps: int, checkpoint: bool) -> tuple[Tensor, Tensor]:
        """The last state, twice: there is no head."""
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
        ts = torch.linspace(0, 1, parts + 1, dtype=torch.float64, device=y0.device)
        path = BrownianPath(self.keys, self.channels, 0, 0.0, 1.0, dtype=y0.dtype)
        return torchsde.sdeint(self.sde, y0, ts, bm=path, method=find_solver(solver).method, dt=1 / steps).to(y0.dtype)

    def loss(self, y: Tensor) -> Tensor:
        return y.sum()

    def evaluations(self, solver: str, steps: int) -> int:
        return self.counts.get((solver, steps), 0)

    def errors(self, y: Tensor, fine: Tensor) -> dict[str, Any]:
        return {"mean_error": float((y - fine).mean(0).abs().max())}


_KINDS = {"noise_type": ("diagonal", "additive", "scalar", "general"), "sde_type": ("ito", "stratonovich")}


def _check_sde(sde: Any, y0: Tensor, interval: tuple[float, float]) -> None:
    name = type(sde).__name__
    if not (hasattr(sde, "f") or hasattr(sde, "f_and_g")):
        raise ItoError(f"{name} has no drift: define f(t, y), from states (N, D) to (N, D).")
    if not (hasattr(sde, "g") or hasattr(sde, "f_and_g")):
        raise ItoError(
            f"{name} has no diffusion: define g(t, y), from states (N, D) to (N, D) for diagonal noise, else (N, D, M)."
        )
    for attribute, known in _KINDS.items():
        found = getattr(sde, attribute, None)
        if found not in known:
            raise ItoError(f"{name}.{attribute} must be one of {', '.join(known)}; it is {found!r}.")
    if not isinstance(y0, Tensor) or y0.dim() != 2 or not y0.is_floating_point():
        raise ItoError("The first states of an SDE must be a floating-point tensor (N, D): paths, components.")
    if not (math.isfinite(interval[0]) and math.isfinite(interval[1]) and interval[0] < interval[1]):
        raise ItoError(f"interval must be (start, end) with start < end, got {interval}.")


def compare_solvers(
    model: ItoResNet | Any,
    x: Tensor,
    y: Tensor | None = None,
    solvers: Sequence[str] | None = None,
    steps: Sequence[int] = (1, 2, 4, 8),
    seed: int = 0,
    index: Tensor | None = None,
    reference: tuple[str, int] | None = None,
    gradients: bool = True,
    interval: tuple[float, float] = (0.0, 1.0),
) -> SolverComparison:
    """Hold solvers against a fine reference, all on one Brownian path an image, or a state.

    Args:
        model: a recast network, whose own solver and steps play no part; or any SDE in torchsde's protocol, with
            ``f``, ``g``, ``noise_type`` and ``sde_type``.
        x: images ``(N, C, H, W)`` in [0, 1]; for an SDE the first states ``(N, D)``.
        y: the images' labels ``(N,)``, for accuracies.
        solvers: names in `SOLVERS`; default all that solve this SDE.
        steps: steps a block (for an SDE: in the interval), powers of two.
        seed, index: name the paths.
        reference: solver and steps; default SRK (without noise ``ode:rk4``) at four times the finest steps, and where
            SRK does not fit another at sixteen times.
        gradients: also compare the gradient with respect to ``x``.
        interval: start and end of time, for an SDE; a network brings its own.

    Raises:
        ItoError: an SDE that lacks something, a solver that does not fit (those that do are named), or a reference
            that does not stay finite (block, time and solver named).
    """
    with torch.inference_mode(False):  # which would record no gradient
        x = recordable(x)
        keys = make_keys(seed, "report", index=image_names(index, x))
        if not isinstance(model, ItoResNet):
            if y is not None:
                raise ItoError("Labels y go with a network; an SDE has none.")
            return _compare(_Equation(model, x, keys, interval), solvers, steps, reference, gradients)
        with evaluating(model):
            labels = None if y is None else check_labels(recordable(y), len(x))
            return _compare(_Network(model, x, labels, keys), solvers, steps, reference, gradients)


def _compare(
    subject: _Network | _Equation,
    solvers: Sequence[str] | None,
    steps: Sequence[int],
    reference: tuple[str, int] | None,
    gradients: bool,
) -> SolverComparison:
    solvers = subject.solvers() if solvers is None else solvers
    reference = subject.reference(max(steps)) if reference is None else reference
    for name in (*solvers, reference[0]):
        for n in (*steps, reference[1]):
            subject.check(name, n)
    try:
        fine_state, fine, fine_gradient, _, _ = _measured(subject, *reference, gradients)
    except NotFinite as place:
        unit = "steps a block" if isinstance(subject, _Network) else "steps"
        raise ItoError(
            f"The reference, {reference[0]} at {reference[1]} {unit}, is not finite after {place}; "
            "choose another, or less noise."
        ) from None
    rows, orders = [], {}
    for solver in solvers:
        kept, squares = [], []
        for n in steps:
            try:
                state, out, gradient, seconds, memory = _measured(subject, solver, n, gradients)
            except NotFinite as place:
                rows.append(SolverRow(solver, n, subject.evaluations(solver, n), diverged=str(place)))
                continue
            distance = (state - fine_state).flatten(1).square().sum(1).double()
            if bool((distance > 0).all()):
                kept.append(n)
                squares.append(distance)
            rows.append(
                SolverRow(
                    solver,
                    n,
                    subject.evaluations(solver, n),
                    float(distance.sum().sqrt() / fine_state.norm()),
                    gradient_cosine=_cosine(gradient, fine_gradient),
                    seconds=seconds,
                    cost=seconds / subject.unit,
                    memory=memory,
                    **subject.errors(out, fine),
                )
            )
        orders[solver] = Slope(subject.theory(solver), *_fit(kept, squares))
    return SolverComparison(subject.name, subject.noise, subject.additive, reference, rows, orders)


def _fit(steps: list[int], squares: list[Tensor]) -> tuple[float | None, float | None]:
    """The slope of root mean squares of distances, each ``(N,)``, and its standard error."""
    if len(steps) < 3:
        return None, None
    fit = float(slope(steps, torch.stack([s.mean().sqrt() for s in squares])))
    count = min(16, len(squares[0]))
    if count < 2:
        return fit, None
    parts = [torch.stack([part.mean().sqrt() for part in s.tensor_split(count)]) for s in squares]
    return fit, float(slope(steps, torch.stack(parts, -1)).std()) / math.sqrt(count)


def _cosine(gradient: Tensor | None, fine: Tensor | None) -> float | None:
    if gradient is None or fine is None:
        return None
    return float(F.cosine_similarity(gradient.flatten(1), fine.flatten(1)).mean())


def _measured(
    subject: _Network | _Equation, solver: str, steps: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor | None, float, int]:
    """Last state, what is read from it, the input's gradient, the seconds of an inference, and bytes held."""
    with torch.no_grad():
        start = time.perf_counter()
        state, out = subject.solve(subject.x, solver, steps, False)
        _wait(state)
        seconds = time.perf_counter() - start
    gradient = None
    live = Live()
    if gradients:
        at = subject.x.detach().requires_grad_()
        with live:
            loss = subject.loss(subject.solve(at, solver, steps, steps > 1)[1])  # a fine grid's graph may not fit
            (gradient,) = torch.autograd.grad(loss, at)
    else:
        with live, torch.no_grad():
            subject.solve(subject.x, solver, steps, False)
    return state, out, gradient, seconds, live.peak


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize()
