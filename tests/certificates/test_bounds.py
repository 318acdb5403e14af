"""Radii are Cohen's, bounds keep their errors, and early stops lose no more certificates than they say."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, hypergeom, norm

from neuralsde_ito.certificates import bounds
from neuralsde_ito.validation import ItoError


def by_chance(count: int, n: int, rate: float) -> bool:
    """Whether ``count`` of ``n`` is no more than an event of this rate gives by chance."""
    return binomtest(count, n, rate, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize(("count", "n"), [(51, 100), (80, 100), (100, 100), (5156, 10_000), (9_990, 10_000)])
@pytest.mark.parametrize(("sigma", "alpha"), [(0.25, 0.001), (1.0, 0.05)])
def test_radii_are_those_of_cohens_formula(count, n, sigma, alpha):
    bound = binomtest(count, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert bounds.lower_bound(count, n, alpha) == pytest.approx(bound, abs=1e-12)
    expected = sigma * norm.ppf(bound) if bound > 0.5 else 0.0
    assert bounds.radius(count, n, sigma, alpha) == pytest.approx(expected, abs=1e-9)


def test_bounds_at_their_ends():
    assert bounds.lower_bound([0, 7], 7, 0.01) == pytest.approx([0, 0.01 ** (1 / 7)])
    assert bounds.upper_bound([0, 7], 7, 0.01) == pytest.approx([1 - 0.01 ** (1 / 7), 1])
    assert bounds.upper_bound(3, 7, 0.0) == 1
    assert bounds.upper_bound(3, 7, 0.01) == pytest.approx(1 - bounds.lower_bound(4, 7, 0.01))


def test_the_least_count_is_the_first_with_a_radius():
    least = bounds.least_count(10_000, 0.001)
    assert bounds.radius([least - 1, least], 10_000, 0.25, 0.001).tolist() == pytest.approx([0, 6.26e-5], abs=1e-6)
    assert bounds.least_count(10, 0.001) == 10
    for n, alpha in ((57, 0.2), (1000, 0.01), (4001, 1e-6)):
        assert bounds.least_count(n, alpha) == int((bounds.lower_bound(np.arange(n + 1), n, alpha) > 0.5).argmax())
    with pytest.raises(ItoError, match=r"9 samples give no certificate at alpha 0\.001, .*; take 10 or"):
        bounds.least_count(9, 0.001)


def two_members(n: int, p: float, spread: float) -> np.ndarray:
    """Probabilities of all counts of ``n`` samples, half of them of each of two members with mean probability ``p``."""
    k = np.arange(n // 2 + 1)
    return np.convolve(binom.pmf(k, n // 2, p - spread), binom.pmf(k, n // 2, p + spread))


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("alpha", [0.001, 0.1])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.2, 1.0])
def test_the_lower_bound_is_too_high_with_probability_alpha_at_most(n, alpha, spread):
    bound, worst = bounds.lower_bound(np.arange(n + 1), n, alpha), 0.0
    for p in np.linspace(0.01, 0.99, 99):
        false = (bound > max(p, 0.5)) if p <= 1 / n else (bound > p)
        worst = max(worst, two_members(n, p, spread * min(p, 1 - p))[false].sum())
    assert worst <= alpha * (1 + 1e-9)
    if spread < 0.1:
        assert worst > alpha / 3  # the bound is no looser than it must be


@pytest.mark.parametrize("alpha", [0.001, 0.1])
def test_simulated_certificates_of_a_linear_classifier_are_false_no_more_often_than_alpha(alpha):
    # sign(w x + b) under noise: the share of its votes is Phi(margin / sigma), and the true radius is the margin.
    generator, sigma, n = np.random.default_rng(0), 0.25, 10_000
    margin = generator.uniform(0, 3, 2_000) * sigma
    radii = bounds.radius(generator.binomial(n, norm.cdf(margin / sigma)), n, sigma, alpha)
    false = int((radii > margin).sum())
    assert by_chance(false, 2_000, alpha)
    assert (radii > 0).mean() > 0.95
    if alpha == 0.1:
        assert false > 100  # the bound is tight, so that a radius that is too large would be seen


def test_looks_come_seldom_and_take_all_members_alike():
    assert bounds.looks(10_000, 5) == [80, 160, 315, 625, 1250, 2500, 5000]
    assert bounds.looks(1) == []
    for n, step in ((10, 1), (12, 3), (9_999, 3), (10_001, 1)):
        looks = bounds.looks(n, step)
        assert looks == sorted(set(looks))
        assert len(looks) <= bounds.LOOKS
        assert all(0 < look < n and look % step == 0 for look in looks)


def test_without_an_error_samples_stop_where_no_certificate_is_possible():
    n, least, counts = 100, bounds.least_count(100, 0.001), np.arange(51)
    assert least == 66
    assert bounds.out_of_reach(counts, 50, n, least, 0.0).tolist() == [k < 16 for k in range(51)]
    assert bounds.out_of_reach([65, 66], 100, n, least, 0.0).tolist() == [True, False]


@pytest.mark.parametrize(("first", "second"), [(0.5156, 0.5156), (1.0, 0.0312), (0.7, 0.3312)])
def test_a_stop_at_one_look_is_as_rare_as_it_says(first, second):
    """Given the members' full counts, the first samples of each are hypergeometric; at the worst count, exactly."""
    n, error = 10_000, 0.001
    least = bounds.least_count(n, 0.001)
    of_first = round(first * n / 2)
    full = (of_first, least - of_first)
    assert full[1] == pytest.approx(second * n / 2, abs=1)
    for look in bounds.looks(n, 2):
        k = np.arange(look // 2 + 1)
        counts = np.convolve(*(hypergeom.pmf(k, n // 2, own, look // 2) for own in full))
        stopped = bounds.out_of_reach(np.arange(look + 1), look, n, least, error)
        assert counts[stopped].sum() <= error


@pytest.mark.parametrize("p", [(0.5156, 0.5156), (0.53, 0.53), (1.0, 0.04), (0.45, 0.45)])
def test_in_simulation_early_stops_lose_no_more_certificates_than_beta(p):
    generator, n, beta, runs = np.random.default_rng(1), 10_000, 0.05, 20_000
    least, drawn = bounds.least_count(n, 0.001), 0
    count, stopped = np.zeros(runs, int), np.zeros(runs, bool)
    for look in (*bounds.looks(n, 2), n):
        count = count + sum(generator.binomial((look - drawn) // 2, q, runs) for q in p)
        drawn = look
        if look < n:
            stopped |= bounds.out_of_reach(count, look, n, least, beta / bounds.LOOKS)
    lost = stopped & (count >= least)
    assert by_chance(int(lost.sum()), max(1, int((count >= least).sum())), beta)
    if p == (0.5156, 0.5156):
        assert lost.sum() > 50  # in the worst case some are lost
    if p == (0.45, 0.45):
        assert stopped.mean() > 0.9  # and what is saved is seen
