"""Training a network, noise-free or as an SDE: one loop that can stop at any step and go on later.

The paper's recipe (section 4): every member starts from the ResNet's weights and trains 40 epochs with
Adam at a learning rate of 1e-4, through the SDE.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Split, batch_bounds
from ..files import write_atomically
from ..models.recast import ItoResNet
from ..noise.keys import make_keys
from ..validation import ItoError
from .config import Fit


class Interrupted(Exception):
    """The caller asked the training to stop; its state is saved."""


class Callbacks(TypedDict, total=False):
    """What a training of a run calls; each may be left out.

    Attributes:
        on_phase: with the name of a training and its number of epochs, before it begins.
        on_step, on_epoch, should_stop: see `Trainer`.
    """

    on_phase: Callable[[str, int], None]
    on_step: Callable[[int, int, int], None]
    on_epoch: Callable[[dict[str, object]], None]
    should_stop: Callable[[], bool]


class Diverged(RuntimeError):
    """A loss or a weight is not finite: the network cannot be trained with these settings."""


@dataclass
class _Training:
    """The training of one network, and how far it is.

    Attributes:
        name: the phase that metrics and state name.
        model, optimizer: on one device.
        totals: ``(2,)``, the loss of this epoch's images and the number of correct ones, both as sums.
        epoch, step: finished epochs, and finished steps of the current epoch.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    totals: Tensor
    epoch: int = 0
    step: int = 0

    def train_on(self, x: Tensor, y: Tensor, keys: Tensor, rate: float) -> None:
        """One step of the optimizer on a batch of images."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            try:
                logits = self.model(x, keys) if isinstance(self.model, ItoResNet) else self.model(x)
            except ValueError as error:
                if len(y) > 1 or isinstance(error, ItoError):
                    raise
                raise ItoError(
                    f"A batch of one image is too small ({error}); use more images or a larger batch_size."
                ) from error
            loss = F.cross_entropy(logits.float(), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        # Summed on the device: to read a number here would make the GPU wait for the host.
        sums = torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
        self.totals += sums.to(self.totals.dtype)
        self.step += 1

    def end_epoch(self, images: int, lr: float, rate: float) -> dict[str, object]:
        """Begin the next epoch; the row of metrics of the one that ended.

        Args:
            images: images of an epoch.
            lr: the learning rate of the settings, for messages.
            rate: the learning rate of the last step.

        Raises:
            Diverged: the mean loss or a weight is not finite.
        """
        loss, accuracy = (self.totals / images).tolist()
        finite = all(bool(value.isfinite().all()) for value in self.model.state_dict().values())
        if not math.isfinite(loss) or not finite:
            what = "a weight is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise Diverged(
                f"Training {self.name} diverged in epoch {self.epoch + 1}: {what}; lower lr ({lr}) or omega."
            )
        self.epoch, self.step = self.epoch + 1, 0
        self.totals = torch.zeros_like(self.totals)
        return {"phase": self.name, "epoch": self.epoch, "loss": loss, "accuracy": accuracy, "lr": rate}


@dataclass
class Trainer:
    """Trains one network, and saves its state so that a later call goes on from there.

    Attributes:
        state_file: the training state, replaced as a whole after every epoch and every ``save_every`` seconds.
        on_step: called with (epoch, step, steps) after each step.
        on_epoch: called with one row of metrics after each epoch.
        should_stop: called after each step; if it returns true, the state is saved and `Interrupted` raised.
        save_every: seconds.
        rows: the rows of metrics of the training so far.
    """

    state_file: Path
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None
    on_epoch: Callable[[dict[str, object]], None] = lambda row: None
    should_stop: Callable[[], bool] = lambda: False
    save_every: float = 30.0
    rows: list[dict[str, object]] = field(default_factory=list)

    def fit(self, model: nn.Module, data: Split, settings: Fit, seed: int, phase: str, member: int = 0) -> None:
        """Train in place. Goes on from ``state_file`` if there is one.

        Everything random is a pure function of (seed, member, epoch, image): the order, the augmentation and
        the noise. So the state is weights, optimizer and position, and a run that was killed ends with the
        same weights as one that was not.

        Args:
            model: any network; an `ItoResNet` gets an addressed path for each image and epoch.
            data: the training images; a last batch of one image joins the one before it (`batch_bounds`).
            settings: epochs, optimizer, learning rate.
            seed, member: of order and noise.
            phase: name of this training in metrics and state.

        Raises:
            Interrupted: ``should_stop`` returned true.
            ItoError: ``state_file`` is damaged or of another training, or BatchNorm cannot normalise a batch of one
                image.
            Diverged: the loss or a weight is not finite.
        """
        device = next(model.parameters()).device
        steps = len(batch_bounds(len(data), settings.batch_size, training=True))
        double = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        training = _Training(phase, model, _optimizer(model, settings), torch.zeros(2, dtype=double, device=device))
        self._restore(training, steps)
        saved = time.monotonic()
        order = member_seed(seed, member)
        while training.epoch < settings.epochs:
            model.train()
            for index, x, y in data.batches(settings.batch_size, device, (order, training.epoch), skip=training.step):
                rate = learning_rate(settings, training.epoch * steps + training.step, settings.epochs * steps)
                training.train_on(x, y, make_keys(seed, "train", member, training.epoch, index), rate)
                self.on_step(training.epoch, training.step, steps)
                if training.step < steps and (self.should_stop() or time.monotonic() - saved > self.save_every):
                    self._save(training)
                    saved = time.monotonic()
                    if self.should_stop():
                        raise Interrupted
            row = training.end_epoch(len(data), settings.lr, rate)
            self.rows.append(row)
            self._save(training)
            saved = time.monotonic()
            self.on_epoch(row)
            if self.should_stop():
                raise Interrupted
        model.eval()

    def _save(self, training: _Training) -> None:
        """Write the state of a training, with its rows."""
        buffer = io.BytesIO()
        state = {
            "phase": training.name,
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "epoch": training.epoch,
            "step": training.step,
            "totals": training.totals,
            "rows": self.rows,
        }
        torch.save(state, buffer)
        write_atomically(self.state_file, buffer.getvalue())

    def _restore(self, training: _Training, steps: int) -> None:
        """If the training had begun, read its rows, weights, optimizer and position.

        Args:
            training: the training, as it begins; changed in place.
            steps: steps of an epoch.
        """
        self.rows.clear()
        if not self.state_file.is_file():
            return
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            if state["phase"] != training.name:
                raise ValueError(f"a state of {state['phase']}")
            training.model.load_state_dict(state["model"])
            training.optimizer.load_state_dict(state["optimizer"])
            self.rows.extend(state["rows"])
            training.epoch, training.step = state["epoch"], state["step"]
            training.totals = state["totals"].to(training.totals.device)
        except Exception as error:  # a damaged file can fail in any way
            raise ItoError(
                f"The training state {str(self.state_file)!r} cannot be read, or is of another network; delete it, and "
                f"resume: what is finished stays, {training.name!r} begins anew."
            ) from error
        if training.step >= steps:
            raise ItoError(
                f"The training state {str(self.state_file)!r} is {training.step} batches into an epoch of {steps}: "
                "the data have changed since; delete it, and resume."
            )


def learning_rate(settings: Fit, step: int, total: int) -> float:
    """The learning rate at a step: constant, or linear up over the first fifth and linear down to zero.

    Args:
        settings: rate and decay.
        step: from 0.
        total: steps of the whole training.
    """
    if settings.decay == "constant" or total < 2:
        return settings.lr
    peak = max(1, total // 5)
    return settings.lr * min((step + 1) / peak, (total - step) / (total - peak))


def member_seed(seed: int, member: int) -> int:
    """A seed below 2**63 for a member's order of images and augmentation; members count from 1, the ResNet is 0."""
    return int(np.random.SeedSequence([seed, member]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _optimizer(model: nn.Module, settings: Fit) -> torch.optim.Optimizer:
    """The optimizer of the settings for all weights that take gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(parameters, settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)
