"""Solvers held against a reference: the figures are what they are said to be, and instability is called so."""

import math
import subprocess
import sys

import pytest
import torch
from problems import random_images, random_resnet
from torch import nn

import neuralsde_ito as ito
from neuralsde_ito.sde.block import BlockSDE
from neuralsde_ito.sde.schedules import Schedule
from neuralsde_ito.studies.compare import compare_solvers
from neuralsde_ito.studies.depth import Reading, read_depths, verdicts
from neuralsde_ito.studies.orders import measure_order, slope
from neuralsde_ito.studies.problems import PROBLEMS, Pointwise, Problem, geometric_brownian_motion


def test_a_slope_is_the_power_of_the_step():
    errors = torch.tensor([[n**-1.5 * 7, n**-0.5] for n in (4, 8, 16)]).T
    assert slope((4, 8, 16), errors).tolist() == pytest.approx([1.5, 0.5])


@pytest.mark.parametrize(("solver", "order"), [("euler", 0.5), ("milstein", 1.0)])
def test_orders_with_their_standard_errors(solver, order):
    result = measure_order(geometric_brownian_motion(), solver, (8, 16, 32))
    assert result.theory == order
    assert result.fit == pytest.approx(order, abs=0.15)
    assert 0 < result.standard_error < 0.1
    assert result.unstable == ()
    assert len(result.errors) == 3


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
    result = measure_order(problem, "euler", (4, 8, 64, 128, 256))
    assert result.unstable == (4, 8)
    assert result.fit == pytest.approx(1, abs=0.2)


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
    assert report.orders["srk"].fit > report.orders["euler"].fit > 0.4


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
    result = compare_solvers(model, random_images(3), None, ["euler"], [4], reference=("euler", 4))
    row = result.rows[0]
    assert (row.state_error, row.logit_error, row.mean_error, row.agreement) == (0, 0, 0, 1)
    assert row.gradient_cosine == pytest.approx(1, abs=1e-5)
    assert row.accuracy is None


