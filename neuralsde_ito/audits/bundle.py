"""Evidence of an attack: a folder with which anybody can check its figures.

``images.safetensors`` holds the images before and after the attack, ``records.json`` all votes and what is claimed of
every image, ``summary.json`` the figures. `verify_bundle` repeats the votes and the attack, and votes on fresh noise.
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
from torch import Tensor, nn

from ..attacks.fingerprints import fingerprint, fingerprint_choice, fingerprint_split
from ..attacks.images import Images
from ..attacks.norms import BALLS
from ..attacks.report import NOISES, Report
from ..attacks.suite import Suite
from ..attacks.suite_run import SuiteRun, SuiteSettings
from ..data import Split
from ..files import sync_folder, write_atomically
from ..models.votes import check_rule
from ..models.voting import Voter
from ..outcomes import ABSTAIN, Outcomes, WorstCase
from ..validation import ItoError, check_eps, check_images, one_of, shown
from .battery import suite_of_audit

IMAGES, RECORDS, SUMMARY = "images.safetensors", "records.json", "summary.json"
FORMAT = 2
CLEAN = -1  # the source of an image that no attack made: the clean image itself
_CLEAN = "(the clean image)"
CASES = ("denial", "evasion")
_THREAT = {"linf": "Linf", "l2": "L2", "l1": "L1"}  # RobustBench's spelling
ROUNDING = 1e-6  # of float32, in pixel units: added to eps, and between an original and the data set's image


class Altered(ItoError):
    """One of a bundle's files was changed after the bundle was written."""


