"""Stopping early: the same labels as the full vote, and never a draw that could have been spared."""

import itertools
import tracemalloc

import pytest
import torch
from scipy.stats import betabinom

from neuralsde_ito.models.votes import RULES, Poll, _least_votes, decide, winners
from neuralsde_ito.outcomes import ABSTAIN


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


# --- many inferences, and inferences that are none ------------------------------------------------------


@pytest.mark.parametrize("level", [None, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("inferences", [1, 2, 7, 20, 41])
def test_the_least_votes_are_those_of_the_beta_binomial(inferences, level):
    least, lacking = _least_votes(inferences, level), inferences // 2 + 1
    for n, v in itertools.product(range(inferences + 1), repeat=2):
        if v > n:
            continue
        missing, rest = lacking - v, inferences - n
        likely = level is not None and n > 0 and betabinom.sf(missing - 1, rest, v + 1, n - v + 1) >= level
        sure = missing <= 0 or likely
        assert (v >= least[n]) == sure, (n, v)


def test_a_poll_of_many_inferences_needs_little_memory():
    # Tables of every number of draws and votes took 16 GB for 20,000 inferences.
    tracemalloc.start()
    try:
        poll = Poll(2, 5, 10, 20_000, confidence=0.999)
        wanted = poll.wanted()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6
    assert poll._least.numel() == 20_001
    assert bool((wanted.sum(0) > 0).all())


def test_an_abstention_rests_on_all_members():
    # The chance of an error is shared by all members that may have been stopped too soon.
    for members in (1, 4, 9):
        poll = Poll(members, 1, 3, 20, confidence=0.99)
        assert poll._least.tolist() == _least_votes(20, 1 - 0.01 / members)


@pytest.mark.parametrize("rule", RULES)
def test_inferences_that_are_not_finite_vote_for_nobody(rule):
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [torch.inf, 0.0], [2.0, 1.0]])
    assert winners(logits).tolist() == [1, ABSTAIN, ABSTAIN, 0]
    votes = torch.tensor([[[2, 0]], [[2, 0]], [[5, 0]]])  # three members of 5 inferences, one image
    assert decide(votes, rule, inferences=5).tolist() == ([ABSTAIN] if rule == "hierarchical" else [0])
    assert decide(votes, rule).tolist() == [0]
    poll = Poll(3, 1, 2, 5, rule)
    image = torch.zeros(1, dtype=torch.int64)
    while bool((wanted := poll.wanted()).any()):
        member = int(wanted[:, 0].nonzero()[0])
        poll.count(member, image, torch.tensor([0 if int(poll.drawn[member, 0]) < 2 or member == 2 else ABSTAIN]))
    assert poll.labels()[0].tolist() == decide(votes, rule, inferences=5).tolist()
    assert int(poll.drawn.max()) <= 5
