"""A residual network as a chain of Itô processes (paper, section 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..modules import ModuleListOf, copied, evaluating, untouched
from ..noise.brownian import BrownianPath
from ..noise.keys import fresh_keys
from ..sde.block import BlockSDE
from ..sde.integrate import diffuse, integrate
from ..sde.schedules import Schedule
from ..sde.solvers import check_solver
from ..validation import ItoError, check_input_sigma

_BLOCKS = (BasicBlock, Bottleneck)
_IMAGE = -1  # the block number in the address of an image's own noise; blocks count from 0


class Chain(nn.Module):
    """Any residual network as ``head(blocks[n-1](... blocks[0](stem(x))))``.

    Args:
        stem: images -> first state; normalisation belongs here.
        blocks: the residual blocks, each with its shortcut and what follows the addition.
        head: last state -> logits.
    """

    stem: nn.Module
    blocks: ModuleListOf[nn.Module]
    head: nn.Module

    def __init__(self, stem: nn.Module, blocks: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = cast("ModuleListOf[nn.Module]", nn.ModuleList(blocks))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` in [0, 1] -> logits ``(N, classes)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def as_chain(net: nn.Module) -> Chain:
    """Cut a network into stem, blocks and head; its modules are shared, not copied.

    It takes a `Chain`, an `ItoResNet` (as its noise-free network), and any network that calls its
    modules in the order of their registration, with torchvision's ``BasicBlock`` or ``Bottleneck`` as blocks.

    Raises:
        ItoError: no such blocks, or they do not follow one another.
    """
    if isinstance(net, Chain):
        return net
    if isinstance(net, ItoResNet):
        return net.base
    parts = _parts_in_order(net)
    positions = [i for i, part in enumerate(parts) if isinstance(part, _BLOCKS)]
    if not positions or positions != list(range(positions[0], positions[-1] + 1)):
        raise ItoError(
            f"{type(net).__name__} has no single unbroken run of torchvision's BasicBlock or Bottleneck; "
            "spell it out: ito.recast(ito.Chain(stem, blocks, head))."
        )
    head: list[nn.Module] = []
    for part in parts[positions[-1] + 1 :]:
        if isinstance(part, nn.Linear) and not any(isinstance(m, (nn.Flatten, nn.Linear)) for m in head):
            head.append(nn.Flatten(1))  # torchvision flattens in forward, without a module
        head.append(part)
    blocks = parts[positions[0] : positions[-1] + 1]
    return Chain(nn.Sequential(*parts[: positions[0]]), blocks, nn.Sequential(*head))


def _parts_in_order(module: nn.Module) -> list[nn.Module]:
    """The parts of a network in order; a part that contains residual blocks is replaced by its own parts."""
    if isinstance(module, _BLOCKS) or not any(isinstance(m, _BLOCKS) for m in module.modules()):
        return list(module) if type(module) is nn.Sequential else [module]
    return [part for child in module.children() for part in _parts_in_order(child)]


class ItoResNet(nn.Module):
    """A residual network whose blocks are SDEs; made by `recast`.

    The noise is part of the model, not a regulariser: it is there in train mode and in eval mode.

    Attributes:
        stem, head: as in the network.
        sdes: the blocks, each a torchsde module.
        solver, steps, checkpoint: how blocks are solved; may be set at any time.
        image_shape: ``(C, H, W)`` of the test image that `recast` ran through the network.
        input_sigma: standard deviation of the noise on the image, in pixel units (see `diffused`); may be set, too.
    """

    stem: nn.Module
    sdes: ModuleListOf[BlockSDE]
    head: nn.Module

    def __init__(
        self,
        stem: nn.Module,
        sdes: Iterable[BlockSDE],
        head: nn.Module,
        solver: str,
        steps: int,
        checkpoint: bool,
        image_shape: tuple[int, ...] = (3, 32, 32),
        input_sigma: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.sdes = cast("ModuleListOf[BlockSDE]", nn.ModuleList(sdes))
        self.head = head
        self.solver, self.steps, self.checkpoint = solver, steps, checkpoint
        self.image_shape = tuple(image_shape)
        self.input_sigma = check_input_sigma(input_sigma)

    @property
    def schedule(self) -> Schedule:
        """The diffusion that all blocks share."""
        return self.sdes[0].schedule

    @property
    def base(self) -> Chain:
        """The noise-free network, of the same modules: the ResNet that this is without noise, with one step a block."""
        return Chain(self.stem, [sde.block for sde in self.sdes], self.head)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """One inference of every image.

        Args:
            x: images ``(N, C, H, W)`` in [0, 1].
            keys: int64 ``(N,)``, the names of the paths (see `make_keys`); default fresh ones.

        Returns:
            Logits ``(N, classes)``.

        Raises:
            ItoError: not one key for each image.
        """
        return self.along_paths(self.before_noise(x), fresh_keys(len(x), x.device) if keys is None else keys)

    @property
    def splits_at_noise(self) -> bool:
        """Whether ``model(x, keys)`` is `before_noise` and then `along_paths`.

        False if a subclass overrides one of the three, or if the model has hooks.
        """
        own = (ItoResNet.forward, ItoResNet.before_noise, ItoResNet.along_paths)
        kind = type(self)
        return (kind.forward, kind.before_noise, kind.along_paths) == own and untouched(self)

    @property
    def one_euler_step(self) -> bool:
        """Whether every block is one Euler step with additive noise: the block's output, and then the noise."""
        return (self.solver, self.steps, self.checkpoint) == ("euler", 1, False) and not self.schedule.multiplicative

    def before_noise(self, x: Tensor) -> Tensor:
        """The part that all inferences of an image share: images ``(N, C, H, W)`` -> states ``(N, ...)``.

        That is the stem and, if `one_euler_step`, also the first block. With `input_sigma` the image itself is noisy:
        nothing is shared, and the images come back as they are.
        """
        return x if self.input_sigma else self._up_to_noise(x)

    def _up_to_noise(self, x: Tensor) -> Tensor:
        state = self.stem(x)
        return self.sdes[0].block(state) if self.one_euler_step else state

    def diffused(self, x: Tensor, keys: Tensor) -> Tensor:
        """Images along paths: ``dx = input_sigma dB`` over one unit of time before the first block, on [-1, 0].

        That is ``x + input_sigma W`` with standard normals ``W``, the noise of randomised smoothing (Cohen et al. 2019,
        https://arxiv.org/abs/1902.02918). The result is not clipped to [0, 1]: it would be no normal noise any more.
        The noise has an address of its own, so that it is independent of that of the blocks.

        Args:
            x: images ``(N, C, H, W)``.
            keys: int64 ``(N,)``.
        """
        if not self.input_sigma:
            return x
        path = BrownianPath(keys, math.prod(x.shape[1:]), _IMAGE, -1.0, 0.0, dtype=x.dtype)
        return path.add_to(x, check_input_sigma(self.input_sigma))

    def along_paths(self, state: Tensor, keys: Tensor) -> Tensor:
        """From the states of `before_noise` to logits.

        Args:
            state: ``(N, ...)``; images, if there is `input_sigma`.
            keys: int64 ``(N,)``, one path for each state; or ``(P, N)``, P paths for each.

        Returns:
            Logits ``(N, classes)`` or ``(P, N, classes)``.
        """
        if keys.dim() not in (1, 2) or keys.shape[-1:] != state.shape[:1]:
            raise ItoError(f"One key an image: keys of shape {tuple(keys.shape)} for {state.shape[0]} images.")
        check_solver(self.solver, self.schedule.omega, self.steps)  # they may have been set after construction
        copies, paths = len(keys) if keys.dim() == 2 else 1, keys.flatten().to(state.device)
        if self.input_sigma:
            state = self._up_to_noise(self.diffused(torch.cat([state] * copies) if copies > 1 else state, paths))
            copies = 1
        return self.head(self.solve_blocks(state, paths, copies)).unflatten(0, keys.shape)

    def solve_blocks(self, state: Tensor, keys: Tensor, copies: int) -> Tensor:
        """From the first states ``(N, ...)`` to the last ones ``(copies N, ...)``, along paths ``(copies N,)``."""
        if copies > 1:
            state = torch.cat([state] * copies)  # keeps the memory format
        rest = iter(self.sdes)
        if self.one_euler_step:
            state = diffuse(next(rest), state, keys)
        for sde in rest:
            state = integrate(sde, state, keys, self.solver, self.steps, self.checkpoint)
        return state


