"""The suite: what fell stays fallen, the report does not choose, a killed run goes on as if nothing had happened."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems import random_images
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito import suite as suite_module
from neuralsde_ito.attacks import APGD, BALLS, PGD, Square
from neuralsde_ito.attacks.peers import PEERS, OnePath, check_peer, peer_attack
from neuralsde_ito.evaluation import NoiseFree
from neuralsde_ito.suite import Besieged, Step, Suite, joined, least_norm, standard

N = 12


@pytest.fixture(scope="module")
def ensemble() -> ito.ItoEnsemble:
    """Two members whose blocks are small, so that votes are neither all clear nor all chance."""
    torch.manual_seed(0)
    net = ito.Chain(
        nn.Conv2d(1, 4, 3, 2), [nn.Identity(), nn.Identity()], nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    )
    return ito.ItoEnsemble([ito.recast(net, w, image_shape=(1, 8, 8)) for w in (0.05, 0.08)], 5).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(N, 8, 1)


@pytest.fixture(scope="module")
def y(ensemble, x) -> Tensor:
    labels = ito.ItoEnsemble(ensemble.members, 5).predict(x).labels
    return labels.clamp_min(0)


def steps(eps: float) -> list[Step]:
    return [
        Step("transfer", PGD("linf", eps, steps=3), "noise-free"),
        Step("pgd", PGD("linf", eps, steps=3, eot=4, selection=4)),
        Step("apgd", APGD("linf", eps, steps=3, eot=4, selection=4)),
        Step("square", Square("linf", eps, steps=5, eot=4, selection=4)),
    ]


def suite(ensemble, **settings) -> Suite:
    return Suite(steps, {"noise-free": NoiseFree(ensemble)}, **settings)


def last(made, radii) -> list[Besieged]:
    """How every radius stands after its last step."""
    by = {reached.eps: reached for _, reached in made}
    return [by[eps] for eps in radii]


RADII = [0.01, 0.04, 0.3]


@pytest.fixture(scope="module")
def alone(ensemble, x, y) -> list[Besieged]:
    return last(suite(ensemble).run(ensemble, x, y, torch.arange(N), RADII), RADII)


def test_images_lie_in_the_ball_and_labels_are_the_reports(ensemble, x, y, alone):
    for eps, found in zip(RADII, alone, strict=True):
        assert float(BALLS["linf"].length(found.images - x).max()) <= eps + 1e-6
        decided = ensemble.predict(found.images, 0, torch.arange(N)).labels
        assert torch.equal(decided, found.labels)
        assert torch.equal(found.winner == -1, found.labels == y)
    assert (alone[0].labels == y).any()
    assert (alone[-1].winner >= 0).any()


def test_what_fell_stays_fallen(y, alone):
    for small, large in itertools.pairwise(alone):
        fell = small.winner >= 0
        assert torch.equal(small.labels[fell], large.labels[fell])
        assert torch.equal(small.images[fell], large.images[fell])
        assert torch.equal(small.winner[fell], large.winner[fell])
        assert int((large.labels == y).sum()) <= int((small.labels == y).sum())


def test_each_attack_meets_what_the_last_ones_left(y, alone):
    standing = int((y == alone[0].labels).sum() + (alone[0].winner >= 0).sum())
    for found in alone:
        for met, felled in zip(found.met, found.felled, strict=True):
            assert met == standing
            standing -= felled
        standing = int((found.winner == -1).sum())
        assert found.backwards[3] == 0
        assert found.forwards[3] > 0 or found.met[3] == 0


def test_no_vote_of_the_report_chooses(ensemble, x, y, monkeypatch):
    asked = []
    predict = ito.ItoEnsemble.predict

    def record(self, x, seed=0, index=None, purpose="report", **settings):
        asked.append((purpose, len(x)))
        return predict(self, x, seed, index, purpose, **settings)

    monkeypatch.setattr(ito.ItoEnsemble, "predict", record)
    list(suite(ensemble).run(ensemble, x, y, torch.arange(N), [0.04]))
    purposes = [purpose for purpose, _ in asked]
    assert purposes[0] == purposes[-1] == "report"
    assert set(purposes[1:-1]) == {"selection"}


@pytest.mark.parametrize("kill", [1, 4, 6])
def test_a_killed_suite_goes_on_as_if_nothing_had_happened(ensemble, x, y, alone, tmp_path, kill, monkeypatch):
    begun = suite(ensemble, state=tmp_path).run(ensemble, x, y, torch.arange(N), RADII)
    for _ in range(kill):
        next(begun)
    ran = []
    through = suite_module.Suite._through
    monkeypatch.setattr(suite_module.Suite, "_through", lambda self, *a: ran.append(1) or through(self, *a))
    again = last(suite(ensemble, state=tmp_path).run(ensemble, x, y, torch.arange(N), RADII), RADII)
    for one, two in zip(alone, again, strict=True):
        for name in ("labels", "winner", "images"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert (one.forwards, one.backwards, one.met, one.felled) == (two.forwards, two.backwards, two.met, two.felled)
    assert len(ran) <= len(RADII) * 4 - kill  # what was done is not done again


def test_batches_are_joined(ensemble, x, y, alone):
    parts = [
        last(suite(ensemble).run(ensemble, x[part], y[part], torch.arange(N)[part], RADII), RADII)
        for part in (slice(0, 5), slice(5, N))
    ]
    for level, whole in enumerate(alone):
        found = joined([part[level] for part in parts])
        assert torch.equal(found.labels, whole.labels)
        assert (found.met, found.felled) == (whole.met, whole.felled)
        assert found.backwards == whole.backwards


def left(made: list[Besieged]) -> int:
    return int((made[-1].winner == -1).sum())


def test_whoever_knows_the_paths_or_asks_often_leaves_no_more(ensemble, x, y, alone):
    known = last(suite(ensemble, noise="known").run(ensemble, x, y, torch.arange(N), RADII[:2]), RADII[:2])
    assert left(known) <= left(alone[:2])
    often = last(suite(ensemble, repeat=5).run(ensemble, x, y, torch.arange(N), RADII[:2]), RADII[:2])
    assert left(often) <= left(alone[:2])


def test_fixed_noise_is_the_same_for_all_images(ensemble, x, y):
    one = suite(ensemble, noise="fixed")
    same = x[:1].expand(4, -1, -1, -1)
    decided = one.decide(ensemble, same, y[:1].expand(4), torch.arange(4))
    assert (decided == decided[0]).all()


def test_settings_that_cannot_be(ensemble):
    with pytest.raises(ValueError, match="fresh"):
        suite(ensemble, noise="frsh")
    with pytest.raises(ValueError, match="repeat"):
        suite(ensemble, repeat=0)


def test_standard_spends_no_more_than_eotpgd_or_autoattack():
    # EOTPGD: 100 steps of 20 paths. AutoAttack's rand: twice that.
    def gradients(step: Step) -> int:
        attack = step.attack
        if isinstance(attack, Square):
            return 0
        classes = attack.targets if attack.objective.startswith("targeted") else 1
        paths = attack.eot if step.through == "itself" else 1
        return (attack.steps + isinstance(attack, APGD)) * classes * paths

    assert sum(map(gradients, standard("linf", 0.1, True))) == 1415 < 2000  # as its docstring says
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


# --- other libraries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", sorted(BALLS))
def test_foolbox_attacks_an_ensemble_as_it_is(ensemble, x, y, norm):
    eps = {"linf": 0.05, "l2": 0.3}[norm]
    found = peer_attack("foolbox", ensemble, x, y, norm, eps)
    assert float(BALLS[norm].length(found.images - x).max()) <= eps + 1e-5
    steps = {"linf": 40, "l2": 50}[norm]
    assert found.backwards == steps * N
    assert found.forwards < found.backwards  # those without a gradient only


@pytest.mark.parametrize("name", ["torchattacks", "autoattack"])
def test_other_peers_where_they_are_installed(ensemble, x, y, name):
    pytest.importorskip(PEERS[name], reason=f"{PEERS[name]} is not installed")
    found = peer_attack(name, ensemble, x[:2], y[:2], "linf", 0.05)
    assert float(BALLS["linf"].length(found.images - x[:2]).max()) <= 0.05 + 1e-5
    assert found.backwards >= 2000


def test_a_peer_sees_fresh_noise_and_is_counted(ensemble, x):
    model = OnePath(ensemble)
    assert not torch.equal(model(x), model(x))
    at = x.clone().requires_grad_()
    model(at).sum().backward()
    assert (model.forwards, model.backwards) == (3 * N, N)


def test_a_peer_that_is_unknown_or_absent(monkeypatch):
    with pytest.raises(ValueError, match="foolbox"):
        check_peer("folbox")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ito-sde\[peers\]'"):
        check_peer("foolbox")
