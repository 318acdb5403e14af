"""Ensembles of Itô networks: members x inferences -> votes -> a label or an abstention (paper, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .data import check_images
from .names import nearest
from .noise import fresh_keys, make_keys
from .outcomes import ABSTAIN
from .recast import ItoResNet

RULES = ("hierarchical", "flat")


@dataclass(frozen=True)
class Prediction:
    """What an ensemble says of ``N`` images.

    Attributes:
        labels: int64 ``(N,)``, `ABSTAIN` where there is no majority.
        votes: int64 ``(members, N, classes)``, inferences for each class.
        drawn: int64 ``(N,)``, inferences made for each image.
    """

    labels: Tensor
    votes: Tensor
    drawn: Tensor


def decide(votes: Tensor, rule: str = "hierarchical") -> Tensor:
    """Labels ``(N,)`` from votes ``(members, N, classes)``; `ABSTAIN` without a strict majority.

    - ``hierarchical``: a member's label is that of more than half of its inferences, else it has none; the
      label of more than half of all members wins.
    - ``flat``: the label of more than half of all inferences wins. The paper leaves open which it means.
    """
    if rule == "flat":
        votes = votes.sum(0, keepdim=True)
    elif rule != "hierarchical":
        raise ValueError(nearest("rule", rule, RULES))
    most, labels = votes.max(-1)  # both (members, N)
    labels = torch.where(2 * most > votes.sum(-1), labels, ABSTAIN)
    ballots = torch.stack([(labels == c).sum(0) for c in range(votes.shape[-1])], -1)  # (N, classes)
    most, winner = ballots.max(-1)
    return torch.where(2 * most > len(votes), winner, ABSTAIN)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class ItoEnsemble(nn.Module):
    """Itô networks that vote.

    Args:
        members: made by `recast`, usually each fine-tuned from the same ResNet with noise of its own.
        inferences: of each member for each image.
        rule: how votes become a label, see `decide`.
        paths_per_call: inferences a member that one call ``ensemble(x)`` averages.

    Raises:
        ValueError: no members, or no inferences.
    """

    chunk = 512  # states that run through a member at once

    def __init__(
        self,
        members: Iterable[ItoResNet],
        inferences: int = 20,
        rule: str = "hierarchical",
        paths_per_call: int = 4,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not len(self.members):
            raise ValueError("An ensemble needs at least one member, got 0.")
        for name, count in (("inferences", inferences), ("paths_per_call", paths_per_call)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
        if rule not in RULES:
            raise ValueError(nearest("rule", rule, RULES))
        self.inferences, self.rule, self.paths_per_call = inferences, rule, paths_per_call

    @property
    def channels(self) -> int | None:
        """Channels of an image, where the stem has a convolution to tell."""
        convs = (m for m in self.members[0].get_submodule("stem").modules() if isinstance(m, nn.Conv2d))
        return next((conv.in_channels for conv in convs), None)

    def forward(self, x: Tensor) -> Tensor:
        """Log mean probability over fresh paths, ``(N, C, H, W) -> (N, classes)``.

        Differentiable; whoever attacks it attacks the average over ``members * paths_per_call`` paths.
        """
        keys = fresh_keys(len(self.members) * self.paths_per_call * len(x), x.device)
        keys = rearrange(keys, "(m p n) -> m p n", m=len(self.members), n=len(x))
        logits = torch.cat([self._infer(m, x, keys[m]) for m in range(len(self.members))])
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))

    def paths(self, x: Tensor, first: int, count: int, seed: int, purpose: str, index: Tensor | None = None) -> Tensor:
        """Logits along ``count`` numbered paths: ``(count, N, classes)``, differentiable.

        Path ``q`` is inference ``q // members`` of member ``q % members``, so any run of paths is spread
        evenly over the members, and every path has the same noise however it is asked for.

        Args:
            x: images ``(N, C, H, W)``.
            first, count: the numbers of the paths.
            seed, purpose, index: the rest of the address; ``index`` ``(N,)`` names the images (default: position).
        """
        total = len(self.members)
        index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
        out: list[Tensor | None] = [None] * count
        for m in range(total):
            places = [p for p in range(count) if (first + p) % total == m]
            if not places:
                continue
            inference = torch.tensor([(first + p) // total for p in places], device=x.device)
            logits = self._infer(m, x, make_keys(seed, purpose, m, inference[:, None], index))
            for place, row in zip(places, logits, strict=True):
                out[place] = row
        return torch.stack([row for row in out if row is not None])

    def _infer(self, member: int, x: Tensor, keys: Tensor) -> Tensor:
        """Logits ``(P, N, classes)`` of one member for keys ``(P, N)``; the stem runs once."""
        model: ItoResNet = self.members[member]  # type: ignore[assignment]
        state = model.stem(x)
        out = []
        for group in keys.split(max(1, self.chunk // max(1, len(x)))):
            states = repeat(state, "n ... -> (p n) ...", p=len(group))
            logits = model.propagate(states, rearrange(group, "p n -> (p n)"))
            out.append(rearrange(logits, "(p n) c -> p n c", n=len(x)))
        return torch.cat(out)

    @torch.no_grad()
    def predict(self, x: Tensor, seed: int = 0, index: Tensor | None = None, purpose: str = "report") -> Prediction:
        """Vote on every image, in eval mode.

        Args:
            x: images ``(N, C, H, W)`` in [0, 1].
            seed: of the noise; other seeds, other paths.
            index: int64 ``(N,)``, the images' names in the noise's address; default their position in ``x``.
                Give it, and the same image meets the same noise in any batch.
            purpose: the panel of paths, see `neuralsde_ito.noise.PURPOSES`.

        Raises:
            ValueError: images that are not finite, not in [0, 1] or of the wrong shape.
        """
        check_images(x, self.channels)
        index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
        if index.shape != (len(x),):
            raise ValueError(f"index names the images: {tuple(index.shape)} for {len(x)} images.")
        if single := len(x) == 1:  # a batch of one takes other convolution kernels, with other last bits
            x, index = torch.cat([x, x]), torch.cat([index, index])
        inference = torch.arange(self.inferences, device=x.device)
        votes = []
        with evaluating(self):
            for m in range(len(self.members)):
                logits = self._infer(m, x, make_keys(seed, purpose, m, inference[:, None], index))
                picks = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])  # (P, N, classes)
                votes.append(picks.sum(0))
        counts = torch.stack(votes)
        if single:
            counts, x = counts[:, :1], x[:1]
        drawn = torch.full((len(x),), len(self.members) * self.inferences, device=x.device)
        return Prediction(decide(counts, self.rule), counts, drawn)
