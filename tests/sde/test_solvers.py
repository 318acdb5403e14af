"""Solvers: measured orders, equality with independent loops, cost, and gradients."""

import functools
import math
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from problems import (
    Pointwise,
    double_well,
    geometric_brownian_motion,
    ornstein_uhlenbeck,
    random_images,
    random_resnet,
    slope,
    smooth_chain,
    strong_order,
    trained,
)
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from torchvision.ops import StochasticDepth

from neuralsde_ito.models.recast import Chain, recast
from neuralsde_ito.models.resnets import MEAN, STD, CifarResNet, Normalize
from neuralsde_ito.noise.brownian import BrownianPath
from neuralsde_ito.noise.keys import make_keys
from neuralsde_ito.sde.block import BlockSDE
from neuralsde_ito.sde.integrate import NATIVE, integrate
from neuralsde_ito.sde.schedules import Schedule
from neuralsde_ito.sde.solvers import SOLVERS, ByNoise, Solver, check_solver, find_solver, solvers_for

SDE_SOLVERS = [name for name, solver in SOLVERS.items() if solver.form != "ode"]
ODE_SOLVERS = [name for name, solver in SOLVERS.items() if solver.form == "ode"]
FIXED_ODE_SOLVERS = [name for name in ODE_SOLVERS if not SOLVERS[name].adaptive]
ADDITIVE, MULTIPLICATIVE = "inverse-time", "multiplicative"


def keys_of(n: int, seed: int = 0) -> torch.Tensor:
    return make_keys(seed, "report", index=torch.arange(n))


# --- orders ---------------------------------------------------------------------------------------------

PROBLEMS = {"ou": ornstein_uhlenbeck, "gbm": geometric_brownian_motion, "double-well": double_well}


@functools.cache
def solved(name: str):
    with torch.no_grad():
        problem = PROBLEMS[name]()
        return problem, problem.exact()


@pytest.mark.parametrize(
    ("problem", "solver", "order", "steps"),
    [
        ("ou", "euler", 1.0, (8, 16, 32, 64)),
        ("ou", "torchsde:euler", 1.0, (8, 16, 32, 64)),
        ("ou", "milstein", 1.0, (8, 16, 32, 64)),
        ("ou", "srk", 2.0, (4, 8, 16, 32)),  # linear with additive noise: SRA1 gains half an order
        ("gbm", "euler", 0.5, (8, 16, 32, 64)),
        ("gbm", "torchsde:euler", 0.5, (8, 16, 32, 64)),
        ("gbm", "milstein", 1.0, (8, 16, 32, 64)),
        ("gbm", "srk", 1.5, (8, 16, 32, 64)),
        ("double-well", "euler", 1.0, (8, 16, 32, 64)),
        ("double-well", "milstein", 1.0, (8, 16, 32, 64)),
        ("double-well", "srk", 1.5, (32, 64, 128)),  # its h^2 term is as large as its h^1.5 term before
    ],
)
def test_strong_order(problem, solver, order, steps):
    # Two-sided: an order that is too good would mean that the problem does not exercise the claim. A slope
    # from 4,096 paths has a standard error near 0.01; the rest of the 0.15 is the distance to the limit h -> 0.
    assert strong_order(*solved(problem), solver, steps) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("problem", list(PROBLEMS))
@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_no_strong_order_is_below_the_tables(solver, problem):
    claim = SOLVERS[solver].order.given(multiplicative=problem == "gbm")
    assert strong_order(*solved(problem), solver, (8, 16, 32)) > claim - 0.15


def test_stratonovich_solvers_solve_the_ito_equation():
    # Without the correction of the drift they would converge too, to a solution that is exp(omega^2 / 2) off.
    problem, exact = solved("gbm")
    for name, solver in SOLVERS.items():
        if solver.form == "stratonovich":
            with torch.no_grad():
                assert float((problem.solve(name, 64) / exact - 1).abs().mean()) < 0.01, name


@torch.no_grad()
def logistic(solver: str, steps: int) -> float:
    """Largest error at 1 on ``y' = y - y^3``, whose solution is ``y0 e^t / sqrt(1 + y0^2 (e^2t - 1))``."""
    problem = double_well(omega=0.0, paths=64)
    y0 = torch.linspace(0.3, 0.4, 64, dtype=torch.float64)[None]  # far from where the leading term vanishes
    exact = math.e * y0 / torch.sqrt(1 + y0**2 * (math.e**2 - 1))
    return float((integrate(problem.sde, y0, problem.keys, solver, steps) - exact).abs().max())


