"""Gradients that compute a block's steps again instead of storing their activations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..modules import well_known
from ..noise.brownian import BrownianPath
from ..validation import ItoError
from .block import BlockSDE
from .solvers import Solver


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """BatchNorm normalises as before but does not update: the recomputation is not a second pass over the data."""
    norms: list[Any] = [m for m in block.modules() if getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether a module of torch's or torchvision's draws random numbers, in its present mode."""
    kinds = (nn.modules.dropout._DropoutNd, nn.RReLU, StochasticDepth)
    attention = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    return module.training and (attention or isinstance(module, kinds))


def _versions(block: nn.Module) -> list[object]:
    """What the block's output depends on apart from its input: weights and buffers by version, and modes.

    The running statistics of a BatchNorm in train mode are left out: it writes them and does not read them.
    """
    versions: list[object] = []
    for module in block.modules():
        versions.append(module.training)
        own: list[Tensor] = list(module.parameters(recurse=False))
        if not (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training):
            own += module.buffers(recurse=False)
        versions += [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in own]
    return versions


def _random_states(block: nn.Module, device: torch.device) -> list[object]:
    """The states of the global generators, from which a block of unknown code may draw."""
    if well_known(block):
        return []  # `draws_random_numbers` is enough; and other threads may draw meanwhile
    states: list[object] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    numpys: Any = np.random.get_state(legacy=True)  # noqa: NPY002  (a block may use the old interface)
    name, key, *rest = numpys
    states += [name, key.tobytes(), *rest]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return states


class StepRange(Protocol):
    """What `RecomputedBlock` needs of a block's solver: it takes states through any range of the block's steps."""

    sde: BlockSDE
    solver: Solver
    steps: int
    path: BrownianPath | None

    def __call__(self, x: Tensor, first: int, last: int, only_slope: bool = False) -> Tensor:
        """States after step ``last`` from those before step ``first``."""
        ...


class RecomputedBlock(torch.autograd.Function):
    """A block that keeps its first state only, and computes its steps again in the backward pass.

    Written by hand because torch's checkpoints, nested to this depth, kept five times the memory (measured).
    """

    @staticmethod
    def forward(ctx, run: StepRange, x: Tensor, *parameters: Tensor) -> Tensor:
        """States after all steps from ``x`` before them; the parameters are there for their gradients."""
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(x)
        kind = x.device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        before = _versions(run.sde.block), _random_states(run.sde.block, x.device)
        y = run(x, 0, run.steps)
        ctx.versions = _versions(run.sde.block)
        if (ctx.versions, _random_states(run.sde.block, x.device)) != before:
            raise ItoError(
                f"Block {run.sde.index} draws random numbers or changes its own weights at every call (dropout, "
                "stochastic depth, spectral norm), which checkpointing cannot repeat; use checkpoint=False."
            )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        """Gradients of the first state and of the parameters."""
        run = ctx.run
        if _versions(run.sde.block) != ctx.versions:
            raise ItoError(
                f"The weights or the mode of block {run.sde.index} changed between the forward and the backward pass, "
                "so that checkpointing would compute another gradient; go backward first, or use checkpoint=False."
            )
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        indivisible = run.solver.initial_evaluations or run.solver.adaptive  # cannot be cut between steps

        def pull_back(x: Tensor, first: int, last: int, gradient: Tensor) -> Tensor:
            """The gradient before step ``first`` from that after step ``last``; ``x`` is the state before ``first``.

            The range is cut into four pieces (and each of them again): the states before each piece are computed
            first, then the pieces are differentiated from the last to the first.
            """
            if last - first == 1 or indivisible:
                with torch.enable_grad(), ctx.autocast:
                    x = x.detach().requires_grad_()
                    inputs = (x, *ctx.parameters)
                    y = run(x, first, last, only_slope=True)
                    of_x, *of_parameters = torch.autograd.grad(y, inputs, gradient, allow_unused=True)
                pairs = zip(sums, of_parameters, strict=True)
                sums[:] = [a if b is None else b if a is None else a + b for a, b in pairs]
                return torch.zeros_like(x) if of_x is None else of_x
            size = max(1, (last - first) // 4)
            starts, states = range(first, last, size), [x]
            with torch.no_grad(), ctx.autocast:
                for start in starts[:-1]:
                    states.append(run(states[-1], start, start + size))
            for start in reversed(starts):
                gradient = pull_back(states.pop(), start, start + size, gradient)
            return gradient

        with _frozen_statistics(run.sde.block):
            gradient = pull_back(ctx.saved_tensors[0], 0, run.steps, gradient)
        run.path.forget()
        return None, gradient, *sums
