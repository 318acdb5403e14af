"""Known faults of other libraries on small models: ours is right; where the library is installed, theirs is not.

A test of another library that fails means that the library has been mended: it goes.
"""

import pytest
import torch
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito.attacks import APGD, BALLS, PGD, Square, minimal_norm
from neuralsde_ito.attacks.images import Images
from neuralsde_ito.attacks.suite import Step, Suite, standard
from neuralsde_ito.attacks.sweep import attack_sweep
from neuralsde_ito.data import InMemory


def gray(*values: float) -> Tensor:
    """Images of one grey each, ``(N, 1, 4, 4)``."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long)


class Bright(nn.Module):
    """Class 0 leads by the mean brightness above a bound, plus noise."""

    def __init__(self, bound: float = 0.4, noise: float = 0.0) -> None:
        super().__init__()
        self.bound, self.noise = bound, noise

    def forward(self, x: Tensor) -> Tensor:
        lead = x.mean((1, 2, 3)) - self.bound
        if self.noise:
            lead = lead + self.noise * torch.randn(len(x))
        return 10 * torch.stack([lead, -lead, lead - 9, lead - 9], 1)


def by_autoattack(model: nn.Module, x: Tensor, eps: float) -> tuple[float, Tensor]:
    """The robust accuracy that AutoAttack's `rand` reports, and its images."""
    autoattack = pytest.importorskip("pyautoattack")
    attack = autoattack.AutoAttack(model, eps=eps, norm="Linf", version="rand", seed=0)
    attack.apgd.n_iter = 30  # 100 find as much
    images, labels = attack.run_standard_evaluation(x, zeros(x), batch_size=len(x))
    return float((labels == 0).float().mean()), images


# --- a lucky draw counts as a success: AutoAttack's `rand` (its pull request 105 and issue 58) ------------


def test_the_toy_on_which_autoattack_is_wrong_by_a_quarter():
    # At the worst point of the ball each draw is right with 84 %: of 400 votes more than half are, always.
    x, model, eps = gray(*torch.linspace(0.5, 0.52, 100).tolist()), Bright(noise=0.05), 0.05
    result = PGD("linf", eps, 20, restarts=2).run(model, x, zeros(x))
    many = ito.Vote(model, 400)
    assert not result.fooled.any()
    assert (many.predict(result.images, full=True).labels == 0).all()
    claimed, images = by_autoattack(model, x, eps)
    assert claimed < 0.85
    assert (many.predict(images, full=True).labels == 0).all()  # on its own images, too


def test_a_minimal_norm_is_no_lucky_draw():
    x, model = gray(*[0.6] * 8), Bright(noise=0.1)
    found = minimal_norm(ito.Vote(model, 100), x, zeros(x), "linf", steps=40)
    assert (found.radii > 0.18).all()  # the vote falls at 0.2
    assert found.radii.median() < 0.24
    foolbox = pytest.importorskip("foolbox")
    attack = foolbox.attacks.LInfFMNAttack(steps=100)
    images = attack.run(foolbox.PyTorchModel(model.eval(), (0, 1), device="cpu"), x, zeros(x))
    assert BALLS["linf"].length(images - x).min() < 0.16
    assert (ito.Vote(model, 100).predict(images).labels == 0).float().mean() > 0.7


# --- the last restart is returned, not the best (Madry's toolbox) -----------------------------------------


