"""The L1 ball together with the box [0, 1], and the attacks in it."""

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito import make_keys
from neuralsde_ito.attacks import APGD, BALLS, PGD, Square
from neuralsde_ito.attacks.other_libraries import PEERS, check_peer, peer_attack

L1 = BALLS["l1"]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("eps", [0.3, 2.0, 6.0, 100.0])
def test_projection_goes_to_the_nearest_point_of_ball_and_box(eps):
    origin = uniform(40, 2, 3, 3)
    x = origin + normal(40, 2, 3, 3, seed=1) * torch.linspace(0.01, 2, 40).view(-1, 1, 1, 1)
    found = L1.project(x, origin, eps)
    assert (L1.length(found - origin) <= eps).all()
    assert (found >= 0).all()
    assert (found <= 1).all()
    # Nearest: for the projection p onto a convex set, (x - p) . (q - p) <= 0 at all q of the set.
    for seed in range(2, 30):
        q = L1.project(origin + normal(40, 2, 3, 3, seed=seed) * seed / 10, origin, eps)
        assert (((x - found) * (q - found)).flatten(1).sum(1) < 1e-4).all()
    torch.testing.assert_close(L1.project(found, origin, eps), found, rtol=0, atol=1e-5)  # idempotent


def test_clipping_after_the_projection_loses_most_of_the_ball():
    origin = torch.full((1, 1, 4, 4), 0.95, dtype=torch.float64)
    x = origin + torch.arange(16, dtype=torch.float64).view(1, 1, 4, 4) / 4
    found = L1.project(x, origin, 0.5)
    assert float(L1.length(found - origin)) == pytest.approx(0.5, abs=1e-5)
    ball_alone = (x - origin - 3.375).clamp_min(0)  # two entries are left: 0.375 and 0.125
    assert float(ball_alone.sum()) == 0.5
    assert float(L1.length((origin + ball_alone).clamp(0, 1) - origin)) < 0.11


def test_a_radius_of_each_image():
    eps = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    origin, x = uniform(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1)
    for ball in BALLS.values():
        alone = [ball.project(x[i : i + 1], origin[i : i + 1], float(eps[i])) for i in range(3)]
        torch.testing.assert_close(ball.project(x, origin, eps.view(3, 1, 1, 1)), torch.cat(alone))


def test_starts_are_uniform_in_the_ball():
    keys = make_keys(0, "gradient", index=torch.arange(3000))
    delta = L1.start(torch.zeros(3000, 1, 2, 2, dtype=torch.float64), 0.5, keys).flatten(1)
    radius = L1.length(delta) / 0.5
    assert stats.kstest((radius**4).numpy(), stats.uniform.cdf).pvalue > 1e-4  # volume grows as r^d
    for i in range(4):  # on the sphere, the share of an entry is Beta(1, d - 1)
        share = delta[:, i].abs() / L1.length(delta)
        assert stats.kstest(share.numpy(), stats.beta(1, 3).cdf).pvalue > 1e-4
        assert stats.binomtest(int((delta[:, i] > 0).sum()), 3000).pvalue > 1e-4
    part = L1.start(torch.zeros(3, 1, 2, 2, dtype=torch.float64), 0.5, keys[7:10])
    assert torch.equal(part.flatten(1), delta[7:10])


def test_a_step_has_length_one_and_leaves_out_pixels_that_would_leave_the_box():
    gradient, at = normal(20, 1, 8, 8), uniform(20, 1, 8, 8)
    assert torch.allclose(L1.length(L1.steepest(gradient)), torch.ones(20, dtype=torch.float64))
    at[:, :, :4] = 1
    gradient[:, :, :4] = gradient[:, :, :4].abs() + 10  # by far the largest entries, all in vain
    step = L1.steepest(gradient, at)
    assert (step[:, :, :4] == 0).all()
    assert torch.allclose(L1.length(step), torch.ones(20, dtype=torch.float64))
    assert (L1.steepest(gradient * 0, at) == 0).all()


class Linear(nn.Module):
    """The brighter half wins: an attack has to move brightness from one half to the other."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        half = flat.shape[1] // 2
        return torch.stack([flat[:, :half].sum(1), flat[:, half:].sum(1)], 1)


@pytest.mark.parametrize(
    "attack",
    [
        PGD("l1", 2.0, 20),
        APGD("l1", 2.0, 30, objective="mean-loss"),
        Square("l1", 2.0, 400),
        PGD("l1", 2.0, 20, objective="mean-logits", random_start=False, momentum=0.9),
    ],
    ids=["pgd", "apgd", "square", "momentum"],
)
def test_attacks_use_the_whole_ball_and_stay_in_it(attack):
    x = 0.3 + 0.4 * uniform(12, 1, 4, 4).float()
    x[:, :, :2] += (1.5 - (x[:, :, :2].sum((1, 2, 3)) - x[:, :, 2:].sum((1, 2, 3)))).view(-1, 1, 1, 1) / 8
    x = x.clamp(0, 1)
    lead = x[:, :, :2].sum((1, 2, 3)) - x[:, :, 2:].sum((1, 2, 3))  # about 1.5: a ball of 2 is enough for all
    result = attack.run(Linear(), x, torch.zeros(12, dtype=torch.long))
    length = L1.length(result.images - x)
    assert (length <= 2 + 1e-5).all()
    assert ((result.images >= 0) & (result.images <= 1)).all()
    assert lead.max() < 2
    assert result.fooled.float().mean() >= (0.5 if isinstance(attack, Square) else 1)
    assert (
        not type(attack)("l1", 0.5, attack.steps, objective=attack.objective)
        .run(Linear(), x, torch.zeros(12).long())
        .fooled.any()
    )


def test_a_radius_may_exceed_one():
    assert PGD("l1", 12).eps == 12
    with pytest.raises(ito.ItoError, match="did you mean 'l1'"):
        PGD("l1x", 12)


@pytest.mark.parametrize("name", ["foolbox", "autoattack"])
def test_other_libraries_attack_under_l1(name):
    pytest.importorskip(PEERS[name])
    x = 0.3 + 0.4 * uniform(6, 1, 4, 4).float()
    calm = ito.Vote(Linear())
    result = peer_attack(name, calm, x, calm.predict(x).labels, "l1", 3.0)
    assert (L1.length(result.images - x) <= 3 + 1e-4).all()
    assert (result.images != x).any()


def test_a_library_without_an_attack_under_l1_is_refused():
    with pytest.raises(ito.ItoError, match="torchattacks has no attack under l1: take foolbox or autoattack"):
        check_peer("torchattacks", "l1")


def test_an_audit_under_l1():
    x = 0.3 + 0.4 * uniform(12, 1, 4, 4).float()
    y = Linear()(x).argmax(1)
    checks = {check.number: check for check in ito.audit(Linear(), x, y, "l1", 0.3, queries=10, draws=20).checks}
    assert checks[9].verdict == "pass"  # in a ball that holds every image, every image is fooled
    assert checks[19].verdict == "pass"
