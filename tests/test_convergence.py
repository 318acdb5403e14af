"""Solvers held against a reference: the figures are what they are said to be, and instability is called so."""

import math

import pytest
import torch
from problems import random_images, random_resnet
from torch import nn

import neuralsde_ito as ito
from neuralsde_ito.convergence import compare_solvers, measure_order, slope
from neuralsde_ito.problems import Pointwise, Problem, geometric_brownian_motion
from neuralsde_ito.schedules import Schedule
from neuralsde_ito.sde import BlockSDE


def test_a_slope_is_the_power_of_the_step():
    errors = torch.tensor([[n**-1.5 * 7, n**-0.5] for n in (4, 8, 16)]).T
    assert slope((4, 8, 16), errors).tolist() == pytest.approx([1.5, 0.5])


@pytest.mark.parametrize(("solver", "order"), [("euler", 0.5), ("milstein", 1.0)])
def test_orders_with_their_standard_errors(solver, order):
    found = measure_order(geometric_brownian_motion(), solver, (8, 16, 32))
    assert found.theory == order
    assert found.fit == pytest.approx(order, abs=0.15)
    assert 0 < found.standard_error < 0.1
    assert found.unstable == ()
    assert len(found.errors) == 3


def test_a_bias_within_its_noise_gets_no_weak_order():
    assert measure_order(geometric_brownian_motion(), "euler", (8, 16, 32)).weak is None
    weak = measure_order(geometric_brownian_motion(omega=0.1), "euler", (8, 16, 32)).weak
    assert weak is not None
    assert weak[0] == pytest.approx(1, abs=0.15)


def test_an_unstable_step_is_called_unstable_and_not_fitted():
    # dy = -40 y dt + 0.1 dW: Euler's factor is 1 - 40 h, larger than 1 in size below 20 steps.
    sde = BlockSDE(Pointwise(lambda y: y - 40 * y), Schedule(0.1, "constant"))
    keys = ito.make_keys(0, "report", index=torch.arange(64))
    y0 = torch.full((64, 64), 1.0, dtype=torch.float64)
    problem = Problem(sde, y0, keys, lambda _: ito.integrate(sde, y0, keys, "euler", 2048))
    found = measure_order(problem, "euler", (4, 8, 64, 128, 256))
    assert found.unstable == (4, 8)
    assert found.fit == pytest.approx(1, abs=0.2)


# --- networks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    model = ito.recast(random_resnet("resnet8").double(), omega=0.2)
    x = random_images(4, dtype=torch.float64)
    return compare_solvers(model, x, torch.arange(4), ["euler", "milstein", "torchsde:euler", "srk"], (1, 2, 4))


def test_errors_fall_with_the_step_and_higher_order_falls_faster(report):
    by = {(row.solver, row.steps): row for row in report.rows}
    for solver in ("euler", "srk"):
        errors = [by[solver, n].state_error for n in (1, 2, 4)]
        assert errors == sorted(errors, reverse=True)
    assert by["srk", 4].state_error < by["euler", 4].state_error
    assert by["srk", 4].gradient_cosine > by["euler", 1].gradient_cosine
    assert report.orders["srk"] > report.orders["euler"] > 0.4


def test_on_additive_noise_milstein_is_euler_and_it_is_said(report):
    by = {(row.solver, row.steps): row for row in report.rows}
    for n in (1, 2, 4):
        assert by["milstein", n].state_error == by["torchsde:euler", n].state_error
        assert by["euler", n].state_error == pytest.approx(by["milstein", n].state_error, rel=1e-9)
    assert any("Milstein is Euler here" in remark for remark in report.remarks())
    assert any("More steps change the model" in remark for remark in report.remarks())


def test_evaluations_are_those_that_are_made():
    model = ito.recast(random_resnet("resnet8"), omega=0.2)  # three blocks, two of which jump
    count = 0

    def hook(*_):
        nonlocal count
        count += 1

    for sde in model.sdes:
        sde.block.register_forward_hook(hook)
    x = random_images(2)
    for solver in ("euler", "milstein", "srk", "heun", "reversible_heun"):
        for n in (1, 4):
            (row,) = compare_solvers(model, x, None, [solver], [n], reference=("euler", 1), gradients=False).rows
            count = 0
            model.solver, model.steps = solver, n
            with torch.no_grad():
                model(x)
            assert row.evaluations == count, (solver, n)


def test_the_reference_against_itself_has_no_error():
    model = ito.recast(random_resnet("resnet8"), omega=0.2)
    found = compare_solvers(model, random_images(3), None, ["euler"], [4], reference=("euler", 4))
    row = found.rows[0]
    assert (row.state_error, row.logit_error, row.probability_error, row.agreement) == (0, 0, 0, 1)
    assert row.gradient_cosine == pytest.approx(1, abs=1e-5)
    assert row.accuracy is None


class Explosion(nn.Module):
    def forward(self, x):
        return x + 1e30 * x**3


def test_what_is_not_finite_is_named_by_block_time_and_solver():
    chain = ito.Chain(nn.Conv2d(3, 4, 3, 4), [nn.Identity(), Explosion(), Explosion()], nn.Flatten())
    model = ito.recast(chain, omega=0.1)
    with pytest.raises(ValueError, match=r"srk at 4 steps a block, is not finite after block \d \(t = \d\)"):
        compare_solvers(model, random_images(2), steps=[1])


def test_a_solver_that_does_not_fit_is_refused():
    model = ito.recast(random_resnet("resnet8"), omega=0.2)
    with pytest.raises(ValueError, match="needs omega = 0"):
        compare_solvers(model, random_images(2), solvers=["ode:rk4"])
    with pytest.raises(ValueError, match="milstein"):
        compare_solvers(model, random_images(2), solvers=["milsteen"])
    with pytest.raises(ValueError, match="power of two"):
        compare_solvers(model, random_images(2), solvers=["euler"], steps=[3])


def test_without_noise_torchdiffeqs_methods_are_compared_too():
    model = ito.recast(random_resnet("resnet8"), omega=0)
    found = compare_solvers(model, random_images(2), solvers=["euler", "ode:rk4"], steps=[1, 2], gradients=False)
    assert found.reference == ("ode:rk4", 8)
    by = {(row.solver, row.steps): row for row in found.rows}
    assert by["ode:rk4", 2].state_error < by["euler", 2].state_error
    assert not math.isnan(by["euler", 1].cost)
