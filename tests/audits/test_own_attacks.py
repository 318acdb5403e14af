"""The audit's own attacks: gradients through steps and gates, a substitute, differences of answers; and what counts."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import neuralsde_ito as ito
from neuralsde_ito.attacks import PGD
from neuralsde_ito.attacks.suite import Step, Suite
from neuralsde_ito.audits import battery
from neuralsde_ito.audits.audit import _best, audit, default_attack
from neuralsde_ito.audits.battery import SmoothedTarget
from neuralsde_ito.audits.bundle import evidence_of, load_bundle, save_bundle, suite_of
from neuralsde_ito.audits.case import AuditCase
from neuralsde_ito.audits.check import KIN_SHARE, OTHER_SHARE, Finding
from neuralsde_ito.audits.gradient_free import NES
from neuralsde_ito.audits.straight_through import StraightThrough
from neuralsde_ito.audits.substitute import fit_substitute
from neuralsde_ito.audits.verify import verify_bundle
from neuralsde_ito.noise.keys import PathRange


class Loud(nn.Module):
    """A model of two classes whose votes are near one half on every image."""

    def forward(self, x: Tensor) -> Tensor:
        right = x.flatten(1).mean(1) - 0.45 + torch.randn(len(x))
        return torch.stack([right, torch.zeros_like(right)], 1)


def test_the_bottom_line_is_a_figure_of_one_vote_as_that_of_the_attack_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By many votes together, images near one half would be right more often than by the model's own vote."""
    torch.manual_seed(0)
    vote, x, y = ito.Vote(Loud()), torch.rand(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64)
    vote.observe(x)
    case = AuditCase(vote, x, y, PGD("linf", 0.01, 2, eot=4), 0, None, {}, 5, 10, None)
    steps = [Step(battery.IN_DOUBT, case.attack)]
    monkeypatch.setattr(battery, "battery", lambda case: (Suite(lambda eps: steps, {}, seed=case.seed), 1))
    best = _best(case)
    decided = vote.predict(best.images, seed=0).labels
    assert torch.equal(best.labels, decided)
    assert best.outcomes.correct == int((decided == y).sum())
    same = (best.images == case.white_box.images).flatten(1).all(1)
    assert torch.equal(best.labels[same], case.white_box.labels[same])


def test_several_votes_are_cast_once_on_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    vote, x, y = ito.Vote(Loud()), torch.rand(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64)
    vote.observe(x)
    case, asked, predict = AuditCase(vote, x, y, PGD("linf", 0.01, 2, eot=4)), [], ito.Vote.predict

    def count(self, images, *args, **kwargs):
        asked.append(len(images))
        return predict(self, images, *args, **kwargs)

    monkeypatch.setattr(ito.Vote, "predict", count)
    other = torch.cat([x[:4], 1 - x[4:]])
    first, second = battery.right_by_several_votes(case, x, other)
    assert asked == 5 * [6] + 5 * [2]
    again = battery.right_by_several_votes(case, other, x)
    assert len(asked) == 10
    assert torch.equal(again[0], second)
    assert torch.equal(again[1], first)


class Claims(Function):
    """The identity, which claims that it has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


class Asks(Claims):
    """Its forward asks more of its context than storage."""

    @staticmethod
    def forward(ctx, x):
        return x.clone() if ctx.needs_input_grad[0] else x + 0

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


claims = Claims.apply  # bound before anything looks at the class


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return 2 * x


class Through(nn.Module):
    """Images as logits, through a function that hands back no gradient."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.flatten(1))


