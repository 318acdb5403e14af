"""Blocks as torchsde modules: its protocol, their other forms, and the law of the state."""

import math

import pytest
import torch
import torchsde
from problems import Pointwise, random_images, random_resnet, smooth_chain
from scipy.integrate import quad
from torch import nn

from neuralsde_ito.models.recast import Chain, recast
from neuralsde_ito.noise.brownian import BrownianPath
from neuralsde_ito.noise.keys import make_keys
from neuralsde_ito.sde.block import BlockSDE
from neuralsde_ito.sde.integrate import integrate
from neuralsde_ito.sde.schedules import SCHEDULES, Schedule
from neuralsde_ito.validation import ItoError

Z = 4.9  # a correct statistic lies beyond it with probability 1e-6


def keys_of(n: int, seed: int = 0) -> torch.Tensor:
    return make_keys(seed, "report", index=torch.arange(n))


def model_and_states(schedule: str = "inverse-time", horizon: float | None = None):
    """A smooth model, and the state in front of every block: drift, jump, drift."""
    model = recast(smooth_chain(), 0.4, schedule, image_shape=(2, 6, 6), horizon=horizon)
    with torch.no_grad():
        x = model.stem(random_images(5, 6, channels=2, dtype=torch.float64))
        states = []
        for sde in model.sdes:
            states.append(x)
            x = sde.block(x)
    return model, states


# --- drift and diffusion --------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [None, 1.5])
@torch.no_grad()
def test_drift_and_diffusion_have_the_flat_states_shape(horizon):
    model, states = model_and_states(horizon=horizon)
    length = 1.0 if horizon is None else horizon / 3
    for i, (sde, x) in enumerate(zip(model.sdes, states, strict=True)):
        after = sde.block(x)
        y = after.flatten(1) if sde.jump else x.flatten(1)  # the state after the jump, if there is one
        t = torch.tensor(sde.t0)
        f, g = sde.f(t, y), sde.g(t, y)
        assert f.shape == g.shape == y.shape
        if sde.jump:
            assert not f.any()
        else:
            torch.testing.assert_close(f, (after - x).flatten(1) / length, rtol=1e-12, atol=1e-12)
            assert torch.equal(f, sde.f(sde.t1, y)), "the drift does not depend on time inside the block"
        torch.testing.assert_close(g, torch.full_like(y, 0.4 / (1 + i * length)), rtol=1e-12, atol=0)
    assert [sde.jump for sde in model.sdes] == [False, True, False]


def test_the_shape_is_the_test_images_whatever_the_network_is_given():
    model, _ = model_and_states()
    before = [sde.shape for sde in model.sdes]
    model(random_images(2, 10, channels=2, dtype=torch.float64))
    assert [sde.shape for sde in model.sdes] == before == [(3, 6, 6), (4, 3, 3), (4, 3, 3)]


def test_states_of_another_shape_go_through_a_view_and_are_refused_elsewhere():
    model, _ = model_and_states()
    sde, y = model.sdes[0], torch.rand(2, 3 * 10 * 10, dtype=torch.float64)
    wanted = (sde.block(y.view(2, 3, 10, 10)) - y.view(2, 3, 10, 10)).flatten(1)
    assert torch.equal(sde.view("ito", (3, 10, 10)).f(0.0, y), wanted)
    with pytest.raises(ItoError, match=r"have 300 elements, and block 0 expects \(3, 6, 6\).*view"):
        sde.f(0.0, y)


def test_printing_a_model_names_its_blocks():
    model, _ = model_and_states()
    text = str(model)
    assert "0: [0, 1], drift and diffusion, Schedule(omega=0.4" in text
    assert "1: [1, 2], jump, then diffusion" in text


