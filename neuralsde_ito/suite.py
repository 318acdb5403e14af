"""The strongest honest attack: a sequence of attacks, weak and cheap ones first, each on what the last ones left.

Three votes on noise of the selection decide when an image has fallen and is left alone; of an image that stands the
candidate with the fewest right votes is kept. Only then, once a radius, the report votes on what was kept: an attack
that is chosen by the report's own noise looks stronger than it is (measured: 22 % instead of 38 % of digits at L-inf
0.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from .attacks import APGD, PGD, Attack, Square
from .attacks.objective import Ascent, EnsembleTarget, Objective, Target
from .checkpoints import write_atomically
from .ensemble import ItoEnsemble
from .outcomes import ABSTAIN
from .validation import ItoError, nearest

NOISES = ("fresh", "fixed", "known")
_STATE = ("labels", "winner", "images", "share", "maker")


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

    For a randomised ensemble at most 1,415 gradients an image, and for a deterministic network what AutoAttack's
    ``standard`` has in APGD and Square, in a cheaper order.

    Args:
        norm, eps: the ball.
        noisy: whether the model is randomised.
        effort: scales the numbers of iterations.
    """

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
class Besieged:
    """A suite at one radius.

    Attributes:
        eps: the radius.
        labels: ``(N,)``, the report's decisions; those of smaller radii for what fell there.
        winner: ``(N,)``, the number of the step that made an image fall, counted through all radii; -1 stands, -2 wrong
            without attack. By the selection's votes, and after the last step of a radius by the report's.
        images: ``(N, C, H, W)``, what was decided on.
        forwards, backwards, met, felled: of each step: inferences without and with a gradient, images that it was run
            on and images that fell to it.
    """

    eps: float
    labels: Tensor
    winner: Tensor
    images: Tensor
    forwards: tuple[int, ...]
    backwards: tuple[int, ...]
    met: tuple[int, ...]
    felled: tuple[int, ...]