@dataclass(frozen=True)
class Evidence:
    """What a suite of attacks claims of ``N`` images at one radius.

    It holds all votes of the report. The labels follow from them by `worst_labels`.

    Attributes:
        norm, eps: the ball, a name in `BALLS`; eps in pixel units.
        attacks: their names, all different, in the order in which they ran, through all radii of the sweep.
        index: int64 ``(N,)``, the images' names in the noise's address, all different.
        truth, clean: int64 ``(N,)``: true labels, and the decisions without attack (`ABSTAIN` = -1).
        originals: float32 ``(N, C, H, W)`` in [0, 1], before the attack.
        clean_votes: int64 ``(repeat, members, N, classes)``, on the originals.
        denial, evasion: the two worst cases; their images are float32, their votes have the shape of ``clean_votes``.
        attacked, queries, gradients: of each attack, the images that it was run on, and its inferences without and
            with a gradient.
        inferences, rule: inferences of each member, and how votes become a label.
        seed, noise, repeat: how the report votes, see `Report`; the seed is that of all panels.
        fingerprints: ``weights`` (`fingerprint`), ``split`` (`fingerprint_split`), ``choice`` (`fingerprint_choice`).
        command: as the user typed it.
        config: as JSON has it. The keys that are read are ``run`` (its path), ``data.name``, and ``name``, ``effort``
            and ``radii`` (those of the sweep, up to this one) in ``suite``.
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
    def report(self) -> Report:
        """How the report votes."""
        return Report(self.seed, self.noise, self.repeat)


def evidence_of(
    run: SuiteRun, split: Split, level: int = -1, command: str = "", config: dict[str, Any] | None = None
) -> Evidence:
    """What a run of a suite claims at one radius.

    Args:
        run: see `run_suite` and `attack_images`.
        split: the whole test split from which the images were chosen.
        level: the number of the radius; default the last.
        command, config: see `Evidence`; ``config["suite"]`` gets the run's description and radii.
    """
    results = run.results[: range(len(run.results))[level] + 1]
    last, radii = results[-1], [result.eps for result in results]
    images, suite, config = run.images, run.suite, config or {}

    def counts(what: str) -> tuple[int, ...]:
        return tuple(count for result in results for count in getattr(result, what))

    return Evidence(
        norm=run.norm,
        eps=last.eps,
        attacks=attack_names(suite, radii),
        index=images.index,
        truth=images.y,
        originals=images.x,
        clean=run.clean,
        clean_votes=run.clean_votes,
        denial=last.denial,
        evasion=last.evasion,
        attacked=counts("attacked"),
        queries=counts("queries"),
        gradients=counts("gradients"),
        inferences=run.ensemble.inferences,
        rule=run.ensemble.rule,
        seed=suite.seed,
        noise=suite.noise,
        repeat=suite.repeat,
        fingerprints={
            "weights": fingerprint(run.ensemble),
            "split": fingerprint_split(split),
            "choice": fingerprint_choice(images.index, images.y, images.x),
        },
        command=command,
        config={**config, "suite": {**config.get("suite", {}), **run.description, "radii": radii}},
    )


def attack_names(suite: Suite, radii: Sequence[float]) -> tuple[str, ...]:
    """The attacks of a sweep, in the order in which they run: at each radius those for denial, then for evasion."""
    return tuple(
        f"{step.name}, {goal}eps {eps:.6g}" for eps in radii for goal in ("", "evasion, ") for step in suite.steps(eps)
    )


def suite_of(evidence: Evidence, ensemble: Voter, resnet: nn.Module | None) -> Suite:
    """The suite that a bundle names, with the verifier's own networks as its surrogates.

    Args:
        evidence: as read by `load_bundle`.
        ensemble: the defender.
        resnet: the network that it came from; None for a stranger's model.

    Raises:
        ItoError: the bundle names no suite that this version knows.
    """
    settings = evidence.config.get("suite")
    settings = settings if isinstance(settings, dict) else {}
    if settings.get("name") == "audit":
        images = Images(evidence.originals, evidence.truth, evidence.index).to(ensemble.device)
        return suite_of_audit(settings, ensemble, images, evidence.seed, {} if resnet is None else {"resnet": resnet})
    if settings.get("name") != "standard":
        raise ItoError("the bundle names no suite")
    precision = settings.get("precision", "float32")  # bundles of earlier versions do not say
    return SuiteSettings(evidence.norm, (evidence.eps,), settings.get("effort", 0.0), precision=precision).suite(
        ensemble, resnet
    )


def votes_of(
    ensemble: Voter,
    x: Tensor,
    index: Tensor,
    report: Report,
    batch_size: int,
    tick: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """`Report.votes` in batches, int64 ``(repeat, members, N, classes)`` on the CPU."""
    device = ensemble.device
    parts = []
    for images, names in zip(x.split(batch_size), index.split(batch_size), strict=True):
        parts.append(report.votes(ensemble, images.to(device), names.to(device)).cpu())
        tick(len(images))
    return torch.cat(parts, 2)


def save_bundle(folder: str | Path, evidence: Evidence) -> None:
    """Write a bundle: the whole folder or nothing.

    Args:
        folder: a new or empty one; a bundle is never written over.
        evidence: on any device.

    Raises:
        ItoError: a folder that is not empty; shapes or values that do not fit together; images outside the ball or
            outside [0, 1]; a config that JSON cannot hold.
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
    """Read a bundle back, bit for bit, onto the CPU.

    A bundle holds tensors and JSON only, so that reading it runs none of its content. Whether its images are inside the
    ball is not checked here, but by `verify_bundle`.

    Raises:
        Altered: the images do not have the SHA-256 in the records, or the summary does not follow from the records.
        ItoError: files that are missing, damaged or of another kind.
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
    try:
        head = json.dumps(_head(evidence, digest), indent=2, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    except (TypeError, ValueError) as error:
        raise ItoError(f"The bundle's config must be what JSON can hold: {error}.") from None
    lines = ",\n".join(f"    {json.dumps(row)}" for row in _rows(evidence))
    return f'{head},\n  "images": [\n{lines}\n  ]\n}}\n'


def _head(evidence: Evidence, digest: str) -> dict[str, Any]:
    """What the records say of the attack; ``digest`` is the SHA-256 of the images' file."""
    _, members, _, classes = evidence.clean_votes.shape
    costs = zip(evidence.attacks, evidence.attacked, evidence.queries, evidence.gradients, strict=True)
    return {
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
            {"name": name, "images": int(attacked), "forwards": int(queries), "backwards": int(gradients)}
            for name, attacked, queries, gradients in costs
        ],
        "members": members,
        "inferences": evidence.inferences,
        "rule": evidence.rule,
        "classes": classes,
        "sha256": digest,
        "fingerprints": evidence.fingerprints,
        "config": evidence.config,
    }


