"""Somebody else's module under attack and audit: its modes, its noise, its batches, and what is not finite."""

import itertools
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from problems import smooth_chain
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito.attacks import PGD, Square, targets
from neuralsde_ito.attacks.images import Images
from neuralsde_ito.attacks.objectives import mean_loss
from neuralsde_ito.attacks.sweep import attack_sweep, surrogate_models
from neuralsde_ito.attacks.targets import ModuleTarget, as_target, classify
from neuralsde_ito.audits import substitute
from neuralsde_ito.audits.audit import CHECKS, audit
from neuralsde_ito.audits.case import AuditCase, JudgedAttack, input_gradients_only
from neuralsde_ito.audits.check import percent
from neuralsde_ito.audits.gradients import solver_gradient
from neuralsde_ito.data import InMemory
from neuralsde_ito.models.inspection import as_called, replay
from neuralsde_ito.noise.keys import PathRange

checks = SimpleNamespace(**{check.__name__: check for check in CHECKS})

SHORT = {"eps": 0.1, "steps": 3, "eot": 3, "queries": 5, "draws": 50}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch) -> None:
    """The substitute's training is half of an audit of so small a network, and no test here is about it."""
    monkeypatch.setattr(substitute, "_STEPS", 12)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def network(*before: nn.Module) -> nn.Module:
    """A small network for 8 x 8 images of one channel, with something before its last layer."""
    torch.manual_seed(0)
    first, last = nn.Linear(64, 32), nn.Linear(32, 10)
    nn.init.normal_(last.weight)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), *before, last).eval()


def with_dropout() -> nn.Module:
    """A network whose dropout was left on."""
    return network(nn.Dropout(0.3)).train()


def known(model: nn.Module, x: Tensor) -> Tensor:
    """Labels that the model gives."""
    with torch.no_grad():
        return torch.stack([model(x) for _ in range(50)]).mean(0).argmax(1)


class Odd(nn.Module):
    """A network of whose answers something is not as it should be: ``change(logits, x)``."""

    def __init__(self, change, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.change = net or network(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.net(x), x)


def nan_gradient(logits: Tensor, x: Tensor) -> Tensor:
    """Of images that are black in their first row: a root of 0 has an infinite slope, and 0 times that is NaN."""
    return logits + 0 * x[:, :, 0].sum((1, 2)).sqrt()[:, None]


def nan_logits(logits: Tensor, x: Tensor) -> Tensor:
    """Of the images that are nearly black in their first row."""
    return torch.where(x[:, :, 0].mean((1, 2))[:, None] < 0.01, torch.nan, logits)


def black(x: Tensor, count: int = 1) -> Tensor:
    x = x.clone()
    x[:count, :, 0] = 0
    return x


# --- modes ----------------------------------------------------------------------------------------------


def test_a_module_in_train_mode_is_attacked_as_it_is_called(x):
    model = with_dropout()
    assert not torch.equal(model(x), model(x))
    assert as_target(model, x).distinct is None
    seen = []
    model[3].register_forward_hook(lambda module, *_: seen.append(module.training))
    with pytest.warns(UserWarning, match="one path a gradient"):
        PGD(eps=0.1, steps=2, eot=1).run(model, x, known(model, x))
    assert seen
    assert all(seen)


def test_dropout_that_was_left_on_is_audited_as_noise(x):
    model = with_dropout()
    found = {check.number: check for check in audit(model, x, known(model, x), **SHORT).checks}
    assert float(found[1].figure.split()[1]) > 1e-4
    assert found[4].verdict != "not applicable"
    assert found[18].verdict == "pass"  # the copy in float64 has the same modes
    weak = audit(model, x, known(model, x), **{**SHORT, "eot": 1})
    assert weak.checks[0].verdict == "fail"


def test_only_the_dropout_may_be_in_train_mode(x):
    model = network(nn.BatchNorm1d(32), nn.Dropout(0.3))
    model[4].train()
    assert as_target(model, x).distinct is None
    assert as_target(model.eval(), x).distinct == 1


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(32), (32,)),
        (nn.BatchNorm2d(2), (2, 4, 4)),
        (nn.SyncBatchNorm(32), (32,)),
        (nn.InstanceNorm2d(2, track_running_stats=True), (2, 4, 4)),
    ],
)
def test_a_normalisation_in_train_mode_is_refused(x, norm, shape):
    model = network(nn.Unflatten(1, shape), norm, nn.Flatten()).train()
    y = torch.zeros(12, dtype=torch.int64)
    for attempt in (
        lambda: PGD(steps=1).run(model, x, y),
        lambda: Square(steps=1).run(model, x, y),
        lambda: audit(model, x, y, **SHORT),
        lambda: classify(model, x),
    ):
        with pytest.raises(ito.ItoError, match=r"train mode.*model.eval\(\), or put only the dropout into train mode"):
            attempt()
    assert model.training


