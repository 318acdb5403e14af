"""A module whose steps, gates and detached parts have a slope in the backward pass, and in the backward pass only.

Rounding, comparisons, one-hot vectors, Bernoulli draws, `detach`, ``no_grad`` and saturated sigmoids hand back no
gradient of use, though the output depends on their input. BPDA (Athalye et al. 2018,
https://arxiv.org/abs/1802.00420) replaces the derivative of such a step by that of a smooth function near to it. Here a
``TorchFunctionMode`` does so for any code in torch: the code need not be known, and all its values stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

# Functions whose value is near their input, so that the identity is near them.
_NEAR = {"round", "floor", "ceil", "trunc", "fix", "detach", "bernoulli"}
_GREATER = {"gt", "ge", "greater", "greater_equal"}
_LESS = {"lt", "le", "less", "less_equal"}
_SATURATING = {"sigmoid", "tanh", "softmax"}
# Functions that may be given gates, and change no number of values: these keep the slope of a gate.
_MOVES = {"unsqueeze", "squeeze", "view", "reshape", "expand", "flatten", "permute", "view_as", "contiguous", "clone"}
# Functions that compute with a gate as a number.
_NUMBERS = {"float", "double", "to", "type", "type_as", "mul", "rmul", "add", "radd", "sub", "rsub", "div", "truediv"}
_NUMBERS |= {"true_divide", "matmul", "sum", "mean", "cat", "stack", "cumsum", "linear", "conv2d", "einsum"}
_STEEP = 2.0  # mean distance from 0 above which a sigmoid counts as saturated


class _Replaced(Function):
    """A value whose gradient goes to another tensor of the same shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, soft: Tensor) -> Tensor:
        """The value."""
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """The whole gradient goes to ``soft``."""
        return None, gradients[0]


class StraightThroughMode(TorchFunctionMode):
    """Inside, functions of torch without a slope of use get one.

    A gate or a class number is no floating-point tensor, and has no gradient. It carries ``soft``, a tensor of its
    shape, until the code computes a number with it.

    Attributes:
        changed: the names of the functions that got another slope.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function; where its slope is of no use, give its value another."""
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled and args and not args[0]:
            self.changed.add("no_grad")
            return None
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(func, "__self__", None) is torch.Tensor.data:
            name = "detach"
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        name = name.rstrip("_") if name.endswith("_") and not name.startswith("__") else name.strip("_")
        if name in _NUMBERS:
            args = tuple(_number(value) for value in args)
        soft = _soft_where(args) if name == "where" and len(args) == 3 else None
        value = func(*args, **kwargs)
        if soft is None:
            soft = _soft(name, value, args, kwargs)
        if soft is None or not isinstance(value, Tensor) or (soft.shape != value.shape and name != "argmax"):
            return value
        self.changed.add(name)
        if value.is_floating_point():
            return _Replaced.apply(value, soft.to(value.dtype))
        vars(value)["soft"] = soft
        return value


def _width(u: Tensor) -> Tensor:
    """How wide a step is made: the mean distance of the values from it."""
    return u.detach().abs().nan_to_num(0, 0, 0).mean().clamp_min(1e-12)


def _step(u: Tensor) -> Tensor:
    """A soft step of ``u`` at 0."""
    return (u / _width(u)).sigmoid()


def _number(value: Any) -> Any:
    """A gate or a vector of classes as numbers that hand a gradient on; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(_number(part) for part in value)
    soft = getattr(value, "soft", None)
    if soft is None or soft.shape != value.shape:
        return value
    return _Replaced.apply(value.to(soft.dtype), soft)


def _slopes(*values: Any) -> bool:
    """Whether a gradient goes into one of the values."""
    return any(isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad for value in values)


def _soft_where(args: tuple[Any, ...]) -> Tensor | None:
    """The soft form of ``where(gate, a, b)``, if the gate has a slope."""
    gate, a, b = args
    soft = getattr(gate, "soft", None)
    if soft is None or soft.shape != gate.shape:
        return None
    finite = [part.nan_to_num(0, 0, 0) if isinstance(part, Tensor) else part for part in (a, b)]
    return soft * finite[0] + (1 - soft) * finite[1]


def _soft(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that takes the gradient of a function's value; None where autograd's own is of use."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not isinstance(value, Tensor):
        return None
    gate: Tensor | None = getattr(x, "soft", None)
    if gate is not None:
        if name in ("invert", "logical_not", "bitwise_not"):
            return 1 - gate
        if name == "one_hot":
            return gate
        return getattr(gate, name)(*args[1:], **kwargs) if name in _MOVES and gate.shape == x.shape else None
    if name in _GREATER | _LESS and len(args) > 1 and _slopes(*args[:2]):
        return _step(args[0] - args[1] if name in _GREATER else args[1] - args[0])
    if not _slopes(x):
        return None
    if name in _NEAR:
        return x
    if name in ("sign", "sgn"):
        return 2 * _step(x)
    if name == "heaviside":
        return _step(x)
    if name in _SATURATING and float(_width(x)) > _STEEP:
        gentle = x * (_STEEP / _width(x))
        if name == "softmax":
            return gentle.softmax(kwargs.get("dim", args[1] if len(args) > 1 else -1))
        return gentle.sigmoid() if name == "sigmoid" else gentle.tanh()
    # A class number has no slope of its own, but the vector made of it has that of the logits.
    return x if name == "argmax" and x.dim() == 2 else None


def _strange(cls: type[Function]) -> Iterator[type[Function]]:
    """The classes below a class that are neither torch's nor ours, and define a backward."""
    for below in cls.__subclasses__():
        if not below.__module__.startswith(("torch.", "neuralsde_ito.")) and "backward" in vars(below):
            yield below
        yield from _strange(below)


