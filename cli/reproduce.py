"""``ito-sde reproduce``: the paper's tables and figures, each number beside weak protocols and the strongest attack."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.reproduction.costs import Costs
    from neuralsde_ito.reproduction.pieces import Piece
    from neuralsde_ito.reproduction.reproduce import Plan, Request


@dataclass(frozen=True)
class Asked:
    """The options that say what is reproduced, as the user gave them."""

    items: tuple[str, ...]
    scale: str
    data: str | None
    weights: str | None
    imagenet: Path | None
    assignments: tuple[str, ...]
    limit: int | None
    seed: int | None
    folder: Path | None

    def request(self, device: str) -> Request:
        """The same for the library."""
        from neuralsde_ito.reproduction.declared import load_item, load_scale

        load_scale(self.scale)  # wrong names are refused before torch is imported
        for name in self.items:
            if name != "all":
                load_item(name)
        changes = self._changes()

        from neuralsde_ito.reproduction.reproduce import Request
        from neuralsde_ito.runs.build import pick_device

        folder = self.folder or Path("reproduction") / self.scale
        imagenet = None if self.imagenet is None else str(self.imagenet.resolve())
        return Request(self.items, self.scale, changes, imagenet, self.limit, self.seed, folder, pick_device(device))

    def _changes(self) -> dict[str, Any]:
        """What the user sets, as dotted keys of a run's configuration."""
        from neuralsde_ito.runs.config import assigned

        changes = assigned(self.assignments)
        if self.data is not None:
            changes |= options.data_keys(self.data)
        if self.weights is not None:
            is_file = os.path.exists(self.weights)
            changes["network.weights"] = str(Path(self.weights).resolve()) if is_file else self.weights
        return changes


@click.command("reproduce")
@options.gathered(
    "asked",
    Asked,
    click.argument("items", nargs=-1, metavar="[ITEM]..."),
    click.option(
        "--scale",
        default="smoke",
        show_default=True,
        metavar="NAME",
        help="smoke: digits, a quarter of an hour; small: your images and ResNet-20; paper: the paper's sizes, a GPU.",
    ),
    click.option("--data", metavar="NAME|FOLDER", help="cifar10, or a folder with train/CLASS and test/CLASS."),
    click.option("--weights", metavar="FILE", help="A trained ResNet, from which the members begin."),
    click.option(
        "--imagenet",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        metavar="FOLDER",
        help="ImageNet's images, for the scale paper: train/CLASS and val/CLASS.",
    ),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="A key of the runs' configuration, such as ensemble.members=3; repeatable.",
    ),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Use at most N images for everything: a trial."),
    click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), metavar="N", help="Seed of everything random.  [default: 0]"
    ),
    click.option(
        "--out",
        "folder",
        **options.out_folder,
        metavar="DIR",
        help="Folder of models, results and the page.  [default: reproduction/SCALE]",
    ),
)
@options.device
@click.option("--dry-run", is_flag=True, help="List the work with its cost on this machine, and stop.")
@options.as_json
def command(asked: Asked, device: str, dry_run: bool, as_json: bool) -> None:
    """Reproduce tables and figures of the paper, each number beside weak protocols and the strongest attack.

    Items: table1 to table6, figure1 to figure5, density, or all (the default). Finished work is kept: the same command
    goes on after an interruption, and a second call only writes the page.

    \b
    ito-sde reproduce all
    ito-sde reproduce table4 --scale small --data images/ --weights resnet20.th
    ito-sde reproduce table3 table4 --scale paper --dry-run
    """
    request = asked.request(device)

    from neuralsde_ito.distributed import world
    from neuralsde_ito.reproduction.reproduce import carry_out, make_plan, results_of
    from neuralsde_ito.runs.training import Diverged

    plan = make_plan(request)
    options.check_folder(request.folder)
    pending = plan.pending()
    _name_refused(plan)
    if dry_run:
        _list_work(plan, pending, as_json)
        return
    processes = world()
    if pending:
        show = _Progress(plan, pending, processes.first)
        try:
            carry_out(plan, show.begin, show.done, processes)
        except Diverged as error:
            raise click.ClickException(str(error)) from None  # exit code 1: foreseen, but no wrong usage
        except KeyboardInterrupt:
            show.close()
            click.echo(f"Interrupted; finished work is kept. To go on: {output.command_line()}", err=True)
            raise click.exceptions.Exit(130) from None
        finally:
            show.close()
    if processes.first:
        results = results_of(plan, output.command_line())
        _write(request.folder, results, plan)
        if as_json:
            output.print_json(results)
        else:
            _print(request.folder, results)


