"""Attacks on decisions under L-inf and L2: with gradients through the solver's own steps, or without gradients."""

from __future__ import annotations

from ..validation import parse_eps
from .active import ActiveSet
from .apgd import APGD
from .base import Attack, AttackResult
from .minimal_norm import SmallestPerturbations, decision_based, minimal_norm
from .norms import BALLS
from .objectives import OBJECTIVES
from .pgd import PGD, PRESETS, fgsm, pgd
from .precision import PrecisionTrial, try_precisions
from .square import Square

__all__ = [  # noqa: RUF022  (in the order of reading)
    "BALLS", "parse_eps", "OBJECTIVES", "Attack", "AttackResult", "ActiveSet", "PGD", "PRESETS", "pgd", "fgsm", "APGD",
    "Square", "minimal_norm", "decision_based", "SmallestPerturbations",
    "try_precisions", "PrecisionTrial",
]  # fmt: skip