def recast(
    net: nn.Module,
    omega: float = 0.2,
    schedule: str = "inverse-time",
    solver: str = "euler",
    steps: int = 1,
    horizon: float | None = None,
    image_shape: tuple[int, int, int] | None = None,
    checkpoint: bool = False,
    input_sigma: float = 0.0,
) -> ItoResNet:
    """A residual network as Itô processes; the network is copied and not changed.

    With ``omega=0``, ``input_sigma=0``, ``solver="euler"`` and ``steps=1`` the result is the network, bit for bit.

    Args:
        net: `load_resnet`'s, torchvision's, any network of torchvision's blocks, or a `Chain`.
        omega: strength of the noise, in units of the state per square root of a block.
        schedule: a name in `SCHEDULES`: how the noise depends on time and state.
        solver: a name in `SOLVERS`.
        steps: solver steps a block, a power of two.
        horizon: the time at the last block's end; default the number of blocks, one unit for each. It rescales
            time: the noise-free flow stays the same, and the noise follows the new clock.
        image_shape: (channels, height, width) of a test image; default 32x32 with the first convolution's channels.
        checkpoint: use less memory and more computation in gradients (see `integrate`).
        input_sigma: standard deviation of normal noise on the image, in pixel units; above 0 the ensemble is a smoothed
            classifier, see `ItoResNet.diffused` and `neuralsde_ito.certify`.

    Returns:
        An `ItoResNet` in the mode (train or eval), on the device and in the dtype of ``net``.

    Raises:
        ItoError: values out of range, an unknown name, or a network that is not a chain of blocks.
    """
    diffusion = Schedule(omega, schedule)
    check_solver(solver, omega, steps)
    check_input_sigma(input_sigma)
    source = copied(net.base if isinstance(net, ItoResNet) else net)
    chain = as_chain(source)
    n = len(chain.blocks)
    if n == 0:
        raise ItoError("A chain needs at least one block.")
    if horizon is None:
        horizon = float(n)
    if not (math.isfinite(horizon) and horizon > 0):
        raise ItoError(f"horizon must be a positive number, got {horizon}.")
    if image_shape is None:
        conv = next((m for m in chain.stem.modules() if isinstance(m, nn.Conv2d)), None)
        image_shape = (conv.in_channels if conv else 3, 32, 32)
    with torch.inference_mode(False):
        shapes = _probe(source, chain, image_shape)
    # Boundaries on multiples of 2**-20, so that steps add up to them exactly in float64.
    times = [round(horizon * i / n * 2**20) / 2**20 for i in range(n + 1)]
    if any(b <= a for a, b in itertools.pairwise(times)):
        raise ItoError(f"horizon {horizon} leaves no time for {n} blocks: at least {n * 2.0**-20:.2g} is needed.")
    sdes = [
        BlockSDE(block, diffusion, i, times[i], times[i + 1], shapes[i + 1], jump=shapes[i + 1] != shapes[i])
        for i, block in enumerate(chain.blocks)
    ]
    model = ItoResNet(chain.stem, sdes, chain.head, solver, steps, checkpoint, image_shape, input_sigma)
    own = set(source.modules())
    for module in model.modules():
        if module not in own:  # the network's modules keep their modes: a frozen BatchNorm stays frozen
            module.training = net.training
    return model