class Overflow(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * torch.tensor([1.0, float("nan"), 1.0])


def test_logits_that_are_not_finite_are_no_right_answer():
    chain = ito.Chain(nn.Conv2d(3, 4, 3, 4), [nn.Identity()], Overflow())
    settings = {"solvers": ["euler"], "steps": [1], "gradients": False}
    for label in range(3):  # an argmax would answer 1 every time
        y = torch.full((4,), label)
        (row,) = compare_solvers(ito.recast(chain, omega=0.1), random_images(4), y, **settings).rows
        assert row.accuracy == 0


class Explosion(nn.Module):
    def forward(self, x):
        return x + 1e30 * x**3


def test_what_is_not_finite_is_named_by_block_time_and_solver():
    chain = ito.Chain(nn.Conv2d(3, 4, 3, 4), [nn.Identity(), Explosion(), Explosion()], nn.Flatten())
    model = ito.recast(chain, omega=0.1)
    with pytest.raises(ValueError, match=r"srk at 4 steps a block, is not finite after block \d \(t = \d\)"):
        compare_solvers(model, random_images(2), steps=[1])


# --- a user's own SDE -----------------------------------------------------------------------------------


class Growth:
    """dy = y / 4 dt + y / 2 dW."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y):
        return 0.25 * y

    def g(self, t, y):
        return 0.5 * y


def start(paths=64, size=4):
    return torch.ones(paths, size, dtype=torch.float64)


def test_a_users_sde_is_compared_by_all_solvers_that_fit():
    result = compare_solvers(Growth(), start(), steps=(8, 16, 32))
    assert result.subject == "Growth"
    assert list(result.orders) == ["euler", "milstein", "srk"]
    for solver, order in (("euler", 0.5), ("milstein", 1), ("srk", 1.5)):
        assert result.orders[solver].theory == order
        assert result.orders[solver].fit == pytest.approx(order, abs=0.25)
        assert 0 < result.orders[solver].standard_error < 0.2
    by = {(row.solver, row.steps): row for row in result.rows}
    assert by["euler", 16].evaluations == 16
    assert by["srk", 16].evaluations == 10 * 16
    assert by["srk", 16].gradient_cosine > by["euler", 8].gradient_cosine > 0.5
    assert by["euler", 16].logit_error is None
    assert by["milstein", 32].mean_error < by["milstein", 8].mean_error


def test_its_last_state_is_the_closed_form_on_the_same_path():
    # The reference is right, not only near to what it is held against: y0 exp((1/4 - 1/8) t + W / 2).
    y0, keys = start(), ito.make_keys(3, "report", index=torch.arange(64))
    from neuralsde_ito.studies.subjects import Equation

    end = Equation(Growth(), y0, keys, (0.0, 0.3)).solve(y0, "srk", 64, False)[0]
    w = ito.BrownianPath(keys, 4, 0, 0.0, 0.3, dtype=torch.float64).increment(0, 0)
    torch.testing.assert_close(end, torch.exp(0.125 * 0.3 + 0.5 * w), rtol=1e-4, atol=0)


@pytest.mark.parametrize("interval", [(0.0, 0.7), (0.1, 0.8), (-1.3, 2.9), (1e3, 1e3 + 0.3), (0, 1e-3), (0, 1e5 / 3)])
def test_steps_are_as_many_as_were_asked_for_in_any_interval(interval):
    # The sum of 32 steps of 0.7 / 32 misses 0.7 by rounding: one more step would follow.
    class Still(Growth):
        def f(self, t, y):
            assert interval[0] <= float(t) <= interval[1]
            times.append(float(t))
            return 0.25 * y / (interval[1] - interval[0])

        def g(self, t, y):
            return 0.5 * y / math.sqrt(interval[1] - interval[0])

    times = []
    settings = {"steps": (4, 32), "gradients": False, "interval": interval}
    result = compare_solvers(Still(), start(8), solvers=["euler", "milstein", "srk"], **settings)
    evaluations = [(row.solver, row.evaluations) for row in result.rows]
    assert evaluations == [
        *(("euler", 4), ("euler", 32)),
        *(("milstein", 4), ("milstein", 32)),
        *(("srk", 40), ("srk", 320)),
    ]
    assert min(times) == interval[0]
    unit = compare_solvers(Growth(), start(8), solvers=["euler", "milstein", "srk"], steps=(4, 32), gradients=False)
    for row, other in zip(result.rows, unit.rows, strict=True):  # only the clock differs
        assert row.state_error == pytest.approx(other.state_error, rel=1e-6)


def test_a_stratonovich_sde_takes_as_many_steps_as_were_asked_for():
    settings = {"steps": (4, 32), "gradients": False, "interval": (0.0, 0.7)}
    result = compare_solvers(Pendulum(), start(8, 3), solvers=["heun", "midpoint", "euler_heun"], **settings)
    assert [row.evaluations for row in result.rows] == [8, 64, 8, 64, 4, 32]


class Pendulum:
    """Stratonovich, three states, two sources of noise; f and g at once."""

    noise_type, sde_type = "general", "stratonovich"

    def f_and_g(self, t, y):
        g = torch.stack([y.sin(), 0.1 * torch.ones_like(y)], -1)
        return -y, 0.3 * g


def test_general_and_stratonovich_noise():
    result = compare_solvers(Pendulum(), start(16, 3), steps=(4, 8, 16), gradients=False)
    assert list(result.orders) == ["heun", "midpoint", "euler_heun", "reversible_heun"]
    assert all(order.theory == 0.5 for order in result.orders.values())
    by = {(row.solver, row.steps): row.state_error for row in result.rows}
    assert by["midpoint", 16] < by["midpoint", 4]


def test_a_network_block_is_such_an_sde():
    model = ito.recast(random_resnet("resnet8").double(), omega=0.2)
    sde = model.sdes[0]
    y0 = torch.rand(2, math.prod(sde.shape), dtype=torch.float64)
    result = compare_solvers(sde, y0, solvers=["euler"], steps=[2], gradients=False)
    expected = ito.integrate(sde, y0.view(2, *sde.shape), ito.make_keys(0, "report", index=torch.arange(2)), steps=2)
    assert result.rows[0].state_error > 0
    assert result.rows[0].evaluations == 2
    assert expected.isfinite().all()


class Stiff(Growth):
    def f(self, t, y):
        return -(y**5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": None}, "has no drift: define f"),
        ({"g": None}, "has no diffusion: define g"),
        ({"noise_type": "coloured"}, "noise_type must be one of diagonal, additive, scalar, general"),
        ({"sde_type": None}, "sde_type must be one of ito, stratonovich"),
    ],
)
def test_an_sde_that_lacks_something_is_told_what(change, message):
    members = {"f": Growth.f, "g": Growth.g, "noise_type": "diagonal", "sde_type": "ito"} | change
    broken = type("Broken", (), {name: value for name, value in members.items() if value is not None})()
    with pytest.raises(ValueError, match=f"Broken.*{message}"):
        compare_solvers(broken, start())


def test_bad_use_of_an_sde_is_told():
    with pytest.raises(ValueError, match="'heun' does not solve diagonal noise, Itô; these do: euler, milstein, srk"):
        compare_solvers(Growth(), start(), solvers=["heun"])
    with pytest.raises(ValueError, match="'milstein' does not solve general noise, Stratonovich; these do: heun"):
        compare_solvers(Pendulum(), start(), solvers=["milstein"])
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        compare_solvers(Growth(), torch.ones(3))
    with pytest.raises(ValueError, match="Labels"):
        compare_solvers(Growth(), start(), torch.zeros(64))
    with pytest.raises(ValueError, match="start < end"):
        compare_solvers(Growth(), start(), interval=(1, 1))


def test_an_sde_that_explodes_is_named_with_solver_and_time():
    result = compare_solvers(Stiff(), 3 * start(8), solvers=["euler"], steps=[16], reference=("euler", 512))
    assert result.rows[0].diverged is not None
    assert result.rows[0].diverged.startswith("t = 0.")
    assert any("euler at 16 steps: states are not finite after t = 0." in said for said in result.remarks())
    with pytest.raises(ValueError, match=r"srk at 32 steps, is not finite after t = "):
        compare_solvers(Stiff(), 3 * start(8), steps=[8])


def test_memory_grows_with_what_is_kept_and_not_with_what_is_let_go():
    def live(steps, gradients):
        settings = {"solvers": ["euler"], "steps": [steps], "gradients": gradients}
        rows = compare_solvers(Growth(), start(), reference=("euler", 1), **settings).rows
        return rows[0].memory

    size = start().numel() * 8
    assert size < live(4, False) < 30 * size
    assert live(64, False) < 2 * live(4, False)
    assert live(64, True) > 4 * live(4, True)  # an SDE's steps are kept for the backward pass


# --- depth ----------------------------------------------------------------------------------------------


def test_reading_as_trained_is_the_networks_own_answer_and_says_so():
    model = ito.recast(random_resnet("resnet8"), omega=0.2)
    x, keys = random_images(8), ito.make_keys(0, "report", index=torch.arange(8))
    with torch.no_grad():
        y = model.eval()(x, keys).argmax(1)
    result = read_depths({"net": model}, x, y, (1, 4), schedules=["inverse-time", "constant"], horizons=[3, 6])
    assert len(result) == 8
    (own,) = [r for r in result if r.trained]
    assert (own.schedule, own.horizon, own.solver, own.steps) == ("inverse-time", 3.0, "euler", 1)
    assert own.correct.value == 1
    assert own.paired.p == 1
    assert not model.training


def test_reading_leaves_every_modules_mode_as_it_was_even_after_an_error():
    model = ito.recast(random_resnet("resnet8"), omega=0.2).train()
    model.sdes[1].block.bn1.eval()  # a frozen BatchNorm
    modes = [module.training for module in model.modules()]
    x, y = random_images(2), torch.zeros(2, dtype=torch.int64)
    read_depths({"net": model}, x, y, (1, 2))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="power of two"):
        read_depths({"net": model}, x, y, (1, 3))
    assert [module.training for module in model.modules()] == modes


def test_an_inference_that_is_not_finite_is_never_right():
    model = ito.recast(random_resnet("resnet8"), omega=1e38)
    result = read_depths({"net": model}, random_images(4), torch.zeros(4, dtype=torch.int64), (1, 2))
    assert [r.correct.value for r in result] == [0, 0]


def reading(steps, right, p, trained=False):
    n = 100
    paired = ito.Paired(n - right, 0, p)
    return Reading("net", "inverse-time", 3.0, "euler", steps, trained, ito.Rate.of(right, n), paired)


def test_a_network_that_loses_on_a_finer_grid_is_called_a_resnet():
    (said,) = verdicts([reading(1, 90, 1.0, True), reading(16, 40, 1e-9)])
    assert "90.0 % at the 1 step a block" in said
    assert "p < 0.001" in said
    assert "tied to its grid" in said
    (said,) = verdicts([reading(1, 90, 1.0, True), reading(16, 89, 0.9)])
    assert "No loss is shown" in said
    assert verdicts([reading(1, 90, 1.0, True)]) == []


# --- peers ----------------------------------------------------------------------------------------------


def test_the_names_that_help_shows_without_torch_are_those_of_the_tables():
    from neuralsde_ito.cli import orders

    assert tuple(PROBLEMS) == orders.PROBLEMS


@pytest.mark.parametrize("verb", ["compare", "orders", "depth"])
def test_help_does_not_wait_for_torch(verb):
    code = f"import sys; from neuralsde_ito.cli import {verb}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_torchsde_on_its_own_path_agrees():
    problem = geometric_brownian_motion(paths=1024)
    path = problem.torchsde_path()
    for solver in ("euler", "milstein"):
        ours = measure_order(problem, solver, (8, 16, 32))
        assert ours.agrees(measure_order(problem, solver, (8, 16, 32), path=path))
    wrong = measure_order(problem, "srk", (8, 16, 32))
    assert not ours.agrees(wrong)


def test_diffrax_agrees_where_it_is_installed():
    pytest.importorskip("diffrax", reason="diffrax is not installed")
    from neuralsde_ito.studies.other_libraries import diffrax_orders

    theirs = diffrax_orders("geometric-brownian", ["milstein"], (8, 16, 32))["milstein"]
    assert measure_order(geometric_brownian_motion(), "milstein", (8, 16, 32)).agrees(theirs)


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
    result = compare_solvers(model, random_images(2), solvers=["euler", "ode:rk4"], steps=[1, 2], gradients=False)
    assert result.reference == ("ode:rk4", 8)
    by = {(row.solver, row.steps): row for row in result.rows}
    assert by["ode:rk4", 2].state_error < by["euler", 2].state_error
    assert not math.isnan(by["euler", 1].cost)
