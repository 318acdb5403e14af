"""Two worst cases of every image, denial and evasion: votes on the selection's noise choose, the report's decide.

What is chosen by the report's own noise looks worse than it is: minima over radii or sources by the report's votes
claimed 55 to 57 correct where the chosen images had 62 to 70 on fresh noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.ensemble import ItoEnsemble
from ..models.votes import decide
from ..outcomes import ABSTAIN, WorstCase
from ..validation import ItoError, nearest, whole_number
from .panels import GOALS

NOISES = ("fresh", "fixed", "known")
_FALLEN = 2  # added to a score, which is a share of votes and so at most 1


def report_votes(ensemble: ItoEnsemble, x: Tensor, seed: int, names: Tensor, repeat: int = 1) -> Tensor:
    """All votes of the report: int64 ``(repeat, members, N, classes)``.

    Args:
        ensemble: the defender.
        x: images ``(N, C, H, W)`` in [0, 1].
        seed: of the first vote; the others follow it.
        names: int64 ``(N,)``, the images' names in the noise's address (all 0: one set of paths for all images).
        repeat: how many votes.
    """
    return torch.stack([ensemble.predict(x, seed + again, names, full=True).votes for again in range(repeat)])


def worst_labels(votes: Tensor, truth: Tensor, rule: str, inferences: int) -> Tensor:
    """The worst decision ``(N,)`` of several votes: the first wrong one, else an abstention, else the right answer.

    Args:
        votes: ``(repeat, members, N, classes)``.
        truth: true labels ``(N,)``.
        rule, inferences: as in `decide`.
    """
    worst = truth.clone()
    for vote in votes:
        found = decide(vote, rule, inferences)
        wrong = (found != truth) & (found != ABSTAIN)
        still = (worst == truth) | (worst == ABSTAIN)
        worst = torch.where(still & wrong, found, worst)
        worst = torch.where((worst == truth) & (found == ABSTAIN), found, worst)
    return worst


def invalid(votes: Tensor, inferences: int) -> int:
    """How many inferences of full votes ``(repeat, members, N, classes)`` voted for nobody."""
    return int((inferences - votes.sum(-1)).sum())


@dataclass(frozen=True)
class Judged:
    """What votes of the selection say of ``N`` candidates: shares of them, and which goals all of them find reached.

    Attributes:
        right, wrong: ``(N,)``, shares for the right class and for the best wrong one.
        denial, evasion: bool ``(N,)``: no vote is right; all are wrong answers.
    """

    right: Tensor
    wrong: Tensor
    denial: Tensor
    evasion: Tensor


def judge(ensemble: ItoEnsemble, x: Tensor, y: Tensor, index: Tensor, seed: int, noise: str = "fresh") -> Judged:
    """Up to three votes on noise of the selection; one, the report's, where there is no other or the attacker knows it.

    Args:
        ensemble: the defender.
        x, y, index: candidates ``(N, C, H, W)``, true labels and names in the noise's address ``(N,)``.
        seed: of the report; these votes have seeds of their own.
        noise: a name in `NOISES`.
    """
    if noise == "known" or not ensemble.noisy:
        votes = [(seed, "report")]
    else:
        votes = [(seed + 1 + again, "selection") for again in range(3)]
    denial, evasion = torch.ones_like(y, dtype=torch.bool), torch.ones_like(y, dtype=torch.bool)
    count, drawn = None, torch.zeros_like(y)
    for seed, purpose in votes:
        ask = denial.nonzero()[:, 0]  # one right vote is enough to stand
        if count is not None and not len(ask):
            break
        found = ensemble.predict(x[ask], seed, index[ask], purpose)
        denial[ask] = found.labels != y[ask]
        evasion[ask] &= denial[ask] & (found.labels != ABSTAIN)
        count = torch.zeros_like(found.votes[0]) if count is None else count  # the first vote is on all candidates
        count[ask] += found.votes.sum(0)
        drawn[ask] += found.drawn
    assert count is not None
    share = count / drawn.clamp_min(1)[:, None]  # (N, classes)
    wrong = share.masked_fill(F.one_hot(y, share.shape[1]).bool(), 0).amax(1)
    return Judged(share.gather(1, y[:, None])[:, 0], wrong, denial, evasion)


def joined_cases(parts: Sequence[WorstCase]) -> WorstCase:
    """The worst cases of several batches as those of one, on the CPU."""
    images, source, labels = (
        torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("images", "source", "labels")
    )
    return WorstCase(images, source, labels, torch.cat([part.votes.cpu() for part in parts], -2))


@dataclass
class _Held:
    """What is kept for one goal: images, the number of the attack that made each, and a score.

    The score ``(N,)`` is the share of votes that the attack has won; `_FALLEN` more where all votes of the selection
    find the goal reached, and for denial as much again where they are wrong answers.
    """

    images: Tensor
    source: Tensor
    score: Tensor

    @property
    def fallen(self) -> Tensor:
        """Where all votes of the selection agree, bool ``(N,)``."""
        return self.score >= _FALLEN


class Selection:
    """The candidates for the worst cases of some images, the clean ones among them.

    An image has fallen where three votes of the selection agree: to denial if none of them is right, to evasion if all
    are wrong answers. Of candidates that have not, the one is kept on which the right class has the smallest share
    (denial), or the best wrong class the largest (evasion). An image that fell to a wrong answer serves both goals.

    Args:
        ensemble: the defender.
        x, y, index: images ``(N, C, H, W)`` in [0, 1], true labels and names in the noise's address ``(N,)``.
        seed: of the report; selection votes have seeds of their own.
        noise: ``fresh``, ``fixed`` or ``known`` paths, see `Suite`.
        repeat: how often the report votes.
    """

    def __init__(
        self,
        ensemble: ItoEnsemble,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        seed: int = 0,
        noise: str = "fresh",
        repeat: int = 1,
    ) -> None:
        if noise not in NOISES:
            raise ItoError(nearest("noise model", noise, NOISES))
        self.ensemble, self.y, self.index, self.seed, self.noise = ensemble, y, index, seed, noise
        self.repeat = whole_number("repeat", repeat)
        nobody = torch.full((len(x),), -torch.inf, device=x.device)
        self.held = {goal: _Held(x.clone(), torch.full_like(y, -1), nobody.clone()) for goal in GOALS}
        self.invalid = 0  # inferences of the report's votes that voted for nobody
        self._reported: list[tuple[Tensor, Tensor]] = []  # images and the report's votes on them

    def standing(self, goal: str) -> Tensor:
        """Positions of the images that are to be attacked: for evasion those that fell without a wrong answer."""
        denied, evaded = (self.held[goal].fallen for goal in GOALS)
        return ((denied & ~evaded) if goal == "evasion" else ~denied).nonzero()[:, 0]

    def begin(self) -> dict[str, Tensor]:
        """Let the clean images compete; gives the `state` after it."""
        self.meet(torch.arange(len(self.y), device=self.y.device), self.held["denial"].images, -1)
        return self.state()

    def meet(self, rows: Tensor, images: Tensor, source: int, since: int = 0) -> dict[str, Tensor]:
        """Let images ``(K, C, H, W)`` at positions ``rows`` compete for both goals; which reach them, bool ``(K,)``.

        Args:
            rows, images: the candidates.
            source: the number of the attack that made them; -1: the clean images.
            since: the number of the first attack at this radius. Of equal scores the first at this radius is kept: a
                candidate in the larger ball, not yet fallen, is the better one to go on from.
        """
        found = judge(self.ensemble, images, self.y[rows], self.index[rows], self.seed, self.noise)
        evaded = _FALLEN * found.evasion
        scores = {"denial": 1 - found.right + _FALLEN * found.denial + evaded, "evasion": found.wrong + evaded}
        for goal, score in scores.items():
            held = self.held[goal]
            before = held.score[rows]
            renewed = (score == before) & (score < _FALLEN) & (held.source[rows] < since)
            better = (score > before) | renewed
            won = rows[better]
            held.images[won], held.score[won], held.source[won] = images[better], score[better], source
        return {"denial": found.denial, "evasion": found.evasion}

    def state(self) -> dict[str, Tensor]:
        """All that is held, by name; `restore` takes it back."""
        return {f"{goal}.{name}": value for goal, held in self.held.items() for name, value in vars(held).items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        for key, value in state.items():
            goal, name = key.split(".")
            setattr(self.held[goal], name, value.to(self.y.device))

    def vote(self) -> dict[str, Tensor]:
        """The report's votes on what is held for each goal; an image that they have met already keeps its votes."""
        met, votes = list(self._reported), {}
        for goal, held in self.held.items():
            votes[goal] = self._votes(held.images, met)
            met.append((held.images, votes[goal]))
        return votes

    def _votes(self, images: Tensor, met: list[tuple[Tensor, Tensor]]) -> Tensor:
        names = torch.zeros_like(self.index) if self.noise == "fixed" else self.index
        ask, votes = torch.ones_like(self.y, dtype=torch.bool), None
        for before, found in met:
            same = ask & (images == before).flatten(1).all(1)
            votes = found if votes is None else torch.where(same[:, None], found, votes)
            ask = ask & ~same
        if votes is not None and not bool(ask.any()):
            return votes
        made = report_votes(self.ensemble, images[ask], self.seed, names[ask], self.repeat)
        self.invalid += invalid(made, self.ensemble.inferences)
        if votes is None:
            return made
        votes = votes.clone()
        votes[:, :, ask] = made
        return votes

    def worst_cases(self, votes: dict[str, Tensor] | None = None) -> tuple[WorstCase, WorstCase]:
        """Denial and evasion as the report's ``votes`` decide; without them, labels and votes are empty."""
        nothing = self.y.new_empty(0)
        cases = {
            goal: WorstCase(held.images.clone(), held.source.clone(), nothing, nothing)
            for goal, held in self.held.items()
        }
        if votes is not None:
            votes = {goal: value.to(self.y.device) for goal, value in votes.items()}
            self._reported = [(case.images, votes[goal]) for goal, case in cases.items()]
            labels = {
                goal: worst_labels(value, self.y, self.ensemble.rule, self.ensemble.inferences)
                for goal, value in votes.items()
            }
            cases = {goal: replace(case, labels=labels[goal], votes=votes[goal]) for goal, case in cases.items()}
        return cases["denial"], cases["evasion"]
