"""Keys: the name of every inference of every image."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..validation import ItoError


def content_index(x: Tensor) -> Tensor:
    """Names for images that no data set numbers: 63 bits of a hash of the pixels, ``(N, C, H, W) -> (N,)`` int64.

    With them as `ItoEnsemble.predict`'s ``index``, an image meets the same noise whatever is beside it.
    """
    names = []
    for image in x.detach().cpu():
        digest = hashlib.sha256(str((image.dtype, *image.shape)).encode())
        digest.update(image.contiguous().numpy().tobytes())
        names.append(int.from_bytes(digest.digest()[:8], "little") >> 1)
    return torch.tensor(names, dtype=torch.int64, device=x.device)


# torch.compile breaks its graph here: it would take every field of an address for a symbol, and work for minutes on
# expressions as long as the hash.
_outside_of_graphs = torch.compiler.disable

# The multipliers of SplitMix64's finaliser and its increment, as signed 64-bit integers.
_M1, _M2, _GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB

# What a path is used for. Different purposes never share a path: an attack that saw the report's paths
# would be judged by what it has fitted.
PURPOSES = ("fresh", "train", "gradient", "selection", "report")


def _mix_(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place. Shifts of int64 are arithmetic in torch: the mask makes them logical."""
    for shift, factor in ((30, _M1), (27, _M2)):
        z ^= (z >> shift) & ((1 << (64 - shift)) - 1)
        z *= factor
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def _absorb(state: Tensor, field: Tensor | int) -> Tensor:
    """Mix one more field into the state. Never a plain addition: offsets of two fields could meet."""
    if isinstance(field, Tensor):
        if field.is_floating_point() or field.is_complex():
            raise ItoError(f"Noise is named by whole numbers, got {field.dtype}.")
        return _mix_(state * _M1 + _mix_(field.to(state.device, torch.int64) + _GOLDEN))
    return _mix_(state * _M1 + _mixed(field))


def _mixed(field: int) -> int:
    """`_mix_` of ``field`` plus the increment, in Python's integers: any 64 bits, signed or not."""
    z = (int(field) + _GOLDEN) % 2**64
    for shift, factor in ((30, _M1), (27, _M2)):
        z = (z ^ z >> shift) * factor % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


@lru_cache(maxsize=4096)
def _fold(address: tuple[int, ...]) -> int:
    """One number for an address: the fields mixed in one after the other, as in a key."""
    state = len(address)
    for field in address:
        state = _mixed(state * _M1 + _mixed(field) - _GOLDEN)
    return state


@_outside_of_graphs
def make_keys(
    seed: int | Tensor,
    purpose: str,
    member: int | Tensor = 0,
    inference: int | Tensor = 0,
    index: int | Tensor = 0,
) -> Tensor:
    """Keys that name inferences: a mixed hash of all the fields.

    Args:
        seed: any integer of 64 bits, Python's or numpy's.
        purpose: one of `PURPOSES`; separates training, gradient, selection and report.
        member, inference, index: integers or tensors of whole numbers that broadcast together; ``index`` names the
            image.

    Returns:
        int64 keys of the broadcast shape (at least one dimension is the caller's to give).
    """
    if purpose not in PURPOSES:
        raise ItoError(f"Unknown purpose {purpose!r}. Known: {', '.join(PURPOSES)}.")
    device = next((f.device for f in (index, inference, member, seed) if isinstance(f, Tensor)), None)
    state = torch.full((), PURPOSES.index(purpose) + 1, dtype=torch.int64, device=device)
    for field in (seed, member, inference, index):
        state = _absorb(state, field)
    return state


@_outside_of_graphs
def fresh_keys(n: int, device: torch.device | str | None = None) -> Tensor:
    """Keys ``(n,)`` that nobody can foretell: from the operating system, not from a generator one can reseed.

    Raises:
        ItoError: under ``torch.jit.trace``, which would keep them for ever.
    """
    if torch.jit.is_tracing():
        raise ItoError("Fresh noise cannot be traced: the traced model would repeat it for ever; trace model(x, keys).")
    seed = secrets.randbits(63)
    return make_keys(seed, "fresh", index=torch.arange(n, device=device))


@dataclass(frozen=True)
class PathRange:
    """Numbered paths of some images: all that a model must know to draw their noise, now or again.

    Attributes:
        seed, purpose: as in `make_keys`.
        index: int64 ``(N,)``, the images' names.
        first, count: the paths ``first`` to ``first + count - 1`` of each image.
    """

    seed: int
    purpose: str
    index: Tensor
    first: int = 0
    count: int = 1

    def of(self, rows: Tensor | slice) -> PathRange:
        """The same paths, of some of the images."""
        return replace(self, index=self.index[rows])
