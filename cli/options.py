"""Options that several verbs share, what they open, and what is refused before any work begins."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from neuralsde_ito.validation import ItoError, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from neuralsde_ito.models.ensemble import ItoEnsemble
    from neuralsde_ito.runs.config import Config
    from neuralsde_ito.runs.run import Run

Command = Callable[..., Any]

# The names in `neuralsde_ito.attacks.objective.OBJECTIVES`, for help that does not wait for torch.
OBJECTIVES = ("mean-loss", "loss-of-mean", "mean-logits", "margin", "dlr", "denial", "targeted-dlr", "targeted-vote")


def stacked(*options: Command) -> Command:
    """Several options as one decorator, in the order in which help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def without_effect(names: Collection[str], when: str, mend: str = "leave it out") -> None:
    """Refuse options that were typed although they would do nothing.

    Args:
        names: of the command's parameters.
        when: the beginning of the sentence, such as ``With --depth``.
        mend: its end.

    Raises:
        click.UsageError: at least one of them stands on the command line.
    """
    context = click.get_current_context()
    typed = [
        "/".join((parameter.opts[-1], *parameter.secondary_opts))
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if typed:
        raise click.UsageError(f"{when}, {' and '.join(typed)} would do nothing: {mend}.", context)


def check_file(path: Path) -> Path:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    The file and its missing folders are made and removed again: only the file system itself knows what it allows.

    Raises:
        ItoError: the path is a folder, no regular file, or cannot be made.
    """
    made: list[Path] = []
    try:
        if path.is_dir():
            raise ItoError(f"The file {shown(str(path))} cannot be written: it is a folder.")
        if path.exists():
            if not path.is_file():  # to open a pipe would wait, and a device must not be replaced
                raise ItoError(f"The file {shown(str(path))} cannot be written: it is no regular file.")
            path.open("ab").close()
            return path
        for folder in reversed([parent for parent in path.parents if not parent.exists()]):
            folder.mkdir()
            made.append(folder)
        path.open("xb").close()
        path.unlink()
    except (OSError, ValueError) as error:
        if isinstance(error, ItoError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ItoError(f"The file {shown(str(path))} cannot be written: {reason.lower()}.") from None
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # somebody else may have put something there
                folder.rmdir()
    return path


def check_folder(path: Path, new: bool = False) -> Path:
    """Refuse a folder into which nothing can be written, as `check_file` does.

    Args:
        path: the folder, which need not exist.
        new: also refuse one that holds something.

    Raises:
        ItoError: the path is a file, or cannot be written into.
    """
    try:
        if new and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ItoError(f"The folder {shown(str(path))} is not empty: name another.")
        if path.is_dir():
            tempfile.NamedTemporaryFile(dir=path).close()
            return path
    except OSError as error:
        raise ItoError(
            f"The folder {shown(str(path))} cannot be written into: {str(error.strerror).lower()}."
        ) from None
    check_file(path / "x")
    return path


def _file(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    return path if path is None or context.resilient_parsing else check_file(path)


def _picture(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """A file in a format that matplotlib writes by itself (PGF would take LaTeX)."""
    if path is None or context.resilient_parsing:
        return path
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"})
    if path.suffix.removeprefix(".").lower() not in known:
        raise ItoError(f"A picture's format is its file's ending, one of {', '.join(known)}; got {shown(str(path))}.")
    return check_file(path)


def _folder(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    return path if path is None or context.resilient_parsing else check_folder(path)


# The type of an option that names a place to write to, with the check that it can be written.
out_file: dict[str, Any] = {"type": click.Path(path_type=Path), "callback": _file}
out_picture: dict[str, Any] = {"type": click.Path(path_type=Path), "callback": _picture}
out_folder: dict[str, Any] = {"type": click.Path(path_type=Path), "callback": _folder}

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


@dataclass(frozen=True)
class Opened:
    """A finished run with its networks on a device.

    Attributes:
        run: the run.
        device: where the networks are.
        ensemble: with the number of inferences and the rule that the flags ask for.
        resnet: the ResNet from which the members began.
    """

    run: Run
    device: torch.device
    ensemble: ItoEnsemble
    resnet: nn.Sequential

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.run.config

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder


def open_run(
    root: Path, run: str | None, device: str, inferences: int | None = None, rule: str | None = None
) -> Opened:
    """Read a finished run, by default the newest one, which is then named on stderr."""
    from neuralsde_ito.models.ensemble import ItoEnsemble
    from neuralsde_ito.runs.build import pick_device
    from neuralsde_ito.runs.run import Run

    found, on = Run.find(root, run), pick_device(device)
    if run is None:
        click.echo(f"Run {found.folder} (the newest finished one; --run names another).", err=True)
    ensemble = found.ensemble(on)
    if inferences or rule:
        ensemble = ItoEnsemble(
            ensemble.members,
            inferences or ensemble.inferences,
            rule or ensemble.rule,
            ensemble.paths_per_call,
        ).eval()
    return Opened(found, on, ensemble, found.resnet(on))
