"""Options that several verbs share, the run that they open, and checks before any work begins."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from neuralsde_ito.distributed import world
from neuralsde_ito.names import (
    ARCHITECTURES,
    DATA_SETS,
    NOISES,
    NORMS,
    OBJECTIVES,
    PEERS,
    PRECISIONS,
    PRESETS,
    RULES,
    SURROGATES,
)
from neuralsde_ito.sde.schedules import SCHEDULES
from neuralsde_ito.sde.solvers import SOLVERS
from neuralsde_ito.validation import ItoError, one_of, parse_eps, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from neuralsde_ito.attacks.precision import PrecisionTrial
    from neuralsde_ito.data import Dataset
    from neuralsde_ito.models.ensemble import ItoEnsemble
    from neuralsde_ito.models.voting import Voter
    from neuralsde_ito.runs.config import Config
    from neuralsde_ito.runs.run import Run

Command = Callable[..., Any]

# The types of options that take one of the library's names.
one_norm = click.Choice(NORMS)
one_preset = click.Choice(PRESETS)
one_objective = click.Choice(OBJECTIVES)
one_surrogate = click.Choice(SURROGATES)
one_noise = click.Choice(NOISES)
one_peer = click.Choice(PEERS)
one_rule = click.Choice(RULES)
one_schedule = click.Choice(tuple(SCHEDULES))
one_solver = click.Choice(tuple(SOLVERS))
one_architecture = click.Choice(ARCHITECTURES)


def stacked(*options: Command) -> Command:
    """Several options as one decorator, in the order in which help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def gathered(name: str, kind: type, *options: Command) -> Command:
    """Several options as one decorator; the command gets their values as one dataclass.

    Args:
        name: the command's parameter that gets the dataclass.
        kind: the dataclass; its fields are the parameters of the options, those without a default at least.
        options: as for `stacked`.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(*arguments: Any, **values: Any) -> Any:
            gathered = {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}
            return command(*arguments, **{name: kind(**gathered)}, **values)

        return stacked(*options)(call)

    return decorate


def without_effect(names: Collection[str], when: str, mend: str = "leave it out") -> None:
    """Refuse options that would be ignored, if the user typed them.

    Args:
        names: the command's parameters that have no effect.
        when: the beginning of the message, such as ``With --full``.
        mend: the end of the message.

    Raises:
        click.UsageError: at least one of them is on the command line.
    """
    context = click.get_current_context()
    typed = [
        "/".join((parameter.opts[-1], *parameter.secondary_opts))
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if typed:
        raise click.UsageError(f"{when}, {' and '.join(typed)} would do nothing: {mend}.", context)


def data_keys(data: str) -> dict[str, Any]:
    """The keys of the configuration for the value of ``--data``: the name of a data set, or a folder.

    Raises:
        ItoError: there is neither.
    """
    is_path = os.path.exists(data) or "/" in data or os.sep in data
    if is_path and data not in DATA_SETS:
        return {"data.name": "imagefolder", "data.path": str(Path(data).resolve())}
    return {"data.name": one_of("data set", data, DATA_SETS)}


def check_file(path: Path) -> Path:
    """Refuse a file that cannot be written, before the work begins whose result it will hold.

    The file and its missing folders are made and removed again, because only the file system knows what it allows.

    Raises:
        ItoError: the path is a folder, is no regular file, or cannot be made.
    """
    if not world().first:  # process 0 writes; of several, one would remove the folder that another one tries
        return path
    made: list[Path] = []
    try:
        if path.is_dir():
            raise ItoError(f"The file {shown(str(path))} cannot be written: it is a folder.")
        if path.exists():
            if not path.is_file():  # opening a pipe would wait for its reader, and a device must not be replaced
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
            with contextlib.suppress(OSError):  # another process may have written into it meanwhile
                folder.rmdir()
    return path


def check_folder(path: Path, new: bool = False) -> Path:
    """Refuse a folder into which nothing can be written, as `check_file` does for a file.

    Args:
        path: the folder, which need not exist.
        new: also refuse a folder that is not empty.

    Raises:
        ItoError: the path is a file, or nothing can be written into it.
    """
    if not world().first:
        return path
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
    """Refuse a picture in a format that matplotlib does not write by itself (PGF needs LaTeX)."""
    if path is None or context.resilient_parsing:
        return path
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"})
    if path.suffix.removeprefix(".").lower() not in known:
        raise ItoError(f"A picture's format is its file's ending, one of {', '.join(known)}; got {shown(str(path))}.")
    return check_file(path)


def _folder(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    return path if path is None or context.resilient_parsing else check_folder(path)


# Keyword arguments of an option that names an output file or folder: its type, and the check that it can be written.
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
norm = click.option("--norm", type=one_norm, default="linf", show_default=True, help="Norm of the perturbation.")
precision = click.option(
    "--precision",
    type=click.Choice(("auto", *PRECISIONS)),
    default=PRECISIONS[0],
    show_default=True,
    help="Of gradients. auto: whichever a short trial finds quicker; decisions are float32 either way.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
seed = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="Seed of the noise.  [default: the run's]", metavar="N"
)
few_images = click.option(
    "--limit", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Test images."
)
limit = click.option("--limit", type=click.IntRange(1), metavar="N", help="Use N test images, a fixed choice.")
batch_size = click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=250,
    show_default=True,
    help="Images at a time; the result does not depend on it.",
)
votes = stacked(
    click.option("--inferences", type=click.IntRange(1), help="Inferences of each member.  [default: the run's]"),
    click.option("--rule", type=one_rule, help="How votes become a label.  [default: the run's]"),
)
early = stacked(
    click.option("--full", is_flag=True, help="Make all inferences, even if they can no longer change a label."),
    click.option(
        "--confidence",
        type=click.FloatRange(0.5, 1, min_open=True, max_open=True),
        metavar="P",
        help="End a vote when its label is that of the full vote with probability P, such as 0.999.",
    ),
)
on_run = stacked(
    click.option("--run", "run", help="Name or path of a run.  [default: the newest finished one]"),
    runs_root,
    device,
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that say which run is meant, where it runs and how it votes; None for the default."""

    run: str | None
    root: Path
    device: str
    inferences: int | None = None
    rule: str | None = None

    def open(self) -> Opened:
        """Read the run; see `open_run`."""
        return open_run(self.root, self.run, self.device, self.inferences, self.rule)


