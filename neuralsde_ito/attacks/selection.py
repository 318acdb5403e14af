"""Which candidate is the worst case of an image: votes on the selection's noise choose it, the report's votes judge it.

A candidate that the report's own noise chooses looks worse than it is: minima over radii or sources by the report's
votes claimed 55 to 57 correct where the chosen images had 62 to 70 on fresh noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.voting import Voter
from ..outcomes import ABSTAIN, WorstCase
from .images import Images
from .panels import GOALS
from .report import Report, invalid, worst_labels

_CLEAR = 0.7  # the share of votes from which on a goal is reached beyond doubt, see `Selection.to_attack`
_REACHED = 2  # added to a score where the goal is reached; without it a score is a share of votes, at most 1


@dataclass(frozen=True)
class SelectionVotes:
    """What votes of the selection say of ``N`` candidates.

    Attributes:
        right, wrong: ``(N,)``, the shares of votes for the right class and for the best wrong one.
        denial, evasion: bool ``(N,)``, whether all votes say that the goal is reached: no vote is right; all votes are
            wrong answers.
    """

    right: Tensor
    wrong: Tensor
    denial: Tensor
    evasion: Tensor


def selection_votes(ensemble: Voter, candidates: Images, report: Report) -> SelectionVotes:
    """Vote on candidates, up to three times, on noise of the selection.

    Where the ensemble has no noise, or the attacker knows the report's paths, the only vote is the report's.

    Args:
        ensemble: the defender.
        candidates: attacked images, with the labels and names of the original ones.
        report: how the report votes; votes of the selection have other seeds, or another purpose.
    """
    x, y, index = candidates.x, candidates.y, candidates.index
    ensemble.observe(x)
    if report.noise == "known" or not ensemble.noisy:
        panels = [(report.seed, "report")]
    else:
        panels = [(report.seed + 1 + turn, "selection") for turn in range(3)]
    denial, evasion = torch.ones_like(y, dtype=torch.bool), torch.ones_like(y, dtype=torch.bool)
    counts, drawn = None, torch.zeros_like(y)
    for seed, purpose in panels:
        rows = denial.nonzero()[:, 0]  # one right vote settles that neither goal is reached
        if counts is not None and not len(rows):
            break
        prediction = ensemble.predict(x[rows], seed, index[rows], purpose)
        denial[rows] = prediction.labels != y[rows]
        evasion[rows] &= denial[rows] & (prediction.labels != ABSTAIN)
        counts = torch.zeros_like(prediction.votes[0]) if counts is None else counts  # the first vote is on all
        counts[rows] += prediction.votes.sum(0)
        drawn[rows] += prediction.drawn
    assert counts is not None
    shares = counts / drawn.clamp_min(1)[:, None]  # (N, classes)
    wrong = shares.masked_fill(F.one_hot(y, shares.shape[1]).bool(), 0).amax(1)
    return SelectionVotes(shares.gather(1, y[:, None])[:, 0], wrong, denial, evasion)


def join_cases(parts: Sequence[WorstCase]) -> WorstCase:
    """The worst cases of several batches as those of one, on the CPU."""
    images, source, labels = (
        torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("images", "source", "labels")
    )
    return WorstCase(images, source, labels, torch.cat([part.votes.cpu() for part in parts], -2))


@dataclass
class _Best:
    """The best candidate so far for one goal, of each of ``N`` images.

    Attributes:
        images: ``(N, C, H, W)``.
        source: int64 ``(N,)``, the number of the attack that made each; -1: the clean image.
        score: ``(N,)``, the share of votes that the attack has won. Where all votes of the selection say that the goal
            is reached, the score is `_REACHED` higher; for denial as much again where all are wrong answers.
    """

    images: Tensor
    source: Tensor
    score: Tensor

    @property
    def reached(self) -> Tensor:
        """Where all votes of the selection say that the goal is reached, bool ``(N,)``."""
        return self.score >= _REACHED


class Selection:
    """Chooses the two worst cases of each image among candidates; the clean image is the first candidate.

    Three votes of the selection decide whether a candidate reaches a goal: denial, if none of them is right; evasion,
    if all are wrong answers. Among candidates that do not reach the goal, the best one has the smallest share of votes
    for the right class (denial), or the largest for the best wrong class (evasion). A wrong answer serves both goals.

    Args:
        ensemble: the defender.
        images: the images, not attacked.
        report: how the report votes.

    Attributes:
        best: for each goal, the best candidates so far.
        invalid: inferences in the report's votes that voted for no class.
    """

    def __init__(self, ensemble: Voter, images: Images, report: Report) -> None:
        self.ensemble, self.images, self.report = ensemble, images, report
        x, y = images.x, images.y
        lowest = torch.full((len(x),), -torch.inf, device=x.device)
        self.best = {goal: _Best(x.clone(), torch.full_like(y, -1), lowest.clone()) for goal in GOALS}
        self.invalid = 0
        self._voted_on: list[tuple[Tensor, Tensor]] = []  # images, and the report's votes on them

    def to_attack(self, goal: str, barely: bool = False) -> Tensor:
        """Positions of the images that an attack with this goal is to be run on.

        For denial these are the images on which the goal is not reached; for evasion those that are denied, but not
        by a wrong answer.

        Args:
            goal: a name in `GOALS`.
            barely: under noise, also images on which the goal is reached by less than 70 % of the votes. If the right
                class has 30 %, it wins a vote of 20 once in 60 times; if it has 45 %, once in 4.
        """
        denied, evaded = (self.best[goal].reached for goal in GOALS)
        rows = (denied & ~evaded) if goal == "evasion" else ~denied
        if barely and self.ensemble.noisy:
            best = self.best[goal]
            rows = rows | (best.reached & (best.score % _REACHED < _CLEAR))
        return rows.nonzero()[:, 0]

    def offer_clean(self) -> dict[str, Tensor]:
        """Offer the clean images as candidates; gives the `state` after it."""
        self.offer(torch.arange(len(self.images), device=self.images.y.device), self.best["denial"].images, -1)
        return self.state()

    def offer(self, rows: Tensor, candidates: Tensor, source: int, since: int = 0) -> dict[str, Tensor]:
        """Offer candidates for both goals, and keep them where they are better; gives which reach each goal.

        Args:
            rows: int64 ``(K,)``, the positions of the images.
            candidates: ``(K, C, H, W)``.
            source: the number of the attack that made them; -1: the clean images.
            since: the number of the first attack at this radius. Of equal scores that do not reach the goal, the first
                candidate at this radius is kept: it lies in the larger ball, where the next attack may begin.

        Returns:
            For each goal, bool ``(K,)``.
        """
        votes = selection_votes(self.ensemble, replace(self.images[rows], x=candidates), self.report)
        evaded = _REACHED * votes.evasion
        scores = {"denial": 1 - votes.right + _REACHED * votes.denial + evaded, "evasion": votes.wrong + evaded}
        for goal, score in scores.items():
            best = self.best[goal]
            before = best.score[rows]
            renewed = (score == before) & (score < _REACHED) & (best.source[rows] < since)
            better = (score > before) | renewed
            replaced = rows[better]
            best.images[replaced], best.score[replaced], best.source[replaced] = (
                candidates[better],
                score[better],
                source,
            )
        return {"denial": votes.denial, "evasion": votes.evasion}

    def state(self) -> dict[str, Tensor]:
        """The best candidates, by name; `restore` takes them back."""
        return {f"{goal}.{name}": value for goal, best in self.best.items() for name, value in vars(best).items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        for key, value in state.items():
            goal, name = key.split(".")
            setattr(self.best[goal], name, value.to(self.images.y.device))

    def vote(self) -> dict[str, Tensor]:
        """The report's votes on the best candidates of each goal; no image is voted on twice."""
        voted_on, votes = list(self._voted_on), {}
        for goal, best in self.best.items():
            votes[goal] = self._votes(best.images, voted_on)
            voted_on.append((best.images, votes[goal]))
        return votes

    def _votes(self, images: Tensor, voted_on: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The report's votes on ``images``: those in ``voted_on`` where the image is the same, else new ones."""
        ask, votes = torch.ones_like(self.images.y, dtype=torch.bool), None
        for before, known in voted_on:
            same = ask & (images == before).flatten(1).all(1)
            votes = known if votes is None else torch.where(same[:, None], known, votes)
            ask = ask & ~same
        if votes is not None and not bool(ask.any()):
            return votes
        new = self.report.votes(self.ensemble, images[ask], self.images.index[ask])
        self.invalid += invalid(new, self.ensemble.inferences)
        if votes is None:
            return new
        votes = votes.clone()
        votes[:, :, ask] = new
        return votes

    def worst_cases(self, votes: dict[str, Tensor] | None = None) -> tuple[WorstCase, WorstCase]:
        """Denial and evasion, with the labels that follow from the report's ``votes``.

        Without votes, labels and votes of the worst cases are empty.
        """
        empty = self.images.y.new_empty(0)
        cases = {
            goal: WorstCase(best.images.clone(), best.source.clone(), empty, empty) for goal, best in self.best.items()
        }
        if votes is not None:
            votes = {goal: value.to(self.images.y.device) for goal, value in votes.items()}
            self._voted_on = [(case.images, votes[goal]) for goal, case in cases.items()]
            labels = {
                goal: worst_labels(value, self.images.y, self.ensemble.rule, self.ensemble.inferences)
                for goal, value in votes.items()
            }
            cases = {goal: replace(case, labels=labels[goal], votes=votes[goal]) for goal, case in cases.items()}
        return cases["denial"], cases["evasion"]
