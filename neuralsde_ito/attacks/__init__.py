"""Attacks on decisions: FGSM and PGD under L-inf and L2, with gradients through the solver as it stepped."""

from .ball import BALLS, parse_eps
from .objective import OBJECTIVES
from .pgd import PGD, PRESETS, Attacked, fgsm, pgd

__all__ = ["BALLS", "OBJECTIVES", "PGD", "PRESETS", "Attacked", "fgsm", "parse_eps", "pgd"]
