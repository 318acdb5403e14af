"""The clean table: an ensemble beside the ResNet that it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks.sweep import Tick
from ..attacks.targets import classify
from ..data import Split
from ..models.ensemble import ItoEnsemble
from ..outcomes import Outcomes, Paired


@dataclass(frozen=True)
class Evaluation:
    """Decisions of a ResNet and of an ensemble on the same clean images.

    Attributes:
        resnet, ito: outcomes.
        paired: the two compared image by image.
        index, truth, resnet_labels, labels: ``(N,)``.
        votes: ``(members, N, classes)``, as far as they were drawn.
        drawn: ``(N,)``, inferences made.
        invalid: ``(N,)``, those whose logits were not finite: they voted for nobody.
    """

    resnet: Outcomes
    ito: Outcomes
    paired: Paired
    index: Tensor
    truth: Tensor
    resnet_labels: Tensor
    labels: Tensor
    votes: Tensor
    drawn: Tensor
    invalid: Tensor


def evaluate(
    ensemble: ItoEnsemble,
    resnet: nn.Module,
    data: Split,
    seed: int = 0,
    batch_size: int = 100,
    tick: Tick = lambda n: None,
    full: bool = False,
    confidence: float | None = None,
) -> Evaluation:
    """Let the ensemble vote on every image, and the ResNet answer beside it.

    Args:
        ensemble, resnet: on one device.
        data: the images, usually a test split.
        seed: of the report's noise.
        batch_size: images at a time; does not change the result.
        tick: called with the number of images done.
        full, confidence: see `ItoEnsemble.predict`.
    """
    device = next(ensemble.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    votes = []
    for index, x, y in data.batches(batch_size, device):
        prediction = ensemble.predict(x, seed, index, full=full, confidence=confidence)
        found = (prediction.labels.cpu(), prediction.drawn.cpu(), prediction.invalid.cpu())
        parts.append((index.cpu(), y.cpu(), classify(resnet, x).cpu(), *found))
        votes.append(prediction.votes.cpu())
        tick(len(y))
    index, truth, base, labels, drawn, invalid = (torch.cat(column) for column in zip(*parts, strict=True))
    return Evaluation(
        Outcomes.of(base, truth),
        Outcomes.of(labels, truth),
        Paired.of(base == truth, labels == truth),
        index,
        truth,
        base,
        labels,
        torch.cat(votes, 1),
        drawn,
        invalid,
    )
