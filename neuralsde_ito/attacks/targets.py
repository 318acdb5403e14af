"""One interface for every kind of model under attack: logits of paths, and gradients of an objective."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..models.ensemble import ItoEnsemble
from ..models.inference import in_bfloat16, piece_of
from ..models.inspection import as_called, check_module
from ..models.recast import ItoResNet
from ..models.vote import Vote, as_voter
from ..models.votes import winners
from ..models.voting import Voter
from ..modules import well_known
from ..names import PRECISIONS
from ..noise.keys import PathRange
from ..parallel import in_pieces, out_of_memory
from ..sde.solvers import find_solver
from ..validation import ItoError, one_of, whole_number
from .objectives import Objective

_GRAPH_BYTES = {"cpu": 1 << 28}  # that one graph of a module may keep; on a GPU 4 GiB


class Ascent(NamedTuple):
    """An objective along some paths, and its gradient.

    Attributes:
        loss: the objective of each image, ``(N,)``.
        logits: of all paths, ``(P, N, classes)``.
        gradient: of the summed loss, ``(N, C, H, W)``.
    """

    loss: Tensor
    logits: Tensor
    gradient: Tensor


class Target(Protocol):
    """A model as attacks see it.

    Attributes:
        distinct: how many different paths there are, where their number is limited: without noise one for each member.
    """

    distinct: int | None

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """Logits ``(count, N, classes)`` along numbered paths, without a gradient."""
        ...

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """An objective and its gradient along numbered paths."""
        ...


def in_precision(target: Target, precision: str) -> Target:
    """The target with its gradients, and the loss and logits that come with them, in this precision.

    `Target.path_logits` stays as it is: what decides, chooses and reports is never in bfloat16.

    Args:
        target: one of float32.
        precision: a name in `PRECISIONS`.

    Raises:
        ItoError: an unknown name, or a target that has no gradients in bfloat16.
    """
    if one_of("precision", precision, PRECISIONS) == "float32":
        return target
    convert: Callable[[], Target] | None = getattr(target, "in_bfloat16", None)
    if convert is None:
        raise ItoError(f"{type(target).__name__} has no gradients in bfloat16 (no method in_bfloat16).")
    return convert()


NO_GRADIENT = (
    "No gradient comes back from the model's output (no_grad or detach inside it), so that a white-box attack measures "
    "nothing; take that out of the model, or attack it with Square."
)


def _ascend(objective: Objective, x: Tensor, y: Tensor, path_logits: Callable[[Tensor], Tensor]) -> Ascent:
    """An objective and its gradient by autograd; ``path_logits`` gives the logits ``(P, N, classes)`` of images."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = path_logits(x)
        loss = objective(logits, y)
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss), allow_unused=True)
        if gradient is None:
            raise ItoError(NO_GRADIENT)
    return Ascent(loss.detach(), logits.detach(), gradient)


def _joined(pieces: list[Ascent]) -> Ascent:
    """Pieces of a batch as one."""
    losses, logits, gradients = zip(*pieces, strict=True)
    return Ascent(torch.cat(losses), torch.cat(logits, 1), torch.cat(gradients))


