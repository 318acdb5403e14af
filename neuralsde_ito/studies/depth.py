"""An SDE, or a ResNet in disguise? A network's accuracy when it is solved on a finer grid.

A network that was trained at one step a block may have learnt that step only, and not the limit of ever smaller steps.
Ott et al. 2021 (https://arxiv.org/abs/2007.15386) ask the same of neural ODEs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.inference import infer, quicken
from ..models.recast import ItoResNet, recast
from ..models.votes import winners
from ..noise.keys import make_keys
from ..outcomes import Paired, Rate
from ..validation import check_labels, image_names


@dataclass(frozen=True)
class Reading:
    """A network's accuracy on one grid.

    Attributes:
        network: its name.
        schedule: the noise, a name in `SCHEDULES`.
        horizon: the end of time; it starts at 0.
        solver: a name in `SOLVERS`.
        steps: steps a block.
        trained: whether all of these are the network's own, with which it was trained.
        correct: share of right labels, one inference an image.
        paired: McNemar's test on the same images, the network as trained (first) and on this grid (second).
    """

    network: str
    schedule: str
    horizon: float
    solver: str
    steps: int
    trained: bool
    correct: Rate
    paired: Paired


@torch.no_grad()
def read_depths(
    networks: Mapping[str, ItoResNet],
    x: Tensor,
    y: Tensor,
    steps: Sequence[int] = (1, 2, 4, 8, 16),
    solvers: Sequence[str] | None = None,
    schedules: Sequence[str] | None = None,
    horizons: Sequence[float] | None = None,
    seed: int = 0,
    index: Tensor | None = None,
) -> list[Reading]:
    """Measure the accuracy of networks on finer grids, with other solvers, schedules and horizons.

    Each image has one Brownian path for all readings.

    Args:
        networks: recast networks by name. Their own solver, steps, schedule and horizon are those of training.
        x: images ``(N, C, H, W)`` in [0, 1].
        y: labels ``(N,)``.
        steps: steps a block, powers of two.
        solvers, schedules: names to try; default: the network's own.
        horizons: ends of time to try; default: the network's own. Another horizon rescales time: the noise-free flow
            stays as it is, and the noise follows the new clock.
        seed, index: name the paths, as in `make_keys`; ``index`` is int64 ``(N,)``, default: positions in ``x``.

    Returns:
        For each network, schedule, horizon and solver a reading for each number of steps, in this order.

    Raises:
        ItoError: a name is unknown, steps are no power of two, or the labels do not fit the images.
    """
    y = check_labels(y, len(x))
    keys = make_keys(seed, "report", index=image_names(index, x))
    rows = torch.arange(len(x), device=x.device)

    def right(model: ItoResNet, schedule: str, horizon: float, solver: str, n: int) -> Tensor:
        """Which images get the right label, bool ``(N,)``."""
        channels, height, width = x.shape[1:]
        shape, sigma = (channels, height, width), model.input_sigma
        other = recast(model, model.schedule.omega, schedule, solver, n, horizon, shape, input_sigma=sigma)
        return winners(infer(quicken(other), x, rows, keys)) == y

    readings = []
    for name, model in networks.items():
        own = (model.schedule.name, float(model.sdes[-1].t1), model.solver, model.steps)
        trained = right(model, *own)
        grids = itertools.product(schedules or own[:1], horizons or own[1:2], solvers or own[2:3], steps)
        for grid in grids:
            correct = right(model, *grid)
            rate, paired = Rate.of(int(correct.sum()), len(y)), Paired.of(trained, correct)
            readings.append(Reading(name, *grid, trained=grid == own, correct=rate, paired=paired))
    return readings


def verdicts(readings: Sequence[Reading]) -> list[str]:
    """A sentence for each network: whether it keeps its accuracy on the finest grid, with its own solver and noise.

    A network gets none if it was not read as trained, or on no finer grid.
    """
    sentences = []
    for name in dict.fromkeys(reading.network for reading in readings):
        of_network = [reading for reading in readings if reading.network == name]
        own = next((reading for reading in of_network if reading.trained), None)
        if own is None:
            continue
        setting = (own.schedule, own.horizon, own.solver)
        finest = max(
            (r for r in of_network if (r.schedule, r.horizon, r.solver) == setting), key=lambda reading: reading.steps
        )
        if finest.steps <= own.steps:
            continue
        p = "p < 0.001" if finest.paired.p < 0.001 else f"p = {finest.paired.p:.2g}"
        values = (
            f"{100 * own.correct.value:.1f} % at the {own.steps} step{'s' * (own.steps > 1)} a block it was trained "
            f"with, {100 * finest.correct.value:.1f} % at {finest.steps} ({p}, paired)"
        )
        if finest.paired.p < 0.05 and finest.correct.value < own.correct.value:
            sentences.append(f"{name}: {values}. It is tied to its grid: a ResNet with noise, not an SDE.")
        else:
            sentences.append(f"{name}: {values}. No loss is shown on these images, as for an SDE.")
    return sentences
