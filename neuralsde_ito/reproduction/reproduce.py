"""From items and a scale to the work, and from the work to ``results.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..distributed import World, world
from ..runs.run import environment
from ..validation import ItoError
from .costs import weight
from .declared import ITEMS, DataName, Item, Scale, load_item, load_scale
from .items import KINDS, Reproduction
from .laboratory import Laboratory
from .pieces import Piece, dealt, in_order

FORMAT = 1  # of results.json
_IDLE = {  # beginnings of keys of the configuration that do nothing here, and why
    "attack.": "items and scales say what is attacked",
    "name": "a reproduction has no run name",
    "seed": "--seed sets it",
    "sde.omega": "items say which omega",
    "ensemble.paths_per_call": "no other library's attack is made",
}
IMAGENET = "ito-sde reproduce {item} --scale paper --imagenet FOLDER"


@dataclass(frozen=True)
class Request:
    """What is to be reproduced.

    Attributes:
        items: names in `ITEMS`; ``all`` stands for all of them.
        scale: a name in `SCALES`.
        changes: keys of the configuration that the user sets for CIFAR-10 (and its stand-in); with dots.
        imagenet: the folder of ImageNet's images.
        limit: use at most so many images for everything.
        seed: of everything random; None: the scale's.
        folder: where models, results and the page are kept.
        device: where networks run.

    Raises:
        ItoError: an unknown item or scale, or something that the scale needs and that is not given.
    """

    items: tuple[str, ...]
    scale: str
    changes: Mapping[str, Any]
    imagenet: str | None = None
    limit: int | None = None
    seed: int | None = None
    folder: Path = Path("reproduction")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def names(self) -> list[str]:
        """The items in order, each once."""
        asked = set(ITEMS) if "all" in self.items or not self.items else set(self.items)
        for name in asked:
            load_item(name)
        return [name for name in ITEMS if name in asked]

    def resolved(self) -> Scale:
        """The scale with the user's limit and seed, without data sets that are not given."""
        scale = load_scale(self.scale)
        given = {"data": "data.name" in self.changes, "weights": "network.weights" in self.changes}
        missing = [name for name in scale.needs if not given[name]]
        if missing:
            raise ItoError(
                f"The scale {self.scale} needs {' and '.join('--' + name for name in missing)}: ito-sde reproduce "
                f"{' '.join(self.items) or 'all'} --scale {self.scale} --data FOLDER --weights FILE."
            )
        self._check_changes()
        update: dict[str, Any] = {}
        if self.scale == "paper" and self.imagenet is None:
            update["data"] = {name: source for name, source in scale.data.items() if name != "imagenet"}
        if self.seed is not None:
            update["seed"] = self.seed
        if self.limit is not None:
            update["attacked"] = min(scale.attacked, self.limit)
            update["benign"] = min(scale.benign or self.limit, self.limit)
            images = min(scale.density.images, self.limit)
            update["density"] = scale.density.model_copy(update={"images": images})
        return scale.model_copy(update=update)

    def _check_changes(self) -> None:
        """Refuse what would do nothing."""
        if self.imagenet is not None and self.scale != "paper":
            raise ItoError(f"--imagenet is for the scale paper; at the scale {self.scale} it would do nothing.")
        idle = {key: why for key in self.changes for start, why in _IDLE.items() if key.startswith(start)}
        if "network.weights" in self.changes:
            idle |= {key: "weights are given" for key in self.changes if key.startswith("resnet.")}
        for key, why in idle.items():
            raise ItoError(f"--set {key} would do nothing: {why}; leave it out.")


@dataclass(frozen=True)
class Plan:
    """The work of a request.

    Attributes:
        request: what was asked for.
        lab: where it is done.
        items: the declarations, by name.
        reproductions: of the items that there are data for.
        needs: of the others: a sentence with the command that would do it.
        stages: all pieces of work, done or not; a piece needs only pieces of the stages before its own.
    """

    request: Request
    lab: Laboratory
    items: dict[str, Item]
    reproductions: dict[str, Reproduction]
    needs: dict[str, str]
    stages: list[list[Piece]]

    def pieces_of(self, name: str) -> list[Piece]:
        """All pieces of one item, with what they need."""
        return [piece for stage in in_order(self.reproductions[name].pieces) for piece in stage]

    def pending(self) -> list[Piece]:
        """The pieces that are not done."""
        return [piece for stage in self.stages for piece in stage if not self.lab.done(piece)]


def make_plan(request: Request) -> Plan:
    """Read the data, and name every piece of work.

    Raises:
        ItoError: a wrong request; data or weights that do not fit.
    """
    names, scale = request.names(), request.resolved()
    lab = Laboratory(scale, request.folder, _changes(request, scale), request.device)
    items = {name: load_item(name) for name in names}
    reproductions, needs = {}, {}
    for name, item in items.items():
        absent = item.data_names - set(scale.data)
        if absent == item.data_names:
            needs[name] = f"This item needs ImageNet: {IMAGENET.format(item=name)}"
        else:
            reproductions[name] = KINDS[item.kind](lab, item)
    if not reproductions:
        raise ItoError(next(iter(needs.values())).replace("This item", f"The item {names[0]}"))
    pieces = [piece for reproduction in reproductions.values() for piece in reproduction.pieces]
    return Plan(request, lab, items, reproductions, needs, in_order(pieces))


