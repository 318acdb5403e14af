"""The strongest honest attack: a sequence of attacks, weak and cheap ones first, each on what the last ones left.

It looks for two worst cases of every image, denial (no right answer) and evasion (a wrong one). Votes on noise of the
selection decide when an image has fallen and which candidate is kept. Only then, once a radius, the report votes on
what was kept: an attack that is chosen by the report's own noise looks stronger than it is (measured: 22 % instead of
38 % of digits at L-inf 0.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..files import write_atomically
from ..models.ensemble import ItoEnsemble
from ..outcomes import WorstCase
from ..validation import ItoError, nearest, shown, whole_number
from .apgd import APGD
from .base import Attack
from .panels import GOALS
from .pgd import PGD
from .selection import NOISES, Selection, joined_cases, report_votes, worst_labels
from .square import Square
from .targets import KnownPaths, Target

_COUNTS = ("attacked", "fooled", "queries", "gradients", "blind")  # of each attack


@dataclass(frozen=True)
class Step:
    """One attack of a suite.

    Attributes:
        name: what tables call it.
        attack: its settings.
        through: the network whose gradients it takes: ``itself`` or a surrogate's name.
        warm: whether it begins at what the steps before it have kept.
    """

    name: str
    attack: Attack
    through: str = "itself"
    warm: bool = False


def standard(norm: str, eps: float, noisy: bool, effort: float = 1.0) -> list[Step]:
    """The steps of the suite ``standard``.

    For a randomised ensemble at most 1,415 gradients an image, and as many again for evasion where the ensemble
    abstains; for a deterministic network what AutoAttack's ``standard`` has in APGD and Square, in a cheaper order.

    Args:
        norm, eps: the ball.
        noisy: whether the model is randomised.
        effort: scales the numbers of iterations; above 0.

    Raises:
        ItoError: an effort that is not a positive number.
    """
    if not (isinstance(effort, int | float) and 0 < effort < math.inf):
        raise ItoError(f"effort must be a positive number, got {shown(effort)}.")

    def n(steps: int) -> int:
        return max(1, round(effort * steps))

    def rise(steps: int, objective: str) -> PGD:
        # Many steps of few paths, averaged by the momentum: at omega 1, 100 steps of 4 paths leave fewer images so
        # than 100 steps of 20 paths do without it (docs/results.md).
        return PGD(norm, eps, steps, eot=8, objective=objective, targets=3, momentum=0.9)

    if noisy:
        # What fools a surrogate by a hair seldom fools the ensemble: transfers go on to the end.
        return [
            Step("transfer, ResNet", PGD(norm, eps, n(20), stop=False), "resnet"),
            Step("transfer, noise-free", PGD(norm, eps, n(20), stop=False), "noise-free"),
            Step(
                "transfer, targeted DLR",
                APGD(norm, eps, n(30), objective="targeted-dlr", targets=9, stop=False),
                "noise-free",
            ),
            Step("PGD, mean logits", rise(n(60), "mean-logits")),
            Step("PGD, targeted DLR", rise(n(12), "targeted-dlr")),
            Step("PGD, mean loss", rise(n(15), "mean-loss"), warm=True),
            Step("denial of the vote", rise(n(8), "denial"), warm=True),
            Step("targeted votes", rise(n(6), "targeted-vote"), warm=True),
            Step("Square", Square(norm, eps, n(10)), warm=True),
        ]
    return [
        Step("PGD, cross-entropy", PGD(norm, eps, n(20))),
        Step("APGD, cross-entropy", APGD(norm, eps, n(100), objective="mean-loss")),
        Step("APGD, DLR", APGD(norm, eps, n(100))),
        Step("APGD, targeted DLR", APGD(norm, eps, n(100), objective="targeted-dlr", targets=9)),
        Step("Square", Square(norm, eps, n(5000))),
    ]


@dataclass(frozen=True)
class SuiteResult:
    """A suite at one radius.

    Attributes:
        eps: the radius.
        denial, evasion: the two worst cases; labels and votes are empty until the report has voted, after the last
            attack of the radius. Sources number the attacks through all radii up to this one.
        attacked, fooled: of each attack at this radius, first the steps for denial, then the same steps for evasion:
            images that it was run on, and images that fell to it by the selection's votes.
        queries, gradients: inferences of each attack without and with a gradient.
        blind: images of each attack at which some gradient was not finite.
    """

    eps: float
    denial: WorstCase
    evasion: WorstCase
    attacked: tuple[int, ...]
    fooled: tuple[int, ...]
    queries: tuple[int, ...]
    gradients: tuple[int, ...]
    blind: tuple[int, ...] = ()


@dataclass
class Suite:
    """A sequence of attacks on an ensemble.

    Attributes:
        steps: from a radius to the sequence at that radius; `standard` or one's own.
        surrogates: the networks that ``through`` names.
        noise: ``fresh`` (the defender draws anew for every image and the attacker cannot know), ``fixed`` (the
            defender has one set of paths for all images, which the attacker does not know) or ``known`` (he does).
        repeat: how often a persistent attacker may ask about each image; one wrong answer is enough for him.
        seed: of all panels.
        state: a folder in which every finished attack on every batch is kept, and found again after a kill.
    """

    steps: Callable[[float], Sequence[Step]]
    surrogates: dict[str, nn.Module] = field(default_factory=dict)
    noise: str = "fresh"
    repeat: int = 1
    seed: int = 0
    state: Path | None = None

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise ItoError(nearest("noise model", self.noise, NOISES))
        self.repeat = whole_number("repeat", self.repeat)

    def votes(self, ensemble: ItoEnsemble, x: Tensor, index: Tensor) -> Tensor:
        """The report's votes ``(repeat, members, N, classes)``, see `report_votes`."""
        names = torch.zeros_like(index) if self.noise == "fixed" else index
        return report_votes(ensemble, x, self.seed, names, self.repeat)

    def decide(self, ensemble: ItoEnsemble, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """The report's decisions ``(N,)``: the worst of ``repeat`` votes, wrong before abstained before right."""
        return worst_labels(self.votes(ensemble, x, index), y, ensemble.rule, ensemble.inferences)

    def run(
        self, ensemble: ItoEnsemble, x: Tensor, y: Tensor, index: Tensor, radii: Sequence[float], name: str = "0"
    ) -> Iterator[tuple[Step, SuiteResult]]:
        """Attack one batch of images, at rising radii; images, never labels, are carried to the next radius.

        At every radius the steps attack what has not fallen to denial. Then the same steps go on with evasion as
        their goal where an image fell without a wrong answer, from the best candidate for it.

        Args:
            ensemble: the defender.
            x, y, index: images ``(N, C, H, W)`` in [0, 1], true labels and names ``(N,)``.
            radii: rising, in pixel units.
            name: of the batch, in the state.

        Yields:
            After every attack: the step, and how its radius stands so far.

        Raises:
            ItoError: radii that do not rise: an image found in a larger ball would compete in a smaller one.
        """
        if any(small >= large for small, large in itertools.pairwise(radii)):
            raise ItoError(f"Radii must rise from one to the next, got {shown(list(radii))}; sort them.")
        chosen = Selection(ensemble, x, y, index, self.seed, self.noise, self.repeat)
        chosen.restore(self._once(f"{name}-clean", chosen.begin))
        since = 0  # attacks at smaller radii
        for eps in radii:
            attacks = [(goal, step) for goal in GOALS for step in self.steps(eps)]
            count = torch.zeros(len(_COUNTS), len(attacks), dtype=torch.int64)
            for number, (goal, step) in enumerate(attacks):
                done = partial(self._attack, chosen, x, goal, step, number, since, count)
                state = self._once(f"{name}-{eps!r}-{number}", done)
                count = state.pop("count")
                chosen.restore(state)
                last = number == len(attacks) - 1
                votes = self._once(f"{name}-{eps!r}-report", chosen.vote) if last else None
                counts = (tuple(row) for row in count.tolist())
                yield step, SuiteResult(eps, *chosen.worst_cases(votes), *counts)
            since += len(attacks)

    def _attack(
        self, chosen: Selection, x: Tensor, goal: str, step: Step, number: int, since: int, count: Tensor
    ) -> dict[str, Tensor]:
        """Run one attack on what stands, and give all that is to be kept of it."""
        rows, count = chosen.standing(goal), count.clone()
        if len(rows):
            start = chosen.held[goal].images[rows] if step.warm or goal == "evasion" else None
            attack, model = replace(step.attack, goal=goal), self._through(step, chosen.ensemble, x)
            found = attack.run(model, x[rows], chosen.y[rows], self.seed, chosen.index[rows], start)
            fallen = chosen.meet(rows, found.images, since + number, since)[goal]
            values = (len(rows), int(fallen.sum()), found.queries, found.gradients, int(found.blind.sum()))
            count[:, number] = torch.tensor(values)
        return {"count": count, **chosen.state()}

    def _through(self, step: Step, ensemble: ItoEnsemble, x: Tensor) -> nn.Module | Target:
        if step.through != "itself":
            if step.through not in self.surrogates:
                raise ItoError(nearest("surrogate", step.through, self.surrogates))
            return self.surrogates[step.through]
        return KnownPaths(ensemble, x, self.seed) if self.noise == "known" else ensemble

    def _once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives; found again in the state, if there is one, when it was made before."""
        if self.state is None:
            return make()
        file = self.state / f"{name}.safetensors"
        if file.is_file():
            return load_file(file)
        made = make()
        self._keep(file, made)
        return made

    @staticmethod
    def _keep(file: Path, tensors: dict[str, Tensor]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Copies: safetensors refuses tensors that share memory, as the votes of two equal worst cases do.
        write_atomically(file, safetensors_bytes({k: v.cpu().clone().contiguous() for k, v in tensors.items()}))


def joined(parts: Sequence[SuiteResult]) -> SuiteResult:
    """Batches of one radius as one."""

    def sums(what: str) -> tuple[int, ...]:
        return tuple(map(sum, zip(*(getattr(part, what) for part in parts), strict=True)))

    denial, evasion = joined_cases([part.denial for part in parts]), joined_cases([part.evasion for part in parts])
    return SuiteResult(parts[0].eps, denial, evasion, *map(sums, _COUNTS))
