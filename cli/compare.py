"""``ito-sde compare``: which solver, at how many steps, on a run's network."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.models.recast import ItoResNet
    from neuralsde_ito.studies.compare import SolverComparison, SolverRow


@click.command("compare")
@options.on_run
@click.option(
    "--solver",
    "solvers",
    multiple=True,
    type=options.one_solver,
    metavar="NAME",
    help="Only this solver.  [repeatable; default: all that fit]",
)
@click.option("--steps", "steps", multiple=True, type=int, help="Steps a block.  [repeatable; default: 1 2 4 8]")
@options.few_images
@click.option("--gradients/--no-gradients", default=True, show_default=True, help="Compare input gradients, too.")
@click.option("--save", **options.out_picture, metavar="PNG|SVG", help="Draw error against evaluations.")
@click.option("--csv", "table_file", **options.out_file, metavar="FILE", help="Write the rows, too.")
@options.seed
@options.as_json
def command(
    run: str | None,
    root: Path,
    device: str,
    solvers: tuple[str, ...],
    steps: tuple[int, ...],
    limit: int,
    gradients: bool,
    save: Path | None,
    table_file: Path | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Compare SDE solvers with a fine reference, all on the same Brownian paths.

    'ito-sde orders' measures solvers on problems with known solutions, 'ito-sde depth' the accuracy on finer grids.
    """
    opened = options.open_run(root, run, device)

    from neuralsde_ito.runs.build import load_dataset
    from neuralsde_ito.studies.compare import compare_solvers

    data = load_dataset(opened.config, train_limit=1, test_limit=limit)
    index, x, y = next(iter(data.test.batches(limit, opened.device)))
    seed = opened.config.seed if seed is None else seed
    member: ItoResNet = opened.ensemble.members[0]
    chosen = tuple(dict.fromkeys(solvers)) or None
    grid = tuple(sorted(set(steps))) or (1, 2, 4, 8)
    report = compare_solvers(member, x, y, chosen, grid, seed, index, gradients=gradients)
    if save:
        from .pictures import compare_picture

        compare_picture(report, save)
    if table_file:
        _write_csv(report.rows, table_file)
    if as_json:
        head = {"command": "compare", "run": str(opened.folder), "data": data.name, "images": len(y), "seed": seed}
        output.print_json({**head, **asdict(report), "remarks": report.remarks()})
        return
    output.describe(opened.config, opened.folder, 1, 1, opened.ensemble.rule)
    _print_table(report, f"{output.count(len(y), 'test image')} of {data.name}", gradients)
    if save:
        click.echo(f"\nPicture  {save}")


def _write_csv(rows: list[SolverRow], path: Path) -> None:
    from neuralsde_ito.files import write_atomically
    from neuralsde_ito.studies.compare import SolverRow

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(SolverRow)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue().encode())


def _print_table(report: SolverComparison, images: str, gradients: bool) -> None:
    """The table of errors and costs, and what its columns mean; ``images`` says which and how many."""
    solver, fine = report.reference
    click.echo(f"\n{images}; against {solver} at {output.count(fine, 'step')} a block, on the same paths\n")
    rows = []
    previous = None
    for row in report.rows:
        order = report.orders[row.solver]
        fit = "" if order.fit is None else f"{order.fit:.2f}"
        fit += "" if order.standard_error is None else f" ± {order.standard_error:.2f}"
        first = row.solver != previous
        previous = row.solver
        slope = [fit, f"{order.theory:g}"] if first else ["", ""]
        rows.append([row.solver if first else "", row.steps, row.evaluations, *_cells(row), *slope])
    heads = ["solver", "steps", "evals", "state", "logits", "prob.", "same %", "right %", "cos", "cost", "MiB", "slope"]
    output.table(rows, [*heads, "theory"])
    click.echo()
    output.sentence(
        "Evals: of the blocks' drifts. State, logits: strong errors, relative. Prob.: weak error, the largest of a "
        "class's mean probability. Same: labels as the reference's. Cos: of the input's gradient to the reference's. "
        "Cost: time of an inference, in forward passes of the network. MiB: most that tensors held at a time"
        f"{', in the gradient (checkpointed above 1 step)' if gradients else ''}. Slope: of the state's error against "
        "the step, ± one standard error over groups of images, beside the solver's strong order."
    )
    for remark in report.remarks():
        output.sentence(remark)


def _cells(row: SolverRow) -> list[str]:
    """Errors and costs of one row, as text."""
    if row.diverged:
        return [f"not finite after {row.diverged}", *[""] * 7]
    return [
        f"{row.state_error:.1e}",
        f"{row.logit_error:.1e}",
        f"{row.mean_error:.1e}",
        f"{100 * (row.agreement or 0):.0f}",
        f"{100 * (row.accuracy or 0):.0f}",
        f"{row.gradient_cosine:.3f}" if row.gradient_cosine is not None else "",
        f"{row.cost:.1f}",
        f"{row.memory / 2**20:.3g}",
    ]
