"""One interface for every kind of model under attack: logits of paths, and gradients of an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.ensemble import ItoEnsemble
from ..models.inference import piece_of
from ..models.recast import ItoResNet
from ..models.votes import winners
from ..modules import evaluating, well_known
from ..noise.keys import PathRange
from ..parallel import in_pieces, out_of_memory
from ..sde.solvers import find_solver
from ..validation import ItoError, check_labels, whole_number
from .objectives import Objective

_GRAPH = {"cpu": 1 << 28}  # bytes that one graph of a module may keep; on a GPU 4 GiB
_MEND = "call model.eval(), or put only the dropout into train mode"


class Ascent(NamedTuple):
    """What a model says along some paths, and where an objective rises.

    Attributes:
        loss: ``(N,)``.
        logits: ``(P, N, classes)``.
        gradient: of the summed loss, ``(N, C, H, W)``.
    """

    loss: Tensor
    logits: Tensor
    gradient: Tensor


class Target(Protocol):
    """A model as attacks see it.

    Attributes:
        distinct: how many paths there are at all, one a member where there is no noise; None: without end.
    """

    distinct: int | None

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """Logits ``(count, N, classes)`` along numbered paths, without a gradient."""
        ...

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """An objective and its gradient along numbered paths."""
        ...


NO_GRADIENT = (
    "No gradient comes back from the model's output (no_grad or detach inside it), so that a white-box attack measures "
    "nothing; take that out of the model, or attack it with Square."
)


def _ascend(objective: Objective, x: Tensor, y: Tensor, paths: Callable[[Tensor], Tensor]) -> Ascent:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = paths(x)
        check_labels(y.flatten(), y.numel(), logits.shape[-1])
        loss = objective(logits, y)
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss), allow_unused=True)
        if gradient is None:
            raise ItoError(NO_GRADIENT)
    return Ascent(loss.detach(), logits.detach(), gradient)


@contextmanager
def as_called(model: nn.Module) -> Iterator[None]:
    """Inside, a model answers as it does when its owner calls it; afterwards all is as it was, also on an error.

    Itô models are in eval mode, as their noise does not depend on the mode. Any other module keeps the modes that it
    has: a dropout that was left on belongs to the model. Buffers that calls change get their values back.

    Raises:
        ItoError: a normalisation by the statistics of the batch.
    """
    with ExitStack() as stack:
        modules = list(model.modules())
        for part in modules:
            if isinstance(part, (ItoEnsemble, ItoResNet)):
                stack.enter_context(evaluating(part))
        for module in modules:
            _check_norm(module)
        held = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
        try:
            yield
        finally:
            for module, name, buffer, value in held:
                module._buffers[name] = buffer
                if not alike(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)


def _check_norm(module: nn.Module) -> None:
    """Refuse a normalisation that mixes images, or that every call changes."""
    if not isinstance(module, nn.modules.batchnorm._NormBase):
        return
    kind, kept = type(module).__name__, module.running_mean is not None
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        if module.training and kept:
            raise ItoError(f"{kind} is in train mode, so that every call changes the model: {_MEND}.")
    elif not kept:
        raise ItoError(
            f"{kind} keeps no running statistics, so that the answer to an image depends on the others in its batch: "
            "make it with track_running_stats=True."
        )
    elif module.training:
        raise ItoError(
            f"{kind} is in train mode, so that the answer to an image depends on the others in its batch: {_MEND}."
        )


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same, NaN for NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def answers(model: Callable[[Tensor], Tensor], x: Tensor, batch_size: int | None = None) -> Tensor:
    """Logits ``(N, classes)``, at most ``batch_size`` images at a time; half precision becomes that of the images.

    Raises:
        ItoError: the output is not logits.
    """
    out = []
    for part in x.split(batch_size or len(x)):
        logits = model(part)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(part):
            raise ItoError("The model must answer images (N, C, H, W), a single one too, with logits (N, classes).")
        out.append(logits)
    return torch.cat(out).to(x.dtype)


def replay(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    """``model(x)`` on the draws that a seed gives to torch's generators, which are left as they were."""
    on_cpu = x.device.type == "cpu"
    with torch.random.fork_rng(range(torch.cuda.device_count()) if x.device.type == "cuda" else []):
        # On a CPU its own generator alone: `torch.manual_seed` would reset those of GPUs as well.
        (torch.default_generator if on_cpu else torch).manual_seed(seed)
        return model(x)


