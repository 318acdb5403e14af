"""Evidence of an attack: a folder with which anybody can check its figures.

``images.safetensors`` holds the images before and after, ``records.json`` all votes and what is claimed of every image,
``summary.json`` the figures. `verify_bundle` repeats the votes and the attack, and votes on fresh noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
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

from ..attacks.norms import BALLS, check_eps
from ..attacks.selection import NOISES, report_votes, worst_labels
from ..attacks.suite import Suite, SuiteResult
from ..data import Split
from ..files import sync_folder, write_atomically
from ..models.ensemble import ItoEnsemble
from ..models.votes import check_rule
from ..outcomes import ABSTAIN, Outcomes, WorstCase
from ..validation import ItoError, check_images, nearest, shown

IMAGES, RECORDS, SUMMARY = "images.safetensors", "records.json", "summary.json"
FORMAT = 2
CLEAN = -1  # the source that is no attack: the clean image itself
_CLEAN = "(the clean image)"
CASES = ("denial", "evasion")
_THREAT = {"linf": "Linf", "l2": "L2"}  # RobustBench's spelling
ROUNDING = 1e-6  # of float32, in pixel units: added to eps, and between an original and the data set's image


class Altered(ItoError):
    """A bundle's files are not those that were written together."""


@dataclass(frozen=True)
class Evidence:
    """What a suite of attacks claims of ``N`` images at one radius.

    Votes are those of the report, all of them: the labels follow from them by `votes.worst_labels`.

    Attributes:
        norm, eps: the ball, a name in `BALLS`; eps in pixel units.
        attacks: names in the order in which they ran, through all radii of the sweep; no two alike.
        index: int64 ``(N,)``, the images' names in the noise's address, no two alike.
        truth, clean: int64 ``(N,)``: true labels, and the decisions without attack (`ABSTAIN` = -1).
        originals: float32 ``(N, C, H, W)`` in [0, 1], before the attack.
        clean_votes: int64 ``(repeat, members, N, classes)``, on the originals.
        denial, evasion: the two worst cases; their images float32, their votes as ``clean_votes``.
        attacked, queries, gradients: of each attack, the images that it was run on, and its model evaluations without
            and with a gradient.
        inferences, rule: of each member, and how votes become a label.
        seed: of all panels; report ``r`` of ``repeat`` has ``seed + r``.
        noise, repeat: the noise model and the persistence of the attacker, see `Suite`.
        fingerprints: ``weights`` (`fingerprint`), ``split`` (`fingerprint_split`), ``choice`` (`fingerprint_choice`).
        command: as it was typed.
        config: as JSON has it. Read: ``run`` (its path), ``data.name``, and of ``suite`` the keys ``name``, ``effort``
            and ``radii`` (of the sweep, up to this one).
    """

    norm: str
    eps: float
    attacks: tuple[str, ...]
    index: Tensor
    truth: Tensor
    originals: Tensor
    clean: Tensor
    clean_votes: Tensor
    denial: WorstCase
    evasion: WorstCase
    attacked: tuple[int, ...]
    queries: tuple[int, ...]
    gradients: tuple[int, ...]
    inferences: int
    rule: str
    seed: int
    noise: str = "fresh"
    repeat: int = 1
    fingerprints: dict[str, str] = field(default_factory=dict)
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> Tensor:
        """The names ``(N,)`` under which the report's noise knows the images: one for all under ``fixed``."""
        return torch.zeros_like(self.index) if self.noise == "fixed" else self.index


