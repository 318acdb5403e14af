"""Options that several verbs share, and what they open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from torch import nn

    from neuralsde_ito.config import Config
    from neuralsde_ito.ensemble import ItoEnsemble

Command = Callable[..., Any]


def stacked(*options: Command) -> Command:
    """Several options as one decorator, in the order in which help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


runs_root = click.option(
    "--runs",
    "root",
    type=click.Path(path_type=Path),
    default="runs",
    show_default=True,
    help="Folder of all runs.",
)
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
seed = click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of the noise. Default: the run's.", metavar="N")
limit = click.option("--limit", type=click.IntRange(1), metavar="N", help="Use N test images, a fixed choice.")
batch_size = click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=250,
    show_default=True,
    help="Images at a time; not in the result.",
)
votes = stacked(
    click.option("--inferences", type=click.IntRange(1), help="Inferences of each member.  [default: the run's]"),
    click.option("--rule", help="hierarchical or flat: how votes become a label.  [default: the run's]"),
)
early = stacked(
    click.option("--full", is_flag=True, help="Make all inferences, also those that can no longer change a label."),
    click.option(
        "--confidence",
        type=click.FloatRange(0.5, 1, min_open=True, max_open=True),
        metavar="P",
        help="Stop a vote as soon as its label is that of the full vote with probability P, as 0.999.",
    ),
)
on_run = stacked(
    click.option("--run", "run", help="Name or path of a run.  [default: the newest finished one]"),
    runs_root,
    device,
)


@dataclass
class Opened:
    """A finished run, read back."""

    folder: Path
    config: Config
    ensemble: ItoEnsemble
    resnet: nn.Sequential
    device: torch.device


def open_run(
    root: Path, run: str | None, device: str, inferences: int | None = None, rule: str | None = None
) -> Opened:
    """Read a run; says on stderr which, where none was named."""
    from neuralsde_ito.checkpoints import load_base, load_ensemble
    from neuralsde_ito.ensemble import ItoEnsemble
    from neuralsde_ito.recipes import find_run, pick_device

    folder, place = find_run(root, run), pick_device(device)
    if run is None:
        click.echo(f"Run {folder} (the newest finished one; --run names another).", err=True)
    ensemble, config = load_ensemble(folder, place)
    if inferences or rule:
        ensemble = ItoEnsemble(
            ensemble.members,  # type: ignore[arg-type]
            inferences or ensemble.inferences,
            rule or ensemble.rule,
            ensemble.paths_per_call,
        ).eval()
    return Opened(folder, config, ensemble, load_base(folder, config, place), place)