# --- torchsde itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["euler", "milstein", "srk"])
@pytest.mark.parametrize("schedule", ["inverse-time", "multiplicative"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_torchsde_runs_on_a_block_with_its_own_brownian_motion(place, schedule, method):
    model, states = model_and_states(schedule)
    sde, x = model.sdes[place], states[place]
    with torch.no_grad():
        y0 = (sde.block(x) if sde.jump else x).flatten(1)
        ts = torch.tensor([sde.t0, sde.t1], dtype=torch.float64)
        ends = [torchsde.sdeint(sde, y0, ts, method=method, dt=0.25)[-1] for _ in range(2)]
    for end in ends:
        assert end.shape == y0.shape
        assert end.isfinite().all()
    assert not (ends[0] == ends[1]).any(), "its own paths are fresh"


@pytest.mark.parametrize("solver", ["torchsde:euler", "milstein", "srk"])
@pytest.mark.parametrize("schedule", ["inverse-time", "multiplicative"])
@pytest.mark.parametrize("place", [0, 1, 2])
@torch.no_grad()
def test_torchsde_on_our_path_is_our_solver(place, schedule, solver):
    model, states = model_and_states(schedule)
    sde, x, keys = model.sdes[place], states[place], keys_of(5)
    ours = integrate(sde, x, keys, solver, steps=4)
    y0 = (sde.block(x) if sde.jump else x).flatten(1)
    path = BrownianPath(keys, y0.shape[1], sde.index, sde.t0, sde.t1, dtype=torch.float64)
    ts = torch.tensor([sde.t0, sde.t1], dtype=torch.float64)
    method = solver.removeprefix("torchsde:")
    # On additive noise our SRK takes the additive form, which makes it SRA1; as it is, torchsde takes SRID2.
    form = sde.view("additive") if solver == "srk" and schedule == "inverse-time" else sde
    theirs = torchsde.sdeint(form, y0, ts, bm=path, method=method, dt=0.25)[-1]
    torch.testing.assert_close(ours.flatten(1), theirs, rtol=1e-13, atol=1e-13)


def test_torchsde_on_a_real_block_in_float32():
    model = recast(random_resnet("resnet20"), omega=0.2)
    with torch.no_grad():
        x = model.stem(random_images(2, 16))
        sde = model.sdes[0]
        y = torchsde.sdeint(
            sde.view("ito", tuple(x.shape[1:])), x.flatten(1), torch.tensor([0.0, 1.0]), method="euler", dt=1.0
        )[-1]
        noise = (y - sde.block(x).flatten(1)) / 0.2
    n = noise.numel()
    assert abs(float(noise.double().square().mean()) - 1) * math.sqrt(n / 2) < Z


# --- views ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SCHEDULES))
@torch.no_grad()
def test_the_stratonovich_view(name):
    sde = BlockSDE(Pointwise(torch.cos), Schedule(0.5, name), t0=1.0, t1=2.0, shape=(4,))
    view, y = sde.view("stratonovich"), torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    assert (view.noise_type, view.sde_type) == ("diagonal", "stratonovich")
    assert (sde.noise_type, sde.sde_type) == ("diagonal", "ito")
    for t in (1.0, 1.5):
        sigma = 0.5 if "constant" in name else 0.5 / (1 + t)
        # Ito to Stratonovich: f - g g' / 2.
        correction = sigma**2 * y / 2 if "multiplicative" in name else torch.zeros_like(y)
        torch.testing.assert_close(view.f(torch.tensor(t), y), torch.cos(y) - y - correction)
        assert torch.equal(view.g(torch.tensor(t), y), sde.g(t, y))


def test_the_correction_is_half_g_times_its_derivative():
    # The same without the formula: by automatic differentiation of whatever g is.
    for name in SCHEDULES:
        sde = BlockSDE(Pointwise(torch.sin), Schedule(0.7, name), shape=(6,))
        y = torch.linspace(-1, 1, 6, dtype=torch.float64)[None]
        g, derivative = torch.func.jvp(lambda v, sde=sde: sde.g(0.5, v), (y,), (torch.ones_like(y),))
        torch.testing.assert_close(sde.f(0.5, y) - sde.view("stratonovich").f(0.5, y), g * derivative / 2)


def test_the_additive_view():
    y, v = torch.rand(3, 4), torch.rand(3, 4)
    sde = BlockSDE(Pointwise(torch.cos), Schedule(0.5), t0=1.0, t1=2.0, shape=(4,))
    view = sde.view("additive")
    assert (view.noise_type, view.sde_type) == ("additive", "ito")
    assert not hasattr(view, "g"), "a dense (D, D) diffusion a sample must not be built"
    assert torch.equal(view.f(1.0, y), sde.f(1.0, y))
    torch.testing.assert_close(view.g_prod(1.5, y, v), 0.2 * v)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if "multiplicative" in name])