class Rugged(nn.Module):
    """Many local maxima: which one an attack climbs is decided by where it begins."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        lead = 2.2 - (torch.sin(40 * flat) * torch.linspace(0.2, 1, flat.shape[1])).mean(1).abs() * 4
        return torch.stack([lead, -lead], 1)


def test_more_restarts_never_give_less():
    x = gray(*torch.linspace(0.2, 0.8, 30).tolist())
    attack = {n: PGD("linf", 0.1, 5, restarts=n, step_size=0.01).run(Rugged(), x, zeros(x)) for n in (1, 2, 4, 8)}
    lost = {n: Rugged()(result.images)[:, 0] for n, result in attack.items()}
    for fewer, more in ((1, 2), (2, 4), (4, 8)):
        assert (attack[more].fooled >= attack[fewer].fooled).all()
        assert ((lost[more] <= lost[fewer]) | attack[fewer].fooled).all()
    assert attack[8].fooled.sum() > attack[1].fooled.sum()  # so that the order matters


# --- a seed set inside the attack resets the defender's noise (AutoAttack) --------------------------------


class Recording(Bright):
    """It remembers its noise."""

    def __init__(self) -> None:
        super().__init__(noise=0.03)
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x))
        self.drawn += [round(number, 6) for number in noise.tolist()]
        lead = x.mean((1, 2, 3)) - self.bound + self.noise * noise
        return 10 * torch.stack([lead, -lead, lead - 9, lead - 9], 1)


def test_an_attack_does_not_touch_the_defenders_generator():
    x, model = gray(0.5, 0.55), Recording()
    vote = ito.Vote(model)
    vote.observe(x)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model.drawn.clear()
    PGD("linf", 0.05, 3).run(vote, x, zeros(x))
    attacks = set(model.drawn)
    assert torch.equal(torch.get_rng_state(), state)
    model.drawn.clear()
    vote.predict(x, full=True)
    assert len(set(model.drawn)) == 2 * 20  # two images, twenty paths
    assert not attacks & set(model.drawn)  # the report's noise is not the attack's


def test_autoattack_resets_it():
    x, seen = gray(0.5, 0.55), []
    for seed in (1, 2):  # the defender's noise is to be another one in every run
        torch.manual_seed(seed)
        model = Recording()
        by_autoattack(model, x, 0.05)
        seen.append(set(model.drawn))
    assert len(seen[0] & seen[1]) > 100


# --- noise that is gated on `training` vanishes under a forced eval() (torchattacks) ----------------------


class Gated(Bright):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = {*getattr(self, "seen", ()), self.training}
        self.noise = 0.1 if self.training else 0.0
        return super().forward(x)


def test_a_module_is_attacked_in_the_mode_that_it_has():
    x, model = gray(0.5, 0.55), Gated().train()
    PGD("linf", 0.05, 3).run(model, x, zeros(x))
    assert model.seen == {True}
    [check] = [c for c in ito.check_model(model, x) if c.name == "noise_does_not_depend_on_train_mode"]
    with pytest.raises(AssertionError, match="not after eval"):
        check()


def test_torchattacks_calls_eval():
    torchattacks = pytest.importorskip("torchattacks")
    x, model = gray(0.5, 0.55), Gated().train()
    torchattacks.PGD(model, eps=0.05, steps=3)(x, zeros(x))
    assert False in model.seen


# --- AutoAttack at 10 steps under its own name (torchattacks) ---------------------------------------------


def test_the_suite_of_a_deterministic_network_is_no_short_form():
    attacks = [step.attack for step in standard("linf", 0.1, noisy=False)]
    assert max(attack.steps for attack in attacks if isinstance(attack, APGD)) == 100
    assert max(attack.steps for attack in attacks if isinstance(attack, Square)) == 5000
    assert max(attack.targets for attack in attacks if attack.objective == "targeted-dlr") == 9


def test_torchattacks_autoattack_is_short():
    torchattacks = pytest.importorskip("torchattacks")
    attack = torchattacks.AutoAttack(Bright(), eps=0.1, n_classes=4)
    assert next(member.steps for member in attack._autoattack.attacks if hasattr(member, "steps")) == 10


# --- a zero gradient is divided by its length -------------------------------------------------------------


class Flat(nn.Module):
    """No slope where the image is dark."""

    def forward(self, x: Tensor) -> Tensor:
        lead = 1 - (x.mean((1, 2, 3)) - 0.5).clamp_min(0)
        return torch.stack([lead, -lead], 1)


@pytest.mark.parametrize("attack", [PGD, APGD])
@pytest.mark.parametrize("norm", sorted(BALLS))
def test_a_zero_gradient_moves_nothing_and_breaks_nothing(norm, attack):
    x = gray(0.1, 0.9)
    result = attack(norm, 0.2, 5, objective="mean-loss").run(Flat(), x, zeros(x))
    assert result.images.isfinite().all()
    assert (BALLS[norm].length(result.images - x) <= 0.2 + 1e-6).all()
    assert Flat()(result.images)[1, 0] < Flat()(x)[1, 0]  # the other image is attacked


# --- files of a resumption from which nothing can be resumed (AutoAttack, RobustBench) --------------------


def test_a_suite_goes_on_where_it_was_killed(tmp_path):
    class Counting(Bright):
        calls, limit = 0, 10**9

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            if self.calls > self.limit:
                raise KeyboardInterrupt
            return super().forward(x)

    x = gray(0.46, 0.5, 0.6)
    images = Images(x, zeros(x), torch.arange(3))
    steps = [Step("one", PGD("linf", 0.05, 20)), Step("two", APGD("linf", 0.05, 20)), Step("three", PGD(eps=0.05))]

    def run(folder: str) -> list:
        vote = ito.Vote(Counting(noise=0.01), 20)
        vote.observe(x)
        return Suite(lambda eps: steps, state=tmp_path / folder).attack(vote, images, [0.05])

    whole = run("whole")
    cost, Counting.calls, Counting.limit = Counting.calls, 0, Counting.calls * 2 // 3
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    Counting.calls, Counting.limit = 0, 10**9
    again = run("killed")
    assert torch.equal(again[0].denial.images, whole[0].denial.images)
    assert torch.equal(again[0].denial.votes, whole[0].denial.votes)
    assert again[0].gradients == whole[0].gradients
    assert Counting.calls < cost * 0.8  # what had finished was not made again


# --- each eps is attacked independently, so that the curve is not monotone (foolbox) ----------------------


class Shell(nn.Module):
    """Wrong only near the image: an attack that goes to the ball's surface passes it by."""

    def forward(self, x: Tensor) -> Tensor:
        far = (x.mean((1, 2, 3)) - 0.49).abs()
        lead = (far - 0.07).abs() - 0.02
        return 100 * torch.stack([lead, -lead], 1)


def test_the_curve_falls_along_the_radii():
    x = gray(0.5, 0.5, 0.5)
    pixels = (255 * x).round().to(torch.uint8)
    attacks = [PGD("linf", eps, 3, step_size=eps, random_start=False, keep="last", stop=False) for eps in (0.06, 0.3)]
    alone = [attack.run(Shell(), x, zeros(x)).fooled.all() for attack in attacks]
    assert [bool(fooled) for fooled in alone] == [True, False]  # one by one, the larger ball looks safer
    sweep = attack_sweep(ito.Vote(Shell()), None, InMemory(pixels, zeros(x)), attacks)
    correct = [int((sweep.worst(level) == 0).sum()) for level in range(2)]
    assert correct == [0, 0]


def test_foolboxs_does_not():
    foolbox = pytest.importorskip("foolbox")
    x, epsilons = gray(0.5, 0.5), [0.06, 0.3]
    attack = foolbox.attacks.LinfPGD(steps=3, rel_stepsize=1.0, random_start=False)
    model = foolbox.PyTorchModel(Shell().eval(), (0, 1), device="cpu")
    _, _, fooled = attack(model, x, zeros(x), epsilons=epsilons)
    assert fooled.all(1).tolist() == [True, False]
