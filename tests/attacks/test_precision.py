"""Gradients in bfloat16: where they point, and that nothing else is in bfloat16."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuralsde_ito as ito
from neuralsde_ito import bfloat16, kernels
from neuralsde_ito.attacks import APGD, PGD, Attack, try_precisions
from neuralsde_ito.attacks import precision as precision_module
from neuralsde_ito.attacks.objectives import OBJECTIVES
from neuralsde_ito.attacks.targets import Ascent, KnownPaths, as_target, in_precision
from neuralsde_ito.noise.keys import PathRange, make_keys
from neuralsde_ito.noise.normals import add_normals

pytestmark = pytest.mark.filterwarnings("ignore:This processor has no instructions for bfloat16")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 16, 16, generator=generator), torch.randint(10, (6,), generator=generator)


def network(omega: float = 0.5, **settings: object) -> ito.ItoResNet:
    torch.manual_seed(0)
    net = ito.load_resnet("resnet8")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return ito.recast(net.eval(), omega=omega, image_shape=(3, 16, 16), **settings)


def ascent(model: nn.Module, images: tuple[Tensor, Tensor], precision: str) -> Ascent:
    x, y = images
    target = in_precision(as_target(model, x), precision)
    paths = PathRange(0, "gradient", torch.arange(len(x)), 0, target.distinct or 3)
    return target.ascend(OBJECTIVES["mean-loss"], x, y, paths)


@pytest.mark.parametrize("kind", ["one member", "two members", "module", "random module", "known paths"])
def test_gradients_point_where_those_of_float32_do(kind: str, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model: nn.Module = {
        "one member": network(),
        "two members": ito.ItoEnsemble([network(), network(0.3)], 4),
        "module": network().base,
        "random module": nn.Sequential(nn.Dropout(0.2).train(), network().base),
        "known paths": network(),
    }[kind]
    if kind == "known paths":
        known = KnownPaths(ito.ItoEnsemble([model], 4), x, 0)
        paths = PathRange(0, "gradient", torch.arange(len(x)), 0, known.count)
        both = [in_precision(known, p).ascend(OBJECTIVES["mean-loss"], x, y, paths) for p in ("float32", "bfloat16")]
    else:
        both = [ascent(model, images, p) for p in ("float32", "bfloat16")]
    exact, brief = (each.gradient.flatten(1) for each in both)
    assert brief.dtype == torch.float32
    assert not torch.equal(exact, brief)
    assert F.cosine_similarity(exact, brief).min() > 0.9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_torchs_convolutions_have_right_gradients_in_bfloat16(
    layout: torch.memory_format, stride: int, kernel: int
) -> None:
    """Some versions of torch had wrong ones for strides above 1; a cosine would show that."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, kernel, stride, kernel // 2, bias=False).to(memory_format=layout)
    x = torch.randn(4, 16, 9, 8).to(memory_format=layout)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        own = x.to(dtype).detach().requires_grad_()
        out = conv.to(dtype)(own)
        out.backward(torch.ones_like(out) * torch.linspace(-1, 1, out.shape[-1]).to(dtype))
        gradients.append(own.grad.float().flatten(1))
    assert F.cosine_similarity(*gradients).min() > 0.999


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 16, 4, 6), (5, 3, 5, 7), (2, 64, 2, 2)])
def test_noise_on_a_state_in_bfloat16_is_rounded_once(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16, memory_format=layout)
    keys = make_keys(0, "report", index=torch.arange(len(x)))
    expected = add_normals(x.float(), keys, 0.3, 1, 2).bfloat16()
    out = add_normals(x, keys, 0.3, 1, 2)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(
        torch.vmap(lambda x, key: add_normals(x[None], key[None], 0.3, 1, 2)[0])(x, keys).bfloat16(), out
    )


@pytest.mark.skipif(kernels.library is None, reason="kernels.c was not compiled")
@pytest.mark.parametrize("with_skip", [False, True])
def test_compiled_passes_in_bfloat16(with_skip: bool) -> None:
    values = [float("nan"), -1.0, 2.0, float("inf"), -float("inf"), 1e-40, 3.3e38, -0.0, 1.00390625]
    x = torch.tensor(values).bfloat16().repeat(40)
    skip = x.flip(0).contiguous() if with_skip else None
    total = x if skip is None else (x.float() + skip.float())
    relu = kernels.rectifier(x, skip)
    out, passed = kernels.rectify_(x.clone(), relu), relu.passed
    assert passed is not None
    assert torch.equal(passed, ~(total <= 0))
    assert torch.equal(out.nan_to_num(-7), total.float().relu().bfloat16().nan_to_num(-7))
    gated = kernels.gate_(x.clone(), passed, skip)
    assert torch.equal(gated.nan_to_num(-7), torch.where(passed, total.float(), 0.0).bfloat16().nan_to_num(-7))


