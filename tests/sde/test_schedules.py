"""The diffusion: its values, its shape, and what it refuses."""

import dataclasses
import math

import pytest
import torch

from neuralsde_ito.sde.schedules import SCHEDULES, Law, Schedule


@pytest.mark.parametrize(
    ("name", "t", "expected"),
    [
        ("inverse-time", 0, 0.3),
        ("inverse-time", 1, 0.15),
        ("inverse-time", 8.0, 0.3 / 9),
        ("multiplicative", 0.5, 0.2),
        ("constant", 0, 0.3),
        ("constant", 17.5, 0.3),
        ("constant-multiplicative", 17.5, 0.3),
    ],
)
def test_sigma(name, t, expected):
    assert Schedule(0.3, name).sigma(t) == pytest.approx(expected, rel=1e-15)
    assert Schedule(0.3, name).sigma(torch.tensor(float(t), dtype=torch.float64)) == pytest.approx(expected, rel=1e-15)


def test_the_default_is_the_papers():
    assert Schedule(0.2).name == "inverse-time"
    assert not Schedule(0.2).multiplicative


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_g_is_the_diagonal_in_the_states_shape_and_dtype(name, dtype):
    schedule = Schedule(0.4, name)
    x = torch.linspace(-2, 2, 24, dtype=dtype).view(2, 3, 4)
    for t in (1.0, torch.tensor(1.0)):
        g = schedule.g(t, x)
        assert g.shape == x.shape
        assert g.dtype == dtype
        sigma = {"constant": 0.4, "constant-multiplicative": 0.4}.get(name, 0.2)
        expected = x * sigma if "multiplicative" in name else torch.full_like(x, sigma)
        torch.testing.assert_close(g, expected, rtol=1e-6, atol=0)
    assert schedule.multiplicative == ("multiplicative" in name)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("inverse-time", "0.2 / (1 + t)"),
        ("constant", "0.2"),
        ("multiplicative", "0.2 / (1 + t) * x"),
        ("constant-multiplicative", "0.2 * x"),
    ],
)
def test_the_formula_as_text(name, formula):
    assert Schedule(0.2, name).formula == formula


def test_a_schedule_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "decaying", Law("omega * exp(-t)", lambda omega, t: omega * math.exp(-t)))
    schedule = Schedule(0.5, "decaying")
    assert schedule.formula == "0.5 * exp(-t)"
    assert schedule.sigma(1.0) == 0.5 * math.exp(-1)
    assert not schedule.multiplicative


def test_no_noise_is_a_strength_too():
    x = torch.ones(2, 2)
    assert all(float(Schedule(0, name).g(0.0, x).abs().max()) == 0 for name in SCHEDULES)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("inverse_time", "inverse-time"), ("multiplicativ", "multiplicative"), ("Constant", "constant")],
)
def test_unknown_names_are_refused_with_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=rf"Unknown schedule '{typed}'; did you mean '{meant}'\?$"):
        Schedule(0.2, typed)


def test_a_name_near_to_none_is_refused_with_all_of_them():
    with pytest.raises(ValueError, match="Unknown schedule 'qqqq'") as error:
        Schedule(0.2, "qqqq")
    assert "did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in SCHEDULES)


@pytest.mark.parametrize("omega", [-1e-9, float("inf"), float("nan")])
def test_strengths_out_of_range_are_refused(omega):
    with pytest.raises(ValueError, match=f"finite and at least 0, got {omega}"):
        Schedule(omega)


@pytest.mark.parametrize("omega", ["0.2", None, True, [0.2]])
def test_strengths_that_are_no_numbers_are_refused(omega):
    with pytest.raises(ValueError, match="omega must be a number, got"):
        Schedule(omega)


def test_a_schedule_does_not_change():
    schedule = Schedule(0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.omega = 0.3
    assert schedule == Schedule(0.2)
    assert schedule != Schedule(0.2, "constant")
