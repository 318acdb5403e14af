"""Orders as another library measures them on the same problems, if it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..sde.solvers import find_solver
from .orders import Order, fit_order
from .problems import FINEST, PROBLEMS

# Our name -> diffrax's class, for additive and for multiplicative noise. For the latter it has no Itô SRK of order 1.5.
_DIFFRAX = {
    "euler": ("Euler", "Euler"),
    "milstein": ("ItoMilstein", "ItoMilstein"),
    "srk": ("SRA1", None),
    "heun": ("Heun", "Heun"),
    "midpoint": ("Midpoint", "Midpoint"),
    "euler_heun": ("EulerHeun", "EulerHeun"),
    "reversible_heun": ("ReversibleHeun", "ReversibleHeun"),
}


_GROUPS, _SIZE = 64, 64  # 64 keys, each for a path of 64 components: 4,096 paths, as in `problems`


def diffrax_orders(problem: str, solvers: Sequence[str], steps: Sequence[int]) -> dict[str, Order]:
    """Strong and weak orders by diffrax (https://docs.kidger.site/diffrax) on its own Brownian tree.

    Args:
        problem: ``ornstein-uhlenbeck``, ``geometric-brownian`` or ``double-well``, with the parameters of
            `neuralsde_ito.studies.problems`.
        solvers: our names; those that diffrax lacks are left out.
        steps: numbers of steps on ``[0, 1]``, powers of two.

    Raises:
        ImportError: diffrax is not installed.
    """
    import jax
    import numpy as np

    posed = PROBLEMS[problem]()
    multiplicative, omega, y0 = posed.sde.schedule.multiplicative, posed.sde.schedule.omega, float(posed.y0[0, 0])
    solve = _diffrax_solver(problem, multiplicative, omega, y0)
    orders = {}
    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(0), _GROUPS)
        if problem == "double-well":
            exact = solve("SRA1", False)(keys, float(FINEST))
        else:
            exact = jax.jit(jax.vmap(_diffrax_solution(multiplicative, omega, y0)))(keys)
        for ours in solvers:
            name = _DIFFRAX[ours][multiplicative] if ours in _DIFFRAX else None
            if name is None:
                continue
            method = find_solver(ours)
            run = solve(name, method.form == "stratonovich")
            differences = [torch.from_numpy(np.array(run(keys, float(n)) - exact)) for n in steps]
            theory = method.order.given(multiplicative=multiplicative)
            evaluations = method.evaluations.given(multiplicative=multiplicative)
            orders[ours] = fit_order(ours, theory, evaluations, steps, differences, float(exact.std()))
    return orders


def _diffrax_path(key: Any) -> Any:
    """A Brownian path on ``[0, 1]`` with space-time Lévy area."""
    import diffrax

    return diffrax.VirtualBrownianTree(0.0, 1.0, 2.0**-14, (_SIZE,), key, levy_area=diffrax.SpaceTimeLevyArea)


def _diffrax_solver(problem: str, multiplicative: bool, omega: float, y0: float) -> Callable[[str, bool], Any]:
    """From a class of diffrax, and whether it solves the Stratonovich form, to ``run(keys, steps) -> states at 1``."""
    import diffrax
    import jax
    import jax.numpy as jnp
    import lineax

    def drift(t: Any, y: Any, stratonovich: bool) -> Any:
        if problem == "ornstein-uhlenbeck":
            return -y
        if multiplicative:
            return (0.25 - (omega**2 / 2 if stratonovich else 0.0)) * y
        return y - y**3

    def diffusion(t: Any, y: Any, _: Any) -> Any:
        g = omega * y if multiplicative else omega / (1 + t) if problem == "ornstein-uhlenbeck" else omega
        return lineax.DiagonalLinearOperator(jnp.broadcast_to(jnp.asarray(g, y.dtype), y.shape))

    def solve(name: str, stratonovich: bool) -> Any:
        solver = getattr(diffrax, name)()

        def one(key: Any, n: Any) -> Any:
            terms: Any = diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, _: drift(t, y, stratonovich)),
                diffrax.ControlTerm(diffusion, _diffrax_path(key)),
            )
            start = jnp.full((_SIZE,), y0)
            return diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 1 / n, start, max_steps=None, throw=False).ys[0]

        return jax.jit(jax.vmap(one, (0, None)))

    return solve


def _diffrax_solution(multiplicative: bool, omega: float, y0: float) -> Callable[[Any], Any]:
    """The closed forms of `problems`, from a key to the states at 1."""
    import jax
    import jax.numpy as jnp

    def geometric_brownian_motion(key: Any) -> Any:
        return y0 * jnp.exp(0.25 - omega**2 / 2 + omega * _diffrax_path(key).evaluate(0.0, 1.0))

    def ornstein_uhlenbeck(key: Any) -> Any:
        path = _diffrax_path(key)
        h = 2.0**-9  # as in `problems.ornstein_uhlenbeck`, but diffrax gives H, where U = h (W / 2 + H)
        left = jnp.arange(512) * h
        area = jax.vmap(lambda t: path.evaluate(t, t + h, use_levy=True))(left)
        m = (left + 0.5 * h)[:, None]
        phi = jnp.exp(m - 1) * omega / (1 + m)
        return math.exp(-1) * y0 + (phi * area.W - phi * (1 - 1 / (1 + m)) * h * area.H).sum(0)

    return geometric_brownian_motion if multiplicative else ornstein_uhlenbeck
