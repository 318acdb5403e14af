"""Where the work is done: data sets, systems (a ResNet and its members at one omega), results, and devices."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attacks.images import Images
from ..data import Dataset, Split
from ..files import write_atomically
from ..models.ensemble import ItoEnsemble
from ..models.resnets import Normalize
from ..runs.build import build_resnet, load_dataset, with_image_size
from ..runs.config import Config, Fit
from ..runs.run import Run
from .declared import DataName, Scale
from .pieces import Block, Piece, Work
from .store import Store


@dataclass(eq=False)
class System:
    """A ResNet of the paper at one omega, as it stands at this scale: what is trained, and where it is.

    Attributes:
        title: for people: the network and omega.
        config: of its run.
        base: the run of the ResNet alone, which all omegas share.
        run: the run of the members, in ``models/``; every verb of ``ito-sde`` opens it.
        resnet: the piece of work that trains the ResNet (or takes the user's weights).
        members: the pieces that fine-tune the members, as many as any item uses.
        std: of the normalisation, the mean over channels.
    """

    lab: Laboratory = field(repr=False)
    title: str
    config: Config
    base: Run
    run: Run
    resnet: Piece = field(init=False)
    members: tuple[Piece, ...] = field(init=False)
    std: float = field(init=False)

    def resnet_network(self) -> nn.Module:
        """The original ResNet, on the device."""
        return _resnet(self.base.folder, self.lab.device)

    def ensemble(self, members: int) -> ItoEnsemble:
        """The first ``members`` members, on the device, with the configuration's vote."""
        voting = self.config.ensemble  # and not the run's, which may be of an earlier call with another vote
        return _ensemble(self.run.folder, members, voting.inferences, voting.rule, self.lab.device)


@lru_cache(maxsize=4)
def _resnet(folder: Path, device: torch.device) -> nn.Module:
    return Run.open(folder).resnet(device).eval()


@lru_cache(maxsize=2)
def _ensemble(folder: Path, members: int, inferences: int, rule: str, device: torch.device) -> ItoEnsemble:
    run = Run.open(folder)
    return ItoEnsemble([run.member(m, device) for m in range(members)], inferences, rule).eval()


class Laboratory:
    """Makes systems and pieces of work, keeps their results, and does the work.

    Args:
        scale: how large the work is.
        folder: where models and results are kept.
        changes: for each data set of the paper that there is, the keys of the configuration that the user sets.
        device: where networks run.

    Attributes:
        store: the results.
    """

    def __init__(
        self, scale: Scale, folder: Path, changes: Mapping[DataName, Mapping[str, Any]], device: torch.device
    ) -> None:
        self.scale, self.folder, self.changes, self.device = scale, folder, changes, device
        self.store = Store(folder / "cache")
        self._datasets: dict[DataName, Dataset] = {}
        self._fingerprints: dict[str, str] = {}
        self._systems: dict[tuple[DataName, str, float], System] = {}
        self._images: dict[Block, Images] = {}

    # --- data ------------------------------------------------------------------------------------------------

    def dataset(self, data: DataName) -> Dataset:
        """A data set of the paper, as it stands at this scale."""
        if data not in self._datasets:
            network = next(iter(self.scale.data[data].presets))
            self._datasets[data] = load_dataset(self.scale.config(data, network, self.changes[data]))
        return self._datasets[data]

    def fingerprint(self, data: DataName, split: Literal["train", "test"] = "test") -> str:
        """A digest of all images of a split."""
        name = f"{data}-{split}"
        if name not in self._fingerprints:
            self._fingerprints[name] = split_digest(getattr(self.dataset(data), split))
        return self._fingerprints[name]

    def blocks(self, data: DataName, count: int | None) -> list[Block]:
        """The blocks of the first ``count`` test images (all, if there are fewer or ``count`` is None)."""
        count = min(count or len(self.dataset(data).test), len(self.dataset(data).test))
        return [Block(data, count, number) for number in range(-(-count // self.scale.block))]

    def size(self, block: Block) -> int:
        """How many images a block holds."""
        return min(self.scale.block, block.count - block.number * self.scale.block)

    def split(self, block: Block) -> Split:
        """The images of a block as a split."""
        first = block.number * self.scale.block
        return self.dataset(block.data).test.first(block.count).part(first, first + self.size(block))

    def images(self, block: Block) -> Images:
        """The images of a block, on the device."""
        if block not in self._images:
            self._images = {block: Images.of(self.split(block), self.scale.block, self.device).to(self.device)}
        return self._images[block]

    def configs(self) -> list[tuple[DataName, Config]]:
        """The configurations of all networks, each with its data set."""
        return [
            (data, self.scale.config(data, network, self.changes[data]))
            for data, source in self.scale.data.items()
            for network in source.presets
        ]

    # --- systems ---------------------------------------------------------------------------------------------

    def system(self, data: DataName, network: str, omega: float) -> System:
        """A ResNet of the paper at one omega."""
        config = self.scale.config(data, network, {**self.changes[data], "sde.omega": omega})
        # Networks of the paper with one stand-in are one system.
        key = (data, config.name, omega)
        if key not in self._systems:
            self._systems[key] = self._new_system(data, config, omega)
        return self._systems[key]

    def _new_system(self, data: DataName, config: Config, omega: float) -> System:
        images = self.dataset(data)
        config = with_image_size(config, images)
        # The ResNet does not depend on omega: all systems of one configuration share it.
        start: dict[str, Any] = {
            "data": {**config.data.model_dump(mode="json", exclude={"path", "test_limit"})},
            "images": self.fingerprint(data, "train"),
            "network": {**config.network.model_dump(mode="json"), "weights": _weights_digest(config)},
            "resnet": None if config.network.weights else fit_inputs(config.resnet),
            "seed": config.seed,
        }
        if config.sde.input_sigma:  # the ResNet trains with it, too
            start["input_sigma"] = config.sde.input_sigma
        tuned = {"sde": sde_inputs(config), "finetune": fit_inputs(config.finetune)}
        arch = config.network.arch
        base = Run(self.folder / "models" / f"{arch}-{_digest(start)}", config)
        run = Run(self.folder / "models" / f"{arch}-omega{omega:g}-{_digest([start, tuned])}", config)
        system = System(self, f"{arch}, omega {omega:g}", config, base, run)
        epochs, count = config.resnet.epochs, len(images.train)

        def make_resnet() -> dict[str, Tensor]:
            self._begin(base)
            base.train_resnet(images, self.device)
            return {}

        def make_member(number: int) -> Callable[[], dict[str, Tensor]]:
            def make() -> dict[str, Tensor]:
                self._begin(run)
                if not run.resnet_file.is_file():
                    write_atomically(run.resnet_file, base.resnet_file.read_bytes())
                run.train_member(number, images, self.device)
                run.merge_metrics()
                return {}

            return make

        work = Work(trained=0 if config.network.weights else epochs * count / 2)
        system.resnet = Piece("resnet", f"train {arch}", start, (), make_resnet, work, arch, arch, base.resnet_file)
        work = Work(trained=config.finetune.epochs * count)
        system.members = tuple(
            Piece(
                "member",
                f"fine-tune member {number}, {system.title}",
                {**tuned, "member": number},
                (system.resnet,),
                make_member(number),
                work,
                arch,
                system.title,
                run.member_file(number),
            )
            for number in range(max(config.ensemble.members, self.scale.voters))
        )
        normalize = next(module for module in build_resnet(config, images).modules() if isinstance(module, Normalize))
        system.std = float(normalize.std.mean())
        return system

    @staticmethod
    def _begin(run: Run) -> None:
        """Make a run's folder; its configuration follows the last call's, which may have another vote."""
        if not run.config_file.is_file() or Run.open(run.folder).config != run.config:
            run.write_config()
        if not run.environment_file.is_file():
            run.write_environment()

    # --- results ---------------------------------------------------------------------------------------------

    def done(self, piece: Piece) -> bool:
        """Whether the result of a piece is there."""
        return self.store.has(piece.name) and (piece.file is None or piece.file.is_file())

    def read(self, piece: Piece) -> dict[str, Tensor]:
        """The result of a piece that is done."""
        return self.store.read(piece.name)

    def state(self, piece: Piece) -> Path:
        """A folder for what a piece keeps until it is done."""
        return self.store.folder / f"{piece.name}.state"

    def do(self, piece: Piece) -> float:
        """Do a piece of work, and keep its result; gives the seconds that it took."""
        begun = time.monotonic()
        tensors = piece.make()
        seconds = time.monotonic() - begun
        record = {
            "kind": piece.kind,
            "title": piece.title,
            "seed": self.scale.seed,
            "inputs": {**piece.inputs, "needs": [need.name for need in piece.needs]},
            "seconds": round(seconds, 3),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": str(self.device),
        }
        self.store.write(piece.name, tensors, record)
        shutil.rmtree(self.state(piece), ignore_errors=True)
        return seconds


def split_digest(split: Split) -> str:
    """SHA-256 of a split: pixels and labels; of files too large for memory their names and sizes."""
    digest = hashlib.sha256(split.labels.numpy().tobytes())
    names = torch.arange(len(split), device="cpu") if split.names is None else split.names
    digest.update(names.numpy().tobytes())
    pixels = getattr(split, "pixels", None)
    if pixels is not None:
        digest.update(repr(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes())
    for file in getattr(split, "files", ()):
        digest.update(f"{file.parent.name}/{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def sde_inputs(config: Config) -> dict[str, Any]:
    """The settings of the SDE that name a result; noise of the image only where there is some, as before it existed."""
    return config.sde.model_dump(mode="json", exclude=None if config.sde.input_sigma else {"input_sigma"})


def fit_inputs(fit: Fit) -> dict[str, Any]:
    """The settings of a training that name a result; the newer ones only where they do something, as above."""
    newer = ("adversary", "awp", "average", "held_out", "consistency", "precision")
    idle = {name for name in newer if getattr(fit, name) == Fit.model_fields[name].default}
    return fit.model_dump(mode="json", exclude=idle)


def _weights_digest(config: Config) -> str | None:
    """A digest of the user's weights; torchvision's are told by their name."""
    weights = config.network.weights
    if weights is None or not Path(weights).is_file():
        return weights
    return hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:16]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