@pytest.mark.parametrize("solver", FIXED_ODE_SOLVERS)
def test_order_of_ode_methods(solver):
    steps = (16, 32, 64, 128)
    order = slope(steps, [logistic(solver, n) for n in steps])
    assert order == pytest.approx(SOLVERS[solver].order.additive, abs=0.15)


@pytest.mark.parametrize("solver", [name for name in ODE_SOLVERS if SOLVERS[name].adaptive])
def test_adaptive_ode_methods_keep_their_tolerance(solver):
    # rtol is 1e-4 a step, of an estimate; without steps of its own, one step errs by 2e-3 to 3e-2 here.
    assert logistic(solver, 1) < 2e-3


@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_sde_solvers_without_noise_solve_the_ode(solver):
    steps = (8, 16, 32, 64)
    assert slope(steps, [logistic(solver, n) for n in steps]) > 0.85


# --- equality with torchsde, and between its own solvers ------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 32])
@pytest.mark.parametrize("name", ["ou", "gbm", "double-well"])
@torch.no_grad()
def test_native_euler_is_torchsdes(name, steps):
    problem, _ = solved(name)
    ours, theirs = problem.solve("euler", steps), problem.solve("torchsde:euler", steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def heun(sde, path, steps, x, first, last):
    """Heun's method for the Stratonovich form, as the page on architecture adds it."""
    h, form, y = (sde.t1 - sde.t0) / steps, sde.view("stratonovich", tuple(x.shape[1:])), x.flatten(1)
    for k in range(first, last):
        t, dw = sde.t0 + k * h, path.increment(steps.bit_length() - 1, k)
        drift, noise = form.f(t, y), form.g(t, y) * dw
        ahead = y + h * drift + noise
        y = y + h * (drift + form.f(t + h, ahead)) / 2 + (noise + form.g(t + h, ahead) * dw) / 2
    return y.view(x.shape)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("schedule", [ADDITIVE, MULTIPLICATIVE])
def test_a_method_of_our_own_is_one_entry_and_one_function(monkeypatch, schedule, checkpoint):
    entry = Solver("native", "heun", ByNoise(1.0, 1.0), ByNoise(2, 2), forms=("stratonovich",))
    monkeypatch.setitem(SOLVERS, "native:heun", entry)
    monkeypatch.setitem(NATIVE, "heun", heun)
    x, found = random_images(2, 8, dtype=torch.float64).requires_grad_(), {}
    for solver in ("heun", "native:heun"):
        model = recast(tiny(), 0.3, schedule, solver, steps=2, checkpoint=checkpoint)
        logits = model(x, keys_of(2))
        found[solver] = torch.cat([logits.flatten(), torch.autograd.grad(logits.sum(), x)[0].flatten()])
    torch.testing.assert_close(found["native:heun"], found["heun"], rtol=1e-9, atol=1e-10)
    assert "native:heun" not in solvers_for("diagonal", "stratonovich")  # torchsde's protocol is torchsde's


def test_the_solvers_of_a_users_own_sde():
    assert solvers_for("diagonal", "ito") == ["euler", "milstein", "srk"]
    assert solvers_for("general", "ito") == ["euler"]
    rest = ["heun", "midpoint", "euler_heun", "reversible_heun"]
    assert solvers_for("diagonal", "stratonovich") == ["milstein", *rest]
    assert solvers_for("general", "stratonovich") == rest


@functools.cache
def resnet20() -> nn.Module:
    return random_resnet("resnet20").double()


def tiny(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Resnet8 with few channels: ReLU, BatchNorm, one block of drift and two jumps; images of 8x8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = CifarResNet(BasicBlock, (1, 1, 1), (4, 6, 8), 10, 3, option_a=True)
    return trained(nn.Sequential(OrderedDict(normalize=Normalize(MEAN, STD), resnet=net))).to(dtype)


@pytest.mark.parametrize("schedule", [ADDITIVE, MULTIPLICATIVE])
@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_native_euler_is_torchsdes_on_a_network(steps, schedule):
    x, keys = random_images(2, dtype=torch.float64), keys_of(2)
    model = recast(resnet20(), omega=0.3, schedule=schedule, steps=steps)
    ours = model(x, keys)
    model.solver = "torchsde:euler"
    torch.testing.assert_close(ours, model(x, keys), rtol=1e-12, atol=1e-12)
    assert (ours - resnet20()(x)).abs().max() > 1e-3, "there was no noise to compare"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_milstein_is_euler_bit_for_bit_on_additive_noise(dtype):
    # Its correction is g g' (dW^2 - h) / 2, and g' = 0.
    x, keys = random_images(2, 8, dtype=dtype), keys_of(2)
    net = tiny(dtype)
    euler = recast(net, omega=0.3, solver="torchsde:euler", steps=4)
    milstein = recast(net, omega=0.3, solver="milstein", steps=4)
    assert torch.equal(euler(x, keys), milstein(x, keys))
    milstein = recast(net, omega=0.3, solver="milstein", steps=4, schedule=MULTIPLICATIVE)
    euler = recast(net, omega=0.3, solver="torchsde:euler", steps=4, schedule=MULTIPLICATIVE)
    assert not torch.allclose(euler(x, keys), milstein(x, keys), rtol=1e-4)


@pytest.mark.parametrize("schedule", [ADDITIVE, MULTIPLICATIVE])
@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_the_outcome_does_not_depend_on_the_gradient_mode(solver, schedule):
    # Milstein differentiates the diffusion even where nobody asks for it; inference_mode records no graph.
    x, keys = random_images(2, 8, dtype=torch.float64), keys_of(2)
    model = recast(tiny(), omega=0.5, schedule=schedule, solver=solver, steps=2)
    with torch.no_grad():
        plain = model(x, keys)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, keys), plain, rtol=0, atol=0)
    torch.testing.assert_close(model(x, keys).detach(), plain, rtol=0, atol=0)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(model(leaf, keys).detach(), plain, rtol=0, atol=0)
    # A block whose state is itself a leaf, or a view of one, as inside of a checkpoint.
    sde = BlockSDE(Pointwise(torch.cos), Schedule(0.5, schedule))
    with torch.no_grad():
        plain = integrate(sde, x, keys, solver, steps=2)
        torch.testing.assert_close(integrate(sde, leaf, keys, solver, steps=2), plain, rtol=0, atol=0)


