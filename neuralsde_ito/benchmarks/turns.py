"""Long measurements side by side: each runs for a little while, then the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
Pause = Callable[[], None]


def run_in_turns(cases: dict[str, Callable[[Pause], Result]], device: torch.device) -> dict[str, tuple[Result, float]]:
    """Run long cases one at a time, in turns: a case that calls its ``pause()`` lets the next one go on.

    Each case has its own thread. A disturbance of the machine that lasts for a minute falls on all cases.

    Args:
        cases: by name; each is called with its ``pause``.
        device: is waited for at each pause.

    Returns:
        For each case its result, and the seconds that it ran.

    Raises:
        BaseException: the first error of a case, after all others have ended.
    """
    go = {name: threading.Semaphore(0) for name in cases}
    queue = list(cases)  # cases that have not ended; the first one runs
    spent = dict.fromkeys(cases, 0.0)
    results: dict[str, Result] = {}
    errors: list[BaseException] = []

    def run(name: str) -> None:
        began = 0.0

        def begin() -> float:
            go[name].acquire()
            return time.perf_counter()

        def stop() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent[name] += time.perf_counter() - began

        def pause() -> None:
            nonlocal began
            stop()
            queue.append(queue.pop(0))
            go[queue[0]].release()
            began = begin()

        began = begin()
        try:
            results[name] = cases[name](pause)
            stop()
        except BaseException as error:
            errors.append(error)
        queue.pop(0)
        if queue:
            go[queue[0]].release()

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in cases]
    for thread in threads:
        thread.start()
    go[queue[0]].release()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {name: (results[name], spent[name]) for name in cases}