def _write(folder: Path, results: dict[str, Any], plan: Plan) -> None:
    """``results.json``, the figures, and the page in HTML and Markdown."""
    from neuralsde_ito.files import write_atomically

    from .reproduction_page import html_page, markdown_page
    from .reproduction_pictures import draw

    for name, item in results["items"].items():
        for figure in item["figures"]:
            pixels = _pixels(plan, name, figure) if figure["kind"] == "gallery" else None
            files = draw(figure, folder / "figures", pixels)
            figure["files"] = {kind: f"figures/{Path(file).name}" for kind, file in files.items()}
    write_atomically(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
    write_atomically(folder / "report.html", html_page(results, folder).encode())
    write_atomically(folder / "report.md", markdown_page(results).encode())


def _pixels(plan: Plan, name: str, figure: dict[str, Any]) -> list[Any]:
    """The images of a gallery, each ``(H, W, C)`` in 8 bits."""
    test, wanted = plan.lab.dataset(plan.items[name].data).test, {image["index"] for image in figure["images"]}
    found = {}
    for names, x, _ in test.batches(250):
        for number, pixels in zip(names.tolist(), x, strict=True):
            if number in wanted:
                found[number] = (255 * pixels).round().byte().permute(1, 2, 0).numpy()
    return [found[image["index"]] for image in figure["images"]]


def _print(folder: Path, results: dict[str, Any]) -> None:
    """All tables, and where the page is."""
    from .reproduction_page import print_results

    print_results(results)
    click.echo(f"\nPage      {folder / 'report.html'}  (also report.md)")
    click.echo(f"Record    {folder / 'results.json'}")


def _name_refused(plan: Plan) -> None:
    """Say which kept results are not used."""
    refused = sorted(plan.lab.store.refused)
    if refused:
        names = ", ".join(refused[:3]) + (", ..." if len(refused) > 3 else "")
        click.echo(
            f"Warning: {output.count(len(refused), 'kept result')} in {plan.lab.store.folder} of another version, or "
            f"damaged: not used, and made anew ({names}).",
            err=True,
        )


def _costs(plan: Plan, pending: list[Piece]) -> Costs:
    """What the work costs on this machine: every network that is still to run is timed."""
    from neuralsde_ito.reproduction.costs import Costs

    archs = {piece.network for piece in pending}
    systems = [(data, config) for data, config in plan.lab.configs() if config.network.arch in archs]
    return Costs.measured(plan.lab, systems)


def _list_work(plan: Plan, pending: list[Piece], as_json: bool) -> None:
    """The work by item and kind, with estimates; shared work counts for the first item that needs it."""
    costs, left = _costs(plan, pending), {piece.name for piece in pending}
    rows: list[dict[str, Any]] = []
    listed, total = set[str](), 0.0
    for name in plan.reproductions:
        by_kind: dict[str, list[Piece]] = {}
        for piece in plan.pieces_of(name):
            if piece.name not in listed:
                listed.add(piece.name)
                by_kind.setdefault(piece.kind, []).append(piece)
        for kind, pieces in by_kind.items():
            todo = [piece for piece in pieces if piece.name in left]
            seconds = sum(map(costs.seconds, todo))
            total += seconds
            rows.append({"item": name, "work": kind, "pieces": len(pieces), "left": len(todo), "seconds": seconds})
    if as_json:
        output.print_json({"command": output.command_line(), "work": rows, "seconds": total, "needs": plan.needs})
        return
    cells, before = [], ""
    for row in rows:
        name, before = row["item"] if row["item"] != before else "", row["item"]
        cells.append(
            [name, row["work"], row["pieces"], row["left"], output.seconds(row["seconds"]) if row["left"] else "-"]
        )
    output.table(cells, ["item", "work", "pieces", "left", "time left, about"])
    for name, sentence in plan.needs.items():
        click.echo(f"{name}: {sentence}")
    click.echo()
    output.sentence(
        f"About {output.seconds(total)} of work by one process on this machine. An item that shares work with one "
        "above it lists only what is new. Leave --dry-run out to do it."
    )


class _Progress:
    """One line for the whole: what is being done, pieces and items left, time left."""

    def __init__(self, plan: Plan, pending: list[Piece], visible: bool) -> None:
        self.visible = visible
        self.left = {piece.name: piece for piece in pending}
        self.items = {
            name: {piece.name for piece in plan.pieces_of(name)} & self.left.keys() for name in plan.reproductions
        }
        if visible:
            self.costs = _costs(plan, pending)
            self.bar = output.progress(len(pending), "reproduce", "pieces")
            self.bar.bar_format = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt} of {total_fmt} pieces{postfix}"
        self.said_at = time.monotonic()

    def begin(self, piece: Piece) -> None:
        if self.visible:
            self.bar.set_postfix_str(f"{self._state()}: {piece.title}")

    def done(self, piece: Piece, seconds: float) -> None:
        if not self.visible:
            return
        self.costs.learn(piece, seconds)
        self.left.pop(piece.name, None)
        for names in self.items.values():
            names.discard(piece.name)
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.said_at > 30:
            self.said_at = time.monotonic()
            click.echo(f"reproduce: {self._state()}", err=True)

    def _state(self) -> str:
        items = sum(bool(names) for names in self.items.values())
        seconds = sum(map(self.costs.seconds, self.left.values()))
        pieces = output.count(len(self.left), "piece")
        return f"{output.count(items, 'item')} left, {pieces}, about {output.seconds(seconds)}"

    def close(self) -> None:
        if self.visible:
            self.bar.close()
