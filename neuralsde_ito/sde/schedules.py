"""Diffusion schedules: how much noise enters at which time (paper, section 3: sigma(t) = omega / (1 + t))."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from ..validation import ItoError, nearest

# name -> (is the noise a function of time?, is it multiplied by the state?)
SCHEDULES: dict[str, tuple[bool, bool]] = {
    "inverse-time": (True, False),
    "constant": (False, False),
    "multiplicative": (True, True),
    "constant-multiplicative": (False, True),
}


@dataclass(frozen=True)
class Schedule:
    """The diagonal diffusion ``g(t, x)`` of the Itô process, one of `SCHEDULES`.

    ===========================  =======================  =========================================
    name                         g(t, x)                  noise
    ===========================  =======================  =========================================
    ``inverse-time``             omega / (1 + t)          additive; the paper's
    ``constant``                 omega                    additive
    ``multiplicative``           omega / (1 + t) * x      multiplicative: Milstein differs from Euler
    ``constant-multiplicative``  omega * x                multiplicative: geometric Brownian motion
    ===========================  =======================  =========================================

    ``omega`` is in units of the state per square root of time (one unit of time is one block), or,
    for multiplicative noise, of the state itself.

    Raises:
        ItoError: the name is not known, or omega is negative or not a finite number.
    """

    omega: float
    name: str = "inverse-time"

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ItoError(nearest("schedule", self.name, SCHEDULES))
        if isinstance(self.omega, bool) or not isinstance(self.omega, Real):
            raise ItoError(f"omega must be a number, got {self.omega!r}.")
        if not isinstance(self.omega, (int, float)):
            object.__setattr__(self, "omega", float(self.omega))  # numpy's
        if not math.isfinite(self.omega) or self.omega < 0:
            raise ItoError(f"omega must be finite and at least 0, got {self.omega}.")

    @property
    def multiplicative(self) -> bool:
        """Whether the noise is multiplied by the state; else it is additive."""
        return SCHEDULES[self.name][1]

    def sigma(self, t: float) -> float:
        """The factor that depends on time alone, at time ``t`` (in blocks, from 0)."""
        return self.omega / (1.0 + float(t)) if SCHEDULES[self.name][0] else self.omega

    def g(self, t: float | Tensor, x: Tensor) -> Tensor:
        """The diagonal of the diffusion at time ``t`` and state ``x``; the shape of ``x``."""
        sigma = self.sigma(float(t))
        return x * sigma if self.multiplicative else x.new_full((), sigma).expand_as(x)