voting_run = gathered("chosen", RunOptions, on_run, votes)


@dataclass(frozen=True, kw_only=True)
class DefenderOptions(RunOptions):
    """As `RunOptions`; or a network of the user's own, and the images that it is for."""

    model: str | None
    data: str | None

    def check(self) -> None:
        """Refuse what can be refused without torch.

        Raises:
            ItoError: there is no such run, or a network without data.
            click.UsageError: options of a run with a network, or of a network with a run.
        """
        if self.model is None:
            without_effect({"data"}, "Without --model", "leave it out, a run has data of its own")
            find_run(self.root, self.run)
            return
        without_effect({"run"}, "With --model")
        if self.data is None:
            raise ItoError("--model needs --data: digits, cifar10, cifar100, or a folder with test/CLASS/*.")
        data_keys(self.data)

    def defender(self) -> Defender:
        """Open the run, or make the user's network.

        Raises:
            ItoError: there is none, or its data are missing.
            click.UsageError: see `check`.
        """
        self.check()
        return self.open() if self.model is None else open_model(self)


a_model = stacked(
    click.option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Instead of a run: a function of yours that returns an nn.Module from [0, 1] images to logits.",
    ),
    click.option("--data", metavar="NAME|DIR", help="With --model: digits, cifar10, cifar100, or a folder of images."),
)
defender = gathered("chosen", DefenderOptions, on_run, a_model, votes)
sampled_defender = gathered("chosen", DefenderOptions, on_run, a_model)  # for verbs that do not vote


