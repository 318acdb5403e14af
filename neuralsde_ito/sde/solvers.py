"""The table of solvers: what each solves, its strong order and what a step costs."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from ..validation import ItoError, nearest


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
