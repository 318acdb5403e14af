"""Smallest perturbations of models whose boundary is known, and of noisy ones whose luck must not count."""

import pytest
import torch
from torch import Tensor, nn

import neuralsde_ito as ito
from neuralsde_ito.attacks import APGD, BALLS, PGD, Square, decision_based, minimal_norm, pgd

RADIUS = {"linf": 1 / 16, "l2": 1 / 4, "l1": 1.0}  # of the plane of `Plane` from an image whose sum is 1 less


class Plane(nn.Module):
    """Class 1 where the pixels add up to more than ``at``; otherwise class 0."""

    def __init__(self, at: float = 8.0, scale: float = 3.0) -> None:
        super().__init__()
        self.at, self.scale = at, scale

    def forward(self, x: Tensor) -> Tensor:
        lead = self.scale * (x.flatten(1).sum(1) - self.at)
        return torch.stack([-lead, lead], 1)


def gray(*sums: float) -> Tensor:
    """Images of 16 pixels that add up to these sums."""
    return torch.tensor(sums).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 16


ZEROS = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_distance_of_a_plane_is_found(norm):
    x = gray(7.0, 6.0, 9.0)
    result = minimal_norm(Plane(), x, ZEROS, norm, steps=60)
    expected = torch.tensor([1.0, 2.0]) * RADIUS[norm]
    torch.testing.assert_close(result.radii[:2], expected, rtol=0.05, atol=0)
    assert (result.radii[:2] >= expected * (1 - 1e-5)).all()
    assert result.radii[2] == 0  # it is wrong without attack
    assert torch.equal(result.images[2], x[2])
    assert (Plane()(result.images).argmax(1) == 1).all()
    torch.testing.assert_close(BALLS[norm].length(result.images - x), result.radii)


def test_bisection_over_radii_agrees():
    x = gray(7.0, 6.0, 9.0)
    found = ito.least_norm(ito.Vote(Plane()), x, ZEROS, lambda eps: PGD("l2", eps), most=1.0)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.5, 0]), rtol=0.05, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_decisions_alone_find_it_too(norm):
    x = gray(7.0, 6.0, 9.0)
    result = decision_based(Plane(), x, ZEROS, norm, steps=10, directions=40)
    expected = torch.tensor([1.0, 2.0]) * RADIUS[norm]
    torch.testing.assert_close(result.radii[:2], expected, rtol=0.15, atol=0)
    assert (result.radii[:2] >= expected * (1 - 1e-5)).all()
    assert result.radii[2] == 0
    assert result.gradients == 0
    assert result.queries > 0


@pytest.mark.parametrize("attack", [minimal_norm, decision_based])
def test_the_result_does_not_depend_on_the_batch(attack):
    x, settings = gray(7.0, 6.0, 6.5), {"steps": 3} | ({"directions": 6} if attack is decision_based else {})
    noisy = ito.Vote(Loud(), 20)
    whole = attack(noisy, x, ZEROS, **settings)
    again = attack(noisy, x, ZEROS, **settings)
    assert torch.equal(whole.images, again.images)
    if attack is minimal_norm:  # HopSkipJump begins at another image of the batch
        alone = [attack(noisy, x[i : i + 1], ZEROS[:1], index=torch.tensor([i]), **settings) for i in range(3)]
        torch.testing.assert_close(torch.cat([a.images for a in alone]), whole.images)


class Loud(nn.Module):
    """A plane behind noise: far from it, one draw in some dozens is on the other side."""

    def forward(self, x: Tensor) -> Tensor:
        lead = x.flatten(1).sum(1) - 8 + 0.5 * torch.randn(len(x))
        return 8 * torch.stack([-lead, lead], 1)


