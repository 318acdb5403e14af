"""``ito-sde compare``: which solver, at how many steps, on a run's network or on problems with known solutions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from . import options, output


@click.command("compare")
@options.on_run
@click.option(
    "--problem",
    "problems",
    multiple=True,
    help="Measure orders on a closed-form problem instead: ornstein-uhlenbeck, geometric-brownian, double-well or "
    "all.  [repeatable]",
)
@click.option("--solver", "solvers", multiple=True, help="Only this solver.  [repeatable; default: all that fit]")
@click.option("--steps", "steps", multiple=True, type=int, help="Steps a block.  [repeatable; default: 1 2 4 8]")
@click.option("--limit", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Test images.")
@click.option("--gradients/--no-gradients", default=True, show_default=True, help="Compare input gradients, too.")
@click.option("--save", type=click.Path(path_type=Path), metavar="PNG|SVG", help="Draw error against evaluations.")
@options.seed
@options.as_json
def command(
    run: str | None,
    root: Path,
    device: str,
    problems: tuple[str, ...],
    solvers: tuple[str, ...],
    steps: tuple[int, ...],
    limit: int,
    gradients: bool,
    save: Path | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Hold SDE solvers against a fine reference, all on the same Brownian paths."""
    if problems:
        _orders(problems, solvers, steps, as_json)
        return
    from neuralsde_ito.convergence import compare_solvers
    from neuralsde_ito.recipes import load_dataset

    opened = options.open_run(root, run, device)
    data = load_dataset(opened.config, train_limit=1, test_limit=limit)
    index, x, y = next(iter(data.test.batches(limit, opened.device)))
    seed = opened.config.seed if seed is None else seed
    member = opened.ensemble.members[0]
    chosen = tuple(sorted(set(steps))) or (1, 2, 4, 8)
    report = compare_solvers(member, x, y, solvers or None, chosen, seed, index, gradients=gradients)  # type: ignore[arg-type]
    if save:
        from .pictures import compare_picture

        compare_picture(report, save)
    if as_json:
        head = {"command": "compare", "run": str(opened.folder), "data": data.name, "images": len(y), "seed": seed}
        output.print_json({**head, **asdict(report), "remarks": report.remarks()})
        return
    output.describe(opened.config, opened.folder, 1, 1, opened.ensemble.rule)
    solver, fine = report.reference
    click.echo(f"\n{len(y)} test images of {data.name}; against {solver} at {fine} steps a block, on the same paths\n")
    rows = []
    last = None
    for row in report.rows:
        order = report.orders[row.solver]
        first = row.solver != last
        last = row.solver
        if row.diverged:
            rows.append([row.solver if first else "", row.steps, row.evaluations, f"not finite after {row.diverged}"])
            continue
        rows.append(
            [
                row.solver if first else "",
                row.steps,
                row.evaluations,
                f"{row.state_error:.2e}",
                f"{row.logit_error:.2e}",
                f"{row.probability_error:.2e}",
                f"{100 * row.agreement:.1f}",
                f"{100 * row.accuracy:.1f}" if row.accuracy is not None else "",
                f"{row.gradient_cosine:.3f}" if row.gradient_cosine is not None else "",
                f"{row.cost:.1f}",
                f"{order:.2f}" if first and order is not None else "",
            ]
        )
    heads = ["solver", "steps", "drift evals", "state", "logits", "mean prob.", "same %", "right %", "cos grad", "cost"]
    output.table(rows, [*heads, "slope"])
    click.echo()
    output.sentence(
        "State, logits: relative root mean square error (strong). Mean prob.: largest error of a class's mean "
        "probability (weak). Same: labels as the reference's. Cos grad: cosine of the input gradient to the "
        "reference's. Cost: time in forward passes of the network. Slope: of the state's error against the step."
    )
    for remark in report.remarks():
        output.sentence(remark)
    if save:
        click.echo(f"\nPicture  {save}")


def _orders(problems: tuple[str, ...], solvers: tuple[str, ...], steps: tuple[int, ...], as_json: bool) -> None:
    """The table of theory, fit and standard error."""
    import torch

    from neuralsde_ito.convergence import Order, measure_order
    from neuralsde_ito.names import nearest
    from neuralsde_ito.problems import PROBLEMS
    from neuralsde_ito.solvers import SOLVERS

    asked = list(PROBLEMS) if "all" in problems else list(problems)
    chosen = solvers or tuple(name for name, solver in SOLVERS.items() if solver.library != "torchdiffeq")
    grid = tuple(sorted(set(steps))) or (8, 16, 32, 64)
    for name in asked:
        if name not in PROBLEMS:
            raise ValueError(nearest("problem", name, PROBLEMS))
    found: dict[str, list[Order]] = {}
    with output.progress(len(asked) * len(chosen), "orders", "solvers") as bar:
        for name in asked:
            problem = PROBLEMS[name]()
            with torch.no_grad():
                exact = problem.exact()
            found[name] = []
            for solver in chosen:
                found[name].append(measure_order(problem, solver, grid, exact))
                bar.update()
    if as_json:
        content = {name: [asdict(order) for order in orders] for name, orders in found.items()}
        output.print_json({"command": "compare", "problems": content})
        return
    rows = []
    for name, orders in found.items():
        for i, order in enumerate(orders):
            fit = f"{order.fit:.2f} ± {order.standard_error:.2f}" if order.fit is not None else "too few stable steps"
            weak = f"{order.weak[0]:.2f} ± {order.weak[1]:.2f}" if order.weak else "bias below 4 s.e."
            remark = f"unstable at {', '.join(map(str, order.unstable))} steps" if order.unstable else ""
            if order.fit is not None and order.fit < order.theory - 0.15:
                remark = (remark + "; " if remark else "") + "BELOW THEORY"
            finest = f"{order.errors[-1]:.1e}"
            rows.append([name if i == 0 else "", order.solver, f"{order.theory:g}", fit, finest, weak, remark])
    heads = ["problem", "solver", "theory", "strong order", f"error at {grid[-1]}", "weak order", "remarks"]
    output.table(rows, heads)
    click.echo()
    output.sentence(
        f"Slopes of the error against the step over {', '.join(map(str, grid))} steps, ± one standard error over 16 "
        "groups of paths. A strong order above theory is no error: linear problems with additive noise give SRK 2."
    )
