"""What was attacked, as SHA-256 digests: an ensemble, a split of data, and the images chosen from it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..data import Split
from ..models.recast import ItoResNet
from ..models.voting import Voter


def fingerprint(voter: Voter) -> str:
    """SHA-256 of all that a member computes with: weights, buffers (normalisation too), noise, solver and steps.

    Of a stranger's module it covers weights, buffers, modes and the classes of its parts, but not their code.
    """
    digest = hashlib.sha256()
    for member in voter.members:
        kinds = [type(module).__name__ for module in member.modules()]
        if isinstance(member, ItoResNet):
            schedule, times = member.schedule, [(sde.t0, sde.t1, sde.jump) for sde in member.sdes]
            noise = [member.input_sigma] if member.input_sigma else []  # left out at 0: older fingerprints stay valid
            about = repr((schedule.omega, schedule.name, member.solver, member.steps, times, kinds, *noise))
        else:
            about = repr([(kind, module.training) for kind, module in zip(kinds, member.modules(), strict=True)])
        digest.update(about.encode())
        for name, value in sorted([*member.named_parameters(), *member.named_buffers()], key=lambda pair: pair[0]):
            content = value.detach().cpu().contiguous().view(torch.uint8) if value.dim() else value.detach().cpu()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + content.numpy().tobytes())
    return digest.hexdigest()


def fingerprint_split(split: Split) -> str:
    """SHA-256 of a whole split's size, names and labels, from which a choice of images is drawn."""
    names = torch.arange(len(split), device="cpu") if split.names is None else split.names
    return _digest(names, split.labels)


def fingerprint_choice(index: Tensor, y: Tensor, x: Tensor) -> str:
    """SHA-256 of the names and labels ``(N,)`` and pixels ``(N, C, H, W)`` of the chosen images.

    Pixels count in steps of 1/65,535, so that the last bit of a division by 255 does not matter.
    """
    return _digest(index, y, (x.cpu().double() * 65535).round())


def _digest(*columns: Tensor) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(repr(tuple(column.shape)).encode() + column.cpu().long().contiguous().numpy().tobytes())
    return digest.hexdigest()
