"""``ito-sde bench``: what the ensemble costs beside the network it is made of, side by side in one process."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click

from . import options, output

OF_A_RUN = ("vote", "attack", "suite")  # parts that random weights cannot have
PARTS = ("inference", "vote", "path", "attack", "suite", "training", "memory")
READ_BY = {  # the parts that an option has to do with
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
@click.option("--repeats", type=click.IntRange(1), default=9, show_default=True, help="Interleaved; medians count.")
@click.option("--eps", "radii", multiple=True, default=("2/255", "8/255"), show_default=True, help="Of attacks; L-inf.")
@click.option("--images", type=click.IntRange(1), default=64, show_default=True, help="Images that are attacked.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Steps of attacks.")
@click.option("--eot", type=click.IntRange(1), default=20, show_default=True, help="Paths a gradient of attacks.")
@click.option("--compile", "compiled", is_flag=True, help="Also the plain network under torch.compile.")
@click.option("--save", **options.out_picture, metavar="PNG", help="Draw the ratios into this file.")
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
    as_json: bool,
) -> None:
    """Measure inferences, votes, attacks, training steps and memory against the plain network.

    Every figure is a ratio to the part's first row, measured in turn with it: machines are noisy, and bare seconds
    say little. A run gives the network, the members and the images; --arch needs none.
    """
    asked = tuple(dict.fromkeys(parts)) or tuple(part for part in PARTS if part != "suite")
    if arch is not None:
        if wrong := [part for part in parts if part in OF_A_RUN]:
            raise click.UsageError(f"--arch has random weights: --part {wrong[0]} needs a run.")
        options.without_effect({"run", "root"}, "With --arch")
        asked = tuple(part for part in asked if part not in OF_A_RUN)
    idle = {name for name, readers in READ_BY.items() if not set(readers) & set(asked)}
    options.without_effect(idle, f"With {'--part ' + ' and --part '.join(parts) if parts else '--arch'}")

    import torch

    from neuralsde_ito.attacks.norms import check_eps, parse_eps
    from neuralsde_ito.attacks.other_libraries import check_peer
    from neuralsde_ito.benchmarks import costs as benchmark
    from neuralsde_ito.models.recast import recast
    from neuralsde_ito.models.resnets import load_resnet
    from neuralsde_ito.runs.run import load_dataset, pick_device
    from neuralsde_ito.validation import ItoError

    eps = [check_eps("linf", parse_eps(text)) for text in radii]
    for part, library in (("attack", "torchattacks"), ("suite", "autoattack")):
        if part in parts:
            check_peer(library)
    if arch is not None:
        place = pick_device(device)
        net = load_resnet(arch).eval().to(place)
        model = recast(net)
        x = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(place)
        y = torch.arange(batch, device=place) % 10
        ensemble, what = None, f"{arch} with random weights, random images"
    else:
        opened = options.open_run(root, run, device)
        net, ensemble, place = opened.resnet, opened.ensemble, opened.device
        model = ensemble.members[0]
        arch = opened.config.network.arch
        data = load_dataset(opened.config, train_limit=1, test_limit=max(batch, images))
        _, x, y = next(iter(data.test.batches(max(batch, images), place)))
        batch, images = min(batch, len(x)), min(images, len(x))
        what = f"{arch} of {opened.folder}, test images of {data.name}"
    left_out: list[str] = []
    if "attack" in asked and importlib.util.find_spec("torchattacks") is None:
        asked = tuple(part for part in asked if part != "attack")
        left_out.append("Attacks are left out: pip install torchattacks, to measure against its EOTPGD.")
    if "memory" in asked and (tuple(x.shape[1:]) != (3, 32, 32) or importlib.util.find_spec("resource") is None):
        asked = tuple(part for part in asked if part != "memory")
        left_out.append("Memory is left out: it is measured with images of 3x32x32, on Linux and macOS.")
    if parts and left_out:
        raise ItoError(left_out[0].replace("left out", "not measured", 1))
    rows: list[benchmark.Row] = []
    with output.progress(len(asked), "bench", "parts") as bar:
        for part in asked:
            bar.set_postfix_str(part)
            if part == "inference":
                rows += benchmark.bench_inference(net, model, x[:batch], repeats, compiled)
            elif part == "vote" and ensemble is not None:
                rows += benchmark.bench_votes(net, ensemble, x[:batch], repeats)
            elif part == "path":
                rows += benchmark.bench_path(torch.empty(batch, 16 * 32 * 32, device=place), repeats)
            elif part == "attack" and ensemble is not None:
                rows += benchmark.bench_attack(ensemble, x[:images], y[:images], eps, steps, eot)
            elif part == "suite" and ensemble is not None:
                rows += benchmark.bench_suite(net, ensemble, x[:images], y[:images], eps)
            elif part == "training":
                rows += benchmark.bench_training(net, model.schedule.omega, x[:batch][:128], y[:batch][:128], repeats)
            elif part == "memory":
                rows += benchmark.bench_memory(arch, 128, place)
            bar.update()
    if save:
        from .pictures import bench_picture

        bench_picture(rows, save)
    if as_json:
        head = {"command": "bench", "network": what, "batch": batch, "repeats": repeats}
        date = datetime.now().isoformat(timespec="seconds")
        head |= {"machine": ", ".join(benchmark.machine(place)), "date": date}
        output.print_json({**head, "rows": [asdict(row) for row in rows], "left_out": left_out})
        return
    click.echo(f"Network  {what}")
    click.echo(f"Machine  {', '.join(benchmark.machine(place))}")
    shown = []
    for part in asked:
        for i, row in enumerate(row for row in rows if row.part == part):
            unit = f"{row.seconds:.0f} MiB" if part == "memory" else output.seconds(row.seconds)
            cold = output.seconds(row.cold) if row.cold is not None else ""
            shown.append([part if i == 0 else "", row.name, unit, f"{row.ratio:.2f}", cold, row.note])
    click.echo()
    output.table(shown, ["part", "what", "cost", "ratio", "first call", "remarks"])
    click.echo()
    output.sentence(
        f"Ratio: to the first row of the part (attacks: of each radius; paths: of each number of steps), measured in "
        f"turn, median of {output.count(repeats, 'repeat')}. Attacks run once, step by step in turn; suites and memory "
        f"once. An inference, a vote and paths of 16,384 numbers are of {batch} images, a training step of "
        f"{min(batch, 128)}, an attack of {images}, memory of 128."
    )
    for sentence in left_out:
        output.sentence(sentence)
    if save:
        click.echo(f"\nPicture  {save}")