@functools.cache
@torch.no_grad()
def small_logits(solver: str, omega: float, schedule: str, steps: int) -> torch.Tensor:
    model = recast(smooth_chain(), omega, schedule, solver, steps, image_shape=(2, 6, 6))
    return model(random_images(2, 6, channels=2, dtype=torch.float64), keys_of(2))


@pytest.mark.parametrize("schedule", [ADDITIVE, MULTIPLICATIVE])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_all_solvers_converge_to_one_solution_on_a_network(solver, schedule):
    # One path serves every solver, through drift, jump and drift: a corrected drift, a missing jump, or
    # another path would leave a difference that small steps do not close.
    omega = 0.0 if solver in ODE_SOLVERS else 0.5
    fine = small_logits("srk", omega, schedule, 16)
    coarse = small_logits("euler", omega, schedule, 1)
    assert (small_logits(solver, omega, schedule, 64) - fine).abs().max() < 0.2 * (coarse - fine).abs().max()


# --- cost -----------------------------------------------------------------------------------------------


def count_evaluations(model) -> list[int]:
    counts = [0] * len(model.sdes)

    def hook(place):
        def add(*_):
            counts[place] += 1

        return add

    for i, sde in enumerate(model.sdes):
        sde.block.register_forward_hook(hook(i))
    return counts


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("schedule", [ADDITIVE, MULTIPLICATIVE])
@pytest.mark.parametrize("solver", SDE_SOLVERS + FIXED_ODE_SOLVERS)
def test_drift_evaluations_are_the_tables(solver, schedule, steps):
    # In train mode, where every evaluation is also an update of BatchNorm's statistics. A jump block is
    # evaluated once, for the jump; torchsde's look at the shape of the drift costs none.
    omega = 0.2 if solver in SDE_SOLVERS else 0.0
    model = recast(tiny(torch.float32), omega, schedule, solver, steps).train()
    before = [sde.block.bn1.num_batches_tracked.item() for sde in model.sdes]
    counts = count_evaluations(model)
    with torch.no_grad():
        model(random_images(2, 8), keys_of(2))
    row = SOLVERS[solver]
    a_step = row.evaluations.given(multiplicative=schedule == MULTIPLICATIVE)
    expected = a_step * steps + row.initial_evaluations
    assert counts == [1 if sde.jump else expected for sde in model.sdes]
    assert [sde.jump for sde in model.sdes] == [False, True, True]
    after = [sde.block.bn1.num_batches_tracked.item() for sde in model.sdes]
    assert [b - a for a, b in zip(before, after, strict=True)] == counts


