"""Honest accuracy against clean accuracy of several runs, from the records of their suites.

Honest is what ``ito-sde suite`` leaves of a defender under denial: the share of images that it still answers rightly.
Nothing is attacked or voted on here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..names import NORMS
from ..outcomes import Outcomes, Paired
from ..validation import ItoError, check_eps, nearest, one_of, shown
from .config import Config, Fit, differing_keys
from .run import Run

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["ito", "resnet"]
CLEAN: dict[Kind, str] = {"ito": "Itô ensemble", "resnet": "original ResNet"}  # the defenders in a record's clean part

# Figures of another attack, or on other images, do not belong into one table: these must be alike.
ALIKE = ("data", "noise", "repeat", "effort")
# Keys of a configuration that change neither the weights nor the vote.
IDLE = ("name", "attack", "data.test_limit")
# What each record holds, whichever version made it.
HELD = (*ALIKE, "attacked", "clean", "images", "norm", "seed", "vote")


@dataclass(frozen=True)
class Record:
    """What ``ito-sde suite`` has written of a run.

    Attributes:
        run: the run.
        file: the record.
        content: of the file.
    """

    run: Run
    file: Path
    content: dict[str, Any]

    @classmethod
    def all(cls, run: Run, norm: str) -> Iterator[Record]:
        """The records of a run under a norm, the newest first.

        Raises:
            ItoError: one is damaged.
        """
        for file in sorted(run.folder.glob(f"suite-{norm}-*.json"), reverse=True):  # named by date and time
            with _whole(file):
                content = json.loads(file.read_bytes())
                operator.itemgetter(*HELD)(content)
            yield cls(run, file, content)

    @cached_property
    def radii(self) -> dict[float, str]:
        """The radii, and how they were typed."""
        with _whole(self.file):
            return {float(entry["eps"]): str(entry["written"]) for entry in self.content["attacked"]}

    @cached_property
    def images(self) -> tuple[int, list[int], list[int]]:
        """Seed of the noise, names and true labels of the images; the lists are empty in records that have none."""
        with _whole(self.file):
            return self.content["seed"], [*self.content.get("index", ())], [*self.content.get("truth", ())]

    def decisions(self, defender: Kind, eps: float) -> tuple[Decisions, Decisions]:
        """What a defender decided on clean images, and on attacked ones at a radius of the record.

        Raises:
            ItoError: the record is damaged.
        """
        with _whole(self.file):
            entry = next(entry for entry in self.content["attacked"] if entry["eps"] == eps)
            clean, truth = self.content["clean"][CLEAN[defender]], self.images[2]
            return Decisions.read(clean, truth), Decisions.read(entry[defender], truth)

    def check_weights(self) -> None:
        """Refuse a record that was made before the run was trained again; no check if its weights are not there.

        Raises:
            ItoError: the run has other weights now.
        """
        from ..attacks.fingerprints import fingerprint

        weights = self.content.get("weights")
        if weights and self.run.is_complete and fingerprint(self.run.ensemble()) != weights:
            raise ItoError(
                f"The record {shown(str(self.file))} is not of the weights that the run has now; delete it, and make "
                f"it again: {self.again(self)}."
            )

    def again(self, like: Record) -> str:
        """The command that makes the record again, with the images and settings of another one."""
        return suite_command(self.run, self.content["norm"], " --eps ".join(self.radii.values()), like)


@dataclass(frozen=True, eq=False)
class Decisions:
    """How many of ``n`` images are decided rightly, and which.

    Attributes:
        outcomes: the counts.
        right: bool ``(n,)``, or None if the record has only counts.
    """

    outcomes: Outcomes
    right: Tensor | None

    @property
    def figures(self) -> tuple[Outcomes, list[bool]]:
        """All of it, to be compared."""
        return self.outcomes, [] if self.right is None else self.right.tolist()

    @classmethod
    def read(cls, entry: dict[str, Any], truth: list[int]) -> Decisions:
        """From the part of a record that holds ``counts`` and, since records can be paired, ``labels``.

        Raises:
            ValueError: counts and labels contradict each other.
        """
        outcomes = Outcomes(*(int(entry["counts"][name]) for name in ("n", "correct", "wrong", "abstained")))
        if "labels" not in entry or not truth:
            return cls(outcomes, None)
        import torch

        labels, true = torch.tensor(entry["labels"], device="cpu"), torch.tensor(truth, device="cpu")
        if Outcomes.of(labels, true) != outcomes:
            raise ValueError
        return cls(outcomes, labels == true)


@dataclass(frozen=True, eq=False)
class Point:
    """One defender of a frontier.

    Attributes:
        label: its name in tables and pictures; each is different.
        defender: ``ito`` for the ensemble of a run, ``resnet`` for the ResNet from which its members began.
        record: where the figures come from.
        omega: strength of the noise; None for a ResNet.
        members: of the ensemble; None for a ResNet.
        adversary: of the training, such as ``pgd 8/255``; see `adversary`.
        clean, honest: without attack, and under denial.
    """

    label: str
    defender: Kind
    record: Record
    omega: float | None
    members: int | None
    adversary: str
    clean: Decisions
    honest: Decisions

    def paired(self, other: Point, clean: bool = False) -> Paired | None:
        """McNemar's test of this point (first) against another one (second), on the same images and noise.

        Args:
            other: of the same frontier.
            clean: of the decisions without attack, else of those under denial.

        Returns:
            None if the two cannot be paired; `unpaired` says why.
        """
        if unpaired(self.record, other.record):
            return None
        first, second = ((point.clean if clean else point.honest).right for point in (self, other))
        assert first is not None
        assert second is not None
        return Paired.of(first, second)


@dataclass(frozen=True, eq=False)
class Frontier:
    """Defenders of several runs under one attack.

    Attributes:
        norm, eps, written: the ball, its radius in pixel units, and how that was typed.
        points: the runs' ensembles in the order of the runs, then the ResNets, each of them once.
        reference: one of the ensembles; the others are paired with it.
        twins: ensembles with noise, each with the ensemble that differs in ``omega = 0`` only.
        remarks: sentences about points that cannot be paired, and about other differences.
    """

    norm: str
    eps: float
    written: str
    points: tuple[Point, ...]
    reference: Point
    twins: tuple[tuple[Point, Point], ...]
    remarks: tuple[str, ...]


def read_frontier(
    runs: Mapping[str, Run], norm: str = "linf", eps: str | float | None = None, against: str | None = None
) -> Frontier:
    """Honest against clean accuracy of runs, from the newest record of each one's suites.

    Args:
        runs: by their labels.
        norm: ``linf``, ``l2`` or ``l1``.
        eps: radius in pixel units, ``8/255`` or 0.03; the newest record of each run with this radius counts. None: the
            largest radius that the newest records of all runs have.
        against: label of the run with which the others are paired; None for the first.

    Raises:
        ItoError: no runs; an unknown label; a run without a record that fits, the command that makes it is named;
            records of different attacks; a record that is damaged, or of other weights.
    """
    if not runs:
        raise ItoError("A frontier needs at least one run.")
    if against is not None and against not in runs:
        raise ItoError(nearest("run", against, runs))
    one_of("norm", norm, NORMS)
    records = _records(runs, norm, eps)
    main = next(iter(records)) if against is None else against
    shared = set.intersection(*(set(record.radii) for record in records.values()))
    radius = max(shared) if eps is None else check_eps(norm, eps)
    for label, record in records.items():
        _check_alike(record, records[main], label, main)
        record.check_weights()
    ensembles = {label: _ensemble(label, record, radius) for label, record in records.items()}
    points = (*ensembles.values(), *_resnets(records, radius))
    return Frontier(
        norm, radius, records[main].radii[radius], points, ensembles[main],
        twins=tuple(pair for pair in itertools.permutations(ensembles.values(), 2) if _are_twins(*pair)),
        remarks=tuple(_remarks(records, main, radius)),
    )  # fmt: skip


def unpaired(one: Record, other: Record) -> str:
    """Why two records cannot be paired and how to mend it, as the end of a sentence; empty if they can."""
    (seed, *images), (other_seed, *others) = one.images, other.images
    for record, like in ((one, other), (other, one)):
        if not all(record.images[1:]):
            old = f"the record {record.file.name} is of an earlier version, without the label of each image"
            return f"{old}; make it again: {record.again(like)}"
    if images != others:
        why = f"the images are not the same ({len(images[0])} and {len(others[0])})"
    elif seed != other_seed:
        why = f"the seeds of the noise are {seed} and {other_seed}"
    else:
        return ""
    return f"{why}; make the first again like the second: {one.again(other)}"


def suite_command(run: Run, norm: str, written: str, like: Record | None = None) -> str:
    """The command that makes a record of a run.

    Args:
        run, norm, written: what is attacked, in which ball, and its radius as it is typed.
        like: a record whose images and settings are to be taken.
    """
    words = f"ito-sde suite --run {shlex.quote(str(run.folder))} --norm {norm} --eps {written}"
    if like is None:
        return words
    content = like.content
    own = {"limit": run.config.attack.images, "effort": 1.0, "noise": "fresh", "repeat": 1, "seed": run.config.seed}
    wanted = {"limit": content["images"], **{key: content[key] for key in ("effort", "noise", "repeat", "seed")}}
    return words + "".join(f" --{key} {value}" for key, value in wanted.items() if value != own[key])


def adversary(config: Config) -> tuple[str, str]:
    """The adversaries in the training of a run's ResNet and of its ensemble: ``none``, ``pgd 8/255``, ``unknown``.

    An ensemble has two if the ResNet and the members were trained differently: ``pgd 8/255, then none``.
    """
    resnet = "unknown" if config.network.weights else _adversary(config.resnet)
    members = _adversary(config.finetune) if config.finetune.epochs else resnet
    return resnet, members if members == resnet else f"{resnet}, then {members}"


def _adversary(fit: Fit) -> str:
    """The adversary in one training."""
    settings = fit.adversary
    if settings.method == "none":
        return "none"
    norm = "" if settings.norm == "linf" else f" {settings.norm}"
    eps = settings.eps if isinstance(settings.eps, str) else f"{settings.eps:g}"
    return f"{settings.method}{norm} {eps}"


def _records(runs: Mapping[str, Run], norm: str, eps: str | float | None) -> dict[str, Record]:
    """The record of each run that counts: the newest, or the newest with a radius.

    Raises:
        ItoError: a run has none, or they share no radius.
    """
    records: dict[str, Record] = {}
    for label, run in runs.items():
        radius = None if eps is None else check_eps(norm, eps)
        fitting = (record for record in Record.all(run, norm) if radius is None or radius in record.radii)
        if record := next(fitting, None):
            records[label] = record
    model = next(iter(records.values()), None)
    for label, run in runs.items():
        if label not in records:
            own = next(iter(run.config.attack.eps.get(cast("Any", norm), ())), "EPS")
            written = str(eps) if eps is not None else model.radii[max(model.radii)] if model else own
            at = "" if eps is None else f" at eps {eps}"
            raise ItoError(
                f"The run {shown(str(run.folder))} has no record of a suite under {norm}{at}; make it: "
                f"{suite_command(run, norm, written, model)}."
            )
    if not set.intersection(*(set(record.radii) for record in records.values())):
        typed = "; ".join(f"{label}: {', '.join(record.radii.values())}" for label, record in records.items())
        raise ItoError(f"The newest records share no radius under {norm} ({typed}): give --eps, or attack them alike.")
    return records


def _check_alike(record: Record, model: Record, label: str, main: str) -> None:
    """Refuse a record of another attack than the reference's, or on other data."""
    settings, others = record.content, model.content
    if differing := [key for key in ALIKE if settings[key] != others[key]]:
        said = "; ".join(f"{key} {settings[key]} and {others[key]}" for key in differing)
        again = f"make the first again like the second: {record.again(model)}"
        mend = "name runs on the same data" if "data" in differing else again
        raise ItoError(f"The suites of {label} and {main} differ ({said}) and cannot be compared; {mend}.")


