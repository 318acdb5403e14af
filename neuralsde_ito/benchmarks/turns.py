"""Long measurements side by side, a little of each in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
Pause = Callable[[], None]


def in_turns(cases: dict[str, Callable[[Pause], Result]], device: torch.device) -> dict[str, tuple[Result, float]]:
    """Run long cases side by side, but one at a time: whoever calls his ``pause()`` lets the next one go on.

    Each case has a thread. So what disturbs the machine for a minute disturbs all of them.

    Returns:
        What each case returned, and the seconds that it was not paused.
    """
    go = {name: threading.Semaphore(0) for name in cases}
    row = list(cases)  # those that have not ended; the first one runs
    spent = dict.fromkeys(cases, 0.0)
    found: dict[str, Result] = {}
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
            row.append(row.pop(0))
            go[row[0]].release()
            began = begin()

        began = begin()
        try:
            found[name] = cases[name](pause)
            stop()
        except BaseException as error:
            errors.append(error)
        row.pop(0)
        if row:
            go[row[0]].release()

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in cases]
    for thread in threads:
        thread.start()
    go[row[0]].release()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {name: (found[name], spent[name]) for name in cases}
