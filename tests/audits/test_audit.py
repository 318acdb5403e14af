"""Every check on a sound model, and on a model or an attack with the fault that the check looks for."""

import copy
import inspect
import json
import math
import re
import textwrap
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from neuralsde_ito.cli import cli
from problems import smooth_chain
from torch import Tensor, nn
from torch.nn import functional as F

import neuralsde_ito as ito
from neuralsde_ito.attacks import PGD
from neuralsde_ito.audits import audit as audits
from neuralsde_ito.audits.audit import CHECKS, Audit, audit
from neuralsde_ito.audits.case import AuditCase, JudgedAttack, input_gradients_only
from neuralsde_ito.audits.check import Check, RunCheck, beyond_chance, check, from_to

checks = SimpleNamespace(**{check.__name__: check for check in CHECKS})

EPS = 0.05  # at which the plain network keeps some digits and loses others


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A small network that was trained on the digits, without any defence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Softplus(), nn.Linear(48, 10))
    train = ito.load_data("digits", augment="none").train
    x, y = train.pixels.float() / 255, train.labels
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    test = ito.load_data("digits").test
    return test.pixels[:40].float() / 255, test.labels[:40]


class Wrapped(nn.Module):
    """A network with a function before it, of the images, and one after it, of the logits."""

    def __init__(self, net: nn.Module, before: Callable = lambda x: x, after: Callable = lambda z: z) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def quantised(net: nn.Module, levels: int = 8) -> nn.Module:
    return Wrapped(net, before=lambda x: (x * levels).round() / levels)


def saturated(net: nn.Module) -> nn.Module:
    return Wrapped(net, after=lambda z: 1e6 * z)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Randomised modules here draw from torch's generator: no test depends on the tests before it."""
    torch.manual_seed(0)


def noisy(net: nn.Module, sigma: float) -> nn.Module:
    return Wrapped(net, before=lambda x: x + sigma * torch.randn_like(x))