def _changes(request: Request, scale: Scale) -> dict[DataName, dict[str, Any]]:
    """What the user sets, by data set; ImageNet's folder is apart, and its weights are the preset's."""
    changes = dict(request.changes)
    if request.limit is not None:
        changes["data.train_limit"] = min(request.limit, changes.get("data.train_limit", request.limit))
    changes["seed"] = scale.seed
    of_imagenet = {key: value for key, value in changes.items() if key not in ("data.path", "data.name")}
    if request.imagenet is not None:
        of_imagenet |= {"data.name": "imagefolder", "data.path": request.imagenet}
    return {"cifar10": changes, "imagenet": of_imagenet}


def carry_out(
    plan: Plan,
    on_begin: Callable[[Piece], object] = lambda piece: None,
    on_done: Callable[[Piece, float], object] = lambda piece, seconds: None,
    processes: World | None = None,
) -> None:
    """Do all work that is not done yet. Of several processes each does its share of every stage.

    The processes share the folder; each piece is done whole by one of them, so its result does not depend on their
    number, and a later call may have another number.

    Args:
        plan: the work.
        on_begin, on_done: called before and after each piece of this process.
        processes: default: those that were launched together.
    """
    all_of_them = world() if processes is None else processes
    for stage in plan.stages:
        pending = [piece for piece in stage if not plan.lab.done(piece)]
        all_of_them.barrier()  # all have looked before any begins
        for piece in dealt(pending, weight, all_of_them.rank, all_of_them.size):
            on_begin(piece)
            on_done(piece, plan.lab.do(piece))
        all_of_them.barrier()


def results_of(plan: Plan, command: str) -> dict[str, Any]:
    """All numbers of finished work, ready for JSON.

    Args:
        plan: its pieces are done.
        command: the command line.
    """
    lab, request = plan.lab, plan.request
    items: dict[str, Any] = {}
    used: dict[str, str] = {}  # from the name of a piece to the first item that uses it
    for name, item in plan.items.items():
        said = {
            "title": item.title,
            "states": item.states,
            "open": item.open,
            "chosen": item.chosen,
            "command": _command(request, name),
            "quotes": [{"label": label, "value": value / 100} for label, value in item.quotes.items()],
        }
        if name in plan.needs:
            items[name] = {"status": "needs", "needs": plan.needs[name], **said, **_empty()}
            continue
        for piece in plan.pieces_of(name):
            used.setdefault(piece.name, name)
        items[name] = {"status": "done", "needs": None, **said, **_empty(), **plan.reproductions[name].results()}
        for number, figure in enumerate(items[name]["figures"]):
            figure["name"] = name if number == 0 else f"{name}-{number + 1}"
            figure["records"] = [piece.name for piece in plan.reproductions[name].pieces]
        absent = item.data_names - set(lab.scale.data)
        if absent:
            sentence = f"Its cells on ImageNet need a folder of these images: {IMAGENET.format(item=name)}"
            items[name]["conclusions"] = [*items[name]["conclusions"], sentence]
    records = {}
    for name, item_name in used.items():
        record = lab.store.record(name)
        assert record is not None
        records[name] = {**record, "command": _command(request, item_name), "file": f"cache/{name}.safetensors"}
    scale = lab.scale
    config = scale.config("cifar10", "ResNet-50", lab.changes["cifar10"])
    return {
        "format": FORMAT,
        "version": version("ito-sde"),
        "scale": request.scale,
        "command": command,
        "device": str(request.device),
        "seed": scale.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hours": round(sum(record["seconds"] for record in records.values()) / 3600, 3),
        "environment": environment(),
        "stand_in": scale.stand_in,
        "settings": {
            "network": config.network.arch,
            "members": config.ensemble.members,
            "inferences": config.ensemble.inferences,
            "rule": config.ensemble.rule,
            "epochs of fine-tuning": config.finetune.epochs,
            "images under attack": min(scale.attacked, len(lab.dataset("cifar10").test)),
            "paths a gradient averages": scale.eot,
            "effort of the suite": scale.effort,
        },
        "items": items,
        "records": records,
    }


def _empty() -> dict[str, Sequence[Any]]:
    return {"blocks": [], "figures": [], "conclusions": []}


def _command(request: Request, item: str) -> str:
    """The command that makes one item alone; the user's files are named by placeholders."""
    words = ["ito-sde reproduce", item, f"--scale {request.scale}"]
    words += ["--data FOLDER"] if "data.path" in request.changes else []
    words += ["--weights FILE"] if "network.weights" in request.changes else []
    words += ["--imagenet FOLDER"] if request.imagenet else []
    words += [f"--limit {request.limit}"] if request.limit else []
    words += [f"--seed {request.seed}"] if request.seed is not None else []
    shown_apart = ("data.", "network.weights")
    words += [f"--set {key}={value}" for key, value in request.changes.items() if not key.startswith(shown_apart)]
    return " ".join(words)
