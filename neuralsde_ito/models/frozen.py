"""Frozen basic blocks, one Euler step each: fewer forward passes over memory, and a gradient written by hand.

Where no weight needs a gradient, the derivative of a block only needs to know which numbers its two ReLUs let through.
Autograd would keep the activations, and would allocate a tensor for every step of the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

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
        first: BasicBlock = rest[0].block
        weight = first.conv1.weight.detach()
        return kernels.library is not None if weight.device.type == "cpu" else kernels.takes(weight)

    def solve_blocks(self, state: Tensor, keys: Tensor, copies: int) -> Tensor:
        """See `ItoResNet.solve_blocks`."""
        if self.manual_gradient and kernels.takes(state) and not torch.is_autocast_enabled(state.device.type):
            return _FrozenBlocks.apply(state, keys, copies, list(self.sdes))
        return super().solve_blocks(state, keys, copies)


def _is_torchvisions(block: nn.Module) -> bool:
    """Whether a block is torchvision's ``BasicBlock`` with its BatchNorms folded, and computes what its class says."""
    if type(block) is not BasicBlock or not all(untouched(m) for m in block.modules()):
        return False
    convs = (block.conv1, block.conv2)
    # Exactly these classes: a subclass may do something else.
    return (
        type(block.bn1) is type(block.bn2) is nn.Identity
        and type(block.relu) is nn.ReLU
        and all(type(c) is nn.Conv2d and c.padding_mode == "zeros" and type(c.padding) is tuple for c in convs)
    )


class _BlockRecord(NamedTuple):
    """What the backward pass through a block needs."""

    block: BasicBlock
    shape: torch.Size  # of the block's input
    inner: Tensor  # bool: which numbers the first ReLU let through
    outer: Tensor  # bool: which numbers the second one did
    shortcut: tuple[Tensor, Tensor] | None  # its input and its output, on an autograd graph of their own


class _FrozenBlocks(torch.autograd.Function):
    """States ``(N, ...)`` before the first noise -> ``(copies N, ...)`` after the last, along paths ``(copies N,)``."""

    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, copies: int, sdes: Sequence[BlockSDE]) -> Tensor:
        recorded = ctx.needs_input_grad[0]
        ctx.copies, ctx.records = copies, []
        x = diffuse(sdes[0], torch.cat([x] * copies) if copies > 1 else x, keys, in_place=copies > 1)
        for sde in sdes[1:]:
            block: BasicBlock = sde.block
            skip, shortcut = x, None
            if block.downsample is not None:
                with torch.set_grad_enabled(recorded):
                    entry = x.detach().requires_grad_(recorded)
                    shortcut = (entry, block.downsample(entry))
                skip = shortcut[1].detach()
            hidden = block.conv1(x)
            inner = kernels.rectify_(hidden, remember=recorded)
            y = block.conv2(hidden)
            outer = kernels.rectify_(y, skip, remember=recorded)
            if inner is not None and outer is not None:
                ctx.records.append(_BlockRecord(block, x.shape, inner, outer, shortcut))
            x = diffuse(sde, y, keys, in_place=True)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        gradient, skip = gradient.clone(), None  # the operations below are in place
        for i, (block, shape, inner, outer, shortcut) in reversed(list(enumerate(ctx.records))):
            # `gradient` through the convolutions and `skip` past them: their sum is the gradient of the block's output.
            skip = kernels.gate_(gradient, outer, skip)
            hidden = kernels.gate_(_gradient_before(block.conv2, inner.shape, skip), inner)
            if shortcut is not None:
                (skip,) = torch.autograd.grad(shortcut[1], shortcut[0], skip, retain_graph=True)
            if i == 0:  # the rest is linear, and the same for all copies of a state: they can be added up here
                skip, hidden = (reduce(Tensor.add_, part.chunk(ctx.copies)) for part in (skip, hidden))
            gradient = _gradient_before(block.conv1, hidden.shape[:1] + shape[1:], hidden)
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
