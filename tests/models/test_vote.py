"""`Vote`: any module votes, and its noise has an address: seed, path and image, whatever the batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuralsde_ito import (
    ABSTAIN,
    ItoEnsemble,
    ItoError,
    PathRange,
    Suite,
    SuiteSettings,
    Vote,
    evidence_of,
    load_bundle,
    make_keys,
    recast,
    run_suite,
    save_bundle,
    suite_of,
    verify_bundle,
)
from neuralsde_ito.attacks import PGD
from neuralsde_ito.attacks.fingerprints import fingerprint
from neuralsde_ito.attacks.images import Images
from neuralsde_ito.attacks.suite_run import attack_images
from neuralsde_ito.attacks.sweep import attack_sweep, least_norm
from neuralsde_ito.attacks.targets import KnownPaths, as_target
from neuralsde_ito.data import InMemory
from neuralsde_ito.models.resnets import load_resnet
from neuralsde_ito.noise.replay import replayed


class Head(nn.Module):
    """A small network with some noise in front of its last layer."""

    def __init__(self, noise=lambda h: h):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.noise, self.first, self.last = noise, nn.Linear(48, 24), nn.Linear(24, 4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5

    def forward(self, x):
        return self.last(self.noise(torch.tanh(self.first(x.flatten(1) - 0.5))))


def weights(h):  # drawn once a call, for all images
    return h * (1 + 0.3 * torch.randn(24))


OWN = torch.Generator().manual_seed(3)
NOISES = {
    "randn_like": lambda h: h + 0.3 * torch.randn_like(h),
    "dropout": lambda h: F.dropout(h, 0.4, training=True),
    "rand": lambda h: h * (torch.rand(len(h), 1) > 0.4),
    "normal_": lambda h: h + torch.empty_like(h).normal_(0, 0.3),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.6)),
    "multinomial": lambda h: h * F.one_hot(torch.multinomial(h.detach().exp(), 1)[:, 0], 24).to(h),
    "gumbel": lambda h: h * F.gumbel_softmax(h),
    "an own generator": lambda h: h + 0.3 * torch.randn(h.shape, generator=OWN),
    "weights": weights,
    "randint": lambda h: h.roll(int(torch.randint(0, 5, (1,))), 1),
}
X = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def path(count=3, index=None, seed=5):
    return PathRange(seed, "report", torch.arange(7) if index is None else index, 2, count)


@pytest.mark.parametrize("kind", NOISES)
def test_the_noise_of_an_image_depends_on_seed_path_and_name_only(kind):
    vote = Vote(Head(NOISES[kind]), inferences=9)
    vote.observe(X)
    assert vote.noisy
    assert vote.replayable
    assert not vote.remarks
    logits = vote.path_logits(X, path())
    torch.manual_seed(123)
    assert torch.equal(vote.path_logits(X, path()), logits)
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(vote.path_logits(X, path(seed=6)), logits)
    some = torch.tensor([4, 1])
    for rows in (some, some[:1], torch.tensor([3, 3, 3, 2, 1, 0, 6, 5, 4, 3, 2, 1])):
        torch.testing.assert_close(vote.path_logits(X[rows], path(index=rows)), logits[:, rows])
    last = PathRange(5, "report", torch.arange(7), 4, 1)  # a path has the same noise in whatever range it is asked for
    assert torch.equal(vote.path_logits(X, last)[0], logits[2])
    first, again = (vote.predict(X, seed=3, full=True) for _ in range(2))
    assert torch.equal(first.votes, again.votes)
    assert (first.votes.sum((0, 2)) == 9).all()
    early = vote.predict(X, seed=3)
    assert torch.equal(early.labels, first.labels)
    assert (early.drawn <= 9).all()


def test_noise_on_weights_is_not_taken_for_noise_on_images():
    vote = Vote(Head(lambda h: h * (1 + 0.3 * torch.randn(24))))
    x = torch.rand(24, 3, 4, 4)  # as many images as the noise has numbers
    names = torch.arange(24)
    whole = vote.path_logits(x, PathRange(0, "report", names))
    torch.testing.assert_close(vote.path_logits(x[:5], PathRange(0, "report", names[:5])), whole[:, :5])


class Counting(nn.Module):
    """Noise on images, and from some call on also on all of them together."""

    def __init__(self, shared_from: float = float("inf")) -> None:
        super().__init__()
        self.calls, self.shared_from = 0, shared_from

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noisy = x.flatten(1) + torch.randn_like(x.flatten(1))
        return noisy + torch.randn(1, 1) if self.calls > self.shared_from else noisy


def test_paths_share_a_call_where_no_draw_is_shared():
    x, paths = torch.rand(5, 1, 2, 3), PathRange(0, "gradient", torch.arange(5), 3, 40)
    model = Vote(module := Counting())
    model.observe(x)
    before = module.calls
    together = model.path_logits(x, paths)
    assert module.calls == before + 1
    model._together = False
    assert torch.allclose(model.path_logits(x, paths), together)
    assert module.calls == before + 41


def test_a_shared_draw_that_comes_later_is_seen():
    x, paths = torch.rand(5, 1, 2, 3), PathRange(0, "gradient", torch.arange(5), 3, 4)
    model = Vote(module := Counting())
    model.observe(x)
    module.shared_from = 0
    logits = model.path_logits(x, paths)
    model.path_logits(x[:2], paths.of(slice(2)))
    assert torch.allclose(model.path_logits(x[:2], paths.of(slice(2))), logits[:, :2])


def test_the_law_of_the_noise_is_the_modules_own():
    vote = Vote(Head(lambda h: torch.randn_like(h)))
    logits = vote.path_logits(X[:2], PathRange(0, "report", torch.arange(2), 0, 4000))
    assert (logits[:, 0] - logits[:, 1]).std() > 0.1  # each image has its own
    expected = vote.module.last.weight.pow(2).sum(1).sqrt()
    assert torch.allclose(logits[:, 0].std(0), expected, rtol=0.06)
    draws = Vote(Head(lambda h: F.dropout(torch.ones_like(h), 0.25, training=True)))
    mean = draws.path_logits(X[:1], PathRange(0, "report", torch.arange(1), 0, 3000)).mean(0)
    assert torch.allclose(mean[0], draws.module.last(torch.ones(24)), atol=0.05)


DRAWS = {  # what draws, and the mean and the standard deviation of its law
    "randn": (lambda x: torch.randn(x.shape), 0, 1),
    "randn_like": (torch.randn_like, 0, 1),
    "randn_like, channels_last": (lambda x: torch.randn_like(x, memory_format=torch.channels_last), 0, 1),
    "own generator": (lambda x: torch.randn(x.shape, generator=torch.Generator()), 0, 1),
    "float64": (lambda x: torch.randn_like(x.double()), 0, 1),
    "half": (lambda x: torch.randn_like(x.half()), 0, 1),
    "normal_": (lambda x: x.normal_(2, std=3), 2, 3),
    "normal": (lambda x: torch.normal(x, 2.0), 0, 2),
    "rand": (lambda x: torch.rand(x.shape), 0.5, 12**-0.5),
    "rand, bfloat16": (lambda x: torch.rand_like(x.bfloat16()), 0.5, 12**-0.5),
    "uniform_": (lambda x: x.uniform_(-1, 3), 1, 4 * 12**-0.5),
    "uniform_ to": (lambda x: x.uniform_(to=4), 2, 4 * 12**-0.5),
    "bernoulli_": (lambda x: x.bernoulli_(0.2), 0.2, 0.4),
    "bernoulli": (lambda x: torch.bernoulli(x + 0.2), 0.2, 0.4),
    "dropout": (lambda x: F.dropout(x + 1, 0.5), 1, 1),
    "exponential_": (lambda x: x.exponential_(), 1, 1),
    "randint": (lambda x: torch.randint(0, 2, x.shape).float(), 0.5, 0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_torchs_law_and_belong_to_their_image(name):
    draw, mean, deviation = DRAWS[name]
    x, keys, order = torch.zeros(6, 4, 20, 50), make_keys(0, "report", index=torch.arange(6)), torch.tensor([4, 0, 3])

    def drawn(keys: Tensor) -> Tensor:
        with replayed(keys, 9):
            first, second = draw(x[: len(keys)].clone()), draw(x[: len(keys)].clone())
        assert not torch.equal(first, second)
        return first

    every, some = drawn(keys), drawn(keys[order])
    assert torch.equal(some, every[order])
    assert every.is_contiguous() == draw(x.clone()).is_contiguous()
    assert every.dtype == draw(x.clone()).dtype
    values = every.double()
    assert values.mean() == pytest.approx(mean, abs=5 * deviation / len(values.flatten()) ** 0.5)
    assert values.std() == pytest.approx(deviation, rel=0.05)
    assert torch.corrcoef(values.flatten(1)).fill_diagonal_(0).abs().max() < 5 / values[0].numel() ** 0.5
    if name.startswith("rand,") or name == "rand":
        assert 0 <= values.min() <= values.max() < 1


@pytest.mark.parametrize(
    "draw",
    [lambda x: x.normal_(0, -1), lambda x: x.uniform_(2, 1), lambda x: x.bernoulli_(1.5)],
    ids=["std", "to", "p"],
)
def test_draws_with_wrong_arguments_are_refused_as_torch_does(draw):
    x, keys = torch.zeros(3, 4), make_keys(0, "report", index=torch.arange(3))
    with pytest.raises(RuntimeError), replayed(keys, 9):
        draw(x)


def test_the_global_generators_are_as_before():
    vote = Vote(Head(lambda h: h + torch.randn_like(h) * random.random() * np.random.rand()))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    vote.predict(X)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_draws_from_numpy_and_from_an_own_source_are_noticed():
    of_numpy = Vote(Head(lambda h: h + torch.from_numpy(np.random.randn(*h.shape)).to(h)))
    of_numpy.observe(X)
    assert of_numpy.noisy
    assert "numpy" in of_numpy.remarks[0]
    assert of_numpy.replayable  # its global generator is seeded with the path
    assert torch.equal(of_numpy.predict(X, 1, full=True).votes, of_numpy.predict(X, 1, full=True).votes)
    of_python = Vote(Head(lambda h: h * random.gauss(1, 0.5)))
    of_python.observe(X)
    assert "Python's random" in of_python.remarks[0]
    generator = np.random.default_rng(0)
    own = Vote(Head(lambda h: h + torch.from_numpy(generator.standard_normal(h.shape)).to(h)))
    own.observe(X)
    assert own.noisy
    assert not own.replayable
    assert "generator of its own" in own.remarks[-1]
    by_position = Vote(Head(lambda h: h + torch.randn(24, len(h)).T))
    by_position.observe(X)
    assert "depends on the other images" in by_position.remarks[0]


def test_without_noise_one_forward_pass_is_the_whole_vote():
    calls = []
    net = Head(lambda h: calls.append(len(h)) or h)
    vote = Vote(net, inferences=20)
    with pytest.raises(ItoError, match="observe"):
        _ = vote.noisy
    vote.observe(X)
    assert not vote.noisy
    calls.clear()
    prediction = vote.predict(X, full=True)
    assert calls == [7]
    assert torch.equal(prediction.labels, net(X).argmax(1))
    assert torch.equal(vote.path_logits(X, path()), net(X).expand(3, -1, -1))


def test_modes_belong_to_the_module_and_a_change_is_noticed():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Dropout(0.5), nn.Linear(32, 4)).eval()
    vote = Vote(net)
    vote.observe(X)
    assert not vote.noisy
    net[2].train()
    vote.predict(X)
    assert vote.noisy
    assert net[2].training
    assert not net.training


def test_an_inference_that_is_not_finite_votes_for_no_class():
    vote = Vote(Head(lambda h: h / (torch.rand(len(h), 1) > 0.7)), inferences=30)
    prediction = vote.predict(X, full=True)
    assert (prediction.invalid > 5).all()
    assert (prediction.labels == ABSTAIN).all()  # of no class more than half of all inferences


def test_a_members_vote_agrees_with_the_ensemble_within_chance():
    member = recast(load_resnet("resnet8", num_classes=4), omega=0.3).eval()
    x = torch.rand(40, 3, 16, 16)
    ensemble = ItoEnsemble([member], inferences=300)
    expected = ensemble.predict(x, full=True).votes[0] / 300
    vote = Vote(member, inferences=300)
    found = vote.predict(x, full=True).votes[0] / 300
    assert not vote.replayable  # it draws its own keys from the operating system
    # Two shares of 300 inferences differ by at most 5 standard errors.
    assert (found - expected).abs().max() <= 5 * (2 * 0.25 / 300) ** 0.5
    clear = expected.amax(1) > 0.65
    assert torch.equal(found[clear].argmax(1), expected[clear].argmax(1))


def test_attacks_suite_evidence_and_sweep_take_a_vote():
    vote = Vote(Head(NOISES["randn_like"]), inferences=11)
    labels = vote.predict(X).labels.clamp_min(0)
    result = PGD("linf", 0.5, steps=5, eot=4, selection=11).run(vote, X, labels)
    again = PGD("linf", 0.5, steps=5, eot=4, selection=11).run(vote, X, labels)
    assert torch.equal(result.images, again.images)
    assert result.fooled.any()
    vote.observe(X)
    settings = SuiteSettings(radii=(0.2, 0.5), effort=0.05, noise="known", batch_size=4)
    suite = settings.suite(vote)
    assert isinstance(suite, Suite)
    run = attack_images(suite, vote, Images(X, labels, torch.arange(7)), settings.radii, 4)
    other = attack_images(suite, vote, Images(X, labels, torch.arange(7)), settings.radii, 7)
    assert torch.equal(run.clean_votes, other.clean_votes)
    assert run.outcomes(1).correct < 7
    split = InMemory((X * 255).byte(), labels)
    sweep = attack_sweep(vote, None, split, [PGD("linf", 0.5, steps=3, eot=4)])
    assert list(sweep.labels[0]) == ["ensemble"]
    assert not sweep.resnet
    with pytest.raises(ItoError, match="surrogate 'resnet'"):
        attack_sweep(vote, None, split, [PGD()], ["resnet"])
    radii = least_norm(vote, X, labels, lambda eps: PGD("linf", eps, steps=5, eot=4), 1.0, rounds=3)
    assert (radii > 0).any()
    assert fingerprint(vote) != fingerprint(Vote(nn.Linear(2, 2)))


def test_known_paths_are_those_of_the_report():
    vote = Vote(Head(NOISES["dropout"]), inferences=8)
    vote.observe(X)
    known = KnownPaths(vote, X, seed=4)
    logits = known.path_logits(X, PathRange(0, "gradient", torch.arange(7)))
    votes = F.one_hot(logits.argmax(-1), 4).sum(0)
    assert torch.equal(vote.predict(X, 4, full=True).votes[0], votes)


def test_gradients_pass_through_addressed_noise():
    vote = Vote(Head(NOISES["dropout"])).double()
    x = X.double()
    target = as_target(vote, x)
    paths = path(count=2)
    y = torch.zeros(7, dtype=torch.long)
    ascent = target.ascend(lambda logits, y: logits.mean(0)[:, 0], x, y, paths)
    direction = torch.randn_like(x)
    up, down = (target.path_logits(x + h * direction, paths).mean(0)[:, 0] for h in (1e-5, -1e-5))
    torch.testing.assert_close(
        (up - down) / 2e-5, (ascent.gradient * direction).flatten(1).sum(1), rtol=1e-5, atol=1e-8
    )


def test_what_is_no_module_is_refused():
    with pytest.raises(ItoError, match="wrap a function"):
        Vote(lambda x: x)
    with pytest.raises(ItoError, match="inferences"):
        Vote(nn.Linear(2, 2), inferences=0)
    with pytest.raises(ItoError, match="logits"):
        Vote(nn.Identity()).predict(X)


def test_evidence_of_a_vote_is_verified(tmp_path):
    vote = Vote(Head(NOISES["dropout"]), inferences=11)
    pixels = (X * 255).byte()
    x = pixels.float() / 255
    test = InMemory(pixels, vote.predict(x).labels.clamp_min(0))
    settings = SuiteSettings(radii=(0.3,), effort=0.05)
    both = run_suite(vote, None, test, settings, tmp_path / "state")
    assert both.resnet is None
    with pytest.raises(ItoError, match="no ResNet"):
        both.paired(0)
    save_bundle(tmp_path / "bundle", evidence_of(both.ito, test))
    evidence = load_bundle(tmp_path / "bundle")
    verification = verify_bundle(evidence, vote, test, suite_of(evidence, vote, None), seed=1, sample=5)
    assert all(claim.stands for claim in verification.claims)
    other = Vote(Head(NOISES["dropout"]), inferences=11)
    other.module.last.bias.data += 1
    other.observe(x)
    found = {c.name: c.stands for c in verify_bundle(evidence, other, test, None, seed=1, sample=5).claims}
    assert not found["ensemble"]