def test_a_batchnorm_without_running_statistics_is_refused(x):
    model = network(nn.BatchNorm1d(32, track_running_stats=False))
    for attempt in (lambda: PGD(steps=1).run(model, x, known(model, x)), lambda: classify(model, x)):
        with pytest.raises(ito.ItoError, match="track_running_stats=True"):
            attempt()


def test_a_normalisation_of_every_image_by_itself_is_not(x):
    model = network(nn.Unflatten(1, (2, 4, 4)), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.Flatten()).train()
    assert not torch.equal(PGD(eps=0.1, steps=1).run(model, x, known(model, x)).images, x)


@pytest.mark.parametrize("spectral", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_module_that_calls_change_is_refused_and_left_as_it_was(x, spectral):
    model = network()
    spectral(model[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    with pytest.raises(ito.ItoError, match=r"train mode changes its .*model.eval\(\)"):
        PGD(eps=0.1, steps=1).run(model, x, torch.zeros(12, dtype=torch.int64))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    PGD(eps=0.1, steps=1).run(model.eval(), x, known(model, x))


class Counting(nn.Module):
    """Counts its calls, in eval mode too, in a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


def test_buffers_are_as_they_were(x):
    model = network(Counting())
    y, before = known(model, x), model[3].calls
    for attempt in (lambda: PGD(eps=0.1, steps=1).run(model, x, y), lambda: audit(model, x, y, **SHORT)):
        attempt()
        assert model[3].calls is before
        assert float(before) == 50


@pytest.mark.parametrize("how", ["attack", "audit"])
def test_everything_is_as_it_was_after_an_error(x, how):
    model = with_dropout()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]

    calls = itertools.count()

    def fails(*_: object) -> None:
        if next(calls) > 8:  # after the model has been looked at
            raise ZeroDivisionError

    model[4].register_forward_hook(fails)
    y = torch.zeros(12, dtype=torch.int64)
    with pytest.raises(ZeroDivisionError):
        PGD(eps=0.1).run(model, x, y) if how == "attack" else audit(model, x, y, **SHORT)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())


def test_ito_models_are_in_eval_mode_also_inside_of_others(x):
    ensemble = ito.ItoEnsemble([ito.recast(ito.load_resnet("resnet8"), omega=0.2)]).train()
    inside = nn.Sequential(nn.Identity(), ensemble)
    for model in (ensemble, inside, surrogate_models(ensemble, ensemble, ["noise-free"])["noise-free"]):
        with as_called(model):
            assert not any(m.training for m in ensemble.modules())
        assert all(m.training for m in ensemble.modules())
    pictures = torch.rand(2, 3, 32, 32)
    noise_free = surrogate_models(ensemble, ensemble, ["noise-free"])["noise-free"]
    PGD(eps=0.1, steps=1).run(noise_free, pictures, torch.zeros(2, dtype=torch.int64))


def test_surrogates_keep_their_modes_and_are_refused_before_any_check(x):
    seen, ticks = [], []
    other, model = with_dropout(), network()
    other[3].register_forward_hook(lambda module, *_: seen.append(module.training))
    audit(model, x, known(model, x), surrogates={"dropout": other}, **SHORT)
    assert seen
    assert all(seen)
    assert all(p.requires_grad for p in other.parameters())
    for broken in (network(nn.BatchNorm1d(32)).train(), Odd(lambda logits, _: logits - logits.mean(0))):
        with pytest.raises(ito.ItoError, match="others in its batch"):
            audit(model, x, known(model, x), surrogates={"broken": broken}, tick=ticks.append, **SHORT)
    assert not ticks


# --- pieces ---------------------------------------------------------------------------------------------


def test_pieces_do_not_change_a_deterministic_module(x):
    model = network().double()
    images, y = x.double(), known(model, x.double())
    index, objective_ = torch.arange(12), mean_loss
    with as_called(model):
        whole, pieces = (
            as_target(model, images, size).ascend(objective_, images, y, PathRange(0, "gradient", index))
            for size in (12, 5)
        )
        paths = PathRange(0, "selection", index, 0, 2)
        some, all_ = (as_target(model, images, size).path_logits(images, paths) for size in (5, 12))
    for a, b in (*zip(whole, pieces, strict=True), (some, all_)):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    first, second = (audit(model, images, y, batch_size=size, **SHORT) for size in (None, 5))
    skip = {18}  # looks at no more than a batch
    assert [c.figure for c in first.checks if c.number not in skip] == [
        c.figure for c in second.checks if c.number not in skip
    ]


def test_no_batch_is_larger_than_was_asked_for(x):
    model, sizes = network(), []
    y = known(model, x)
    handle = model[1].register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    audit(model, x, y, batch_size=3, **SHORT)
    # Sixteen: whether an answer depends on the others in its batch is seen in a batch only.
    assert {size for size in sizes if size != 16} == {1, 2, 3}
    sizes.clear()
    audit(model, x, y, batch_size=1, **SHORT)
    assert set(sizes) <= {1, 2, 16}
    handle.remove()


def test_a_graph_stays_within_its_bound(x, monkeypatch):
    model = with_dropout()
    y, sizes = known(model, x), []
    each = targets.graph_bytes(model, x[:4]) // 4
    assert 0 < 8 * each == targets.graph_bytes(model, x[:8])  # what an image's layers hold, not the weights
    monkeypatch.setattr(targets, "_GRAPH_BYTES", {"cpu": 5 * each * 2})
    target = ModuleTarget(model, x)
    model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    target.at_once(1)
    sizes.clear()
    found = target.ascend(mean_loss, x, y, PathRange(0, "gradient", torch.arange(12), 0, 5))
    assert found.gradient.shape == x.shape
    assert found.logits.shape == (5, 12, 10)
    assert max(sizes) <= 5 * 2 + 1  # five paths of two images in a call, and one more, as a weight has ten rows
    assert len(sizes) >= 6


def test_memory_that_runs_out_halves_the_pieces(x):
    model, sizes = network(), []
    y = known(model, x)

    def tight(_: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > 4 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError

    target = ModuleTarget(model, x)
    target.at_once(1)
    model.register_forward_hook(tight)
    found = target.ascend(mean_loss, x, y, PathRange(0, "gradient", torch.arange(12)))
    assert found.gradient.shape == x.shape
    assert sizes[0] == 12
    assert sizes[-1] <= 4


def test_a_module_is_never_called_from_two_threads(x):
    model, threads = network(), set()
    model.register_forward_hook(lambda *_: threads.add(threading.get_ident()))
    target, before = ModuleTarget(model, x, 2), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        target.ascend(mean_loss, x, known(model, x), PathRange(0, "gradient", torch.arange(12)))
        target.path_logits(x, PathRange(0, "selection", torch.arange(12)))
    finally:
        torch.set_num_threads(before)
    assert threads == {threading.get_ident()}


class Shuffled(nn.Module):
    """Every logit shifted by what a random other image has there."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits + logits[torch.randperm(len(x))]


def standardised(logits: Tensor, x: Tensor) -> Tensor:
    """By the statistics of the batch, computed by hand."""
    return (logits - logits.mean(0)) / (logits.std(0, correction=0) + 1)


@pytest.mark.parametrize("model", [Odd(standardised), Shuffled()])
def test_an_answer_that_depends_on_the_others_is_refused(x, model):
    y = torch.zeros(12, dtype=torch.int64)
    with pytest.raises(ito.ItoError, match="depends on the others in its batch"):
        PGD(steps=1).run(model, x, y)
    result = audit(model, x[:1], y[:1], **SHORT)  # which says so, and attacks nothing
    assert [check.name for check in result.failed] == ["image by image"]
    assert result.attacked is None
    assert not result.sound
    audit(model, x, y, batch_size=1, **SHORT)  # image by image there are no others


def test_noise_from_elsewhere_is_not_taken_for_company(x):
    source = itertools.count()
    model = Odd(lambda logits, _: logits + (0.01 * next(source)) % 0.1)
    assert not torch.equal(PGD(eps=0.1, steps=1).run(model, x, known(model, x)).images, x)


def test_noise_by_place_in_the_batch_meets_the_same_cuts(x):
    model = Odd(lambda logits, x: logits + 5 * torch.randn(len(x), 10))
    y = known(model.net, x)
    with input_gradients_only(model):
        for size in (12, 5, 3):
            case = AuditCase(model, x, y, PGD(eps=1e-3, steps=2, eot=2), batch_size=size)
            found = checks.known_noise(case)
            # Hardly anything is moved: what is right is told by the paths, and these by the place in a batch.
            with torch.no_grad():
                right = torch.cat([case.fixed(part).argmax(1) for part in x.split(size)]) == y
            assert found.figure.startswith(f"{percent(float(right.double().mean()))} to ")


def test_the_landscape_of_a_randomised_module_is_on_one_path(x):
    model = Odd(lambda logits, x: logits + torch.randn(len(x), 10))
    found = audit(model, x[:4], known(model, x[:4]), **{**SHORT, "eps": 1e-4}).landscape
    assert found is not None
    assert float(found.loss.max() - found.loss.min()) < 0.1  # points this near differ by their noise, if at all


# --- what is not finite ---------------------------------------------------------------------------------


EPS = [0.1, 0.003]  # nothing stands, and nearly everything


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_finite_is_a_finding(x, norm, eps):
    images, model = black(x, 2), Odd(nan_gradient)
    y = known(model, images)
    found = {check.number: check for check in audit(model, images, y, norm, **{**SHORT, "eps": eps}).checks}
    assert found[3].verdict == "fail"
    assert "not finite at 2 of 12" in found[3].figure
    assert not found[3].note.startswith("Every")
    assert found[5].verdict != "not applicable"


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("random", [False, True])
def test_gradients_that_are_nowhere_finite_pass_no_check_of_gradients(x, random, eps):
    images = black(x, 12)
    model = Odd(nan_gradient, with_dropout() if random else network())
    y = known(model, images)
    whole = audit(model, images, y, "l2" if random else "linf", **{**SHORT, "eps": eps})
    assert whole.landscape.loss.isfinite().any()
    found = {check.number: check for check in whole.checks}
    assert found[3].verdict == "fail"
    assert found[4].verdict == ("fail" if random else "not applicable")
    assert all("nan" not in check.figure for check in found.values())


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("random", [False, True])
def test_logits_that_are_not_finite_are_a_finding(x, random, eps):
    images = black(x, 2)
    net = with_dropout() if random else network()
    y = known(net, images)
    y[0] = 0  # argmax of NaN is 0: nobody may take that for an answer
    found = audit(Odd(nan_logits, net), images, y, **{**SHORT, "eps": eps})
    verdicts = {check.number: check for check in found.checks}
    assert verdicts[2].verdict == "fail"
    assert verdicts[3].verdict != "pass"
    assert "not finite at 2 of 12" in verdicts[2].figure
    assert found.before[:2].tolist() == [ito.ABSTAIN, ito.ABSTAIN]
    assert all("nan" not in check.figure for check in found.checks)
    assert (verdicts[4].verdict == "not applicable") is not random  # NaN beside NaN is no randomness


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_check_passes_on_a_comparison_with_nan(x, bad):
    """Logits finite at the images, not finite around them."""
    net = network()
    y = known(net, x)
    moved = lambda points: (points != x[0]).flatten(1).any(1)[:, None]  # noqa: E731
    model = Odd(lambda logits, points: torch.where(moved(points), bad * logits, logits), net)
    images, labels = x[:1].repeat(6, 1, 1, 1), y[:1].repeat(6)
    verdicts = {c.number: c for c in audit(model, images, labels, **{**SHORT, "steps": 2}).checks}
    # Whatever moves is wrong: random draws and queries find that, the attack may claim it as well.
    for number in (8, 17, 18):
        assert verdicts[number].verdict != "pass", verdicts[number]
    assert all("nan" not in check.figure for check in verdicts.values())


def test_rough_where_the_loss_is_no_number(x):
    net = network()
    y = known(net, x)
    odd = lambda points: (points * 1e4).frac().mean((1, 2, 3))[:, None] > 0.5  # noqa: E731
    model = Odd(lambda logits, points: torch.where(odd(points), torch.nan, logits))
    with input_gradients_only(model):
        case = AuditCase(model, x, y, PGD(eps=1e-6, steps=1))
        case.__dict__["survivors"] = torch.arange(12)
        _ = case.white_box
        rough = checks.rough_landscape(case)  # a sign: no attack proves it
        assert rough.verdict == "undecided"
        assert rough.suspicious


def test_a_loss_that_is_not_finite_has_not_come_to_rest(x):
    net = network()
    case = AuditCase(net, x, known(net, x), PGD(eps=1e-3, steps=3))
    for losses in case.white_box.record.losses:
        losses.fill_(torch.inf)
    assert checks.convergence(case).verdict == "not applicable"


def test_nan_is_no_answer_0(x):
    model = with_dropout()
    model[4].bias.data[0] = 100
    images, zeros = (4 * x).round() / 4, torch.zeros(12, dtype=torch.int64)

    def change(logits: Tensor, points: Tensor) -> Tensor:
        """No logits off the grey levels."""
        return torch.where(((4 * points).frac() != 0).flatten(1).any(1)[:, None], torch.nan, logits)

    with input_gradients_only(broken := Odd(change, model)):
        case = AuditCase(broken, images, zeros, PGD(eps=0.01, steps=2, eot=2))
        assert case.clean.tolist() == [0] * 12
        assert not case.white_box.correct.any()
        assert checks.selection_bias(case).figure.startswith("0 % to 0 %")
        assert checks.known_noise(case).figure.startswith("0 % to 0 %")


def test_a_vote_of_few_finite_answers_is_none(x):
    calls = itertools.count()
    net = network()
    model = Odd(lambda logits, _: logits * (1 if next(calls) % 4 == 0 else torch.nan), net)
    case = AuditCase(model, x, known(net, x))
    case.__dict__["target"] = as_target(with_dropout(), x)  # what makes it a randomised one
    assert case.clean.tolist() == [ito.ABSTAIN] * 12


def test_the_noise_of_a_module_with_nan_can_be_fixed(x):
    assert AuditCase(Odd(nan_logits, with_dropout()), black(x), torch.zeros(12, dtype=torch.int64)).fixed is not None


def test_random_draws_find_logits_that_are_not_finite(x):
    net = network()
    # Everywhere but where no step was taken: one logit infinite, so that no margin shows it.
    model = Odd(lambda logits, points: torch.where(points[:, :, 0, 0] < 0.5, logits, logits / 0), net)
    images = x.clone()
    images[:, :, 0, 0] = 0.45
    found = checks.random_noise(AuditCase(model, images, known(net, images), PGD(eps=0.1, steps=1, random_start=False)))
    assert found.verdict != "pass", found  # the longer attacks along its gradients may find them first


def test_a_landscape_with_gaps_is_drawn(x):
    from neuralsde_ito.cli.report import landscape_lines, landscape_plane

    net = network()
    model = Odd(nan_logits, net)
    images = x.clone()
    images[:, :, 0] = 0.05
    found = audit(model, images, known(net, images), **SHORT)
    assert not found.landscape.loss.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert min(len(landscape_lines(found)), len(landscape_plane(found))) > 1000
        found.landscape.loss[:] = torch.nan
        assert min(len(landscape_lines(found)), len(landscape_plane(found))) > 1000


# --- odd models and odd images --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision(x, dtype):
    net = network()
    y = known(net, x)
    found = audit(Odd(lambda logits, _: logits.to(dtype), net), x, y, **SHORT)
    assert found.checks[1].verdict == "pass"
    assert found.checks[17].verdict != "fail"
    halves = Odd(lambda logits, _: logits.softmax(1).to(dtype), net)
    assert (
        audit(halves, x, y, **SHORT).checks[1].verdict == "undecided"
    )  # a sign: probabilities still, to their precision


def test_images_in_double_precision(x):
    images = x.double()
    cast = Odd(lambda logits, _: logits)
    cast.forward = lambda points: cast.net(points.float())  # its own precision inside
    for model in (network().double(), cast):
        found = audit(model, images, known(model, images), **SHORT)
        assert found.images.dtype == torch.float64


def test_images_in_half_precision_are_refused(x):
    model = network()
    with pytest.raises(ito.ItoError, match="float32"):
        audit(model, x.half(), known(model, x), **SHORT)


def test_a_module_that_refuses_double_precision(x):
    def refuse(logits: Tensor, points: Tensor) -> Tensor:
        assert points.dtype == torch.float32
        return logits

    model = Odd(refuse)
    assert audit(model, x, known(model, x), **SHORT).checks[17].verdict == "not applicable"


@pytest.mark.parametrize("strange", ["inference", "no_grad", "grad", "strided", "channels_last", "uint8", "frozen"])
def test_strange_callers_get_the_same_audit(x, strange):
    model = network()
    x = x.repeat(1, 1, 1, 2)[..., :8] if strange == "strided" else x
    y = known(model, x)
    settings = {**SHORT, "eps": 0.03}
    before = audit(model, x.contiguous(), y, **settings)
    plain = [check.figure for check in before.checks]
    assert 0 < before.attacked.correct < 12  # some checks look at what stands
    images, labels = x, y
    if strange == "grad":
        images = x.clone().requires_grad_()
    elif strange == "channels_last":
        images = x.to(memory_format=torch.channels_last)
    elif strange == "uint8":
        labels = y.to(torch.uint8)
    elif strange == "frozen":
        model.requires_grad_(False)
    around = {"inference": torch.inference_mode, "no_grad": torch.no_grad}.get(strange, torch.enable_grad)
    with around():
        if strange == "inference":
            images, labels = images.clone(), labels.clone()
        found = audit(model, images, labels, index=torch.arange(len(x)), **settings)
    assert [check.figure for check in found.checks] == plain
    assert images.grad is None


def test_a_model_from_inference_mode_is_refused(x):
    with torch.inference_mode():
        model = network()
    with pytest.raises(ito.ItoError, match="inference_mode"):
        audit(model, x, known(model, x), **SHORT)
    assert len(classify(model, x)) == 12  # which needs no gradient


def test_one_image(x):
    model = network()
    found = audit(model, x[:1], known(model, x[:1]), **SHORT)
    assert found.clean.n == 1
    with pytest.raises(ito.ItoError, match="a single one too"):
        audit(Odd(lambda logits, _: logits.squeeze()), x, known(model, x), tick=pytest.fail, **SHORT)


def test_what_is_wrong_from_the_start_passes_no_check_of_the_attack(x):
    for model in (network(), with_dropout()):
        with torch.no_grad():
            wrong = torch.stack([model(x) for _ in range(200)]).mean(0).argmin(1)
        found = audit(model, x, wrong, surrogates={"same": model}, **SHORT)
        verdicts = {check.number: check.verdict for check in found.checks}
        for number in (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17):
            assert verdicts[number] == "not applicable", number


def test_no_gradient_is_refused_by_attacks_too(x):
    model = network()
    for cut in (
        Odd(lambda logits, _: logits.detach(), model),
        nn.Sequential(Odd(lambda _, points: points.detach(), nn.Identity()), model),
    ):
        with pytest.raises(ito.ItoError, match="No gradient comes back"):
            PGD(eps=0.1, steps=1).run(cut, x, known(model, x))
        Square(eps=0.1, steps=2).run(cut, x, known(model, x))


def test_ensembles_with_a_gradient_that_is_not_finite(x):
    chain = smooth_chain()
    chain.head = nn.Sequential(chain.head, _Root())
    ensemble = ito.ItoEnsemble([ito.recast(chain, omega=0.1, image_shape=(2, 6, 6))], inferences=3)
    images = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    found = audit(ensemble, images, ensemble.predict(images).labels.clamp_min(0), **SHORT)
    assert found.checks[2].verdict == "fail"
    assert "not finite at 3 of 3" in found.checks[2].figure


class _Root(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits + 0 * (0 * logits).sqrt()


@pytest.mark.parametrize("change", [{"model": torch.sin}, {"surrogates": {"sine": torch.sin}}, {"batch_size": 0}])
def test_what_cannot_be_audited_is_refused_in_a_sentence(x, change):
    model = network()
    with pytest.raises(ito.ItoError, match="must be"):
        audit(**{"model": model, "x": x, "y": known(model, x), **SHORT, **change})
    with pytest.raises(ito.ItoError, match=r"Labels must be a tensor.*got list"):
        audit(model, x, [0] * 12, **SHORT)
    with pytest.raises(ito.ItoError, match="one whole number for each"):
        audit(model, x, known(model, x), index=torch.arange(12) / 2, **SHORT)


def test_replayed_draws_leave_other_generators_alone(x, monkeypatch):
    # Those of GPUs, whoever uses them beside an audit on the CPU.
    touched: list[int] = []
    model = with_dropout()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched.append)
    state = torch.get_rng_state()
    assert torch.equal(replay(model, x, 3), replay(model, x, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not touched


def test_the_gradient_is_checked_also_where_the_caller_wants_none(x):
    model = network()
    with input_gradients_only(model), torch.no_grad():
        assert solver_gradient(AuditCase(model, x, known(model, x))).verdict == "pass"


def test_a_ball_of_nan_is_no_ball(x):
    model = network()
    y = known(model, x)
    case = AuditCase(model, x, y, PGD(eps=0.1))
    standing = torch.zeros(12, dtype=torch.bool)
    case.__dict__["white_box"] = JudgedAttack(x * torch.nan, y, standing, ~standing, None)
    assert checks.the_ball(case).verdict == "fail"


@pytest.mark.parametrize("make", [network, with_dropout])
def test_suites_and_sweeps_take_a_module_as_it_is(make, x):
    module = make()
    voter, images = ito.Vote(module), Images(x, known(module, x), torch.arange(len(x)))
    voter.observe(x)
    suite = ito.SuiteSettings("linf", (0.1,), effort=0.1).suite(voter)
    data = InMemory((255 * x).byte(), images.y)
    for found in (
        lambda model: suite.attack(model, images, [0.1])[0].denial,
        lambda model: (
            ito.run_suite(model, None, data, ito.SuiteSettings("linf", (0.1,), effort=0.1)).ito.results[0].denial
        ),
        lambda model: attack_sweep(model, None, data, [PGD("linf", 0.1, 3)]).denial[0],
    ):
        mine, votes = found(module), found(voter)
        assert torch.equal(mine.images, votes.images)
        assert torch.equal(mine.votes, votes.votes)
    least = [ito.least_norm(model, x, images.y, lambda eps: PGD("l2", eps, 2), 1.0, 2) for model in (module, voter)]
    assert torch.equal(*least)
    assert bool((least[0] > 0).any())


def test_whether_a_module_is_random_is_asked_of_images():
    with pytest.raises(ito.ItoError, match=r"vote = ito.Vote\(module\) and call vote.observe"):
        ito.SuiteSettings("linf", (0.1,)).suite(network())
