"""The votes by which the defender's report judges an attack; no attack and no selection of candidates uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.votes import decide
from ..models.voting import Voter
from ..outcomes import ABSTAIN
from ..validation import one_of, whole_number
from .images import Images

NOISES = ("fresh", "fixed", "known")


@dataclass(frozen=True)
class Report:
    """How the report votes: on which paths, and how often.

    Attributes:
        seed: of the first vote; vote ``r`` has ``seed + r``.
        noise: ``fresh`` (each image has paths of its own, which the attacker does not know), ``fixed`` (all images
            have the same paths, which the attacker does not know) or ``known`` (as ``fresh``, but the attacker knows
            the paths).
        repeat: how often a persistent attacker may ask about each image; one wrong answer is enough.

    Raises:
        ItoError: an unknown noise, or no vote.
    """

    seed: int = 0
    noise: str = "fresh"
    repeat: int = 1

    def __post_init__(self) -> None:
        one_of("noise model", self.noise, NOISES)
        object.__setattr__(self, "repeat", whole_number("repeat", self.repeat))

    def votes(self, ensemble: Voter, x: Tensor, index: Tensor) -> Tensor:
        """All votes, int64 ``(repeat, members, N, classes)``.

        Args:
            ensemble: the defender.
            x: images ``(N, C, H, W)`` in [0, 1].
            index: int64 ``(N,)``, their names in the noise's address. Under ``fixed`` noise all have the name 0.
        """
        names = torch.zeros_like(index) if self.noise == "fixed" else index
        seeds = range(self.seed, self.seed + self.repeat)
        return torch.stack([ensemble.predict(x, seed, names, full=True).votes for seed in seeds])

    def decide(self, ensemble: Voter, images: Images) -> Tensor:
        """The decisions ``(N,)``, see `worst_labels`."""
        votes = self.votes(ensemble, images.x, images.index)
        return worst_labels(votes, images.y, ensemble.rule, ensemble.inferences)


def worst_labels(votes: Tensor, truth: Tensor, rule: str, inferences: int) -> Tensor:
    """The worst decision ``(N,)`` of several votes: the first wrong one, else an abstention, else the right answer.

    Args:
        votes: ``(repeat, members, N, classes)``.
        truth: true labels ``(N,)``.
        rule, inferences: as in `decide`.
    """
    worst = truth.clone()
    for vote in votes:
        labels = decide(vote, rule, inferences)
        wrong = (labels != truth) & (labels != ABSTAIN)
        not_wrong_yet = (worst == truth) | (worst == ABSTAIN)
        worst = torch.where(not_wrong_yet & wrong, labels, worst)
        worst = torch.where((worst == truth) & (labels == ABSTAIN), labels, worst)
    return worst


def invalid(votes: Tensor, inferences: int) -> int:
    """How many inferences have voted for no class, in full votes ``(repeat, members, N, classes)``."""
    return int((inferences - votes.sum(-1)).sum())
