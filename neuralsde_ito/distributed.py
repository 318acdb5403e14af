"""One command as several processes, started by ``torchrun`` or ``accelerate launch``: which is this, and what have all.

Each process does a share of the work and gathers what the others have made. Only results are exchanged, tensors on the
CPU, so the processes talk over gloo on every device, and two of them may share a GPU. accelerate is imported only
where several processes were started.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .validation import ItoError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

    from .data import Split

Thing = TypeVar("Thing")
_LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun's, and those of MPI
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_MEETING = timedelta(minutes=5)  # in which all processes must have started
_FAILED = "failed"  # the key under which processes that fail are counted


class Lost(RuntimeError):
    """Another process of this command has failed or ended; what it made will not come."""


@dataclass(frozen=True)
class World:
    """The processes of one command.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1
    _store: Store | None = field(default=None, repr=False)
    _meetings: itertools.count = field(default_factory=itertools.count, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is process 0, the only one that prints, and that writes results."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes are here.

        Raises:
            Lost: another process has failed.
        """
        if self._store is None:
            return
        # A wait inside gloo would hear neither of a process that failed nor of a signal: ask, and sleep, by turns.
        meeting, pause = f"meeting {next(self._meetings)}", 0.002
        try:
            self._store.add(meeting, 1)
            while self._store.add(meeting, 0) < self.size:
                if self._store.add(_FAILED, 0):
                    raise Lost("Another process of this command has failed.")
                time.sleep(pause)
                pause = min(0.2, 1.5 * pause)
        except Lost:
            raise
        except RuntimeError as error:  # the process that holds the store has ended
            raise Lost("Process 0 of this command has ended.") from error

    def leave(self) -> None:
        """Wait until all processes are done; process 0, which may hold the store in which they meet, leaves last.

        Raises:
            Lost: another process has failed.
        """
        self.barrier()
        if self._store is None:
            return
        self._store.add("left", int(not self.first))
        deadline = time.monotonic() + 10
        while self.first and self._store.add("left", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)

    def gather(self, thing: Thing) -> list[Thing]:
        """What each process gives, in the order of their ranks, in all processes.

        Args:
            thing: anything that can be pickled, with its tensors on the CPU. All processes must call this.

        Raises:
            Lost: another process has failed.
        """
        if self._store is None:
            return [thing]
        self.barrier()
        from accelerate.utils import gather_object

        try:
            return gather_object([thing])
        except RuntimeError as error:
            raise Lost("Another process of this command has ended.") from error

    def gather_lists(self, things: Sequence[Thing]) -> list[Thing]:
        """The things of all processes in one list: first those of process 0."""
        return [thing for part in self.gather(list(things)) for thing in part]

    def share(self, data: Split) -> Split:
        """The images of this process: all images cut into as many runs of neighbours as there are processes."""
        if self.size == 1:
            return data
        first, last = (len(data) * rank // self.size for rank in (self.rank, self.rank + 1))
        return data.part(first, last)

    def pieces(self, n: int, size: int) -> int:
        """How many images a piece has, if ``n`` images are cut into pieces of at most ``size``.

        As many pieces for each process, as far as possible; with one process, the pieces are as large as they may be.
        """
        if self.size == 1:
            return size
        rounds = -(-n // (size * self.size))
        return -(-n // (rounds * self.size))

    def own(self, things: Sequence[Thing]) -> list[Thing]:
        """The things of this process: they are dealt out like cards."""
        return list(things[self.rank :: self.size])

    def dealt(self, things: Sequence[Thing]) -> list[Thing]:
        """All things of all processes, which hold them as `own` has dealt them out, in their order."""
        hands = self.gather(list(things))
        return [hands[at % self.size][at // self.size] for at in range(sum(map(len, hands)))]

    def check_complete(self, index: Tensor, data: Split) -> None:
        """Refuse gathered results unless they are of each image exactly once, in order.

        Args:
            index: int64 ``(N,)``, the names of the images whose results were gathered.
            data: all images.

        Raises:
            RuntimeError: an image is missing, is there twice, or is at another place.
        """
        if self.size == 1:
            return
        names = list(range(len(data))) if data.names is None else data.names.tolist()
        if index.tolist() != names:
            raise RuntimeError(
                f"{self.size} processes gave {len(index)} results of {len(set(index.tolist()))} images; "
                f"there are {len(names)}."
            )


ALONE = World()
_world = ALONE


def launched() -> int:
    """How many processes a launcher has started, by its environment variables; 1 without a launcher."""
    return int(_first_set(_LAUNCHERS, "1"))


def world() -> World:
    """The processes of this command. Where several were started, the first call meets the others.

    Raises:
        ItoError: accelerate is not installed, the port is in use, or the others do not come.
    """
    global _world
    if _world is ALONE and launched() > 1:
        _world = _meet(int(_first_set(_RANKS, "0")), launched())
    return _world


def is_first_to_fail() -> bool:
    """Tell the others that this process has failed; whether it is the first one, which says why."""
    try:
        return _world._store is None or _world._store.add(_FAILED, 1) == 1
    except RuntimeError:  # nobody is left to be told
        return True


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(_first_set(("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"), "0"))


def _first_set(names: Sequence[str], default: str) -> str:
    """The first of these environment variables that is set."""
    return next((os.environ[name] for name in names if os.environ.get(name)), default)


def _meet(rank: int, size: int) -> World:
    """Find the other processes."""
    import torch.distributed as dist

    address, port = os.environ.setdefault("MASTER_ADDR", "127.0.0.1"), os.environ.setdefault("MASTER_PORT", "29500")
    try:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=_MEETING))
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise ItoError(
                f"Port {port} is in use on {address}; give the launcher another one: torchrun --master-port, "
                "accelerate launch --main_process_port, or MASTER_PORT."
            ) from None
        raise ItoError(f"Process {rank} of {size} did not find process 0 at {address}:{port}.") from error
    made = World(rank, size, dist.PrefixStore("ito-sde", store))
    _join_group(made, store)
    return made


def _join_group(made: World, store: Any) -> None:
    """Let accelerate make the group in which tensors are exchanged."""
    global _world
    _world = made  # also if accelerate is missing: one process says so, not all
    try:
        from accelerate import PartialState
    except ImportError:
        raise ItoError(
            f"{made.size} processes need accelerate: pip install 'ito-sde[distributed]', or start one process."
        ) from None
    state = PartialState(cpu=True, store=store, timeout=timedelta(days=1))
    atexit.register(state.destroy_process_group)  # else its threads outlive Python, and abort the process