def evidence_of(
    results: Sequence[SuiteResult],
    clean_votes: Tensor,
    ensemble: ItoEnsemble,
    suite: Suite,
    split: Split,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    command: str = "",
    config: dict[str, Any] | None = None,
) -> Evidence:
    """What a sweep of a suite claims at its last radius.

    Args:
        results: of all radii, rising, up to this one, each of all images.
        clean_votes: ``(repeat, members, N, classes)``, `Suite.votes` of the originals.
        ensemble, suite: the defender, and what attacked it.
        split: the whole test split from which the images were chosen.
        x, y, index: images ``(N, C, H, W)``, true labels and names ``(N,)``, as the suite had them.
        command, config: see `Evidence`; the radii are added to ``config["suite"]``.
    """
    radii, last = [result.eps for result in results], results[-1]
    clean_votes, config = clean_votes.cpu(), config or {}
    return Evidence(
        norm=suite.steps(last.eps)[0].attack.norm,
        eps=last.eps,
        attacks=attack_names(suite, radii),
        index=index.cpu(),
        truth=y.cpu(),
        originals=x.cpu(),
        clean=worst_labels(clean_votes, y.cpu(), ensemble.rule, ensemble.inferences),
        clean_votes=clean_votes,
        denial=_on_cpu(last.denial),
        evasion=_on_cpu(last.evasion),
        attacked=tuple(n for result in results for n in result.attacked),
        queries=tuple(n for result in results for n in result.queries),
        gradients=tuple(n for result in results for n in result.gradients),
        inferences=ensemble.inferences,
        rule=ensemble.rule,
        seed=suite.seed,
        noise=suite.noise,
        repeat=suite.repeat,
        fingerprints={
            "weights": fingerprint(ensemble),
            "split": fingerprint_split(split),
            "choice": fingerprint_choice(index, y, x),
        },
        command=command,
        config={**config, "suite": {**config.get("suite", {}), "radii": radii}},
    )


def attack_names(suite: Suite, radii: Sequence[float]) -> tuple[str, ...]:
    """The attacks of a sweep, in the order in which they run: at each radius the denial's, then the evasion's."""
    return tuple(
        f"{step.name}, {goal}eps {eps:.6g}" for eps in radii for goal in ("", "evasion, ") for step in suite.steps(eps)
    )


def votes_of(
    ensemble: ItoEnsemble,
    x: Tensor,
    seed: int,
    names: Tensor,
    repeat: int,
    batch_size: int,
    tick: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """`report_votes` in batches, int64 ``(repeat, members, N, classes)`` on the CPU."""
    device = next(ensemble.parameters()).device
    parts = []
    for part, named in zip(x.split(batch_size), names.split(batch_size), strict=True):
        parts.append(report_votes(ensemble, part.to(device), seed, named.to(device), repeat).cpu())
        tick(len(part))
    return torch.cat(parts, 2)


def fingerprint(ensemble: ItoEnsemble) -> str:
    """SHA-256 of all that a member computes with: weights, buffers (normalisation too), noise, solver and steps."""
    digest = hashlib.sha256()
    for member in ensemble.members:
        schedule = member.schedule
        times = [(sde.t0, sde.t1, sde.jump) for sde in member.sdes]
        kinds = [type(module).__name__ for module in member.modules()]
        digest.update(repr((schedule.omega, schedule.name, member.solver, member.steps, times, kinds)).encode())
        for name, value in sorted([*member.named_parameters(), *member.named_buffers()], key=lambda pair: pair[0]):
            content = value.detach().cpu().contiguous().view(torch.uint8) if value.dim() else value.detach().cpu()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + content.numpy().tobytes())
    return digest.hexdigest()


def fingerprint_split(split: Split) -> str:
    """SHA-256 of a whole split's size, names and labels: of what a choice of images was drawn from."""
    names = torch.arange(len(split)) if split.names is None else split.names
    return _digest(names, split.labels)


def fingerprint_choice(index: Tensor, y: Tensor, x: Tensor) -> str:
    """SHA-256 of the names and labels ``(N,)`` and pixels ``(N, C, H, W)`` of the chosen images.

    Pixels count in steps of 1/65,535, so that the last bit of a division by 255 does not matter.
    """
    return _digest(index, y, (x.double() * 65535).round())


