"""Quick inference of a member: the same paths and votes; logits within 1e-4 of those of ``model(x)``, the reference."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..modules import copied, mixes_images, untouched, well_known
from ..noise.keys import make_keys
from ..parallel import in_pieces
from ..validation import ItoError
from .frozen import FrozenResNet
from .recast import ItoResNet

Result = TypeVar("Result")

# Up to this many channels channels_last is the quicker layout on a CPU: ResNet-20 gains a fifth, ResNet-18 loses a
# tenth.
_NARROW_CHANNELS = 128
# Elements of the state that go through a network at a time. On a CPU 4 MiB: larger pieces leave its caches, and
# smaller ones are mostly overhead. On a GPU enough to fill it.
_PIECE_ELEMENTS = {"cpu": 1 << 20}
# Largest difference from the reference, relative to the spread between classes. TF32, which torch uses in a GPU's
# convolutions unless told otherwise, keeps three digits: two orders of the same sums differ by that. How a GPU rounds
# is the user's setting, which we read and do not change.
_TOLERANCE, _TOLERANCE_TF32 = 1e-4, 1e-2


def quicken(model: ItoResNet, x: Tensor | None = None) -> ItoResNet:
    """A frozen copy for inference and for first derivatives in the images, in eval mode.

    BatchNorm is folded into the convolution before it (in torchvision's blocks, and in any ``nn.Sequential``, where
    it is certain which that is), parameters want no gradient, and narrow networks on a CPU are channels_last.

    The copy is compared with the reference on two images. Where they differ by more than 1e-4 of the spread between
    the classes (1e-2 where a GPU computes in TF32), nothing is folded: the copy runs the reference's own code. The same
    holds for a subclass of `ItoResNet` and for a model that has hooks itself. Hooks are shared, not copied.

    Args:
        model: the reference.
        x: images ``(N, C, H, W)``; on the first two, both are compared. Default: random images of ``image_shape``.

    Raises:
        ItoError: a BatchNorm has no running statistics, so that an image's logits depend on its batch.
    """
    reference = _frozen_copy(model)
    if type(model) not in (ItoResNet, FrozenResNet) or not model.splits_at_noise:
        return reference
    if x is None:
        x = torch.rand(2, *model.image_shape, generator=torch.Generator().manual_seed(0), device="cpu")
        x = x.to(next((p for p in reference.parameters() if p.is_floating_point()), x))
    x = x[:1].repeat(2, 1, 1, 1) if len(x) == 1 else x[:2]
    keys = make_keys(0, "selection", index=torch.arange(len(x), device=x.device))
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone() if x.is_inference() else x
        expected = reference(x, keys)
        quick = folded(reference)  # it takes over the modules of `reference`
        return quick if close_logits(quick(x, keys), expected) else _frozen_copy(model)


def _frozen_copy(model: ItoResNet) -> ItoResNet:
    """A copy that computes what the model does in eval mode; its parameters need no gradient."""
    copy = copied(model).eval().requires_grad_(False)
    if mixes_images(copy):
        raise ItoError(
            "A BatchNorm keeps no running statistics (track_running_stats=False), so that an image's votes would "
            "depend on the other images in its batch; give it running statistics."
        )
    return copy


def folded(model: ItoResNet) -> FrozenResNet:
    """The quick form of a model. It takes over and changes the modules of ``model``, which must not be used again."""
    settings = (model.solver, model.steps, model.checkpoint, model.image_shape, model.input_sigma)
    quick = FrozenResNet(model.stem, model.sdes, model.head, *settings)
    for sde in quick.sdes:
        sde.overwrite_output = well_known(sde.block)
    for module in list(quick.modules()):
        # Exactly these classes, without hooks: a subclass, or a module with a hook, may do something else.
        if not untouched(module):
            continue
        if type(module) in (BasicBlock, Bottleneck):
            pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(module, f"conv{i}")]
        elif type(module) is nn.Sequential:
            pairs = list(itertools.pairwise(module._modules))
        else:
            continue
        for conv_name, norm_name in pairs:
            conv, norm = module._modules[conv_name], module._modules[norm_name]
            if (
                type(conv) is nn.Conv2d
                and type(norm) is nn.BatchNorm2d
                and untouched(conv)
                and untouched(norm)
                and norm.running_mean is not None
            ):
                module._modules[conv_name] = fuse_conv_bn_eval(conv, norm)
                module._modules[norm_name] = nn.Identity()
    quick.eval().requires_grad_(False)  # the new modules, too
    device = next((p.device for p in quick.parameters()), torch.device("cpu"))
    convs = [m for m in quick.modules() if isinstance(m, nn.Conv2d)]
    if device.type == "cpu" and convs and max(conv.out_channels for conv in convs) <= _NARROW_CHANNELS:
        quick.to(memory_format=torch.channels_last)
    return quick


class _Cast(nn.Module):
    """Numbers in another precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def in_bfloat16(quick: ItoResNet) -> ItoResNet:
    """A copy of a quick copy whose blocks compute in bfloat16: for gradients, not for decisions.

    Images, stem, head and normals stay in float32: bfloat16 keeps eight bits, and a step of 1 / 255 on an image would
    be lost in it.

    Raises:
        ItoError: the blocks are not single Euler steps with additive noise, run code of their own, or are not float32.
    """
    floats = all(p.dtype == torch.float32 for p in quick.parameters())
    if not (isinstance(quick, FrozenResNet) and well_known(quick) and quick.one_euler_step and floats):
        raise ItoError(
            "Gradients in bfloat16 are there for float32 networks of known modules without hooks, with one Euler step "
            "a block and additive noise; take precision='float32'."
        )
    copy = copied(quick)
    copy.stem = nn.Sequential(copy.stem, _Cast(torch.bfloat16))
    copy.head = nn.Sequential(_Cast(torch.float32), copy.head)
    copy.sdes.to(torch.bfloat16)  # type: ignore[attr-defined]
    return copy.eval()


