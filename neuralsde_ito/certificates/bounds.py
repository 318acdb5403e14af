"""From counts to bounds, and from bounds to radii (Cohen, Rosenfeld & Kolter 2019, https://arxiv.org/abs/1902.02918).

`certify` says why these bounds hold for samples of an ensemble, which do not all have one probability.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom, norm

from ..validation import ItoError

LOOKS = 7  # at most: after 1/128, 1/64, ..., 1/2 of the samples

Floats = NDArray[np.float64]


def lower_bound(count: ArrayLike, n: ArrayLike, error: float) -> Floats:
    """One-sided lower confidence bound of a probability (Clopper & Pearson 1934, https://doi.org/10.2307/2331986).

    Args:
        count: successes, of any shape.
        n: samples, of a shape that fits.
        error: the probability with which the bound may exceed the true probability.
    """
    k, n = np.asarray(count, float), np.asarray(n, float)
    with np.errstate(invalid="ignore"):
        return np.where(k > 0, beta.ppf(error, k, n - k + 1), 0.0)


def upper_bound(count: ArrayLike, n: ArrayLike, error: float) -> Floats:
    """The one-sided upper bound; at ``error`` 0 it is 1. Arguments as in `lower_bound`."""
    k, n = np.asarray(count, float), np.asarray(n, float)
    with np.errstate(invalid="ignore"):
        return np.where(k < n, beta.isf(error, k + 1, n - k), 1.0)


def radius(count: ArrayLike, n: int, sigma: float, alpha: float) -> Floats:
    """Certified L2 radii ``sigma Phi^-1(lower bound)``, in pixel units; 0 where the bound is not above 1/2.

    Args:
        count: samples that vote for the class, of any shape.
        n: all samples.
        sigma: of the noise on the image, in pixel units.
        alpha: error of the bound.
    """
    bound = lower_bound(count, n, alpha)
    return np.where(bound > 0.5, sigma * norm.ppf(np.maximum(bound, 0.5)), 0.0)


def least_count(n: int, alpha: float) -> int:
    """The smallest count with which ``n`` samples give a certificate.

    Raises:
        ItoError: not even ``n`` agreeing samples do.
    """
    if not lower_bound(n, n, alpha) > 0.5:
        least = math.floor(math.log(alpha) / math.log(0.5)) + 1
        raise ItoError(f"{n} samples give no certificate at alpha {alpha:g}, whatever they say; take {least} or more.")
    least = int(binom.isf(alpha, n, 0.5))  # near enough to be found by steps
    while lower_bound(least, n, alpha) <= 0.5:
        least += 1
    while lower_bound(least - 1, n, alpha) > 0.5:
        least -= 1
    return least


def looks(n: int, step: int = 1) -> list[int]:
    """After how many of ``n`` samples it is asked whether to go on; all are multiples of ``step``, as ``n`` is."""
    rounds = n // step
    return sorted({-(-rounds // 2**i) * step for i in range(1, LOOKS + 1)} - {n})


def out_of_reach(count: ArrayLike, drawn: int, n: int, least: int, error: float) -> NDArray[np.bool_]:
    """Whether the full ``n`` samples would give no certificate: for certain, or but for an error.

    A certificate needs a share of ``least / n``. The answer is yes where the upper bound of what was drawn is below it.
    If the full count is at least ``least``, the answer is yes with probability ``error`` at most, whatever the true
    probability is: given the full counts of the members, the counts of their first samples are independent and
    hypergeometric. A hypergeometric count is a sum of independent Bernoulli draws (Vatutin & Mikhailov 1982), and so is
    the sum over members, with a mean of ``drawn / n`` times the full count. Its lower tail is no heavier than the
    binomial one (Hoeffding 1956, see `certify`).

    Args:
        count: agreeing samples among the first ``drawn``, of any shape.
        drawn, n: samples so far, and in all.
        least: the full count that a certificate needs.
        error: of this look, below 1/4; 0 stops only where it is certain.
    """
    count = np.asarray(count)
    return (count + n - drawn < least) | (upper_bound(count, drawn, error) < least / n)