def _rows(evidence: Evidence) -> list[dict[str, Any]]:
    """What the records say of each image: labels, sources and norms of the cases, and all votes."""
    repeat, members, _, _ = evidence.clean_votes.shape
    sources = (*evidence.attacks, _CLEAN)  # source -1 is the last
    columns = (evidence.index, evidence.truth, evidence.clean)
    rows: list[dict[str, Any]] = [
        {"index": i, "truth": y, "clean": {"label": label}}
        for i, y, label in zip(*(column.tolist() for column in columns), strict=True)
    ]
    for name, case in cases_of(evidence).items():
        columns = (case.labels, case.source, norms_of(evidence, case))
        for row, label, source, norm in zip(rows, *(column.tolist() for column in columns), strict=True):
            row[name] = {"label": label, "source": sources[source], "norm": norm}
    for name, votes in votes_in(evidence).items():
        for row in rows:
            row[name]["votes"] = [[{} for _ in range(members)] for _ in range(repeat)]
        # Only classes that got votes are written: of ImageNet's thousand few do.
        votes = votes.cpu()
        for (r, m, i, c), count in zip(votes.nonzero().tolist(), votes[votes != 0].tolist(), strict=True):
            rows[i][name]["votes"][r][m][str(c)] = count
    return rows


def _evidence(head: dict[str, Any], tensors: dict[str, Tensor]) -> Evidence:
    """The inverse of `_records`."""
    rows, costs = head["images"], head["attacks"]
    attacks = tuple(cost["name"] for cost in costs)
    numbers = {_CLEAN: CLEAN, **{name: number for number, name in enumerate(attacks)}}

    def column(*keys: str) -> Tensor:
        values = rows
        for key in keys:
            values = [value[key] for value in values]
        if keys[-1] == "source":
            values = [numbers[value] for value in values]
        return torch.tensor(values, device="cpu")

    def votes(case: str) -> Tensor:
        votes = torch.zeros(
            head["repeat"], head["members"], len(rows), head["classes"], dtype=torch.int64, device="cpu"
        )
        for i, row in enumerate(rows):
            for r, members in enumerate(row[case]["votes"]):
                for m, counts in enumerate(members):
                    for c, count in counts.items():
                        votes[r, m, i, int(c)] = count
        return votes

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
    """The figures in per cent, under RobustBench's names.

    ``robust_acc`` is not that of AutoAttack; ``robust_acc_attack`` names the attacks.
    """
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
        # Correct + abstained under evasion is the paper's column; RobustBench has no name for it.
        figure, rate = (
            ("correct_or_abstained", outcomes.rate("correct", "abstained"))
            if name == "evasion"
            else (f"{name}_acc", outcomes.rate("correct"))
        )
        # Two digits, as RobustBench has them: the last bits differ between machines, and the summary is compared with
        # the records.
        content[figure] = round(100 * rate.value, 2)
        content[f"{figure}_interval"] = [round(100 * rate.low, 2), round(100 * rate.high, 2)]
        content[f"{name}_counts"] = {key: getattr(outcomes, key) for key in ("correct", "wrong", "abstained")}
    content["robust_acc_attack"] = f"the worst case per image over {', '.join(evidence.attacks)}"
    content |= {"forwards": sum(evidence.queries), "backwards": sum(evidence.gradients)}
    return content | {"noise": evidence.noise, "repeat": evidence.repeat, "seed": evidence.seed}


