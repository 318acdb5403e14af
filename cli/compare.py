"""``ito-sde compare``: which solver, at how many steps, on a run's network or on problems with known solutions."""

from __future__ import annotations

import csv
import importlib.util
import io
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options, output

if TYPE_CHECKING:
    from torch import Tensor

    from neuralsde_ito.models.recast import ItoResNet


@click.command("compare")
@options.on_run
@click.option(
    "--problem",
    "problems",
    multiple=True,
    help="Measure orders on a closed-form problem instead: ornstein-uhlenbeck, geometric-brownian, double-well or "
    "all.  [repeatable]",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(["torchsde", "diffrax"]),
    default=("torchsde",),
    show_default=True,
    help="With --problem: the same orders by another library on its own paths.  [repeatable]",
)
@click.option("--depth", is_flag=True, help="Accuracy against steps a block instead: an SDE, or a ResNet in disguise?")
@click.option("--versus", multiple=True, metavar="RUN", help="With --depth: another run beside.  [repeatable]")
@click.option("--schedule", "schedules", multiple=True, help="With --depth: read under this noise, too.  [repeatable]")
@click.option("--horizon", "horizons", multiple=True, type=float, help="With --depth: end of time.  [repeatable]")
@click.option("--solver", "solvers", multiple=True, help="Only this solver.  [repeatable; default: all that fit]")
@click.option("--steps", "steps", multiple=True, type=int, help="Steps a block.  [repeatable; default: 1 2 4 8]")
@click.option("--limit", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Test images.")
@click.option("--gradients/--no-gradients", default=True, show_default=True, help="Compare input gradients, too.")
@click.option("--save", **options.out_picture, metavar="PNG|SVG", help="Draw error against evaluations.")
@click.option("--csv", "table_file", **options.out_file, metavar="FILE", help="Write the rows, too.")
@options.seed
@options.as_json
def command(
    run: str | None,
    root: Path,
    device: str,
    problems: tuple[str, ...],
    peers: tuple[str, ...],
    depth: bool,
    versus: tuple[str, ...],
    schedules: tuple[str, ...],
    horizons: tuple[float, ...],
    solvers: tuple[str, ...],
    steps: tuple[int, ...],
    limit: int,
    gradients: bool,
    save: Path | None,
    table_file: Path | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Hold SDE solvers against a fine reference, all on the same Brownian paths."""
    solvers, schedules, horizons = (tuple(dict.fromkeys(typed)) for typed in (solvers, schedules, horizons))  # type: ignore[assignment]
    of_a_run = {"run", "root", "device", "limit", "save", "seed"}
    of_a_table = {"gradients", "table_file"}
    of_depth = {"versus", "schedules", "horizons"}
    if problems:
        options.without_effect({*of_a_run, *of_a_table, *of_depth, "depth"}, "With --problem")
    elif depth:
        options.without_effect({*of_a_table, "peers"}, "With --depth")
    else:
        options.without_effect(of_depth, "Without --depth", "add --depth, or leave it out")
        options.without_effect({"peers"}, "Without --problem", "add --problem, or leave it out")
    if problems:
        _orders(problems, solvers, steps, peers, as_json)
        return
    from neuralsde_ito.files import write_atomically
    from neuralsde_ito.runs.run import load_dataset
    from neuralsde_ito.studies.compare import SolverRow, compare_solvers
    from neuralsde_ito.validation import ItoError, shown

    opened = options.open_run(root, run, device)
    data = load_dataset(opened.config, train_limit=1, test_limit=limit)
    index, x, y = next(iter(data.test.batches(limit, opened.device)))
    seed = opened.config.seed if seed is None else seed
    member: ItoResNet = opened.ensemble.members[0]
    if depth:
        networks, folders = {opened.folder.name: member}, [opened.folder.resolve()]
        for name in versus:
            other = options.open_run(root, name, device)
            if other.folder.resolve() in folders:
                raise ItoError(f"--versus {shown(name)} would be read twice: name each run once.")
            folders.append(other.folder.resolve())
            unique = other.folder.name if other.folder.name not in networks else str(other.folder)
            networks[unique] = other.ensemble.members[0]
        _depths(networks, (index, x, y), data.name, solvers, steps, schedules, horizons, seed, save, as_json)
        return
    chosen = tuple(sorted(set(steps))) or (1, 2, 4, 8)
    report = compare_solvers(member, x, y, solvers or None, chosen, seed, index, gradients=gradients)
    if save:
        from .pictures import compare_picture

        compare_picture(report, save)
    if table_file:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [f.name for f in fields(SolverRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in report.rows)
        write_atomically(table_file, text.getvalue().encode())
    if as_json:
        head = {"command": "compare", "run": str(opened.folder), "data": data.name, "images": len(y), "seed": seed}
        output.print_json({**head, **asdict(report), "remarks": report.remarks()})
        return
    output.describe(opened.config, opened.folder, 1, 1, opened.ensemble.rule)
    solver, fine = report.reference
    images_of, grid = f"{output.count(len(y), 'test image')} of {data.name}", output.count(fine, "step")
    click.echo(f"\n{images_of}; against {solver} at {grid} a block, on the same paths\n")
    rows = []
    last = None
    for row in report.rows:
        order = report.orders[row.solver]
        first = row.solver != last
        last = row.solver
        fit = "" if order.fit is None else f"{order.fit:.2f}"
        fit += "" if order.standard_error is None else f" ± {order.standard_error:.2f}"
        figures = [f"not finite after {row.diverged}", *[""] * 7]
        if not row.diverged:
            figures = [
                f"{row.state_error:.1e}",
                f"{row.logit_error:.1e}",
                f"{row.mean_error:.1e}",
                f"{100 * (row.agreement or 0):.0f}",
                f"{100 * (row.accuracy or 0):.0f}",
                f"{row.gradient_cosine:.3f}" if row.gradient_cosine is not None else "",
                f"{row.cost:.1f}",
                f"{row.memory / 2**20:.3g}",
            ]
        slope = [fit, f"{order.theory:g}"] if first else ["", ""]
        rows.append([row.solver if first else "", row.steps, row.evaluations, *figures, *slope])
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
    if save:
        click.echo(f"\nPicture  {save}")


def _depths(
    networks: dict[str, ItoResNet],
    images: tuple[Tensor, Tensor, Tensor],
    data: str,
    solvers: tuple[str, ...],
    steps: tuple[int, ...],
    schedules: tuple[str, ...],
    horizons: tuple[float, ...],
    seed: int,
    save: Path | None,
    as_json: bool,
) -> None:
    """Accuracy against steps a block, a line a network, schedule, horizon and solver."""
    from neuralsde_ito.studies.depth import read_depths, verdicts

    index, x, y = images
    grid = tuple(sorted(set(steps) or {1, 2, 4, 8, 16, *(m.steps for m in networks.values())}))
    readings = read_depths(networks, x, y, grid, solvers, schedules, horizons, seed, index)
    if save:
        from .pictures import depth_picture

        depth_picture(readings, save)
    if as_json:
        rows = [asdict(reading) for reading in readings]
        output.print_json({"command": "compare --depth", "data": data, "images": len(y), "seed": seed, "rows": rows})
        return
    lines: dict[tuple[object, ...], list[str]] = {}
    for r in readings:
        cell = f"{100 * r.correct.value:3.0f} [{100 * r.correct.low:2.0f}, {100 * r.correct.high:3.0f}]"
        place = (r.network, r.schedule, f"{r.horizon:g}", r.solver)
        lines.setdefault(place, []).append(cell + "*" * r.trained)
    images_of = f"{output.count(len(y), 'test image')} of {data}"
    click.echo(f"\n{images_of}, one inference each; correct in %, with 95 % Wilson intervals\n")
    table = [[*place, *cells] for place, cells in lines.items()]
    heads = [output.count(n, "step") for n in grid]
    output.table(table, ["network", "noise", "horizon", "solver", *heads])
    click.echo("\n* as trained")
    for sentence in verdicts(readings):
        output.sentence(sentence)
    if save:
        click.echo(f"\nPicture  {save}")


def _orders(
    problems: tuple[str, ...], solvers: tuple[str, ...], steps: tuple[int, ...], peers: tuple[str, ...], as_json: bool
) -> None:
    """The table of theory, fit and standard error."""
    from neuralsde_ito.sde.solvers import SOLVERS, find_solver
    from neuralsde_ito.studies.orders import Order, measure_order
    from neuralsde_ito.studies.problems import PROBLEMS
    from neuralsde_ito.validation import ItoError, nearest

    asked = list(dict.fromkeys(PROBLEMS if "all" in problems else problems))
    peers = tuple(dict.fromkeys(peers))
    chosen = solvers or tuple(name for name, solver in SOLVERS.items() if solver.library != "torchdiffeq")
    grid = tuple(sorted(set(steps))) or (8, 16, 32, 64, 128, 256)
    for name in asked:
        if name not in PROBLEMS:
            raise ItoError(nearest("problem", name, PROBLEMS))
    for solver in chosen:
        if find_solver(solver).library == "torchdiffeq":
            raise ItoError(f"{solver!r} solves the ODE, without noise; these problems have noise.")
    if "diffrax" in peers and importlib.util.find_spec("diffrax") is None:
        raise ItoError("diffrax is not installed: pip install diffrax.")
    found: dict[str, list[Order]] = {}
    others: dict[str, dict[str, dict[str, Order]]] = {peer: {} for peer in peers}
    with output.progress(len(asked) * (len(chosen) * (1 + ("torchsde" in peers)) + 1), "orders", "solvers") as bar:
        for name in asked:
            problem = PROBLEMS[name]()
            exact = problem.exact()
            found[name] = []
            for solver in chosen:
                found[name].append(measure_order(problem, solver, grid, exact))
                bar.update()
            if "torchsde" in peers:
                path = problem.torchsde_path()
                exact = problem.exact(path)
                others["torchsde"][name] = {}
                for solver in chosen:
                    others["torchsde"][name][solver] = measure_order(problem, solver, grid, exact, path)
                    bar.update()
            if "diffrax" in peers:
                from neuralsde_ito.studies.other_libraries import diffrax_orders

                others["diffrax"][name] = diffrax_orders(name, chosen, grid)
            bar.update()
    if as_json:
        content = {name: [asdict(order) for order in orders] for name, orders in found.items()}
        beside = {
            peer: {name: [asdict(o) for o in by.values()] for name, by in content.items()}
            for peer, content in others.items()
        }
        output.print_json({"command": "compare", "problems": content, "peers": beside})
        return

    def shown(order: Order | None) -> str:
        if order is None:
            return ""
        return f"{order.fit:.2f} ± {order.standard_error:.2f}" if order.fit is not None else "too few stable steps"

    rows = []
    for name, orders in found.items():
        for i, order in enumerate(orders):
            weak = f"{order.weak[0]:.2f} ± {order.weak[1]:.2f}" if order.weak else "bias < 4 s.e."
            remarks = [f"unstable at {', '.join(map(str, order.unstable))} steps"] if order.unstable else []
            if order.fit is not None and order.fit < order.theory - 0.15:
                remarks.append("BELOW THEORY")
            theirs = [others[peer][name].get(order.solver) for peer in peers]
            remarks += [f"{p} DIFFERS" for p, o in zip(peers, theirs, strict=True) if o and not order.agrees(o)]
            figures = [f"{order.theory:g}", shown(order), *map(shown, theirs), f"{order.errors[-1]:.1e}", weak]
            rows.append([name if i == 0 else "", order.solver, *figures, "; ".join(remarks)])
    heads = ["problem", "solver", "theory", "strong order", *(f"by {p}" for p in peers), f"error at {grid[-1]}", "weak"]
    output.table(rows, [*heads, "remarks"])
    click.echo()
    output.sentence(
        f"Slopes of the error against the step over the four finest of {', '.join(map(str, grid))} steps that were "
        "stable, ± one standard error over 16 groups of paths. A strong order above theory is no error: linear "
        "problems with additive noise give SRK 2. "
        + ("By torchsde: its solver on its own Brownian interval. " if "torchsde" in peers else "")
        + ("By diffrax: its solver on its own Brownian tree. " if "diffrax" in peers else "")
        + ("DIFFERS: by more than 3 standard errors and 0.02." if peers else "")
    )
