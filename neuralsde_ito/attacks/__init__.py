"""Attacks on decisions under L-inf and L2, with gradients through the solver as it stepped, or with none."""

from .apgd import APGD
from .attempts import Attack, Attacked
from .ball import BALLS, parse_eps
from .objective import OBJECTIVES
from .pgd import PGD, PRESETS, fgsm, pgd
from .square import Square

__all__ = ["APGD", "BALLS", "OBJECTIVES", "PGD", "PRESETS", "Attack", "Attacked", "Square", "fgsm", "parse_eps", "pgd"]
