"""What pieces of work cost on this machine: measured once, and corrected while the work goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from ..attacks.objectives import OBJECTIVES
from ..attacks.targets import EnsembleTarget
from ..models.ensemble import ItoEnsemble
from ..models.inspection import as_called
from ..noise.keys import PathRange, make_keys
from ..runs.build import build_resnet, recast_as
from ..runs.config import Config
from .declared import DataName
from .laboratory import Laboratory
from .pieces import Piece, Work

_IMAGES = 16  # on which a network is timed


def weight(piece: Piece) -> float:
    """How dear a piece is beside others, the same on every machine, so that processes agree on who does what."""
    work = piece.work
    return 3 * work.gradients + work.queries + 8 * work.trained + 1


@dataclass
class Costs:
    """Estimates of time.

    Attributes:
        each: for each network the seconds of a gradient, of a query and of an image of a training step.
        spent, expected: for each kind of piece that is done, seconds that it took, and seconds that were expected.
    """

    each: dict[str, tuple[float, float, float]]
    spent: dict[str, float] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)

    @classmethod
    def measured(cls, lab: Laboratory, systems: Iterable[tuple[DataName, Config]]) -> Costs:
        """Time each network on a few images; ``systems`` are names of data sets and configurations."""
        each = {}
        for data, config in systems:
            if config.network.arch not in each:
                each[config.network.arch] = _timed(lab, data, config)
        return cls(each)

    def seconds(self, piece: Piece) -> float:
        """How long a piece is expected to take, by what such pieces took so far."""
        raw = self._raw(piece)
        before = self.expected.get(piece.kind, 0.0)
        return raw * self.spent[piece.kind] / before if before > 0 else raw

    def _raw(self, piece: Piece) -> float:
        gradient, query, trained = self.each.get(piece.network, (0.0, 0.0, 0.0))
        work: Work = piece.work
        return 0.02 + work.gradients * gradient + work.queries * query + work.trained * trained

    def learn(self, piece: Piece, seconds: float) -> None:
        """Remember how long a piece took."""
        self.spent[piece.kind] = self.spent.get(piece.kind, 0.0) + seconds
        self.expected[piece.kind] = self.expected.get(piece.kind, 0.0) + self._raw(piece)


def _timed(lab: Laboratory, data: DataName, config: Config) -> tuple[float, float, float]:
    """Seconds of one gradient, one query, and one image of a training step, by a network with random weights."""
    images = lab.dataset(data)
    index, x, y = next(iter(images.test.first(_IMAGES).batches(_IMAGES, lab.device)))
    model = recast_as(config, build_resnet(config, images)).to(lab.device)
    keys = make_keys(0, "train", index=index)

    def step() -> None:
        F.cross_entropy(model(x, keys), y).backward()

    trained = _seconds(step) / len(x)
    model.eval()
    ensemble = ItoEnsemble([model], 20)
    query = _seconds(lambda: ensemble.predict(x, full=True)) / (20 * len(x))
    with as_called(ensemble):
        target = EnsembleTarget(ensemble)
        paths = PathRange(0, "gradient", index, 0, 8)
        gradient = _seconds(lambda: target.ascend(OBJECTIVES["mean-loss"], x, y, paths)) / (8 * len(x))
    return gradient, query, trained


def _seconds(work: Callable[[], object]) -> float:
    """The time of the second of two calls: the first one compiles, folds and fills caches."""
    work()
    begun = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - begun
