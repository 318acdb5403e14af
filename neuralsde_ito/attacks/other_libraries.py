"""Attacks of other libraries on an unchanged ensemble, where they are installed; their results are judged like ours."""

from __future__ import annotations

import importlib.util
import itertools
import warnings

import torch
from torch import Tensor, nn

from ..models.ensemble import ItoEnsemble
from ..models.inspection import as_called
from ..models.vote import Vote
from ..models.voting import Voter
from ..noise.keys import fresh_keys
from ..validation import ItoError, one_of
from .base import AttackResult
from .panels import right_share

PEERS = {"foolbox": "foolbox", "torchattacks": "torchattacks", "autoattack": "pyautoattack"}  # name -> package


class OnePath(nn.Module):
    """A voter as other libraries see it: every call draws one fresh path of the next member, and is counted.

    A stranger's module keeps its modes: it is no submodule of this one, and a library's ``eval()`` does not reach it.

    Attributes:
        inferences: of single images, made so far.
        gradients: how many of these were differentiated.
    """

    def __init__(self, ensemble: Voter) -> None:
        super().__init__()
        self.noisy = ensemble.noisy
        self._module = (ensemble.module,) if isinstance(ensemble, Vote) else None
        if isinstance(ensemble, ItoEnsemble):
            self.ensemble = ensemble.quick()
        self.inferences = self.gradients = 0
        self._members = itertools.cycle(range(len(ensemble.members)))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``; without noise the members' mean logits."""
        self.inferences += len(x)
        if self._module is not None:
            logits = self._module[0](x)
        elif self.noisy:
            logits = self.ensemble.members[next(self._members)](x, fresh_keys(len(x), x.device))
        else:
            logits = torch.stack([m(x, fresh_keys(len(x), x.device)) for m in self.ensemble.members]).mean(0)
        if logits.requires_grad:
            logits.register_hook(self._count_gradients)
        return logits

    def _count_gradients(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)


def check_peer(name: str, norm: str = "linf") -> None:
    """Refuse a library that is unknown, not installed, or has no attack under this norm.

    Raises:
        ItoError: the message says how to install it, or which libraries have one.
    """
    one_of("peer", name, PEERS)
    if (name, norm) == ("torchattacks", "l1"):
        raise ItoError("torchattacks has no attack under l1: take foolbox or autoattack.")
    if importlib.util.find_spec(PEERS[name]) is None:
        raise ItoError(f"{PEERS[name]} is not installed: pip install 'ito-sde[peers]'.")


def peer_attack(name: str, ensemble: Voter, x: Tensor, y: Tensor, norm: str, eps: float) -> AttackResult:
    """Attack by another library; every call of the model draws one fresh path.

    ``foolbox``: its PGD (40 or 50 steps; without EOT). ``torchattacks``: EOTPGD with 100 steps of 20 paths (L-inf) or
    PGDL2; none under L1. ``autoattack``: pyautoattack's ``rand`` for a randomised ensemble, else ``standard``.

    Args:
        name: of the library, one of `PEERS`.
        ensemble: the defender.
        x, y: as in `Attack.run`.
        norm: a name in `BALLS`.
        eps: radius in pixel units.

    Raises:
        ItoError: the library is unknown or not installed.
    """
    check_peer(name, norm)
    attack = {"foolbox": _foolbox, "torchattacks": _torchattacks, "autoattack": _autoattack}[name]
    ensemble.observe(x)
    model = OnePath(ensemble).eval()
    with warnings.catch_warnings(), as_called(ensemble):
        warnings.simplefilter("ignore")
        images = attack(model, x, y, norm, eps).detach()
        queries, gradients = model.inferences - model.gradients, model.gradients
        with torch.no_grad():
            fooled = right_share(torch.stack([model(images) for _ in range(20 if model.noisy else 1)]), y) <= 0.5
    return AttackResult(images, fooled, queries, gradients, torch.zeros_like(fooled))


def _foolbox(model: OnePath, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    import foolbox

    attack = getattr(foolbox.attacks, {"linf": "LinfPGD", "l2": "L2PGD", "l1": "SparseL1DescentAttack"}[norm])()
    return attack(foolbox.PyTorchModel(model, (0, 1), device=x.device), x, y, epsilons=eps)[1]


def _torchattacks(model: OnePath, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    import torchattacks

    if norm == "linf":
        return torchattacks.EOTPGD(model, eps=eps, alpha=2.5 * eps / 100, steps=100, eot_iter=20)(x, y)
    return torchattacks.PGDL2(model, eps=eps, alpha=2.5 * eps / 100, steps=100)(x, y)


def _autoattack(model: OnePath, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    import pyautoattack

    kind, spelling = "rand" if model.noisy else "standard", {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    attack = pyautoattack.AutoAttack(model, eps=eps, norm=spelling, version=kind, seed=0, device=x.device)
    return attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
