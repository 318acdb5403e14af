"""From votes to a label or an abstention (paper, section 3), and when votes still out can change nothing."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..outcomes import ABSTAIN
from ..validation import ItoError, nearest

RULES = ("hierarchical", "flat")


def check_rule(rule: str) -> str:
    """The rule, if there is one of that name.

    Raises:
        ItoError: there is none; the nearest name is offered.
    """
    if rule not in RULES:
        raise ItoError(nearest("rule", rule, RULES))
    return rule


def winners(logits: Tensor) -> Tensor:
    """The class that each inference votes for, ``(..., classes) -> (...)``; `ABSTAIN` where a logit is not finite."""
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), ABSTAIN)


def decide(votes: Tensor, rule: str = "hierarchical", inferences: int | None = None) -> Tensor:
    """Labels ``(N,)`` from votes ``(members, N, classes)``; `ABSTAIN` without a strict majority.

    - ``hierarchical``: a member's label is that of more than half of its inferences, else it has none; the
      label of more than half of all members wins.
    - ``flat``: the label of more than half of all inferences wins. The paper leaves open which it means.

    Args:
        votes: how many inferences of each member chose each class.
        rule: a name in `RULES`.
        inferences: how many each member made. Default: as many as voted; give it where some may have voted for
            nobody (see `winners`), as they count towards the half.
    """
    made = votes.sum(-1) if inferences is None else votes.new_full(votes.shape[:-1], inferences)
    if check_rule(rule) == "flat":
        votes, made = votes.sum(0, keepdim=True), made.sum(0, keepdim=True)
    most, labels = votes.max(-1)  # both (members, N)
    labels = torch.where(2 * most > made, labels, ABSTAIN)
    ballots = torch.stack([(labels == c).sum(0) for c in range(votes.shape[-1])], -1)  # (N, classes)
    most, winner = ballots.max(-1)
    return torch.where(2 * most > len(votes), winner, ABSTAIN)


class Poll:
    """A vote under way: which draws are to be made next, until the outcome cannot change any more.

    Exact: `labels` are those that `decide` finds when all inferences are made, whatever the rest of them say.

    With ``confidence`` a member's label counts as found sooner, as soon as that is its label in the end with a
    probability that leaves all members together this confidence (all, as an abstention rests on each of them). It
    assumes that a member's inferences are exchangeable (they are: independent paths) and, before the first of them,
    that every share of the leading class is as likely as any other (a prior): the votes still out are then
    beta-binomial.

    Args:
        members, n, classes: the size of the vote.
        inferences: that a member makes at the most.
        rule: a name in `RULES`. ``flat`` is one member that makes all inferences.
        confidence: above 0.5 and below 1; None: exact.
    """

    def __init__(
        self,
        members: int,
        n: int,
        classes: int,
        inferences: int,
        rule: str = "hierarchical",
        confidence: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if confidence is not None and not 0.5 < confidence < 1:
            raise ItoError(f"confidence must be above 0.5 and below 1, got {confidence}.")
        self.flat, self.inferences = check_rule(rule) == "flat", inferences
        self.votes = torch.zeros(members, n, classes, dtype=torch.int64, device=device)
        self.voters, self.each = (1, members * inferences) if self.flat else (members, inferences)
        self.invalid = self.votes.new_zeros(members, n)  # inferences that voted for nobody
        level = None if confidence is None else 1 - (1 - confidence) / self.voters
        self._least = torch.tensor(_least_votes(self.each, level), device=self.votes.device)

    @property
    def drawn(self) -> Tensor:
        """Inferences made so far: ``(members, n)``."""
        return self.votes.sum(-1) + self.invalid

    def count(self, member: int, images: Tensor, classes: Tensor) -> None:
        """Enter inferences of one member: for image ``images[k]`` the class ``classes[k]``, `ABSTAIN` for nobody."""
        one, cast = torch.ones_like(images), classes != ABSTAIN
        self.invalid[member].index_put_((images[~cast],), one[~cast], accumulate=True)
        self.votes[member].index_put_((images[cast], classes[cast]), one[cast], accumulate=True)

    def _standing(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """By voter: votes ``(voters, n, classes)``, draws ``(voters, n)``; classes it surely has, and may still get."""
        votes = self.votes.sum(0, keepdim=True) if self.flat else self.votes
        drawn = self.drawn.sum(0, keepdim=True) if self.flat else self.drawn
        sure = votes >= self._least[drawn][..., None]
        can = (2 * (votes + (self.each - drawn)[..., None]) > self.each) & ~(sure.any(-1, keepdim=True) & ~sure)
        return votes, drawn, sure, can

    def labels(self) -> tuple[Tensor, Tensor]:
        """Labels ``(n,)``, and whether each is settled: bool ``(n,)``."""
        *_, sure, can = self._standing()
        wins = 2 * sure.sum(0) > self.voters  # (n, classes)
        open_ = (2 * can.sum(0) > self.voters).any(-1)
        labels = torch.where(wins.any(-1), wins.int().argmax(-1), ABSTAIN)
        return labels, wins.any(-1) | ~open_

    def wanted(self) -> Tensor:
        """How many inferences each member makes next for each image: ``(members, n)``, all zero at the end.

        No more than would settle it if they all agreed; so nothing is drawn that could have been spared.
        """
        votes, drawn, sure, can = self._standing()
        _, settled = self.labels()
        # The class that is ahead: by members that have it for sure, then by votes.
        ahead = (sure.sum(0) * self.each * self.voters + (votes * can).sum(0)).argmax(-1)  # (n,)
        missing = self.voters // 2 + 1 - sure.sum(0).gather(-1, ahead[:, None])[:, 0]
        undecided = can.any(-1) & ~sure.any(-1)  # (voters, n)
        turn = undecided & (undecided.cumsum(0) <= missing)
        steps = self._steps(drawn, votes.amax(-1))
        wanted = torch.where(turn & ~settled, torch.minimum(steps, self.each - drawn), 0)
        if not self.flat:
            return wanted
        # One voter's draws, dealt out to the members in order.
        left = self.inferences - self.drawn
        before = left.cumsum(0) - left
        return (wanted - before).clamp(min=0).minimum(left)

    def _steps(self, drawn: Tensor, votes: Tensor) -> Tensor:
        """How many draws make a class sure if all are for it: of ``votes`` among ``drawn``, both ``(voters, n)``."""
        # After k draws: votes + k >= least[drawn + k]. With m = drawn + k that is m - least[m] >= drawn - votes, whose
        # left side never falls.
        numbers = torch.arange(len(self._least), device=drawn.device) - self._least
        return (torch.searchsorted(numbers, drawn - votes) - drawn).clamp_min(1)


@lru_cache(maxsize=64)
def _least_votes(inferences: int, level: float | None) -> list[int]:
    """For every number of draws the least votes with which a class is sure to win: a list of ``inferences + 1``.

    Exact: more than half of all. With a ``level``: so many that it wins with this probability. If every number of
    votes in the end is equally likely beforehand, ``v`` of ``n`` draws leave at least ``K`` of ``S`` in the end with
    probability ``P(X <= v)``, where ``X`` is hypergeometric: of ``S + 1`` balls ``K`` are marked, ``n + 1`` are drawn
    (the ``v``-th order statistic of a sample without replacement lies at or above ``K``).
    """
    marked, balls = inferences // 2 + 1, inferences + 1
    if level is None:
        return [marked] * balls

    def chance(v: int, n: int) -> float:
        """``P(X = v)``."""
        if not max(0, n + 1 - (balls - marked)) <= v <= min(marked, n + 1):
            return 0.0
        ways = _log_choose(marked, v) + _log_choose(balls - marked, n + 1 - v) - _log_choose(balls, n + 1)
        return math.exp(ways)

    v, below, found = 0, chance(0, 0), []  # below: P(X <= v)
    for n in range(inferences + 1):
        while v < marked and below < level:
            v += 1
            below += chance(v, n)
        found.append(v)
        if n < inferences:  # one more ball: X passes v where it stood at v and the ball is marked
            below -= chance(v, n) * (marked - v) / (balls - n - 1)
    return found


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
