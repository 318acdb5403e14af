"""An SDE, or a ResNet in disguise? What becomes of a network's accuracy when it is read on a finer grid.

A network that was trained at one step a block has learnt that step, not the limit of ever smaller ones (the question is
put to neural ODEs by Ott et al. 2021, https://arxiv.org/abs/2007.15386).
"""

from __future__ import annotations

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
        schedule, horizon, solver, steps: how it was read.
        trained: whether that is how it was trained, or handed over.
        correct: one inference an image.
        paired: the same images read as trained (first), and so (second).
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
    """Read networks on finer grids, by other solvers, schedules and horizons, each image along one path.

    Args:
        networks: recast networks by name; each one's own solver, steps, schedule and horizon are how it was trained.
        x, y: images ``(N, C, H, W)`` in [0, 1] and labels ``(N,)``.
        steps: steps a block, powers of two.
        solvers, schedules, horizons: what else to vary; default each network's own. A horizon rescales time: the
            noise-free flow stays, the noise follows the new clock.
        seed, index: name the paths.
    """
    y = check_labels(y, len(x))
    keys = make_keys(seed, "report", index=image_names(index, x))
    rows = torch.arange(len(x), device=x.device)
    readings = []
    for name, model in networks.items():
        own = (model.schedule.name, float(model.sdes[-1].t1), model.solver, model.steps)

        def right(schedule: str, horizon: float, solver: str, n: int, model: ItoResNet = model) -> Tensor:
            shape = tuple(x.shape[1:])
            read = recast(model, model.schedule.omega, schedule, solver, n, horizon, shape)  # type: ignore[arg-type]
            return winners(infer(quicken(read), x, rows, keys)) == y

        trained = right(*own)
        for schedule in schedules or own[:1]:
            for horizon in horizons or own[1:2]:
                for solver in solvers or own[2:3]:
                    for n in steps:
                        found = right(schedule, horizon, solver, n)
                        readings.append(
                            Reading(
                                name,
                                schedule,
                                horizon,
                                solver,
                                n,
                                (schedule, horizon, solver, n) == own,
                                Rate.of(int(found.sum()), len(y)),
                                Paired.of(trained, found),
                            )
                        )
    return readings


def verdicts(readings: Sequence[Reading]) -> list[str]:
    """For each network, in words: does it keep its accuracy on the finest grid, by its own solver and noise?"""
    said = []
    for name in dict.fromkeys(reading.network for reading in readings):
        mine = [reading for reading in readings if reading.network == name]
        own = next((reading for reading in mine if reading.trained), None)
        if own is None:
            continue
        place = (own.schedule, own.horizon, own.solver)
        same = [r for r in mine if (r.schedule, r.horizon, r.solver) == place]
        finest = max(same, key=lambda reading: reading.steps)
        if finest.steps <= own.steps:
            continue
        p = "p < 0.001" if finest.paired.p < 0.001 else f"p = {finest.paired.p:.2g}"
        values = (
            f"{100 * own.correct.value:.1f} % at the {own.steps} step{'s' * (own.steps > 1)} a block it was trained "
            f"with, {100 * finest.correct.value:.1f} % at {finest.steps} ({p}, paired)"
        )
        if finest.paired.p < 0.05 and finest.correct.value < own.correct.value:
            said.append(f"{name}: {values}. It is tied to its grid: a ResNet with noise, not an SDE.")
        else:
            said.append(f"{name}: {values}. No loss is shown on these images, as for an SDE.")
    return said
