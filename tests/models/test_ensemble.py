"""Votes and decisions by hand and by brute force; noise that depends on the image's name and on nothing else."""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import digits_resnet
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito import ABSTAIN, ItoEnsemble, decide, kernels, make_keys
from neuralsde_ito.data import InMemory
from neuralsde_ito.models import ensemble as ensemble_module
from neuralsde_ito.models.votes import RULES
from neuralsde_ito.modules import evaluating
from neuralsde_ito.noise import brownian
from neuralsde_ito.noise import normals as noise
from neuralsde_ito.noise.keys import PathRange

# Another batch size takes other kernels, with other last bits: a label may differ where two logits are closer.
GAP = 1e-4


@pytest.fixture(scope="module")
def digits() -> InMemory:
    split = ito.load_data("digits").test
    assert isinstance(split, InMemory)
    return split


@pytest.fixture(scope="module")
def images(digits) -> Tensor:
    return digits.pixels.float() / 255


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> nn.Module:
    """A ResNet-8 that knows the digits a little: its votes differ between images and between inferences."""
    return digits_resnet(tmp_path_factory.mktemp("net"), epochs=2)


@pytest.fixture
def ensemble(net) -> ItoEnsemble:
    """Three members of different noise, not trained for it, so that there are all kinds of votes."""
    members = [ito.recast(net, omega=omega, image_shape=(1, 8, 8)) for omega in (1.5, 2.5, 3.5)]
    return ItoEnsemble(members, inferences=5)


@pytest.fixture
def exact(net) -> ItoEnsemble:
    """In float64, where other kernels' last bits are far below every tolerance; two members."""
    members = [ito.recast(net, omega=omega, image_shape=(1, 8, 8)).double() for omega in (1.2, 2.0)]
    return ItoEnsemble(members, inferences=4)


def smallest_gaps(ensemble: ItoEnsemble, x: Tensor, seed: int = 0, index: Tensor | None = None) -> Tensor:
    """The smallest distance between an image's two highest logits, over all of its inferences: ``(N,)``."""
    total = len(ensemble.members) * ensemble.inferences
    with torch.no_grad():
        top = ensemble.path_logits(x, PathRange(seed, "report", index, 0, total)).topk(2, -1).values
    return (top[..., 0] - top[..., 1]).amin(0)


# --- decide ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("votes", "hierarchical", "flat"),
    [
        # One member: both rules are the same.
        ([[3, 2, 0]], 0, 0),
        ([[0, 0, 1]], 2, 2),
        ([[2, 2, 1]], ABSTAIN, ABSTAIN),  # a tie
        ([[2, 1, 1]], ABSTAIN, ABSTAIN),  # exactly half is no majority
        ([[3, 1, 1]], 0, 0),
        # Two members: one of two is half.
        ([[3, 1], [1, 3]], ABSTAIN, ABSTAIN),
        ([[4, 0], [2, 2]], ABSTAIN, 0),  # the second member has no label; 6 of 8 inferences
        ([[3, 1], [3, 1]], 0, 0),
        # Three members.
        ([[3, 2], [3, 2], [0, 5]], 0, 1),  # two narrow wins against one landslide: the rules contradict
        ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], ABSTAIN, ABSTAIN),
        ([[5, 0, 0], [2, 2, 1], [2, 2, 1]], ABSTAIN, 0),  # one label among three members; 9 of 15
        ([[3, 1, 1], [3, 1, 1], [1, 1, 3]], 0, ABSTAIN),  # 7 of 15 inferences
        # Four members: two of four is exactly half, three is not.
        ([[4, 0], [4, 0], [0, 4], [0, 4]], ABSTAIN, ABSTAIN),
        ([[4, 0], [4, 0], [4, 0], [0, 4]], 0, 0),
        ([[4, 0], [4, 0], [2, 2], [2, 2]], ABSTAIN, 0),
    ],
)
def test_decisions_by_hand(votes, hierarchical, flat):
    tensor = torch.tensor(votes)[:, None]  # (members, 1, classes)
    assert decide(tensor, "hierarchical").tolist() == [hierarchical]
    assert decide(tensor, "flat").tolist() == [flat]
    assert decide(tensor).tolist() == [hierarchical]  # the default


