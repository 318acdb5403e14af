"""Certificates of a whole split: batches are kept as they finish, and several processes share them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..attacks.fingerprints import fingerprint, fingerprint_choice
from ..attacks.images import Images
from ..data import Split
from ..distributed import ALONE, World
from ..files import write_atomically
from ..models.inspection import as_called
from ..models.voting import Voter
from ..validation import ItoError
from .certify import BATCH, COLUMNS, Certificate, Certifier, Sampling


@dataclass(frozen=True)
class CertifiedSplit:
    """Certificates of ``N`` images with their true labels.

    Attributes:
        certificate: of all images, in the split's order.
        truth: int64 ``(N,)``, the true labels.
        state: the folder of what is finished, if it was kept; `discard_state` deletes it.
    """

    certificate: Certificate
    truth: Tensor
    state: Path | None = field(default=None, repr=False)

    def discard_state(self) -> None:
        """Delete what was kept for a resumption."""
        if self.state is not None:
            shutil.rmtree(self.state, ignore_errors=True)


def certify_split(
    voter: Voter,
    split: Split,
    sampling: Sampling,
    batch_size: int = BATCH,
    state: str | Path | None = None,
    resume: bool = False,
    tick: Callable[[int], object] = lambda images: None,
    among: World = ALONE,
) -> CertifiedSplit:
    """Certify every image of a split.

    Args:
        voter: from `smoothed`.
        split: the images, such as ``load_data("digits").test.first(100)``.
        sampling: how each image is sampled; its sigma is the voter's.
        batch_size: images at a time; not in the result.
        state: a folder, such as that of the run. In it a folder of its own, named by the hash of settings, weights
            and images, keeps every finished batch.
        resume: take what is finished from there; otherwise it is deleted, and the work begins anew.
        tick: called after each batch with its number of images.
        among: the processes that share the batches; each gets the whole result.

    Raises:
        ItoError: there is nothing to resume, or a file of the state is damaged.
    """
    images = Images.of(split, batch_size, voter.device)
    folder = None if state is None else Path(state) / f"certify-{_digest(voter, images, sampling, batch_size)}"
    if among.first:
        _begin(folder, resume)
    among.barrier()
    parts = []
    with as_called(voter):
        certifier = Certifier(voter, sampling, images.x[:batch_size].to(voter.device))
        for number, batch in among.own(list(enumerate(images.batches(batch_size)))):
            file = None if folder is None else folder / f"{number:06d}.safetensors"
            part = None if file is None or not file.is_file() else _read(file, certifier.sampling, batch.index)
            if part is None:
                on_device = batch.to(voter.device)
                part = certifier.certify(on_device.x, on_device.index)
                if file is not None:
                    write_atomically(file, safetensors_bytes({name: getattr(part, name) for name in COLUMNS}))
            parts.append(part)
            tick(len(batch))
    certificate = Certificate.join(among.dealt(parts))
    among.check_complete(certificate.index, split)
    return CertifiedSplit(certificate, images.y, folder)


def _begin(folder: Path | None, resume: bool) -> None:
    """Make the state's folder ready.

    Raises:
        ItoError: there is nothing to resume.
    """
    if resume and (folder is None or not folder.is_dir()):
        raise ItoError(
            "There is nothing to resume: no work with these settings, weights and images was interrupted here; "
            "leave --resume out."
        )
    if folder is not None and not resume:
        shutil.rmtree(folder, ignore_errors=True)


def _read(file: Path, sampling: Sampling, index: Tensor) -> Certificate:
    """A finished batch.

    Raises:
        ItoError: the file is damaged.
    """
    try:
        part = Certificate(sampling, **tensors_from_bytes(file.read_bytes()))
        if torch.equal(part.index, index):
            return part
    except (SafetensorError, TypeError):
        pass
    raise ItoError(f"{str(file)!r} is damaged; delete it, and resume.")


def _digest(voter: Voter, images: Images, sampling: Sampling, batch_size: int) -> str:
    """What names the state: another model, other images or other settings have another state."""
    choice = fingerprint_choice(images.index, images.y, images.x)
    content = [asdict(sampling), batch_size, len(voter.members), fingerprint(voter), choice]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
