"""Stopping early: the same labels as the full vote, and never a draw that could have been spared."""

import itertools

import pytest
import torch

from neuralsde_ito.votes import RULES, Poll, decide


def ballots(members: int, n: int, classes: int, inferences: int, seed: int = 0) -> torch.Tensor:
    """The class that every inference finds, ``(members, n, inferences)``, from clear to wholly undecided images."""
    gen = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(n, generator=gen) * 5
    shares = (torch.randn(members, n, classes, generator=gen) + sharpness[:, None] * torch.eye(classes)[0]).softmax(-1)
    flat = torch.multinomial(shares.flatten(0, 1), inferences, replacement=True, generator=gen)
    return flat.view(members, n, inferences)


def run(poll: Poll, found: torch.Tensor) -> Poll:
    """Draw as the poll wants, each member's inferences in their order."""
    while (wanted := poll.wanted()).any():
        drawn = poll.drawn
        assert (drawn + wanted <= found.shape[2]).all()
        for m, i in wanted.nonzero().tolist():
            start = int(drawn[m, i])
            classes = found[m, i, start : start + int(wanted[m, i])]
            poll.count(m, torch.full_like(classes, i), classes)
    return poll


def votes_of(found: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(found, classes).sum(2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("members", "inferences"), [(1, 1), (1, 20), (2, 3), (3, 20), (4, 5), (5, 20)])
def test_labels_are_those_of_the_full_vote(rule, members, inferences):
    found = ballots(members, 1500, 4, inferences, seed=members)
    poll = run(Poll(members, 1500, 4, inferences, rule), found)
    labels, settled = poll.labels()
    wanted = decide(votes_of(found, 4), rule)
    assert settled.all()
    assert torch.equal(labels, wanted)
    assert len(wanted.unique()) > 2  # abstentions, and more than one class
    if members * inferences > 2:
        assert poll.drawn.sum(0).double().mean() < members * inferences


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("members", "inferences"), [(1, 4), (2, 2), (3, 2), (2, 3), (3, 1)])
def test_settled_means_that_no_completion_gives_another_label(rule, members, inferences):
    # Every partial vote of two classes and a third, against all the ways in which it may end.
    classes = 3
    states = [s for s in itertools.product(range(inferences + 1), repeat=classes) if sum(s) <= inferences]
    ends = [s for s in states if sum(s) == inferences]
    for partial in itertools.product(states, repeat=members):
        completions = itertools.product(
            *[[e for e in ends if all(a <= b for a, b in zip(p, e, strict=True))] for p in partial]
        )
        labels = {int(decide(torch.tensor(end)[:, None], rule)) for end in completions}
        poll = Poll(members, 1, classes, inferences, rule)
        poll.votes[:, 0] = torch.tensor(partial)
        label, settled = poll.labels()
        assert bool(settled) == (len(labels) == 1), partial
        if settled:
            assert int(label) in labels
            assert not poll.wanted().any()
        else:
            assert poll.wanted().any()


@pytest.mark.parametrize(("rule", "fewest"), [("hierarchical", 22), ("flat", 31)])
def test_a_unanimous_image_takes_the_combinatorial_minimum(rule, fewest):
    found = torch.zeros(3, 1, 20, dtype=torch.int64)
    poll = run(Poll(3, 1, 10, 20, rule), found)
    assert int(poll.drawn.sum()) == fewest


def test_an_image_that_splits_its_members_draws_only_what_is_left_to_decide():
    found = torch.zeros(3, 1, 20, dtype=torch.int64)
    found[1] = 1
    poll = run(Poll(3, 1, 10, 20), found)
    assert poll.drawn[:, 0].tolist() == [11, 11, 11]
    assert int(poll.labels()[0]) == 0


@pytest.mark.parametrize("rule", RULES)
def test_confidence_draws_less_and_keeps_its_word(rule):
    # Shares of the leading class as the prior has them: then the promise is about the mean over images.
    n, inferences, confidence = 4000, 20, 0.95
    gen = torch.Generator().manual_seed(5)
    share = torch.rand(n, generator=gen)
    found = (torch.rand(3, n, inferences, generator=gen) > share[:, None]).long()
    exact = run(Poll(3, n, 2, inferences, rule), found)
    quick = run(Poll(3, n, 2, inferences, rule, confidence), found)
    assert quick.drawn.sum() < 0.8 * exact.drawn.sum()
    wrong = (quick.labels()[0] != exact.labels()[0]).double().mean()
    assert 0 < wrong <= 1 - confidence


@pytest.mark.parametrize("confidence", [0.5, 1.0, 0, 2, float("nan")])
def test_a_confidence_out_of_range(confidence):
    with pytest.raises(ValueError, match="confidence must be above"):
        Poll(1, 1, 2, 5, confidence=confidence)
