"""What an attack on fresh noise leaves under the two other noise models: fixed paths, and paths that are known.

Noise that nobody can predict is an assumption on the defender's generator. Two short rows beside the report say what
it is worth: a vote on the chosen images along one set of paths for all of them, and a short attack along the report's
paths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.voting import Voter
from ..outcomes import ABSTAIN, WorstCase
from .base import Attack
from .images import Images
from .report import Report
from .targets import KnownPaths


@dataclass(frozen=True)
class OtherNoise:
    """The decisions on ``N`` images under another noise model than the report's.

    Attributes:
        denial, evasion: int64 ``(N,)``, the worst labels for the two goals, see `WorstCase`.
        gradients, queries: inferences with and without a gradient that the attack on this noise has made.
    """

    denial: Tensor
    evasion: Tensor
    gradients: int = 0
    queries: int = 0


def fixed_noise(ensemble: Voter, images: Images, denial: WorstCase, evasion: WorstCase, report: Report) -> OtherNoise:
    """Votes on the chosen images along one set of paths, the same for all images; the attack did not know it.

    Args:
        ensemble: the defender.
        images: before the attack.
        denial, evasion: the worst cases that were chosen on fresh noise.
        report: how the report votes.
    """
    fixed = Report(report.seed, "fixed", report.repeat)
    denied, evaded = (
        fixed.decide(ensemble, Images(case.images, images.y, images.index)).cpu() for case in (denial, evasion)
    )
    return OtherNoise(denied, evaded)


def known_noise(
    ensemble: Voter, images: Images, denial: WorstCase, evasion: WorstCase, report: Report, attack: Attack
) -> OtherNoise:
    """An attacker who knows the report's paths goes on from the chosen images, where they are not answered wrongly.

    The report's own votes judge his images and the chosen ones; of both, the worse counts. A wrong answer serves both
    goals, so that denial and evasion are the same labels.

    Args:
        ensemble, images, denial, evasion, report: as in `fixed_noise`.
        attack: what he runs. A gradient takes its ``eot`` of the known paths in turn, or all where they are fewer.
    """
    worst = denial.labels.clone()
    worst = torch.where(_wrong(evasion.labels, images.y) & ~_wrong(worst, images.y), evasion.labels, worst)
    rows = (~_wrong(worst, images.y)).nonzero()[:, 0]
    gradients = queries = 0
    if len(rows):
        some = images[rows]
        target = KnownPaths(ensemble, images.x, report.seed, attack.eot)
        result = attack.run(target, some.x, some.y, report.seed, some.index, denial.images[rows])
        gradients, queries = result.gradients, result.queries
        labels = report.decide(ensemble, Images(result.images, some.y, some.index))
        worse = _wrong(labels, some.y) | ((labels == ABSTAIN) & (worst[rows] == some.y))
        worst[rows[worse]] = labels[worse]
    return OtherNoise(worst.cpu(), worst.cpu(), gradients, queries)


def _wrong(labels: Tensor, truth: Tensor) -> Tensor:
    return (labels != truth) & (labels != ABSTAIN)


def join_noises(parts: list[dict[str, OtherNoise]]) -> dict[str, OtherNoise]:
    """Several batches as one."""
    return {
        name: OtherNoise(
            torch.cat([part[name].denial for part in parts]),
            torch.cat([part[name].evasion for part in parts]),
            sum(part[name].gradients for part in parts),
            sum(part[name].queries for part in parts),
        )
        for name in parts[0]
    }


def to_tensors(noises: dict[str, OtherNoise]) -> dict[str, Tensor]:
    """All values by name, as files keep them; `from_tensors` takes them back."""
    return {
        f"{name}.{what}": value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        for name, one in noises.items()
        for what, value in vars(one).items()
    }


def from_tensors(tensors: dict[str, Tensor]) -> dict[str, OtherNoise]:
    """The rows that `to_tensors` has named."""
    names = dict.fromkeys(key.split(".")[0] for key in tensors)
    return {
        name: OtherNoise(
            tensors[f"{name}.denial"],
            tensors[f"{name}.evasion"],
            int(tensors[f"{name}.gradients"]),
            int(tensors[f"{name}.queries"]),
        )
        for name in names
    }