def _ensemble(label: str, record: Record, eps: float) -> Point:
    """The point of a run's ensemble."""
    config = record.run.config
    with _whole(record.file):
        members = int(record.content["vote"]["members"])
    decided = record.decisions("ito", eps)
    return Point(label, "ito", record, config.sde.omega, members, adversary(config)[1], *decided)


def _resnets(records: Mapping[str, Record], eps: float) -> list[Point]:
    """The points of the ResNets. Runs that began from one ResNet and have the same figures of it share a point."""
    points: dict[str, tuple[list[str], Record]] = {}
    for label, record in records.items():
        file = record.run.resnet_file
        weights = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else label
        figures = [decided.figures for decided in record.decisions("resnet", eps)]
        points.setdefault(repr([weights, record.images, figures]), ([], record))[0].append(label)
    named = []
    for labels, record in points.values():
        more = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
        label = CLEAN["resnet"] if len(points) == 1 else f"{CLEAN['resnet']} of {', '.join(labels[:2])}{more}"
        trained = adversary(record.run.config)[0]
        named.append(Point(label, "resnet", record, None, None, trained, *record.decisions("resnet", eps)))
    return named


def _are_twins(noisy: Point, still: Point) -> bool:
    """Whether two ensembles differ in their omega only, and that of the second is 0."""
    if not noisy.omega or still.omega or noisy.record.content["vote"] != still.record.content["vote"]:
        return False
    differing = differing_keys(noisy.record.run.config, still.record.run.config)
    return [key for key in differing if key not in IDLE and key.split(".")[0] not in IDLE] == ["sde.omega"]


def _remarks(records: Mapping[str, Record], main: str, eps: float) -> Iterator[str]:
    """What is to be said of the records beside the reference's."""
    model = records[main]
    others = {label: unpaired(record, model) for label, record in records.items() if label != main}
    if why := unpaired(model, model):
        yield f"Nothing can be paired with {main}: {why}."
    else:
        yield from (f"{label} cannot be paired with {main}: {why}." for label, why in others.items() if why)
    precisions = {label: str(record.content.get("precision", "float32")) for label, record in records.items()}
    if len(set(precisions.values())) > 1:
        said = ", ".join(f"{precision} ({label})" for label, precision in precisions.items())
        yield f"The suites took their gradients in different precisions: {said}."
    smaller = {
        label: ", ".join(written for radius, written in sorted(record.radii.items()) if radius < eps) or "none"
        for label, record in records.items()
    }
    if len(set(smaller.values())) > 1:
        said = "; ".join(f"{label}: {written}" for label, written in smaller.items())
        yield f"The suites did not pass through the same smaller radii, whose images compete at this one ({said})."


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Whatever is missing from a record makes it damaged."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration, AttributeError):
        raise ItoError(f"The record {shown(str(file))} is damaged; delete it, and give the command again.") from None