def test_many_members_without_a_majority_abstain():
    # Class 0 leads with 50 of 101 members, and with half of all inferences but one.
    votes = torch.zeros(101, 1, 3, dtype=torch.int64)
    votes[:50, :, 0] = votes[50:90, :, 1] = votes[90:, :, 2] = 7
    for rule in RULES:
        assert decide(votes, rule).tolist() == [ABSTAIN]
    votes[50] = torch.tensor([7, 0, 0])
    for rule in RULES:
        assert decide(votes, rule).tolist() == [0]


def brute_force(votes: list[list[int]], rule: str) -> int:
    """One image: the sentences of the design, word by word."""

    def more_than_half(ballots: list[int], of: int) -> int:
        return next((c for c in set(ballots) - {ABSTAIN} if 2 * ballots.count(c) > of), ABSTAIN)

    inferences = [[c for c, n in enumerate(member) for _ in range(n)] for member in votes]
    if rule == "flat":
        ballots = list(itertools.chain(*inferences))
        return more_than_half(ballots, len(ballots))
    return more_than_half([more_than_half(member, len(member)) for member in inferences], len(votes))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("members", "inferences", "classes"), [(1, 4, 3), (2, 3, 2), (3, 5, 3), (4, 6, 2), (5, 3, 4)])
def test_decisions_agree_with_brute_force(rule, members, inferences, classes):
    gen = torch.Generator().manual_seed(members)
    weights = torch.rand(300, classes, generator=gen) ** 3  # some images clear, some not
    picks = torch.multinomial(weights, members * inferences, replacement=True, generator=gen)
    votes = nn.functional.one_hot(picks, classes).view(300, members, inferences, classes).sum(2).transpose(0, 1)
    wanted = [brute_force(votes[:, n].tolist(), rule) for n in range(300)]
    assert 5 <= wanted.count(ABSTAIN) <= 295  # both kinds are met
    assert decide(votes, rule).tolist() == wanted


