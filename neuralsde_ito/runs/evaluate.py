"""The clean table: an ensemble and the ResNet from which it began, on the same images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks.sweep import Tick
from ..attacks.targets import classify
from ..data import Split
from ..distributed import ALONE, World
from ..models.voting import Voter
from ..outcomes import ABSTAIN, Outcomes, Paired


@dataclass(frozen=True)
class Evaluation:
    """Decisions of a ResNet and of an ensemble on the same ``N`` clean images, on the CPU.

    Attributes:
        resnet, ito: outcomes of the ResNet and of the ensemble. A stranger's model has no ResNet beside it.
        paired: the two compared image by image (the ResNet first), where there is one.
        index, truth: int64 ``(N,)``, the images' names in the noise's address, and their true labels.
        resnet_labels, labels: int64 ``(N,)``, the ResNet's and the ensemble's.
        votes: int64 ``(members, N, classes)``, inferences for each class, as far as they were made.
        drawn: int64 ``(N,)``, inferences that were made.
        invalid: int64 ``(N,)``, inferences among them whose logits were not finite; they cast no vote.
    """

    resnet: Outcomes | None
    ito: Outcomes
    paired: Paired | None
    index: Tensor
    truth: Tensor
    resnet_labels: Tensor | None
    labels: Tensor
    votes: Tensor
    drawn: Tensor
    invalid: Tensor


def evaluate(
    ensemble: Voter,
    resnet: nn.Module | None,
    data: Split,
    seed: int = 0,
    batch_size: int = 100,
    tick: Tick = lambda n: None,
    full: bool = False,
    confidence: float | None = None,
    among: World = ALONE,
) -> Evaluation:
    """Let the ensemble vote on every image, and classify it with the ResNet, too.

    Args:
        ensemble, resnet: on one device; None where there is no ResNet.
        data: the images, usually a test split.
        seed: of the report's noise.
        batch_size: images at a time; the result does not depend on it.
        tick: called after each batch with its number of images.
        full, confidence: see `Voter.predict`.
        among: the processes that share the images; each gets the whole result.
    """
    device = ensemble.device
    parts: list[tuple[Tensor, ...]] = []
    for index, x, y in among.share(data).batches(batch_size, device):
        prediction = ensemble.predict(x, seed, index, full=full, confidence=confidence)
        base = torch.full_like(y, ABSTAIN) if resnet is None else classify(resnet, x)
        columns = (index, y, base, prediction.labels, prediction.drawn, prediction.invalid)
        parts.append(tuple(column.cpu() for column in (*columns, prediction.votes)))
        tick(len(y))
    *gathered, votes = zip(*among.gather_lists(parts), strict=True)
    index, truth, resnet_labels, labels, drawn, invalid = (torch.cat(column) for column in gathered)
    among.check_complete(index, data)
    return Evaluation(
        resnet=None if resnet is None else Outcomes.of(resnet_labels, truth),
        ito=Outcomes.of(labels, truth),
        paired=None if resnet is None else Paired.of(resnet_labels == truth, labels == truth),
        index=index,
        truth=truth,
        resnet_labels=None if resnet is None else resnet_labels,
        labels=labels,
        votes=torch.cat(votes, 1),
        drawn=drawn,
        invalid=invalid,
    )
