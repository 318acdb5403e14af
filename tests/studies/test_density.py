"""The output's law under attack: three distances held against closed forms and other libraries, and their null."""

import math

import pytest
import scipy.stats
import torch
from problems import random_images, random_resnet
from torch import Tensor

import neuralsde_ito as ito
from neuralsde_ito.studies.density import path_sample


def gaussian(paths: int, images: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(paths, images, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_a_line(values: Tensor) -> Tensor:
    """Logits ``(P, N, 2)`` whose distances are those of the values ``(P, N)``."""
    return torch.stack([values, torch.zeros_like(values)], -1)


def voting(*votes: list[int], classes: int = 3) -> Tensor:
    """Logits ``(P, N, classes)`` of the votes, a list for each image."""
    return torch.nn.functional.one_hot(torch.tensor(votes).T, classes).double()


# --- values ---------------------------------------------------------------------------------------------


def test_the_energy_distance_is_scipys_squared():
    x, y = gaussian(40, 5, 1)[..., 0], 0.3 + 2 * gaussian(40, 5, 1, seed=1)[..., 0]
    shift = ito.density_shift(on_a_line(x), on_a_line(y), 19)
    expected = [scipy.stats.energy_distance(a, b) ** 2 for a, b in zip(x.T.numpy(), y.T.numpy(), strict=True)]
    assert shift.energy.tolist() == pytest.approx(expected, rel=1e-12)
    assert shift.paths == 40


def test_the_energy_distance_of_two_gaussians_is_the_closed_form():
    (mean, s), paths = (0.7, 1.5), 500
    x, y = gaussian(paths, 40, 1)[..., 0], mean + s * gaussian(paths, 40, 1, seed=1)[..., 0]

    def expected_size(mu: float, sigma: float) -> float:  # of a Gaussian: the mean of the folded one
        root = sigma * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / (2 * sigma**2))
        return root + mu * math.erf(mu / (sigma * math.sqrt(2)))

    within = expected_size(0, math.sqrt(2)) + expected_size(0, s * math.sqrt(2))
    law = 2 * expected_size(mean, math.sqrt(1 + s**2)) - within
    energy = ito.density_shift(on_a_line(x), on_a_line(y), 19).energy
    error = energy.std() / math.sqrt(40)
    assert float(energy.mean()) == pytest.approx(law + within / paths, abs=3 * float(error))  # the plug-in's bias
    assert error < 0.03 * law


def test_the_discrepancy_is_gretton_s_unbiased_estimate():
    x, y = gaussian(7, 1)[:, 0], 0.5 + gaussian(7, 1, seed=1)[:, 0]
    points = [*x, *y]
    pairs = [float((a - b).norm()) for i, a in enumerate(points) for b in points[i + 1 :]]
    h = sorted(pairs)[len(pairs) // 2]  # 91 pairs

    def mean_kernel(some: Tensor, others: Tensor, alike: bool) -> float:
        values = [
            math.exp(-float((a - b).square().sum()) / (2 * h**2))
            for i, a in enumerate(some)
            for j, b in enumerate(others)
            if not (alike and i == j)
        ]
        return sum(values) / len(values)

    expected = mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)
    shift = ito.density_shift(x[:, None], y[:, None], 19)
    assert float(shift.mmd) == pytest.approx(expected, rel=1e-12)


def test_the_discrepancy_of_one_law_is_zero_on_average():
    mmd = ito.density_shift(gaussian(20, 400), gaussian(20, 400, seed=1), 19).mmd
    assert abs(float(mmd.mean())) < 3 * float(mmd.std()) / 20
    assert (mmd < 0).any()


def test_the_divergence_of_votes_by_hand():
    clean = voting([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 2])
    attacked = voting([0, 0, 0, 0], [1, 1, 2, 2], [2, 0, 2, 1])
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))  # of the mixture of (1/2, 1/2) and (1, 0)
    votes = ito.density_shift(clean, attacked, 19).votes
    assert votes.tolist() == pytest.approx([entropy - 0.5, 1, 0], abs=1e-12)


