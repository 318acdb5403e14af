"""Checks of arguments that many modules make, and the error for what the user can mend."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Iterable


class ItoError(ValueError):
    """An argument, a file or a setting that cannot be used; the message says what was found and how to mend it.

    The command line exits with 2 on it. Any other exception is a fault of this program, and exits with 1.
    """


def shown(value: object, width: int = 200) -> str:
    """``repr(value)`` for a message, shortened to ``width`` characters."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]}...{text[-1]}"


def whole_number(name: str, value: object, least: int = 1) -> int:
    """``value`` as an ``int``: Python's and numpy's integers are taken, booleans and floats are not.

    Raises:
        ItoError: it is not a whole number, or below ``least``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise ItoError(f"{name} must be a whole number of at least {least}, got {shown(value)}.")
    return number


def nearest(kind: str, typed: object, known: Iterable[str]) -> str:
    """The sentence for an unknown name: what was typed and the nearest known name; all known names if none is near."""
    names, word = list(known), str(typed)[:200]  # the search is quadratic in the length
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if not close:
        return f"Unknown {kind} {shown(typed)}. Known: {', '.join(names)}."

    def similarity(name: str) -> tuple[float, int]:
        # Of equally near names the one that begins alike: resnet21 is meant for resnet20, not for resnet32.
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, word, strict=False))
        return difflib.SequenceMatcher(None, name, word).ratio(), len(list(alike))

    return f"Unknown {kind} {shown(typed)}; did you mean {max(close, key=similarity)!r}?"