def _digest(*columns: Tensor) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(repr(tuple(column.shape)).encode() + column.cpu().long().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _on_cpu(case: WorstCase) -> WorstCase:
    return WorstCase(case.images.cpu(), case.source.cpu(), case.labels.cpu(), case.votes.cpu())


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
    tensors = {"originals": evidence.originals}
    for name, case in cases_of(evidence).items():
        check_images(case.images)
        longest = float(norms_of(evidence, case).amax())
        if not longest <= evidence.eps + ROUNDING:
            raise ItoError(f"A perturbation has the {evidence.norm} norm {longest:g}, more than eps {evidence.eps:g}.")
        tensors[name] = case.images
    # Copies: safetensors refuses tensors that share memory, as two equal worst cases may.
    content = safetensors_bytes({name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()})
    files = {
        IMAGES: content,
        RECORDS: _records(evidence, hashlib.sha256(content).hexdigest()).encode(errors="backslashreplace"),
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
        if not os.path.isfile(folder / name):
            raise ItoError(f"There is no evidence bundle in {shown(str(folder))}: it has no {name}.")
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


def _records(evidence: Evidence, digest: str) -> str:
    """The content of ``records.json``: a head, then one line an image."""
    repeat, members, _, classes = evidence.clean_votes.shape
    costs = zip(evidence.attacks, evidence.attacked, evidence.queries, evidence.gradients, strict=True)
    head = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"ito-sde": version("ito-sde"), "torch": str(torch.__version__)},
        "command": evidence.command,
        "seed": evidence.seed,
        "noise": evidence.noise,
        "repeat": evidence.repeat,
        "norm": evidence.norm,
        "eps": evidence.eps,
        "attacks": [
            {"name": name, "images": int(met), "forwards": int(f), "backwards": int(b)} for name, met, f, b in costs
        ],
        "members": members,
        "inferences": evidence.inferences,
        "rule": evidence.rule,
        "classes": classes,
        "sha256": digest,
        "fingerprints": evidence.fingerprints,
        "config": evidence.config,
    }
    names = (*evidence.attacks, _CLEAN)  # the last is that of source -1
    columns = (evidence.index, evidence.truth, evidence.clean)
    rows: list[dict[str, Any]] = [
        {"index": i, "truth": y, "clean": {"label": label}}
        for i, y, label in zip(*(column.tolist() for column in columns), strict=True)
    ]
    for case, found in cases_of(evidence).items():
        columns = (found.labels, found.source, norms_of(evidence, found))
        for row, label, source, norm in zip(rows, *(column.tolist() for column in columns), strict=True):
            row[case] = {"label": label, "source": names[source], "norm": norm}
    for case, votes in votes_in(evidence).items():
        for row in rows:
            row[case]["votes"] = [[{} for _ in range(members)] for _ in range(repeat)]
        # Of ImageNet's thousand classes a vote names few.
        votes = votes.cpu()
        for (r, m, i, c), count in zip(votes.nonzero().tolist(), votes[votes != 0].tolist(), strict=True):
            rows[i][case]["votes"][r][m][str(c)] = count
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
    numbers = {_CLEAN: CLEAN, **{name: number for number, name in enumerate(attacks)}}

    def column(*keys: str) -> Tensor:
        values = rows
        for key in keys:
            values = [value[key] for value in values]
        return torch.tensor([numbers[value] for value in values] if keys[-1] == "source" else values)

    def votes(case: str) -> Tensor:
        found = torch.zeros(head["repeat"], head["members"], len(rows), head["classes"], dtype=torch.int64)
        for i, row in enumerate(rows):
            for r, members in enumerate(row[case]["votes"]):
                for m, counts in enumerate(members):
                    for c, count in counts.items():
                        found[r, m, i, int(c)] = count
        return found

    cases = {
        case: WorstCase(tensors[case], column(case, "source"), column(case, "label"), votes(case)) for case in CASES
    }
    return Evidence(
        norm=head["norm"],
        eps=head["eps"],
        attacks=attacks,
        index=column("index"),
        truth=column("truth"),
        originals=tensors["originals"],
        clean=column("clean", "label"),
        clean_votes=votes("clean"),
        **cases,
        attacked=tuple(cost["images"] for cost in costs),
        queries=tuple(cost["forwards"] for cost in costs),
        gradients=tuple(cost["backwards"] for cost in costs),
        inferences=head["inferences"],
        rule=head["rule"],
        seed=head["seed"],
        noise=head["noise"],
        repeat=head["repeat"],
        fingerprints=head["fingerprints"],
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
    labelled = {"clean": evidence.clean, "robust": evidence.denial.labels, "evasion": evidence.evasion.labels}
    for name, labels in labelled.items():
        outcomes = Outcomes.of(labels, evidence.truth)
        # Under evasion it is the paper's column; RobustBench has no name for it.
        figure, rate = (
            ("correct_or_abstained", outcomes.rate("correct", "abstained"))
            if name == "evasion"
            else (f"{name}_acc", outcomes.rate("correct"))
        )
        # Two digits, as there: the summary is compared with the records, and last bits differ between machines.
        content[figure] = round(100 * rate.value, 2)
        content[f"{figure}_interval"] = [round(100 * rate.low, 2), round(100 * rate.high, 2)]
        counts = outcomes.as_dict()["counts"]
        content[f"{name}_counts"] = {key: counts[key] for key in ("correct", "wrong", "abstained")}  # type: ignore[index]
    content["robust_acc_attack"] = f"the worst case per image over {', '.join(evidence.attacks)}"
    content |= {"forwards": sum(evidence.queries), "backwards": sum(evidence.gradients)}
    return content | {"noise": evidence.noise, "repeat": evidence.repeat, "seed": evidence.seed}


def check_evidence(evidence: Evidence) -> None:
    """Refuse what does not fit together."""
    if evidence.norm not in BALLS:
        raise ItoError(nearest("norm", evidence.norm, BALLS))
    if type(evidence.eps) not in (int, float):
        raise ItoError(f"eps must be a number, got {shown(evidence.eps)}.")
    check_eps(evidence.norm, evidence.eps)
    check_rule(evidence.rule)
    if evidence.noise not in NOISES:
        raise ItoError(nearest("noise model", evidence.noise, NOISES))
    names = (*evidence.attacks, _CLEAN)
    if not evidence.attacks or len(set(names)) < len(names):
        raise ItoError(f"A bundle needs attacks, no two of one name, got {shown(evidence.attacks)}.")
    for name in ("attacked", "queries", "gradients"):
        values = getattr(evidence, name)
        if len(values) != len(evidence.attacks) or not all(
            type(value) is int and 0 <= value < 2**62 for value in values
        ):
            raise ItoError(f"{name} must be a count for each of the {len(evidence.attacks)} attacks.")
    for name, least in (("inferences", 1), ("repeat", 1), ("seed", 0)):
        value = getattr(evidence, name)
        if type(value) is not int or value < least:
            raise ItoError(f"{name} must be a whole number of at least {least}, got {shown(value)}.")
    for name in ("config", "fingerprints"):
        if not isinstance(getattr(evidence, name), dict):
            raise ItoError(f"{name} must hold keys and values, got {type(getattr(evidence, name)).__name__}.")
    n, shape = len(evidence.index), evidence.clean_votes.shape
    if len(shape) != 4 or shape[2] != n or 0 in shape or shape[0] != evidence.repeat:
        raise ItoError(f"votes must be ({evidence.repeat}, members, {n}, classes) and not empty, got {tuple(shape)}.")
    classes = shape[3]
    columns = {
        "index": (evidence.index, -(2**63), 2**63),
        "truth": (evidence.truth, 0, classes),
        "clean": (evidence.clean, ABSTAIN, classes),
    }
    pictures = {"originals": evidence.originals}
    for case, found in cases_of(evidence).items():
        columns[f"{case}'s labels"] = (found.labels, ABSTAIN, classes)
        columns[f"{case}'s source"] = (found.source, CLEAN, len(evidence.attacks))
        pictures[f"{case}'s images"] = found.images
    for name, (values, low, end) in columns.items():
        if values.dtype != torch.int64 or values.shape != (n,):
            raise ItoError(f"{name} must be int64 ({n},), got {values.dtype} {tuple(values.shape)}.")
        first, last = int(values.amin()), int(values.amax())
        if not low <= first <= last < end:
            raise ItoError(f"{name} must be from {low} to below {end}, got {first} to {last}.")
    for name, votes in votes_in(evidence).items():
        if votes.dtype != torch.int64 or votes.shape != shape:
            raise ItoError(f"{name} votes must be int64 {tuple(shape)}, got {votes.dtype} {tuple(votes.shape)}.")
    if len(evidence.index.unique()) < n:
        raise ItoError("index names an image twice: it would count twice.")
    for name, values in pictures.items():
        if values.dtype != torch.float32 or values.dim() != 4 or values.shape != evidence.originals.shape:
            raise ItoError(f"{name} must be float32 (N, C, H, W), got {values.dtype} {tuple(values.shape)}.")
    if len(evidence.originals) != n:
        raise ItoError(f"There are {len(evidence.originals)} original images for {n} names.")


def cases_of(evidence: Evidence) -> dict[str, WorstCase]:
    """Both worst cases, by name."""
    return {case: getattr(evidence, case) for case in CASES}


def votes_in(evidence: Evidence) -> dict[str, Tensor]:
    """The recorded votes ``(repeat, members, N, classes)`` on clean images and of each worst case."""
    return {"clean": evidence.clean_votes, **{case: found.votes for case, found in cases_of(evidence).items()}}


def norms_of(evidence: Evidence, case: WorstCase) -> Tensor:
    """The norm of every perturbation, float64 ``(N,)``."""
    return BALLS[evidence.norm].length(case.images.double() - evidence.originals.double())