def test_laws_of_a_model_without_noise_are_points():
    clean = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(8, 2, 2)
    attacked = torch.tensor([[1.0, 0.0], [-2.0, 4.0]]).expand(8, 2, 2)  # the first stays, the second moves by 5
    shift = ito.density_shift(clean, attacked)
    assert shift.energy.tolist() == pytest.approx([0, 10])
    assert shift.mmd.tolist() == pytest.approx([0, 2 - 2 * math.exp(-0.5)])  # at a bandwidth of 5
    assert shift.votes.tolist() == pytest.approx([0, 1])
    for p in (shift.energy_p, shift.mmd_p, shift.votes_p):
        assert p[0] == 1
        assert p[1] <= 3 / 201  # 2 of the 12,870 divisions are as extreme


def test_most_logits_alike_and_some_not():
    # The median distance is 0: the kernel says equal or not, and nothing is NaN.
    clean, attacked = torch.zeros(2, 10, 1, 2).unbind(0)
    clean = clean.index_put((torch.tensor([0]),), torch.ones(1, 2))
    shift = ito.density_shift(clean, attacked)
    assert float(shift.mmd) == pytest.approx(36 / 45 + 1 - 2 * 0.9)
    assert float(shift.mmd_p) == 1  # wherever the odd one lies


# --- the null -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nulls() -> list[ito.DensityShift]:
    samples = [(gaussian(15, 1, seed=2 * seed), gaussian(15, 1, seed=2 * seed + 1)) for seed in range(200)]
    return [ito.density_shift(x, y, 199, seed=seed) for seed, (x, y) in enumerate(samples)]


@pytest.mark.parametrize("name", ["energy", "mmd", "votes"])
def test_p_values_are_uniform_where_nothing_moved(nulls, name):
    p = torch.cat([getattr(shift, f"{name}_p") for shift in nulls])
    if name == "votes":  # few values are possible: at least as large is then more than its share
        assert 0.45 < p.mean() < 0.7
    else:
        assert scipy.stats.kstest(p.numpy(), "uniform").pvalue > 0.05
    for level in (0.05, 0.2):
        assert (p <= level).double().mean() <= level + 3 * math.sqrt(level * (1 - level) / 200)
    # The quantile says the same as the p-value at its level, and as often.
    value, quantile = (torch.cat([getattr(shift, name + end) for shift in nulls]) for end in ("", "_null"))
    assert (p[value > quantile * (1 + 1e-6)] <= 0.05).all()
    assert (p[value < quantile * (1 - 1e-6)] > 0.05).all()


def test_members_that_differ_are_not_exchanged():
    # Five members far apart: unrestricted divisions mix them, and would never call anything a shift.
    means = 10 * gaussian(5, 1, seed=9).repeat(3, 1, 1)  # path p belongs to member p % 5
    x, y = means + gaussian(15, 200, seed=1), means + gaussian(15, 200, seed=2)
    apart, mixed = ito.density_shift(x, y, 199, members=5), ito.density_shift(x, y, 199)
    assert torch.equal(apart.energy, mixed.energy)
    assert scipy.stats.kstest(apart.energy_p.numpy(), "uniform").pvalue > 0.05
    assert scipy.stats.kstest(apart.mmd_p.numpy(), "uniform").pvalue > 0.05
    assert mixed.energy_p.min() > 0.5
    moved = ito.density_shift(x, y + 1.5, 199, members=5)
    assert (moved.energy_p <= 0.05).double().mean() > 0.9
    assert (ito.density_shift(x, y + 1.5, 199).energy_p > 0.05).all()


def test_a_shift_is_found():
    x, y = gaussian(50, 20), gaussian(50, 20, seed=1)
    shift = ito.density_shift(x, y + torch.tensor([0, 0, 1.5]))
    for name in ("energy", "mmd", "votes"):
        assert (getattr(shift, f"{name}_p") <= 0.05).double().mean() > 0.9
        assert (getattr(shift, name) > getattr(shift, f"{name}_null")).double().mean() > 0.9
    assert (shift.energy_p == 1 / 201).any()
    wider = ito.density_shift(x, 3 * y)  # one mean, another law
    assert (wider.energy_p <= 0.05).double().mean() > 0.9
    assert (wider.mmd_p <= 0.05).double().mean() > 0.9


# --- what does not matter -------------------------------------------------------------------------------


def values(shift: ito.DensityShift) -> Tensor:
    return torch.stack([shift.energy, shift.mmd, shift.votes])


