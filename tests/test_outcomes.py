"""Rates against published intervals, McNemar's test against binomials summed by hand."""

import itertools
import json
import math

import pytest
import torch
from scipy import stats

from neuralsde_ito import ABSTAIN, Outcomes, Paired, Rate

# --- rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3 (the score interval).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(count, n, low, high):
    rate = Rate.of(count, n)
    assert (rate.count, rate.n, rate.value) == (count, n, count / n)
    assert rate.low == pytest.approx(low, abs=5e-5)
    assert rate.high == pytest.approx(high, abs=5e-5)


def wilson(count: int, n: int) -> tuple[float, float]:
    """The two roots p of |count / n - p| = z sqrt(p (1 - p) / n)."""
    z = stats.norm.ppf(0.975)
    share, weight = count / n, z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (share + weight / 2 - half) / (1 + weight), (share + weight / 2 + half) / (1 + weight)


@pytest.mark.parametrize("n", [1, 2, 7, 100, 10_000])
def test_wilson_intervals_solve_the_quadratic(n):
    for count in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        rate = Rate.of(count, n)
        assert (rate.low, rate.high) == pytest.approx(wilson(count, n), abs=1e-9)
        assert 0 <= rate.low <= rate.value <= rate.high <= 1


@pytest.mark.parametrize("n", [1, 10, 500])
def test_intervals_at_the_ends_are_one_sided_but_not_empty(n):
    # The naive interval p +- 1.96 s is a single point here: it would claim certainty.
    none, all_of_them = Rate.of(0, n), Rate.of(n, n)
    z2 = stats.norm.ppf(0.975) ** 2
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(z2 / (n + z2))
    assert (all_of_them.value, all_of_them.high) == (1, 1)
    assert all_of_them.low == pytest.approx(n / (n + z2))


@pytest.mark.parametrize(("count", "n"), [(0, 0), (1, 0), (3, 2), (-1, 5)])
def test_rates_of_nothing_are_refused(count, n):
    with pytest.raises(ValueError, match=r"."):
        Rate.of(count, n)


# --- outcomes -------------------------------------------------------------------------------------------


def test_every_image_is_counted_once():
    truth = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    labels = torch.tensor([0, 1, 3, ABSTAIN, 4, ABSTAIN, 1])
    outcomes = Outcomes.of(labels, truth)
    assert outcomes == Outcomes(n=7, correct=3, wrong=2, abstained=2)
    assert outcomes.rate("correct") == Rate.of(3, 7)
    assert outcomes.rate("wrong") == Rate.of(2, 7)
    assert outcomes.rate("abstained") == Rate.of(2, 7)
    assert outcomes.rate("correct", "abstained") == Rate.of(5, 7)
    assert outcomes.coverage == Rate.of(5, 7)


@pytest.mark.parametrize("seed", range(3))
def test_counts_agree_with_a_loop(seed):
    gen = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 3, (200,), generator=gen)
    labels = torch.randint(ABSTAIN, 3, (200,), generator=gen)
    wanted = {"correct": 0, "wrong": 0, "abstained": 0}
    for label, right in zip(labels.tolist(), truth.tolist(), strict=True):
        wanted["abstained" if label == ABSTAIN else "correct" if label == right else "wrong"] += 1
    assert all(wanted.values()), wanted  # else the loop checks nothing
    assert Outcomes.of(labels, truth) == Outcomes(200, **wanted)


def test_always_abstaining_is_no_merit():
    outcomes = Outcomes.of(torch.full((50,), ABSTAIN), torch.zeros(50, dtype=torch.int64))
    assert outcomes.rate("correct", "abstained").value == 1  # the paper's column alone would call it perfect
    assert (outcomes.rate("correct").value, outcomes.coverage.value) == (0, 0)


def test_as_dict_is_json_and_says_what_the_outcomes_say():
    outcomes = Outcomes.of(torch.tensor([0, 1, ABSTAIN, 0, 2]), torch.tensor([0, 1, 2, 1, 2]))
    result = outcomes.as_dict()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["counts"] == {
        "n": 5,
        "correct": 3,
        "wrong": 1,
        "abstained": 1,
        "correct_or_abstained": 4,
        "coverage": 4,
    }
    rates = result["rates"]
    assert isinstance(rates, dict)
    assert rates.keys() == result["counts"].keys() - {"n"}  # type: ignore[attr-defined]
    for name, count in result["counts"].items():  # type: ignore[attr-defined]
        if name != "n":
            rate = Rate.of(count, 5)
            assert rates[name] == [rate.value, rate.low, rate.high]


@pytest.mark.parametrize("size", [1, 4])
def test_outcomes_refuse_labels_of_other_images(size):
    # One label against five truths would broadcast into a plausible figure: 5 correct of 5.
    with pytest.raises(ValueError, match="5"):
        Outcomes.of(torch.zeros(size, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))


def test_outcomes_without_images_have_no_rates():
    empty = Outcomes.of(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert empty.n == 0
    with pytest.raises(ValueError, match="at least one image"):
        empty.rate("correct")


# --- paired comparisons ---------------------------------------------------------------------------------


def correctness(both: int, first: int, second: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    one = torch.tensor([True] * both + [True] * first + [False] * second + [False] * neither)
    two = torch.tensor([True] * both + [False] * first + [True] * second + [False] * neither)
    return one, two


def exact_p(first: int, second: int) -> float:
    """Twice the smaller tail of a fair coin, at most 1."""
    n = first + second
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n)


def test_mcnemars_p_is_the_binomial_summed_by_hand():
    result = Paired.of(*correctness(both=30, first=1, second=9, neither=2))
    assert (result.only_first, result.only_second) == (1, 9)
    assert result.p == pytest.approx(22 / 1024)  # 2 (1 + 10) / 2^10


@pytest.mark.parametrize(("first", "second"), list(itertools.product([0, 1, 4, 7], [0, 1, 5, 12])))
def test_mcnemars_p_on_small_tables(first, second):
    result = Paired.of(*correctness(3, first, second, 4))
    assert (result.only_first, result.only_second) == (first, second)
    assert result.p == pytest.approx(exact_p(first, second))
    mirrored = Paired.of(*reversed(correctness(3, first, second, 4)))
    assert (mirrored.only_first, mirrored.only_second, mirrored.p) == (second, first, pytest.approx(result.p))


def test_images_on_which_both_agree_do_not_count():
    assert Paired.of(*correctness(0, 2, 8, 0)).p == Paired.of(*correctness(500, 2, 8, 300)).p


def test_no_difference_is_p_one():
    same = torch.tensor([True, False, True])
    assert Paired.of(same, same) == Paired(0, 0, 1.0)
    assert Paired.of(*correctness(5, 6, 6, 1)).p == pytest.approx(1.0)


def test_pairs_must_be_of_the_same_images():
    with pytest.raises(ValueError, match=r"\(3,\), \(1,\)"):  # would broadcast
        Paired.of(torch.tensor([True, False, True]), torch.tensor([True]))