class ModuleTarget:
    """Any network from images in [0, 1] to logits, as a `Vote` makes paths of its random draws.

    A gradient is taken a few images at a time, with all their paths. The size of such a piece changes only the last
    bits. Two calls never run at the same time: a module may keep what it computes.

    Args:
        model: a `Vote`, or the network; use it inside `as_called`.
        x: images ``(N, C, H, W)``, by which noise is detected.
        batch_size: images at a time. Default: 256 without a gradient; with a gradient, as many as keep a graph within
            256 MiB on a CPU, 4 GiB elsewhere.

    Raises:
        ItoError: the output is not logits, or the batch size is not a positive number.
    """

    brief = False  # whether gradients are taken in bfloat16

    def __init__(self, model: nn.Module, x: Tensor, batch_size: int | None = None) -> None:
        self.vote, self.x = model if isinstance(model, Vote) else Vote(model), x
        self.batch_size = None if batch_size is None else whole_number("batch_size", batch_size)
        self.vote.chunk = self.batch_size or self.vote.chunk
        self._image_bytes: int | None = None  # that the graph of one image keeps
        self.vote.observe(x)
        self.distinct = None if self.vote.noisy else 1

    def in_bfloat16(self) -> ModuleTarget:
        """The same target, whose gradients go through torch's autocast to bfloat16."""
        target = copy.copy(self)
        target.brief = True
        return target

    def readout(self, logits: Tensor, index: Tensor) -> Tensor:
        """What is attacked of the logits ``(P, N, classes)`` of images named ``index`` ``(N,)``: by default all."""
        return logits

    def _along(self, paths: PathRange, x: Tensor) -> Tensor:
        return self.readout(self.vote.path_logits(x, paths).to(x.dtype), paths.index)

    @torch.no_grad()
    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """See `Target`."""

        def piece(part: slice) -> Tensor:
            return self._along(paths.of(part), x[part])

        return torch.cat(in_pieces(piece, len(x), self.batch_size or 256, x.device, side_by_side=None), 1)

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """See `Target`."""

        def piece(part: slice) -> Ascent:
            narrower = torch.autocast(x.device.type, torch.bfloat16) if self.brief else nullcontext()
            with narrower:
                return _ascend(objective, x[part], y[part], partial(self._along, paths.of(part)))

        return _joined(in_pieces(piece, len(x), self.at_once(paths.count), x.device, side_by_side=None))

    def at_once(self, count: int) -> int:
        """How many images a gradient is taken of at a time, on ``count`` paths each."""
        if self.batch_size is not None:
            return self.batch_size
        if self._image_bytes is None:
            few = self.x[:2]
            self._image_bytes = max(1, graph_bytes(self.vote.module, few) // len(few))
        return max(1, _GRAPH_BYTES.get(self.x.device.type, 1 << 32) // (self._image_bytes * count))


def graph_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the gradient of ``model(x)``, without the model's parameters and buffers."""
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    devices = range(torch.cuda.device_count()) if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), hooks:
        logits = model(x.detach().clone().requires_grad_())  # noqa: F841 (its graph holds the memory meanwhile)
    for own in (*model.parameters(), *model.buffers()):
        saved.pop(own.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class EnsembleTarget:
    """An ensemble, through its quick copy.

    A gradient is taken a few images at a time, with all their paths: an objective needs all paths of an image at once.

    Raises:
        ItoError: a member's solver chooses its own steps.
    """

    def __init__(self, ensemble: ItoEnsemble) -> None:
        for member in ensemble.members:
            if find_solver(str(member.solver)).adaptive:
                raise ItoError(
                    f"Solver {member.solver!r} chooses its steps for the whole batch, so that one image's gradient "
                    "depends on the others; attack with a solver of fixed steps."
                )
        self.distinct = None if ensemble.noisy else len(ensemble.members)
        self.ensemble = ensemble
        self.brief = False  # whether gradients are taken in bfloat16
        self._quick: ItoEnsemble | None = None
        self._brief: ItoEnsemble | None = None

    def quick(self, x: Tensor) -> ItoEnsemble:
        """The quick copy; the first images ``x`` are needed to make it."""
        if self._quick is None:
            self._quick = self.ensemble.quick(x)
        return self._quick

    def in_bfloat16(self) -> EnsembleTarget:
        """The same target, the blocks of which compute gradients in bfloat16; see `neuralsde_ito.models.inference`."""
        target = copy.copy(self)
        target.brief = True
        return target

    def _of_gradients(self, x: Tensor) -> ItoEnsemble:
        """The quick copy of which gradients are taken."""
        quick = self.quick(x)
        if not self.brief:
            return quick
        if self._brief is None:
            members = [in_bfloat16(member) for member in quick.members]
            self._brief = ItoEnsemble(members, quick.inferences, quick.rule, quick.paths_per_call)
            self._brief.chunk = quick.chunk
        return self._brief

    @torch.no_grad()
    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """See `Target`."""
        return self.quick(x).path_logits(x, paths)

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """See `Target`."""
        quick = self._of_gradients(x)
        members: list[ItoResNet] = list(quick.members)
        size = quick.chunk or min(piece_of(member, x) for member in members)

        def piece(part: slice) -> Ascent:
            return _ascend(objective, x[part], y[part], partial(quick.path_logits, paths=paths.of(part)))

        try:
            size = max(1, size // paths.count)
            pieces = in_pieces(piece, len(x), size, x.device, lambda: all(map(well_known, members)))
        except (RuntimeError, MemoryError) as error:
            # Not even a piece of one image fits: the only remedy left is to store less.
            if not out_of_memory(error) or all(member.checkpoint for member in members):
                raise
            for member in members:
                member.checkpoint = True
            return self.ascend(objective, x, y, paths)
        return _joined(pieces)


def as_target(model: nn.Module, x: Tensor, batch_size: int | None = None) -> Target:
    """A model as attacks see it: an `ItoEnsemble`, an `ItoResNet` (an ensemble of one), or any other module.

    Args:
        model: use it inside `as_called`.
        x: the images ``(N, C, H, W)``.
        batch_size: see `ModuleTarget`; an ensemble has its own ``chunk``.

    Raises:
        ItoError: a model that cannot be attacked, see `check_module`.
    """
    voter = as_voter(model)
    if isinstance(voter, ItoEnsemble):
        return EnsembleTarget(voter)
    assert isinstance(voter, Vote)
    batch_size = batch_size or voter.chunk
    check_module(voter.module, x, batch_size)
    return ModuleTarget(voter, x, batch_size)


class KnownPaths:
    """A voter whose noise the attacker knows: on every panel, all paths are those of the report with this seed.

    Args:
        ensemble: the voter.
        x: images ``(N, C, H, W)``, by which a stranger's module shows whether it is random.
        seed: of the report.
        eot: if there are more paths than these, a gradient takes so many of them in turn, and is then as random as one
            of fresh paths. Default: every gradient takes all.
    """

    def __init__(self, ensemble: Voter, x: Tensor, seed: int, eot: int | None = None) -> None:
        self.target, self.seed = as_target(ensemble, x), seed
        self.count = self.target.distinct or len(ensemble.members) * ensemble.inferences
        self.distinct = self.count if eot is None or eot >= self.count else None

    def in_bfloat16(self) -> KnownPaths:
        """The same target with gradients in bfloat16."""
        known = copy.copy(self)
        known.target = in_precision(self.target, "bfloat16")
        return known

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """Logits ``(P, N, classes)`` along all paths of the report, whatever ``paths`` are asked for."""
        return self.target.path_logits(x, PathRange(self.seed, "report", paths.index, 0, self.count))

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """An objective and its gradient along all paths of the report, or along the next ones."""
        first, count = 0, self.count
        if self.distinct is None:
            first, count = min(paths.first % self.count, self.count - paths.count), paths.count
        return self.target.ascend(objective, x, y, PathRange(self.seed, "report", paths.index, first, count))


@torch.no_grad()
def classify(net: nn.Module, x: Tensor) -> Tensor:
    """Labels ``(N,)`` by a plain network in its own modes (see `as_called`); `ABSTAIN` where logits are not finite."""
    with as_called(net):
        return winners(net(x))
