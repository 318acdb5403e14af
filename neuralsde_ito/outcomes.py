"""What became of every image: correct, wrong or abstained, as rates with intervals; paired comparisons."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import binomtest
from torch import Tensor

from .validation import ItoError

ABSTAIN = -1  # the label of an image on which the vote finds no majority (locuslab/smoothing's convention)


@dataclass(frozen=True)
class Rate:
    """A share of images with its 95 % Wilson interval; all between 0 and 1."""

    count: int
    n: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, n: int) -> Rate:
        """``count`` of ``n`` images (Wilson 1927, https://doi.org/10.2307/2276774)."""
        if n < 1:
            raise ItoError("A rate needs at least one image.")
        low, high = binomtest(count, n).proportion_ci(0.95, method="wilson")
        return cls(count, n, count / n, float(low), float(high))


@dataclass(frozen=True)
class Outcomes:
    """Counts over ``n`` images. Every image is correct, wrong or abstained on."""

    n: int
    correct: int
    wrong: int
    abstained: int

    @classmethod
    def of(cls, labels: Tensor, truth: Tensor) -> Outcomes:
        """From decided labels ``(N,)``, `ABSTAIN` among them, and true ones ``(N,)``."""
        if labels.shape != truth.shape:
            raise ItoError(f"One decided label an image: {tuple(labels.shape)} for {tuple(truth.shape)} true ones.")
        correct = int((labels == truth).sum())
        abstained = int((labels == ABSTAIN).sum())
        return cls(len(truth), correct, len(truth) - correct - abstained, abstained)

    def rate(self, *names: str) -> Rate:
        """The rate of one outcome, or of several together: ``rate("correct", "abstained")``, the paper's column."""
        return Rate.of(sum(getattr(self, name) for name in names), self.n)

    @property
    def coverage(self) -> Rate:
        """Images that get an answer, right or wrong."""
        return self.rate("correct", "wrong")

    def as_dict(self) -> dict[str, object]:
        """Counts, and rates as ``[value, low, high]``, ready for JSON."""
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
    """Two models on the same images: how many only the one gets right, and McNemar's exact p-value."""

    only_first: int
    only_second: int
    p: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Paired:
        """From two boolean tensors ``(N,)``, each "is correct", on the same images in the same order.

        The p-value is that of the two-sided exact test of McNemar (1947): under the hypothesis of no
        difference, the images on which the models differ fall to either side like a fair coin.
        """
        if first.shape != second.shape:
            raise ItoError(f"A paired test needs the same images: {tuple(first.shape)}, {tuple(second.shape)}.")
        one, two = int((first & ~second).sum()), int((second & ~first).sum())
        return cls(one, two, float(binomtest(one, one + two).pvalue) if one + two else 1.0)  # scipy: a numpy scalar


@dataclass(frozen=True)
class WorstCase:
    """The worst that attacks found for ``N`` images, and what the report decided on it.

    There are two worst cases. *Denial*: the image that is least often right; ``labels == truth`` is the accuracy
    under attack. *Evasion*: the image that is most often answered wrongly; what is not answered wrongly is right or
    abstained on, the paper's column.

    Attributes:
        images: ``(N, C, H, W)``, chosen by votes on the selection's paths, never by the report's.
        source: int64 ``(N,)``, the number of the attack that made the image; -1: the clean image.
        labels: int64 ``(N,)``, the report's decisions.
        votes: int64 ``(repeats, members, N, classes)``, all votes of the report, from which ``labels`` follow.
    """

    images: Tensor
    source: Tensor
    labels: Tensor
    votes: Tensor
