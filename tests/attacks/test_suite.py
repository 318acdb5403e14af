"""The suite: what fell stays fallen, the report does not choose, a killed run goes on as if nothing had happened."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from problems import random_images
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito.attacks import APGD, BALLS, PGD, Square
from neuralsde_ito.attacks.images import Images
from neuralsde_ito.attacks.objectives import OBJECTIVES
from neuralsde_ito.attacks.other_libraries import PEERS, OnePath, check_peer, peer_attack
from neuralsde_ito.attacks.panels import Panels, right_share
from neuralsde_ito.attacks.report import Report, invalid, worst_labels
from neuralsde_ito.attacks.selection import Selection
from neuralsde_ito.attacks.suite import Step, Suite, SuiteResult, join_results, standard
from neuralsde_ito.attacks.sweep import least_norm
from neuralsde_ito.attacks.targets import KnownPaths
from neuralsde_ito.models.ensemble import NoiseFree
from neuralsde_ito.validation import ItoError

N = 12
INDEX = torch.arange(N)


def make(*omegas: float) -> ito.ItoEnsemble:
    torch.manual_seed(2)
    net = ito.Chain(
        nn.Conv2d(1, 4, 3, 2), [nn.Identity(), nn.Identity()], nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    )
    return ito.ItoEnsemble([ito.recast(net, w, image_shape=(1, 8, 8)) for w in omegas], 5).eval()


@pytest.fixture(scope="module")
def ensemble() -> ito.ItoEnsemble:
    """Three members whose blocks are small, so that votes are neither all clear nor all chance."""
    return make(0.1, 0.2, 0.3)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(N, 8, 1)


@pytest.fixture(scope="module")
def y(ensemble, x) -> Tensor:
    """The likeliest class; of the first image another."""
    labels = ensemble.predict(x, full=True).votes.sum(0).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    return labels


def steps(eps: float) -> list[Step]:
    return [
        Step("transfer", PGD("linf", eps, steps=3), "noise-free"),
        Step("pgd", PGD("linf", eps, steps=3, eot=4, selection=4)),
        Step("apgd", APGD("linf", eps, steps=3, eot=4, selection=4)),
        Step("square", Square("linf", eps, steps=5, eot=4, selection=4)),
    ]


def suite(ensemble, **settings) -> Suite:
    return Suite(steps, {"noise-free": NoiseFree(ensemble)}, **settings)


RADII = [0.02, 0.06, 0.12]
CASES = ("denial", "evasion")


@pytest.fixture(scope="module")
def alone(ensemble, x, y) -> list[SuiteResult]:
    return suite(ensemble).attack(ensemble, Images(x, y, INDEX), RADII)


def test_images_lie_in_the_ball_and_labels_are_the_reports(ensemble, x, y, alone):
    for eps, found in zip(RADII, alone, strict=True):
        for case in (found.denial, found.evasion):
            assert float(BALLS["linf"].length(case.images - x).max()) <= eps + 1e-6
            decided = ensemble.predict(case.images, 0, torch.arange(N), full=True)
            assert torch.equal(decided.labels, case.labels)
            assert torch.equal(decided.votes[None], case.votes)
            assert (case.images == x).flatten(1).all(1)[case.source == -1].all()
    assert (alone[0].denial.labels == y).any()
    assert (alone[-1].denial.source >= 0).any()


def test_images_are_carried_to_larger_radii_and_sources_are_numbered_through(alone):
    for level, (small, large) in enumerate(itertools.pairwise(alone)):
        for goal in CASES:
            one, two = getattr(small, goal), getattr(large, goal)
            same = one.source == two.source
            assert same.any()
            assert torch.equal(one.images[same], two.images[same])
            assert torch.equal(one.labels[same], two.labels[same])
            assert (two.source[~same] >= 8 * (level + 1)).all()  # two goals of four steps at each radius
            assert int(two.source.max()) < 8 * (level + 2)


def test_each_attack_runs_on_what_the_last_ones_left(alone):
    left = None
    for found in alone:
        assert len(found.attacked) == 8
        assert found.survivors == tuple(a - f for a, f in zip(found.attacked, found.fooled, strict=True))
        for attacked, survivors in zip(found.attacked[:4], found.survivors[:4], strict=True):
            assert left is None or attacked == left
            left = survivors
        assert found.attacked[5:] == found.survivors[4:7]
        for square in (3, 7):
            assert found.gradients[square] == 0
            assert found.queries[square] > 0 or found.attacked[square] == 0


def test_no_vote_of_the_report_chooses(ensemble, x, y, monkeypatch):
    asked = []
    predict = ito.ItoEnsemble.predict

    def record(self, x, seed=0, index=None, purpose="report", **settings):
        asked.append((purpose, len(x)))
        return predict(self, x, seed, index, purpose, **settings)

    monkeypatch.setattr(ito.ItoEnsemble, "predict", record)
    suite(ensemble).attack(ensemble, Images(x, y, INDEX), [0.04, 0.1])
    purposes = [purpose for purpose, _ in asked]
    first = purposes.index("report")
    assert set(purposes[:first]) == {"selection"}
    assert purposes.count("report") <= 4  # once a radius and goal, on what was kept
    assert sum(size for purpose, size in asked if purpose == "report") < 4 * N  # what was carried keeps its votes


def test_what_the_report_says_chooses_nothing(ensemble, x, y, alone, monkeypatch):
    predict = ito.ItoEnsemble.predict

    def contrary(self, x, seed=0, index=None, purpose="report", **settings):
        found = predict(self, x, seed, index, purpose, **settings)
        return replace(found, votes=found.votes.roll(1, -1)) if purpose == "report" else found

    monkeypatch.setattr(ito.ItoEnsemble, "predict", contrary)
    again = suite(ensemble).attack(ensemble, Images(x, y, INDEX), RADII)
    for one, two in zip(alone, again, strict=True):
        assert (one.attacked, one.fooled, one.gradients) == (two.attacked, two.fooled, two.gradients)
        for goal in CASES:
            assert torch.equal(getattr(one, goal).images, getattr(two, goal).images)
            assert not torch.equal(getattr(one, goal).labels, getattr(two, goal).labels)


def test_what_abstains_is_attacked_on_for_evasion_at_every_radius(ensemble, x, y, monkeypatch):
    met, run = [], PGD.run

    def record(self, model, x, y, seed, index, start=None):
        met.append((self.goal, self.eps, index.tolist(), start))
        return run(self, model, x, y, seed, index, start)

    monkeypatch.setattr(PGD, "run", record)
    found = suite(ensemble).attack(ensemble, Images(x, y, INDEX), RADII)
    attacked = {eps: set() for eps in RADII}
    for goal, eps, names, start in met:
        if goal == "evasion":
            attacked[eps] |= set(names)
            assert start is not None  # from the best candidate
            assert float(BALLS["linf"].length(start - x[names]).max()) <= eps + 1e-6
    clean = Selection(ensemble, Images(x, y, INDEX), Report())
    clean.offer_clean()
    refused = set(clean.to_attack("evasion").tolist())
    assert refused  # abstained on without attack
    assert refused <= attacked[RADII[0]]
    assert attacked[RADII[0]] & attacked[RADII[1]] & attacked[RADII[2]]
    # Who fell to a wrong answer is left alone for good.
    wrong = [((r.evasion.labels != y) & (r.evasion.labels != ito.ABSTAIN)).sum() for r in found]
    assert wrong[0] < wrong[2]
    assert sum(found[2].fooled[4:]) > 0


def test_images_that_are_fooled_barely_can_be_attacked_on(ensemble, x, y):
    selection = Selection(ensemble, Images(x[:6], y[:6], INDEX[:6]), Report())
    # Not denied; denied by 55, 95 and all of 100 votes; by a wrong answer in 60 and 95 of 100.
    selection.best["denial"].score = torch.tensor([0.2, 2.55, 2.95, 3.0, 4.6, 4.95])
    selection.best["evasion"].score = torch.tensor([0.1, 0.4, 0.5, 0.5, 2.6, 2.95])
    assert selection.to_attack("denial").tolist() == [0]
    assert selection.to_attack("denial", barely=True).tolist() == [0, 1, 4]
    assert selection.to_attack("evasion").tolist() == [1, 2, 3]
    assert selection.to_attack("evasion", barely=True).tolist() == [1, 2, 3, 4]
    selection.ensemble = make(0.0)  # whose votes do not change
    assert selection.to_attack("denial", barely=True).tolist() == [0]


def test_going_on_with_the_barely_fooled_leaves_no_more(ensemble, x, y):
    def twice(barely: bool) -> Suite:
        pgd = PGD("linf", 0.06, steps=3, eot=4, selection=4)
        return Suite(lambda eps: [Step("one", pgd), Step("two", replace(pgd, stop=False), warm=True, barely=barely)])

    (plain,), (more,) = (twice(barely).attack(ensemble, Images(x, y, INDEX), [0.06]) for barely in (False, True))
    assert more.attacked[1] > plain.attacked[1] == more.attacked[0] - more.fooled[0]
    assert more.survivors[1] <= plain.survivors[1]  # who was fooled before counts as fooled


def test_evasion_at_one_radius_is_no_weaker_after_smaller_ones(ensemble, x, y, alone):
    # An abstention that is carried upward and never attacked again raised "correct + abstained".
    (only,) = suite(ensemble).attack(ensemble, Images(x, y, INDEX), RADII[2:])

    def wrong(found: SuiteResult) -> int:
        return int(((found.evasion.labels != y) & (found.evasion.labels != ito.ABSTAIN)).sum())

    assert wrong(alone[2]) >= wrong(only) - 1


def equal(one: object, two: object) -> bool:
    """Of all fields, and of all of theirs."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if is_dataclass(one):
        return all(equal(getattr(one, f.name), getattr(two, f.name)) for f in fields(one))
    return one == two