class Detached(nn.Module):
    """A residual network whose drift is detached: the gradient is that of the shortcut alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1e-3 * x.flatten(1)[:, :10] + self.net(x.detach())


def outcome(check: RunCheck, model: nn.Module, images: tuple[Tensor, Tensor], eps=EPS, **options) -> Check:
    """One check on a model; ``options`` that are not of the case are settings of its PGD."""
    own = {name: options.pop(name) for name in ("surrogates", "queries", "draws") if name in options}
    result = check(AuditCase(model, *images, PGD(**{"eps": eps, **options}), **own))
    assert result.note
    assert result.source
    assert result.threshold
    return result


def passes(check: RunCheck, model: nn.Module, images: tuple[Tensor, Tensor], **options) -> None:
    result = outcome(check, model, images, **options)
    assert result.verdict == "pass", result


def fails(check: RunCheck, model: nn.Module, images: tuple[Tensor, Tensor], **options) -> None:
    result = outcome(check, model, images, **options)
    assert result.verdict == "fail", result


def does_not_apply(check: RunCheck, model: nn.Module, images: tuple[Tensor, Tensor], **options) -> None:
    result = outcome(check, model, images, **options)
    assert result.verdict == "not applicable", result


def test_a_new_check_takes_ten_lines(net, images, monkeypatch):
    # The example in the docstring, with its entry in CHECKS.
    example = textwrap.dedent(inspect.cleandoc(check.__doc__).split("Example::\n")[1]).strip()
    assert len(example.splitlines()) < 10
    names = {"check": check, "AuditCase": AuditCase, "from_to": from_to, "beyond_chance": beyond_chance}
    exec(example, names)
    monkeypatch.setattr(audits, "CHECKS", (*CHECKS[:2], names["mirror_images"]))
    result = audit(net, images[0][:20], images[1][:20], eps=EPS, steps=2)
    assert [each.number for each in result.checks] == [1, 2, 25]
    assert result.checks[2].verdict == "fail", result.checks[2]  # the network was trained without flips
    assert result.as_dict()["checks"][2]["name"] == "mirror images"


# --- one check at a time --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audits_of(net, images) -> Callable[[str], Audit]:
    """Whole audits of a plain network and of three masked ones, each made once."""
    made: dict[str, Audit] = {}
    models = {
        "plain": Wrapped(net),
        "quantised": quantised(net),
        "detached": Detached(net),
        "saturated": saturated(net),
    }

    def audit_of(name: str) -> Audit:
        if name not in made:
            eps = EPS if name == "plain" else 0.15
            made[name] = audit(models[name], *images, eps=eps, queries=150, draws=1000)
        return made[name]

    return audit_of


def test_the_checks_are_numbered_in_order(audits_of):
    result = audits_of("plain")
    assert [check.number for check in result.checks] == list(range(1, len(CHECKS) + 1))
    assert len({check.name for check in result.checks}) == len(CHECKS)


def test_a_plain_network_is_sound_as_far_as_seen(audits_of):
    result = audits_of("plain")
    assert 0 < result.attacked.correct < result.clean.correct
    assert result.verdict == "sound as far as seen", result.summary
    assert result.sound
    assert result.passed, result.failed
    assert {check.verdict for check in result.checks} == {"pass", "not applicable"}
    assert result.best.outcomes.correct <= result.attacked.correct
    rates = [rate.value for _, rate in result.curve]
    assert rates == sorted(rates, reverse=True)
    assert [eps / EPS for eps, _ in result.curve] == pytest.approx([0, 0.25, 0.5, 1, 2])


@pytest.mark.parametrize(
    ("broken", "expected"),
    [("quantised", {3, 12, 14, 17, 21, 24}), ("detached", {12, 13, 14, 17, 18, 21, 24}), ("saturated", {3, 21, 24})],
)
def test_masked_gradients_are_proven(audits_of, net, images, broken, expected):
    result = audits_of(broken)
    assert result.verdict == "masked"
    assert {check.number for check in result.failed} >= expected
    assert result.best.outcomes.correct < result.attacked.correct / 2
    assert result.best.attack in result.summary
    assert result.best.attack in result.best.made_by
    # The proof is the images: inside the ball, and they fool the model.
    x, y = images
    assert float((result.best.images - x).abs().max()) <= 0.15 + 1e-6
    model = {"quantised": quantised, "detached": Detached, "saturated": saturated}[broken](net)
    assert int((model(result.best.images).argmax(1) == y).sum()) == result.best.outcomes.correct


def test_1_randomness(net, images):
    passes(checks.randomness, net, images)
    passes(checks.randomness, noisy(net, 0.05), images)  # the attack averages
    fails(checks.randomness, noisy(net, 0.05), images, eot=1)


def test_2_logits(net, images):
    passes(checks.logits, net, images)
    # Probabilities that hide nothing from other objectives are no fault of the model.
    assert outcome(checks.logits, Wrapped(net, after=lambda z: z.softmax(1)), images).verdict == "undecided"
    fails(checks.logits, Wrapped(net, after=lambda z: F.one_hot(z.argmax(1), 10) + 0 * z), images, eps=0.1)  # votes


class DeadOn(nn.Module):
    """A network without a gradient at some of the images, which the attack need not pass."""

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.net, self.images = net, images

    def forward(self, x: Tensor) -> Tensor:
        dead = (x[:, None] == self.images[None]).flatten(2).all(2).any(1)
        z = self.net(x)
        return torch.where(dead[:, None], z.detach(), z)


def test_3_a_few_zero_gradients_are_only_suspicious(net, images):
    check = outcome(checks.zero_gradients, DeadOn(net, images[0][:3]), images)
    assert check.verdict == "undecided", check
    assert check.suspicious


class Drowned(nn.Module):
    """A network without a gradient, with noise that has one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        slope = x.flatten(1)[:, :10]
        return self.net(x) + 1e-2 * slope * torch.randn_like(slope)


