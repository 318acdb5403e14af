"""``ito-sde depth``: accuracy against steps a block: an SDE, or a ResNet in disguise?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neuralsde_ito.sde.schedules import SCHEDULES

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.models.recast import ItoResNet
    from neuralsde_ito.studies.depth import Reading


@click.command("depth")
@options.on_run
@click.option("--versus", multiple=True, metavar="RUN", help="Also read this run.  [repeatable]")
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    type=options.one_schedule,
    metavar="NAME",
    help=f"The noise: {', '.join(SCHEDULES)}.  [repeatable; default: the run's]",
)
@click.option("--horizon", "horizons", multiple=True, type=float, help="End of time.  [repeatable; default: the run's]")
@click.option(
    "--solver",
    "solvers",
    multiple=True,
    type=options.one_solver,
    metavar="NAME",
    help="A solver, such as euler or srk.  [repeatable; default: the run's]",
)
@click.option(
    "--steps",
    "steps",
    multiple=True,
    type=int,
    help="Steps a block.  [repeatable; default: 1 2 4 8 16, and the run's]",
)
@options.few_images
@click.option("--save", **options.out_picture, metavar="PNG|SVG", help="Draw accuracy against steps.")
@options.seed
@options.as_json
def command(
    run: str | None,
    root: Path,
    device: str,
    versus: tuple[str, ...],
    schedules: tuple[str, ...],
    horizons: tuple[float, ...],
    solvers: tuple[str, ...],
    steps: tuple[int, ...],
    limit: int,
    save: Path | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Measure the accuracy of networks on finer grids: is each an SDE, or a ResNet in disguise?"""
    for other in versus:
        options.find_run(root, other)  # before torch is imported
    opened = options.open_run(root, run, device)

    from neuralsde_ito.runs.build import load_dataset
    from neuralsde_ito.studies.depth import read_depths

    data = load_dataset(opened.config, train_limit=1, test_limit=limit)
    index, x, y = next(iter(data.test.batches(limit, opened.device)))
    seed = opened.config.seed if seed is None else seed
    networks = _networks(opened, root, versus, device)
    solvers, schedules = tuple(dict.fromkeys(solvers)), tuple(dict.fromkeys(schedules))
    grid = tuple(sorted(set(steps) or {1, 2, 4, 8, 16, *(network.steps for network in networks.values())}))
    readings = read_depths(networks, x, y, grid, solvers, schedules, tuple(dict.fromkeys(horizons)), seed, index)
    if save:
        from .pictures import depth_picture

        depth_picture(readings, save)
    if as_json:
        rows = [asdict(reading) for reading in readings]
        output.print_json({"command": "depth", "data": data.name, "images": len(y), "seed": seed, "rows": rows})
        return
    _print_table(readings, f"{output.count(len(y), 'test image')} of {data.name}", grid)
    if save:
        click.echo(f"\nPicture  {save}")


def _networks(opened: options.Opened, root: Path, versus: tuple[str, ...], device: str) -> dict[str, ItoResNet]:
    """The first member of each run by the run's name, or by its path where two runs have one name.

    Raises:
        ItoError: a run is named twice.
    """
    from neuralsde_ito.validation import ItoError, shown

    networks: dict[str, ItoResNet] = {opened.folder.name: opened.ensemble.members[0]}
    folders = [opened.folder.resolve()]
    for name in versus:
        other = options.open_run(root, name, device)
        if other.folder.resolve() in folders:
            raise ItoError(f"--versus {shown(name)} would be read twice: name each run once.")
        folders.append(other.folder.resolve())
        unique = other.folder.name if other.folder.name not in networks else str(other.folder)
        networks[unique] = other.ensemble.members[0]
    return networks


def _print_table(readings: list[Reading], images: str, steps: tuple[int, ...]) -> None:
    """A line for each network, schedule, horizon and solver; a column for each number of steps."""
    from neuralsde_ito.studies.depth import verdicts

    lines: dict[tuple[str, ...], list[str]] = {}
    for r in readings:
        cell = f"{100 * r.correct.value:3.0f} [{100 * r.correct.low:2.0f}, {100 * r.correct.high:3.0f}]"
        setting = (r.network, r.schedule, f"{r.horizon:g}", r.solver)
        lines.setdefault(setting, []).append(cell + "*" * r.trained)
    click.echo(f"\n{images}, one inference each; correct in %, with 95 % Wilson intervals\n")
    rows = [[*setting, *cells] for setting, cells in lines.items()]
    output.table(rows, ["network", "noise", "horizon", "solver", *(output.count(n, "step") for n in steps)])
    click.echo("\n* as trained")
    for sentence in verdicts(readings):
        output.sentence(sentence)
