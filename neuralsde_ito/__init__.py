"""Trained ResNets as ensembles of Itô processes: recast, solve, fine-tune, attack, and report honestly."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attacks
    from .audit import Audit, audit
    from .bundle import Evidence, load_bundle, save_bundle
    from .checking import Check
    from .checkpoints import load_ensemble, save_ensemble
    from .comparison import SolverComparison, compare_solvers
    from .config import Config, load_config
    from .data import load_data
    from .depth import Reading, read_depths
    from .ensemble import ItoEnsemble, Prediction
    from .noise import BrownianPath, make_keys, normals
    from .outcomes import ABSTAIN, Outcomes, Paired, Rate, WorstCase
    from .recast import Chain, ItoResNet, recast
    from .resnets import ARCHITECTURES, Normalize, load_resnet
    from .schedules import SCHEDULES, Schedule
    from .sde import BlockSDE
    from .solvers import SOLVERS, Solver, integrate
    from .suite import Suite, least_norm, standard
    from .validation import ItoError
    from .verification import Verification, verify_bundle
    from .votes import decide

# The public names and where they live. Imported at first use: the command line is a part of this package, and
# its help should not wait for torch.
_HOMES = {
    "attacks": ("attacks",),
    "audit": ("Audit", "audit"),
    "bundle": ("Evidence", "load_bundle", "save_bundle"),
    "checking": ("Check",),
    "checkpoints": ("load_ensemble", "save_ensemble"),
    "comparison": ("SolverComparison", "compare_solvers"),
    "config": ("Config", "load_config"),
    "data": ("load_data",),
    "depth": ("Reading", "read_depths"),
    "ensemble": ("ItoEnsemble", "Prediction"),
    "noise": ("BrownianPath", "make_keys", "normals"),
    "outcomes": ("ABSTAIN", "Outcomes", "Paired", "Rate", "WorstCase"),
    "recast": ("Chain", "ItoResNet", "recast"),
    "resnets": ("ARCHITECTURES", "Normalize", "load_resnet"),
    "schedules": ("SCHEDULES", "Schedule"),
    "sde": ("BlockSDE",),
    "solvers": ("SOLVERS", "Solver", "integrate"),
    "suite": ("Suite", "least_norm", "standard"),
    "validation": ("ItoError",),
    "verification": ("Verification", "verify_bundle"),
    "votes": ("decide",),
}
_PLACE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  (in the order of reading)
    "load_resnet", "Normalize", "ARCHITECTURES", "Chain", "recast", "ItoResNet", "BlockSDE", "Schedule", "SCHEDULES",
    "Solver", "SOLVERS", "integrate", "BrownianPath", "normals", "make_keys", "ItoEnsemble", "Prediction", "decide",
    "ABSTAIN", "Outcomes", "Rate", "Paired", "WorstCase", "attacks", "Suite", "standard", "least_norm", "audit",
    "Audit", "Check", "Evidence", "save_bundle", "load_bundle", "verify_bundle", "Verification", "load_data", "Config",
    "load_config", "save_ensemble", "load_ensemble", "compare_solvers", "SolverComparison", "read_depths", "Reading",
    "ItoError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_PLACE[name]}", __name__)
    globals()[name] = value = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """``ito.recast`` is the function: importing the module of that name must not bind the module over it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and _PLACE.get(name) == name and name != "attacks"):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
