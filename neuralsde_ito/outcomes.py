"""Decisions as outcomes: correct, wrong or abstained, rates with intervals, and paired comparisons of two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .validation import ItoError

if TYPE_CHECKING:
    from torch import Tensor

ABSTAIN = -1  # the label of an image without a majority (the convention of locuslab/smoothing)


@dataclass(frozen=True)
class Rate:
    """A share of images with its 95 % Wilson interval (Wilson 1927, https://doi.org/10.2307/2276774).

    Attributes:
        count, n: ``count`` of ``n`` images.
        value: ``count / n``.
        low, high: ends of the interval, in [0, 1].
    """

    count: int
    n: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, n: int) -> Rate:
        """The rate of ``count`` in ``n`` images.

        Raises:
            ItoError: there are no images.
        """
        if n < 1:
            raise ItoError("A rate needs at least one image.")
        from scipy.stats import binomtest  # it takes a second to import, and a vote has no use for it

        low, high = binomtest(count, n).proportion_ci(0.95, method="wilson")
        return cls(count, n, count / n, float(low), float(high))


@dataclass(frozen=True)
class Outcomes:
    """How many of ``n`` images are correct, wrong or abstained on; every image is exactly one of these."""

    n: int
    correct: int
    wrong: int
    abstained: int

    @classmethod
    def of(cls, labels: Tensor, truth: Tensor) -> Outcomes:
        """Count the outcomes of decisions.

        Args:
            labels: decided labels ``(N,)``; `ABSTAIN` where there is no answer.
            truth: true labels ``(N,)``.

        Raises:
            ItoError: the shapes differ.
        """
        if labels.shape != truth.shape:
            raise ItoError(f"One decided label an image: {tuple(labels.shape)} for {tuple(truth.shape)} true ones.")
        correct = int((labels == truth).sum())
        abstained = int((labels == ABSTAIN).sum())
        return cls(len(truth), correct, len(truth) - correct - abstained, abstained)

    def rate(self, *names: str) -> Rate:
        """The rate of one outcome, or of several together: the paper reports ``rate("correct", "abstained")``."""
        return Rate.of(sum(getattr(self, name) for name in names), self.n)

    @property
    def coverage(self) -> Rate:
        """The rate of images that get an answer, right or wrong."""
        return self.rate("correct", "wrong")

    def as_dict(self) -> dict[str, object]:
        """For JSON: counts, and rates as ``[value, low, high]``."""
        rates = {
            "correct": self.rate("correct"),
            "wrong": self.rate("wrong"),
            "abstained": self.rate("abstained"),
            "correct_or_abstained": self.rate("correct", "abstained"),
            "coverage": self.coverage,
        }
        counts = {"n": self.n, **{name: rate.count for name, rate in rates.items()}}
        return {"counts": counts, "rates": {k: [r.value, r.low, r.high] for k, r in rates.items()}}


@dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Attributes:
        only_first: images that only the first model gets right.
        only_second: images that only the second model gets right.
        p: McNemar's exact two-sided p-value.
    """

    only_first: int
    only_second: int
    p: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Paired:
        """Compare two models by McNemar's exact test (1947, https://doi.org/10.1007/BF02295996).

        Under the hypothesis of no difference, each image on which the models differ is a toss of a fair coin.

        Args:
            first, second: bool ``(N,)``, whether each image is correct; the same images in the same order.

        Raises:
            ItoError: the shapes differ.
        """
        if first.shape != second.shape:
            raise ItoError(f"A paired test needs the same images: {tuple(first.shape)}, {tuple(second.shape)}.")
        from scipy.stats import binomtest

        only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
        differing = only_first + only_second
        p = float(binomtest(only_first, differing).pvalue) if differing else 1.0  # scipy returns a numpy scalar
        return cls(only_first, only_second, p)


@dataclass(frozen=True)
class WorstCase:
    """For each of ``N`` images the strongest adversarial image of all attacks, and the report's decision on it.

    There are two worst cases. *Denial*: the adversarial image that is least often answered rightly;
    ``labels == truth`` gives the accuracy under attack. *Evasion*: the one that is most often answered wrongly; the
    images that are not answered wrongly are right or abstained on, the paper's column.

    Attributes:
        images: ``(N, C, H, W)``, chosen by votes on the selection's paths, never on the report's.
        source: int64 ``(N,)``, the number of the attack that made the image; -1: the clean image.
        labels: int64 ``(N,)``, the report's decisions, which follow from ``votes``.
        votes: int64 ``(repeats, members, N, classes)``, all votes of the report.
    """

    images: Tensor
    source: Tensor
    labels: Tensor
    votes: Tensor
