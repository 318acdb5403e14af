"""``ito-sde bench``: what the ensemble costs relative to its plain network, measured side by side in one process."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralsde_ito.benchmarks.record import FORMAT, PARTS, compare_rows, read_record
from neuralsde_ito.names import ARCHITECTURES
from neuralsde_ito.validation import ItoError, check_eps, one_of

from . import options, output

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from neuralsde_ito.benchmarks.record import Change, Record, Row
    from neuralsde_ito.models.ensemble import ItoEnsemble
    from neuralsde_ito.models.recast import ItoResNet

OF_A_RUN = ("vote", "attack", "suite")  # parts that mean nothing with random weights
READ_BY = {  # the parts that obey an option
    "batch": ("inference", "vote", "path", "training"),
    "repeats": ("inference", "vote", "path", "training"),
    "radii": ("attack", "suite"),
    "images": ("attack", "suite"),
    "steps": ("attack",),
    "eot": ("attack",),
    "compiled": ("inference",),
}


@click.command("bench")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    help="Only this.  [repeatable; default: all but suite, which is slow]",
)
@click.option("--arch", help="A network with random weights instead of a run's: no votes and attacks then.")
@options.on_run
@click.option("--batch", type=click.IntRange(2), default=256, show_default=True, help="Images of an inference.")
@click.option(
    "--repeats", type=click.IntRange(1), default=9, show_default=True, help="Interleaved; the median is reported."
)
@click.option("--eps", "radii", multiple=True, default=("2/255", "8/255"), show_default=True, help="Of attacks; L-inf.")
@click.option("--images", type=click.IntRange(1), default=64, show_default=True, help="Images that are attacked.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Steps of attacks.")
@click.option("--eot", type=click.IntRange(1), default=20, show_default=True, help="Paths a gradient of attacks.")
@click.option("--compile", "compiled", is_flag=True, help="Also the plain network under torch.compile.")
@click.option("--save", **options.out_picture, metavar="PNG", help="Draw the ratios into this file.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also compare with a run that --json has recorded.  [the parts are then the record's]",
)
@options.as_json
def command(
    parts: tuple[str, ...],
    arch: str | None,
    run: str | None,
    root: Path,
    device: str,
    batch: int,
    repeats: int,
    radii: tuple[str, ...],
    images: int,
    steps: int,
    eot: int,
    compiled: bool,
    save: Path | None,
    against: Path | None,
    as_json: bool,
) -> None:
    """Measure inferences, votes, attacks, training steps and memory against the plain network.

    Every figure is a ratio to the part's first row, measured in turn with it, since seconds alone vary with whatever
    else the machine does. A run gives the network, the members and the images; --arch needs no run.

    \b
    ito-sde bench --json > before.json
    ito-sde bench --against before.json
    """
    record = None if against is None else read_record(against)
    if record is not None:
        record.check(parts, {})
    by_default = tuple(part for part in PARTS if part != "suite") if record is None else record.parts
    asked = tuple(dict.fromkeys(parts)) or by_default
    if arch is not None:
        if wrong := [part for part in parts if part in OF_A_RUN]:
            raise click.UsageError(f"--arch has random weights: --part {wrong[0]} needs a run.")
        options.without_effect({"run", "root"}, "With --arch")
        asked = tuple(part for part in asked if part not in OF_A_RUN)
        if not asked:
            raise click.UsageError(f"--arch has random weights: all parts of the record {against} need a run.")
    idle = {name for name, readers in READ_BY.items() if not set(readers) & set(asked)}
    which = "--part " + " and --part ".join(parts) if parts else "--arch" if arch is not None else "--against"
    options.without_effect(idle, f"With {which}")

    eps = [check_eps("linf", text) for text in radii]
    if arch is None:
        options.find_run(root, run)  # before torch is imported
    else:
        one_of("architecture", arch, ARCHITECTURES)

    from neuralsde_ito.attacks.other_libraries import check_peer
    from neuralsde_ito.benchmarks.measuring import machine

    for part, library in (("attack", "torchattacks"), ("suite", "autoattack")):
        if part in parts:
            check_peer(library)
    if arch is not None:
        subject = _random_subject(arch, device, batch)
    else:
        subject = _subject_of_run(options.open_run(root, run, device), max(batch, images))
        batch, images = min(batch, len(subject.x)), min(images, len(subject.x))
    asked, left_out = _possible(asked, subject)
    if parts and left_out:
        raise ItoError(left_out[0].replace("left out", "not measured", 1))
    settings = {"batch": batch, "eps": eps, "images": images, "steps": steps, "eot": eot}
    if record is not None:
        obeyed = {"eps" if name == "radii" else name for name, readers in READ_BY.items() if set(readers) & set(asked)}
        record.check(asked, {name: value for name, value in settings.items() if name in obeyed})
    rows: list[Row] = []
    with output.progress(len(asked), "bench", "parts") as bar:
        for part in asked:
            bar.set_postfix_str(part)
            rows += _measure(part, subject, batch, repeats, eps, images, steps, eot, compiled)
            bar.update()
    if save:
        from .pictures import bench_picture

        bench_picture(rows, save)
    changes = [] if record is None else compare_rows(record.rows, rows)
    if as_json:
        head: dict[str, Any] = {"command": "bench", "network": subject.description, "batch": batch, "repeats": repeats}
        date = datetime.now().isoformat(timespec="seconds")
        head |= {"machine": ", ".join(machine(subject.device)), "date": date}
        head |= {"format": FORMAT, "settings": settings, "rows": [asdict(row) for row in rows], "left_out": left_out}
        if record is not None:
            head["against"] = {"file": str(against), "changes": [asdict(change) for change in changes]}
        output.print_json(head)
        return
    click.echo(f"Network  {subject.description}")
    click.echo(f"Machine  {', '.join(machine(subject.device))}")
    _print_table(rows, asked)
    output.sentence(
        f"Ratio: to the first row of the part (attacks: of each radius; paths: of each number of steps), measured in "
        f"turn, median of {output.count(repeats, 'repeat')}. Attacks run once, step by step in turn; suites and memory "
        f"once. An inference, a vote and paths of 16,384 numbers are of {batch} images, a training step of "
        f"{min(batch, 128)}, an attack of {images}, memory of 128."
    )
    for sentence in left_out:
        output.sentence(sentence)
    if record is not None:
        _print_changes(record, changes)
    if save:
        click.echo(f"\nPicture  {save}")


@dataclass
class _Subject:
    """What is measured: a network, its recast, images and labels; an ensemble only if it comes from a run."""

    description: str
    arch: str
    net: nn.Module
    model: ItoResNet
    ensemble: ItoEnsemble | None
    x: Tensor
    y: Tensor
    device: torch.device


def _random_subject(arch: str, device: str, batch: int) -> _Subject:
    import torch

    from neuralsde_ito.models.recast import recast
    from neuralsde_ito.models.resnets import load_resnet
    from neuralsde_ito.runs.build import pick_device

    on = pick_device(device)
    net = load_resnet(arch).eval().to(on)
    x = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0), device="cpu").to(on)
    y = torch.arange(batch, device=on) % 10
    return _Subject(f"{arch} with random weights, random images", arch, net, recast(net), None, x, y, on)


def _subject_of_run(opened: options.Opened, images: int) -> _Subject:
    from neuralsde_ito.runs.build import load_dataset

    ensemble, arch = opened.ensemble, opened.config.network.arch
    data = load_dataset(opened.config, train_limit=1, test_limit=images)
    _, x, y = next(iter(data.test.batches(images, opened.device)))
    description = f"{arch} of {opened.folder}, test images of {data.name}"
    member: ItoResNet = ensemble.members[0]
    return _Subject(description, arch, opened.resnet, member, ensemble, x, y, opened.device)


def _possible(asked: tuple[str, ...], subject: _Subject) -> tuple[tuple[str, ...], list[str]]:
    """The parts that can be measured here, and a sentence for each of the others."""
    left_out: list[str] = []
    if "attack" in asked and importlib.util.find_spec("torchattacks") is None:
        asked = tuple(part for part in asked if part != "attack")
        left_out.append("Attacks are left out: pip install torchattacks, to measure against its EOTPGD.")
    small = tuple(subject.x.shape[1:]) == (3, 32, 32)
    if "memory" in asked and (not small or importlib.util.find_spec("resource") is None):
        asked = tuple(part for part in asked if part != "memory")
        left_out.append("Memory is left out: it is measured with images of 3x32x32, on Linux and macOS.")
    return asked, left_out


def _measure(
    part: str,
    subject: _Subject,
    batch: int,
    repeats: int,
    eps: list[float],
    images: int,
    steps: int,
    eot: int,
    compiled: bool,
) -> list[Row]:
    """The rows of one part."""
    import torch

    from neuralsde_ito.benchmarks import attacks, costs, memory

    net, model, ensemble, x, y = subject.net, subject.model, subject.ensemble, subject.x, subject.y
    if part == "inference":
        return costs.bench_inference(net, model, x[:batch], repeats, compiled)
    if part == "path":
        return costs.bench_path(torch.empty(batch, 16 * 32 * 32, device=subject.device), repeats)
    if part == "training":
        return costs.bench_training(net, model.schedule.omega, x[:batch][:128], y[:batch][:128], repeats)
    if part == "memory":
        return memory.bench_memory(subject.arch, 128, subject.device)
    assert ensemble is not None, "parts of a run are not asked for without one"
    if part == "vote":
        return costs.bench_votes(net, ensemble, x[:batch], repeats)
    if part == "attack":
        return attacks.bench_attack(ensemble, x[:images], y[:images], eps, steps, eot)
    return attacks.bench_suite(net, ensemble, x[:images], y[:images], eps)


def _print_table(rows: list[Row], parts: tuple[str, ...]) -> None:
    cells = []
    for part in parts:
        for i, row in enumerate(row for row in rows if row.part == part):
            cost = f"{row.seconds:.0f} MiB" if part == "memory" else output.seconds(row.seconds)
            cold = output.seconds(row.cold) if row.cold is not None else ""
            cells.append([part if i == 0 else "", row.name, cost, f"{row.ratio:.2f}", cold, row.note])
    click.echo()
    output.table(cells, ["part", "what", "cost", "ratio", "first call", "remarks"])
    click.echo()


def _print_changes(record: Record, changes: list[Change]) -> None:
    """The ratios of the record beside those of this run."""
    click.echo(f"\nAgainst  {record.path}, {record.date}\n         {record.network}\n         {record.machine}\n")
    cells, part = [], ""
    for change in changes:
        old, new = ("-" if ratio is None else f"{ratio:.2f}" for ratio in (change.old, change.new))
        share = "" if change.share is None else f"{100 * change.share:+.0f} %"
        cells.append([change.part if change.part != part else "", change.name, old, new, share, change.word])
        part = change.part
    output.table(cells, ["part", "what", "old ratio", "new ratio", "change", "moved"])
    click.echo()
    measured = {change.part for change in changes}
    if others := [part for part in record.parts if part not in measured]:
        output.sentence(f"Not compared: {', '.join(others)}, which the record has and this run has not measured.")
    moved = sum(change.word in ("more", "less") for change in changes)
    output.sentence(
        f"{output.count(moved, 'ratio')} moved: each run's median lies outside the other's quartiles. Attacks, suites "
        "and memory are measured once, have no quartiles and are not said to move."
    )
