"""Frozen blocks, one Euler step each: fewer forward passes over memory, and a gradient written by hand.

Where no weight needs a gradient, the derivative of a block only needs to know which numbers its ReLUs let through.
Autograd would keep the activations, and would allocate a tensor for every step of the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .. import kernels
from ..modules import untouched
from ..sde.block import BlockSDE
from ..sde.integrate import diffuse
from .recast import ItoResNet


class FrozenResNet(ItoResNet):
    """An `ItoResNet` whose weights need no gradient: the same logits, and first derivatives in the images."""

    @property
    def manual_gradient(self) -> bool:
        """Whether `_FrozenBlocks` computes the blocks and their gradient: it knows only some blocks and one solver."""
        rest = list(self.sdes)[1:]
        if not (self.one_euler_step and rest and all(_is_torchvisions(s.block) for s in rest)):
            return False
        weight = _convolutions(rest[0].block)[0].weight.detach()
        return kernels.library is not None if weight.device.type == "cpu" else kernels.takes(weight)

    def solve_blocks(self, state: Tensor, keys: Tensor, copies: int) -> Tensor:
        """See `ItoResNet.solve_blocks`."""
        if self.manual_gradient and kernels.takes(state) and not torch.is_autocast_enabled(state.device.type):
            return _FrozenBlocks.apply(state, keys, copies, list(self.sdes))
        return super().solve_blocks(state, keys, copies)


def _is_torchvisions(block: nn.Module) -> bool:
    """Whether a block is torchvision's with its BatchNorms folded, and computes what its class says."""
    # Exactly these classes: a subclass may do something else.
    if type(block) not in (BasicBlock, Bottleneck) or not all(untouched(m) for m in block.modules()):
        return False
    convs = _convolutions(block)
    norms = (getattr(block, f"bn{i + 1}") for i in range(len(convs)))
    return (
        all(type(norm) is nn.Identity for norm in norms)
        and type(block.relu) is nn.ReLU
        and all(type(c) is nn.Conv2d and c.padding_mode == "zeros" and type(c.padding) is tuple for c in convs)
    )


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of a ``BasicBlock`` (two) or a ``Bottleneck`` (three) in order; a ReLU follows each."""
    if isinstance(block, Bottleneck):
        return [block.conv1, block.conv2, block.conv3]
    assert isinstance(block, BasicBlock)
    return [block.conv1, block.conv2]


class _BlockRecord(NamedTuple):
    """What the backward pass through a block needs."""

    convs: list[nn.Conv2d]
    shapes: list[torch.Size]  # of each convolution's input
    passed: list[Tensor]  # bool: which numbers the ReLU after each convolution let through
    shortcut: tuple[Tensor, Tensor] | None  # its input and its output, on an autograd graph of their own


class _FrozenBlocks(torch.autograd.Function):
    """States ``(N, ...)`` before the first noise -> ``(copies N, ...)`` after the last, along paths ``(copies N,)``."""

    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, copies: int, sdes: Sequence[BlockSDE]) -> Tensor:
        recorded = ctx.needs_input_grad[0]
        ctx.copies, ctx.records = copies, []
        x = diffuse(sdes[0], torch.cat([x] * copies) if copies > 1 else x, keys, in_place=copies > 1)
        for sde in sdes[1:]:
            block: BasicBlock | Bottleneck = sde.block
            convs, skip, shortcut = _convolutions(block), x, None
            if block.downsample is not None:
                with torch.set_grad_enabled(recorded):
                    entry = x.detach().requires_grad_(recorded)
                    shortcut = (entry, block.downsample(entry))
                skip = shortcut[1].detach()
            shapes, passed = [], []
            for i, conv in enumerate(convs, 1):
                shapes.append(x.shape)
                x = conv(x)
                last = i == len(convs)
                relu = kernels.rectifier(x, skip if last else None, remember=recorded)
                x = diffuse(sde, x, keys, in_place=True, relu=relu) if last else kernels.rectify_(x, relu)
                if relu.passed is not None:
                    passed.append(relu.passed)
            if recorded:
                ctx.records.append(_BlockRecord(convs, shapes, passed, shortcut))
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        gradient, skip = gradient.clone(), None  # the operations below are in place
        for i, (convs, shapes, passed, shortcut) in reversed(list(enumerate(ctx.records))):
            # `gradient` through the convolutions and `skip` past them: their sum is the gradient of the block's output.
            gradient = skip = kernels.gate_(gradient, passed[-1], skip)
            for conv, shape, gate in zip(convs[:0:-1], shapes[:0:-1], passed[-2::-1], strict=True):
                gradient = kernels.gate_(_gradient_before(conv, shape, gradient), gate)
            if shortcut is not None:
                (skip,) = torch.autograd.grad(shortcut[1], shortcut[0], skip, retain_graph=True)
            if i == 0:  # the rest is linear, and the same for all copies of a state: they can be added up here
                skip, gradient = (reduce(Tensor.add_, part.chunk(ctx.copies)) for part in (skip, gradient))
            gradient = _gradient_before(convs[0], gradient.shape[:1] + shapes[0][1:], gradient)
        return gradient if skip is None else gradient.add_(skip), None, None, None


def _gradient_before(conv: nn.Conv2d, shape: Sequence[int], gradient: Tensor) -> Tensor:
    """The gradient of a convolution's input ``shape`` from that of its output, in the same memory format.

    It is ``torch.nn.grad.conv2d_input``, which would give the contiguous format.
    """
    last = gradient.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    # Its content is not read, but in another memory format it would be copied.
    like = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=order)
    weight, of_input_only = conv.weight, [True, False, False]
    return torch.ops.aten.convolution_backward(
        gradient,
        like,
        weight,
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        of_input_only,
    )[0]
