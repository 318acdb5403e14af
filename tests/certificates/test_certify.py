"""`certify` counts the inferences that it says, for a vote that is known in closed form, and keeps what is finished."""

from pathlib import Path

import pytest
import torch
from problems import random_images, random_resnet
from scipy.stats import binom, binomtest, norm
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito import ABSTAIN, ItoError, certify
from neuralsde_ito.certificates import bounds
from neuralsde_ito.certificates.certify import Certificate, Certifier, Sampling, smoothed, with_input_sigma
from neuralsde_ito.certificates.certify_run import certify_split
from neuralsde_ito.data import InMemory
from neuralsde_ito.models.recast import ItoResNet

SIGMA = 0.25


def linear() -> nn.Sequential:
    """Logits ``(0, w x + b)`` of images ``(N, 1, 4, 4)``, with ``|w| = 1``: the margin of an image is ``|w x + b|``."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    weight = torch.randn(16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros(16), weight / weight.norm()]))
        net[1].bias.copy_(torch.tensor([0.0, -0.5 * float((weight / weight.norm()).sum())]))
    return net.eval().requires_grad_(False)


def ito_linear(omega: float, **settings: object) -> ItoResNet:
    """The linear classifier with noise inside: a block that only diffuses, ``omega`` for each pixel, and the head."""
    return ito.recast(ito.Chain(nn.Identity(), [nn.Identity()], linear()), omega, image_shape=(1, 4, 4), **settings)


def signed(x: Tensor) -> Tensor:
    """``w x + b``, ``(N,)``."""
    return linear()(x)[:, 1].double()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_images(60, 4, 1)


def shares_fit(certificate: Certificate, p: Tensor) -> bool:
    """Whether counts of all images are those of a binomial with probabilities ``p`` of their candidates ``(N,)``."""
    n = certificate.sampling.n
    tails = [
        min(binom.cdf(k, n, q), binom.sf(k - 1, n, q))
        for k, q in zip(certificate.counts.tolist(), p.tolist(), strict=True)
    ]
    return min(tails) > 1e-3 / len(tails)


@pytest.mark.parametrize("kind", ["module", "vote", "ensemble", "noise inside"])
def test_radii_of_a_linear_classifier_are_below_its_margins(kind, images):
    omega = 0.2 if kind == "noise inside" else 0.0
    model: nn.Module = linear()
    if kind == "vote":
        model = ito.Vote(model)
    elif kind != "module":
        model = ito.ItoEnsemble([ito_linear(omega, input_sigma=SIGMA)])
    sigma = SIGMA if kind in ("module", "vote") else None
    found = certify(model, images, sigma, n0=50, n=400, alpha=0.1, beta=0.0, seed=7)
    margin = signed(images).abs()
    right = found.candidates == (signed(images) > 0)
    assert right.double().mean() > 0.9
    # With noise inside, a vote is as under one noise of variance sigma^2 + omega^2; the radius counts sigma alone.
    p = torch.from_numpy(norm.cdf(margin / (SIGMA**2 + omega**2) ** 0.5))
    full = found.drawn == 400
    assert shares_fit(
        Certificate(found.sampling, found.index[full], found.selected[full], found.votes[full], found.drawn[full]),
        torch.where(right, p, 1 - p)[full],
    )
    expected = torch.from_numpy(bounds.radius(found.counts.numpy(), 400, SIGMA, 0.1)) * full
    assert torch.equal(found.radii, expected)
    assert (found.radii > 0).double().mean() > 0.5
    false = int(((found.radii > margin) | (~right & (found.radii > 0))).sum())
    assert binomtest(false, 60, 0.1, alternative="greater").pvalue > 1e-3
    assert torch.equal(found.labels == ABSTAIN, found.radii == 0)


def test_members_that_differ_are_drawn_in_turn(images):
    ensemble = ito.ItoEnsemble([ito_linear(omega, input_sigma=SIGMA) for omega in (0.0, 0.5, 1.0)])
    found = certify(ensemble, images[:30], n=1000, alpha=0.1, beta=0.0)
    assert found.sampling.n == 1002  # a multiple of the members
    margin = signed(images[:30]).abs()
    each = [torch.from_numpy(norm.cdf(margin / (SIGMA**2 + omega**2) ** 0.5)) for omega in (0.0, 0.5, 1.0)]
    right, full = found.candidates == (signed(images[:30]) > 0), found.drawn == 1002
    # A sum of three binomials is narrower than a binomial of their mean: compare means and variances.
    mean, variance = sum(334 * p for p in each), sum(334 * p * (1 - p) for p in each)
    agreed = torch.where(right, found.counts, 1002 - found.counts)
    z = ((agreed - mean) / variance.clamp_min(0.5).sqrt())[full]
    assert len(z) > 20
    assert z.abs().max() < 4
    assert 0.5 < float(z.square().mean()) < 1.7


@torch.no_grad()
def test_samples_are_the_inferences_that_keys_name(images):
    x = random_images(3, 16)
    members = [ito.recast(random_resnet("resnet8"), omega, input_sigma=1.0) for omega in (0.2, 0.6)]
    found = certify(ito.ItoEnsemble(members), x, n0=6, n=40, alpha=0.2, beta=0.0, seed=4, index=torch.tensor([5, 9, 2]))
    for purpose, votes, drawn in (
        ("selection", found.selected, [6] * 3),
        ("report", found.votes, found.drawn.tolist()),
    ):
        for i, (name, count) in enumerate(zip([5, 9, 2], drawn, strict=True)):
            expected = torch.zeros(10, dtype=torch.int64)
            for q in range(count):
                keys = ito.make_keys(4, purpose, q % 2, q // 2, torch.tensor([name, name]))
                expected[members[q % 2](x[[i, i]], keys)[0].argmax()] += 1
            assert torch.equal(votes[i], expected)


@pytest.mark.parametrize("kind", ["module", "ensemble"])
def test_a_result_does_not_depend_on_the_batch(kind, images):
    model = linear() if kind == "module" else ito.ItoEnsemble([ito_linear(0.3, input_sigma=SIGMA)] * 2)
    sigma, settings = (SIGMA if kind == "module" else None), {"n0": 20, "n": 200, "alpha": 0.1}
    whole = certify(model, images[:12], sigma, **settings, batch_size=12)
    ticks: list[int] = []
    again = certify(model, images[:12], sigma, **settings, batch_size=5, tick=ticks.append)
    part = certify(model, images[7:9], sigma, **settings, index=torch.tensor([7, 8]))
    assert ticks == [5, 5, 2]
    for name in ("selected", "votes", "drawn", "radii"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
        assert torch.equal(getattr(whole, name)[7:9], getattr(part, name))
    other = certify(model, images[:12], sigma, **settings, seed=1)
    assert not torch.equal(other.votes, whole.votes)


def test_early_stops_end_in_abstentions_and_change_no_certificate(images):
    settings = {"sigma": SIGMA, "n": 1000, "seed": 2}
    x = torch.cat([images, images - signed(images).float()[:, None, None, None] * linear()[1].weight[1].view(1, 4, 4)])
    x = x.clamp(0, 1)  # of the second half, most lie on the boundary: one half of their votes
    full, early = certify(linear(), x, **settings, beta=0.0), certify(linear(), x, **settings, beta=0.01)
    stopped = early.drawn < 1000
    assert stopped.sum() > 20
    assert bool((early.labels[stopped] == ABSTAIN).all())
    assert torch.equal(early.radii[~stopped], full.radii[~stopped])
    assert torch.equal(early.votes[~stopped], full.votes[~stopped])
    assert int((full.radii[stopped] > 0).sum()) <= 3  # lost, at beta 0.01
    assert early.drawn.sum() < full.drawn.sum()
    cut = full.drawn < 1000  # only where no certificate was possible
    least = bounds.least_count(1000, 0.001)
    assert bool((full.counts[cut] + 1000 - full.drawn[cut] < least).all())


def test_what_a_network_draws_inside_is_part_of_its_vote(images):
    net = nn.Sequential(nn.Dropout(0.4), linear()).train()
    net[1].eval()
    found = certify(net, images[:10], SIGMA, n=500, alpha=0.1, beta=0.0)
    again = certify(net, images[:10], SIGMA, n=500, alpha=0.1, beta=0.0)
    assert torch.equal(found.votes, again.votes)
    without = certify(linear(), images[:10], SIGMA, n=500, alpha=0.1, beta=0.0)
    assert not torch.equal(found.votes, without.votes)
    assert net[0].training


def test_inferences_that_are_not_finite_vote_for_nobody(images):
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = linear()(x)
            return torch.where((x[:, 0, 0, :1] > 0.5), torch.nan, logits)

    found = certify(Breaks(), images[:10], SIGMA, n=300, alpha=0.1, beta=0.0)
    assert bool((found.votes.sum(1) < found.drawn).any())
    assert bool((found.radii[found.counts < 160] == 0).all())


def test_certified_accuracy_and_the_average_radius():
    votes = torch.tensor([[100, 0], [10, 90], [50, 50], [5, 95]])
    found = Certificate(Sampling(0.5, 10, 100), torch.arange(4), votes // 10, votes, torch.tensor([100, 100, 100, 80]))
    truth = torch.tensor([0, 0, 0, 1])
    assert found.labels.tolist() == [0, 1, ABSTAIN, ABSTAIN]  # the last was stopped
    assert found.radii.tolist()[2:] == [0, 0]
    assert float(found.radii[0]) == found.sampling.largest_radius
    assert found.holds(truth, 0.0).tolist() == [True, False, False, False]
    assert not bool(found.holds(truth, found.sampling.largest_radius).any())
    assert found.accuracy(truth, 0.1).value == 0.25
    assert found.average_radius(truth) == pytest.approx(float(found.radii[0]) / 4)


ENSEMBLE_OF_TWO = [{"input_sigma": 0.1}, {"input_sigma": 0.2}]


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (linear, {}, "give sigma, in pixel units"),
        (linear, {"sigma": 0.0}, "a sigma above 0"),
        (linear, {"sigma": -1.0}, "input_sigma must be"),
        (lambda: ito_linear(0.2), {}, r"recast\(net, input_sigma=0.25\)"),
        (lambda: ito_linear(0.2, input_sigma=0.1), {"sigma": 0.25}, "have input_sigma 0.1"),
        (lambda: ito.ItoEnsemble([ito_linear(0.2, **s) for s in ENSEMBLE_OF_TWO]), {}, "needs one input_sigma"),
        (lambda: ito_linear(0.0, solver="ode:dopri5", input_sigma=0.1), {}, "with a solver of fixed steps"),
        (linear, {"sigma": 0.1, "alpha": 0.5}, "alpha must be above 0 and below 1/4"),
        (linear, {"sigma": 0.1, "beta": 0.3}, "beta must be at least 0 and below 1/4"),
        (linear, {"sigma": 0.1, "n": 9}, "take 10 or more"),
        (linear, {"sigma": 0.1, "n": 10**12}, "at most 1,000,000,000"),
        (linear, {"sigma": 0.1, "n0": 0}, "n0 must be a whole number"),
        (linear, {"sigma": 0.1, "index": torch.arange(3)}, "index names the images"),
        (lambda: len, {"sigma": 0.1}, "must be an nn.Module"),
        (lambda: nn.Sequential(nn.BatchNorm2d(1), linear()).train(), {"sigma": 0.1}, "depends on the others"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(model, settings, said, images):
    with pytest.raises(ItoError, match=said) as error:
        certify(model(), images[:4], **settings)
    assert len(str(error.value)) < 300


def test_images_out_of_range_are_refused(images):
    with pytest.raises(ItoError, match=r"in \[0, 1\]"):
        certify(linear(), images + 1, SIGMA)


def test_the_noise_of_the_members_can_be_set(images):
    ensemble = ito.ItoEnsemble([ito_linear(0.2), ito_linear(0.3)])
    noisy = with_input_sigma(ensemble, SIGMA)
    assert [m.input_sigma for m in noisy.members] == [SIGMA, SIGMA]
    assert [m.input_sigma for m in ensemble.members] == [0, 0]
    assert smoothed(noisy) == (noisy, SIGMA)
    assert smoothed(noisy, SIGMA)[0] is noisy


# --- whole splits -----------------------------------------------------------------------------------------


@pytest.fixture
def split() -> InMemory:
    pixels = (255 * random_images(11, 4, 1)).round().to(torch.uint8)
    return InMemory(pixels, torch.arange(11) % 2).first(9)


def test_an_interrupted_certification_goes_on_bit_for_bit(split, tmp_path: Path, monkeypatch):
    voter = smoothed(ito.ItoEnsemble([ito_linear(0.2, input_sigma=SIGMA)] * 2))[0]
    sampling, made = Sampling(SIGMA, 10, 60, alpha=0.1), []
    kept = Certifier.certify
    monkeypatch.setattr(Certifier, "certify", lambda self, x, index: (made.append(len(x)), kept(self, x, index))[1])
    alone = certify_split(voter, split, sampling, batch_size=2)
    assert alone.state is None
    assert made == [2, 2, 2, 2, 1]

    def stop(images: int) -> None:
        if len(made) == 3:
            raise KeyboardInterrupt

    made.clear()
    with pytest.raises(KeyboardInterrupt):
        certify_split(voter, split, sampling, 2, tmp_path, tick=stop)
    for other in (Sampling(SIGMA, 10, 62, alpha=0.1), Sampling(SIGMA, 10, 60, alpha=0.1, seed=1)):
        with pytest.raises(ItoError, match="nothing to resume"):
            certify_split(voter, split, other, 2, tmp_path, resume=True)
    for model, images in ((with_input_sigma(voter, 0.3), split), (voter, split.first(8))):
        with pytest.raises(ItoError, match="nothing to resume"):
            certify_split(model, images, sampling, 2, tmp_path, resume=True)
    made.clear()
    done = certify_split(voter, split, sampling, 2, tmp_path, resume=True)
    assert made == [2, 1]
    for name in ("index", "selected", "votes", "drawn", "radii"):
        assert torch.equal(getattr(done.certificate, name), getattr(alone.certificate, name))
    assert torch.equal(done.certificate.index, split.names)
    assert torch.equal(done.truth, split.labels)
    assert done.state is not None
    assert list(tmp_path.iterdir()) == [done.state]
    file = next(done.state.iterdir())
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ItoError, match="is damaged; delete it, and resume"):
        certify_split(voter, split, sampling, 2, tmp_path, resume=True)
    made.clear()
    certify_split(voter, split, sampling, 2, tmp_path).discard_state()  # without --resume all is made anew
    assert len(made) == 5
    assert not list(tmp_path.iterdir())


def test_a_split_gives_what_its_images_give(split):
    found = certify_split(smoothed(linear(), SIGMA)[0], split, Sampling(SIGMA, 10, 60, alpha=0.1), batch_size=4)
    x, names = split.pixels.float() / 255, split.names
    alone = certify(linear(), x, SIGMA, n0=10, n=60, alpha=0.1, index=names)
    assert torch.equal(found.certificate.votes, alone.votes)