def check_weights(model: nn.Module) -> None:
    """Refuse weights that can take part in no gradient.

    Raises:
        ItoError: they are from inference mode.
    """
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ItoError("The model was built under torch.inference_mode() and gives no gradient: build it outside.")


def check_module(model: nn.Module, x: Tensor, batch_size: int | None = None) -> None:
    """Refuse a module whose answer to an image depends on its batch, or that calls change; use it inside `as_called`.

    Eight images are shown twice, among others each time. The batches are of one size, and the draws from torch's
    generators the same: nothing but the company differs. Where noise has other sources, nobody can tell; where the
    ``batch_size`` is 1, there is no company.

    Raises:
        ItoError: what was found.
    """
    check_weights(model)
    few = x[:8]
    # The same eight images, beside two different sets of others.
    company = [torch.cat([few, them.repeat(8, 1, 1, 1)[:8]]) for them in (few, (few < 0.5).to(few))]
    training = [(name, m) for name, m in model.named_modules() if m.training]
    held = [(f"{name}.{key}", b, b.clone()) for name, m in training for key, b in m._buffers.items() if b is not None]
    with torch.no_grad():
        first, again, other = (answers(lambda part: replay(model, part, 0), batch) for batch in (company[0], *company))
        for name, buffer, value in held:
            if not alike(buffer, value):
                raise ItoError(f"Calling the model in train mode changes its {name.strip('.')}: {_MEND}.")
        if batch_size != 1 and alike(first, again):
            first, other = (F.normalize(out[: len(few)].nan_to_num(0, 0, 0), dim=1) for out in (first, other))
            if float((first - other).norm(dim=1).max()) > 1e-4:
                raise ItoError(
                    "The model's answer to an image depends on the others in its batch, so that no figure of an image "
                    "holds: let it answer image by image."
                )


