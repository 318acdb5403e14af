"""The table of solvers: which equations each one solves, its order, and what a step costs.

`integrate` takes a state through a block by an entry of this table. The command line reads the names for its help, so
this file imports no torch.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..validation import ItoError, one_of

Figure = TypeVar("Figure", int, float)


@dataclass(frozen=True)
class ByNoise(Generic[Figure]):
    """A figure of a solver for additive and for multiplicative noise."""

    additive: Figure
    multiplicative: Figure

    def given(self, *, multiplicative: bool) -> Figure:
        """The figure for noise of this kind."""
        return self.multiplicative if multiplicative else self.additive


@dataclass(frozen=True)
class Solver:
    """An entry of the table.

    Attributes:
        library: who runs it: ``native`` (a function in `integrate.NATIVE`), ``torchsde`` or ``torchdiffeq``.
        method: its name there.
        order: strong order; for an ODE the classical order.
        evaluations: drift evaluations a step; 0 if the steps are adaptive.
        forms: the forms of the equation that it solves: ``ito``, ``stratonovich`` or ``ode`` (an equation without
            noise). A block is given to it in the first one.
        additive_view: whether it has a cheaper method for noise that is declared additive (`AdditiveView`).
        slope_without_noise: whether, under additive noise, the derivative of one step is the same without the noise;
            checkpointing leaves the noise out then.
        any_sde: whether torchsde has this method for a user's own SDE (see `solvers_for`).
        needs_levy_areas: whether it would need Lévy areas for noise that does not commute; no path here has them.
        same_as: the entry that has the same method and is run by another library; that entry stands for both.
        initial_evaluations: drift evaluations before the first step of a block; if there are any, a block cannot be
            cut between steps.
        adaptive: whether it chooses its own steps, for the whole batch at once.
    """

    library: str
    method: str
    order: ByNoise[float]
    evaluations: ByNoise[int]
    forms: tuple[str, ...] = ("ito",)
    additive_view: bool = False
    slope_without_noise: bool = False
    any_sde: bool = False
    needs_levy_areas: bool = False
    same_as: str = ""
    initial_evaluations: int = 0
    adaptive: bool = False

    @property
    def form(self) -> str:
        """The form in which a block is given to this solver."""
        return self.forms[0]


def _ode(method: str, order: float, evaluations: int) -> Solver:
    return Solver(
        "torchdiffeq",
        method,
        ByNoise(order, order),
        ByNoise(evaluations, evaluations),
        forms=("ode",),
        adaptive=evaluations == 0,
    )


_STRATONOVICH = ("stratonovich",)

# A method of our own is one more entry, with its function in `integrate.NATIVE`, without `any_sde` and `same_as`.
# Each entry: library, method, ByNoise(additive, multiplicative) of the order and of the evaluations, forms.
# Orders: Kloeden & Platen 1992 (Euler, Milstein), Rössler 2010 (SRK: SRA1 and SRID2), torchsde's own
# declarations for the Stratonovich methods. Diagonal noise commutes, so order 1 needs no Lévy areas.
SOLVERS: dict[str, Solver] = {
    "euler": Solver("native", "euler", ByNoise(1.0, 0.5), ByNoise(1, 1), slope_without_noise=True, any_sde=True),
    "torchsde:euler": Solver("torchsde", "euler", ByNoise(1.0, 0.5), ByNoise(1, 1), same_as="euler"),
    "milstein": Solver(
        "torchsde",
        "milstein",
        ByNoise(1.0, 1.0),
        ByNoise(1, 1),
        forms=("ito", "stratonovich"),
        any_sde=True,
        needs_levy_areas=True,
    ),
    "srk": Solver(
        "torchsde",
        "srk",
        ByNoise(1.5, 1.5),
        ByNoise(3, 10),
        additive_view=True,
        any_sde=True,
        needs_levy_areas=True,
    ),
    "heun": Solver("torchsde", "heun", ByNoise(1.0, 1.0), ByNoise(2, 2), _STRATONOVICH, any_sde=True),
    "midpoint": Solver("torchsde", "midpoint", ByNoise(1.0, 1.0), ByNoise(2, 2), _STRATONOVICH, any_sde=True),
    "euler_heun": Solver("torchsde", "euler_heun", ByNoise(1.0, 1.0), ByNoise(1, 1), _STRATONOVICH, any_sde=True),
    "reversible_heun": Solver(
        "torchsde",
        "reversible_heun",
        ByNoise(1.0, 0.5),
        ByNoise(1, 1),
        _STRATONOVICH,
        any_sde=True,
        initial_evaluations=1,
    ),
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
    return SOLVERS[one_of("solver", name, SOLVERS)]


def solvers_for(noise_type: str, sde_type: str) -> list[str]:
    """Names of the solvers for a user's own SDE in torchsde's protocol.

    Args:
        noise_type: ``diagonal``, ``additive``, ``scalar`` or ``general``.
        sde_type: ``ito`` or ``stratonovich``.
    """
    return [
        name
        for name, solver in SOLVERS.items()
        if solver.any_sde and sde_type in solver.forms and not (noise_type == "general" and solver.needs_levy_areas)
    ]


def check_solver(name: str, omega: float, steps: int) -> None:
    """Refuse what cannot be solved: an unknown solver, an ODE method under noise, steps that are no power of two.

    Raises:
        ItoError: with the value it saw and how to mend it.
    """
    if find_solver(name).form == "ode" and omega != 0:
        raise ItoError(f"{name!r} solves the ODE, without noise: it needs omega = 0, got {omega}.")
    number = 0 if isinstance(steps, bool) or not hasattr(steps, "__index__") else operator.index(steps)
    if number < 1 or number & (number - 1) or number > 1 << 20:
        raise ItoError(f"steps a block must be a power of two from 1 to {1 << 20}, got {steps!r}.")