def test_a_suite_killed_after_any_step_goes_on_as_if_nothing_had_happened(ensemble, x, y, alone, tmp_path, monkeypatch):
    radii, keep, order, some = RADII[1:], Suite._keep, [], torch.arange(0, N, 2)

    def run(**settings) -> list[SuiteResult]:
        return suite(ensemble, **settings).attack(ensemble, Images(x[some], y[some], some), radii)

    whole = run()
    assert all(max(found.fooled[:4]) and max(found.fooled[4:]) for found in whole)  # there is credit to be lost

    def record(file, tensors):
        keep(file, tensors)
        order.append(file)

    monkeypatch.setattr(Suite, "_keep", staticmethod(record))
    run(state=tmp_path / "whole")
    steps = list(order)
    assert len(steps) == 1 + len(radii) * 9  # the clean images; at each radius eight attacks and the report
    for kill in range(len(steps)):
        state = tmp_path / str(kill)
        state.mkdir()
        for file in steps[:kill]:
            shutil.copy(file, state)
        order.clear()
        again = run(state=state)
        assert all(itertools.starmap(equal, zip(whole, again, strict=True))), kill
        assert [file.name for file in order] == [file.name for file in steps[kill:]]  # what was done is not done again


def test_a_suite_killed_at_every_step_ends_as_if_nothing_had_happened(ensemble, x, y, alone, tmp_path, monkeypatch):
    keep, kills = Suite._keep, 0

    def stop(file, tensors):
        keep(file, tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(Suite, "_keep", staticmethod(stop))
    while True:
        try:
            again = suite(ensemble, state=tmp_path).attack(ensemble, Images(x, y, INDEX), RADII)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 1 + len(RADII) * 9
    assert all(itertools.starmap(equal, zip(alone, again, strict=True)))


def test_radii_that_print_alike_are_not_taken_for_one_another(ensemble, x, y, tmp_path):
    radii = [0.1, 0.1 + 1e-9]
    first, second = suite(ensemble, state=tmp_path).attack(ensemble, Images(x, y, INDEX), radii)
    assert first.attacked[0] - sum(first.fooled[:4]) == second.attacked[0]


def test_the_worst_of_several_votes_by_hand():
    a, truth = ito.ABSTAIN, torch.zeros(6, dtype=torch.int64)
    decided = torch.tensor([[0, a, 3, 0, a, 2], [0, 0, 0, a, 2, 3]])
    votes = torch.where(decided[..., None] == torch.arange(4), 5, 0) + (decided == a)[..., None].long()
    assert worst_labels(votes[:, None], truth, "hierarchical", 5).tolist() == [0, a, 3, a, 2, 2]
    assert worst_labels(votes[:1, None], truth, "flat", 5).tolist() == decided[0].tolist()
    assert invalid(votes[:, None], 5) == 3  # 4 of 5 voted where there is no majority


def test_the_reports_votes_are_full_and_repeated_by_seed(ensemble, x):
    names = torch.arange(N) + 7
    votes = Report(3, repeat=2).votes(ensemble, x, names)
    assert votes.shape == (2, 3, N, 4)
    assert (votes.sum(-1) == 5).all()
    for again in range(2):
        assert torch.equal(votes[again], ensemble.predict(x, 3 + again, names, full=True).votes)


@pytest.mark.filterwarnings("ignore:The gradient is not finite")
def test_an_ensemble_without_answers_is_denied_and_never_evaded(ensemble, x, y):
    broken = copy.deepcopy(ensemble)
    with torch.no_grad():
        for member in broken.members[1:]:
            next(p for p in reversed(list(member.parameters()))).fill_(torch.inf)
    found = suite(broken).attack(broken, Images(x[:4], y[:4], torch.arange(4)), RADII[:1])[0]
    for case in (found.denial, found.evasion):
        assert (case.labels == ito.ABSTAIN).all()
        assert invalid(case.votes, 5) == 2 * 5 * 4  # two members, five inferences, four images
    assert found.attacked[:4] == (0,) * 4  # denied without attack
    assert found.attacked[4:] == (4,) * 4
    assert sum(found.fooled) == 0
    assert sum(found.blind) > 0


def test_batches_are_joined(ensemble, x, y, alone):
    parts = [
        suite(ensemble).attack(ensemble, Images(x[part], y[part], torch.arange(N)[part]), RADII)
        for part in (slice(0, 5), slice(5, N))
    ]
    for level, whole in enumerate(alone):
        found = join_results([part[level] for part in parts])
        for goal in CASES:
            assert torch.equal(getattr(found, goal).labels, getattr(whole, goal).labels)
            assert torch.equal(getattr(found, goal).votes, getattr(whole, goal).votes)
        assert (found.attacked, found.fooled) == (whole.attacked, whole.fooled)
        assert found.gradients == whole.gradients


def left(made: list[SuiteResult], y: Tensor) -> int:
    return int((made[-1].denial.labels == y).sum())


def test_whoever_knows_the_paths_or_asks_often_leaves_no_more(ensemble, x, y, alone):
    known = suite(ensemble, noise="known").attack(ensemble, Images(x, y, INDEX), RADII[:2])
    assert left(known, y) <= left(alone[:2], y)
    often = suite(ensemble, repeat=5).attack(ensemble, Images(x, y, INDEX), RADII[:2])
    assert left(often, y) <= left(alone[:2], y)


def known(eps: float) -> PGD:
    return PGD("linf", eps, steps=4, eot=6, objective="mean-logits", stop=False)


def test_the_chosen_images_are_voted_on_along_fixed_paths(ensemble, x, y):
    found = suite(ensemble, known=known).attack(ensemble, Images(x, y, INDEX), RADII)
    differ = 0
    for result in found:
        for goal in CASES:
            case, labels = getattr(result, goal), getattr(result.noises["fixed"], goal)
            assert torch.equal(labels, ensemble.predict(case.images, 0, torch.zeros(N, dtype=torch.int64)).labels)
            differ += int((labels != case.labels).sum())
        assert result.noises["fixed"].gradients == 0
    assert differ > 0


def test_an_attack_that_knows_the_paths_goes_on_where_the_chosen_image_is_not_wrong(ensemble, x, y, monkeypatch):
    met, run = [], PGD.run

    def record(self, model, x, y, seed, index, start=None):
        result = run(self, model, x, y, seed, index, start)
        if isinstance(model, KnownPaths):
            met.append((index, start, result.images))
        return result

    monkeypatch.setattr(PGD, "run", record)
    (found,) = suite(ensemble, known=known).attack(ensemble, Images(x, y, INDEX), RADII[1:2])
    ((rows, start, images),) = met
    chosen, labels = found.denial.labels, found.noises["known"].denial
    wrong = (found.evasion.labels != y) & (found.evasion.labels != ito.ABSTAIN)
    assert torch.equal(rows, (~wrong).nonzero()[:, 0])
    assert torch.equal(start, found.denial.images[rows])
    assert torch.equal(labels[wrong], found.evasion.labels[wrong])
    decided = ensemble.predict(images, 0, rows).labels
    better = decided == y[rows]  # the chosen image stays
    assert torch.equal(labels[rows][better], chosen[rows][better])
    assert torch.equal(labels[rows][~better & (chosen[rows] == y[rows])], decided[~better & (chosen[rows] == y[rows])])
    assert int((labels == y).sum()) < int((chosen == y).sum())  # it finds what the attack on fresh noise does not
    assert found.noises["known"].gradients == 4 * 6 * len(rows)


def test_other_noise_is_left_out_where_it_says_nothing(ensemble, x, y):
    calm = make(0.0)
    for defender, noise in ((ensemble, "known"), (ensemble, "fixed"), (calm, "fresh")):
        (found,) = suite(defender, noise=noise, known=known).attack(defender, Images(x, y, INDEX), RADII[:1])
        assert found.noises == {}


def test_other_noise_is_kept_and_joined(ensemble, x, y, tmp_path):
    images = Images(x, y, INDEX)
    whole = suite(ensemble, known=known, state=tmp_path).attack(ensemble, images, RADII[:2])
    again = suite(ensemble, known=known, state=tmp_path).attack(ensemble, images, RADII[:2])
    assert all(itertools.starmap(equal, zip(whole, again, strict=True)))
    parts = [suite(ensemble, known=known).attack(ensemble, images[part], RADII[:2]) for part in (slice(5), slice(5, N))]
    for level, result in enumerate(whole):
        assert equal(join_results([part[level] for part in parts]).noises, result.noises)


def test_known_paths_in_turn_are_the_reports_and_no_others(ensemble, x, y):
    target, index = KnownPaths(ensemble, x, 3, 4), INDEX
    report = ensemble.path_logits(x, ito.PathRange(3, "report", index, 0, 15))  # three members, five inferences
    assert target.distinct is None
    assert torch.allclose(target.path_logits(x, ito.PathRange(0, "selection", index, 7, 2)), report, atol=1e-5)
    seen = [
        target.ascend(OBJECTIVES["mean-loss"], x, y, ito.PathRange(0, "gradient", index, 4 * draw, 4)).logits
        for draw in range(4)
    ]
    for logits, first in zip(seen, (0, 4, 8, 11), strict=True):  # the last range ends with the last path
        assert torch.allclose(logits, report[first : first + 4], atol=1e-5)
    assert KnownPaths(ensemble, x, 3, 15).distinct == 15
    for selection in (2, 20):  # paths of a draw: the target gives all 15 instead
        panels = Panels(target, y, 0, index, 4, selection, 9)
        assert torch.equal(panels.wins(x, torch.arange(len(x)), 0, "denial", 0.85), right_share(report, y) < 2.5 / 15)
        assert panels.queries == 15 * len(x)


def test_fixed_noise_is_the_same_for_all_images(ensemble, x, y):
    same = Images(x[:1].expand(4, -1, -1, -1), y[:1].expand(4), torch.arange(4))
    decided = suite(ensemble, noise="fixed").report.decide(ensemble, same)
    assert (decided == decided[0]).all()


def test_settings_that_cannot_be(ensemble, x, y):
    with pytest.raises(ValueError, match="fresh"):
        suite(ensemble, noise="frsh")
    with pytest.raises(ValueError, match="repeat"):
        suite(ensemble, repeat=0)
    for radii in ([0.1, 0.05], [0.1, 0.1]):
        with pytest.raises(ito.ItoError, match="Radii must rise"):
            suite(ensemble).attack(ensemble, Images(x, y, INDEX), radii)


def test_standard_spends_no_more_than_eotpgd_or_autoattack():
    # EOTPGD: 100 steps of 20 paths. AutoAttack's rand: twice that.
    def gradients(step: Step) -> int:
        attack = step.attack
        if isinstance(attack, Square):
            return 0
        classes = attack.targets if attack.objective.startswith("targeted") else 1
        paths = attack.eot if step.through == "itself" else 1
        return (attack.steps + isinstance(attack, APGD)) * classes * paths

    assert sum(map(gradients, standard("linf", 0.1, True))) == 719 < 2000  # as its docstring says
    assert [step.name for step in standard("l2", 0.5, False)][-1] == "Square"
    assert all(step.attack.steps == 1 for step in standard("l2", 0.5, True, effort=1e-9))


def test_least_norms_are_where_images_fall(ensemble, x, y):
    found = least_norm(ensemble, x, y, lambda eps: PGD("linf", eps, steps=3, eot=4, selection=4), 0.3, rounds=4)
    clean = ensemble.predict(x).labels
    assert torch.equal(found == 0, clean != y)
    assert found.isfinite().any()
    finite = found[(found > 0) & found.isfinite()]
    assert ((finite / 0.3 * 16).round() - finite / 0.3 * 16).abs().max() < 1e-4
    assert math.isinf(float(found.max())) or float(found.max()) <= 0.3 + 1e-6


def test_the_report_chooses_no_least_norm(ensemble, x, y, monkeypatch):
    asked, predict = [], ito.ItoEnsemble.predict

    def record(self, x, seed=0, index=None, purpose="report", **settings):
        asked.append(purpose)
        return predict(self, x, seed, index, purpose, **settings)

    monkeypatch.setattr(ito.ItoEnsemble, "predict", record)
    least_norm(ensemble, x, y, lambda eps: PGD("linf", eps, steps=2, eot=4, selection=4), 0.3, rounds=2)
    assert asked[0] == "report"  # who is wrong without attack
    assert len(asked) > 3
    assert set(asked[1:]) == {"selection"}


# --- other libraries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_foolbox_attacks_an_ensemble_as_it_is(ensemble, x, y, norm):
    eps = {"linf": 0.05, "l2": 0.3}[norm]
    found = peer_attack("foolbox", ensemble, x, y, norm, eps)
    assert float(BALLS[norm].length(found.images - x).max()) <= eps + 1e-5
    steps = {"linf": 40, "l2": 50}[norm]
    assert found.gradients == steps * N
    assert found.queries < found.gradients  # those without a gradient only


@pytest.mark.parametrize("name", ["torchattacks", "autoattack"])
def test_other_peers_where_they_are_installed(x, name):
    pytest.importorskip(PEERS[name], reason=f"{PEERS[name]} is not installed")
    calm = make(0.01, 0.02)  # autoattack leaves an image alone that errs once
    sure = calm.predict(x, full=True).votes.sum(0).amax(1).argsort(descending=True)[:2]
    found = peer_attack(name, calm, x[sure], calm.predict(x).labels[sure], "linf", 0.05)
    assert float(BALLS["linf"].length(found.images - x[sure]).max()) <= 0.05 + 1e-5
    assert found.gradients >= 2000


def test_a_peer_sees_fresh_noise_and_is_counted(ensemble, x):
    model = OnePath(ensemble)
    assert not torch.equal(model(x), model(x))
    at = x.clone().requires_grad_()
    model(at).sum().backward()
    assert (model.inferences, model.gradients) == (3 * N, N)


def test_a_peer_that_is_unknown_or_absent(monkeypatch):
    with pytest.raises(ValueError, match="foolbox"):
        check_peer("folbox")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ito-sde\[peers\]'"):
        check_peer("foolbox")


@pytest.mark.parametrize("effort", [0, -1, math.nan, math.inf, "1", None])
def test_an_effort_that_is_no_positive_number_is_refused(effort):
    with pytest.raises(ItoError, match="effort must be a positive number"):
        standard("linf", 0.1, True, effort)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radii": ()}, "one or more radii"),
        ({"radii": 0.1}, "one or more radii"),
        ({"radii": (0.2, 0.1)}, "must rise"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"repeat": 0}, "repeat must be"),
        ({"effort": 0}, "effort must be"),
    ],
)
def test_settings_of_a_suite_that_cannot_be_are_refused(change, message):
    with pytest.raises(ito.ItoError, match=message):
        ito.SuiteSettings(**change)


def test_numpy_numbers_are_settings_like_pythons():
    settings = ito.SuiteSettings(seed=np.int64(3), repeat=np.int64(2), batch_size=np.int32(5))
    assert [type(getattr(settings, name)) for name in ("seed", "repeat", "batch_size")] == [int] * 3


@pytest.mark.parametrize("steps", [[], [Step("one", PGD(eps=0.1), "nobody")]])
def test_steps_that_cannot_be_run_are_refused_before_any_work(steps):
    ensemble = ito.ItoEnsemble([ito.recast(ito.load_resnet("resnet8"), omega=0.1)], 2)
    images = Images(torch.rand(1, 3, 32, 32), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ito.ItoError, match=r"no steps at eps 0\.1|Unknown surrogate 'nobody'"):
        Suite(lambda eps: steps).attack(ensemble, images, [0.1])


@pytest.mark.parametrize("change", [{"count": 0}, {"count": 1.5}, {"first": -1}])
def test_a_range_of_paths_that_cannot_be_is_refused(change):
    with pytest.raises(ito.ItoError, match="must be a whole number"):
        ito.PathRange(0, "report", torch.arange(2), **change)
