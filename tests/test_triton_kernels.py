"""The passes for a GPU, through Triton's interpreter on a CPU: what `kernels.c` and tensor operations compute."""

import importlib
import itertools
import subprocess
import sys

import pytest
import torch
from problems import rectify, trained
from torch import Tensor
from torchvision.models.resnet import BasicBlock

import neuralsde_ito as ito
from neuralsde_ito import kernels
from neuralsde_ito.models.frozen import FrozenResNet
from neuralsde_ito.models.inference import quicken
from neuralsde_ito.models.recast import ItoResNet
from neuralsde_ito.models.resnets import CifarResNet
from neuralsde_ito.noise import normals as noise
from neuralsde_ito.noise.keys import make_keys

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

ADDRESS = (2, 0, 0, 1)
ORDERS = [torch.contiguous_format, torch.channels_last]
VALUES = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan])


def fresh():
    """`triton_kernels`, decorated anew: Triton asks for the interpreter at that moment."""
    sys.modules.pop("neuralsde_ito.triton_kernels", None)
    return importlib.import_module("neuralsde_ito.triton_kernels")


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = fresh()
        yield module
    sys.modules.pop("neuralsde_ito.triton_kernels")


@pytest.fixture
def as_on_gpu(interpreted, monkeypatch):
    """Tensors of a CPU are taken as those of a GPU; a pass of `kernels.c` would be an error."""
    monkeypatch.setattr(kernels, "on_gpu", lambda device: interpreted)
    monkeypatch.setattr(kernels, "library", object())


def state(shape, order, dtype=torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=order) if x.dim() == 4 else x


def close(found: Tensor, wanted: Tensor) -> bool:
    """Within 1e-6; in bfloat16 within one of its steps: the interpreter cuts where a GPU rounds."""
    relative = 2**-7 if found.dtype == torch.bfloat16 else 0
    return torch.allclose(found.float(), wanted, rtol=relative, atol=1e-6)


SHAPES = [
    (1, 1),
    (3, 7),
    (5, 2),
    (2, 2050),
    (9, 1029),
    (3, 3, 5, 5),
    (5, 16, 8, 8),
    (2, 6, 3, 3),
    (1, 5, 4, 4),
    (2, 8, 1, 1),
]
SHAPES += [(6, 100, 7, 2), (0, 4, 4, 4)]  # more pairs than a program has; nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("as_on_gpu")
def test_the_noise_is_that_of_a_cpu(shape, order, dtype, monkeypatch):
    x, keys = state(shape, order, dtype), make_keys(7, "report", index=torch.arange(shape[0]))
    assert kernels.layout(x, x) > 0
    scale = 0.7
    found = noise.add_normals(x, keys, scale, *ADDRESS)
    changed = noise.add_normals(x.clone(), keys, scale, *ADDRESS, in_place=True)
    assert found.stride() == x.stride()
    assert found.dtype == dtype
    assert torch.equal(changed, found)
    monkeypatch.undo()  # by `kernels.c`, where it is, then by tensors
    for library in (kernels.library, None):
        monkeypatch.setattr(kernels, "library", library)
        assert close(found, noise.add_normals(x.float(), keys, scale, *ADDRESS))


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("as_on_gpu")
def test_a_relu_and_noise_in_one_pass_are_those_of_a_cpu(shape, order, dtype, skipped, monkeypatch):
    x, keys = state(shape, order, dtype), make_keys(7, "report", index=torch.arange(shape[0]))
    skip = x.flip(0).contiguous(memory_format=order if x.dim() == 4 else torch.contiguous_format) if skipped else None
    found = []
    for remember in (True, False):
        out = x.clone()
        relu = kernels.rectifier(out, skip, remember)
        assert noise.add_normals(out, keys, 0.7, *ADDRESS, in_place=True, relu=relu) is out
        found.append((out, relu.passed))
    (out, passed), (silent, nothing) = found
    assert torch.equal(out, silent)
    assert nothing is None
    total = x.float() if skip is None else x.float() + skip.float()
    assert torch.equal(passed, total > 0)
    monkeypatch.undo()
    assert close(out, noise.add_normals(total.relu(), keys, 0.7, *ADDRESS))