def test_4_eot_adequacy(net, images):
    passes(checks.eot_adequacy, noisy(net, 0.02), images, steps=5)
    # Noise alone is no fault: twice the paths find no more, though single gradients hardly agree.
    passes(checks.eot_adequacy, noisy(net, 0.5), images, steps=10, eot=1)
    fails(checks.eot_adequacy, Drowned(quantised(net)), images, eps=0.15)
    does_not_apply(checks.eot_adequacy, net, images)


def test_5_more_iterations(net, images):
    passes(checks.more_iterations, net, images)
    fails(checks.more_iterations, net, images, random_start=False, step_size=0.005, steps=8, eps=0.1)


def test_6_convergence(net, images):
    passes(checks.convergence, net, images)
    fails(checks.convergence, net, images, random_start=False, step_size=0.005, steps=8, eps=0.1)
    does_not_apply(checks.convergence, net, images, eps=0.5)  # nothing is left


class Bump(nn.Module):
    """Wrong only at brightnesses within 0.008 of 0.541; the images have a brightness of 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        height = 0.1 - (40 * (x.mean((1, 2, 3)) - 0.541)) ** 2
        return torch.stack([torch.zeros_like(height), height], 1)


def test_7_silent_success():
    grey = torch.full((9, 1, 4, 4), 0.5), torch.zeros(9, dtype=torch.int64)
    there_and_back = {"eps": 0.1, "steps": 2, "step_size": 0.04, "random_start": False, "stop": False}
    fails(checks.silent_success, Bump(), grey, **there_and_back, keep="last")
    does_not_apply(checks.silent_success, Bump(), grey, **there_and_back)  # the best iterate: no survivor


def test_7_holds_on_a_sound_model(net, images):
    passes(checks.silent_success, net, images)
    passes(checks.silent_success, noisy(net, 0.1), images, steps=5)


class Rippled(nn.Module):
    """Logits with ripples that are much shorter than the ball and hardly change an answer."""

    def __init__(self, net: nn.Module, height: float = 0.5) -> None:
        super().__init__()
        self.net, self.height = net, height

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        # Of the pixels' sum, as no difference of images is orthogonal to all of them.
        return logits * (1 + self.height * (3e4 * x.flatten(1).sum(1, keepdim=True)).sin())


def test_8_rough_landscape(net, images):
    passes(checks.rough_landscape, net, images)
    passes(checks.rough_landscape, noisy(net, 0.1), images, steps=5)  # noise is no roughness
    fails(checks.rough_landscape, Rippled(net), images)


def test_9_unbounded_attack(net, images):
    passes(checks.unbounded_attack, net, images, norm="l2", eps=0.5)
    fails(checks.unbounded_attack, saturated(net), images)


class Trap(nn.Module):
    """Brightness decides the class. Where some pixel is too far from the mean, the logits have no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        strayed = (x - mean[:, None, None, None]).abs().amax((1, 2, 3)) > 0.12
        score = torch.where(strayed, (mean - 0.5).detach().sign() * 1e6, mean - 0.5)
        return torch.stack([torch.zeros_like(score), score], 1)


def test_10_monotone(net, images):
    passes(checks.monotone, net, images)
    bright = 0.45 + 0.1 * (torch.arange(30) % 2)
    flat = bright[:, None, None, None].expand(30, 1, 4, 4).clone(), torch.arange(30) % 2
    fails(checks.monotone, Trap(), flat, eps=0.1)


