"""Attacks of other libraries on an ensemble as it is, where they are installed; judged like ours."""

from __future__ import annotations

import importlib.util
import itertools
import warnings

import torch
from torch import Tensor, nn

from ..models.ensemble import ItoEnsemble
from ..noise.keys import fresh_keys
from ..validation import ItoError, nearest
from .base import AttackResult
from .panels import right_share

PEERS = {"foolbox": "foolbox", "torchattacks": "torchattacks", "autoattack": "pyautoattack"}  # name -> package


class OnePath(nn.Module):
    """An ensemble as other libraries see it: every call one fresh path of the next member, counted.

    Attributes:
        forwards, backwards: images that went through, and gradients that came back of them.
    """

    def __init__(self, ensemble: ItoEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble.quick()
        self.noisy = ensemble.noisy
        self.forwards = self.backwards = 0
        self._turn = itertools.cycle(range(len(ensemble.members)))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``; without noise the members' mean logits."""
        self.forwards += len(x)
        if self.noisy:
            logits = self.ensemble.members[next(self._turn)](x, fresh_keys(len(x), x.device))
        else:
            logits = torch.stack([m(x, fresh_keys(len(x), x.device)) for m in self.ensemble.members]).mean(0)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def check_peer(name: str) -> None:
    """Refuse a library that is unknown or not installed.

    Raises:
        ItoError: with the mend.
    """
    if name not in PEERS:
        raise ItoError(nearest("peer", name, PEERS))
    if importlib.util.find_spec(PEERS[name]) is None:
        raise ItoError(f"{PEERS[name]} is not installed: pip install 'ito-sde[peers]'.")


def peer_attack(name: str, ensemble: ItoEnsemble, x: Tensor, y: Tensor, norm: str, eps: float) -> AttackResult:
    """Attack by another library.

    ``foolbox``: its PGD (40 or 50 steps; without EOT). ``torchattacks``: EOTPGD with 100 steps of 20 paths (L-inf) or
    PGDL2. ``autoattack``: pyautoattack's ``rand`` for a randomised ensemble, else ``standard``. One fresh path a call.

    Raises:
        ItoError: the library is unknown or not installed.
    """
    check_peer(name)
    model = OnePath(ensemble).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "foolbox":
            import foolbox

            attack = foolbox.attacks.LinfPGD() if norm == "linf" else foolbox.attacks.L2PGD()
            images = attack(foolbox.PyTorchModel(model, (0, 1), device=x.device), x, y, epsilons=eps)[1]
        elif name == "torchattacks":
            import torchattacks

            if norm == "linf":
                images = torchattacks.EOTPGD(model, eps=eps, alpha=2.5 * eps / 100, steps=100, eot_iter=20)(x, y)
            else:
                images = torchattacks.PGDL2(model, eps=eps, alpha=2.5 * eps / 100, steps=100)(x, y)
        else:
            import pyautoattack

            kind, spelling = "rand" if model.noisy else "standard", {"linf": "Linf", "l2": "L2"}[norm]
            attack = pyautoattack.AutoAttack(model, eps=eps, norm=spelling, version=kind, seed=0, device=x.device)
            images = attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
    images = images.detach()
    forwards, backwards = model.forwards - model.backwards, model.backwards
    with torch.no_grad():
        fooled = right_share(torch.stack([model(images) for _ in range(20 if model.noisy else 1)]), y) <= 0.5
    return AttackResult(images, fooled, forwards, backwards, torch.zeros_like(fooled))