@pytest.mark.parametrize("steps", [4, 16])
def test_checkpoints_cost_three_to_four_forward_passes(steps):
    model = recast(tiny(torch.float32), 0.2, steps=steps, checkpoint=True)
    counts = count_evaluations(model)
    model(random_images(2, 8).requires_grad_(), keys_of(2)).sum().backward()
    assert steps < counts[0] <= 4 * steps


# --- gradients ------------------------------------------------------------------------------------------

CASES = [(s, schedule) for s in SDE_SOLVERS for schedule in (ADDITIVE, MULTIPLICATIVE)]
CASES += [(s, ADDITIVE) for s in FIXED_ODE_SOLVERS]


@pytest.mark.parametrize(("solver", "schedule"), CASES)
def test_gradients_are_those_of_finite_differences(solver, schedule):
    omega = 0.0 if solver in ODE_SOLVERS else 0.4
    model = recast(smooth_chain(), omega, schedule, solver, 4, image_shape=(2, 6, 6))
    assert [sde.jump for sde in model.sdes] == [False, True, False]
    x, keys = random_images(2, 6, channels=2, dtype=torch.float64), keys_of(2)
    gen = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 3, generator=gen, dtype=torch.float64)

    def loss(images):
        return (model(images, keys) * weights).sum()

    x.requires_grad_()
    weight = model.sdes[0].block.conv1.weight
    along_x, along_weight = torch.autograd.grad(loss(x), (x, weight))
    x.requires_grad_(False)
    step = 1e-5  # errors: step^2 = 1e-10 from the curvature, 1e-16 / step = 1e-11 from rounding
    for _ in range(4):
        way = torch.randn(x.shape, generator=gen, dtype=x.dtype)
        with torch.no_grad():
            measured = (loss(x + step * way) - loss(x - step * way)) / (2 * step)
        assert float((along_x * way).sum()) == pytest.approx(float(measured), rel=1e-6, abs=1e-8)
    way = torch.randn(weight.shape, generator=gen, dtype=x.dtype)
    with torch.no_grad():
        weight.add_(step * way)
        above = loss(x)
        weight.sub_(2 * step * way)
        measured = (above - loss(x)) / (2 * step)
    assert float((along_weight * way).sum()) == pytest.approx(float(measured), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("schedule", [ADDITIVE, MULTIPLICATIVE])
@pytest.mark.parametrize("steps", [1, 4])
def test_gradient_is_that_of_a_loop_written_out(steps, schedule, checkpoint):
    net, omega = tiny(), 0.3
    x, keys = random_images(3, 8, dtype=torch.float64).requires_grad_(), keys_of(3)
    labels = torch.tensor([0, 3, 7])
    model = recast(net, omega, schedule, steps=steps, checkpoint=checkpoint)
    loss = nn.functional.cross_entropy(model(x, keys), labels)
    (ours,) = torch.autograd.grad(loss, x)

    body = net.resnet
    y = body.relu(body.bn1(body.conv1(net.normalize(x))))
    blocks = [block for layer in (body.layer1, body.layer2, body.layer3) for block in layer]
    h = 1 / steps
    for i, block in enumerate(blocks):
        jump = block.downsample is not None
        if jump:
            y = block(y)
        path = BrownianPath(keys, y[0].numel(), i, i, i + 1, dtype=torch.float64)
        for k in range(steps):
            ta = i + k * h
            noise = omega / (1 + ta) * path(ta, ta + h).reshape(y.shape)
            drift = 0 if jump else block(y) - y
            y = y + h * drift + (noise * y if schedule == MULTIPLICATIVE else noise)
    expected_loss = nn.functional.cross_entropy(body.fc(y.mean((2, 3))), labels)
    (expected,) = torch.autograd.grad(expected_loss, x)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("solver", "schedule", "steps"),
    [
        ("euler", ADDITIVE, 1),
        ("euler", ADDITIVE, 4),
        ("euler", ADDITIVE, 16),
        ("euler", MULTIPLICATIVE, 8),
        ("milstein", MULTIPLICATIVE, 1),
        ("milstein", MULTIPLICATIVE, 16),
        ("srk", ADDITIVE, 4),
        ("srk", MULTIPLICATIVE, 2),
        ("heun", MULTIPLICATIVE, 16),
        ("reversible_heun", ADDITIVE, 1),
        ("reversible_heun", MULTIPLICATIVE, 16),
        ("ode:rk4", ADDITIVE, 4),
        ("ode:dopri5", ADDITIVE, 1),
    ],
)
def test_checkpoints_change_neither_gradients_nor_batchnorm(solver, schedule, steps, train):
    # In train mode the recomputation must normalise with the batch, as before, and not update again.
    x = random_images(3, 8, dtype=torch.float64)
    keys = keys_of(3)
    omega = 0.0 if solver in ODE_SOLVERS else 0.3
    outcomes = []
    for checkpoint in (False, True):
        model = recast(tiny(), omega, schedule, solver, steps, checkpoint=checkpoint).train(train)
        leaf = x.clone().requires_grad_()
        logits = model(leaf, keys)
        logits.square().sum().backward()
        gradients = [leaf.grad, *(p.grad for p in model.parameters())]
        outcomes.append((logits, gradients, list(model.buffers())))
        if not train:
            assert all(map(torch.equal, model.buffers(), recast(tiny(), omega).buffers()))
    (logits, gradients, buffers), (logits2, gradients2, buffers2) = outcomes
    assert torch.equal(logits, logits2)
    for a, b in zip(gradients, gradients2, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(a.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(buffers, buffers2, strict=True))


@pytest.mark.parametrize("solver", ["euler", "milstein", "reversible_heun"])
@pytest.mark.parametrize("train", [False, True])
def test_several_gradients_through_one_checkpointed_pass(solver, train):
    # As DeepFool or the DLR loss take them: one forward pass, one gradient a class.
    x, keys = random_images(2, 8, dtype=torch.float64).requires_grad_(), keys_of(2)
    gradients = []
    for checkpoint in (False, True):
        model = recast(tiny(), 0.3, solver=solver, steps=4, checkpoint=checkpoint).train(train)
        logits = model(x, keys)
        gradients.append([torch.autograd.grad(logits[:, c].sum(), x, retain_graph=True)[0] for c in range(3)])
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.track_running_stats for norm in norms), "it left BatchNorm frozen"
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(a.abs().max()))


