"""Frozen basic blocks, one Euler step each: fewer passes forward, and the gradient of the state by hand.

Where no weight wants a gradient, a block's derivative needs to know which numbers its two ReLUs let through, no more.
Autograd keeps the activations, and makes a tensor of every step back.
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
    """An `ItoResNet` whose weights want no gradient: the same logits, and first derivatives in the images."""

    @property
    def by_hand(self) -> bool:
        """Whether its blocks and its solver are what this module is for."""
        rest: list[BlockSDE] = list(self.sdes)[1:]
        return (
            kernels.library is not None and self.drifts_once and len(rest) > 0 and all(_is_plain(s.block) for s in rest)
        )

    def solve(self, state: Tensor, keys: Tensor, copies: int) -> Tensor:
        """See `ItoResNet.solve`."""
        if self.by_hand and kernels.takes(state) and not torch.is_autocast_enabled("cpu"):
            return _Chain.apply(state, keys, copies, list(self.sdes))
        return super().solve(state, keys, copies)


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is torchvision's, with nothing between its convolutions and its ReLUs."""
    if type(block) is not BasicBlock or not all(untouched(m) for m in block.modules()):
        return False
    convs = (block.conv1, block.conv2)
    # Exactly these classes: what derives from them may do something else.
    return (
        type(block.bn1) is type(block.bn2) is nn.Identity
        and type(block.relu) is nn.ReLU
        and all(type(c) is nn.Conv2d and c.padding_mode == "zeros" and type(c.padding) is tuple for c in convs)
    )


class _Step(NamedTuple):
    """What the way back through a block needs to know."""

    block: BasicBlock
    before: torch.Size
    inner: Tensor  # what the first ReLU let through
    outer: Tensor  # and the second
    shortcut: tuple[Tensor, Tensor] | None  # its input and its output, on a graph of their own


class _Chain(torch.autograd.Function):
    """States ``(N, ...)`` before the first noise -> ``(copies N, ...)`` after the last, along paths ``(copies N,)``."""

    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, copies: int, sdes: Sequence[BlockSDE]) -> Tensor:
        recorded = ctx.needs_input_grad[0]
        ctx.copies, ctx.steps = copies, []
        x = diffuse(sdes[0], torch.cat([x] * copies) if copies > 1 else x, keys, in_place=copies > 1)
        for sde in sdes[1:]:
            block: BasicBlock = sde.block
            skip, shortcut = x, None
            if block.downsample is not None:
                with torch.set_grad_enabled(recorded):
                    entry = x.detach().requires_grad_(recorded)
                    shortcut = (entry, block.downsample(entry))
                skip = shortcut[1].detach()
            between = block.conv1(x)
            inner = kernels.rectify_(between, remember=recorded)
            y = block.conv2(between)
            outer = kernels.rectify_(y, skip, remember=recorded)
            if inner is not None and outer is not None:
                ctx.steps.append(_Step(block, x.shape, inner, outer, shortcut))
            x = diffuse(sde, y, keys, in_place=True)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        gradient, skip = gradient.clone(), None  # what follows is in place
        for i, (block, before, inner, outer, shortcut) in reversed(list(enumerate(ctx.steps))):
            skip = kernels.gate_(gradient, outer, skip)
            through = kernels.gate_(_pull(block.conv2, inner.shape, skip), inner)
            if shortcut is not None:
                (skip,) = torch.autograd.grad(shortcut[1], shortcut[0], skip, retain_graph=True)
            if i == 0:  # what is before is linear, and the same for all copies of a state
                skip, through = (reduce(Tensor.add_, part.chunk(ctx.copies)) for part in (skip, through))
            gradient = _pull(block.conv1, through.shape[:1] + before[1:], through)
        return gradient if skip is None else gradient.add_(skip), None, None, None


def _pull(conv: nn.Conv2d, before: Sequence[int], gradient: Tensor) -> Tensor:
    """The gradient before a convolution; torch's ``conv2d_input`` in the order in which the gradient is held."""
    last = gradient.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    # Nothing is read from it, but in another order it would be copied.
    like = torch.empty(before, dtype=gradient.dtype, device=gradient.device, memory_format=order)
    weight, wanted = conv.weight, [True, False, False]
    return torch.ops.aten.convolution_backward(
        gradient, like, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, wanted
    )[0]
