"""Figure 4, left: how many members and how many inferences, from one set of votes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.votes import decide
from ..outcomes import ABSTAIN, Paired
from .pieces import joined

_LEAST = 3  # members, and inferences: the corner of the paper's figure
_CHOICES = 10  # random choices of members and inferences, over which a table is the mean


def right_or_abstained(
    winners: Tensor, truth: Tensor, members: Sequence[int], inferences: Sequence[int], rule: str
) -> Tensor:
    """Whether an ensemble of some members with some inferences is right or abstains: bool ``(N,)``.

    Args:
        winners: what each inference says, ``(inferences, members, N)``; `ABSTAIN` for no class.
        truth: true labels ``(N,)``.
        members, inferences: which of them vote.
        rule: how votes become a label, see `decide`.
    """
    said = winners[list(inferences)][:, list(members)].long()  # (S, M, N)
    classes = int(max(int(winners.max()), int(truth.max()))) + 1
    votes = F.one_hot(said.clamp_min(0), classes) * (said != ABSTAIN)[..., None]
    labels = decide(votes.sum(0), rule, len(inferences))
    return (labels == truth) | (labels == ABSTAIN)


def heat_maps(
    samples: Mapping[str, Sequence[Mapping[str, Tensor]]], index: Tensor, rule: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Correct + abstention for 3 to all members and 3 to all inferences, and what it says of the paper's claim.

    Args:
        samples: by what the images are, the results of pieces of the kind ``paths``.
        index: int64 ``(N,)``, the images' names.
        rule: how votes become a label.

    Returns:
        The panels of a figure, and sentences.
    """
    panels, said = [], []
    for title, parts in samples.items():
        winners = joined([dict(part) for part in parts], index, "winners", -1)
        truth = joined([dict(part) for part in parts], index, "truth")
        inferences, members, _ = winners.shape
        rows = [
            [_mean_rate(winners, truth, m, s, rule) for s in range(_LEAST, inferences + 1)]
            for m in range(_LEAST, members + 1)
        ]
        panels.append(
            {
                "title": title,
                "members": list(range(_LEAST, members + 1)),
                "inferences": list(range(_LEAST, inferences + 1)),
                "values": rows,
                "label": "correct + abstained (%)",
            }
        )
        said.append(_claim(title, winners, truth, rule, rows))
    return panels, said


def _mean_rate(winners: Tensor, truth: Tensor, members: int, inferences: int, rule: str) -> float:
    """The mean over random choices; the same choices for every size, so that tables are smooth."""
    total, (all_inferences, all_members, n) = 0, winners.shape
    for choice in range(_CHOICES):
        generator = torch.Generator().manual_seed(choice)
        of_members = torch.randperm(all_members, generator=generator, device="cpu")[:members].tolist()
        of_inferences = torch.randperm(all_inferences, generator=generator, device="cpu")[:inferences].tolist()
        total += int(right_or_abstained(winners, truth, of_members, of_inferences, rule).sum())
    return total / (_CHOICES * n)


def _claim(title: str, winners: Tensor, truth: Tensor, rule: str, rows: list[list[float]]) -> str:
    """Whether many members with 3 inferences do better than 3 members with many, on the same images."""
    inferences, members, _ = winners.shape
    many, few = range(members), range(_LEAST)
    of_members = right_or_abstained(winners, truth, many, few, rule)
    of_inferences = right_or_abstained(winners, truth, few, range(inferences), rule)
    paired = Paired.of(of_inferences, of_members)
    gains = [100 * (corner - rows[0][0]) for corner in (rows[-1][-1], rows[-1][0], rows[0][-1])]
    holds = "holds" if paired.p < 0.05 and paired.only_second > paired.only_first else "is not shown"
    return (
        f"{title}: correct + abstention gains {gains[0]:+.1f} points from {_LEAST} x {_LEAST} to {members} x "
        f"{inferences}; {gains[1]:+.1f} by members alone ({members} x {_LEAST}), {gains[2]:+.1f} by inferences alone "
        f"({_LEAST} x {inferences}). That members help more {holds} (right or abstained on "
        f"{paired.only_second} images by members alone, on {paired.only_first} by inferences alone; "
        f"McNemar p = {paired.p:.2g})."
    )
