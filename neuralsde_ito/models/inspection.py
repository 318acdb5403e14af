"""How a module behaves when it is called: its modes, and whether the images of a batch influence each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import evaluating
from ..validation import ItoError
from .ensemble import ItoEnsemble
from .recast import ItoResNet

_MEND = "call model.eval(), or put only the dropout into train mode"


@contextmanager
def as_called(model: nn.Module) -> Iterator[None]:
    """Run a model in the modes in which its owner uses it; afterwards all is as it was, also on an error.

    Itô models are in eval mode, as their noise does not depend on the mode. Any other module keeps the modes that it
    has: a dropout that was left on belongs to the model. Buffers that calls change get their values back.

    Raises:
        ItoError: the model normalises by the statistics of the batch.
    """
    with ExitStack() as stack:
        modules = list(model.modules())
        for module in modules:
            if isinstance(module, (ItoEnsemble, ItoResNet)):
                stack.enter_context(evaluating(module))
        for module in modules:
            _check_normalisation(module)
        saved = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
        try:
            yield
        finally:
            for module, name, buffer, value in saved:
                module._buffers[name] = buffer
                if not alike(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)


def _check_normalisation(module: nn.Module) -> None:
    """Refuse a normalisation that mixes images, or that every call changes."""
    if not isinstance(module, nn.modules.batchnorm._NormBase):
        return
    kind, running = type(module).__name__, module.running_mean is not None
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        if module.training and running:
            raise ItoError(f"{kind} is in train mode, so that every call changes the model: {_MEND}.")
    elif not running:
        raise ItoError(
            f"{kind} keeps no running statistics, so that the answer to an image depends on the others in its batch: "
            "make it with track_running_stats=True."
        )
    elif module.training:
        raise ItoError(
            f"{kind} is in train mode, so that the answer to an image depends on the others in its batch: {_MEND}."
        )


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same; NaN is the same as NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def answers(model: Callable[[Tensor], Tensor], x: Tensor, batch_size: int | None = None) -> Tensor:
    """Logits ``(N, classes)`` of images ``(N, C, H, W)``, at most ``batch_size`` at a time, in the images' precision.

    Raises:
        ItoError: the output is not logits.
    """
    parts = []
    for images in x.split(batch_size or len(x)):
        logits = model(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
            raise ItoError("The model must answer images (N, C, H, W), a single one too, with logits (N, classes).")
        parts.append(logits)
    return torch.cat(parts).to(x.dtype)


def replay(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    """``model(x)`` with torch's generators seeded by ``seed``; afterwards their states are as before."""
    on_cpu = x.device.type == "cpu"
    with torch.random.fork_rng(range(torch.cuda.device_count()) if x.device.type == "cuda" else []):
        # On a CPU only its own generator: `torch.manual_seed` would reset those of GPUs as well.
        (torch.default_generator if on_cpu else torch).manual_seed(seed)
        return model(x)


def check_weights(model: nn.Module) -> None:
    """Refuse weights that can take part in no gradient.

    Raises:
        ItoError: they were made in inference mode.
    """
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ItoError("The model was built under torch.inference_mode() and gives no gradient: build it outside.")


MIXING = 1e-4  # normalised logits that move by more depend on the other images of their batch


def mixing(model: nn.Module, x: Tensor, batch_size: int | None = None) -> float:
    """How far the answer to an image moves with the other images of its batch; use it inside `as_called`.

    The same eight images are shown twice, each time with other images in their batch. The batches have one size, and
    torch's generators give the same draws: only the other images differ. If the noise has another source, the question
    stays open, and the answer is 0; so it is if ``batch_size`` is 1, as there are no other images.

    Returns:
        The largest distance of an image's two answers, each normalised to length 1.
    """
    few = x[:8]
    batches = [torch.cat([few, others.repeat(8, 1, 1, 1)[:8]]) for others in (few, (few < 0.5).to(few))]
    with torch.no_grad():
        first, again, other = (answers(lambda part: replay(model, part, 0), batch) for batch in (batches[0], *batches))
    if batch_size == 1 or not alike(first, again):
        return 0.0
    first, other = (F.normalize(logits[: len(few)].nan_to_num(0, 0, 0), dim=1) for logits in (first, other))
    return float((first - other).norm(dim=1).max())


def check_module(model: nn.Module, x: Tensor, batch_size: int | None = None) -> None:
    """Refuse a module whose answer to an image depends on its batch, or that calls change; use it inside `as_called`.

    Raises:
        ItoError: the answer depends on the batch, see `mixing`, or calls change the model.
    """
    check_weights(model)
    training = [(name, m) for name, m in model.named_modules() if m.training]
    saved = [(f"{name}.{key}", b, b.clone()) for name, m in training for key, b in m._buffers.items() if b is not None]
    moves = mixing(model, x, batch_size)
    for name, buffer, value in saved:
        if not alike(buffer, value):
            raise ItoError(f"Calling the model in train mode changes its {name.strip('.')}: {_MEND}.")
    if moves > MIXING:
        raise ItoError(
            "The model's answer to an image depends on the others in its batch, so that no figure of an image "
            "holds: let it answer image by image."
        )
