"""Five models for the zoo made of a ResNet-20 that somebody else trained on CIFAR-10: two sound, three masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import After, Hard, Normal, Winners, chain, honest, quantised

import neuralsde_ito as ito


@dataclass(frozen=True)
class ResNet20:
    """Where things lie.

    Attributes:
        data: a folder of images, ``train/CLASS/*`` and ``test/CLASS/*``.
        weights: of the ResNet-20.
        run: a run with a member that was fine-tuned at omega 1.
        cache: the folder for fine-tuned weights.
    """

    ranges: ClassVar = {"linf": (0.001, 0.03), "l2": (0.03, 1.0)}  # where radii are looked for
    data: Path
    weights: Path
    run: Path
    cache: Path

    @cached_property
    def splits(self) -> ito.data.Dataset:
        return ito.load_data("imagefolder", self.data, train_limit=4000, test_limit=500)

    def images(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` of 500 test images and their labels."""
        test = self.splits.test.first(n)
        return test.pixels.float() / 255, test.labels

    def plain(self) -> nn.Sequential:
        return ito.load_resnet("resnet20", self.weights)

    def models(self) -> dict[str, tuple[bool, bool, Callable[[], nn.Module]]]:
        """By name: whether it is masked, whether it is randomised, and how to make it."""
        return {
            "ResNet-20": (False, False, self.plain),
            "Itô, omega 1": (False, True, lambda: ito.Run.open(self.run).ensemble()),
            "noise over 8 levels": (True, True, lambda: self.tuned("noise", self.noisy_levels())),
            "logits x 1e4": (True, False, lambda: chain(self.plain(), After(lambda z: 1e4 * z)).eval()),
            "k-WTA": (True, False, lambda: self.tuned("kwta", with_winners(self.plain(), 0.2))),
        }

    def noisy_levels(self) -> nn.Module:
        """Noise on the images, then 8 levels a channel."""
        return chain(Normal(0.03), Hard(quantised(8)), self.plain())

    def tuned(self, name: str, model: nn.Module, epochs: int = 1) -> nn.Module:
        """The model fine-tuned along honest gradients, in eval mode."""
        file = self.cache / f"resnet20-{name}.pt"
        if not file.exists():
            teacher, pixels, labels = honest(model).train(), self.splits.train.pixels, self.splits.train.labels
            torch.manual_seed(0)
            steps = epochs * len(pixels) // 64
            optimizer = torch.optim.SGD(teacher.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, steps)
            for _ in range(steps):
                rows = torch.randint(len(pixels), (64,))
                x = pixels[rows].float() / 255
                x = x.flip(3) if torch.rand(()) < 0.5 else x
                optimizer.zero_grad()
                F.cross_entropy(teacher(x), labels[rows]).backward()
                optimizer.step()
                schedule.step()
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(teacher.state_dict(), file)
        model.load_state_dict(torch.load(file))
        return model.eval()


def with_winners(net: nn.Module, share: float) -> nn.Module:
    """A copy of the network in which the largest ``share`` of the activations pass instead of those above 0."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, Winners(share))
    return net
