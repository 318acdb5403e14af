"""A run: a folder with a configuration, the networks that were trained as it says, and their results.

A run is found and its configuration is read without torch, which takes seconds to import: methods that need it import
it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ..files import write_atomically
from ..validation import ItoError, nearest, shown, whole_number
from .config import Config, Fit, differing_keys, load_config

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data import Dataset
    from ..models.ensemble import ItoEnsemble
    from ..models.recast import ItoResNet
    from .training import Callbacks

CONFIG = "config.yaml"  # a folder that holds this file is a run
_STATE = ".state.pt"  # the ending of a training's state, beside the weights to come
_OLD_STATE = "state.pt"  # of earlier versions, one for all trainings of a run


@dataclass(frozen=True)
class Run:
    """A run's folder and its configuration.

    =============================  ================================================================================
    file                           content
    =============================  ================================================================================
    ``config.yaml``                the resolved configuration
    ``environment.json``           versions and machine at the start of the training
    ``images.json``                names of the classes and shape of the images; not in runs of earlier versions
    ``metrics.jsonl``              one row of training metrics for each epoch, of all trainings
    ``metrics/*.jsonl``            the same rows, one file for each training: ``resnet``, ``00``, ``01``, ...
    ``resnet.safetensors``         the ResNet from which all members began
    ``members/NN.safetensors``     the fine-tuned members, from 00; weights of plain ResNets
    ``*.state.pt``                 beside the weights to come, the state of their training; deleted when it ends
    ``evaluation.json``, ``.png``  the clean table after training
    ``VERB-NORM-DATE.*``           results of ``ito-sde attack``, ``ito-sde suite`` and ``ito-sde frontier``
    ``suite-DIGEST/``              the state of a suite that has not ended
    ``certify-l2-DATE.*``          certificates of ``ito-sde certify``
    ``certify-DIGEST/``            the state of a certification that has not ended
    =============================  ================================================================================

    Attributes:
        folder: where the files are.
        config: the content of ``config.yaml``.
    """

    folder: Path
    config: Config

    # --- which run ---------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in a folder.

        Raises:
            ItoError: the folder holds no run, or its configuration is damaged.
        """
        folder = Path(folder)
        if not os.path.isfile(folder / CONFIG):
            raise ItoError(f"There is no run in {shown(str(folder))}: it has no {CONFIG}.")
        return cls(folder, load_config(folder / CONFIG))

    @classmethod
    def find(cls, root: str | Path, name: str | None = None, complete: bool = True) -> Run:
        """A run by its name or path, or the newest one in the folder ``root``.

        Args:
            root: the folder of all runs.
            name: name in ``root``, or path; None for the newest.
            complete: whether the newest finished or the newest unfinished run is meant; a named one may be either.

        Raises:
            ItoError: there is none, or its configuration is damaged.
        """
        root = Path(root)
        if name is not None:
            for folder in (root / name, Path(name)):
                if os.path.isfile(folder / CONFIG):
                    return cls.open(folder)
            names = [entry.name for entry in _entries(root) if entry.is_dir()]
            raise ItoError(
                nearest("run", name, names) if names else f"There is no run {shown(name)}; make one: ito-sde train."
            )
        folders = [entry for entry in _entries(root) if os.path.isfile(entry / CONFIG)]
        for folder in sorted(folders, key=lambda entry: (entry / CONFIG).stat().st_mtime, reverse=True):
            try:
                run = cls.open(folder)
            except ItoError:
                if complete:  # a damaged run must not hide a finished one
                    continue
                raise
            if run.is_complete == complete:
                return run
        kind = "finished" if complete else "unfinished"
        raise ItoError(f"There is no {kind} run in {shown(str(root))}; make one: ito-sde train.")

    @classmethod
    def create(cls, folder: str | Path, config: Config, overwrite: bool = False) -> Run:
        """A new run: its folder with the configuration and the environment.

        Args:
            folder: where; the caller may take `new_run_name`.
            config: the resolved configuration.
            overwrite: replace a run that is there; else the folder must be empty or not exist.

        Raises:
            ItoError: the folder is not empty, or is a file.
        """
        folder = Path(folder)
        run = cls(folder, config)
        cls.check_new(folder, overwrite)
        if folder.exists() and any(folder.iterdir()):
            (folder / _OLD_STATE).unlink(missing_ok=True)
            run.metrics_file.unlink(missing_ok=True)
            run.resnet_file.unlink(missing_ok=True)
            run.images_file.unlink(missing_ok=True)
            run.resnet_file.with_suffix(_STATE).unlink(missing_ok=True)
            for pattern in ("members/*.safetensors", f"members/*{_STATE}", "metrics/*.jsonl"):
                for file in folder.glob(pattern):
                    file.unlink()
        run.write_config()
        run.write_environment()
        return run

    @staticmethod
    def check_new(folder: Path, overwrite: bool = False) -> None:
        """Refuse a folder for a new run.

        Args:
            folder: where.
            overwrite: whether it may hold a run.

        Raises:
            ItoError: it is not empty, or is a file.
        """
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise ItoError(f"{shown(str(folder))} is a file, not a folder; give another --run.")
        if not overwrite and _entries(folder):
            raise ItoError(f"The folder {str(folder)!r} is not empty; give --resume, --overwrite or another --run.")

    def check_config(self, config: Config) -> None:
        """Refuse to go on with this run under another configuration.

        Raises:
            ItoError: it names the keys in which the two differ.
        """
        if differing := differing_keys(self.config, config):
            raise ItoError(
                f"The run {str(self.folder)!r} has another configuration; it differs in: {', '.join(differing)}. "
                "Resume it without these options, or train under another name."
            )

    # --- its files ---------------------------------------------------------------------------------------

    @property
    def config_file(self) -> Path:
        """``config.yaml``."""
        return self.folder / CONFIG

    @property
    def environment_file(self) -> Path:
        """``environment.json``."""
        return self.folder / "environment.json"

    @property
    def images_file(self) -> Path:
        """``images.json``."""
        return self.folder / "images.json"

    @property
    def metrics_file(self) -> Path:
        """``metrics.jsonl``."""
        return self.folder / "metrics.jsonl"

    @property
    def resnet_file(self) -> Path:
        """``resnet.safetensors``."""
        return self.folder / "resnet.safetensors"

    def member_file(self, member: int) -> Path:
        """``members/NN.safetensors``; members count from 0."""
        return self.folder / "members" / f"{member:02d}.safetensors"

    @property
    def member_files(self) -> list[Path]:
        """The files of all members that the configuration asks for, whether they exist or not."""
        return [self.member_file(m) for m in range(self.config.ensemble.members)]

    @property
    def evaluation_file(self) -> Path:
        """``evaluation.json``; the picture beside it ends in ``.png``."""
        return self.folder / "evaluation.json"

    def result_file(self, verb: str, norm: str, ending: str = ".json") -> Path:
        """A new file for a result, named by verb, norm, date and time: ``attack-linf-20260131-235959.json``."""
        return self.folder / f"{verb}-{norm}-{datetime.now():%Y%m%d-%H%M%S}{ending}"

    @property
    def is_complete(self) -> bool:
        """Whether the training has ended: the ResNet and all members exist."""
        return all(file.is_file() for file in (self.resnet_file, *self.member_files))

    def write_config(self) -> None:
        """Write ``config.yaml``. From then on the folder is a run."""
        write_atomically(self.config_file, self.config.to_yaml().encode())

    def write_environment(self) -> None:
        """Write ``environment.json``: versions, machine, and the number of threads with which the run trains."""
        write_atomically(self.environment_file, json.dumps(environment(), indent=2).encode())

    def write_images(self, data: Dataset) -> None:
        """Write ``images.json``: what must be known of the data to label a picture without them."""
        content = {"classes": data.classes, "shape": data.image_shape}
        write_atomically(self.images_file, json.dumps(content).encode())

    def images(self) -> tuple[tuple[str, ...], tuple[int, int, int]]:
        """The names of the classes, in the order of the labels, and the shape ``(C, H, W)`` of the images.

        Raises:
            ItoError: ``images.json`` is damaged; or there is none, and the data are missing.
        """
        if not self.images_file.is_file():
            from .build import load_dataset

            data = load_dataset(self.config, train_limit=1, test_limit=1)
            return data.classes, data.image_shape
        try:
            content = json.loads(self.images_file.read_bytes())
            classes = tuple(str(name) for name in content["classes"])
            channels, height, width = (whole_number("shape", size) for size in content["shape"])
        except (ValueError, KeyError, TypeError):  # not JSON, or of something else
            raise ItoError(f"{str(self.images_file)!r} is damaged; delete it.") from None
        return classes, (channels, height, width)

    # --- its networks ------------------------------------------------------------------------------------

    def resnet(self, device: torch.device | str = "cpu") -> nn.Sequential:
        """The ResNet from which the members began.

        Raises:
            ItoError: the run has none.
        """
        from .weights import read_resnet

        if not self.resnet_file.is_file():
            raise ItoError(
                f"The run {str(self.folder)!r} has no {self.resnet_file.name}, the ResNet to compare with; finish its "
                "training, or store it again: save_ensemble(path, ensemble, config, resnet)."
            )
        return read_resnet(self.resnet_file, self.config).to(device)

    def member(self, member: int, device: torch.device | str = "cpu") -> ItoResNet:
        """One member in eval mode, recast as the configuration says."""
        from .build import recast_as
        from .weights import read_resnet

        return recast_as(self.config, read_resnet(self.member_file(member), self.config)).eval().to(device)

    def ensemble(self, device: torch.device | str = "cpu") -> ItoEnsemble:
        """All members in eval mode, with the configuration's vote.

        Raises:
            ItoError: the training has not ended.
        """
        from ..models.ensemble import ItoEnsemble

        self.check_finished()
        voting = self.config.ensemble
        members = [self.member(m, device) for m in range(voting.members)]
        return ItoEnsemble(members, voting.inferences, voting.rule, voting.paths_per_call).eval()

    def check_finished(self) -> None:
        """Refuse a run whose training has not ended.

        Raises:
            ItoError: members are missing.
        """
        missing = sum(not file.is_file() for file in self.member_files)
        if missing:
            raise ItoError(
                f"The run {str(self.folder)!r} has not finished: {missing} of {self.config.ensemble.members} members "
                f"are missing; go on with 'ito-sde train --run {self.folder} --resume'."
            )

    # --- its training ------------------------------------------------------------------------------------

    def train(self, data: Dataset, device: torch.device, **callbacks: Unpack[Callbacks]) -> None:
        """Train what the run does not have yet: the ResNet (unless the configuration gives weights), then each member.

        Args:
            data: the images of `load_dataset`.
            device: where the networks train.
            callbacks: see `Callbacks`.

        Raises:
            Interrupted: ``should_stop`` returned true; the state is saved.
            Diverged: a loss or a weight is not finite.
            ItoError: a file of the run is damaged or missing.
        """
        self.train_resnet(data, device, **callbacks)
        for m in range(self.config.ensemble.members):
            self.train_member(m, data, device, **callbacks)
        self.merge_metrics()

    def train_resnet(self, data: Dataset, device: torch.device, **callbacks: Unpack[Callbacks]) -> None:
        """Train the ResNet, or take the configuration's weights; nothing if the run has it.

        Args and errors are those of `train`.
        """
        from ..models.recast import ItoResNet
        from .build import build_resnet, trained_as
        from .weights import save_weights, to_resnet

        self.write_images(data)
        config, file = self.config, self.resnet_file
        if not file.is_file():
            if any(self.folder.glob("members/*.safetensors")):
                raise ItoError(
                    f"The run {str(self.folder)!r} has members, but not the {file.name} that they began "
                    "as; put it back, or train anew with --overwrite."
                )
            net = build_resnet(config, data).to(device)
            if config.network.weights is None:
                model = trained_as(config, net)
                self._fit(model, data, config.resnet, file, 0, callbacks)
                net = to_resnet(model, net) if isinstance(model, ItoResNet) else net
            save_weights(file, net[-1])
        file.with_suffix(_STATE).unlink(missing_ok=True)

    def train_member(self, member: int, data: Dataset, device: torch.device, **callbacks: Unpack[Callbacks]) -> None:
        """Fine-tune one member, from the run's ResNet; nothing if the run has it.

        Members do not depend on each other: several processes may train different members of a run at the same time,
        in any order.

        Args:
            member: counts from 0; it may be beyond the members of the configuration.
            data, device, callbacks: as in `train`, which also says what is raised; the ResNet must exist.
        """
        from .build import recast_as
        from .weights import save_weights, to_resnet

        file = self.member_file(whole_number("member", member, 0))
        if not file.is_file():
            model = recast_as(self.config, self.resnet()).to(device)
            self._fit(model, data, self.config.finetune, file, member + 1, callbacks)
            save_weights(file, to_resnet(model, self.resnet(device))[-1])
        file.with_suffix(_STATE).unlink(missing_ok=True)

    def _fit(
        self, model: nn.Module, data: Dataset, settings: Fit, file: Path, number: int, callbacks: Callbacks
    ) -> None:
        """Train a network in place, with a state and a file of metrics of its own.

        Args:
            model, data, settings: what is trained, on what, and how.
            file: of the weights to come.
            number: of order and noise: 0 for the ResNet, members count from 1.
            callbacks: of the caller.
        """
        from .training import Trainer

        if (old := self.folder / _OLD_STATE).is_file():
            raise ItoError(
                f"{str(old)!r} is the training state of an earlier version, with which this one cannot go on; delete "
                "it, and resume: what is finished stays, the training that was interrupted begins anew."
            )

        def write_rows() -> None:
            # Written again from the state's rows: a killed run leaves no row of an epoch that it will train again.
            write_atomically(metrics, _lines(trainer.rows))
            self.merge_metrics()

        def on_epoch(row: dict[str, object]) -> None:
            write_rows()
            callbacks.get("on_epoch", _nothing)(row)

        metrics = self.folder / "metrics" / f"{file.stem}.jsonl"
        callbacks.get("on_phase", _nothing)(_phase(file), settings.epochs)
        on_step, should_stop = callbacks.get("on_step", _nothing), callbacks.get("should_stop", _nothing)
        trainer = Trainer(file.with_suffix(_STATE), on_step, on_epoch, should_stop)
        with self._threads():
            trainer.fit(model, data.train, settings, self.config.seed, _phase(file), number)
        write_rows()  # also if the last epoch had ended before a kill

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """As many threads as the process had that made the run.

        On a CPU the last bits of a gradient of weights depend on that number. A run that is resumed with more processes
        has fewer threads in each (torchrun sets ``OMP_NUM_THREADS``), and must end with the same weights.
        """
        import torch

        file, before = self.environment_file, torch.get_num_threads()
        try:
            threads = whole_number("threads", json.loads(file.read_bytes())["threads"]) if file.is_file() else before
        except (ValueError, KeyError, TypeError):  # not JSON, or of something else
            raise ItoError(f"{str(file)!r} is damaged: it has no number of threads; delete it, and resume.") from None
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def merge_metrics(self) -> None:
        """Write ``metrics.jsonl`` from the metrics of each training: the ResNet's first, then the members' in order.

        Several processes may do this at the same time: each reads again after it has written, and writes again if
        another one had written metrics of its training meanwhile. So the last writer has seen them all.

        Raises:
            ItoError: a file of metrics is damaged.
        """
        while True:
            rows = self._all_metrics()
            write_atomically(self.metrics_file, _lines(rows))
            if self._all_metrics() == rows:
                return

    def _all_metrics(self) -> list[dict[str, object]]:
        """The rows of each training. Of one that an earlier version made, they are in ``metrics.jsonl`` alone."""
        trainings: dict[str, list[dict[str, object]]] = {}
        for row in _read_metrics(self.metrics_file):
            trainings.setdefault(str(row["phase"]), []).append(row)
        for file in self.folder.glob("metrics/*.jsonl"):
            trainings[_phase(file)] = _read_metrics(file)
        order = sorted(trainings, key=lambda phase: (phase != "resnet", len(phase), phase))  # member 2 before member 10
        return [row for phase in order for row in trainings[phase]]


def _nothing(*_: object) -> Any:
    """The callback that a caller leaves out."""
    return False


def _phase(file: Path) -> str:
    """What metrics call the training whose files have this name: ``resnet``, or ``member 3``."""
    return f"member {int(file.stem)}" if file.stem.isdecimal() else file.stem


def _lines(rows: list[dict[str, object]]) -> bytes:
    """Rows of metrics as the lines of a file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _read_metrics(file: Path) -> list[dict[str, object]]:
    """The rows of a file of metrics; none if there is no such file."""
    if not file.is_file():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError:  # not JSON, or not text
        rows = [None]
    if not all(isinstance(row, dict) and "phase" in row for row in rows):
        raise ItoError(f"{str(file)!r} is damaged: its lines are not rows of metrics; delete it, and resume.")
    return rows


def load_ensemble(path: str | Path, device: torch.device | str = "cpu") -> tuple[ItoEnsemble, Config]:
    """The ensemble of a run's folder in eval mode, and the run's configuration.

    Raises:
        ItoError: the folder holds no run, or the run's training has not ended.
    """
    run = Run.open(path)
    return run.ensemble(device), run.config


def new_run_name(root: Path, config: Config) -> str:
    """A name that no run in ``root`` has: the configuration's name, date and time."""
    stem = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    name, k = stem, 2
    while os.path.exists(root / name):
        name, k = f"{stem}-{k}", k + 1
    return name


def environment() -> dict[str, object]:
    """Versions and machine, as far as a reader of a result needs them."""
    import torch

    from .. import kernels

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


def _entries(folder: Path) -> list[Path]:
    """What a folder holds; nothing if there is no such folder."""
    if not os.path.isdir(folder):
        return []
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ItoError(f"The folder {shown(str(folder))} cannot be read: {str(error.strerror).lower()}.") from None
