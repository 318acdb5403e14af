"""Other libraries on the same problems, where they are installed: do they find the same orders?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..sde.solvers import find_solver
from .orders import Order, fit_order
from .problems import FINEST, PROBLEMS

# Our name -> diffrax's class, for additive and for multiplicative noise; it has no Itô SRK of order 1.5 for the latter.
_DIFFRAX = {
    "euler": ("Euler", "Euler"),
    "milstein": ("ItoMilstein", "ItoMilstein"),
    "srk": ("SRA1", None),
    "heun": ("Heun", "Heun"),
    "midpoint": ("Midpoint", "Midpoint"),
    "euler_heun": ("EulerHeun", "EulerHeun"),
    "reversible_heun": ("ReversibleHeun", "ReversibleHeun"),
}


def diffrax_orders(problem: str, solvers: Sequence[str], steps: Sequence[int]) -> dict[str, Order]:
    """Strong and weak orders by diffrax (https://docs.kidger.site/diffrax) on its own Brownian tree.

    Args:
        problem: ``ornstein-uhlenbeck``, ``geometric-brownian`` or ``double-well``, with the parameters of
            `neuralsde_ito.problems`.
        solvers: our names; those that diffrax lacks are left out.
        steps: powers of two.

    Raises:
        ImportError: diffrax is not installed.
    """
    import diffrax
    import jax
    import jax.numpy as jnp
    import lineax
    import numpy as np

    posed = PROBLEMS[problem]()
    multiplicative, omega, y0 = posed.sde.schedule.multiplicative, posed.sde.schedule.omega, float(posed.y0[0, 0])

    def drift(t: Any, y: Any, stratonovich: bool) -> Any:
        if problem == "ornstein-uhlenbeck":
            return -y
        if multiplicative:
            return (0.25 - (omega**2 / 2 if stratonovich else 0.0)) * y
        return y - y**3

    def diffusion(t: Any, y: Any, _: Any) -> Any:
        g = omega * y if multiplicative else omega / (1 + t) if problem == "ornstein-uhlenbeck" else omega
        return lineax.DiagonalLinearOperator(jnp.broadcast_to(jnp.asarray(g, y.dtype), y.shape))

    def tree(key: Any) -> Any:
        return diffrax.VirtualBrownianTree(0.0, 1.0, 2.0**-14, (64,), key, levy_area=diffrax.SpaceTimeLevyArea)

    def solver_of(name: str, stratonovich: bool) -> Any:
        solver = getattr(diffrax, name)()

        def one(key: Any, n: Any) -> Any:
            terms: Any = diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, _: drift(t, y, stratonovich)), diffrax.ControlTerm(diffusion, tree(key))
            )
            start = jnp.full((64,), y0)
            return diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 1 / n, start, max_steps=None, throw=False).ys[0]

        return jax.jit(jax.vmap(one, (0, None)))

    def exact(key: Any) -> Any:
        path = tree(key)
        if multiplicative:
            return y0 * jnp.exp(0.25 - omega**2 / 2 + omega * path.evaluate(0.0, 1.0))
        h = 2.0**-9  # as in `problems.ornstein_uhlenbeck`; here H is given in place of U = h (W / 2 + H)
        left = jnp.arange(512) * h
        area = jax.vmap(lambda t: path.evaluate(t, t + h, use_levy=True))(left)
        m = (left + 0.5 * h)[:, None]
        phi = jnp.exp(m - 1) * omega / (1 + m)
        return math.exp(-1) * y0 + (phi * area.W - phi * (1 - 1 / (1 + m)) * h * area.H).sum(0)

    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(0), 64)
        if problem == "double-well":
            fine = solver_of("SRA1", False)(keys, float(FINEST))
        else:
            fine = jax.jit(jax.vmap(exact))(keys)
        found = {}
        for ours in solvers:
            name = _DIFFRAX[ours][multiplicative] if ours in _DIFFRAX else None
            if name is None:
                continue
            method = find_solver(ours)
            run = solver_of(name, method.form == "stratonovich")
            missed = [torch.from_numpy(np.array(run(keys, float(n)) - fine)) for n in steps]
            theory = method.order.given(multiplicative=multiplicative)
            evaluations = method.evaluations.given(multiplicative=multiplicative)
            found[ours] = fit_order(ours, theory, evaluations, steps, missed, float(fine.std()))
    return found