class TrueOnGrid(nn.Module):
    """Only at pictures of 8 bits the gradient is true: at the first step of an attack."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        grey, z = 255 * x, self.net(x)
        on_grid = ((grey - grey.round()).abs() < 1e-3).flatten(1).all(1)
        return torch.where(on_grid[:, None], z, z.detach() + 1e-6 * x.flatten(1)[:, :10])


def test_11_one_step(net, images):
    fails(checks.one_step, TrueOnGrid(net), images, eps=0.1)


def test_12_and_others_say_where_they_have_no_power(net, images):
    check = outcome(checks.black_box, net, images, eps=0.13, queries=20)
    assert check.verdict in ("undecided", "not applicable"), check
    assert not check.suspicious


def test_13_random_noise(net, images):
    fails(checks.random_noise, quantised(net), images, eps=0.3, random_start=False, draws=500)


@pytest.mark.parametrize(("draws", "expected"), [(None, 20), (7, 7)])
def test_13_random_noise_draws_fewer_points_of_large_images(net, images, monkeypatch, draws, expected):
    monkeypatch.setattr("neuralsde_ito.audits.other_attacks._PIXELS", 20 * 64 * 30)
    x, y = images
    check = outcome(checks.random_noise, net, (x[:30], y[:30]), eps=1e-4, **({} if draws is None else {"draws": draws}))
    survivors = int((net(x[:30]).argmax(1) == y[:30]).sum())
    assert f"{expected if draws else 20 * 30 // survivors} draws each" in check.figure


def test_13_random_noise_on_a_randomised_model(net, images):
    masked = Wrapped(quantised(net), before=lambda x: x + 0.01 * torch.randn_like(x))
    fails(checks.random_noise, masked, images, eps=0.4, steps=2, eot=2, random_start=False, draws=4000)


def test_14_transfer(net, images):
    other = Wrapped(net, after=lambda z: 0.5 * z)
    passes(checks.transfer, net, images, surrogates={"other": other})


class Phased(nn.Module):
    """Brightness decides the class; ripples of random phase spoil the gradient of one path, not that of the mean."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        phase = 2 * math.pi * torch.rand(len(x))
        score = mean - 0.5 + 5e-4 * (2e4 * mean + phase).sin()
        return torch.stack([torch.zeros_like(score), 20 * score], 1)


def test_15_known_noise(net, images):
    passes(checks.known_noise, noisy(net, 0.1), images, steps=5)
    does_not_apply(checks.known_noise, net, images)
    label = torch.arange(30) % 2
    flat = (0.47 + 0.06 * label)[:, None, None, None].expand(30, 1, 1, 1).clone(), label
    fails(checks.known_noise, Phased(), flat, eps=0.05, eot=200, random_start=False, stop=False, keep="last")


def test_16_selection_bias(net, images):
    passes(checks.selection_bias, noisy(net, 0.1), images, steps=5)
    case = AuditCase(noisy(net, 0.1), *images, PGD(eps=EPS))
    every = torch.ones_like(images[1], dtype=torch.bool)  # an attack that claims every clean image
    case.__dict__["white_box"] = JudgedAttack(images[0], images[1], every, every, None)
    assert checks.selection_bias(case).verdict == "fail"
    does_not_apply(checks.selection_bias, net, images)


def test_17_binarisation(net, images):
    fails(checks.binarisation, net, images, steps=1, step_size=1e-4, random_start=False)
    passes(checks.binarisation, noisy(net, 0.1), images)
    does_not_apply(checks.binarisation, quantised(net, 4), images, eps=1e-4)  # no readout tells the points apart


def test_18_solver_gradient(net, images):
    passes(checks.solver_gradient, noisy(net, 0.1), images)
    # Ties: the median of a pixel's neighbours has no gradient where pixels are equal, as all black ones are.
    passes(checks.solver_gradient, Wrapped(net, before=lambda x: F.max_pool2d(x, 3, 1, 1)), images)
    does_not_apply(checks.solver_gradient, Wrapped(net, before=lambda x: x.float()), images)


def test_18_an_adaptive_solver_fails_and_bars_the_others():
    chain = smooth_chain()
    model = ito.recast(chain, omega=0, solver="ode:dopri5", image_shape=(2, 6, 6))
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = audit(model, x, torch.tensor([0, 1, 2]), eps=0.1)
    verdicts = {check.number: check.verdict for check in result.checks}
    assert verdicts.pop(18) == "fail"
    assert {verdicts.pop(number) for number in (1, 2, 22, 23)} == {"pass"}
    assert set(verdicts.values()) == {"not applicable"}
    assert not result.passed
    json.dumps(result.as_dict())


