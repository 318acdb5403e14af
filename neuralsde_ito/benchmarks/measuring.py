"""How times are measured: side by side in one process, and given as ratios."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

from .. import kernels
from .record import Row


def interleaved(part: str, cases: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> list[Row]:
    """Call each case once to warm up, then all cases in turn, ``repeats`` times.

    So a disturbance of the machine falls on all cases, and the ratios hold. The rows' notes say how often a call
    touched memory that the system had to provide first (page faults): the same network takes up to twice as long where
    its allocator hands memory back after each layer.

    Args:
        part: the rows' part.
        cases: by name; the first one is what the ratios refer to.
        repeats: timed calls of each case.
        device: is waited for after each call.
    """

    def clock(case: Callable[[], object]) -> float:
        start = time.perf_counter()
        case()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    cold = {name: clock(case) for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    faults: dict[str, list[int]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            before = _page_faults()
            times[name].append(clock(case))
            faults[name].append(_page_faults() - before)
    first = next(iter(times.values()))

    def row(name: str) -> Row:
        ratios = [a / b for a, b in zip(times[name], first, strict=True)]
        quartiles = None
        if repeats > 1:
            low, _, high = statistics.quantiles(ratios, method="inclusive")
            quartiles = low, high
        seconds, ratio = statistics.median(times[name]), statistics.median(ratios)
        thousands = statistics.median(faults[name]) / 1000
        note = f"{1000 * round(thousands):,} page faults" if thousands >= 0.5 and device.type == "cpu" else ""
        return Row(part, name, seconds, ratio, cold[name], note, quartiles)

    return [row(name) for name in cases]


def _page_faults() -> int:
    """How often this process has touched memory that the system had to provide first; 0 where that is not told."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def machine(device: torch.device) -> Iterator[str]:
    """What the figures are measured on: processor or GPU, and PyTorch's version."""
    if device.type == "cuda":
        yield torch.cuda.get_device_name(device)
    else:
        yield f"{torch.get_num_threads()} CPU threads ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
        if kernels.library is None:
            yield "noise without the compiled pass"
    yield f"PyTorch {torch.__version__}"
