"""Peak memory of a gradient of the input, each measured in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from ..models.recast import recast
from ..models.resnets import load_resnet
from ..noise.keys import make_keys
from .record import Row

_SCRIPT = """
import sys
from neuralsde_ito.benchmarks.memory import gradient_peak
print(gradient_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True", sys.argv[5]))
"""


def gradient_peak(arch: str, batch: int, steps: int, checkpoint: bool, device: str) -> float:
    """MiB that one gradient of the input adds to the peak of this process, which should be a fresh one.

    Args:
        arch: a name in `ARCHITECTURES`; the weights are random, the images ``(batch, 3, 32, 32)``.
        batch: number of images.
        steps: solver steps a block.
        checkpoint: whether each step is computed again in the backward pass.
        device: as for ``torch.device``.
    """
    model = recast(load_resnet(arch), omega=0.2, steps=steps, checkpoint=checkpoint).eval().to(device)
    model.requires_grad_(False)

    def gradient(n: int) -> None:
        x = torch.rand(n, 3, 32, 32, device=device).requires_grad_()
        keys = make_keys(0, "gradient", index=torch.arange(n, device=device))
        torch.autograd.grad(model(x, keys).sum(), x)

    gradient(2)  # libraries that load at first use
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        gradient(batch)
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    before = _peak_of_process()
    gradient(batch)
    return _peak_of_process() - before


def _peak_of_process() -> float:
    """MiB. On Linux not ``ru_maxrss``, which a process inherits from the one that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
        )
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bench_memory(arch: str, batch: int, device: torch.device, steps: tuple[int, ...] = (1, 16, 64)) -> list[Row]:
    """Peak memory of a gradient: plain at one step a block, then checkpointed at each of ``steps``.

    Args:
        arch, batch: see `gradient_peak`.
        device: where the gradient is computed.
        steps: solver steps a block.

    Returns:
        Rows whose ``seconds`` are MiB.

    Raises:
        RuntimeError: a process failed; the message has the last line of its error.
    """
    rows: list[Row] = []
    for n, checkpoint in [(1, False), *((n, True) for n in steps)]:
        command = [sys.executable, "-c", _SCRIPT, arch, str(batch), str(n), str(checkpoint), str(device)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise RuntimeError(f"The measurement of memory failed: {done.stderr.strip().splitlines()[-1]}")
        peak = float(done.stdout)
        name = f"gradient, {n} step{'s' * (n > 1)} a block, {'checkpointed' if checkpoint else 'plain'}"
        rows.append(Row("memory", name, peak, peak / (rows[0].seconds if rows else peak)))
    return rows
