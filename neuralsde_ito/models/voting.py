"""What all models under attack share: members x inferences -> votes -> a label or an abstention (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..noise.keys import PathRange
from ..validation import check_images, image_names, whole_number
from .votes import Poll, check_rule, decide, winners


@dataclass(frozen=True)
class Prediction:
    """What a vote predicts for ``N`` images.

    Attributes:
        labels: int64 ``(N,)``, `ABSTAIN` where there is no majority.
        votes: int64 ``(members, N, classes)``, inferences for each class, as far as they were made.
        drawn: int64 ``(N,)``, inferences made for each image.
        invalid: int64 ``(N,)``, inferences whose logits were not finite; they vote for no class.
    """

    labels: Tensor
    votes: Tensor
    drawn: Tensor
    invalid: Tensor


# Logits (K, classes) of K inferences: of images ``x[images]``, of the images among these, and of which number.
Inferences = Callable[[Tensor, Tensor, Tensor], Tensor]


class Voter(nn.Module):
    """A model whose members vote. An `ItoEnsemble` is one; a `Vote` makes one of any module.

    Attributes:
        members: the networks that vote.
        inferences: how many each member makes for an image.
        rule: how votes become a label, see `decide`.
    """

    members: Any  # an nn.ModuleList; subclasses say of what
    inferences: int
    rule: str

    def _set_vote(self, inferences: int, rule: str) -> None:
        self.inferences, self.rule = whole_number("inferences", inferences), check_rule(rule)

    @property
    def noisy(self) -> bool:
        """Whether two inferences of an image can differ."""
        raise NotImplementedError

    @property
    def channels(self) -> int | None:
        """Channels of an image, where the model says so."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the model computes: the device of its first parameter or buffer, else the CPU."""
        return next((own.device for own in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def observe(self, x: Tensor) -> None:
        """Learn from images ``(N, C, H, W)`` whether the model is random, where it does not say so itself."""

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """Logits along a range of numbered paths: ``(count, N, classes)``, differentiable.

        Args:
            x: images ``(N, C, H, W)``.
            paths: a range of paths of these images; `PathRange` says which member and inference a path number is.

        Raises:
            ItoError: ``paths.index`` is not one whole number for each image.
        """
        raise NotImplementedError

    def _begin(self, x: Tensor, seed: int, purpose: str, index: Tensor) -> tuple[int, list[Inferences]]:
        """The number of classes, and what makes inferences of each member."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,
        seed: int = 0,
        index: Tensor | None = None,
        purpose: str = "report",
        full: bool = False,
        confidence: float | None = None,
    ) -> Prediction:
        """Vote on every image until the inferences that are not made yet cannot change the label.

        The labels are exactly those of the full vote; `Prediction.drawn` says how many inferences they took. An
        inference whose logits are not finite votes for no class; `Prediction.invalid` counts these. Itô networks are in
        eval mode; a stranger's module in the modes that it has.

        Args:
            x: images ``(N, C, H, W)`` in [0, 1].
            seed: of the noise; another seed gives other paths.
            index: int64 ``(N,)``, the images' names in the noise's address; default their position in ``x``.
                With it an image has the same noise in any batch.
            purpose: what the paths are used for, one of `neuralsde_ito.noise.keys.PURPOSES`.
            full: make all inferences, so that `Prediction.votes` is complete.
            confidence: stop earlier, when the label is that of the full vote with this probability (`Poll` says
                under which assumption).

        Raises:
            ItoError: images that are not finite, not in [0, 1] or of the wrong shape; a confidence out of range.
        """
        check_images(x, self.channels)
        index = image_names(index, x)
        classes, members = self._begin(x, seed, purpose, index)
        poll = Poll(len(self.members), len(x), classes, self.inferences, self.rule, confidence, x.device)
        while bool((wanted := self.inferences - poll.drawn if full else poll.wanted()).any()):
            drawn = poll.drawn
            for m, counts in enumerate(wanted):
                if bool(counts.any()):
                    images, rows, inferences = _next_inferences(counts, drawn[m])
                    poll.count(m, images[rows], winners(members[m](images, rows, inferences)))
        drawn = poll.drawn.sum(0)
        labels = decide(poll.votes, self.rule, self.inferences) if full else poll.labels()[0]
        return Prediction(labels, poll.votes, drawn, drawn - poll.votes.sum((0, 2)))


def _next_inferences(counts: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inferences that one member makes next: ``counts`` of each image, after the ``drawn`` ones; both ``(N,)``.

    Returns:
        The images to run, int64 ``(I,)``; and for each of ``K`` inferences its image, as a position among these, and
        its number within its image.
    """
    images = counts.nonzero()[:, 0]
    repeated = images.repeat_interleave(counts[images])  # (K,)
    number = torch.arange(len(repeated), device=counts.device) - (counts.cumsum(0) - counts)[repeated]  # 0, 1, ...
    position = torch.zeros_like(counts).index_put_((images,), torch.arange(len(images), device=counts.device))
    return images, position[repeated], drawn[repeated] + number
