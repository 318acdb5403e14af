"""Addressed noise for any module: inside `Replay`, what torch draws is a function of keys, and of nothing else.

torch draws from one generator for the whole batch, so that an image's noise depends on its position among the others.
Here an operation that draws (it carries torch's tag ``nondeterministic_seeded``) gets the numbers that the images'
keys name. Normals, uniform numbers and coins come from `normals`, for all images at once. Whatever else is drawn is
drawn image by image, each time on the generator that the image's key has seeded. What is drawn once for all images
(noise on weights, a random size) comes from a key of the path.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .keys import absorb, absorb_integer
from .normals import scaled_normals

# Draws that are no rows: a permutation of as many elements as there are images is still one permutation.
_WHOLE = ("aten::randperm", "aten::_cudnn_rnn", "aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu")


_ARGUMENTS = {"normal_": ("mean", "std"), "uniform_": ("from", "to"), "bernoulli_": ("p",)}  # after the tensor


class SharedDraw(Exception):
    """Images on several paths cannot share a draw."""


class Replay(TorchDispatchMode):
    """Inside, torch's random operations draw what the keys name, from whatever generator. Gradients pass as usual.

    Args:
        keys: int64 ``(N,)``, one for each image of the batch, for draws of which the first size is ``N``.
        common: one key, for all other draws; None where the images are on several paths, which share no draw.

    Attributes:
        draws: operations that drew, so far.

    Raises:
        SharedDraw: without ``common``, an operation draws once for all images.
    """

    def __init__(self, keys: Tensor, common: int | None) -> None:
        super().__init__()
        self.keys, self.common = keys.cpu(), common
        self.draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if "generator" in kwargs:  # one of the module's own: the addressed numbers take its place
            kwargs["generator"] = None
        self.draws += 1
        generator = _generator(args, kwargs)
        n = len(self.keys)
        if func._schema.name in _WHOLE or not any(_rows(value) == n for value in args):
            if self.common is None:
                raise SharedDraw
            generator.manual_seed(absorb_integer(self.common, self.draws))
            return func(*args, **kwargs)
        addressed = absorb(self.keys, self.draws)
        if (drawn := _drawn_at_once(func, args, kwargs, addressed)) is not None:
            return drawn
        rows = []
        for i, seed in enumerate(addressed.tolist()):
            generator.manual_seed(seed)
            rows.append(func(*(_row(value, i, n) for value in args), **kwargs))
        if func._schema.name.endswith("_"):  # it has drawn in place
            return args[0]
        return _joined(rows)


def _drawn_at_once(func: Any, args: tuple, kwargs: dict, addressed: Tensor) -> Tensor | None:
    """What the commonest operations draw, in one pass, a row for each addressed key; None for all others."""
    operation, value = func._schema.name.removeprefix("aten::"), args[0]
    if operation in ("randn", "rand"):
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        like = torch.empty(value, device=device or torch.get_default_device(), dtype=dtype)
    elif operation in ("randn_like", "rand_like"):
        like = torch.empty_like(value, **{key: said for key, said in kwargs.items() if key != "generator"})
    elif operation in ("normal_", "uniform_", "bernoulli_") and isinstance(value, Tensor):
        like = value
    else:
        return None
    if not like.dtype.is_floating_point or any(isinstance(other, Tensor) for other in args[1:]):
        return None  # a probability for each number
    kind = torch.promote_types(like.dtype, torch.float32)
    draws = scaled_normals(addressed.to(like.device), like[0].numel(), kind).view(like.shape)
    if operation not in ("randn", "randn_like", "normal_"):
        draws = torch.special.ndtr(draws).clamp_(max=1 - torch.finfo(like.dtype).eps / 2)  # uniform in [0, 1)
    if operation.endswith("_"):
        func(value[:0], *args[1:], **kwargs)  # torch refuses arguments that cannot be, such as a negative std
        draws = _shaped(operation, draws, *args[1:], **kwargs)
    return like.copy_(draws)


def _shaped(operation: str, draws: Tensor, *args: float, generator: None = None, **kwargs: float) -> Tensor:
    """Standard draws, as the arguments of an operation that draws in place want them."""
    given = dict(zip(_ARGUMENTS[operation], args, strict=False)) | kwargs
    if operation == "normal_":
        return draws * given.get("std", 1.0) + given.get("mean", 0.0)
    if operation == "uniform_":
        low = given.get("from", 0.0)
        return low + (given.get("to", 1.0) - low) * draws
    return draws < given.get("p", 0.5)


def _rows(value: Any) -> int | None:
    """The first size of a tensor, or of a shape."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    return value[0] if isinstance(value, (list, tuple)) and value and isinstance(value[0], int) else None


def _row(value: Any, i: int, n: int) -> Any:
    """An argument for one image alone."""
    if _rows(value) != n:
        return value
    return value[i : i + 1] if isinstance(value, Tensor) else [1, *value[1:]]


def _joined(rows: list[Any]) -> Any:
    if isinstance(rows[0], Tensor):
        return torch.cat(rows)
    return tuple(_joined(list(column)) for column in zip(*rows, strict=True))


def _generator(args: tuple, kwargs: dict) -> torch.Generator:
    """The generator from which an operation draws: that of its tensors' device, or of the device it names."""
    device = next((value.device for value in args if isinstance(value, Tensor)), None)
    device = torch.device(device or kwargs.get("device") or "cpu")
    if device.type == "cuda":
        torch.cuda.init()
        number = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[number]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


@contextmanager
def global_generators() -> Iterator[Callable[[], list[str]]]:
    """Restore numpy's and Python's global generators afterwards; gives what names those that were drawn from."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one is what is asked about)

    def drawn_from() -> list[str]:
        now = np.random.get_state()  # noqa: NPY002
        same = all(np.array_equal(a, b) for a, b in zip(numpy, now, strict=True))
        changed = {"Python's random": random.getstate() != python, "numpy's global generator": not same}
        return [name for name, is_so in changed.items() if is_so]

    try:
        yield drawn_from
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def replayed(keys: Tensor, common: int | None, others: bool = False) -> Iterator[Replay]:
    """`Replay`, after which all global generators are as before.

    Args:
        keys, common: see `Replay`.
        others: also seed the global generators of numpy and of ``random``, by ``common``: what they draw then depends
            on the path, and on the image's position in the batch.
    """
    with ExitStack() as stack:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else []))
        if others and common is not None:
            stack.enter_context(global_generators())
            random.seed(common)
            np.random.seed(common % 2**32)  # noqa: NPY002
        yield stack.enter_context(Replay(keys, common))
