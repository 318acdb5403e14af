"""The quick way through a member: the same paths, the same votes, logits within 1e-4 of the reference ``model(x)``."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck

from .frozen import FrozenResNet
from .recast import ItoResNet
from .sde import BlockSDE
from .threads import spread, workers

Result = TypeVar("Result")

# Channels up to which channels_last is the quicker layout on a CPU: ResNet-20 gains a fifth, ResNet-18 loses a tenth.
_NARROW = 128
# Elements of the state that go through a network at a time. On a CPU a few MiB, as larger pieces leave its caches
# and smaller ones are all overhead; on a GPU enough to fill it.
_PIECE = {"cpu": 1 << 21}


def quicken(model: ItoResNet) -> ItoResNet:
    """A frozen copy for inference and for first derivatives in the images, in eval mode.

    BatchNorm is folded into the convolution before it (in torchvision's blocks, and in any ``nn.Sequential``, where
    it is certain which that is), parameters want no gradient, and narrow networks on a CPU are channels_last.
    """
    own = copy.deepcopy(model)
    sdes: list[BlockSDE] = list(own.sdes)  # type: ignore[arg-type]
    quick = FrozenResNet(own.stem, sdes, own.head, own.solver, own.steps, own.checkpoint).eval().requires_grad_(False)
    for sde in quick.sdes:
        sde.in_place = True  # type: ignore[assignment]
    for module in list(quick.modules()):
        if isinstance(module, (BasicBlock, Bottleneck)):
            pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(module, f"conv{i}")]
        elif type(module) is nn.Sequential:
            names = list(module._modules)
            pairs = list(itertools.pairwise(names))
        else:
            continue
        for conv_name, norm_name in pairs:
            conv, norm = module._modules[conv_name], module._modules[norm_name]
            # Exactly these classes: what derives from them may do something else.
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
                module._modules[conv_name] = fuse_conv_bn_eval(conv, norm)
                module._modules[norm_name] = nn.Identity()
    device = next((p.device for p in quick.parameters()), torch.device("cpu"))
    convs = [m for m in quick.modules() if isinstance(m, nn.Conv2d)]
    if device.type == "cpu" and convs and max(conv.out_channels for conv in convs) <= _NARROW:
        quick.to(memory_format=torch.channels_last)
    return quick


def piece_of(model: ItoResNet, device: torch.device, gradient: bool = False) -> int:
    """How many states go through a model at a time."""
    largest = max(math.prod(sde.shape) for sde in model.sdes)  # type: ignore[union-attr, arg-type]
    if gradient and not (isinstance(model, FrozenResNet) and model.by_hand):
        largest *= 2  # autograd keeps twice as many tensors: half as many states fit the caches
    return max(2, _PIECE.get(device.type, 1 << 27) // max(1, largest))


def in_pieces(
    work: Callable[[slice], Result], total: int, size: int, device: torch.device, side_by_side: bool = True
) -> list[Result]:
    """``work`` on slices of ``range(total)``, each at most ``size`` long and all about equally long.

    On a CPU they run ``side_by_side``, elsewhere one after another. Where memory runs out, all begins again with
    pieces half as long.

    Raises:
        torch.OutOfMemoryError: a piece of one does not fit.
    """
    while True:
        at_once = workers() if side_by_side and device.type == "cpu" else 1
        least = math.ceil(total / size)
        even = math.ceil(least / at_once) * at_once  # so that nobody waits for another's last piece
        count = min(total, max(least, min(even, total // 2), 1))
        pieces = [slice(a, b) for a, b in itertools.pairwise(total * i // count for i in range(count + 1))]
        try:
            return spread(work, pieces) if at_once > 1 else [work(piece) for piece in pieces]
        except torch.OutOfMemoryError:
            if size <= 1:
                raise
            size = max(1, min(size, total) // 2)
        torch.cuda.empty_cache()  # outside of the except clause, whose traceback holds on to the tensors


def infer(model: ItoResNet, x: Tensor, rows: Tensor, keys: Tensor, size: int | None = None) -> Tensor:
    """Inferences without a gradient: logits ``(K, classes)`` of images ``x[rows]`` along paths ``keys``, both ``(K,)``.

    What the inferences of an image have in common runs once, where there are several. A single state is doubled, as a
    batch of one takes other convolution kernels, with other last bits.
    """
    size = size or piece_of(model, x.device)
    state = None

    def begin(part: slice) -> Tensor:
        images = x[part]
        return model.start(images) if len(images) > 1 else model.start(torch.cat([images, images]))[:1]

    if len(rows) > len(x):
        state = torch.cat(in_pieces(begin, len(x), size, x.device))

    def piece(part: slice) -> Tensor:
        one, these = rows[part], keys[part]
        if single := len(one) == 1:
            one, these = one.repeat(2), these.repeat(2)
        logits = model.propagate(model.start(x[one]) if state is None else state[one], these)
        return logits[:1] if single else logits

    return torch.cat(in_pieces(piece, len(rows), size, x.device))
