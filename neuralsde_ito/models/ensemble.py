"""Ensembles of Itô networks: members x inferences -> votes -> a label or an abstention (paper, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..modules import ModuleListOf, mixes_images_itself
from ..noise.keys import PathRange, fresh_keys, make_keys
from ..validation import ItoError, image_names, whole_number
from .inference import infer, piece_of, quicken
from .kept import kept
from .recast import ItoResNet
from .voting import Inferences, Voter


class ItoEnsemble(Voter):
    """Itô networks that vote.

    Args:
        members: made by `recast`; usually each is fine-tuned from the same ResNet with noise of its own.
        inferences: how many each member makes for an image.
        rule: how votes become a label, see `decide`.
        paths_per_call: over how many inferences a member one call ``ensemble(x)`` averages.

    Raises:
        ItoError: no members, or no inferences.
    """

    members: ModuleListOf[ItoResNet]
    chunk: int | None = None  # states that run through a member at once; None: what suits the device

    def __init__(
        self,
        members: Iterable[ItoResNet],
        inferences: int = 20,
        rule: str = "hierarchical",
        paths_per_call: int = 4,
    ) -> None:
        super().__init__()
        self.members = cast("ModuleListOf[ItoResNet]", nn.ModuleList(members))
        if not len(self.members):
            raise ItoError("An ensemble needs at least one member, got 0.")
        self._set_vote(inferences, rule)
        self.paths_per_call = whole_number("paths_per_call", paths_per_call)

    @property
    def noisy(self) -> bool:
        """Whether any member has noise, so that two inferences of an image can differ."""
        return any(member.schedule.omega > 0 or member.input_sigma > 0 for member in self.members)

    @property
    def channels(self) -> int | None:
        """Channels of an image, if the stem has a convolution that says so; otherwise None."""
        convs = (m for m in self.members[0].get_submodule("stem").modules() if isinstance(m, nn.Conv2d))
        return next((conv.in_channels for conv in convs), None)

    def forward(self, x: Tensor) -> Tensor:
        """Log mean probability over fresh paths, ``(N, C, H, W) -> (N, classes)``.

        Differentiable: an attack on it attacks the average over ``members * paths_per_call`` paths. In train mode
        every path is a forward pass of its own over the whole batch, because BatchNorm uses the batch's statistics.
        """
        keys = fresh_keys(len(self.members) * self.paths_per_call * len(x), x.device)
        keys = keys.view(len(self.members), self.paths_per_call, len(x))
        logits = torch.cat([self._logits_of(m, x, keys[m]) for m in range(len(self.members))])
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """See `Voter.path_logits`."""
        paths = replace(paths, index=image_names(paths.index, x))
        logits: dict[int, Tensor] = {}  # by position in the range
        for member, positions, keys in paths.by_member(len(self.members)):
            logits.update(zip(positions, self._logits_of(member, x, keys), strict=True))
        return torch.stack([logits[position] for position in range(paths.count)])

    def _logits_of(self, member: int, x: Tensor, keys: Tensor) -> Tensor:
        """Logits ``(P, N, classes)`` of one member along paths ``(P, N)``; the paths' common part is computed once."""
        model = self.members[member]
        if any(module.training or mixes_images_itself(module) for module in model.modules()):
            return torch.stack([model(x, path) for path in keys])
        if not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in model.parameters()))):
            rows = torch.arange(len(x), device=x.device).repeat(len(keys))
            return infer(model, x, rows, keys.flatten(), self.chunk).unflatten(0, keys.shape)
        size = self.chunk or piece_of(model, x)
        groups = keys.split(max(1, size // max(1, len(x))))  # (p, N) each: p paths go through at a time
        if not model.splits_at_noise:
            return torch.cat([model(x.repeat(len(g), 1, 1, 1), g.flatten()).unflatten(0, g.shape) for g in groups])
        state = model.before_noise(x)
        return torch.cat([model.along_paths(state, group) for group in groups])

    def quick(self, x: Tensor | None = None) -> ItoEnsemble:
        """A frozen copy with members made by `quicken`: for inference, and for gradients of the input.

        Args:
            x: images ``(N, C, H, W)``, on which the copies are compared with the members; default random ones.
        """
        members = [quicken(member, x) for member in self.members]
        quick = ItoEnsemble(members, self.inferences, self.rule, self.paths_per_call)
        quick.chunk = self.chunk
        return quick

    def _begin(self, x: Tensor, seed: int, purpose: str, index: Tensor) -> tuple[int, list[Inferences]]:
        quick, classes = kept(self, x, self._quick_and_classes)

        def inferences(m: int, images: Tensor, rows: Tensor, numbers: Tensor) -> Tensor:
            keys = make_keys(seed, purpose, m, numbers, index[images[rows]])
            return infer(quick.members[m], x[images], rows, keys, self.chunk)

        return classes, [partial(inferences, m) for m in range(len(self.members))]

    def _quick_and_classes(self, x: Tensor) -> tuple[ItoEnsemble, int]:
        """The quick copy for images like ``x``, and how many classes it tells apart."""
        quick, two = self.quick(x), torch.arange(2, device=x.device)
        return quick, quick.members[0](x[:1].repeat(2, 1, 1, 1), make_keys(0, "selection", index=two)).shape[1]


class NoiseFree(nn.Module):
    """The ensemble without its noise: log mean probability of the members' noise-free networks."""

    def __init__(self, ensemble: ItoEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble  # tells `as_called` that this is one of our models, to be run in eval mode
        self.bases = nn.ModuleList([member.base for member in ensemble.members])

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        logits = torch.stack([base(x) for base in self.bases])
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(self.bases))
