"""Diffusion schedules: how much noise enters at which time (paper, section 3: sigma(t) = omega / (1 + t)).

The command line reads the names for its help, so this file imports torch for type checkers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from ..validation import ItoError, one_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Law:
    """One kind of diffusion.

    Attributes:
        formula: of ``sigma``, as text.
        sigma: the factor that depends on time alone: ``(omega, t) -> sigma``.
        multiplicative: whether the noise is multiplied by the state, ``g(t, x) = sigma(t) x``; otherwise it is
            additive, ``g(t, x) = sigma(t)``.
    """

    formula: str
    sigma: Callable[[float, float], float]
    multiplicative: bool = False


def _inverse_time(omega: float, t: float) -> float:
    return omega / (1.0 + t)


def _constant(omega: float, t: float) -> float:
    return omega


# A new sigma(t) is one more entry. (Closed forms in studies/problems.py hold for these.)
SCHEDULES: dict[str, Law] = {
    "inverse-time": Law("omega / (1 + t)", _inverse_time),  # the paper's
    "constant": Law("omega", _constant),
    "multiplicative": Law("omega / (1 + t)", _inverse_time, multiplicative=True),  # Milstein differs from Euler
    "constant-multiplicative": Law("omega", _constant, multiplicative=True),  # geometric Brownian motion
}


@dataclass(frozen=True)
class Schedule:
    """The diagonal diffusion ``g(t, x)`` of the Itô process: a law of `SCHEDULES` and its strength.

    ``omega`` is in units of the state per square root of time (one unit of time is one block), or,
    for multiplicative noise, of the state itself.

    Raises:
        ItoError: the name is not known, or omega is negative or not a finite number.
    """

    omega: float
    name: str = "inverse-time"

    def __post_init__(self) -> None:
        one_of("schedule", self.name, SCHEDULES)
        if isinstance(self.omega, bool) or not isinstance(self.omega, Real):
            raise ItoError(f"omega must be a number, got {self.omega!r}.")
        if not isinstance(self.omega, (int, float)):
            object.__setattr__(self, "omega", float(self.omega))  # a number of numpy's
        if not math.isfinite(self.omega) or self.omega < 0:
            raise ItoError(f"omega must be finite and at least 0, got {self.omega}.")

    @property
    def multiplicative(self) -> bool:
        """Whether the noise is multiplied by the state; otherwise it is additive."""
        return SCHEDULES[self.name].multiplicative

    @property
    def formula(self) -> str:
        """``g(t, x)`` as text, with the value of omega: ``"0.2 / (1 + t)"``, ``"0.2 * x"``."""
        sigma = SCHEDULES[self.name].formula.replace("omega", f"{self.omega:g}")
        return f"{sigma} * x" if self.multiplicative else sigma

    def sigma(self, t: float) -> float:
        """The factor that depends on time alone, at time ``t`` (in blocks, from 0)."""
        return SCHEDULES[self.name].sigma(self.omega, float(t))

    def g(self, t: float | Tensor, x: Tensor) -> Tensor:
        """The diagonal of the diffusion at time ``t`` and state ``x``; the shape of ``x``."""
        sigma = self.sigma(float(t))
        return x * sigma if self.multiplicative else x.new_full((), sigma).expand_as(x)
