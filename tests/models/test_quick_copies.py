"""Whatever a network is made of: `predict`, the attacks and ``model(x, keys)`` see one model, or there is a refusal."""

import copy
import random
import subprocess
import sys
import threading

import pytest
import torch
from problems import random_images, random_resnet, smooth_chain, trained
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck

import neuralsde_ito as ito
from neuralsde_ito import kernels
from neuralsde_ito.attacks.active import ActiveSet
from neuralsde_ito.attacks.norms import BALLS
from neuralsde_ito.attacks.objectives import OBJECTIVES, TARGETED, mean_loss
from neuralsde_ito.attacks.panels import Panels
from neuralsde_ito.attacks.targets import EnsembleTarget, as_target
from neuralsde_ito.models import inference as engine
from neuralsde_ito.models.frozen import FrozenResNet
from neuralsde_ito.models.inference import infer, piece_of, quicken
from neuralsde_ito.models.recast import ItoResNet
from neuralsde_ito.models.resnets import CifarResNet
from neuralsde_ito.noise import normals as noise
from neuralsde_ito.noise.keys import PathRange, fresh_keys
from neuralsde_ito.parallel import in_pieces


class PreAct(BasicBlock):
    """BatchNorm and ReLU before the convolutions: folding bn1 into conv1 would compute another function."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(out)))


class Louder(ItoResNet):
    """A subclass with a ``forward`` of its own."""

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        return 1.5 * super().forward(x, keys)


class Double(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def small(block: type = BasicBlock, widths=(4, 8), layers=(2, 1), option_a=False) -> nn.Module:
    return CifarResNet(block, layers, widths, 5, 3, option_a=option_a)


def disagreement(model: ItoResNet, x: Tensor) -> tuple[float, float]:
    """Differences from the reference, relative to its largest number: of logits, and of the input's gradient."""
    y, n = torch.zeros(len(x), dtype=torch.int64), len(x)
    keys = ito.make_keys(0, "gradient", 0, torch.arange(3)[:, None], torch.arange(n))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    at = x.clone().requires_grad_()
    logits = torch.stack([model(at, path) for path in keys])
    (gradient,) = torch.autograd.grad(mean_loss(logits, y).sum(), at)
    wanted, scale = logits.detach(), max(1.0, float(logits.detach().abs().amax()))
    for module, training in modes.items():
        module.training = training
    ensemble = ito.ItoEnsemble([model], inferences=3)
    target = as_target(ensemble, x)
    quick = ensemble.quick(x)
    with torch.no_grad():
        found = [
            infer(quick.members[0], x, torch.arange(n).repeat(3), keys.flatten()).view_as(wanted),
            quick.path_logits(x, PathRange(0, "gradient", torch.arange(len(x)), 0, 3)),
            target.path_logits(x, PathRange(0, "gradient", torch.arange(n), 0, 3)),
        ]
    ascent = target.ascend(mean_loss, x, y, PathRange(0, "gradient", torch.arange(n), 0, 3))
    found.append(ascent.logits)
    assert {module: module.training for module in model.modules()} == modes
    apart = max(float((one - wanted).abs().amax()) for one in found) / scale
    steep = max(1e-6, float(gradient.abs().amax()))
    return apart, float((ascent.gradient - gradient).abs().amax()) / steep


def ready(net: nn.Module, **settings) -> ItoResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ito.recast(trained(net), **({"omega": 0.3, "image_shape": (3, 12, 12)} | settings))


X = random_images(4, 12)


@pytest.fixture(autouse=True)
def seeded():
    """The same weights in each run: with 3 of 1,000 an input of a ReLU is so near 0 that rounding turns a gradient."""
    torch.manual_seed(0)


# --- what was wrong -------------------------------------------------------------------------------------


