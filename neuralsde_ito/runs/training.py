"""Training a network, noise-free or as an SDE: one loop, which can be left and taken up again at any step.

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
    """Training was asked to stop; its state is saved."""


class Diverged(RuntimeError):
    """A loss or a weight is not finite: the settings do not train this network."""


@dataclass
class Trainer:
    """What surrounds the loop: where its state goes, and who is told.

    Attributes:
        state_file: training state, replaced as a whole; written after every epoch and every ``save_every`` seconds.
        on_step: called with (epoch, step, steps) after each step.
        on_epoch: called with one row of metrics after each epoch.
        should_stop: asked after each step; if true the state is saved and `Interrupted` raised.
    """

    state_file: Path
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None
    on_epoch: Callable[[dict[str, object]], None] = lambda row: None
    should_stop: Callable[[], bool] = lambda: False
    save_every: float = 30.0
    rows: list[dict[str, object]] = field(default_factory=list)

    def fit(self, model: nn.Module, data: Split, settings: Fit, seed: int, phase: str, member: int = 0) -> None:
        """Train in place; goes on from ``state_file`` where that holds a state of this phase.

        Everything random is a pure function of (seed, member, epoch, image): the order, the augmentation and
        the noise. So the state is weights, optimiser and position, and a run that was killed ends with the
        same weights as one that was not.

        Args:
            model: any network, or an `ItoResNet`, which then gets an addressed path an image and epoch.
            data: the training images; a last batch of one image joins the one before it (`batch_bounds`).
            settings: epochs, optimiser, learning rate.
            seed, member: of order and noise.
            phase: name of this training in metrics and state.

        Raises:
            Interrupted: `should_stop` said so.
            ItoError: ``state_file`` is damaged, or BatchNorm cannot normalise a batch of one image.
            Diverged: the loss or a weight is not finite.
        """
        device = next(model.parameters()).device
        optimizer = _optimizer(model, settings)
        steps = len(batch_bounds(len(data), settings.batch_size, training=True))
        double = torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have
        totals = torch.zeros(2, dtype=double, device=device)  # summed loss, correct images
        epoch, step = 0, 0
        if (state := self._restore(phase, model, optimizer)) is not None:
            epoch, step, totals = state["epoch"], state["step"], state["totals"].to(device)
            if step >= steps:
                raise ItoError(
                    f"The training state {str(self.state_file)!r} is {step} batches into an epoch of {steps}: the data "
                    "have changed since; delete it, and resume."
                )
        else:  # an attempt whose state was lost may have written rows
            self.rows[:] = [row for row in self.rows if row["phase"] != phase]
        saved = time.monotonic()
        order = member_seed(seed, member)
        while epoch < settings.epochs:
            model.train()
            for index, x, y in data.batches(settings.batch_size, device, (order, epoch), skip=step):
                rate = learning_rate(settings, epoch * steps + step, settings.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    keys = make_keys(seed, "train", member, epoch, index)
                    try:
                        logits = model(x, keys) if isinstance(model, ItoResNet) else model(x)
                    except ValueError as error:
                        if len(y) > 1 or isinstance(error, ItoError):
                            raise
                        raise ItoError(
                            f"A batch of one image is too small ({error}); use more images or a larger batch_size."
                        ) from error
                    loss = F.cross_entropy(logits.float(), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                # Summed on the device: reading a number here would make the GPU wait for the host.
                totals += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()]).to(double)
                step += 1
                self.on_step(epoch, step, steps)
                if step < steps and (self.should_stop() or time.monotonic() - saved > self.save_every):
                    self._save(phase, model, optimizer, epoch, step, totals)
                    saved = time.monotonic()
                    if self.should_stop():
                        raise Interrupted
            mean_loss, accuracy = (totals / len(data)).tolist()
            if not math.isfinite(mean_loss):
                raise Diverged(
                    f"Training {phase} diverged in epoch {epoch + 1}: the loss is {mean_loss}; "
                    f"lower lr ({settings.lr}) or omega."
                )
            if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
                raise Diverged(
                    f"Training {phase} diverged in epoch {epoch + 1}: a weight is not finite; "
                    f"lower lr ({settings.lr}) or omega."
                )
            row: dict[str, object] = {
                "phase": phase,
                "epoch": epoch + 1,
                "loss": mean_loss,
                "accuracy": accuracy,
                "lr": rate,
            }
            self.rows.append(row)
            epoch, step = epoch + 1, 0
            totals = torch.zeros_like(totals)
            self._save(phase, model, optimizer, epoch, step, totals)
            saved = time.monotonic()
            self.on_epoch(row)
            if self.should_stop():
                raise Interrupted
        model.eval()

    def _save(
        self,
        phase: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        step: int,
        totals: Tensor,
    ) -> None:
        buffer = io.BytesIO()
        state = {
            "phase": phase,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
            "step": step,
            "totals": totals,
            "rows": self.rows,
        }
        torch.save(state, buffer)
        write_atomically(self.state_file, buffer.getvalue())

    def _restore(self, phase: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
        """The rows of all phases so far; of this phase also weights, optimiser and position, None if it begins."""
        if not self.state_file.is_file():
            return None
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            self.rows[:] = state["rows"]
            if state["phase"] != phase:
                return None
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return {name: state[name] for name in ("epoch", "step", "totals")}
        except Exception as error:  # a damaged file can fail in any way
            raise ItoError(
                f"The training state {str(self.state_file)!r} cannot be read, or is of another network; delete it, and "
                f"resume: what is finished stays, {phase!r} begins anew."
            ) from error


def learning_rate(settings: Fit, step: int, total: int) -> float:
    """The rate at a step: constant, or up over the first fifth and down to zero in straight lines."""
    if settings.decay == "constant" or total < 2:
        return settings.lr
    peak = max(1, total // 5)
    return settings.lr * min((step + 1) / peak, (total - step) / (total - peak))


def member_seed(seed: int, member: int) -> int:
    """A member's own seed for the order of images and for augmentation."""
    return int(np.random.SeedSequence([seed, member]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _optimizer(model: nn.Module, settings: Fit) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(parameters, settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)
