"""The one sentence for a name that is not known."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable


def nearest(kind: str, typed: object, known: Iterable[str]) -> str:
    """What was typed and the nearest known name; all known names if none is near."""
    names, word = list(known), str(typed)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if not close:
        return f"Unknown {kind} {typed!r}. Known: {', '.join(names)}."

    def similarity(name: str) -> tuple[float, int]:
        # Of equally near names the one that begins alike: resnet21 is meant for resnet20, not for resnet32.
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, word, strict=False))
        return difflib.SequenceMatcher(None, name, word).ratio(), len(list(alike))

    return f"Unknown {kind} {typed!r}; did you mean {max(close, key=similarity)!r}?"