def test_a_block_in_another_order_is_not_folded():
    chain = ito.Chain(
        nn.Conv2d(3, 6, 3), [PreAct(6, 6) for _ in range(2)], nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    )
    chain(X)
    model = ready(chain)
    assert any(isinstance(m, nn.BatchNorm2d) for m in quicken(model).modules())
    assert max(disagreement(model, X)) < 1e-4


@pytest.mark.parametrize("place", ["bn1", "conv1", "relu", "block", "stem", "head"])
@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_act_in_the_quick_copy(place, kind):
    model = ready(small())
    block = model.sdes[1].block
    module = {"block": block, "stem": model.stem, "head": model.head}.get(place) or block.get_submodule(place)
    calls = []
    if kind == "forward":
        module.register_forward_hook(lambda module, given, found: calls.append(1) or 1.3 * found)
    else:
        module.register_forward_pre_hook(lambda module, given: calls.append(1) or (0.7 * given[0],))
    assert max(disagreement(model, X)) < 1e-4
    calls.clear()
    ito.ItoEnsemble([model], inferences=3).predict(X)
    assert calls


def test_a_hook_on_the_recast_network_acts_in_predict_and_attacks():
    model = ready(small())
    model.register_forward_hook(lambda module, given, logits: logits.flip(-1))
    assert max(disagreement(model, X)) < 1e-4
    plain = ready(small())
    plain.load_state_dict(model.state_dict())
    votes = ito.ItoEnsemble([model], inferences=3).predict(X, full=True).votes
    assert torch.equal(votes, ito.ItoEnsemble([plain], inferences=3).predict(X, full=True).votes.flip(-1))


def test_a_hook_records_where_its_owner_looks():
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def hook(self, module: nn.Module, given: object, found: Tensor) -> None:
            self.seen.append(len(found))

    model, recorder = ready(small()), Recorder()
    model.sdes[0].block.register_forward_hook(recorder.hook)
    ito.ItoEnsemble([model], inferences=3).predict(X)
    assert recorder.seen


def test_a_subclass_with_its_own_forward_is_called():
    made = ready(small())
    model = Louder(made.stem, made.sdes, made.head, made.solver, made.steps, made.checkpoint, made.image_shape)
    assert not model.splits_at_noise
    assert max(disagreement(model, X)) < 1e-4