class Fractions(nn.Module):
    """Answers wrongly wherever an image is no picture of 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        grey = 255 * x
        off = (grey - grey.round().detach()).abs().mean((1, 2, 3))
        return torch.stack([torch.ones_like(off), 20 * off], 1)


def test_19_the_ball(net, images):
    passes(checks.the_ball, net, images)
    passes(checks.the_ball, net, images, norm="l2", eps=0.5)
    for shift in (1.5 * EPS, 2.0):
        case = AuditCase(net, *images, PGD(eps=EPS))
        far = images[0] + shift
        case.__dict__["white_box"] = JudgedAttack(
            far, images[1], case.clean == images[1], case.clean != images[1], None
        )
        assert checks.the_ball(case).verdict == "fail"
    grey = torch.full((12, 1, 4, 4), 100 / 255), torch.zeros(12, dtype=torch.int64)
    fails(checks.the_ball, Fractions(), grey, eps=0.6 / 255)
    below = outcome(checks.the_ball, Fractions(), grey, eps=0.3 / 255)  # not the attack's fault, and no sign of masking
    assert (below.verdict, below.suspicious) == ("undecided", False)


class Patches(nn.Module):
    """The class is the brightest of ten columns."""

    def forward(self, x: Tensor) -> Tensor:
        return 20 * x[..., :30].mean((1, 2)).view(-1, 10, 3).mean(2)


def test_20_extraordinary_claim(net, images):
    label = torch.arange(60) % 10
    for contrast, expect in ((0.03, passes), (0.8, fails)):
        x = torch.full((60, 3, 32, 32), 0.1)
        x[..., :30] += contrast * F.one_hot(label, 10).repeat_interleave(3, 1)[:, None, None]
        expect(checks.extraordinary_claim, Patches(), (x, label), eps=8 / 255, steps=5)
        expect(checks.extraordinary_claim, Patches(), (x, label), norm="l2", eps=1.0, steps=5)
    does_not_apply(checks.extraordinary_claim, net, images)


# --- whole audits ---------------------------------------------------------------------------------------


class WithoutSlope(nn.Module):
    """A network under ``no_grad``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x)


def test_a_network_without_any_gradient_is_masked(net, images):
    result = audit(WithoutSlope(net), *images, eps=0.1, queries=50, draws=100)
    assert result.verdict == "masked"
    assert 3 in {check.number for check in result.failed}


def test_noise_over_a_masked_network_is_masked(net, images):
    model = Wrapped(quantised(net), before=lambda x: x + 0.03 * torch.randn_like(x))
    result = audit(model, *images, eps=0.15, queries=50, draws=100)
    assert result.verdict == "masked"
    assert "inferences vote" in result.remarks[0]


class ByNumpy(nn.Module):
    """Noise that torch does not know of."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.from_numpy(np.random.normal(0, 0.03, x.shape)).to(x))


def test_noise_from_numpy_is_said_and_proven_masked(net, images):
    np.random.seed(0)
    result = audit(ByNumpy(quantised(net)), *images, eps=0.15, queries=50, draws=100)
    assert result.verdict == "masked"
    assert any("numpy" in remark for remark in result.remarks)


class Mixing(nn.Module):
    """Adds the mean answer of the batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z + 0.1 * z.mean(0)


def test_22_image_by_image_bars_all_attacks(net, images):
    result = audit(Mixing(net), *images, eps=EPS)
    verdicts = {check.number: check.verdict for check in result.checks}
    assert verdicts[22] == "fail"
    assert verdicts[21] == verdicts[5] == "not applicable"
    assert result.verdict == "undecided"
    assert result.attacked is result.best is None
    json.dumps(result.as_dict())


