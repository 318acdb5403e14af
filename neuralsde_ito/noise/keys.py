"""Keys: a key names one inference of one image, and so the path of its noise.

The way of a key: `make_keys` hashes seed, purpose, member, inference and image; `absorb` mixes the address of a normal
(block, level, index, component) into it; `add_normals` makes the normals, one per element of the state.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..validation import ItoError, one_of, whole_number


def content_index(x: Tensor) -> Tensor:
    """Names for images without a number in a data set: 63 bits of a hash of the pixels, ``(N, C, H, W) -> (N,)`` int64.

    Given to `ItoEnsemble.predict` as ``index``, they give an image the same noise in any batch.
    """
    names = []
    for image in x.detach().cpu():
        digest = hashlib.sha256(str((image.dtype, *image.shape)).encode())
        digest.update(image.contiguous().numpy().tobytes())
        names.append(int.from_bytes(digest.digest()[:8], "little") >> 1)
    return torch.tensor(names, dtype=torch.int64, device=x.device)


# torch.compile breaks its graph at these functions: it would treat every field of an address as a symbol, and work for
# minutes on expressions as long as the hash.
outside_of_graphs = torch.compiler.disable

# The multipliers of SplitMix64's finaliser and its increment, as signed 64-bit integers.
M1, M2, GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB

# What a path is used for. Two purposes never share a path: an attack that had seen the report's paths would be judged
# on the noise that it was fitted to.
PURPOSES = ("fresh", "train", "gradient", "selection", "report", "adversary")


def mix_(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place. Shifts of int64 are arithmetic in torch: the mask makes them logical."""
    for shift, factor in ((30, M1), (27, M2)):
        z ^= (z >> shift) & ((1 << (64 - shift)) - 1)
        z *= factor
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def absorb(state: Tensor, field: Tensor | int) -> Tensor:
    """Mix one more field into the state. Never by a plain addition: the offsets of two fields could coincide."""
    if isinstance(field, Tensor):
        if field.is_floating_point() or field.is_complex():
            raise ItoError(f"Noise is named by whole numbers, got {field.dtype}.")
        return mix_(state * M1 + mix_(field.to(state.device, torch.int64) + GOLDEN))
    return mix_(state * M1 + mixed_integer(field))


def absorb_integer(state: int, field: int) -> int:
    """`absorb` of integers alone: the same number, without a tensor."""
    return mixed_integer(state * M1 + mixed_integer(field) - GOLDEN)


def mixed_integer(field: int) -> int:
    """`mix_` of ``field`` plus the increment, in Python's integers: any 64 bits, signed or not."""
    z = (int(field) + GOLDEN) % 2**64
    for shift, factor in ((30, M1), (27, M2)):
        z = (z ^ z >> shift) * factor % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


@lru_cache(maxsize=4096)
def fold_address(address: tuple[int, ...]) -> int:
    """One number for an address: the fields mixed in one after the other, as in a key."""
    state = len(address)
    for field in address:
        state = absorb_integer(state, field)
    return state


def fold_addresses(first: tuple[int, ...], fields: Tensor, last: Tensor) -> Tensor:
    """`fold_address` of ``(*first, a, b)``, for all ``a`` of ``fields (A,)`` and ``b`` of ``last (B,)``: ``(A, B)``."""
    state = len(first) + 2
    for field in first:
        state = absorb_integer(state, field)
    return absorb(absorb(torch.full_like(fields, state), fields)[:, None], last)


@outside_of_graphs
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
        int64 keys of the broadcast shape: of no dimension where all fields are plain integers.

    Raises:
        ItoError: an unknown purpose, or a tensor that does not hold whole numbers.
    """
    one_of("purpose", purpose, PURPOSES)
    fields = (seed, member, inference, index)
    device = next((f.device for f in reversed(fields) if isinstance(f, Tensor)), None)
    folded, state = PURPOSES.index(purpose) + 1, None
    for field in fields:
        if state is None and not isinstance(field, Tensor):  # the first fields need no tensor
            folded = absorb_integer(folded, field)
        else:
            # Filled on the device: a copy from a CPU would wait for a GPU.
            state = torch.full((), folded, dtype=torch.int64, device=device) if state is None else state
            state = absorb(state, field)
    return torch.tensor(folded, device=device) if state is None else state


@outside_of_graphs
def fresh_keys(n: int, device: torch.device | str | None = None) -> Tensor:
    """Keys ``(n,)`` that nobody can predict: from the operating system, not from a generator that can be reseeded.

    Raises:
        ItoError: under ``torch.jit.trace``, as the traced model would repeat the same noise for ever.
    """
    if torch.jit.is_tracing():
        raise ItoError("Fresh noise cannot be traced: the traced model would repeat it for ever; trace model(x, keys).")
    seed = secrets.randbits(63)
    return make_keys(seed, "fresh", index=torch.arange(n, device=device))


@dataclass(frozen=True)
class PathRange:
    """A range of numbered paths for each of some images; it is all that is needed to draw their noise, now or again.

    Path number ``q`` belongs to member ``q % members`` of an ensemble, and is its inference number ``q // members``.
    So any range is spread evenly over the members, and a path has the same noise in whatever range it is asked for.

    Attributes:
        seed, purpose: as in `make_keys`.
        index: int64 ``(N,)``, the images' names.
        first, count: the range: paths ``first`` to ``first + count - 1`` of each image.

    Raises:
        ItoError: ``first`` is below 0, or ``count`` below 1.
    """

    seed: int
    purpose: str
    index: Tensor
    first: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        whole_number("first", self.first, 0)
        whole_number("count", self.count)

    def of(self, rows: Tensor | slice) -> PathRange:
        """The same range for some of the images."""
        return replace(self, index=self.index[rows])

    def by_member(self, members: int) -> Iterator[tuple[int, range, Tensor]]:
        """The range dealt out to ``members``; a member without a path in the range is left out.

        Yields:
            A member's number, the ``P`` positions of its paths in the range, and their keys, int64 ``(P, N)``.
        """
        paths = torch.arange(self.first, self.first + self.count, device=self.index.device)[:, None]
        keys = make_keys(self.seed, self.purpose, paths % members, paths // members, self.index)
        for member in range(members):
            positions = range((member - self.first) % members, self.count, members)
            if positions:
                yield member, positions, keys[positions.start :: members]