@pytest.mark.parametrize("normed", [spectral_norm, weight_norm, parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_normed_weights(normed):
    net = small()
    for name in ("conv1", "conv2"):
        normed(net.layer1[0].get_submodule(name))
    net.train()(X).sum()  # leaves a weight with a graph behind
    assert max(disagreement(ready(net), X)) < 1e-4


def test_batchnorm_without_running_statistics_is_refused():
    model = ready(small())
    model.sdes[0].block.bn1 = nn.BatchNorm2d(4, track_running_stats=False)
    ensemble = ito.ItoEnsemble([model], inferences=3)
    for call in (lambda: ensemble.predict(X), lambda: ito.attacks.pgd(ensemble, X, torch.arange(4), steps=1)):
        with pytest.raises(ito.ItoError, match="keeps no running statistics"):
            call()


def test_a_copy_that_differs_is_not_used(monkeypatch):
    model = ready(small())
    assert isinstance(quicken(model), FrozenResNet)
    folded = engine.folded

    def wrong(own: ItoResNet) -> FrozenResNet:
        quick = folded(own)
        quick.head[-1].bias.add_(0.01)
        return quick

    monkeypatch.setattr(engine, "folded", wrong)
    assert not isinstance(quicken(model), FrozenResNet)
    assert max(disagreement(model, X)) < 1e-4


def test_blocks_of_unknown_code_run_in_one_thread_and_keep_their_outputs():
    class Keeper(nn.Module):
        """A block that holds on to what it returned, and notices a second thread."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.inside, self.attacked = nn.Conv2d(4, 4, 3, padding=1), 0, 0

        def forward(self, x: Tensor) -> Tensor:
            self.inside += 1
            y = x + self.conv(x).tanh()
            kept = y.clone()
            self.last = (y, kept)
            self.attacked = max(self.attacked, self.inside)
            self.inside -= 1
            return y

    chain = ito.Chain(nn.Conv2d(3, 4, 3), [Keeper(), Keeper()], nn.Sequential(nn.Flatten(), nn.LazyLinear(5)))
    chain(X)
    model = ready(chain)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ensemble = ito.ItoEnsemble([model], inferences=5)
        ensemble.chunk = 2
        quick = ensemble.quick(X)
        with torch.no_grad():
            quick.path_logits(X, PathRange(0, "report", torch.arange(len(X)), 0, 5))
    finally:
        torch.set_num_threads(before)
    for sde in quick.members[0].sdes:
        assert torch.equal(*sde.block.last)
        assert sde.block.attacked == 1
    assert max(disagreement(model, X)) < 1e-4


# --- sizes ----------------------------------------------------------------------------------------------


def test_pieces_fit_the_images_at_hand():
    model = ito.recast(ito.load_resnet("resnet8"))
    large = torch.rand(1, 3, 96, 96)
    assert piece_of(model, large) == piece_of(model, torch.rand(1, 3, 32, 32)) // 9
    deep = ito.recast(random_resnet("resnet50", num_classes=10))
    assert piece_of(deep, torch.rand(1, 3, 224, 224)) == 2
    seen = []
    ensemble = ito.ItoEnsemble([model, copy.deepcopy(model), copy.deepcopy(model)], inferences=3)
    for member in ensemble.members:
        member.sdes[0].block.register_forward_hook(lambda block, given, found: seen.append(len(found)))
    ensemble.predict(torch.rand(40, 3, 96, 96), full=True)
    assert max(seen) <= 14


def test_memory_that_runs_out_on_a_cpu_halves_the_pieces():
    sizes = []

    def work(part: slice) -> slice:
        sizes.append(part.stop - part.start)
        if sizes[-1] > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory")
        return part

    parts = in_pieces(work, 12, 12, torch.device("cpu"))
    assert sum(part.stop - part.start for part in parts) == 12
    assert max(part.stop - part.start for part in parts) <= 3

    def broken(part: slice) -> slice:
        raise RuntimeError("sizes of tensors must match")

    with pytest.raises(RuntimeError, match="sizes"):
        in_pieces(broken, 12, 12, torch.device("cpu"))


def test_threads_on_one_model_with_images_of_different_sizes():
    model = ito.recast(random_resnet("resnet8"), omega=0.3, solver="srk", steps=2).eval()
    images = [torch.rand(2, 3, size, size) for size in (12, 16, 20)]
    keys = ito.make_keys(0, "report", index=torch.arange(2))
    with torch.no_grad():
        wanted = [model(x, keys) for x in images]
    wrong = []

    def ask(number: int) -> None:
        try:
            for _ in range(10):
                with torch.no_grad():
                    assert torch.allclose(model(images[number], keys), wanted[number], atol=1e-5)
        except Exception as error:
            wrong.append((number, error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_tf32_loosens_the_comparison_on_a_gpu_alone(monkeypatch):
    wanted = torch.tensor([[10.0, 0.0]])
    assert not engine.close_logits(wanted + 0.05, wanted)
    assert engine.close_logits(wanted + 5e-4, wanted)
    assert not engine.close_logits(torch.full_like(wanted, torch.nan), wanted)


def test_a_default_device_changes_nothing():
    model = ready(small())
    wanted = ito.ItoEnsemble([model], inferences=3).predict(X, full=True).votes
    torch.set_default_device("meta")
    try:
        again = ito.ItoEnsemble([ito.recast(model, 0.3, image_shape=(3, 12, 12))], inferences=3)
        found = again.predict(X, full=True)
        quicken(model)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found.votes, wanted)


# --- a GPU that is not here -----------------------------------------------------------------------------


fake = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class AbsentGPU(TorchDispatchMode):
    """Inside, a GPU's tensors are fake, and whatever a program would have to wait for is an error.

    It waits until the GPU has done all that it was given: to copy a tensor from it or to it, and to read one (``bool``,
    ``item``, a mask as an index), which no fake tensor can answer. float64 on it is an error too: MPS has none. A CPU's
    tensors are real.
    """

    has_float64 = False

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.mode = torch.device(device), FakeTensorMode(allow_non_fake_inputs=True)
        self.mode.__deepcopy__ = lambda memo: self.mode  # a fake tensor's copy belongs to the same mode

    def __enter__(self):
        self.mode.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.mode.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        places = {leaf.type for leaf in leaves if isinstance(leaf, torch.device)} | {t.device.type for t in tensors}
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            assert len(places) == 1, f"a copy between {places}"
        if places - {"cpu"} and not self.has_float64:
            kinds = {t.dtype for t in tensors if t.device.type != "cpu"} | {*filter(_is_dtype, leaves)}
            assert torch.float64 not in kinds, "MPS has no float64"
        if places == {"cpu"} and not any(isinstance(t, FakeTensor) for t in tensors):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def put(self, value: Tensor) -> Tensor:
        fake = self.mode.from_tensor(value.detach())
        with self.mode:
            return fake.to(self.device)

    def move(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            weights = {
                name: nn.Parameter(self.put(p), False) for name, p in module._parameters.items() if p is not None
            }
            module._parameters.update(weights)
            module._buffers.update({name: self.put(value) for name, value in module._buffers.items()})
        return model


def _is_dtype(leaf: object) -> bool:
    return isinstance(leaf, torch.dtype)


@fake
def test_a_gpu_s_copy_stays_on_it():
    gpu, model = AbsentGPU("cuda:0"), ready(small())
    gpu.move(model)
    x, keys = gpu.put(torch.rand(2, 3, 12, 12)), gpu.put(torch.arange(2))
    with gpu:
        for one in (model, engine.folded(model)):
            logits = one(x, keys)
            assert (logits.device.type, tuple(logits.shape)) == ("cuda", (2, 5))
        assert infer(one, x, keys.repeat(3), keys.repeat(3)).device.type == "cuda"
    # What the fake mode has made is not kept for real tensors.
    assert ito.recast(ito.load_resnet("resnet8"))(torch.rand(2, 3, 32, 32)).isfinite().all()


@pytest.fixture(params=["cuda:0", "cpu"])
def gpu(request, monkeypatch):
    """A GPU, with the ways of real tensors. Where no such card is, no backward pass runs, and gives zeros here; it runs
    where a CPU's fake tensors stand for those of a GPU."""
    monkeypatch.setattr(kernels, "ordinary", lambda x: True)
    monkeypatch.setattr(kernels, "library", None)  # it would take what is no memory
    monkeypatch.setattr(noise, "_MIXED_ELEMENTS", {})
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    if request.param != "cpu":

        def zeros(outputs, inputs, *_, **__):
            return tuple(torch.zeros_like(x) for x in ([inputs] if isinstance(inputs, Tensor) else inputs))

        monkeypatch.setattr(torch.autograd, "grad", zeros)
    return AbsentGPU(request.param)


WAITS = (AssertionError, DataDependentOutputException, DynamicOutputShapeException)
NOISY = [name for name, solver in ito.SOLVERS.items() if solver.form != "ode"]


@fake
@pytest.mark.parametrize("schedule", ["inverse-time", "multiplicative"])
@pytest.mark.parametrize("name", NOISY)
def test_no_solver_waits_for_a_gpu(name, schedule, gpu):
    model = gpu.move(ready(small(layers=(1, 1)), schedule=schedule, solver=name, steps=2))
    x, keys = gpu.put(torch.rand(2, 3, 12, 12)), gpu.put(torch.arange(2))
    with gpu, torch.no_grad():
        assert model(x, keys).device == x.device
    with gpu:
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(at, keys).sum(), at)
    assert gradient.shape == x.shape


@pytest.mark.parametrize("gpu", ["cuda:0"], indirect=True)
@pytest.mark.parametrize("name", sorted(ito.SOLVERS.keys() - set(NOISY)))
def test_torchdiffeq_waits_for_a_gpu(name, gpu):
    # It moves its times to the state's device and reads them there at each step.
    model = gpu.move(ready(small(), omega=0.0, solver=name))
    x, keys = gpu.put(torch.rand(2, 3, 12, 12)), gpu.put(torch.arange(2))
    with gpu, pytest.raises(WAITS):
        model(x, keys)


@fake
@pytest.mark.parametrize("folded", [True, False])
def test_neither_votes_nor_steps_of_an_attack_wait_for_a_gpu(folded, gpu):
    models = [gpu.move(engine.folded(ready(small())) if folded else ready(small()).eval()) for _ in range(2)]
    ensemble = ito.ItoEnsemble(models, 3).eval()
    x, rows, labels = gpu.put(torch.rand(2, 3, 12, 12)), gpu.put(torch.arange(2)), gpu.put(torch.zeros(2).long())
    target = EnsembleTarget(ensemble)
    target._quick = ensemble  # to make it, its logits are compared with the ensemble's, once
    with gpu:
        assert ensemble(x).shape == (2, 5)
        panels = Panels(target, labels, 0, rows, 6, 4, 10)
        panels._checked = panels.labels  # they are read once in an attempt
        active = ActiveSet(panels, mean_loss, x, rows)
        assert active.judge(0).shape == (4, 2, 5)
        loss, logits, gradient = active.ascend(0)
        active.keep_best(loss, logits)
        gpu.has_float64 = True  # the ball of L1 takes it where it is no MPS
        for ball in BALLS.values():
            ahead = active.iterate + 0.1 * ball.steepest(gradient, active.iterate)
            active.iterate = ball.project(ahead, active.origin, 0.1).clamp(0, 1)
        for name, objective in OBJECTIVES.items():
            y = torch.stack([labels, labels + 1], 1) if name in TARGETED else labels
            assert objective(logits, y).shape == (2,)
        # After each step the program waits, to see which images are fooled and which are left.
        with pytest.raises(WAITS):
            active.settle(logits, 0)
        with pytest.raises(WAITS):
            active.drop(rows > 0)


@fake
def test_naming_noise_does_not_wait_for_a_gpu(gpu):
    index = gpu.put(torch.arange(3))
    with gpu:
        assert ito.make_keys(0, "report", 1, 2, index).shape == (3,)
        assert fresh_keys(4, gpu.device).shape == (4,)
        for dtype in (torch.float32, torch.bfloat16):
            assert noise.normals(index, 77, 1, 2, dtype=dtype).dtype == dtype
            x = torch.zeros(3, 5, 5, dtype=dtype, device=gpu.device)
            assert noise.add_normals(x, index, 0.3, 1).shape == x.shape


# --- any network ----------------------------------------------------------------------------------------


def _hook(net: nn.Module, rng: random.Random) -> None:
    module = rng.choice([m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, BasicBlock))])
    factor = rng.uniform(0.5, 1.5)
    if rng.random() < 0.5:
        module.register_forward_hook(lambda module, given, found: factor * found)
    else:
        module.register_forward_pre_hook(lambda module, given: (factor * given[0],))