def check_evidence(evidence: Evidence) -> None:
    """Refuse evidence whose values do not fit together.

    Raises:
        ItoError: what does not fit.
    """
    _check_settings(evidence)
    n, shape = len(evidence.index), evidence.clean_votes.shape
    if len(shape) != 4 or shape[2] != n or 0 in shape or shape[0] != evidence.repeat:
        raise ItoError(f"votes must be ({evidence.repeat}, members, {n}, classes) and not empty, got {tuple(shape)}.")
    _check_labels(evidence, n, shape[3])
    for name, votes in votes_in(evidence).items():
        if votes.dtype != torch.int64 or votes.shape != shape:
            raise ItoError(f"{name} votes must be int64 {tuple(shape)}, got {votes.dtype} {tuple(votes.shape)}.")
    if len(evidence.index.unique()) < n:
        raise ItoError("index names an image twice: it would count twice.")
    originals = evidence.originals
    images = {"originals": originals, **{f"{name}'s images": case.images for name, case in cases_of(evidence).items()}}
    for name, values in images.items():
        if values.dtype != torch.float32 or values.dim() != 4 or values.shape != originals.shape:
            raise ItoError(f"{name} must be float32 (N, C, H, W), got {values.dtype} {tuple(values.shape)}.")
    if len(originals) != n:
        raise ItoError(f"There are {len(originals)} original images for {n} names.")


def _check_settings(evidence: Evidence) -> None:
    """Refuse a norm, a radius, attacks, counts or words that cannot be."""
    one_of("norm", evidence.norm, BALLS)
    if type(evidence.eps) not in (int, float):
        raise ItoError(f"eps must be a number, got {shown(evidence.eps)}.")
    check_eps(evidence.norm, evidence.eps)
    check_rule(evidence.rule)
    one_of("noise model", evidence.noise, NOISES)
    names = (*evidence.attacks, _CLEAN)
    if not evidence.attacks or len(set(names)) < len(names):
        raise ItoError(f"A bundle needs attacks with different names, got {shown(evidence.attacks)}.")
    for name in ("attacked", "queries", "gradients"):
        values = getattr(evidence, name)
        counts = all(type(value) is int and 0 <= value < 2**62 for value in values)
        if len(values) != len(evidence.attacks) or not counts:
            raise ItoError(f"{name} must be a count for each of the {len(evidence.attacks)} attacks.")
    for name, least in (("inferences", 1), ("repeat", 1), ("seed", 0)):
        value = getattr(evidence, name)
        if type(value) is not int or value < least:  # `whole_number` takes numpy's integers, which JSON does not
            raise ItoError(f"{name} must be a whole number of at least {least}, got {shown(value)}.")
    for name in ("config", "fingerprints"):
        if not isinstance(getattr(evidence, name), dict):
            raise ItoError(f"{name} must hold keys and values, got {type(getattr(evidence, name)).__name__}.")


def _check_labels(evidence: Evidence, n: int, classes: int) -> None:
    """Refuse names, labels or sources that are not ``n`` whole numbers in their range."""
    columns = {
        "index": (evidence.index, -(2**63), 2**63),
        "truth": (evidence.truth, 0, classes),
        "clean": (evidence.clean, ABSTAIN, classes),
    }
    for name, case in cases_of(evidence).items():
        columns[f"{name}'s labels"] = (case.labels, ABSTAIN, classes)
        columns[f"{name}'s source"] = (case.source, CLEAN, len(evidence.attacks))
    for name, (values, low, end) in columns.items():
        if values.dtype != torch.int64 or values.shape != (n,):
            raise ItoError(f"{name} must be int64 ({n},), got {values.dtype} {tuple(values.shape)}.")
        first, last = int(values.amin()), int(values.amax())
        if not low <= first <= last < end:
            raise ItoError(f"{name} must be from {low} to below {end}, got {first} to {last}.")


def cases_of(evidence: Evidence) -> dict[str, WorstCase]:
    """Both worst cases, by name."""
    return {name: getattr(evidence, name) for name in CASES}


def votes_in(evidence: Evidence) -> dict[str, Tensor]:
    """The recorded votes ``(repeat, members, N, classes)`` on clean images and of each worst case."""
    return {"clean": evidence.clean_votes, **{name: case.votes for name, case in cases_of(evidence).items()}}


def norms_of(evidence: Evidence, case: WorstCase) -> Tensor:
    """The norm of every perturbation, float64 ``(N,)`` on the CPU."""
    return BALLS[evidence.norm].length(case.images.cpu().double() - evidence.originals.cpu().double())