class ModuleTarget:
    """Any network of images in [0, 1] to logits. If it is randomised, its noise is its own and always fresh.

    A gradient is taken a few images at a time, with all their paths. Without noise that changes last bits only; noise
    of torch's generator is drawn in another order. Two calls never run at a time: a module may keep what it computes.

    Args:
        model: the network; use it inside `as_called`.
        x: images ``(N, C, H, W)``, on which it is seen whether there is noise.
        batch_size: images at a time. Default: 256 without a gradient; with one, as many as keep a graph within
            256 MiB on a CPU, 4 GiB elsewhere.
    """

    def __init__(self, model: nn.Module, x: Tensor, batch_size: int | None = None) -> None:
        self.model, self.x = model, x
        self.batch_size = None if batch_size is None else whole_number("batch_size", batch_size)
        self._bytes: int | None = None  # of one image's graph
        with torch.no_grad():
            # Noise may show seldom: like AutoAttack's check, five forwards of the whole batch.
            first = answers(model, x, self.batch_size or 256)
            random = any(not alike(answers(model, x, self.batch_size or 256), first) for _ in range(4))
        self.distinct = None if random else 1

    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        """Of one call, ``(N, classes)``; ``index`` ``(N,)`` names the images."""
        return answers(self.model, x)

    @torch.no_grad()
    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """See `Target`."""

        def piece(part: slice) -> Tensor:
            return torch.stack([self.logits(x[part], paths.index[part]) for _ in range(paths.count)])

        return torch.cat(in_pieces(piece, len(x), self.batch_size or 256, x.device, side_by_side=False), 1)

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """See `Target`."""

        def piece(part: slice) -> Ascent:
            names = paths.index[part]
            return _ascend(
                objective, x[part], y[part], lambda x: torch.stack([self.logits(x, names) for _ in range(paths.count)])
            )

        pieces = in_pieces(piece, len(x), self.at_once(paths.count), x.device, side_by_side=False)
        losses, logits, gradients = zip(*pieces, strict=True)
        return Ascent(torch.cat(losses), torch.cat(logits, 1), torch.cat(gradients))

    def at_once(self, count: int) -> int:
        """How many images go through with a gradient at a time, on ``count`` paths each."""
        if self.batch_size is not None:
            return self.batch_size
        if self._bytes is None:
            few = self.x[:2]
            self._bytes = max(1, graph_bytes(self.model, few) // len(few))
        return max(1, _GRAPH.get(self.x.device.type, 1 << 32) // (self._bytes * count))


def graph_bytes(model: nn.Module, x: Tensor) -> int:
    """Memory that autograd keeps for the gradient of ``model(x)``, without the model's own."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x.detach().clone().requires_grad_())  # noqa: F841 (its graph holds the memory meanwhile)
    for own in (*model.parameters(), *model.buffers()):
        kept.pop(own.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class EnsembleTarget:
    """An ensemble's quick copy. Few images with all their paths at a time, so that any objective can be climbed."""

    def __init__(self, ensemble: ItoEnsemble) -> None:
        for member in ensemble.members:
            if find_solver(str(member.solver)).adaptive:
                raise ItoError(
                    f"Solver {member.solver!r} chooses its steps for the whole batch, so that one image's gradient "
                    "depends on the others; attack with a solver of fixed steps."
                )
        self.distinct = None if ensemble.noisy else len(ensemble.members)
        self.ensemble = ensemble
        self._quick: ItoEnsemble | None = None

    def quick(self, x: Tensor) -> ItoEnsemble:
        """The quick copy, made when the first images are at hand."""
        if self._quick is None:
            self._quick = self.ensemble.quick(x)
        return self._quick

    @torch.no_grad()
    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """See `Target`."""
        return self.quick(x).path_logits(x, paths)

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """See `Target`."""
        quick = self.quick(x)
        members: list[ItoResNet] = list(quick.members)
        size = quick.chunk or min(piece_of(member, x, gradient=True) for member in members)

        def piece(part: slice) -> Ascent:
            own = paths.of(part)
            return _ascend(objective, x[part], y[part], lambda x: quick.path_logits(x, own))

        try:
            side_by_side = all(well_known(member) for member in members)
            pieces = in_pieces(piece, len(x), max(1, size // paths.count), x.device, side_by_side)
        except (RuntimeError, MemoryError) as error:
            # With a single image: what is left is to store less.
            if not out_of_memory(error) or all(member.checkpoint for member in members):
                raise
            for member in members:
                member.checkpoint = True
            return self.ascend(objective, x, y, paths)
        losses, logits, gradients = zip(*pieces, strict=True)
        return Ascent(torch.cat(losses), torch.cat(logits, 1), torch.cat(gradients))


def as_target(model: nn.Module, x: Tensor, batch_size: int | None = None) -> Target:
    """The face of a model: an `ItoEnsemble`, an `ItoResNet` (an ensemble of one), or any other module.

    Args:
        model: use it inside `as_called`.
        x: the images ``(N, C, H, W)``.
        batch_size: see `ModuleTarget`; an ensemble has its own ``chunk``.

    Raises:
        ItoError: a model that cannot be attacked, see `check_module`.
    """
    if isinstance(model, ItoResNet):
        model = ItoEnsemble([model])
    if isinstance(model, ItoEnsemble):
        return EnsembleTarget(model)
    check_module(model, x, batch_size)
    return ModuleTarget(model, x, batch_size)


class KnownPaths:
    """A target whose attacker has the defender's paths: every panel is the report's own."""

    def __init__(self, ensemble: ItoEnsemble, x: Tensor, seed: int) -> None:
        self.target, self.seed = EnsembleTarget(ensemble), seed
        self.count = self.target.distinct or len(ensemble.members) * ensemble.inferences
        self.distinct: int | None = self.count

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """All of them, whichever are asked for."""
        return self.target.path_logits(x, self._known(paths))

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """Through all of them."""
        return self.target.ascend(objective, x, y, self._known(paths))

    def _known(self, paths: PathRange) -> PathRange:
        return PathRange(self.seed, "report", paths.index, 0, self.count)


@torch.no_grad()
def classify(net: nn.Module, x: Tensor) -> Tensor:
    """A plain network's labels ``(N,)``, in its own modes, see `as_called`; `ABSTAIN` where logits are not finite."""
    with as_called(net):
        return winners(net(x))