def _backward_hook(net: nn.Module, rng: random.Random) -> None:
    module = rng.choice([m for m in net.modules() if isinstance(m, nn.Conv2d)])
    module.register_full_backward_hook(lambda module, before, after: tuple(g if g is None else 0.5 * g for g in before))


def _normed(net: nn.Module, rng: random.Random) -> None:
    conv = rng.choice([m for m in net.modules() if isinstance(m, nn.Conv2d)])
    rng.choice([spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm])(conv)


def _parametrized(net: nn.Module, rng: random.Random) -> None:
    conv = rng.choice([m for m in net.modules() if type(m) is nn.Conv2d])
    nn.utils.parametrize.register_parametrization(conv, "weight", Double())


def _pruned(net: nn.Module, rng: random.Random) -> None:
    conv = rng.choice([m for m in net.modules() if type(m) is nn.Conv2d and not m._forward_pre_hooks])
    if "weight" in conv._parameters:
        conv.weight.data = conv.weight.data.contiguous()
        prune.random_unstructured(conv, "weight", 0.4)


def _method(net: nn.Module, rng: random.Random) -> None:
    module = rng.choice([m for m in net.modules() if type(m) in (nn.Conv2d, nn.BatchNorm2d, BasicBlock, Bottleneck)])
    forward = module.forward
    module.forward = lambda x: 0.8 * forward(x)