@dataclass(frozen=True)
class Defender:
    """A model under attack or evaluation: the ensemble of a run, or a network of the user's.

    Attributes:
        run: the run. For a network, a folder for its results, and a configuration that says only which data it has.
        device: where the model is.
        ensemble: the model.
        resnet: the ResNet from which an ensemble's members began.
        model: how the user has named the network; None for a run.
    """

    run: Run
    device: torch.device
    ensemble: Voter
    resnet: nn.Sequential | None
    model: str | None = None

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.run.config

    @property
    def folder(self) -> Path:
        """Where results are written."""
        return self.run.folder

    @property
    def about(self) -> dict[str, Any]:
        """What ``--json`` says of the model: ``run``; or ``model``, and how its noise is drawn."""
        if self.model is None:
            return {"run": str(self.folder)}
        remarks = list(getattr(self.ensemble, "remarks", ()))
        return {"model": self.model, "noisy": self.ensemble.noisy, "remarks": remarks}

    @property
    def about_config(self) -> dict[str, Any]:
        """What ``--json`` says of the configuration: that of a run."""
        return {} if self.model else {"config": self.config.model_dump(mode="json")}

    @property
    def vote(self) -> dict[str, Any]:
        """What ``--json`` says of the vote."""
        ensemble = self.ensemble
        return {"members": len(ensemble.members), "inferences": ensemble.inferences, "rule": ensemble.rule}

    def radii(self, norm: str, typed: tuple[str, ...], also: bool = True) -> dict[float, str]:
        """The radii, rising, and how they are written; by default the run's, and its ``also`` with them if ``also``.

        Raises:
            ItoError: none was typed, and there is no run that has one.
        """
        defaults = self.config.attack
        own = () if self.model else tuple(defaults.eps.get(cast("Any", norm), ()))
        more = tuple(defaults.also.get(cast("Any", norm), ())) if also and not self.model else ()
        if not (written := (*(typed or own), *more)):
            whose = "A network of yours names no radius" if self.model else "The run's configuration has no radius"
            raise ItoError(f"{whose} for {norm}: give --eps.")
        labels = {parse_eps(text): text for text in reversed(written)}
        return dict(sorted(labels.items()))

    def in_precision(self, asked: str, images: Dataset) -> PrecisionTrial:
        """The precision of gradients: the one that was asked for, or for ``auto`` what a trial on test images says."""
        from neuralsde_ito.attacks.precision import PrecisionTrial, try_precisions

        if asked != "auto":
            return PrecisionTrial(asked, "")
        _, x, y = next(images.test.batches(32, self.device))
        # Processes that share the work need one answer.
        first: PrecisionTrial = world().gather(try_precisions(self.ensemble, x, y))[0]
        return first


@dataclass(frozen=True)
class Opened(Defender):
    """A finished run with its networks on a device.

    Attributes:
        ensemble: with the number of inferences and the rule that the flags ask for.
    """

    ensemble: ItoEnsemble
    resnet: nn.Sequential


def open_model(chosen: DefenderOptions) -> Defender:
    """The user's network, on the data that the user names."""
    from neuralsde_ito.runs.build import load_dataset, pick_device
    from neuralsde_ito.runs.config import load_config
    from neuralsde_ito.runs.run import Run

    from .modules import load_module, voter_of

    assert chosen.model is not None
    assert chosen.data is not None
    device = pick_device(chosen.device)
    network = load_module(chosen.model)
    config = load_config(None, overrides=data_keys(chosen.data))
    images = load_dataset(config, train_limit=1)
    voter = voter_of(network, chosen.model, images, device, chosen.inferences, chosen.rule)
    folder = chosen.root / chosen.model.replace(":", ".")
    return Defender(Run(folder, config), device, voter, None, chosen.model)


def find_run(root: Path, name: str | None) -> Run:
    """A finished run by its name or path, by default the newest one; its networks are not read, nor torch imported."""
    from neuralsde_ito.runs.run import Run

    run = Run.find(root, name)
    run.check_finished()
    return run


def open_run(
    root: Path, name: str | None, device: str, inferences: int | None = None, rule: str | None = None
) -> Opened:
    """Read a finished run, by default the newest one, which is then named on stderr."""
    run = find_run(root, name)

    from neuralsde_ito.models.ensemble import ItoEnsemble  # it imports torch
    from neuralsde_ito.runs.build import pick_device

    torch_device = pick_device(device)
    if name is None:
        click.echo(f"Run {run.folder} (the newest finished one; --run names another).", err=True)
    ensemble = run.ensemble(torch_device)
    if inferences or rule:
        ensemble = ItoEnsemble(
            ensemble.members,
            inferences or ensemble.inferences,
            rule or ensemble.rule,
            ensemble.paths_per_call,
        ).eval()
    return Opened(run, torch_device, ensemble, run.resnet(torch_device))
