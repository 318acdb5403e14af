"""Checks of arguments that more than one room makes, and the error for what the user can correct.

The command line's help imports this file, so it imports torch only in the functions that check tensors.
"""

from __future__ import annotations

import difflib
import itertools
import math
import operator
from collections.abc import Iterable
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, SupportsIndex, cast

if TYPE_CHECKING:
    from torch import Tensor


class ItoError(ValueError):
    """An argument, a file or a setting that cannot be used; the message says what it is and how to correct it.

    The command line exits with 2 on it. Any other exception is a fault of this program, and exits with 1.
    """


def shown(value: object, width: int = 200) -> str:
    """``repr(value)`` for a message, shortened to ``width`` characters."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]}...{text[-1]}"


def whole_number(name: str, value: object, least: int = 1) -> int:
    """``value`` as an ``int``: Python's and numpy's integers are accepted, booleans and floats are not.

    Raises:
        ItoError: it is not a whole number, or below ``least``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(cast(SupportsIndex, value))
    except TypeError:
        number = least - 1
    if number < least:
        raise ItoError(f"{name} must be a whole number of at least {least}, got {shown(value)}.")
    return number


def one_of(kind: str, value: str, known: Iterable[str]) -> str:
    """``value``, if it is a known name; the message calls it an unknown ``kind``.

    Raises:
        ItoError: it is unknown; the nearest known name is offered.
    """
    if value not in known:
        raise ItoError(nearest(kind, value, known))
    return value


def nearest(kind: str, typed: object, known: Iterable[str]) -> str:
    """The sentence for an unknown name: what was typed and the nearest known name; all known names if none is near."""
    names, word = list(known), str(typed)[:200]  # the search is quadratic in the length
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if not close:
        return f"Unknown {kind} {shown(typed)}. Known: {', '.join(names)}."

    def similarity(name: str) -> tuple[float, int]:
        # Of equally near names the one with the longer common beginning: resnet21 is meant for resnet20, not resnet32.
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, word, strict=False))
        return difflib.SequenceMatcher(None, name, word).ratio(), len(list(alike))

    return f"Unknown {kind} {shown(typed)}; did you mean {max(close, key=similarity)!r}?"


def parse_eps(text: str | float, name: str = "eps") -> float:
    """A radius as a number or a fraction, ``"8/255"``; messages call it ``name``.

    Raises:
        ItoError: not a number, a division by zero, negative or not finite.
    """
    try:
        if isinstance(text, bool):
            raise TypeError
        value = float(Fraction(text)) if isinstance(text, str) and "/" in text else float(text)
    except ZeroDivisionError:
        raise ItoError(f"{name} {shown(text)} divides by zero.") from None
    except (ValueError, TypeError, OverflowError):
        raise ItoError(f"{name} must be a number or a fraction such as 8/255, got {shown(text)}.") from None
    if not math.isfinite(value) or value < 0:
        raise ItoError(f"{name} must be finite and at least 0, got {shown(text)}.")
    return value


def check_eps(norm: str, eps: str | float) -> float:
    """The radius as a number, if it makes sense under the norm.

    Raises:
        ItoError: see `parse_eps`; or above 1 under L-inf, where 1 is the whole range of a pixel.
    """
    value = parse_eps(eps)
    if norm == "linf" and value > 1:
        raise ItoError(
            f"eps is in pixel units and at most 1 under linf, got {value:g}; 8 grey levels of 255 are written 8/255."
        )
    return value


def check_input_sigma(value: object) -> float:
    """The standard deviation of noise on images, in pixel units, as a number.

    Raises:
        ItoError: not a number, negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ItoError(f"input_sigma must be a finite number of at least 0, in pixel units, got {shown(value)}.")
    return float(value)


def check_images(x: Tensor, channels: int | None = None) -> None:
    """Check a batch of images.

    Args:
        x: images ``(N, C, H, W)`` in [0, 1].
        channels: that the network takes, where that is known.

    Raises:
        ItoError: not floating point, not ``(N, C, H, W)``, empty, wrong channels, not finite, or not in [0, 1].
    """
    import torch

    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() != 4:
        kind = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ItoError(f"Images must be a floating-point tensor (N, C, H, W), got {kind}.")
    if not len(x):
        raise ItoError("There are no images in the batch.")
    if channels is not None and x.shape[1] != channels:
        raise ItoError(f"The network takes images with {channels} channels, got {x.shape[1]}.")
    low, high = float(x.detach().amin()), float(x.detach().amax())  # NaN if any pixel is
    if not (low >= 0 and high <= 1):
        raise ItoError(f"Images must be finite and in [0, 1], got values from {low:g} to {high:g}.")


def check_labels(y: Tensor, n: int, classes: int | None = None) -> Tensor:
    """True labels as int64 ``(n,)``.

    Raises:
        ItoError: not a tensor of ``n`` whole numbers, or not below ``classes``, where that is known.
    """
    import torch

    whole = isinstance(y, torch.Tensor) and not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if not whole or y.shape != (n,):
        kind = f"{y.dtype}, {tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise ItoError(f"Labels must be a tensor of whole numbers of shape ({n},), got {kind}.")
    if classes is not None and len(odd := y[(y < 0) | (y >= classes)]):
        raise ItoError(f"Labels must be from 0 to {classes - 1}, got {int(odd[0])}.")
    return y.long()


def image_names(index: Tensor | None, x: Tensor) -> Tensor:
    """The images' names in the noise's address, int64 ``(N,)`` on the device of ``x``; default their position in it.

    Raises:
        ItoError: not one whole number for each image.
    """
    import torch

    if index is None:
        return torch.arange(len(x), device=x.device)
    whole = isinstance(index, torch.Tensor) and not (index.is_floating_point() or index.is_complex())
    if not whole or index.shape != (len(x),):
        kind = f"{index.dtype}, {tuple(index.shape)}" if isinstance(index, torch.Tensor) else type(index).__name__
        raise ItoError(f"index names the images: one whole number for each of {len(x)}, got {kind}.")
    return index.to(x.device, torch.int64)


def recordable(tensor: Tensor) -> Tensor:
    """The tensor; or a copy if it was made in inference mode, because autograd cannot record such a tensor."""
    import torch

    return tensor.clone() if isinstance(tensor, torch.Tensor) and tensor.is_inference() else tensor