@torch.no_grad()
def _probe(net: nn.Module, chain: Chain, image_shape: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """Shapes of the state before the blocks and after each, from one random image.

    Raises:
        ItoError: the network does not run on the image, or the chain computes something else than the network.
    """
    x = torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(0), device="cpu")
    x = x.to(next((p for p in net.parameters() if p.is_floating_point()), x))
    try:
        with evaluating(net), evaluating(chain):
            state = chain.stem(x)
            shapes = [tuple(state.shape[1:])]
            for i, block in enumerate(chain.blocks):
                version = state._version
                after = block(state)
                if state._version != version:
                    raise ItoError(f"Block {i} changes its input in place; set its first activation to inplace=False.")
                state = after
                shapes.append(tuple(state.shape[1:]))
            # NaN counts as equal: weights that are not finite are no evidence of a wrong order.
            same = torch.allclose(chain.head(state), net(x), rtol=0, atol=0, equal_nan=True)
    except RuntimeError as error:
        raise ItoError(
            f"The network does not run on a test image of shape {image_shape}; give image_shape. ({error})"
        ) from error
    if not same:
        if repeated := _repeated_block(net):
            raise ItoError(
                f"{type(net).__name__} runs one block in two places, {repeated[0]} and {repeated[1]}; give each place "
                "a block of its own, or spell the network out: ito.recast(ito.Chain(stem, blocks, head))."
            )
        raise ItoError(
            f"{type(net).__name__}.forward does more than call its modules in order; "
            "spell it out: ito.recast(ito.Chain(stem, blocks, head))."
        )
    return shapes


def _repeated_block(net: nn.Module) -> tuple[str, str] | None:
    """The two names of a block that is registered twice, if there is one."""
    names: dict[nn.Module, str] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, _BLOCKS):
            if module in names:
                return names[module], name
            names[module] = name
    return None