class Purified(nn.Module):
    """Takes a step by a gradient before it answers; ``hidden``: and hands back hardly any gradient."""

    def __init__(self, net: nn.Module, hidden: bool) -> None:
        super().__init__()
        self.net, self.hidden = net, hidden

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.net(z).logsumexp(1).sum(), z)
        moved = x + 0.01 * gradient.sign()
        return self.net(moved.detach()) + 1e-3 * x.flatten(1)[:, :10] if self.hidden else self.net(moved)


def test_23_test_time_optimisation(net, images):
    passes(checks.test_time_optimisation, net, images)
    fails(checks.test_time_optimisation, Purified(net, hidden=True), images, eps=0.1)
    check = outcome(checks.test_time_optimisation, Purified(net, hidden=False), images)
    assert check.verdict == "undecided", check


@pytest.fixture(scope="module")
def chain_audit() -> tuple[ito.ItoEnsemble, Audit]:
    chain = smooth_chain()
    for p in chain.parameters():
        p.data.mul_(2)
    ensemble = ito.ItoEnsemble([ito.recast(chain, omega=w, image_shape=(2, 6, 6)) for w in (0.05, 0.1)], inferences=5)
    ensemble.train()
    x = torch.rand(10, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = ensemble.predict(x).labels.clamp_min(0)
    before = torch.get_rng_state()
    result = audit(ensemble, x, y, eps=0.1, steps=4, eot=4, queries=20, draws=200, index=torch.arange(10) + 7)
    assert torch.equal(torch.get_rng_state(), before)
    return ensemble, result


def test_an_ensemble_is_audited_and_left_as_it_was(chain_audit):
    ensemble, result = chain_audit
    verdict = {check.number: check.verdict for check in result.checks}
    assert verdict[18] == verdict[19] == verdict[1] == "pass"
    assert verdict[20] == "not applicable"
    assert all(verdict[number] != "not applicable" for number in (4, 14, 15, 16))
    assert ensemble.training
    assert all(p.requires_grad for p in ensemble.parameters())
    assert result.landscape.loss.shape == (21, 21)


def test_a_single_network_is_an_ensemble_of_one_and_figures_repeat(chain_audit):
    model = copy.deepcopy(chain_audit[0].members[0])
    result = chain_audit[1]
    settings = {"eps": 0.1, "steps": 2, "eot": 2, "queries": 5, "draws": 50}
    first, second = (audit(model, result.x[:4], result.truth[:4], **settings) for _ in range(2))
    skip = 2  # the first two measure forwards on fresh noise, which cannot be repeated
    assert [c.figure for c in first.checks[skip:]] == [c.figure for c in second.checks[skip:]]


def test_the_generator_of_a_randomised_module_is_not_reset(net, images):
    torch.manual_seed(3)
    model = noisy(net, 0.05)
    with input_gradients_only(model):
        case = AuditCase(model, *images)
        state = torch.get_rng_state()
        assert torch.equal(case.fixed(images[0]), case.fixed(images[0]))
        assert not torch.equal(model(images[0]), model(images[0]))
    assert not torch.equal(torch.get_rng_state(), state)


def test_json_there_and_back(chain_audit):
    result = chain_audit[1].as_dict()
    assert json.loads(json.dumps(result)) == result
    assert len(result["checks"]) == len(CHECKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0}, "eps must be above 0"),
        ({"eps": 2}, "at most 1 under linf"),
        ({"norm": "l3"}, "did you mean 'l2'"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"draws": 0}, "draws must be a whole number"),
        ({"queries": 1.5}, "queries must be a whole number"),
        ({"index": torch.zeros(40, dtype=torch.int64)}, "no two alike"),
        ({"y": torch.zeros(40)}, "whole numbers of shape"),
        ({"y": torch.full((40,), 10)}, "Labels must be from 0 to 9, got 10"),
        ({"x": torch.full((40, 1, 8, 8), 2.0)}, r"in \[0, 1\]"),
        ({"model": nn.Identity()}, "logits"),
    ],
)
def test_what_cannot_be_audited_is_refused(net, images, change, message):
    with pytest.raises(ValueError, match=message):
        audit(**{"model": net, "x": images[0], "y": images[1], **change})


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> str:
    """A folder with one small run."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["train", "--runs", str(folder), "--run", "<small>", "--limit", "150", "--set", "resnet.epochs=3"]
    done = CliRunner().invoke(
        cli, [*words, "--epochs", "1", "--members", "1", "--inferences", "4"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return str(folder)


QUICK = ["--limit", "6", "--eps", "0.1", "--steps", "3", "--eot", "2", "--queries", "5", "--draws", "50"]


def test_the_command_prints_a_table_and_writes_a_page(runs, tmp_path):
    page = tmp_path / "audit.html"
    done = CliRunner().invoke(cli, ["audit", "--runs", runs, *QUICK, "--html", str(page)], catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.output.splitlines()
    header = next(i for i, line in enumerate(lines) if "check" in line and "verdict" in line)
    table = lines[header : lines.index("", header)]
    assert max(map(len, table)) <= 110
    numbers = [int(row[:2]) for row in table[2:] if row[:2].strip()]
    assert numbers == list(range(1, len(CHECKS) + 1))
    assert "Bottom line" in done.output
    html = page.read_text()
    assert "&lt;small&gt;" in html
    assert "<small>" not in html
    assert "viewport" in html
    pairs = html.count('<div class="pair">')
    assert 1 <= pairs <= 6
    assert html.count("data:image/png;base64,") == 3 + 2 * pairs
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(|<script""", html)
    for number in range(1, len(CHECKS) + 1):
        assert f'<td class="number">{number}</td>' in html