def test_checkpoints_of_blocks_that_drop_out_are_refused():
    # The recomputation would draw another mask, and the gradient would be that of another network.
    block = nn.Sequential(nn.Linear(6, 6), nn.Softplus(), nn.Dropout(0.5))
    chain = Chain(nn.Identity(), [nn.Identity(), block], nn.Flatten()).train()
    model = recast(chain, 0.3, steps=4, image_shape=(1, 6, 6), checkpoint=True)
    x = random_images(2, 6, channels=1).requires_grad_()
    with pytest.raises(ValueError, match=r"Block 1 drops out at random.*checkpoint=False"):
        model(x, keys_of(2))
    model.checkpoint = False
    assert model(x, keys_of(2)).requires_grad
    model.checkpoint = True
    assert model.eval()(x, keys_of(2)).requires_grad, "in eval mode nothing is dropped"


class Skips(nn.Module):
    """A block that draws without a module that would say so."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(6, 6), draw

    def forward(self, x):
        return x + self.layer(x) * self.draw()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(()),
        lambda: F.dropout(torch.ones(6), 0.5),
        lambda: float(np.random.rand()),
        lambda: random.random(),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "srk"])
def test_checkpoints_of_blocks_that_draw_are_refused(draw, solver):
    # The gradient was that of other draws: an error of 2.04 without a word.
    chain = Chain(nn.Identity(), [nn.Identity(), Skips(draw)], nn.Flatten())
    model = recast(Chain(nn.Identity(), [nn.Identity(), nn.Identity()], nn.Flatten()), 0.3, image_shape=(1, 6, 6))
    model = ito_of(chain, model, solver)
    with pytest.raises(ValueError, match=r"Block 1 draws random numbers.*checkpoint=False"):
        model(random_images(2, 6, channels=1).requires_grad_(), keys_of(2))
    with torch.no_grad():
        model(random_images(2, 6, channels=1), keys_of(2))


def ito_of(chain, model, solver):
    """`recast` compares a chain with itself, which a block that draws does not survive: it is put in afterwards."""
    model.sdes[1].block, model.solver, model.steps, model.checkpoint = chain.blocks[1], solver, 4, True
    return model


def test_checkpoints_of_blocks_that_skip_at_random_are_refused():
    block = nn.Sequential(nn.Linear(6, 6), StochasticDepth(0.5, "row"))
    chain = Chain(nn.Identity(), [nn.Identity(), block], nn.Flatten()).train()
    model = recast(chain, 0.3, steps=4, image_shape=(1, 6, 6), checkpoint=True)
    x = random_images(2, 6, channels=1).requires_grad_()
    with pytest.raises(ValueError, match=r"Block 1 drops out at random"):
        model(x, keys_of(2))
    assert model.eval()(x, keys_of(2)).requires_grad


@pytest.mark.parametrize("change", ["weight", "mode", "buffer"])
def test_what_changes_between_forward_and_backward_is_refused(change):
    block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Softplus())
    chain = Chain(nn.Identity(), [nn.Identity(), block], nn.Flatten()).eval()
    model = recast(chain, 0.3, steps=4, image_shape=(1, 6, 6), checkpoint=True)
    own = model.sdes[1].block
    loss = model(random_images(2, 6, channels=1).requires_grad_(), keys_of(2)).sum()
    with torch.no_grad():
        if change == "weight":
            own[0].weight.mul_(2)
        elif change == "buffer":
            own[1].running_mean.add_(1)
        else:
            own.train()
    with pytest.raises(ValueError, match="changed between the forward and the backward pass"):
        loss.backward()


def test_two_batches_may_go_forward_before_one_backward_pass():
    block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Softplus())
    chain = Chain(nn.Identity(), [nn.Identity(), block], nn.Flatten()).train()
    model = recast(chain, 0.3, steps=4, image_shape=(1, 6, 6), checkpoint=True)
    losses = [model(random_images(3, 6, channels=1, seed=s), keys_of(3)).sum() for s in (0, 1)]
    sum(losses).backward()
    assert model.sdes[1].block[0].weight.grad.isfinite().all()


def test_checkpoints_under_transforms_are_refused():
    model = recast(smooth_chain(), 0.3, steps=2, image_shape=(2, 6, 6), checkpoint=True)
    x = random_images(2, 6, channels=2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Checkpointing does not go with.*checkpoint=False"):
        torch.func.jvp(lambda x: model(x, keys_of(2)), (x,), (x,))


# --- errors ---------------------------------------------------------------------------------------------


def test_unknown_solvers_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"Unknown solver 'milstien'; did you mean 'milstein'\?"):
        find_solver("milstien")
    with pytest.raises(ValueError, match="did you mean 'ode:rk4'"):
        recast(tiny(), 0, solver="ode:rk45")
    problem, _ = solved("ou")
    with pytest.raises(ValueError, match="Unknown solver 'eular'"):
        integrate(problem.sde, problem.y0, problem.keys, "eular")


@pytest.mark.parametrize("steps", [0, 3, -1, 6, True, 2.0, "4", 1 << 21])
def test_steps_that_are_no_power_of_two_are_refused(steps):
    with pytest.raises(ValueError, match="power of two") as error:
        check_solver("euler", 0.1, steps)
    assert repr(steps) in str(error.value)
    with pytest.raises(ValueError, match="power of two"):
        recast(tiny(), 0.1, steps=steps)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_ode_methods_are_refused_under_noise(solver):
    with pytest.raises(ValueError, match=rf"'{solver}' solves the ODE.*omega = 0, got 0\.1"):
        recast(tiny(), 0.1, solver=solver)
    check_solver(solver, 0.0, 1)


@pytest.mark.parametrize(("attribute", "value"), [("solver", "ode:rk4"), ("steps", 3), ("solver", "eular")])
def test_what_is_set_later_is_checked_too(attribute, value):
    # Else ode:rk4 would drop the noise without a word, and three steps would read cells that do not exist.
    model = recast(tiny(torch.float32), 0.2)
    setattr(model, attribute, value)
    with pytest.raises(ValueError, match=f"{value!r}"), torch.no_grad():
        model(random_images(1, 8))