def test_multiplicative_noise_has_no_additive_view(name):
    with pytest.raises(ValueError, match=f"'{name}' is multiplicative"):
        BlockSDE(nn.Identity(), Schedule(0.5, name)).view("additive")


def test_unknown_views_are_refused():
    with pytest.raises(ValueError, match=r"Unknown form 'dense'. Known: ito, additive, stratonovich"):
        BlockSDE(nn.Identity(), Schedule(0.5)).view("dense")


# --- the law of the state -------------------------------------------------------------------------------

THETA, OMEGA, BLOCKS = 0.5, 0.6, 4


def end_states(solver: str, steps: int, samples: int, horizon: float | None = None, start: float = 1.0):
    """A chain of Ornstein-Uhlenbeck blocks ``B(x) = (1 - theta) x``: one linear SDE through the network."""
    chain = Chain(nn.Identity(), [Pointwise(lambda y: y - THETA * y) for _ in range(BLOCKS)], nn.Flatten())
    model = recast(chain, OMEGA, solver=solver, steps=steps, horizon=horizon, image_shape=(1, 8, 16))
    with torch.no_grad():
        n = samples // 128
        return model(torch.full((n, 1, 8, 16), start), keys_of(n, seed=steps)).double().flatten()


def assert_law(x: torch.Tensor, mean: float, variance: float) -> None:
    n = x.numel()
    z = (float(x.mean()) - mean) / math.sqrt(variance / n)
    chi2 = (float((x - mean).square().mean()) / variance - 1) * math.sqrt(n / 2)  # of n degrees of freedom, to its z
    assert abs(z) < Z, f"mean {float(x.mean())} for {mean}: z = {z:.1f}"
    assert abs(chi2) < Z, f"variance {float(x.var())} for {variance}: z = {chi2:.1f}"


@pytest.mark.parametrize("horizon", [None, 2.5])
@pytest.mark.parametrize("solver", ["euler", "milstein"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_law_of_eulers_recursion(steps, solver, horizon):
    # x <- (1 - theta h) x + sigma(t) sqrt(h) xi, exactly Gaussian; the blocks' noises must be independent.
    # 262,144 samples tell a variance that is wrong by 1.4 %, a correlation between blocks of about 1 %.
    h, mean, variance = 1 / steps, 1.0, 0.0
    clock = (BLOCKS if horizon is None else horizon) / BLOCKS  # units of time a block
    for k in range(BLOCKS * steps):
        mean *= 1 - THETA * h
        variance = (1 - THETA * h) ** 2 * variance + (OMEGA / (1 + k * h * clock)) ** 2 * h * clock
    assert_law(end_states(solver, steps, 2**18, horizon), mean, variance)


@pytest.mark.parametrize(
    ("solver", "steps", "samples"),
    [
        ("srk", 8, 2**18),  # its weak error is below 1e-4 here
        ("euler", 256, 2**14),  # its bias, of order theta^2 h, is a fifth of the standard error
    ],
)
def test_the_law_of_the_process(solver, steps, samples):
    def speed(s):
        return math.exp(-2 * THETA * (BLOCKS - s)) * (OMEGA / (1 + s)) ** 2

    mean, variance = math.exp(-THETA * BLOCKS), quad(speed, 0, BLOCKS)[0]
    assert_law(end_states(solver, steps, samples), mean, variance)


@pytest.mark.parametrize("solver", ["milstein", "srk", "midpoint"])
def test_the_law_of_geometric_brownian_motion(solver):
    # Multiplicative noise on drift (1 + mu) x: E x = e^mu, and log x is Gaussian, which Ito's correction shifts.
    mu, omega, n = 0.3, 0.4, 2**17
    sde = BlockSDE(Pointwise(lambda y: (1 + mu) * y), Schedule(omega, "constant-multiplicative"))
    with torch.no_grad():
        x = integrate(sde, torch.ones(n // 128, 128, dtype=torch.float64), keys_of(n // 128), solver, steps=64)
    assert_law(x.log().flatten(), mu - omega**2 / 2, omega**2)