def test_a_single_member_makes_the_rules_equal():
    votes = torch.randint(0, 4, (1, 500, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(decide(votes, "flat"), decide(votes, "hierarchical"))


def test_an_unknown_rule_meets_the_nearest_name(ensemble):
    with pytest.raises(ValueError, match="'hierarchic'; did you mean 'hierarchical'"):
        decide(torch.ones(1, 1, 2), "hierarchic")
    with pytest.raises(ValueError, match="'flatt'; did you mean 'flat'"):
        ItoEnsemble(ensemble.members, rule="flatt")  # type: ignore[arg-type]


# --- predict --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_votes_are_all_counted_and_decide(ensemble, images, rule):
    ensemble.rule = rule
    pred = ensemble.predict(images[:40], seed=1, full=True)
    assert pred.votes.shape == (3, 40, 10)
    assert pred.votes.dtype == torch.int64
    assert (pred.votes.sum(-1) == 5).all()
    assert torch.equal(pred.labels, decide(pred.votes, rule))
    assert pred.drawn.tolist() == [15] * 40
    assert 5 < (pred.labels == ABSTAIN).sum() < 35  # both kinds are met


def test_votes_are_those_of_the_stated_paths(exact, images):
    # An independent count: every member is called with the keys that the address says.
    x, index = images[:12].double(), torch.arange(100, 112)
    pred = exact.predict(x, seed=5, index=index, full=True)
    wanted = torch.zeros(2, 12, 10, dtype=torch.int64)
    for m, model in enumerate(exact.members):
        for inference in range(4):
            with torch.no_grad():
                labels = model(x, make_keys(5, "report", m, inference, index)).argmax(1)
            wanted[m, torch.arange(12), labels] += 1
    assert torch.equal(pred.votes, wanted)


Heard = dict[tuple[object, ...], Tensor]


@pytest.fixture
def heard(monkeypatch) -> Heard:
    """All normals that are drawn, by (key, address, size)."""
    normals, drawn = noise.normals, {}  # type: ignore[var-annotated]

    def record(keys: Tensor, size: int, *address: int, dtype: torch.dtype = torch.float32) -> Tensor:
        out = normals(keys, size, *address, dtype=dtype)
        for key, row in zip(keys.tolist(), out, strict=True):
            drawn[key, *address, size] = row.clone()
        return out

    def add(
        x: Tensor,
        keys: Tensor,
        scale: float,
        *address: int,
        in_place: bool = False,
        relu: kernels.Rectifier | None = None,
    ) -> Tensor:
        x = x if relu is None else kernels.rectify_(x, relu)
        return x + scale * record(keys, x[0].numel(), *address, dtype=x.dtype).view(x.shape)

    monkeypatch.setattr(noise, "normals", record)
    monkeypatch.setattr(brownian, "add_normals", add)
    return drawn


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_the_same_images_get_the_same_noise_and_labels_in_any_batch(net, images, heard, batch):
    ensemble = ItoEnsemble([ito.recast(net, omega=o, image_shape=(1, 8, 8)) for o in (1.2, 2.0)], inferences=3)
    x = images[: 262 if batch == 256 else 22]  # neither is a multiple
    index = torch.arange(len(x))
    whole = ensemble.predict(x, seed=3, index=index, full=True)
    once = dict(heard)
    own = {
        int(key)
        for key in ito.make_keys(3, "report", torch.arange(2)[:, None, None], torch.arange(3)[:, None], index).flatten()
    }
    assert own <= {key for key, *_ in once}  # the others compare the quick copy with the reference
    once = {name: row for name, row in once.items() if name[0] in own}
    assert len({key for key, *_ in once}) == 2 * 3 * len(x)
    heard.clear()
    parts = [
        ensemble.predict(a, seed=3, index=i, full=True) for a, i in zip(x.split(batch), index.split(batch), strict=True)
    ]
    heard = {name: row for name, row in heard.items() if name[0] in own}
    assert heard.keys() == once.keys()
    assert all(torch.equal(row, once[name]) for name, row in heard.items())  # bit for bit
    clear = smallest_gaps(ensemble, x, 3, index) >= GAP
    assert clear.float().mean() > 0.9  # or the next lines would ask little
    votes = torch.cat([part.votes for part in parts], 1)
    labels = torch.cat([part.labels for part in parts])
    assert torch.equal(votes[:, clear], whole.votes[:, clear])
    assert torch.equal(labels[clear], whole.labels[clear])
    assert len(labels.unique()) > 2


def test_a_prediction_can_be_repeated_whatever_the_global_state(ensemble, images):
    first = ensemble.predict(images[:30], seed=2, full=True)
    state = torch.get_rng_state()
    again = ensemble.predict(images[:30], seed=2, full=True)
    assert torch.equal(torch.get_rng_state(), state)  # neither read nor changed
    torch.manual_seed(99)
    reseeded = ensemble.predict(images[:30], seed=2, full=True)
    for other in (again, reseeded):
        assert torch.equal(other.votes, first.votes)
        assert torch.equal(other.labels, first.labels)


def test_other_seeds_and_other_panels_give_other_votes(ensemble, images):
    x = images[:60]
    first = ensemble.predict(x, seed=0, full=True)
    for other in (ensemble.predict(x, seed=1, full=True), ensemble.predict(x, seed=0, purpose="selection", full=True)):
        changed = (other.votes != first.votes).any(-1).any(0).float().mean()
        assert changed > 0.3
    assert torch.equal(ensemble.predict(x, seed=0, purpose="report", full=True).votes, first.votes)


def test_inferences_of_one_image_and_members_do_not_share_noise(net, images):
    # Twice the same member: only the number in the address tells them apart.
    model = ito.recast(net, omega=1.5, image_shape=(1, 8, 8))
    votes = ItoEnsemble([model, model], inferences=9).predict(images[:60], full=True).votes
    assert (votes.amax(-1) < 9).float().mean() > 0.2  # inferences differ
    assert (votes[0] != votes[1]).any(-1).float().mean() > 0.2  # members differ


@pytest.mark.parametrize("chunk", [1, 3, 64, 10_000])
def test_the_chunk_does_not_change_the_result(exact, images, chunk):
    x = images[:20].double()
    wanted = exact.predict(x, full=True)
    paths = exact.path_logits(x, PathRange(0, "report", torch.arange(len(x)), 0, 8))
    exact.chunk = chunk
    assert torch.equal(exact.predict(x, full=True).votes, wanted.votes)
    torch.testing.assert_close(
        exact.path_logits(x, PathRange(0, "report", torch.arange(len(x)), 0, 8)), paths, rtol=0, atol=1e-11
    )


def test_the_index_names_the_images(exact, images):
    x, index = images[:25].double(), torch.arange(1000, 1025)
    wanted = exact.predict(x, index=index, full=True)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    permuted = exact.predict(x[order], index=index[order], full=True)
    assert torch.equal(permuted.votes, wanted.votes[:, order])
    assert torch.equal(permuted.labels, wanted.labels[order])
    # The default names are positions; other names are other noise.
    assert torch.equal(exact.predict(x, full=True).votes, exact.predict(x, index=torch.arange(25), full=True).votes)
    assert not torch.equal(exact.predict(x, full=True).votes, wanted.votes)


def test_one_image_alone_is_voted_on_as_in_company(exact, images):
    x = images[:6].double()
    together = exact.predict(x, index=torch.arange(6), full=True)
    for i in range(6):
        alone = exact.predict(x[i : i + 1], index=torch.tensor([i]), full=True)
        assert alone.votes.shape == (2, 1, 10)
        assert alone.labels.shape == alone.drawn.shape == (1,)
        assert torch.equal(alone.votes[:, 0], together.votes[:, i])


def test_predicting_neither_depends_on_the_mode_nor_changes_it(ensemble, images):
    wanted = ensemble.predict(images[:20], full=True)
    ensemble.train()
    ensemble.members[1].eval()
    frozen = next(m for m in ensemble.members[0].modules() if isinstance(m, nn.BatchNorm2d))
    frozen.eval()  # a mixture, which one train() at the end would not restore
    modes = [module.training for module in ensemble.modules()]
    state = {name: value.clone() for name, value in ensemble.state_dict().items()}
    found = ensemble.predict(images[:20], full=True)
    assert torch.equal(found.votes, wanted.votes)
    assert [module.training for module in ensemble.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in ensemble.state_dict().items())


def test_modes_are_restored_after_an_error(ensemble):
    ensemble.train()

    def fail() -> None:
        with evaluating(ensemble):
            assert not any(module.training for module in ensemble.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert all(module.training for module in ensemble.modules())


def test_predicting_builds_no_graph(ensemble, images):
    x = images[:3].clone().requires_grad_()
    assert not ensemble.predict(x, full=True).votes.requires_grad
    assert x.grad is None


def test_without_noise_all_inferences_agree_with_the_network(net, images):
    ensemble = ItoEnsemble([ito.recast(net, omega=0, image_shape=(1, 8, 8))], inferences=3)
    with torch.no_grad():
        labels = net(images[:50]).argmax(1)
    pred = ensemble.predict(images[:50], full=True)
    assert torch.equal(pred.labels, labels)
    assert (pred.votes.amax(-1) == 3).all()


# --- paths ----------------------------------------------------------------------------------------------


def test_paths_are_dealt_to_the_members_in_turn(exact, images):
    x, index = images[:5].double(), torch.tensor([7, 3, 99, 0, 12])
    found = exact.path_logits(x, PathRange(11, "gradient", index, 3, 6))
    assert found.shape == (6, 5, 10)
    for place, q in enumerate(range(3, 9)):
        keys = make_keys(11, "gradient", q % 2, q // 2, index)
        torch.testing.assert_close(found[place], exact.members[q % 2](x, keys), rtol=0, atol=1e-11)
    assert not torch.allclose(found[0], found[2])  # the same member, another inference


@pytest.mark.parametrize("cuts", [(1, 6), (2, 5), (3, 3, 1), (1, 1, 1, 1, 1, 1, 1)])
def test_any_split_of_paths_is_the_same_paths(exact, images, cuts):
    x = images[:4].double()
    whole = exact.path_logits(x, PathRange(0, "selection", torch.arange(len(x)), 5, 7))
    starts = [5 + sum(cuts[:i]) for i in range(len(cuts))]
    parts = [
        exact.path_logits(x, PathRange(0, "selection", torch.arange(len(x)), first, count))
        for first, count in zip(starts, cuts, strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-11)


def test_paths_are_differentiable_one_by_one(exact, images):
    x, index = images[:3].double().requires_grad_(), torch.tensor([4, 5, 6])
    logits = exact.path_logits(x, PathRange(0, "gradient", index, 0, 5))
    (found,) = torch.autograd.grad(logits[3].square().sum(), x)
    (wanted,) = torch.autograd.grad(exact.members[1](x, make_keys(0, "gradient", 1, 1, index)).square().sum(), x)
    assert wanted.abs().amax() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


# --- the ensemble as one differentiable model -----------------------------------------------------------


def test_a_call_is_the_log_mean_probability(exact, images, monkeypatch):
    # With the fresh keys held fast, the mean over 2 members x 3 paths and its gradient can be done by hand.
    exact.paths_per_call = 3
    drawn = []

    def fixed(n: int, device: object = None) -> Tensor:
        drawn.append(make_keys(0, "fresh", index=torch.arange(n)))
        return drawn[-1]

    monkeypatch.setattr(ensemble_module, "fresh_keys", fixed)
    x = images[:4].double().requires_grad_()
    found = exact(x)
    keys = drawn[0].view(2, 3, 4)
    share = sum(exact.members[m](x, keys[m, p]).softmax(-1) for m in range(2) for p in range(3)) / 6
    torch.testing.assert_close(found, share.log(), rtol=1e-9, atol=1e-9)  # type: ignore[union-attr]
    upward = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((found * upward).sum(), x)
    (wanted,) = torch.autograd.grad((share.log() * upward).sum(), x)  # type: ignore[union-attr]
    assert (wanted.flatten(1).norm(dim=1) > 1e-3).all()
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-9)


def test_probabilities_sum_to_one_even_where_members_are_sure(ensemble, images):
    for model in ensemble.members:
        model.head[-1].weight.data.mul_(1000)  # probabilities that underflow unless logs are taken first
    logp = ensemble(images[:50])
    assert logp.isfinite().all()
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(50))


def test_every_call_draws_fresh_noise_even_after_a_reseed(ensemble, images):
    torch.manual_seed(0)
    first = ensemble(images[:4])
    torch.manual_seed(0)
    second = ensemble(images[:4])
    assert (first != second).any(-1).all()
    # Two copies of one image in one batch are two images.
    twins = ensemble(images[:1].expand(2, -1, -1, -1))
    assert not torch.allclose(twins[0], twins[1])


def test_more_paths_a_call_vary_less(ensemble, images, monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(
        ensemble_module,
        "fresh_keys",
        lambda n, device: make_keys(next(calls), "fresh", index=torch.arange(n)),
    )

    def spread(paths: int) -> float:
        ensemble.paths_per_call = paths
        with torch.no_grad():
            found = torch.stack([ensemble(images[:40]).exp() for _ in range(12)])
        return float(found.var(0).mean())

    assert spread(1) / spread(8) == pytest.approx(8, rel=0.25)  # variance falls as 1 / paths


# --- what is refused ------------------------------------------------------------------------------------


def test_an_ensemble_needs_members():
    with pytest.raises(ValueError, match="at least one member"):
        ItoEnsemble([])


@pytest.mark.parametrize("name", ["inferences", "paths_per_call"])
@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3", None])
def test_counts_must_be_whole_numbers(ensemble, name, count):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {count!r}"):
        ItoEnsemble(ensemble.members, **{name: count})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((2, 1, 8, 8), 1.01), r"in \[0, 1\].*1\.01"),
        (torch.full((2, 1, 8, 8), -0.1), r"in \[0, 1\].*-0\.1"),
        (torch.zeros(2, 1, 8, 8).index_fill(3, torch.tensor(4), math.nan), "finite"),
        (torch.zeros(2, 1, 8, 8).index_fill(3, torch.tensor(4), math.inf), "finite"),
        (torch.zeros(2, 3, 8, 8), "1 channels, got 3"),
        (torch.zeros(1, 8, 8), r"\(N, C, H, W\), got .*\(1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "floating-point.*uint8"),
        (torch.zeros(0, 1, 8, 8), "no images"),
    ],
)
def test_images_that_cannot_be_are_refused(ensemble, x, message):
    with pytest.raises(ValueError, match=message):
        ensemble.predict(x, full=True)


@pytest.mark.parametrize("index", [torch.arange(3), torch.arange(1), torch.zeros(2, 1, dtype=torch.int64)])
def test_an_index_must_name_every_image_once(ensemble, images, index):
    with pytest.raises(ValueError, match="index names the images"):
        ensemble.predict(images[:2], index=index, full=True)


# --- a trained network on real photographs --------------------------------------------------------------


def test_weak_noise_leaves_a_trained_network_right(shared_weights, cifar10_test):
    net = ito.load_resnet("resnet20", weights=shared_weights)
    x, y = cifar10_test
    rows = torch.arange(0, 10_000, 400)  # 25 images
    x, y = x[rows], y[rows]
    with torch.no_grad():
        correct = (net(x).argmax(1) == y).float().mean()
    assert correct > 0.8
    members = [ito.recast(net, omega=0.05), ito.recast(net, omega=0.1)]
    ensemble = ItoEnsemble(members, inferences=4)
    pred = ensemble.predict(x, index=rows, full=True)
    assert (pred.labels == y).float().mean() > correct - 0.1
    assert (pred.votes.amax(-1) < 4).any()  # and yet it is noise
    clear = smallest_gaps(ensemble, x, index=rows) >= GAP
    split = torch.cat([ensemble.predict(x[a], index=rows[a], full=True).labels for a in torch.arange(25).split(7)])
    assert clear.float().mean() > 0.9
    assert torch.equal(split[clear], pred.labels[clear])


# --- what is no number, no image, no batch --------------------------------------------------------------


@pytest.mark.parametrize("broken", ["weight", "bias"])
def test_logits_that_are_not_finite_are_no_votes_for_class_0(net, images, broken):
    model = ito.recast(net, omega=0.2, image_shape=(1, 8, 8))
    with torch.no_grad():
        model.head[-1].get_parameter(broken).fill_(torch.inf)
    ensemble = ItoEnsemble([model, ito.recast(net, omega=0.2, image_shape=(1, 8, 8))], inferences=5)
    for full in (False, True):
        found = ensemble.predict(images[:6], full=full)
        assert found.labels.tolist() == [ABSTAIN] * 6  # one member of two is no majority
        assert int(found.votes[0].sum()) == 0
        assert torch.equal(found.drawn, found.votes.sum((0, 2)) + found.invalid)
        assert bool((found.invalid > 0).all())
    sound = ItoEnsemble([ito.recast(net, omega=0.2, image_shape=(1, 8, 8))], inferences=5).predict(images[:6])
    assert int(sound.invalid.sum()) == 0


def test_noise_beyond_all_measure_is_an_abstention(net, images):
    ensemble = ItoEnsemble([ito.recast(net, omega=1e38, image_shape=(1, 8, 8))], inferences=5)
    found = ensemble.predict(images[:6], full=True)
    assert bool((found.invalid > 0).all())
    assert found.labels.tolist() == [ABSTAIN] * 6


def test_half_precision_that_overflows_votes_for_nobody(net, images):
    model = ito.recast(net, omega=0.2, image_shape=(1, 8, 8))
    with torch.no_grad():
        model.head[-1].weight.mul_(3e5)
    found = ItoEnsemble([model.to(torch.bfloat16).half()], inferences=5).predict(images[:6].half(), full=True)
    assert torch.equal(found.invalid + found.votes.sum((0, 2)), torch.full((6,), 5))
    assert bool((found.invalid > 0).any())


def test_in_train_mode_every_path_is_a_pass_over_the_whole_batch(net, images):
    x = images[:20]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(3):
            ensemble = ItoEnsemble([ito.recast(net, omega=0.0, image_shape=(1, 8, 8))], paths_per_call=2).train()
            ensemble.chunk = 4
            with torch.no_grad():
                found.append((ensemble(x), ensemble.members[0].sdes[0].block.bn1.running_mean.clone()))
    finally:
        torch.set_num_threads(before)
    plain = ito.recast(net, omega=0.0, image_shape=(1, 8, 8)).train()
    with torch.no_grad():
        logits = torch.stack([plain(x), plain(x)])
    for log_probability, mean in found:
        assert torch.equal(mean, plain.sdes[0].block.bn1.running_mean)
        wanted = logits.log_softmax(-1).logsumexp(0) - math.log(2)
        assert torch.allclose(log_probability, wanted, atol=1e-6)


def test_attacks_obey_the_chunk(net, images):
    model, seen = ito.recast(net, omega=0.5, image_shape=(1, 8, 8)), []
    model.sdes[-1].block.register_forward_hook(lambda block, given, found: seen.append(len(found)))
    ensemble = ItoEnsemble([model], inferences=3)
    ensemble.chunk = 4
    y = torch.zeros(8, dtype=torch.int64)
    ito.attacks.pgd(ensemble, images[:8], y, steps=2, eot=2, selection=8)
    assert seen
    assert max(seen) <= 4


def test_an_empty_batch_has_no_logits(ensemble, images):
    with torch.no_grad():
        assert ensemble(images[:0]).shape == (0, 10)
    assert ensemble(images[:0].requires_grad_()).shape == (0, 10)


def test_numpy_s_integers_are_seeds_and_names():
    wanted = make_keys(3, "report", 1, 2, 5)
    assert make_keys(np.int64(3), "report", np.int32(1), np.uint8(2), np.int64(5)) == wanted
    assert make_keys(np.uint64(2**63 + 7), "report") == make_keys(2**63 + 7 - 2**64, "report")


def test_recast_predict_and_quick_copies_under_inference_mode(net, images):
    with torch.inference_mode():
        model = ito.recast(net, omega=0.3, image_shape=(1, 8, 8))
        inside = ItoEnsemble([model], inferences=3)
        labels = inside.predict(images[:5].clone(), full=True).votes
    outside = ItoEnsemble([ito.recast(net, omega=0.3, image_shape=(1, 8, 8))], inferences=3)
    assert torch.equal(outside.predict(images[:5], full=True).votes, labels)
    at = images[:5].clone().requires_grad_()
    assert torch.autograd.grad(inside(at).sum(), at)[0].abs().sum() > 0  # the copy is no inference tensor
