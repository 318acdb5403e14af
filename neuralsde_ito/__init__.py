"""Trained ResNets as ensembles of Itô processes: recast, solve, fine-tune, attack, and report honestly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attacks
    from .attacks.suite import Suite, SuiteResult, standard
    from .attacks.suite_run import SuiteSettings, run_suite
    from .attacks.sweep import least_norm
    from .audits.audit import Audit, audit
    from .audits.bundle import Evidence, evidence_of, load_bundle, save_bundle, suite_of
    from .audits.check import Check
    from .audits.verify import Verification, verify_bundle
    from .certificates.certify import Certificate, certify
    from .data import load_data
    from .models.ensemble import ItoEnsemble
    from .models.module_checks import ModelCheck, check_model
    from .models.recast import Chain, ItoResNet, recast
    from .models.resnets import ARCHITECTURES, Normalize, load_resnet
    from .models.vote import Vote
    from .models.votes import decide
    from .models.voting import Prediction
    from .noise.brownian import BrownianPath
    from .noise.keys import PathRange, make_keys
    from .noise.normals import normals
    from .outcomes import ABSTAIN, Outcomes, Paired, Rate, WorstCase
    from .runs.config import Config, load_config
    from .runs.frontier import Frontier, read_frontier
    from .runs.run import Run, load_ensemble
    from .runs.storing import save_ensemble
    from .sde.block import BlockSDE
    from .sde.integrate import integrate
    from .sde.schedules import SCHEDULES, Schedule
    from .sde.solvers import SOLVERS, Solver
    from .studies.compare import SolverComparison, compare_solvers
    from .studies.density import DensityShift, density_shift
    from .studies.depth import Reading, read_depths
    from .validation import ItoError

# The public names and where they live. Imported at first use: the command line is a part of this package, and
# its help should not wait for torch.
_HOMES = {
    "attacks": ("attacks",),
    "audits.audit": ("Audit", "audit"),
    "audits.bundle": ("Evidence", "evidence_of", "load_bundle", "save_bundle", "suite_of"),
    "audits.check": ("Check",),
    "certificates.certify": ("Certificate", "certify"),
    "runs.run": ("Run", "load_ensemble"),
    "runs.frontier": ("Frontier", "read_frontier"),
    "runs.storing": ("save_ensemble",),
    "studies.compare": ("SolverComparison", "compare_solvers"),
    "runs.config": ("Config", "load_config"),
    "data": ("load_data",),
    "studies.density": ("DensityShift", "density_shift"),
    "studies.depth": ("Reading", "read_depths"),
    "models.ensemble": ("ItoEnsemble",),
    "models.vote": ("Vote",),
    "models.module_checks": ("ModelCheck", "check_model"),
    "models.voting": ("Prediction",),
    "noise.brownian": ("BrownianPath",),
    "noise.keys": ("PathRange", "make_keys"),
    "noise.normals": ("normals",),
    "outcomes": ("ABSTAIN", "Outcomes", "Paired", "Rate", "WorstCase"),
    "models.recast": ("Chain", "ItoResNet", "recast"),
    "models.resnets": ("ARCHITECTURES", "Normalize", "load_resnet"),
    "sde.schedules": ("SCHEDULES", "Schedule"),
    "sde.block": ("BlockSDE",),
    "sde.solvers": ("SOLVERS", "Solver"),
    "sde.integrate": ("integrate",),
    "attacks.suite": ("Suite", "SuiteResult", "standard"),
    "attacks.suite_run": ("SuiteSettings", "run_suite"),
    "attacks.sweep": ("least_norm",),
    "validation": ("ItoError",),
    "audits.verify": ("Verification", "verify_bundle"),
    "models.votes": ("decide",),
}
_MODULE_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  (in the order of reading)
    "load_resnet", "Normalize", "ARCHITECTURES", "Chain", "recast", "ItoResNet", "BlockSDE", "Schedule",
    "SCHEDULES", "Solver", "SOLVERS", "integrate", "BrownianPath", "normals", "make_keys", "PathRange",
    "ItoEnsemble", "Vote", "Prediction", "decide", "ABSTAIN", "check_model", "ModelCheck",
    "Outcomes", "Rate", "Paired", "WorstCase", "attacks",
    "SuiteSettings", "run_suite", "Suite", "SuiteResult", "standard", "least_norm", "audit", "Audit", "Check",
    "Evidence", "evidence_of", "save_bundle", "load_bundle", "suite_of", "verify_bundle", "Verification",
    "certify", "Certificate",
    "load_data", "Config", "load_config", "Run", "save_ensemble", "load_ensemble", "read_frontier", "Frontier",
    "compare_solvers", "SolverComparison", "read_depths", "Reading", "density_shift", "DensityShift",
    "ItoError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_MODULE_OF[name]}", __name__)
    globals()[name] = value = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