@pytest.mark.parametrize("attack", [minimal_norm, decision_based])
def test_a_radius_is_no_lucky_draw(attack):
    # The boundary of the vote is the plane, at sqrt(16) = 4 pixels of 1/4. A single draw crosses it at half the way.
    x = gray(*[7.0] * 12, 9.0)  # the last one is wrong without attack
    settings = {"steps": 30} | ({"steps": 4, "directions": 20} if attack is decision_based else {})
    result = attack(ito.Vote(Loud(), 20), x, torch.zeros(13, dtype=torch.long), "l2", **settings)
    assert (result.radii[:12] > 0.85 / 4).all()
    assert result.radii[:12].median() < 1.35 / 4
    right = ito.Vote(Loud(), 400).predict(result.images[:12], seed=7, full=True).votes[0, :, 0] / 400
    assert right.mean() < 0.5


def test_a_wrong_answer_takes_more_than_none():
    x = gray(*[7.0] * 6)
    denial, evasion = (
        minimal_norm(ito.Vote(Loud(), 20), x, torch.zeros(6, dtype=torch.long), steps=40, goal=goal)
        for goal in ("denial", "evasion")
    )
    assert evasion.radii.mean() >= denial.radii.mean()
    assert (ito.Vote(Loud(), 400).predict(evasion.images, full=True).labels == 1).all()


def test_what_cannot_be_found_is_infinite():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2) + 0 * x.flatten(1).sum(1, keepdim=True)

    x = gray(7.0, 6.0, 3.0)
    for result in (minimal_norm(Constant(), x, ZEROS, steps=5), decision_based(Constant(), x, ZEROS, steps=2)):
        assert result.radii.isinf().all()
        assert torch.equal(result.images, x)


@pytest.mark.parametrize("attack", [minimal_norm, decision_based])
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"norm": "l3"}, "Unknown norm 'l3'"), ({"steps": 0}, "steps must be"), ({"goal": "denail"}, "did you mean")],
)
def test_wrong_settings_are_refused(attack, settings, message):
    with pytest.raises(ito.ItoError, match=message):
        attack(Plane(), gray(7.0), ZEROS[:1], **settings)


# --- a class to aim at ----------------------------------------------------------------------------------


class Nearest(nn.Module):
    """Four classes: the brightest quarter of 16 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return 5 * x.flatten(1).view(len(x), 4, 4).sum(2)


@pytest.mark.parametrize("objective", ["targeted-loss", "targeted-dlr", "targeted-vote"])
@pytest.mark.parametrize("attack", [PGD, APGD])
def test_an_attack_reaches_the_class_that_it_is_given(attack, objective):
    x = torch.full((3, 1, 4, 4), 0.5)
    x[:, :, 0] = 0.55
    target = torch.tensor([1, 2, 3])
    result = attack("linf", 0.1, 10, objective=objective).run(Nearest(), x, ZEROS, target=target)
    assert result.fooled.all()
    assert torch.equal(Nearest()(result.images).argmax(1), target)


def test_the_goal_is_that_class_and_no_other():
    class Two(nn.Module):  # class 2 never wins; class 1 does as soon as the image is brighter
        def forward(self, x: Tensor) -> Tensor:
            bright = x.flatten(1).mean(1) - 0.5
            return torch.stack([-bright, bright, bright - 1], 1)

    x = torch.full((2, 1, 4, 4), 0.45)
    attack = PGD("linf", 0.2, 5, objective="targeted-loss", random_start=False)
    result = attack.run(Two(), x, ZEROS[:2], target=torch.tensor([1, 2]))
    assert result.fooled.tolist() == [True, False]


def test_a_target_needs_an_objective_that_aims():
    with pytest.raises(ito.ItoError, match="'mean-loss' aims at no class: with target take one of targeted-loss"):
        pgd(Nearest(), gray(7.0), ZEROS[:1], target=torch.tensor([1]))
    with pytest.raises(ito.ItoError, match="'margin' aims at no class"):
        Square().run(Nearest(), gray(7.0), ZEROS[:1], target=torch.tensor([1]))
    with pytest.raises(ito.ItoError, match="Labels must be from 0 to 3, got 4"):
        pgd(Nearest(), gray(7.0), ZEROS[:1], target=torch.tensor([4]), objective="targeted-loss")
