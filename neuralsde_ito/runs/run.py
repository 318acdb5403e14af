"""From a configuration to data, networks and a finished run; everything that touches a run's folder."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from .. import kernels
from ..data import Dataset, load_data
from ..files import write_atomically
from ..models.resnets import load_resnet
from ..validation import ItoError, nearest, shown
from .config import Config, differing_keys
from .saving import RESNET, load_base, member_path, read_config, recast_as, save_weights, to_resnet
from .training import Trainer


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` (CUDA, then MPS, then CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        ItoError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ItoError(f"Unknown device {shown(name)}. Known: auto, cpu, cuda, cuda:N, mps.") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        here = [kind if n == 1 else f"{kind}:0..{n - 1}" for kind, n in count.items() if n]
        raise ItoError(f"There is no device {shown(name)} here. There is: {', '.join(here)}.")
    return device


def load_dataset(config: Config, train_limit: int | None = None, test_limit: int | None = None) -> Dataset:
    """The data of a configuration; limits given here come before its own."""
    data = config.data
    return load_data(
        data.name,
        data.path,
        data.size,
        data.augment,
        train_limit or data.train_limit,
        test_limit or data.test_limit,
    )


def with_image_size(config: Config, data: Dataset) -> Config:
    """The configuration with the size that a folder's first image gave; a run keeps it, whatever the folder becomes."""
    if config.data.name != "imagefolder":
        return config
    size = config.data.model_copy(update={"size": data.image_shape[1]})
    return config.model_copy(update={"data": size})


def build_resnet(config: Config, data: Dataset) -> nn.Sequential:
    """The ResNet that a run starts from: from ``network.weights``, or at random from the seed."""
    network = config.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return load_resnet(
            network.arch, network.weights, len(data.classes), data.image_shape[0], network.mean, network.std
        )


def prepare_run(folder: Path, config: Config, resume: bool, overwrite: bool) -> None:
    """Make a run's folder, or check that an existing one is to be gone on with.

    Raises:
        ItoError: the folder holds something, or another configuration than the one to resume.
    """
    if resume:
        if differing := differing_keys(read_config(folder), config):
            raise ItoError(
                f"The run {str(folder)!r} has another configuration; it differs in: {', '.join(differing)}. "
                "Resume it without these options, or train under another name."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise ItoError(f"The folder {str(folder)!r} is not empty; give --resume, --overwrite or another --run.")
        for name in ("state.pt", "metrics.jsonl", RESNET):
            (folder / name).unlink(missing_ok=True)
        for member in (folder / "members").glob("*.safetensors"):
            member.unlink()
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=2).encode())


def environment() -> dict[str, object]:
    """Versions and machine, as far as a reader of the numbers needs them."""
    packages = ("ito-sde", "torch", "torchvision", "torchsde", "torchdiffeq", "numpy", "scipy")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "noise": "tensors" if kernels.library is None else "compiled",  # on a CPU; alike but for the last bits
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in packages},
    }


def train_run(
    folder: Path,
    config: Config,
    data: Dataset,
    device: torch.device,
    on_phase: Callable[[str, int], None] = lambda phase, epochs: None,
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
    on_epoch: Callable[[dict[str, object]], None] = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train whatever of a run is not yet there: the ResNet (unless weights are given), then every member.

    Raises:
        Interrupted: `should_stop` said so; the state is saved.
        ItoError: weights that do not fit.
    """
    metrics = folder / "metrics.jsonl"

    def write_metrics() -> None:
        # Rewritten from the state's rows: a killed run leaves no row of an epoch that it will train again.
        write_atomically(metrics, "".join(json.dumps(row) + "\n" for row in trainer.rows).encode())

    def log(row: dict[str, object]) -> None:
        write_metrics()
        on_epoch(row)

    rows = _read_metrics(metrics) if metrics.is_file() else []
    trainer = Trainer(folder / "state.pt", on_step, log, should_stop, rows=rows)
    base_file = folder / RESNET
    if not base_file.is_file():
        if any(member_path(folder, m).is_file() for m in range(config.ensemble.members)):
            raise ItoError(
                f"The run {str(folder)!r} has members, but not the {RESNET} that they began as; put it back, or "
                "train anew with --overwrite."
            )
        net = build_resnet(config, data).to(device)
        if config.network.weights is None:
            on_phase("resnet", config.resnet.epochs)
            trainer.fit(net, data.train, config.resnet, config.seed, "resnet")
        save_weights(base_file, net[-1])
    for m in range(config.ensemble.members):
        if member_path(folder, m).is_file():
            continue
        on_phase(f"member {m}", config.finetune.epochs)
        model = recast_as(config, load_base(folder, config)).to(device)
        trainer.fit(model, data.train, config.finetune, config.seed, f"member {m}", member=m + 1)
        save_weights(member_path(folder, m), to_resnet(model, load_base(folder, config, device))[-1])
    write_metrics()
    (folder / "state.pt").unlink(missing_ok=True)


def _read_metrics(file: Path) -> list[dict[str, object]]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError:  # not JSON, or not text
        rows = [None]
    if not all(isinstance(row, dict) and "phase" in row for row in rows):
        raise ItoError(f"{str(file)!r} is damaged: its lines are not rows of metrics; delete it, and resume.")
    return rows


def is_complete(folder: Path) -> bool:
    """Whether a run has all that the verbs read: configuration, ResNet and members."""
    try:
        members = read_config(folder).ensemble.members
    except ItoError:  # none, or a damaged one
        return False
    return all(file.is_file() for file in (folder / RESNET, *(member_path(folder, m) for m in range(members))))


def find_run(root: Path, name: str | None, complete: bool = True) -> Path:
    """A run by name or path, or the newest one under ``root``.

    Raises:
        ItoError: there is none.
    """
    if name is not None:
        for folder in (root / name, Path(name)):
            if os.path.isfile(folder / "config.yaml"):
                return folder
        runs = [entry.name for entry in _entries(root) if entry.is_dir()]
        raise ItoError(
            nearest("run", name, runs) if runs else f"There is no run {shown(name)}; make one: ito-sde train."
        )
    runs_here = [entry for entry in _entries(root) if os.path.isfile(entry / "config.yaml")]
    fitting = [entry for entry in runs_here if is_complete(entry) == complete]
    if not fitting:
        kind = "finished" if complete else "unfinished"
        raise ItoError(f"There is no {kind} run in {shown(str(root))}; make one: ito-sde train.")
    return max(fitting, key=lambda entry: (entry / "config.yaml").stat().st_mtime)


def _entries(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):
        return []
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ItoError(f"The folder {shown(str(folder))} cannot be read: {str(error.strerror).lower()}.") from None


def new_run_name(root: Path, config: Config) -> str:
    """A name that no run has yet: the configuration's, date and time."""
    stem = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    name, k = stem, 2
    while os.path.exists(root / name):
        name, k = f"{stem}-{k}", k + 1
    return name


def command_line() -> str:
    """The command as it was typed, for the record beside a result; bytes that are not UTF-8 are spelled out."""
    return " ".join(["ito-sde", *sys.argv[1:]]).encode(errors="backslashreplace").decode()