def test_a_page_without_an_attack(tmp_path):
    from neuralsde_ito.cli.report import write_report

    model = ito.recast(smooth_chain(), omega=0, solver="ode:dopri5", image_shape=(2, 6, 6))
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vote = {"members": 1, "inferences": 1, "rule": "flat"}
    about = {"command": "ito-sde audit", "run": "<run>", "data": "noise", "seed": 0, "device": "cpu", "seconds": 1.0}
    about |= {"vote": vote, "environment": {"date": "today", "packages": {"torch": "2"}}}
    write_report(tmp_path / "page.html", audit(model, x, torch.tensor([0, 1, 2]), eps=0.1), about, ["a", "b", "c"])
    html = (tmp_path / "page.html").read_text()
    assert html.startswith("<!DOCTYPE html>")
    assert html.count("not applicable</span>") == len(CHECKS) - 5
    assert "FAIL</span>" in html
    assert "<img" not in html
    assert "under attack" not in html


def test_json_and_strict(runs):
    words = ["audit", "--runs", runs, *QUICK, "--json"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert len(result["checks"]) == len(CHECKS)
    # One path a gradient on a randomised model: the first check fails, whatever the others say.
    weak = ["audit", "--runs", runs, *QUICK, "--eot", "1", "--json"]
    assert CliRunner().invoke(cli, weak, catch_exceptions=False).exit_code == 0
    done = CliRunner().invoke(cli, [*weak, "--strict"], catch_exceptions=False)
    assert done.exit_code == 1
    assert not json.loads(done.stdout)["passed"]


def test_strict_is_content_when_nothing_fails(runs, monkeypatch):
    monkeypatch.setattr(Audit, "failed", property(lambda self: []))
    monkeypatch.setattr(Audit, "verdict", audits.SOUND)
    assert CliRunner().invoke(cli, ["audit", "--runs", runs, *QUICK, "--strict"], catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eps", "8"], "at most 1 under linf"),
        (["--eps", "0"], "eps must be above 0"),
        (["--steps", "0"], "steps must be a whole number"),
    ],
)
def test_wrong_values_are_refused_before_the_run_is_read(words, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli, ["audit", "--runs", "nowhere", *words], catch_exceptions=False)


def test_an_unknown_norm_is_refused():
    done = CliRunner().invoke(cli, ["audit", "--norm", "l3"])
    assert done.exit_code == 2
    assert "'l3' is not one of 'linf', 'l2'" in done.output
