"""``ito-sde train``: the whole path from a ResNet to an evaluated ensemble, in one command."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import click

from . import options, output


@click.command("train")
@click.option("--config", "source", metavar="NAME|PATH", help="A preset or a YAML file.  [default: digits]")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any key, e.g. sde.omega=0.4; repeatable.",
)
@click.option(
    "--data",
    metavar="NAME|FOLDER",
    help="digits, cifar10, cifar100, or a folder with train/CLASS and test/CLASS.",
)
@click.option("--arch", help="Architecture of the ResNet.")
@click.option("--weights", metavar="FILE|NAME", help="A trained ResNet: a file, or torchvision weights by name.")
@click.option("--omega", type=float, help="Strength of the noise.")
@click.option("--members", type=int, help="Members of the ensemble.")
@click.option("--inferences", type=int, help="Inferences of each member.")
@click.option("--epochs", type=int, help="Epochs that each member is fine-tuned.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Use N training and N test images, a fixed choice.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), metavar="N", help="Of everything random.")
@click.option("--run", "name", metavar="NAME|PATH", help="Name of the run.  [default: configuration, date and time]")
@options.runs_root
@click.option("--resume", is_flag=True, help="Go on with a run (the newest unfinished one unless --run is given).")
@click.option("--overwrite", is_flag=True, help="Begin anew in a run's folder that is not empty.")
@options.device
@options.as_json
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")
def command(
    source: str | None,
    assignments: tuple[str, ...],
    data: str | None,
    name: str | None,
    root: Path,
    resume: bool,
    overwrite: bool,
    device: str,
    as_json: bool,
    print_config: bool,
    **flags: Any,
) -> None:
    """Train a ResNet (or take yours), recast it, fine-tune the members, and evaluate the ensemble.

    Without options it trains on scikit-learn's digits: real images, no download.

    \b
    ito-sde train --config cifar10-resnet20 --weights resnet20.th --data images/ --epochs 2
    ito-sde train --resume
    """
    from neuralsde_ito.files import write_atomically
    from neuralsde_ito.runs.build import build_resnet, load_dataset, pick_device, with_image_size
    from neuralsde_ito.runs.config import load_config
    from neuralsde_ito.runs.evaluate import evaluate
    from neuralsde_ito.runs.run import Run, new_run_name
    from neuralsde_ito.runs.training import Diverged, Interrupted

    if resume and overwrite:
        raise click.UsageError("--resume goes on, --overwrite begins anew: give one of them.")
    if print_config:
        idle = {"overwrite", "device", "as_json"} | (set() if resume else {"name", "root"})
        options.without_effect(idle, "With --print-config")
    run = Run.find(root, name, complete=False) if resume else None
    overrides = _overrides(data, flags)
    typed = [assignment.partition("=")[0].strip() for assignment in assignments]
    config = load_config(source, os.environ, assignments, overrides, base=run.config if run else None)
    if config.network.weights is not None and (idle_key := next((k for k in typed if k.startswith("resnet.")), None)):
        raise click.UsageError(f"With weights no ResNet is trained, --set {idle_key} would do nothing: leave it out.")
    if print_config:
        click.echo(config.to_yaml(), nl=False)
        return
    place = pick_device(device)
    if run is None:
        name = name or new_run_name(root, config)
        folder = Path(name) if Path(name).parent != Path() else root / name
        images = load_dataset(config)
        config = with_image_size(config, images)
        build_resnet(config, images)  # weights that do not fit should leave no folder behind
        if not os.path.isdir(folder):
            options.check_folder(folder)
        run = Run.create(folder, config, overwrite)
    else:
        if name is None:
            click.echo(f"Run {run.folder} (the newest unfinished one; --run names another).", err=True)
        images = load_dataset(config)
        run.check_config(config)
    options.check_folder(run.folder)

    show = _Progress()
    begun = time.monotonic()
    try:
        run.train(images, place, show.phase, show.step, show.epoch, show.should_stop)
    except Interrupted:
        show.close()
        click.echo(f"Interrupted; everything is saved. To go on: ito-sde train --run {run.folder} --resume", err=True)
        raise click.exceptions.Exit(130) from None
    except Diverged as error:
        raise click.ClickException(str(error)) from None  # exit code 1: no usage mistake, yet foreseen
    finally:
        show.close()

    with output.progress(len(images.test), "vote", "images") as bar:
        result = evaluate(run.ensemble(place), run.resnet(place), images.test, config.seed, tick=bar.update)
    report = {
        "command": "train",
        "run": str(run.folder),
        "seconds": round(time.monotonic() - begun, 1),
        "seed": config.seed,
        "device": str(place),
        "config": config.model_dump(mode="json"),
        **output.evaluation_json(result),
    }
    write_atomically(run.evaluation_file, output.json_bytes(report))
    from .pictures import evaluation_picture

    picture = run.evaluation_file.with_suffix(".png")
    evaluation_picture(picture, result, images)
    if as_json:
        output.print_json(report)
        return
    output.describe(config, run.folder, config.ensemble.members, config.ensemble.inferences, config.ensemble.rule)
    output.evaluation_table(result, images.name)
    click.echo(f"\nPicture   {picture}")
    click.echo("Next      ito-sde attack --norm linf --eps 8/255")


def _overrides(data: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Flags as dotted keys."""
    keys = {
        "arch": "network.arch",
        "weights": "network.weights",
        "omega": "sde.omega",
        "members": "ensemble.members",
        "inferences": "ensemble.inferences",
        "epochs": "finetune.epochs",
        "limit": "data.train_limit",
        "seed": "seed",
    }
    overrides = {keys[flag]: value for flag, value in flags.items() if value is not None}
    if flags["limit"] is not None:
        overrides["data.test_limit"] = flags["limit"]
    if data is not None:
        from neuralsde_ito.data import DATASETS

        if data in DATASETS or not (os.path.exists(data) or "/" in data or os.sep in data):
            overrides["data.name"] = data
        else:
            overrides |= {"data.name": "imagefolder", "data.path": str(Path(data).resolve())}
    return overrides


class _Progress:
    """Bars on a terminal, a line an epoch off it, and an interrupt that waits for the end of the step."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.name, self.epochs, self.stopping = "", 0, False
        self.line = 0.0
        self.previous = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        self.stopping = True
        signal.signal(signal.SIGINT, self.previous)  # a second one does not wait

    def phase(self, name: str, epochs: int) -> None:
        self._end()
        self.name, self.epochs = name, epochs
        self.bar = output.progress(epochs, f"{name:9}", "epochs")

    def step(self, epoch: int, step: int, steps: int) -> None:
        self.bar.n = epoch + step / steps
        self.bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        if time.monotonic() - self.line > 0.2:
            self.bar.refresh()
            self.line = time.monotonic()

    def epoch(self, row: dict[str, Any]) -> None:
        text = f"loss {row['loss']:.3f}, training accuracy {100 * row['accuracy']:.1f} %"
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
