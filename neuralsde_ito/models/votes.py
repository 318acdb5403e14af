"""From votes to a label or an abstention (paper, section 3), and when the remaining votes cannot change it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..names import RULES
from ..outcomes import ABSTAIN
from ..validation import ItoError, one_of


def check_rule(rule: str) -> str:
    """The rule, if there is one of that name.

    Raises:
        ItoError: there is none; the nearest name is offered.
    """
    return one_of("rule", rule, RULES)


def winners(logits: Tensor) -> Tensor:
    """The class that each inference votes for, ``(..., classes) -> (...)``; `ABSTAIN` where a logit is not finite."""
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), ABSTAIN)


def decide(votes: Tensor, rule: str = "hierarchical", inferences: int | None = None) -> Tensor:
    """Labels ``(N,)`` from votes ``(members, N, classes)``; `ABSTAIN` without a strict majority.

    - ``hierarchical``: a member's label is that of more than half of its inferences; without such a majority it has
      none. The label of more than half of all members wins.
    - ``flat``: the label of more than half of all inferences wins.

    The paper does not say which of the two it means.

    Args:
        votes: how many inferences of each member chose each class.
        rule: a name in `RULES`.
        inferences: how many each member made. Default: the number of its votes. Give it where some inferences may
            have voted for no class (see `winners`): they count towards the half too.
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
    """A vote in progress: it says which inferences to make next, until the label of no image can change any more.

    Without ``confidence`` it is exact: `labels` are those that `decide` gives when all inferences are made, whatever
    the remaining ones vote for.

    With ``confidence`` a member's label counts as known earlier: as soon as it is the member's label of the full vote
    with such a probability that the labels of all members together are right with this confidence. (All of them,
    because an abstention depends on each.) This assumes that a member's inferences are exchangeable, which holds for
    independent paths, and a prior: before the first inference every share of the leading class is equally likely. The
    remaining votes are then beta-binomial.

    In the names below a voter is a member; under the rule ``flat`` all members together are the only voter.

    Args:
        members, n, classes: the size of the vote.
        inferences: of a member, at most.
        rule: a name in `RULES`.
        confidence: above 0.5 and below 1; None: exact.
        device: of the counts.

    Raises:
        ItoError: an unknown rule, or a confidence out of range.
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
        self.invalid = self.votes.new_zeros(members, n)  # inferences that voted for no class
        level = None if confidence is None else 1 - (1 - confidence) / self.voters
        self._least = torch.tensor(_least_votes(self.each, level), device=self.votes.device)

    @property
    def drawn(self) -> Tensor:
        """Inferences made so far: ``(members, n)``."""
        return self.votes.sum(-1) + self.invalid

    def count(self, member: int, images: Tensor, classes: Tensor) -> None:
        """Count inferences of one member: for image ``images[k]`` class ``classes[k]``, or `ABSTAIN` for no class."""
        one, cast = torch.ones_like(images), classes != ABSTAIN
        self.invalid[member].index_put_((images[~cast],), one[~cast], accumulate=True)
        self.votes[member].index_put_((images[cast], classes[cast]), one[cast], accumulate=True)

    def _standing(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How each voter stands.

        Returns:
            Votes ``(voters, n, classes)`` and inferences ``(voters, n)`` so far; and whether a class is certain to be
            the voter's label, and whether it still can be, both bool ``(voters, n, classes)``.
        """
        votes = self.votes.sum(0, keepdim=True) if self.flat else self.votes
        drawn = self.drawn.sum(0, keepdim=True) if self.flat else self.drawn
        certain = votes >= self._least[drawn][..., None]
        can = (2 * (votes + (self.each - drawn)[..., None]) > self.each) & ~(certain.any(-1, keepdim=True) & ~certain)
        return votes, drawn, certain, can

    def labels(self) -> tuple[Tensor, Tensor]:
        """Labels ``(n,)``, and whether each is settled: bool ``(n,)``."""
        *_, certain, can = self._standing()
        wins = 2 * certain.sum(0) > self.voters  # (n, classes)
        can_win = (2 * can.sum(0) > self.voters).any(-1)
        labels = torch.where(wins.any(-1), wins.int().argmax(-1), ABSTAIN)
        return labels, wins.any(-1) | ~can_win

    def wanted(self) -> Tensor:
        """How many inferences each member makes next for each image: ``(members, n)``, all zero at the end.

        They are no more than would settle the label if they all agreed, so no unneeded inference is made.
        """
        votes, drawn, certain, can = self._standing()
        _, settled = self.labels()
        # The leading class: first by voters for which it is certain, then by votes.
        leading = (certain.sum(0) * self.each * self.voters + (votes * can).sum(0)).argmax(-1)  # (n,)
        missing = self.voters // 2 + 1 - certain.sum(0).gather(-1, leading[:, None])[:, 0]
        undecided = can.any(-1) & ~certain.any(-1)  # (voters, n)
        turn = undecided & (undecided.cumsum(0) <= missing)
        steps = self._steps(drawn, votes.amax(-1))
        wanted = torch.where(turn & ~settled, torch.minimum(steps, self.each - drawn), 0)
        if not self.flat:
            return wanted
        # The inferences of the only voter, dealt out to the members in order.
        left = self.inferences - self.drawn
        before = left.cumsum(0) - left
        return (wanted - before).clamp(min=0).minimum(left)

    def _steps(self, drawn: Tensor, votes: Tensor) -> Tensor:
        """How many inferences would make a class certain that has ``votes`` of ``drawn``, both ``(voters, n)``."""
        # After k more votes for it: votes + k >= least[drawn + k]. With m = drawn + k this is
        # m - least[m] >= drawn - votes, and the left side never decreases in m.
        numbers = torch.arange(len(self._least), device=drawn.device) - self._least
        return (torch.searchsorted(numbers, drawn - votes) - drawn).clamp_min(1)


@lru_cache(maxsize=64)
def _least_votes(inferences: int, level: float | None) -> list[int]:
    """For every number of draws the least votes that make a class certain to win: a list of ``inferences + 1``.

    Without a ``level`` that is more than half of all inferences. With a ``level`` it is the least number with which the
    class wins with this probability. If every final number of votes is equally likely beforehand, a class with ``v`` of
    ``n`` draws has at least ``K`` of ``S`` votes at the end with probability ``P(X <= v)``, where ``X`` is
    hypergeometric: of ``S + 1`` balls ``K`` are marked, and ``n + 1`` are drawn (the ``v``-th order statistic of a
    sample without replacement is at least ``K``).
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

    v, below, least = 0, chance(0, 0), []  # below: P(X <= v)
    for n in range(inferences + 1):
        while v < marked and below < level:
            v += 1
            below += chance(v, n)
        least.append(v)
        if n < inferences:  # one more ball: X exceeds v if it was v and the ball is marked
            below -= chance(v, n) * (marked - v) / (balls - n - 1)
    return least


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