class KnownPaths:
    """A target whose attacker has the defender's paths: every panel is the report's own."""

    def __init__(self, ensemble: ItoEnsemble, x: Tensor, seed: int) -> None:
        self.target, self.seed = EnsembleTarget(ensemble), seed
        self.count = self.target.distinct or len(ensemble.members) * ensemble.inferences
        self.distinct: int | None = self.count

    def paths(self, x: Tensor, first: int, count: int, seed: int, purpose: str, index: Tensor) -> Tensor:
        """All of them, whichever are asked for."""
        return self.target.paths(x, 0, self.count, self.seed, "report", index)

    def ascend(
        self, objective: Objective, x: Tensor, y: Tensor, first: int, count: int, seed: int, index: Tensor
    ) -> Ascent:
        """Through all of them."""
        return self.target.ascend(objective, x, y, 0, self.count, self.seed, index, "report")


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
        state: a folder in which every finished step of every batch is kept, and found again after a kill.
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
        if isinstance(self.repeat, bool) or not isinstance(self.repeat, int) or self.repeat < 1:
            raise ItoError(f"repeat must be a whole number of at least 1, got {self.repeat!r}.")

    def decide(self, ensemble: ItoEnsemble, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """The report's decisions ``(N,)``: the worst of ``repeat`` votes, wrong before abstained before right."""
        names = torch.zeros_like(index) if self.noise == "fixed" else index
        worst = ensemble.predict(x, self.seed, names).labels
        for again in range(1, self.repeat):
            ask = ((worst == y) | (worst == ABSTAIN)).nonzero()[:, 0]
            if not len(ask):
                break
            found = ensemble.predict(x[ask], self.seed + again, names[ask]).labels
            worse = (found != y[ask]) & ((found != ABSTAIN) | (worst[ask] == y[ask]))
            worst[ask[worse]] = found[worse]
        return worst

    def _judge(self, ensemble: ItoEnsemble, x: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The share of votes for the right class, and who has fallen, ``(N,)`` each: not by the report's noise."""
        if self.noise == "known" or not ensemble.noisy:
            votes = [(self.seed, "report")]
        else:
            votes = [(self.seed + 1 + again, "selection") for again in range(3)]
        share, fallen = torch.zeros(len(x), device=x.device), torch.ones_like(y, dtype=torch.bool)
        for turn, (seed, purpose) in enumerate(votes):
            ask = fallen.nonzero()[:, 0]
            if not len(ask):
                break
            found = ensemble.predict(x[ask], seed, index[ask], purpose)
            fallen[ask] = found.labels != y[ask]
            if turn == 0:
                votes_right = found.votes.sum(0).gather(1, y[ask, None])[:, 0]
                share = votes_right / found.drawn.clamp_min(1)
        return share, fallen

    def run(
        self, ensemble: ItoEnsemble, x: Tensor, y: Tensor, index: Tensor, radii: Sequence[float], name: str = "0"
    ) -> Iterator[tuple[Step, Besieged]]:
        """Attack one batch of images, at rising radii; what the report found fallen at one is fallen at the next.

        Args:
            ensemble: the defender.
            x, y, index: images ``(N, C, H, W)`` in [0, 1], true labels and names ``(N,)``.
            radii: rising, in pixel units.
            name: of the batch, in the state.

        Yields:
            After every step: the step, and how its radius stands so far.
        """
        labels, images = self.decide(ensemble, x, y, index), x.clone()
        winner = torch.where(labels == y, -1, -2)
        before = 0  # steps of smaller radii
        for eps in radii:
            steps = self.steps(eps)
            share = torch.full((len(x),), math.inf, device=x.device)
            maker = torch.full_like(winner, -1)  # the step that made what is kept
            count = {what: [0] * len(steps) for what in ("forwards", "backwards", "met", "felled")}
            for number, step in enumerate(steps):
                file = self.state and self.state / f"{name}-{eps:.6g}-{number}.safetensors"
                if file and file.is_file():
                    held = load_file(file)
                    labels, winner, images, share = (
                        held[k].to(x.device) for k in ("labels", "winner", "images", "share")
                    )
                    count = dict(zip(count, held["count"].tolist(), strict=True))
                else:
                    rows = (winner == -1).nonzero()[:, 0]
                    if len(rows):
                        model = self._through(step, ensemble, x)
                        start = images[rows] if step.warm else None
                        found = step.attack.run(model, x[rows], y[rows], self.seed, index[rows], start)
                        right, fell = self._judge(ensemble, found.images, y[rows], index[rows])
                        better = fell | (right < share[rows])
                        images[rows[better]], share[rows[better]] = found.images[better], right[better]
                        winner[rows[fell]], maker[rows[better]] = before + number, before + number
                        values = (found.forwards, found.backwards, len(rows), int(fell.sum()))
                        for what, value in zip(count, values, strict=True):
                            count[what][number] = value
                    if number == len(steps) - 1:
                        self._report(ensemble, y, index, labels, winner, images, maker)
                    if file:
                        self._keep(file, torch.tensor(list(count.values())), labels, winner, images, share, maker)
                counts = (tuple(row) for row in count.values())
                yield step, Besieged(eps, labels.clone(), winner.clone(), images.clone(), *counts)
            before += len(steps)

    def _report(
        self,
        ensemble: ItoEnsemble,
        y: Tensor,
        index: Tensor,
        labels: Tensor,
        winner: Tensor,
        images: Tensor,
        maker: Tensor,
    ) -> None:
        """Decide on what was kept at this radius, and set right what the selection thought of it."""
        rows = (labels == y).nonzero()[:, 0]
        if len(rows):
            labels[rows] = self.decide(ensemble, images[rows], y[rows], index[rows])
            winner[rows] = torch.where(labels[rows] == y[rows], -1, maker[rows])

    def _through(self, step: Step, ensemble: ItoEnsemble, x: Tensor) -> nn.Module | Target:
        if step.through != "itself":
            return self.surrogates[step.through]
        return KnownPaths(ensemble, x, self.seed) if self.noise == "known" else ensemble

    @staticmethod
    def _keep(file: Path, count: Tensor, *state: Tensor) -> None:
        tensors = {k: v.cpu().contiguous() for k, v in zip(_STATE, state, strict=True)}
        tensors["count"] = count
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, safetensors_bytes(tensors))


def joined(parts: Sequence[Besieged]) -> Besieged:
    """Batches of one radius as one."""

    def sums(what: str) -> tuple[int, ...]:
        return tuple(map(sum, zip(*(getattr(part, what) for part in parts), strict=True)))

    def whole(what: str) -> Tensor:
        return torch.cat([getattr(part, what).cpu() for part in parts])

    return Besieged(
        parts[0].eps,
        whole("labels"),
        whole("winner"),
        whole("images"),
        sums("forwards"),
        sums("backwards"),
        sums("met"),
        sums("felled"),
    )


def least_norm(
    ensemble: ItoEnsemble,
    x: Tensor,
    y: Tensor,
    attack: Callable[[float], Attack],
    most: float,
    rounds: int = 8,
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """The least radius at which each image was made to fall, by bisection: ``(N,)``, in pixel units.

    0 where it is wrong without attack, infinite where it stands at ``most``. An upper bound on the true least radius.

    Args:
        ensemble, x, y, seed, index: as in `Attack.run`.
        attack: from a radius to the attack.
        most: the largest radius.
        rounds: bisections; the result is exact to ``most / 2**rounds``, as far as the attack is.
    """
    index = torch.arange(len(x), device=x.device) if index is None else index
    low = torch.zeros(len(x), device=x.device)
    found = torch.full((len(x),), math.inf, device=x.device)
    found[ensemble.predict(x, seed, index).labels != y] = 0
    high = torch.full_like(found, most)
    for turn in range(rounds + 1):
        middle = high if turn == 0 else (low + high) / 2
        rows = ((found > 0) & ((found < math.inf) if turn else found.isinf())).nonzero()[:, 0]
        for eps in middle[rows].unique().tolist():
            here = rows[middle[rows] == eps]
            images = attack(eps).run(ensemble, x[here], y[here], seed, index[here]).images
            fell = ensemble.predict(images, seed, index[here]).labels != y[here]
            found[here[fell]], high[here[fell]], low[here[~fell]] = eps, eps, eps
    return found