def test_invariances():
    x, y = gaussian(12, 6), 0.5 + gaussian(12, 6, seed=1)
    given = values(ito.density_shift(x, y))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    same = [(y, x), (x[order], y), (x[..., [2, 0, 1]], y[..., [2, 0, 1]]), (x + 3, y + 3)]
    for one, other in same:
        assert torch.allclose(values(ito.density_shift(one, other)), given, atol=1e-12)
    scaled = values(ito.density_shift(4 * x, 4 * y))
    assert torch.allclose(scaled, given * torch.tensor([4, 1, 1])[:, None], atol=1e-12)


def test_an_image_s_figures_do_not_depend_on_its_batch_and_the_seed_gives_the_divisions():
    x, y = gaussian(12, 6), 0.5 + gaussian(12, 6, seed=1)
    torch.manual_seed(3)
    whole = ito.density_shift(x, y, seed=4)
    torch.manual_seed(5)
    part = ito.density_shift(x[:, 2:4], y[:, 2:4], seed=4)
    for name in ("energy", "energy_null", "energy_p", "mmd", "mmd_null", "mmd_p", "votes", "votes_null", "votes_p"):
        assert torch.equal(getattr(whole, name)[2:4], getattr(part, name)), name
    assert not torch.equal(ito.density_shift(x, y, seed=5).energy_null, whole.energy_null)


ODD = torch.zeros(4, 2, 2).index_put((torch.tensor([2]), torch.tensor([1])), torch.tensor(math.nan))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attacked": torch.zeros(4, 3, 2)}, r"one shape .*\(4, 2, 2\) and \(4, 3, 2\)"),
        ({"clean": torch.zeros(4, 2), "attacked": torch.zeros(4, 2)}, "one shape"),
        ({"clean": torch.zeros(4, 0, 2), "attacked": torch.zeros(4, 0, 2)}, "one shape"),
        ({"clean": torch.zeros(1, 2, 2), "attacked": torch.zeros(1, 2, 2)}, "at least two"),
        ({"permutations": 18}, "permutations must be a whole number of at least 19, got 18"),
        ({"members": 3}, "4 paths cannot belong evenly to 3 members"),
        ({"members": 0}, "members must be a whole number of at least 1"),
        ({"attacked": ODD}, r"1 of the 8 attacked paths .* not finite.*\[1\]"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words):
    arguments = {"clean": torch.zeros(4, 2, 2), "attacked": torch.zeros(4, 2, 2), **change}
    with pytest.raises(ito.ItoError, match=words):
        ito.density_shift(**arguments)


# --- paths of an ensemble -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble() -> ito.ItoEnsemble:
    return ito.ItoEnsemble([ito.recast(random_resnet("resnet8"), omega=omega) for omega in (0.3, 0.6)], 5)


def test_a_sample_is_of_the_votes_that_the_report_counts(ensemble):
    x, index = random_images(3), torch.tensor([4, 9, 2])
    sample = path_sample(ensemble, x, 10, seed=6, index=index)
    assert sample.shape == (10, 3, 10)
    assert not sample.requires_grad
    votes = torch.nn.functional.one_hot(sample.argmax(-1), 10).unflatten(0, (5, 2)).sum(0)  # (members, N, classes)
    assert torch.equal(votes, ensemble.predict(x, seed=6, index=index, full=True).votes)
    one = path_sample(ensemble, x[1:2], 4, seed=6, index=index[1:2], first=4)
    assert torch.allclose(one, sample[4:8, 1:2], atol=1e-4)


def test_only_independent_paths_show_the_null(ensemble):
    x = random_images(12)
    clean = path_sample(ensemble, x, 20)
    common = ito.density_shift(clean, path_sample(ensemble, x, 20), members=2)
    assert common.energy.abs().max() < 1e-9  # nothing would ever move
    independent = ito.density_shift(clean, path_sample(ensemble, x, 20, first=20), members=2)
    assert independent.energy.min() > 1e-3
    assert (independent.energy_p <= 0.05).sum() <= 3
    assert independent.energy_p.min() < 0.5
    moved = ito.density_shift(clean, path_sample(ensemble, 1 - x, 20, first=20), members=2)
    assert (moved.energy_p <= 0.05).double().mean() > 0.5


def test_each_member_has_equally_many_paths(ensemble):
    with pytest.raises(ito.ItoError, match=r"paths must be a multiple of the 2 members.*got 5, take 6"):
        path_sample(ensemble, random_images(1), 5)
    with pytest.raises(ito.ItoError, match=r"first must be a multiple of the 2 members.*got 3, take 4"):
        path_sample(ensemble, random_images(1), 4, first=3)