@pytest.mark.parametrize("size", [1, 513, 4096])
@pytest.mark.usefixtures("as_on_gpu")
def test_normals_alone_are_those_of_a_cpu(size, monkeypatch):
    keys = make_keys(3, "report", index=torch.arange(5))
    found = noise.normals(keys, size, *ADDRESS), noise.scaled_normals(keys, size, torch.float32, 1e-3)
    monkeypatch.undo()
    wanted = noise.normals(keys, size, *ADDRESS), noise.scaled_normals(keys, size, torch.float32, 1e-3)
    assert torch.allclose(found[0], wanted[0], rtol=0, atol=1e-6)
    assert torch.allclose(found[1], wanted[1], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("as_on_gpu")
def test_what_the_kernels_cannot_take_is_left_to_tensors():
    x = torch.rand(4, 6, 5, 5)
    for other in (x.double(), x.half(), x[:, :, ::2], x.transpose(1, 2)):
        assert kernels.layout(other, torch.empty_like(other)) == 0
    keys = make_keys(0, "report", index=torch.arange(4))
    assert torch.allclose(
        noise.add_normals(x.double(), keys, 0.3, 2), noise.add_normals(x, keys, 0.3, 2).double(), rtol=0, atol=1e-6
    )


@pytest.mark.usefixtures("as_on_gpu")
def test_a_graph_that_holds_a_state_notices_that_it_was_changed():
    x, weight = torch.rand(3, 4), torch.rand(3, 4, requires_grad=True)
    y = (weight * x).sum()
    noise.add_normals(x, make_keys(0, "report", index=torch.arange(3)), 0.3, 2, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("skipped", [None, "same order", "other order"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in add")  # numpy's word for inf - inf
@pytest.mark.usefixtures("as_on_gpu")
def test_rectifying_and_its_way_back_are_torch_s(order, skipped, dtype):
    values = VALUES if dtype == torch.float32 else VALUES[VALUES.abs() != 1e-45]  # the interpreter has no such bfloat16
    n = len(values)
    x, skip = (
        part.view(1, n, 1, n).repeat(4, 1, 5, 1).to(dtype) for part in torch.meshgrid(values, values, indexing="ij")
    )
    other = ORDERS[order == ORDERS[0]]
    x, skip = (
        x.contiguous(memory_format=order),
        skip.contiguous(memory_format=order if skipped == "same order" else other),
    )
    gradient = skip.clone()
    skip = skip if skipped else None
    at = (x if skip is None else x + skip).requires_grad_()
    wanted = at.relu()
    slope, slope_too = (
        torch.autograd.grad(wanted, at, g, retain_graph=True)[0] for g in (gradient, gradient + x.detach())
    )
    start, silent = x.detach().clone(), x.detach().clone()
    x = x.detach().clone()
    passed = rectify(x, skip)
    assert rectify(silent, skip, remember=False) is None
    for found in (x, silent):
        assert torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert passed.stride() == x.stride()
    assert torch.allclose(kernels.gate_(gradient.clone(), passed), slope, rtol=0, atol=0, equal_nan=True)
    assert torch.allclose(kernels.gate_(gradient, passed, start), slope_too, rtol=0, atol=0, equal_nan=True)


class ByAutograd(FrozenResNet):
    solve_blocks = ItoResNet.solve_blocks


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.usefixtures("as_on_gpu")
def test_frozen_blocks_are_what_autograd_makes_of_them(copies):
    torch.manual_seed(0)
    net = CifarResNet(BasicBlock, (2, 1), (4, 6), 5, 3, option_a=False)
    quick = quicken(ito.recast(trained(net), omega=0.3, image_shape=(3, 9, 9)))
    assert quick.manual_gradient
    keys = make_keys(0, "report", inference=torch.arange(copies)[:, None], index=torch.arange(2))
    with torch.no_grad():
        before = quick.before_noise(torch.rand(2, 3, 9, 9))
    found = []
    for kind in (FrozenResNet, ByAutograd):
        quick.__class__ = kind
        at = before.clone().requires_grad_()
        logits = quick.along_paths(at, keys)
        assert ("_FrozenBlocks" in graph(logits)) == (kind is FrozenResNet)
        found.append((logits.detach(), torch.autograd.grad(logits.log_softmax(-1)[..., 0].sum(), at)[0]))
    (logits, gradient), (wanted, slope) = found
    assert torch.equal(logits, wanted)
    assert torch.allclose(gradient, slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


def graph(tensor: Tensor) -> str:
    """The names of the operations that autograd has recorded."""
    names, waiting = "", [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        names += f" {node.name()}"
        waiting += [before for before, _ in node.next_functions if before is not None]
    return names


def test_without_a_gpu_no_kernels_are_imported():
    # torch itself may import Triton.
    code = "import sys, torch, neuralsde_ito as ito; ito.normals(torch.arange(3), 8)\n"
    code += "assert 'neuralsde_ito.noise.normals' in sys.modules and 'neuralsde_ito.triton_kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gpu_that_triton_cannot_serve_is_named_and_left_to_tensors(monkeypatch):
    # No such device is here, so that the first kernel fails, as it does without a driver or a C compiler.
    kernels.on_gpu.cache_clear()
    with pytest.warns(UserWarning, match="Triton does not work on cuda:77; tensor operations take its place"):
        assert kernels.on_gpu(torch.device("cuda:77")) is None
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert kernels.on_gpu(torch.device("cuda:78")) is None  # without Triton: nothing to say
    kernels.on_gpu.cache_clear()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_gpu(capability, dtype, monkeypatch, tmp_path):
    # The interpreter takes what the compiler may refuse. ptxas comes with Triton; no GPU is needed.
    triton = pytest.importorskip("triton")
    compiler = importlib.import_module("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "neuralsde_ito.triton_kernels", None)
    module, target = fresh(), compiler.GPUTarget("cuda", capability, 32)

    def ptx(kernel, **constants):
        kinds = dict.fromkeys(("out", "x", "skip"), f"*{dtype}")
        kinds |= {"keys": "*i64", "address": "i64", "passed": "*u8", "scale": "fp32"}
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
        return triton.compile(source, target=target).asm["ptx"]

    sizes = {"PAIRS": 256, "ROWS": 4}
    alone = {"ABSORB": False, "RECTIFY": False, "SKIP": False, "REMEMBER": False}
    code = [ptx(module._add_normals, CHANNELS=channels, **alone, **sizes) for channels in (1, 3, 16)]
    ones = dict.fromkeys(("rows", "size", "pixels", "blocks"), 1)  # as Triton takes ones
    code += [ptx(module._add_normals, CHANNELS=1, **ones, **alone, **sizes)]
    for skip, remember in itertools.product((True, False), repeat=2):
        relu = {"ABSORB": True, "RECTIFY": True, "SKIP": skip, "REMEMBER": remember}
        code += [ptx(module._add_normals, CHANNELS=16, **relu, **sizes)]
    assert all("cvt.rn.bf16" in one for one in code) == (dtype == "bf16")  # rounded, not cut
    code = [ptx(module._rectify, SKIP=a, REMEMBER=b, NUMBERS=1024) for a in (True, False) for b in (True, False)]
    code += [ptx(module._gate, SKIP=skip, NUMBERS=1024) for skip in (True, False)]
    assert all("st.global" in one for one in code)
