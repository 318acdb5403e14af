"""``ito-sde orders``: measured strong and weak orders of solvers on problems with known solutions."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from neuralsde_ito.sde.solvers import SOLVERS
from neuralsde_ito.validation import ItoError

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.studies.orders import Order

# The names in `neuralsde_ito.studies.problems.PROBLEMS`, for help that does not wait for torch.
PROBLEMS = ("ornstein-uhlenbeck", "geometric-brownian", "double-well")
WITH_NOISE = tuple(name for name, solver in SOLVERS.items() if solver.form != "ode")
STEPS = (8, 16, 32, 64, 128, 256)

Measured = dict[str, dict[str, "Order"]]  # problem -> solver -> order


@click.command("orders")
@click.option(
    "--problem",
    "problems",
    multiple=True,
    type=click.Choice([*PROBLEMS, "all"]),
    default=("all",),
    show_default=True,
    help="With a solution that is known on every path.  [repeatable]",
)
@click.option(
    "--solver",
    "solvers",
    multiple=True,
    type=click.Choice(WITH_NOISE),
    metavar="NAME",
    help=f"Only this solver: {', '.join(WITH_NOISE)}.  [repeatable; default: all]",
)
@click.option(
    "--steps",
    "steps",
    multiple=True,
    type=int,
    default=STEPS,
    show_default=True,
    help="Steps on [0, 1], a power of two.  [repeatable]",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(["torchsde", "diffrax"]),
    default=("torchsde",),
    show_default=True,
    help="The same orders by another library on its own paths.  [repeatable]",
)
@options.as_json
def command(
    problems: tuple[str, ...], solvers: tuple[str, ...], steps: tuple[int, ...], peers: tuple[str, ...], as_json: bool
) -> None:
    """Measure strong and weak orders of solvers on problems with known solutions, and compare with theory."""
    asked = PROBLEMS if "all" in problems else tuple(dict.fromkeys(problems))
    chosen = tuple(dict.fromkeys(solvers)) or WITH_NOISE
    grid, peers = tuple(sorted(set(steps))), tuple(dict.fromkeys(peers))
    if "diffrax" in peers and importlib.util.find_spec("diffrax") is None:
        raise ItoError("diffrax is not installed: pip install diffrax.")
    ours, by_peer = _measure(asked, chosen, grid, peers)
    if as_json:

        def listed(measured: Measured) -> dict[str, list[dict[str, object]]]:
            return {problem: [asdict(order) for order in orders.values()] for problem, orders in measured.items()}

        content = {peer: listed(measured) for peer, measured in by_peer.items()}
        output.print_json({"command": "orders", "problems": listed(ours), "peers": content})
        return
    output.table(_rows(ours, by_peer), _headers(peers, grid))
    click.echo()
    output.sentence(
        f"Slopes of the error against the step over the four finest of {', '.join(map(str, grid))} steps that were "
        "stable, ± one standard error over 16 groups of paths. A strong order above theory is no error: linear "
        "problems with additive noise give SRK 2. "
        + ("By torchsde: its solver on its own Brownian interval. " if "torchsde" in peers else "")
        + ("By diffrax: its solver on its own Brownian tree. " if "diffrax" in peers else "")
        + ("DIFFERS: by more than 3 standard errors and 0.02." if peers else "")
    )


def _measure(
    problems: tuple[str, ...], solvers: tuple[str, ...], steps: tuple[int, ...], peers: tuple[str, ...]
) -> tuple[Measured, dict[str, Measured]]:
    """Orders on our paths, and by each peer on its own."""
    from neuralsde_ito.studies.orders import measure_order
    from neuralsde_ito.studies.problems import PROBLEMS as POSED

    ours: Measured = {name: {} for name in problems}
    by_peer: dict[str, Measured] = {peer: {name: {} for name in problems} for peer in peers}
    total = len(problems) * (len(solvers) * (1 + ("torchsde" in peers)) + 1)
    with output.progress(total, "orders", "solvers") as bar:
        for name in problems:
            problem = POSED[name]()
            exact = problem.exact()
            for solver in solvers:
                ours[name][solver] = measure_order(problem, solver, steps, exact)
                bar.update()
            if "torchsde" in peers:
                path = problem.torchsde_path()
                exact = problem.exact(path)
                for solver in solvers:
                    if SOLVERS[solver].any_sde or SOLVERS[solver].same_as:  # torchsde has the method
                        by_peer["torchsde"][name][solver] = measure_order(problem, solver, steps, exact, path)
                    bar.update()
            if "diffrax" in peers:
                from neuralsde_ito.studies.other_libraries import diffrax_orders

                by_peer["diffrax"][name] = diffrax_orders(name, solvers, steps)
            bar.update()
    return ours, by_peer


def _headers(peers: tuple[str, ...], steps: tuple[int, ...]) -> list[str]:
    columns = [*(f"by {peer}" for peer in peers), f"error at {steps[-1]}", "weak", "remarks"]
    return ["problem", "solver", "theory", "strong order", *columns]


def _rows(ours: Measured, by_peer: dict[str, Measured]) -> list[list[str]]:
    rows = []
    for name, orders in ours.items():
        for solver, order in orders.items():
            theirs = {peer: measured[name].get(solver) for peer, measured in by_peer.items()}
            weak = f"{order.weak[0]:.2f} ± {order.weak[1]:.2f}" if order.weak else "bias < 4 s.e."
            remarks = [f"unstable at {', '.join(map(str, order.unstable))} steps"] if order.unstable else []
            if order.fit is not None and order.fit < order.theory - 0.15:
                remarks.append("BELOW THEORY")
            remarks += [f"{peer} DIFFERS" for peer, other in theirs.items() if other and not order.agrees(other)]
            figures = [_fit(order), *map(_fit, theirs.values()), f"{order.errors[-1]:.1e}", weak]
            first = solver == next(iter(orders))
            rows.append([name if first else "", solver, f"{order.theory:g}", *figures, "; ".join(remarks)])
    return rows


def _fit(order: Order | None) -> str:
    if order is None:
        return ""
    return f"{order.fit:.2f} ± {order.standard_error:.2f}" if order.fit is not None else "too few stable steps"