def _other_layer(net: nn.Module, rng: random.Random) -> None:
    block = rng.choice([m for m in net.modules() if isinstance(m, (BasicBlock, Bottleneck))])
    what = rng.choice(["relu", "bn1", "bn2", "conv1", "downsample"])
    if what == "relu":
        block.relu = rng.choice([nn.GELU(), nn.LeakyReLU(0.2), nn.ELU(), nn.Softplus(), nn.Hardtanh()])
    elif what in ("bn1", "bn2"):
        width = block.get_submodule(what).num_features
        kinds = [
            nn.GroupNorm(2, width), nn.InstanceNorm2d(width, affine=True), nn.Identity(),
            nn.BatchNorm2d(width, affine=False), nn.BatchNorm2d(width, momentum=None), nn.BatchNorm2d(width, eps=0.1),
        ]  # fmt: skip
        setattr(block, what, rng.choice(kinds))
    elif what == "conv1":
        old = block.conv1
        mode = rng.choice(["zeros", "reflect", "circular"])
        kind = {"padding": old.padding, "padding_mode": mode, "bias": rng.random() < 0.5}
        block.conv1 = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, old.stride, **kind)
    elif isinstance(block.downsample, nn.Sequential):
        block.downsample = nn.Sequential(*block.downsample, nn.Dropout(0.5))