@contextmanager
def _derivatives_of_forward(changed: set[str]) -> Iterator[None]:
    """Inside, a stranger's ``autograd.Function`` has the gradient of its forward, not the one that it claims.

    Args:
        changed: gets the names of the functions whose gradient is taken.
    """
    owns = []
    for cls in set(_strange(Function)):
        owns.append((cls, {name: vars(cls)[name] for name in ("forward", "backward") if name in vars(cls)}))
        forward, backward = _derived(cls, changed)
        for name, method in (("forward", forward), ("backward", backward)):
            setattr(cls, name, staticmethod(method))
    try:
        yield
    finally:
        for cls, own in owns:
            for name in ("forward", "backward"):
                if name in own:
                    setattr(cls, name, own[name])
                else:
                    delattr(cls, name)


def _derived(cls: type[Function], changed: set[str]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of a function, with the gradient of the code of its forward."""
    compute, claimed = cls.forward, cls.backward
    with_context = cls.setup_context is Function.setup_context  # torch's older form: forward(ctx, ...)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if with_context:
            args[0].inputs_of_forward = args[1:]
        return compute(*args, **kwargs)

    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs = getattr(ctx, "inputs_of_forward", None)
        if inputs is None:
            return claimed(ctx, *gradients)
        with torch.enable_grad():
            taken = [v.detach().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v for v in inputs]
            try:
                with StraightThroughMode():
                    out = compute(_Context(), *taken)
            except Exception:  # whatever a stranger's forward asks of a context that only stores
                return claimed(ctx, *gradients)
            changed.add(cls.__name__)
            outputs = out if isinstance(out, tuple) else (out,)
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=False) if _slopes(o) and g is not None]
            wanted = [v for v in taken if _slopes(v)]
            found: Iterator[Tensor | None] = iter(())
            if pairs and wanted:
                ends, weights = zip(*pairs, strict=True)
                found = iter(torch.autograd.grad(ends, wanted, weights, allow_unused=True))
            return tuple(next(found, None) if _slopes(v) else None for v in taken)

    return forward, backward


class _Context:
    """Takes all that a forward keeps for its backward, and does nothing with it."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Relaxed(Function):
    """A call of a `StraightThrough`, with a graph of its own, so that nothing that changes torch leaves the call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, through: StraightThrough) -> Tensor:
        """The module's own logits."""
        mode = StraightThroughMode()
        own = x.detach().requires_grad_()
        with torch.enable_grad(), _derivatives_of_forward(through.changed):
            with mode:
                logits = through.model(own)
            torch.set_grad_enabled(True)
        through.changed |= mode.changed
        ctx.own, ctx.logits, ctx.through = own, logits, through
        return logits.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient through the call's own graph; 0 where none comes back."""
        if not ctx.logits.requires_grad:
            return torch.zeros_like(ctx.own), None
        with _derivatives_of_forward(ctx.through.changed):
            found = torch.autograd.grad(
                ctx.logits, ctx.own, gradients[0].to(ctx.logits.dtype), allow_unused=True, materialize_grads=True
            )
        return found[0].nan_to_num(0, 0, 0), None


class StraightThrough(nn.Module):
    """A module with straight-through gradients; its values are the module's own.

    Attributes:
        model: the module.
        changed: what got another slope in any call so far; without any, the gradients are the module's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training
        self.changed: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        if not torch.is_grad_enabled():
            logits: Tensor = self.model(x)
            return logits
        return _Relaxed.apply(x, self)

    def relaxes(self, x: Tensor) -> bool:
        """Whether a gradient at images ``(N, C, H, W)`` is another than the module's own."""
        with torch.enable_grad():
            images = x.detach().clone().requires_grad_()
            self(images).sum().backward(inputs=[images])
        return bool(self.changed)
