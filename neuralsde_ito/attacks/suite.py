"""The strongest honest attack: a sequence of attacks, weak and cheap ones first, each on what the last ones left.

It looks for two worst cases of every image, denial (no right answer) and evasion (a wrong answer). Votes on noise of
the selection decide when a goal is reached and which candidate is kept. Only then, once a radius, the report votes on
what was kept: an attack that the report's own noise chooses looks stronger than it is (measured: 22 % instead of 38 %
of digits at L-inf 0.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..files import write_atomically
from ..models.vote import as_voter
from ..outcomes import WorstCase
from ..validation import ItoError, one_of, shown
from .apgd import APGD
from .base import Attack
from .images import Images
from .other_noise import OtherNoise, fixed_noise, from_tensors, join_noises, known_noise, to_tensors
from .panels import GOALS
from .pgd import PGD
from .report import Report
from .selection import Selection, join_cases
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
        warm: whether it begins at the best candidates of the steps before it.
        barely: whether it goes on with images that are fooled, but barely, see `Selection.to_attack`.
    """

    name: str
    attack: Attack
    through: str = "itself"
    warm: bool = False
    barely: bool = False


def standard(norm: str, eps: float, noisy: bool, effort: float = 1.0) -> list[Step]:
    """The steps of the suite ``standard``.

    A randomised ensemble gets at most 719 gradients an image, and as many again for evasion where it abstains. A
    deterministic network gets a search with shrinking steps and the APGD of AutoAttack's ``standard`` (Croce and Hein
    2020, https://arxiv.org/abs/2003.01690). Square comes last, and goes on only where it finds what gradients missed.

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

    def rise(steps: int) -> PGD:
        # The momentum averages many steps of few paths. Long steps first, short ones last: pixels must be able to cross
        # the ball, and the end is a polish. No image leaves early: what barely fools the selection may fail the report.
        return PGD(norm, eps, steps, eot=8, objective="mean-logits", stop=False, momentum=0.9, decay=True)

    if noisy:
        # What barely fools a surrogate seldom fools the ensemble: transfers do not stop early. The targeted one does:
        # where no noise is left to fool, its many attempts would be for nothing.
        return [
            Step("transfer, ResNet", PGD(norm, eps, n(20), stop=False, decay=True), "resnet"),
            Step("transfer, noise-free", PGD(norm, eps, n(20), stop=False, decay=True), "noise-free"),
            Step("transfer, targeted DLR", APGD(norm, eps, n(30), objective="targeted-dlr", targets=9), "noise-free"),
            Step("PGD, mean logits", rise(n(25)), barely=True),
            Step("PGD from the best", rise(n(25)), warm=True, barely=True),
            Step("Square", Square(norm, eps, n(200), eot=8, patience=n(10)), warm=True),
        ]
    return [
        # Long steps first, short ones last: most images fall at a fifth of the cost of APGD.
        Step("PGD, cross-entropy", PGD(norm, eps, n(20), decay=True)),
        Step("APGD, cross-entropy", APGD(norm, eps, n(100), objective="mean-loss")),
        Step("APGD, targeted DLR", APGD(norm, eps, n(50), objective="targeted-dlr", targets=9)),
        Step("Square", Square(norm, eps, n(5000), patience=n(200)), warm=True),
    ]


def with_known_paths(norm: str, eps: float, effort: float = 1.0) -> Attack:
    """The short attack of the suite ``standard`` that knows the report's paths: at most 200 gradients an image."""
    steps = max(1, round(10 * effort))
    return PGD(norm, eps, steps, objective="mean-logits", momentum=0.9, stop=False)