def _shared(net: nn.Module, rng: random.Random) -> None:
    net.layer1[1] = net.layer1[0] if net.layer1[0].downsample is None else net.layer1[1]


def _modes(net: nn.Module, rng: random.Random) -> None:
    for module in rng.sample(list(net.modules()), 3):
        module.training = not module.training


def _format(net: nn.Module, rng: random.Random) -> None:
    net.to(memory_format=torch.channels_last)
    # With AVX2 alone torch 2.14 writes outside its memory: gradients of channels_last weights (6, 4, 1, 1), stride 2.
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        net.requires_grad_(False)


def _dtype(net: nn.Module, rng: random.Random) -> None:
    net.to(rng.choice([torch.float64, torch.bfloat16]))


CHANGES = (
    _hook, _hook, _backward_hook, _normed, _parametrized, _pruned, _method, _other_layer, _other_layer, _shared, _modes,
    _format, _dtype,
)  # fmt: skip


def random_model(seed: int) -> ItoResNet:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    block = rng.choice([BasicBlock, BasicBlock, Bottleneck])
    if rng.random() < 0.15:
        net = smooth_chain(seed).float()
        net.stem[0] = nn.Conv2d(3, 3, 3, padding=1)
    else:
        net = small(block, (4, rng.choice([6, 8])), option_a=block is BasicBlock and rng.random() < 0.5)
        if rng.random() < 0.15:
            net.layer1 = nn.Sequential(*[PreAct(4 * block.expansion, 4 * block.expansion) for _ in range(2)])
            net.conv1 = nn.Conv2d(3, 4 * block.expansion, 3, padding=1, bias=False)
            net.bn1 = nn.BatchNorm2d(4 * block.expansion)
            if block is Bottleneck or net.layer2[0].conv1.in_channels != 4:
                net.layer2[0].conv1 = nn.Conv2d(4 * block.expansion, net.layer2[0].conv1.out_channels, 1, bias=False)
        trained(net)
        for change in rng.sample(CHANGES, rng.choice([0, 1, 1, 2, 3])):
            change(net, rng)
    solver, steps = rng.choice([("euler", 1), ("euler", 1), ("euler", 1), ("euler", 2), ("milstein", 1), ("srk", 1)])
    model = ito.recast(
        net, omega=rng.choice([0.0, 0.2, 1.0]), schedule=rng.choice(list(ito.SCHEDULES)), solver=solver, steps=steps,
        image_shape=(3, 12, 12), checkpoint=rng.random() < 0.2,
    )  # fmt: skip
    way = rng.random()
    if way < 0.1:
        return Louder(model.stem, model.sdes, model.head, solver, steps, model.checkpoint, model.image_shape)
    if way < 0.2:
        model.register_forward_hook(lambda module, given, logits: logits.flip(-1))
    elif way < 0.25:
        model.forward = lambda x, keys=None: 2 * ItoResNet.forward(model, x, keys)
    elif way < 0.3:
        model.train()
    return model


