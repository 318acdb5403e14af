"""Evidence of an attack: a folder with which anybody can check its figures.

``images.safetensors`` holds the images before and after, ``records.json`` what is claimed of every one of them,
``summary.json`` the figures. Whoever has the ensemble lets it vote again, on noise that the claims have never met.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .attacks.ball import BALLS, check_eps
from .checkpoints import sync_folder, write_atomically
from .data import check_images
from .outcomes import ABSTAIN, Outcomes
from .validation import ItoError, nearest

IMAGES, RECORDS, SUMMARY = "images.safetensors", "records.json", "summary.json"
FORMAT = 1
SURVIVED, WRONG = -1, -2  # winners that are no attack: there was none, or none was needed
_NO_ATTACK = {SURVIVED: "(survived)", WRONG: "(wrong without attack)"}
_THREAT = {"linf": "Linf", "l2": "L2"}  # RobustBench's spelling
ROUNDING = 1e-6  # of float32, in pixel units: added to eps, and between an original and the data set's image
_LEVEL = 0.01  # of the paired test


class Altered(ItoError):
    """A bundle's files are not those that were written together."""


@dataclass(frozen=True)
class Evidence:
    """What an attack claims of ``N`` images.

    Attributes:
        norm, eps: the ball, a name in `BALLS`; eps in pixel units.
        attacks: names in the order in which they ran, no two alike.
        index: int64 ``(N,)``, the images' names in the noise's address, no two alike.
        truth, clean, labels: int64 ``(N,)``: true labels, those decided without attack and under it (`ABSTAIN` = -1).
        winner: int64 ``(N,)``, number in ``attacks`` of the one that made the image fall; -1 survived, -2 wrong
            without attack.
        originals, images: float32 ``(N, C, H, W)`` in [0, 1], before and after; the original where none was needed.
        forwards, backwards: model evaluations of each attack, without and with a gradient.
        votes: int64 ``(members, N, classes)``, of the report that decided ``labels``.
        seed: of the noise.
        noise: the noise model; ``fresh`` is the one that can be verified.
        command: as it was typed.
        config: whatever else is to be kept, as JSON has it. Read here: ``data`` (the data set's name, or a mapping
            with ``name``); read by ``ito-sde verify``: ``run`` (its path) and ``vote`` (``inferences``, ``rule``).
    """

    norm: str
    eps: float
    attacks: tuple[str, ...]
    index: Tensor
    truth: Tensor
    clean: Tensor
    labels: Tensor
    winner: Tensor
    originals: Tensor
    images: Tensor
    forwards: tuple[int, ...]
    backwards: tuple[int, ...]
    votes: Tensor
    seed: int
    noise: str = "fresh"
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def save_bundle(folder: str | Path, evidence: Evidence) -> None:
    """Write a bundle, the whole folder or nothing.

    Args:
        folder: new or empty; evidence is never written over.
        evidence: on any device.

    Raises:
        ItoError: a folder that holds something; shapes or values that do not fit, images outside the ball or
            outside [0, 1], a config that is not JSON.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ItoError(f"The folder {str(folder)!r} is not empty; a bundle is never written over.")
    check_evidence(evidence)
    check_images(evidence.originals)
    check_images(evidence.images)
    norms = norms_of(evidence)
    if not float(norms.amax()) <= evidence.eps + ROUNDING:
        raise ItoError(
            f"A perturbation has the {evidence.norm} norm {float(norms.amax()):g}, more than eps {evidence.eps:g}."
        )
    tensors = {name: getattr(evidence, name).detach().cpu().contiguous() for name in ("originals", "images")}
    content = safetensors_bytes(tensors)
    files = {
        IMAGES: content,
        RECORDS: _records(evidence, norms, hashlib.sha256(content).hexdigest()).encode(),
        SUMMARY: (json.dumps(_summary(evidence), indent=2, ensure_ascii=False) + "\n").encode(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, content in files.items():
            write_atomically(building / name, content)
        building.chmod(0o755)
        building.replace(folder)  # a rename: before it there is no bundle of this name, after it a whole one
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def load_bundle(folder: str | Path) -> Evidence:
    """Read a bundle back, bit for bit, onto the CPU. Tensors and JSON only: nothing in it is run.

    That images are inside the ball is for `verify_bundle` to say.

    Raises:
        Altered: the images are not those of the records' SHA-256, or the summary does not follow from the records.
        ItoError: files that are missing, damaged or something else.
    """
    folder = Path(folder)
    for name in (IMAGES, RECORDS, SUMMARY):
        if not (folder / name).is_file():
            raise ItoError(f"There is no evidence bundle in {str(folder)!r}: it has no {name}.")
    head, summary = _json(folder / RECORDS), _json(folder / SUMMARY)
    if head.get("format") != FORMAT:
        raise ItoError(
            f"{str(folder / RECORDS)!r} has the format {head.get('format')!r}; this version reads bundles of {FORMAT}."
        )
    content = (folder / IMAGES).read_bytes()
    if hashlib.sha256(content).hexdigest() != head.get("sha256"):
        raise Altered(f"{str(folder / IMAGES)!r} is not the file whose SHA-256 stands in {RECORDS}: it was altered.")
    try:
        evidence = _evidence(head, tensors_from_bytes(content))
        check_evidence(evidence)
        figures = _summary(evidence)
    except SafetensorError:
        raise ItoError(f"{str(folder / IMAGES)!r} is no safetensors file.") from None
    except KeyError as error:
        raise ItoError(f"The bundle {str(folder)!r} is damaged: it has no {error}.") from None
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise ItoError(f"The bundle {str(folder)!r} is damaged: {str(error).rstrip('.')}.") from None
    if summary != figures:
        raise Altered(f"{str(folder / SUMMARY)!r} does not follow from {RECORDS}: one of the two was altered.")
    return evidence


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ItoError(f"{str(path)!r} is not JSON.") from None
    if not isinstance(content, dict):
        raise ItoError(f"{str(path)!r} must hold keys and values.")
    return content


def _records(evidence: Evidence, norms: Tensor, digest: str) -> str:
    """The content of ``records.json``: a head, then one line an image."""
    members, _, classes = evidence.votes.shape
    costs = zip(evidence.attacks, evidence.forwards, evidence.backwards, strict=True)
    head = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"ito-sde": version("ito-sde"), "torch": str(torch.__version__)},
        "command": evidence.command,
        "seed": evidence.seed,
        "noise": evidence.noise,
        "norm": evidence.norm,
        "eps": evidence.eps,
        "attacks": [{"name": name, "forwards": int(f), "backwards": int(b)} for name, f, b in costs],
        "members": members,
        "classes": classes,
        "sha256": digest,
        "config": evidence.config,
    }
    names = {**dict(enumerate(evidence.attacks)), **_NO_ATTACK}
    columns = (evidence.index, evidence.truth, evidence.clean, evidence.labels, evidence.winner, norms)
    rows: list[dict[str, Any]] = [
        {"index": i, "truth": y, "clean": clean, "label": label, "winner": names[winner], "norm": norm}
        | {"votes": [{} for _ in range(members)]}
        for i, y, clean, label, winner, norm in zip(*(column.tolist() for column in columns), strict=True)
    ]
    # Of ImageNet's thousand classes a vote names few.
    votes = evidence.votes.cpu()
    for (m, i, c), count in zip(votes.nonzero().tolist(), votes[votes != 0].tolist(), strict=True):
        rows[i]["votes"][m][str(c)] = count
    try:
        start = json.dumps(head, indent=2, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    except (TypeError, ValueError) as error:
        raise ItoError(f"The bundle's config must be what JSON can hold: {error}.") from None
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    return f'{start},\n  "images": [\n{lines}\n  ]\n}}\n'


def _evidence(head: dict[str, Any], tensors: dict[str, Tensor]) -> Evidence:
    """The inverse of `_records`."""
    rows, costs = head["images"], head["attacks"]
    attacks = tuple(cost["name"] for cost in costs)
    numbers = {name: number for number, name in (*enumerate(attacks), *_NO_ATTACK.items())}
    votes = torch.zeros(head["members"], len(rows), head["classes"], dtype=torch.int64)
    for i, row in enumerate(rows):
        for m, counts in enumerate(row["votes"]):
            for c, count in counts.items():
                votes[m, i, int(c)] = count
    return Evidence(
        norm=head["norm"],
        eps=head["eps"],
        attacks=attacks,
        index=torch.tensor([row["index"] for row in rows]),
        truth=torch.tensor([row["truth"] for row in rows]),
        clean=torch.tensor([row["clean"] for row in rows]),
        labels=torch.tensor([row["label"] for row in rows]),
        winner=torch.tensor([numbers[row["winner"]] for row in rows]),
        originals=tensors["originals"],
        images=tensors["images"],
        forwards=tuple(cost["forwards"] for cost in costs),
        backwards=tuple(cost["backwards"] for cost in costs),
        votes=votes,
        seed=head["seed"],
        noise=head["noise"],
        command=head["command"],
        config=head["config"],
    )


def _summary(evidence: Evidence) -> dict[str, Any]:
    """The figures under RobustBench's names, in per cent; ``robust_acc`` is not AutoAttack's, and says whose it is."""
    data = evidence.config.get("data")
    content: dict[str, Any] = {
        "dataset": data.get("name") if isinstance(data, dict) else data,
        "threat_model": _THREAT[evidence.norm],
        "eps": evidence.eps,
        "n": len(evidence.truth),
    }
    for name, labels in (("clean", evidence.clean), ("robust", evidence.labels)):
        outcomes = Outcomes.of(labels, evidence.truth)
        rate = outcomes.rate("correct")
        # Two digits, as there: the summary is compared with the records, and last bits differ between machines.
        content[f"{name}_acc"] = round(100 * rate.value, 2)
        content[f"{name}_acc_interval"] = [round(100 * rate.low, 2), round(100 * rate.high, 2)]
        counts = outcomes.as_dict()["counts"]
        content[f"{name}_counts"] = {key: counts[key] for key in ("correct", "wrong", "abstained")}  # type: ignore[index]
    content["robust_acc_attack"] = f"the worst case per image over {', '.join(evidence.attacks)}"
    content |= {"forwards": sum(evidence.forwards), "backwards": sum(evidence.backwards)}
    return content | {"noise": evidence.noise, "seed": evidence.seed}


def check_evidence(evidence: Evidence) -> None:
    """Refuse what does not fit together."""
    if evidence.norm not in BALLS:
        raise ItoError(nearest("norm", evidence.norm, BALLS))
    check_eps(evidence.norm, evidence.eps)
    names = (*evidence.attacks, *_NO_ATTACK.values())
    if not evidence.attacks or len(set(names)) < len(names):
        raise ItoError(f"A bundle needs attacks, no two of one name, got {evidence.attacks!r}.")
    if not len(evidence.forwards) == len(evidence.backwards) == len(evidence.attacks):
        raise ItoError(f"Model evaluations are counted for each of the {len(evidence.attacks)} attacks.")
    if not isinstance(evidence.config, dict):
        raise ItoError(f"config must hold keys and values, got {type(evidence.config).__name__}.")
    n = len(evidence.index)
    if evidence.votes.dim() != 3 or evidence.votes.shape[1] != n or n == 0:
        raise ItoError(f"votes must be (members, {n}, classes) and not empty, got {tuple(evidence.votes.shape)}.")
    classes = evidence.votes.shape[2]
    ranges = {
        "truth": (0, classes),
        "clean": (ABSTAIN, classes),
        "labels": (ABSTAIN, classes),
        "winner": (WRONG, len(evidence.attacks)),
    }
    for name in ("index", "votes", *ranges):
        values: Tensor = getattr(evidence, name)
        if values.dtype != torch.int64 or (name != "votes" and values.shape != (n,)):
            raise ItoError(f"{name} must be int64 ({n},), got {values.dtype} {tuple(values.shape)}.")
    for name, (low, end) in ranges.items():
        values = getattr(evidence, name)
        if not bool(((values >= low) & (values < end)).all()):
            first, last = int(values.amin()), int(values.amax())
            raise ItoError(f"{name} must be from {low} to below {end}, got {first} to {last}.")
    if len(evidence.index.unique()) < n:
        raise ItoError("index names an image twice: it would count twice.")
    for name in ("originals", "images"):
        values = getattr(evidence, name)
        if values.dtype != torch.float32 or values.dim() != 4 or values.shape != evidence.originals.shape:
            raise ItoError(f"{name} must be float32 (N, C, H, W), got {values.dtype} {tuple(values.shape)}.")
    if len(evidence.originals) != n:
        raise ItoError(f"There are {len(evidence.originals)} original images for {n} names.")


def norms_of(evidence: Evidence) -> Tensor:
    """The norm of every perturbation, float64 ``(N,)``."""
    return BALLS[evidence.norm].length(evidence.images.double() - evidence.originals.double())