@dataclass(frozen=True)
class SuiteResult:
    """A suite at one radius.

    The counts are those of each attack at this radius: first the steps for denial, then the same steps for evasion.

    Attributes:
        eps: the radius, in pixel units.
        denial, evasion: the two worst cases; until the report has voted, their labels and votes are empty. It votes
            after the last attack of the radius. Sources number the attacks through all radii up to this one.
        attacked: images that the attack was run on.
        fooled: images among them on which the goal is reached after it, by votes of the selection.
        queries, gradients: its inferences without and with a gradient.
        blind: images at which some gradient was not finite.
        noises: ``fixed`` and ``known``, what is left under these noise models; empty until the report has voted, and
            where the suite is not asked for them.
    """

    eps: float
    denial: WorstCase
    evasion: WorstCase
    attacked: tuple[int, ...]
    fooled: tuple[int, ...]
    queries: tuple[int, ...]
    gradients: tuple[int, ...]
    blind: tuple[int, ...] = ()
    noises: dict[str, OtherNoise] = field(default_factory=dict, kw_only=True)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Of each attack, the images on which it did not reach its goal."""
        return tuple(attacked - fooled for attacked, fooled in zip(self.attacked, self.fooled, strict=True))


def check_rising(radii: Sequence[float]) -> None:
    """Refuse radii that do not rise: an image made in a larger ball would compete in a smaller one.

    Raises:
        ItoError: they do not rise.
    """
    if any(small >= large for small, large in itertools.pairwise(radii)):
        raise ItoError(f"Radii must rise from one to the next, got {shown(list(radii))}; sort them.")


@dataclass
class Suite:
    """A sequence of attacks on an ensemble; `SuiteSettings.suite` makes the standard one.

    Attributes:
        steps: from a radius to the sequence at that radius; `standard` or one's own.
        surrogates: the networks that ``through`` names, or targets that stand for one.
        noise, repeat: what the attacker knows of the report's paths and how often he may ask, see `Report`.
        seed: of all panels.
        state: a folder that keeps the result of every finished attack on every batch. After a kill, the same call
            takes finished results from it and makes the others.
        known: from a radius to the short attack that knows the report's paths, see `other_noise`. If it is given, the
            report is on fresh noise, and the model is random, `SuiteResult.noises` are made.
    """

    steps: Callable[[float], Sequence[Step]]
    surrogates: Mapping[str, nn.Module | Target] = field(default_factory=dict)
    noise: str = "fresh"
    repeat: int = 1
    seed: int = 0
    state: str | Path | None = None
    known: Callable[[float], Attack] | None = None

    def __post_init__(self) -> None:
        self.repeat = self.report.repeat

    @property
    def report(self) -> Report:
        """How the report votes."""
        return Report(self.seed, self.noise, self.repeat)

    def attack(self, ensemble: nn.Module, images: Images, radii: Sequence[float], name: str = "0") -> list[SuiteResult]:
        """`run` to its end: the result at each radius."""
        last = {result.eps: result for _, result in self.run(ensemble, images, radii, name)}
        return [last[eps] for eps in radii]

    def run(
        self, ensemble: nn.Module, images: Images, radii: Sequence[float], name: str = "0"
    ) -> Iterator[tuple[Step, SuiteResult]]:
        """Attack a batch at rising radii. The best candidates, not labels, are carried to the next radius.

        At every radius the steps attack the images that are not yet denied. Then the same steps go on with evasion as
        their goal where an image is denied without a wrong answer, from the best candidate for evasion.

        Args:
            ensemble: the defender; any other module than an ensemble votes as a `Vote`.
            images: the batch.
            radii: rising, in pixel units.
            name: of the batch, in the state.

        Yields:
            After every attack: its step, and the result at its radius so far.

        Raises:
            ItoError: radii that do not rise; no steps; an unknown surrogate.
        """
        check_rising(radii)
        sequences = {eps: self.steps(eps) for eps in radii}
        for eps, steps in sequences.items():
            if not steps:
                raise ItoError(f"The suite has no steps at eps {eps:g}.")
            for step in steps:
                one_of("surrogate", step.through, ("itself", *self.surrogates))
        selection = Selection(as_voter(ensemble), images, self.report)
        selection.restore(self._once(f"{name}-clean", selection.offer_clean))
        since = 0  # the number of attacks at smaller radii
        for eps, steps in sequences.items():
            attacks = [(goal, step) for goal in GOALS for step in steps]
            counts = torch.zeros(len(_COUNTS), len(attacks), dtype=torch.int64, device="cpu")
            for number, (goal, step) in enumerate(attacks):
                attack = partial(self._attack, selection, goal, step, since + number, since)
                state = self._once(f"{name}-{eps!r}-{number}", attack)
                counts[:, number] = state.pop("counts")
                selection.restore(state)
                last = number == len(attacks) - 1
                votes = self._once(f"{name}-{eps!r}-report", selection.vote) if last else None
                columns = (tuple(row) for row in counts.tolist())
                result = SuiteResult(eps, *selection.worst_cases(votes), *columns)
                yield step, self._under_other_noise(selection, result, name) if last else result
            since += len(attacks)

    def _attack(self, selection: Selection, goal: str, step: Step, number: int, since: int) -> dict[str, Tensor]:
        """Run one attack; gives its counts and the selection's state after it."""
        rows = selection.to_attack(goal, step.barely)
        counts = torch.zeros(len(_COUNTS), dtype=torch.int64, device="cpu")
        if len(rows):
            start = selection.best[goal].images[rows] if step.warm or goal == "evasion" else None
            images, attack = selection.images[rows], replace(step.attack, goal=goal)
            model = self._model(step, selection)
            result = attack.run(model, images.x, images.y, self.seed, images.index, start)
            selection.offer(rows, result.images, number, since)
            fooled = selection.best[goal].reached[rows]
            values = (len(rows), int(fooled.sum()), result.queries, result.gradients, int(result.blind.sum()))
            counts = torch.tensor(values, device="cpu")
        return {"counts": counts, **selection.state()}

    def _under_other_noise(self, selection: Selection, result: SuiteResult, name: str) -> SuiteResult:
        """The result with its `noises`, where they are asked for."""
        ensemble, replayable = selection.ensemble, getattr(selection.ensemble, "replayable", True)
        if self.known is None or self.noise != "fresh" or not ensemble.noisy or not replayable:
            return result
        chosen = (ensemble, selection.images, result.denial, result.evasion, self.report)
        known = self.known(result.eps)

        def make() -> dict[str, Tensor]:
            return to_tensors({"fixed": fixed_noise(*chosen), "known": known_noise(*chosen, known)})

        noises = from_tensors(self._once(f"{name}-{result.eps!r}-noises", make))
        return replace(result, noises=noises)

    def _model(self, step: Step, selection: Selection) -> nn.Module | Target:
        """The network whose gradients a step takes."""
        if step.through != "itself":
            return self.surrogates[step.through]
        if self.noise == "known":
            return KnownPaths(selection.ensemble, selection.images.x, self.seed)
        return selection.ensemble

    def _once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives; from the state, if an earlier call has made it."""
        if self.state is None:
            return make()
        file = Path(self.state) / f"{name}.safetensors"
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


def join_results(parts: Sequence[SuiteResult]) -> SuiteResult:
    """The results of several batches at one radius as one."""

    def sums(what: str) -> tuple[int, ...]:
        return tuple(map(sum, zip(*(getattr(part, what) for part in parts), strict=True)))

    denial, evasion = join_cases([part.denial for part in parts]), join_cases([part.evasion for part in parts])
    noises = join_noises([part.noises for part in parts])
    return SuiteResult(parts[0].eps, denial, evasion, *map(sums, _COUNTS), noises=noises)
