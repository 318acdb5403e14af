"""``ito-sde train``: the whole path from a ResNet to an evaluated ensemble, in one command."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralsde_ito.distributed import Lost
from neuralsde_ito.names import ADVERSARIES

from . import options, output

if TYPE_CHECKING:
    import torch

    from neuralsde_ito.data import Dataset
    from neuralsde_ito.distributed import World
    from neuralsde_ito.runs.config import Config
    from neuralsde_ito.runs.evaluate import Evaluation
    from neuralsde_ito.runs.run import Run


# Flags for keys of the configuration that one changes often; ``--set`` takes all keys.
KEYS = {
    "arch": ("network.arch",),
    "weights": ("network.weights",),
    "omega": ("sde.omega",),
    "schedule": ("sde.schedule",),
    "solver": ("sde.solver",),
    "steps": ("sde.steps",),
    "members": ("ensemble.members",),
    "inferences": ("ensemble.inferences",),
    "epochs": ("finetune.epochs",),
    "adversary": ("resnet.adversary.method", "finetune.adversary.method"),
    "norm": ("resnet.adversary.norm", "finetune.adversary.norm"),
    "eps": ("resnet.adversary.eps", "finetune.adversary.eps"),
    "limit": ("data.train_limit", "data.test_limit"),
    "seed": ("seed",),
}


@dataclass(frozen=True)
class Typed:
    """What the command line says of the configuration.

    Attributes:
        source: a preset or a YAML file.
        assignments: ``KEY=VALUE``, as typed.
        data: a data set's name or a folder.
        arch, ..., seed: the flags of `KEYS`; None where not typed.
    """

    source: str | None
    assignments: tuple[str, ...]
    data: str | None
    arch: str | None
    weights: str | None
    omega: float | None
    schedule: str | None
    solver: str | None
    steps: int | None
    members: int | None
    inferences: int | None
    epochs: int | None
    adversary: str | None
    norm: str | None
    eps: str | None
    limit: int | None
    seed: int | None

    def config(self, base: Config | None) -> Config:
        """The configuration, resolved; ``base`` is that of a run to resume."""
        from neuralsde_ito.runs.config import load_config

        config = load_config(self.source, os.environ, self.assignments, self._overrides(), base)
        methods = {config.finetune.adversary.method, config.resnet.adversary.method}
        idle = next((f"--{flag}" for flag in ("norm", "eps") if getattr(self, flag) is not None), None)
        if idle and methods == {"none"}:
            raise click.UsageError(f"Without an adversary {idle} would do nothing: give --adversary, too.")
        keys = [assignment.partition("=")[0].strip() for assignment in self.assignments]
        idle = next((key for key in keys if key.startswith("resnet.")), None)
        if config.network.weights is not None and idle:
            raise click.UsageError(f"With weights no ResNet is trained, --set {idle} would do nothing: leave it out.")
        return config

    def _overrides(self) -> dict[str, Any]:
        """The flags as dotted keys."""
        overrides = {key: getattr(self, flag) for flag, keys in KEYS.items() for key in keys}
        if self.data is None:
            return overrides
        return overrides | options.data_keys(self.data)


@click.command("train")
@options.gathered(
    "typed",
    Typed,
    click.option("--config", "source", metavar="NAME|PATH", help="A preset or a YAML file.  [default: digits]"),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any key of the configuration, such as sde.omega=0.4; repeatable.",
    ),
    click.option(
        "--data",
        metavar="NAME|FOLDER",
        help="digits, cifar10, cifar100, or a folder with train/CLASS and test/CLASS.",
    ),
    click.option(
        "--arch", type=options.one_architecture, metavar="NAME", help=f"The ResNet: {', '.join(options.ARCHITECTURES)}."
    ),
    click.option("--weights", metavar="FILE|NAME", help="A trained ResNet: a file, or torchvision weights by name."),
    click.option("--omega", type=float, help="Strength of the noise."),
    click.option("--schedule", type=options.one_schedule, help="How the noise depends on time and state."),
    click.option(
        "--solver",
        type=options.one_solver,
        metavar="NAME",
        help=f"Solver of the SDE: {', '.join(options.SOLVERS)}; ode:... only at omega 0.",
    ),
    click.option("--steps", type=int, help="Solver steps a block, a power of two."),
    click.option("--members", type=int, help="Members of the ensemble."),
    click.option("--inferences", type=int, help="Inferences of each member."),
    click.option("--epochs", type=int, help="Epochs of each member's fine-tuning."),
    click.option(
        "--adversary",
        type=click.Choice(ADVERSARIES),
        help="Adversarial training, of the ResNet and of the members.",
    ),
    click.option("--norm", type=click.Choice(("linf", "l2")), help="Norm of the adversary."),
    click.option("--eps", metavar="EPS", help="Radius of the adversary in pixel units, 8/255 or 0.03."),
    click.option(
        "--limit", type=click.IntRange(1), metavar="N", help="Use N training and N test images, a fixed choice."
    ),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), metavar="N", help="Seed of everything random."),
)
@click.option("--run", "name", metavar="NAME|PATH", help="Name of the run.  [default: configuration, date and time]")
@options.runs_root
@click.option("--resume", is_flag=True, help="Go on with a run (the newest unfinished one unless --run is given).")
@click.option("--overwrite", is_flag=True, help="Begin anew in a run's folder that is not empty.")
@options.device
@options.as_json
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")
def command(
    typed: Typed,
    name: str | None,
    root: Path,
    resume: bool,
    overwrite: bool,
    device: str,
    as_json: bool,
    print_config: bool,
) -> None:
    """Train a ResNet (or take yours), recast it, fine-tune the members, and evaluate the ensemble.

    Without options it trains on scikit-learn's digits: real images, no download.

    \b
    ito-sde train --config cifar10-resnet20 --weights resnet20.th --data images/ --epochs 2
    ito-sde train --config digits-robust
    ito-sde train --adversary pgd --eps 0.1
    ito-sde train --resume
    """
    if resume and overwrite:
        raise click.UsageError("--resume goes on, --overwrite begins anew: give one of them.")
    if print_config:
        idle = {"overwrite", "device", "as_json"} | (set() if resume else {"name", "root"})
        options.without_effect(idle, "With --print-config")

    from neuralsde_ito.distributed import world
    from neuralsde_ito.runs.run import Run, new_run_name

    among = world()
    run = Run.find(root, name, complete=False) if resume else None
    config = typed.config(run.config if run else None)
    if print_config:
        click.echo(config.to_yaml(), nl=False)
        return
    if among.first and run is None and not overwrite:
        Run.check_new(_folder(root, name or new_run_name(root, config)))  # before torch is imported

    from neuralsde_ito.runs.build import load_dataset, pick_device

    torch_device = pick_device(device)
    if not among.first:  # process 0 names the run, and makes its folder
        run = Run.open(among.gather("")[0])
        images = load_dataset(run.config)
    else:
        if run is None:
            folder = _folder(root, name or new_run_name(root, config))
            run, images = _created(folder, config, overwrite)
        else:
            if name is None:
                click.echo(f"Run {run.folder} (the newest unfinished one; --run names another).", err=True)
            images = load_dataset(config)
            run.check_config(config)
        options.check_folder(run.folder)
        among.gather(str(run.folder))

    begun = time.monotonic()
    _train(run, images, torch_device, among)
    result = _evaluate(run, images, torch_device, among)
    if not among.first:
        return
    report = {
        "command": "train",
        "run": str(run.folder),
        "seconds": round(time.monotonic() - begun, 1),
        "seed": run.config.seed,
        "device": str(torch_device),
        "config": run.config.model_dump(mode="json"),
        **output.evaluation_json(result),
    }
    picture = _save(run, result, report, images)
    if as_json:
        output.print_json(report)
        return
    voting = run.config.ensemble
    output.describe(run.config, run.folder, voting.members, voting.inferences, voting.rule)
    output.evaluation_table(result, images.name)
    click.echo(f"\nPicture   {picture}")
    click.echo("Next      ito-sde attack --norm linf --eps 8/255")


def _folder(root: Path, name: str) -> Path:
    """The folder of a run that is named, or given by its path."""
    return Path(name) if Path(name).parent != Path() else root / name


def _created(folder: Path, config: Config, overwrite: bool) -> tuple[Run, Dataset]:
    """A new run and its data. Data or weights that do not fit are refused before anything is written."""
    from neuralsde_ito.runs.build import build_resnet, load_dataset, with_image_size
    from neuralsde_ito.runs.run import Run

    images = load_dataset(config)
    config = with_image_size(config, images)
    build_resnet(config, images)
    for fit in (config.resnet, config.finetune):
        if fit.held_out:
            images.train.without(fit.held_out)
    if not os.path.isdir(folder):
        options.check_folder(folder)
    return Run.create(folder, config, overwrite), images


def _train(run: Run, images: Dataset, device: torch.device, among: World) -> None:
    """Train what the run does not have yet; an interrupt ends the program with the command that goes on.

    Of several processes, the first one trains the ResNet, and then each trains members of its own.
    """
    from neuralsde_ito.runs.training import Callbacks, Diverged, Interrupted

    show = _Progress()
    callbacks: Callbacks = {
        "on_phase": show.phase,
        "on_step": show.step,
        "on_epoch": show.epoch,
        "should_stop": show.should_stop,
    }
    try:
        if among.first:
            run.train_resnet(images, device, **callbacks)
        among.barrier()
        for member in among.own(range(run.config.ensemble.members)):
            run.train_member(member, images, device, **callbacks)
        among.barrier()
        if among.first:
            run.merge_metrics()
    except (Interrupted, Lost) as error:
        if isinstance(error, Lost) and not show.should_stop():
            raise
        show.close()
        click.echo(f"Interrupted; everything is saved. To go on: ito-sde train --run {run.folder} --resume", err=True)
        raise click.exceptions.Exit(130) from None
    except Diverged as error:
        raise click.ClickException(str(error)) from None  # exit code 1: foreseen, but no wrong usage
    finally:
        show.close()


def _evaluate(run: Run, images: Dataset, device: torch.device, among: World) -> Evaluation:
    """The clean table of a run that is trained."""
    from neuralsde_ito.runs.evaluate import evaluate

    with output.progress(len(among.share(images.test)), "vote", "images") as bar:
        networks = (run.ensemble(device), run.resnet(device))
        return evaluate(*networks, images.test, run.config.seed, tick=bar.update, among=among)


def _save(run: Run, result: Evaluation, report: dict[str, Any], images: Dataset) -> Path:
    """Write the clean table and its picture into the run's folder; the picture's path."""
    from neuralsde_ito.files import write_atomically

    from .pictures import evaluation_picture

    write_atomically(run.evaluation_file, output.json_bytes(report))
    picture = run.evaluation_file.with_suffix(".png")
    evaluation_picture(picture, result, images)
    return picture


class _Progress:
    """Shows the training on stderr: bars on a terminal, else lines. Delays an interrupt to the end of the step."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.name, self.epochs, self.stopping = "", 0, False
        self.drawn_at = 0.0
        self.previous = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        self.stopping = True
        signal.signal(signal.SIGINT, self.previous)  # a second interrupt takes effect at once

    def phase(self, name: str, epochs: int) -> None:
        self._end()
        self.name, self.epochs = name, epochs
        self.bar = output.progress(epochs, f"{name:9}", "epochs")

    def step(self, epoch: int, step: int, steps: int) -> None:
        self.bar.n = epoch + step / steps
        self.bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        if time.monotonic() - self.drawn_at > 0.2:
            self.bar.refresh()
            self.drawn_at = time.monotonic()

    def epoch(self, row: dict[str, Any]) -> None:
        text = f"loss {row['loss']:.3f}, training accuracy {100 * row['accuracy']:.1f} %"
        if "held_out" in row:
            text += f", held out {100 * row['held_out']:.1f} %"
        if "held_out_attacked" in row:
            text += f", attacked {100 * row['held_out_attacked']:.1f} %"
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable and (row["epoch"] == self.epochs or self.epochs <= 5 or row["epoch"] % 10 == 0):
            click.echo(f"{self.name}: epoch {row['epoch']} of {self.epochs}, {text}", err=True)

    def should_stop(self) -> bool:
        return self.stopping

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def close(self) -> None:
        self._end()
        signal.signal(signal.SIGINT, self.previous)