def close_logits(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits ``(N, classes)`` differ from the ``expected`` ones by no more than the tolerance."""
    finite = expected.isfinite().all(-1)
    if not torch.equal(finite, logits.isfinite().all(-1)):
        return False
    tf32 = _computes_in_tf32(logits.device)
    logits, expected = logits[finite].cpu().double(), expected[finite].cpu().double()  # MPS has no float64
    if not len(expected):
        return True
    spread = (expected.amax(-1) - expected.amin(-1)).amax()
    return bool((logits - expected).abs().amax() <= (_TOLERANCE_TF32 if tf32 else _TOLERANCE) * spread)


def _computes_in_tf32(device: torch.device) -> bool:
    """Whether convolutions or matrix products of float32 may be made in TF32, which keeps 10 bits after the point."""
    if device.type != "cuda":
        return False
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    # Of torch 2.9 and later. Where one of these was set, the older settings cannot be read.
    precisions = [getattr(own, "fp32_precision", None) for own in (getattr(convolutions, "conv", None), products)]
    if None in precisions:
        return convolutions.allow_tf32 or products.allow_tf32
    return "tf32" in precisions


def piece_of(model: ItoResNet, x: Tensor) -> int:
    """How many states go through a model at a time, for images of the size of ``x``, ``(N, C, H, W)``."""
    largest: float = max(math.prod(sde.shape) for sde in model.sdes)
    # States grow with the images, as the outputs of convolutions do.
    largest *= max(1.0, math.prod(x.shape[1:]) / math.prod(model.image_shape))
    return max(2, int(_PIECE_ELEMENTS.get(x.device.type, 1 << 27) / max(1, largest)))


def infer(model: ItoResNet, x: Tensor, rows: Tensor, keys: Tensor, size: int | None = None) -> Tensor:
    """Inferences without a gradient: logits ``(K, classes)`` of images ``x[rows]`` along paths ``keys``, both ``(K,)``.

    Where an image has several inferences, their common part runs once (unless a subclass or a hook forbids it). A
    single state is doubled, because a batch of one takes other convolution kernels, with other last bits.
    """
    size, side_by_side = size or piece_of(model, x), partial(well_known, model)
    state = None

    def common_part(part: slice) -> Tensor:
        images = x[part]
        return model.before_noise(images) if len(images) > 1 else model.before_noise(torch.cat([images, images]))[:1]

    if model.splits_at_noise and len(rows) > len(x):
        state = torch.cat(in_pieces(common_part, len(x), size, x.device, side_by_side))

    def inferences(part: slice) -> Tensor:
        images, paths = rows[part], keys[part]
        if single := len(images) == 1:
            images, paths = images.repeat(2), paths.repeat(2)
        if state is not None:
            logits = model.along_paths(state[images], paths)
        else:
            logits = model(x[images], paths)
        return logits[:1] if single else logits

    return torch.cat(in_pieces(inferences, len(rows), size, x.device, side_by_side))
