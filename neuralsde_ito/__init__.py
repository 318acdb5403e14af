"""Trained ResNets as ensembles of Itô processes: recast, solve, fine-tune, attack, and report honestly."""

from . import attacks
from .checkpoints import load_ensemble, save_ensemble
from .config import Config, load_config
from .data import load_data
from .ensemble import ItoEnsemble, Prediction, decide
from .noise import BrownianPath, make_keys, normals
from .outcomes import ABSTAIN, Outcomes, Paired, Rate
from .recast import Chain, ItoResNet, recast
from .resnets import ARCHITECTURES, Normalize, load_resnet
from .schedules import SCHEDULES, Schedule
from .sde import BlockSDE
from .solvers import SOLVERS, Solver, integrate

__all__ = [
    "ABSTAIN",
    "ARCHITECTURES",
    "SCHEDULES",
    "SOLVERS",
    "BlockSDE",
    "BrownianPath",
    "Chain",
    "Config",
    "ItoEnsemble",
    "ItoResNet",
    "Normalize",
    "Outcomes",
    "Paired",
    "Prediction",
    "Rate",
    "Schedule",
    "Solver",
    "attacks",
    "decide",
    "integrate",
    "load_config",
    "load_data",
    "load_ensemble",
    "load_resnet",
    "make_keys",
    "normals",
    "recast",
    "save_ensemble",
]