@pytest.mark.parametrize("seed", range(0, 240, 20))
@pytest.mark.filterwarnings("ignore")
def test_no_modified_network_has_a_quick_copy_that_differs(seed):
    refused = 0
    for number in range(seed, seed + 20):
        try:
            model = random_model(number)
        except ito.ItoError:  # `recast` cannot cut it: a block that occurs twice
            refused += 1
            continue
        dtype = next(model.parameters()).dtype
        logits, gradient = disagreement(model, X.to(dtype))
        # In bfloat16 the reference itself moves by its rounding where batches differ.
        exact = dtype != torch.bfloat16
        assert logits <= (1e-4 if exact else 0.05), number
        assert gradient <= (2e-3 if exact else 0.3), number
    assert refused < 5


# --- what a first version of the comparison let through -------------------------------------------------


class Swapped(nn.Module):
    """A residual block whose ``nn.Sequential`` is called in another order than it is written."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pair[0](F.relu(self.pair[1](x)))


@pytest.mark.parametrize(("scale", "shift"), [(1e-5, 0.0), (1.0, 3e4), (1.0, 0.0)])
def test_the_comparison_is_of_what_tells_classes_apart(scale, shift):
    chain = ito.Chain(nn.Conv2d(3, 6, 3), [Swapped(6), Swapped(6)], nn.Sequential(nn.Flatten(), nn.LazyLinear(5)))
    chain(X)
    with torch.no_grad():
        chain.head[1].weight.mul_(scale)
        chain.head[1].bias.mul_(scale).add_(shift)
    model, keys = ready(chain), torch.arange(4)
    with torch.no_grad():
        assert torch.equal(quicken(model, X)(X, keys).argmax(1), model(X, keys).argmax(1))


@pytest.mark.parametrize("method", ["_conv_forward", "forward"])
def test_a_method_set_on_a_convolution_is_in_the_gradient(method):
    # Folding keeps its logits, so only the gradient by hand could tell: it had an eighth of its length.
    model = ready(small())
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            own = getattr(module, method)
            setattr(module, method, lambda x, *rest, own=own: 1.7 * own(x, *rest))
    assert max(disagreement(model, X)) < 1e-4


def test_vmap_over_several_steps_is_refused_in_a_sentence():
    model = ito.recast(smooth_chain(), 0.3, steps=4, image_shape=(2, 6, 6)).eval().requires_grad_(False)
    x, keys = random_images(2, 6, channels=2, dtype=torch.float64), torch.arange(2)
    with pytest.raises(ito.ItoError, match="Only Euler with one step"):
        torch.func.vmap(lambda x, key: model(x[None], key[None])[0])(x, keys)
    model.solver = "srk"
    with pytest.raises(ito.ItoError, match="does not go through SRK"):
        torch.func.vmap(lambda x: model(x, keys))(torch.stack([x, x]))


def test_saving_loading_and_auditing_under_another_default_device(tmp_path):
    net = ito.load_resnet("resnet8", in_channels=1)
    config = ito.load_config("digits", assignments=["ensemble.members=1", "ensemble.inferences=3"])
    ensemble = ito.ItoEnsemble([ito.recast(net, **config.sde.model_dump(), image_shape=(1, 8, 8))], inferences=3)
    torch.set_default_device("meta")
    try:
        ito.save_ensemble(tmp_path / "run", ensemble, config, net)
        again, _ = ito.load_ensemble(tmp_path / "run")
        index, x, _ = next(ito.load_data("digits", test_limit=3).test.batches(3))
        votes = again.predict(x, index=index, full=True).votes
    finally:
        torch.set_default_device(None)
    assert torch.equal(votes, ensemble.predict(x, index=index, full=True).votes)


# --- names, labels, starts ------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.arange(3), [0, 1, 2, 3]])
def test_names_that_are_no_whole_numbers_are_refused(index):
    ensemble = ito.ItoEnsemble([ready(small())], inferences=3)
    with pytest.raises(ito.ItoError, match="index names the images"):
        ensemble.predict(X, index=index)
    with pytest.raises(ito.ItoError, match="index names the images"):
        ito.attacks.PGD(steps=1).run(ensemble, X, torch.arange(4), index=index)


@pytest.mark.parametrize(
    "y", [torch.tensor([0, 1, 2, 99]), torch.tensor([0, 1, 2, -1]), [0, 1, 2, 3], X[:, 0, 0, 0] > 0]
)
@pytest.mark.parametrize("kind", [ito.attacks.PGD, ito.attacks.Square, ito.attacks.APGD])
def test_labels_that_cannot_be_are_refused(kind, y):
    ensemble = ito.ItoEnsemble([ready(small())], inferences=3)
    with pytest.raises(ito.ItoError, match="Labels must be"):
        kind(steps=2, eot=2, selection=2).run(ensemble, X, y)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [ito.attacks.PGD, ito.attacks.Square, ito.attacks.APGD])
def test_a_start_outside_of_the_ball_is_brought_into_it(kind, norm):
    ensemble = ito.ItoEnsemble([ready(small())], inferences=3)
    attack = kind(norm=norm, eps=0.05, steps=2, eot=2, selection=2)
    found = attack.run(ensemble, X, torch.arange(4), start=torch.ones_like(X)).images
    assert float(ito.attacks.BALLS[norm].length(found - X).max()) <= 0.05 + 1e-6
    with pytest.raises(ito.ItoError, match="start must be images of shape"):
        attack.run(ensemble, X, torch.arange(4), start=torch.ones(4, 1, 12, 12))


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ("", True),  # torch's default: convolutions
        ("cudnn.allow_tf32 = False", False),
        ("cudnn.allow_tf32 = False; backends.cuda.matmul.allow_tf32 = True", True),
        ("cudnn.conv.fp32_precision = 'ieee'", False),
        ("cudnn.conv.fp32_precision = 'ieee'; backends.cuda.matmul.fp32_precision = 'tf32'", True),
    ],
)
def test_whether_a_gpu_computes_in_tf32_can_be_read_however_it_was_set(settings, taken):
    if "fp32_precision" in settings and not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this version of torch has only the older settings")
    code = (
        "import torch; from torch import backends; from torch.backends import cudnn; "
        "from neuralsde_ito.models.inference import _computes_in_tf32; "
        f"{settings or 'pass'}; "
        "print(_computes_in_tf32(torch.device('cuda')), _computes_in_tf32(torch.device('cpu')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(taken), "False"]