class Watched(nn.Module):
    """A module that remembers in which dtypes its convolution has answered."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = network().base
        self.seen: set[tuple[bool, torch.dtype]] = set()  # with a gradient or without

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        self.seen.add((torch.is_grad_enabled(), out.dtype))
        return out


@pytest.mark.parametrize("attack", [PGD, APGD])
def test_what_settles_and_chooses_is_float32(attack: type[Attack], images: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = Watched(), images
    result = attack("linf", 0.1, 5, precision="bfloat16").run(model, x, y)
    assert (True, torch.bfloat16) in model.seen
    assert (False, torch.bfloat16) not in model.seen
    with torch.no_grad():
        assert torch.equal(result.fooled, model.net(result.images).argmax(1) != y)


class Liar(nn.Module):
    """Right wherever it computes in float32, wrong in bfloat16: what settled by its gradients' logits would be lost."""

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x.flatten(1), torch.eye(2, x[0].numel()) + 1)
        return logits * 1e-3 + torch.tensor([1.0, 0.0] if logits.dtype == torch.float32 else [0.0, 1.0])


def test_a_success_that_only_bfloat16_sees_is_none(images: tuple[Tensor, Tensor]) -> None:
    x, y = images[0], torch.zeros(6, dtype=torch.int64)
    result = PGD("linf", 0.01, 5, precision="bfloat16").run(Liar(), x, y)
    assert not result.fooled.any()
    assert result.gradients == 6 * 5  # no image left the attack


def test_precisions_of_attacks_are_checked(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    with pytest.raises(ito.ItoError, match="precision"):
        PGD(precision="float16")
    with pytest.raises(ito.ItoError, match="precision"):
        ito.SuiteSettings(precision="half")
    for model in (network(0.5, solver="milstein"), network(0.5, steps=2), network(0.5, schedule="multiplicative")):
        with pytest.raises(ito.ItoError, match="precision='float32'"):
            PGD("linf", 0.1, 1, precision="bfloat16").run(model, x, y)

    class Own:
        distinct = 1

    with pytest.raises(ito.ItoError, match="Own has no gradients in bfloat16"):
        in_precision(Own(), "bfloat16")


def test_all_attacks_of_a_suite_take_its_precision() -> None:
    ensemble = ito.ItoEnsemble([network()], 4)
    suite = ito.SuiteSettings(precision="bfloat16").suite(ensemble, network().base)
    attacks = [step.attack for step in suite.steps(0.1)] + [suite.known(0.1)]
    assert {attack.precision for attack in attacks} == {"bfloat16"}


def test_a_trial_takes_what_is_quicker(images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is set: bfloat16 takes half of float32's time, then twice."""
    monkeypatch.setattr(precision_module, "computes_in_bfloat16", lambda device: True)
    for ratio, expected in ((0.5, "bfloat16"), (2.0, "float32")):
        lengths = iter([0, 1, 0, ratio] * 3)
        monkeypatch.setattr(precision_module.time, "perf_counter", lambda lengths=lengths: next(lengths))
        trial = try_precisions(network(), *images)
        assert trial.precision == expected
        assert f"{ratio:.2f} of float32's time" in trial.why


def test_a_trial_says_why_bfloat16_is_not_taken(images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    for native, model, why in (
        (True, network(solver="milstein"), "cannot be taken"),
        (False, network(), "no instructions for bfloat16"),  # it is not even tried
    ):
        monkeypatch.setattr(precision_module, "computes_in_bfloat16", lambda device, native=native: native)
        trial = try_precisions(model, *images)
        assert trial.precision == "float32"
        assert why in trial.why


@pytest.mark.filterwarnings("default")
def test_an_attack_that_a_processor_imitates_is_obeyed_and_said(
    images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "computes_in_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="no instructions for bfloat16.*precision auto"):
        PGD("linf", 0.01, 1, 2, precision="bfloat16").run(network(), *images)


def test_an_audit_says_in_which_precision_it_took_gradients() -> None:
    torch.manual_seed(0)
    x, net = torch.rand(4, 1, 5, 5), nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
    y = net(x).argmax(1)
    short = {"eps": 0.02, "queries": 3, "draws": 20}
    brief = ito.audit(net, x, y, precision="bfloat16", **short)
    assert any("bfloat16" in remark for remark in brief.remarks)
    assert brief.attack.precision == "bfloat16"
    assert not any("bfloat16" in remark for remark in ito.audit(net, x, y, **short).remarks)