HIDDEN = {
    "round": lambda x: (8 * x).round() / 8,
    "round in place": lambda x: (8 * x).clone().floor() / 8,
    "detach": lambda x: x.detach() + 0 * x,
    "data": lambda x: x.data + 0 * x,
    "no_grad": under_no_grad,
    "sign": lambda x: (x - 0.5).sign(),
    "gate": lambda x: (x > 0.5).float(),
    "gate as factor": lambda x: 3.0 * (x.detach() < 0.5),
    "where": lambda x: torch.where(x > 0.5, 1.0, 0.0) + 0 * x,
    "one-hot": lambda x: 10 * F.one_hot(x.argmax(1), x.shape[1]).float(),
    "coin": lambda x: torch.bernoulli(x),
    "steep sigmoid": lambda x: (1e4 * (x - 0.5)).sigmoid(),
    "steep softmax": lambda x: (1e4 * x).softmax(1),
    "a claim": claims,
    "a claim by the class": lambda x: Claims.apply(x),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_slope_is_found_and_values_stay(name):
    x = torch.rand(6, 1, 2, 5, generator=torch.Generator().manual_seed(0))
    module = Through(HIDDEN[name])
    through = StraightThrough(module)
    torch.manual_seed(1)
    plain = module(x)
    own = Claims.__dict__["backward"], Claims.__dict__["forward"]
    torch.manual_seed(1)
    images = x.clone().requires_grad_()
    relaxed = through(images)
    assert torch.equal(relaxed.detach(), plain.detach())
    weights = torch.linspace(-1, 1, 10)
    (gradient,) = torch.autograd.grad((relaxed * weights).sum(), images)
    assert float(gradient.abs().sum()) > 0
    assert through.changed
    assert torch.is_grad_enabled()
    assert (Claims.__dict__["backward"], Claims.__dict__["forward"]) == own


def test_a_network_without_such_steps_keeps_its_gradient():
    net = nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    through, x = StraightThrough(net), torch.rand(4, 1, 2, 5)
    assert not through.relaxes(x)
    gradients = [torch.autograd.grad(m(z := x.clone().requires_grad_()).sum(), z)[0] for m in (net, through)]
    assert torch.equal(*gradients)


def test_a_function_whose_forward_cannot_be_repeated_keeps_its_claim():
    x = torch.rand(2, 1, 2, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(StraightThrough(Through(Asks.apply))(x).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2))


# --- without gradients ----------------------------------------------------------------------------------


class Halves(nn.Module):
    """Which half is brighter? An answer in steps, with no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.stack([x[..., :2].mean((1, 2, 3)), x[..., 2:].mean((1, 2, 3))], 1)
        return ((1000 * halves).round() / 1000).detach() + 0 * x.flatten(1)[:, :2]


def halves(n: int = 8) -> tuple[Tensor, Tensor]:
    label = torch.arange(n) % 2
    bright = 0.5 + 0.04 * F.one_hot(label, 2).repeat_interleave(2, 1)[:, None, None]
    return bright.expand(n, 1, 4, 4).clone(), label


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.15)])
def test_nes_needs_no_gradient_and_no_batch(norm, eps):
    x, y = halves()
    assert not PGD(norm, eps).run(Halves(), x, y).fooled.any()
    attack, names = NES(norm, eps, steps=10), torch.arange(len(x)) + 5
    result = attack.run(Halves(), x, y, index=names)
    assert result.fooled.all()
    assert result.gradients == 0
    assert ito.attacks.norms.BALLS[norm].length(result.images - x).max() <= eps + 1e-6
    alone = attack.run(Halves(), x[3:4], y[3:4], index=names[3:4])
    assert torch.equal(alone.images, result.images[3:4])


def test_a_substitute_gives_the_models_answers_and_is_the_same_again():
    x, _ = halves(40)
    x = (x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)

    def answers(images: Tensor) -> Tensor:
        return F.one_hot(Halves()(images).argmax(1), 2).float()

    state = torch.get_rng_state()
    first, second = (fit_substitute(answers, x, "linf", 0.05, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(x), second(x))
    assert float((first(x).argmax(1) == answers(x).argmax(1)).double().mean()) > 0.9


def test_paths_of_a_neighbourhood_replay():
    x, _ = halves(4)
    target, index = SmoothedTarget(nn.Flatten(), x, "linf", 0.1), torch.arange(4)
    assert target.distinct is None
    both = target.path_logits(x, PathRange(0, "gradient", index, 0, 4))
    assert torch.equal(both[2:], target.path_logits(x, PathRange(0, "gradient", index, 2, 2)))
    assert 0 < float((both - x.flatten(1)).abs().max()) <= 0.1 + 1e-6
    assert not torch.equal(both[0], both[1])


# --- what counts ----------------------------------------------------------------------------------------


def finding(gained: int, lost: int = 0, n: int = 100, share: float = OTHER_SHARE, noisy: bool = False) -> Finding:
    before = torch.ones(n, dtype=torch.bool)
    before[:lost] = False
    after = torch.ones(n, dtype=torch.bool)
    after[lost : lost + gained] = False
    return Finding(before, after, n, share, noisy)


@pytest.mark.parametrize(("n", "kin", "others"), [(50, 8, 4), (100, 12, 5), (400, 32, 10)])
def test_the_least_difference_is_the_exact_binomial_one(n, kin, others):
    assert finding(1, n=n, share=KIN_SHARE).needed == kin
    assert finding(1, n=n).needed == others
    assert finding(others, n=n).beyond
    assert not finding(others - 1, n=n).beyond


def test_under_noise_images_that_fall_both_ways_are_luck():
    assert finding(12, lost=7).beyond  # without noise nothing falls by luck
    assert not finding(12, lost=7, noisy=True).beyond
    assert finding(12, lost=1, noisy=True).beyond


def test_the_default_attack_is_replaced_by_what_is_asked_for():
    assert default_attack("linf", 0.1, noisy=False).restarts == 2
    assert default_attack("linf", 0.1, noisy=True).objective == "mean-logits"
    assert default_attack("linf", 0.1, noisy=True, eot=5).eot == 5
    assert default_attack("linf", 0.1, noisy=True, steps=20) == PGD("linf", 0.1, steps=20)


def test_the_evidence_of_an_audit_is_made_again(tmp_path):
    data = ito.load_data("digits", augment="none")
    torch.manual_seed(0)
    linear = nn.Linear(64, 10)
    optimizer = torch.optim.Adam(linear.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(linear(data.train.pixels.flatten(1) / 255), data.train.labels).backward()
        optimizer.step()
    net = Through(lambda x: linear((8 * x).round() / 8))
    net.linear = linear
    images = ito.attacks.images.Images.of(data.test.first(12), 12, "cpu")
    settings = {"eps": 0.1, "steps": 3, "queries": 5, "draws": 10}
    result = audit(net, images.x, images.y, index=images.index, evidence=True, **settings)
    assert result.verdict == "masked"
    save_bundle(tmp_path / "evidence", evidence_of(result.run, data.test))
    evidence, voter = load_bundle(tmp_path / "evidence"), ito.Vote(net)
    assert int((evidence.denial.labels == images.y).sum()) == result.best.outcomes.correct
    suite = suite_of(evidence, voter, None)
    verification = verify_bundle(evidence, voter, data.test, suite, seed=5, sample=4)
    assert verification.stands, [claim for claim in verification.claims if not claim.stands]
