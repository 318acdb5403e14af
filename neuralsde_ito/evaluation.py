"""Tables: an ensemble beside the ResNet it came from, on clean images and under attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .attacks import PGD
from .attacks.objective import as_called
from .data import Split
from .ensemble import ItoEnsemble
from .outcomes import ABSTAIN, Outcomes, Paired
from .validation import ItoError, nearest
from .votes import winners

SURROGATES = ("ensemble", "member", "noise-free", "resnet")
Tick = Callable[[int], object]


@dataclass(frozen=True)
class Evaluation:
    """Decisions of a ResNet and of an ensemble on the same clean images.

    Attributes:
        resnet, ito: outcomes.
        paired: the two compared image by image.
        index, truth, resnet_labels, labels: ``(N,)``.
        votes: ``(members, N, classes)``, as far as they were drawn.
        drawn: ``(N,)``, inferences made.
    """

    resnet: Outcomes
    ito: Outcomes
    paired: Paired
    index: Tensor
    truth: Tensor
    resnet_labels: Tensor
    labels: Tensor
    votes: Tensor
    drawn: Tensor


def evaluate(
    ensemble: ItoEnsemble,
    resnet: nn.Module,
    data: Split,
    seed: int = 0,
    batch_size: int = 100,
    tick: Tick = lambda n: None,
    full: bool = False,
    confidence: float | None = None,
) -> Evaluation:
    """Let the ensemble vote on every image, and the ResNet answer beside it.

    Args:
        ensemble, resnet: on one device.
        data: the images, usually a test split.
        seed: of the report's noise.
        batch_size: images at a time; does not change the result.
        tick: called with the number of images done.
        full, confidence: see `ItoEnsemble.predict`.
    """
    device = next(ensemble.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    votes = []
    for index, x, y in data.batches(batch_size, device):
        prediction = ensemble.predict(x, seed, index, full=full, confidence=confidence)
        found = (prediction.labels.cpu(), prediction.drawn.cpu())
        parts.append((index.cpu(), y.cpu(), classify(resnet, x).cpu(), *found))
        votes.append(prediction.votes.cpu())
        tick(len(y))
    index, truth, base, labels, drawn = (torch.cat(column) for column in zip(*parts, strict=True))
    return Evaluation(
        Outcomes.of(base, truth),
        Outcomes.of(labels, truth),
        Paired.of(base == truth, labels == truth),
        index,
        truth,
        base,
        labels,
        torch.cat(votes, 1),
        drawn,
    )


@torch.no_grad()
def classify(net: nn.Module, x: Tensor) -> Tensor:
    """A plain network's labels ``(N,)``, in its own modes, see `as_called`; `ABSTAIN` where logits are not finite."""
    with as_called(net):
        return winners(net(x))


class NoiseFree(nn.Module):
    """The ensemble without its noise: log mean probability of the members' noise-free networks."""

    def __init__(self, ensemble: ItoEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble  # by which `as_called` knows it as one of ours: in eval mode
        self.bases = nn.ModuleList([member.base for member in ensemble.members])  # type: ignore[union-attr, misc]

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        logits = torch.stack([base(x) for base in self.bases])
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(self.bases))


def surrogate_models(ensemble: ItoEnsemble, resnet: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The networks through which gradients may be taken, by name.

    ``ensemble`` itself; its first ``member``, with noise; the ``noise-free`` members averaged; the original ``resnet``.
    """
    models: dict[str, nn.Module] = {}
    for name in names:
        if name not in SURROGATES:
            raise ItoError(nearest("surrogate", name, SURROGATES))
        if name == "ensemble":
            models[name] = ensemble
        elif name == "member":
            models[name] = ItoEnsemble([ensemble.members[0]])  # type: ignore[list-item]
        else:
            models[name] = NoiseFree(ensemble) if name == "noise-free" else resnet
    return models


@dataclass
class Sweep:
    """Decisions under one attack at several radii, all on the same images.

    Attributes:
        truth, index: ``(N,)``; ``clean``: labels without attack, of ``resnet`` and ``ito``.
        eps: the radii, rising, in pixel units.
        labels: for every radius, the ensemble's labels by surrogate.
        resnet: for every radius, the ResNet's labels under the attack on itself.
        images: for every radius and surrogate, the adversarial images ``(N, C, H, W)``.
        cost: for every radius and surrogate, inferences (with a gradient, without).
    """

    eps: list[float]
    truth: Tensor
    index: Tensor
    clean: dict[str, Tensor]
    labels: list[dict[str, Tensor]]
    resnet: list[Tensor]
    images: list[dict[str, Tensor]]
    cost: list[dict[str, tuple[int, int]]] = field(default_factory=list)

    def worst(self, level: int) -> Tensor:
        """Labels under the strongest attack on each image: any surrogate, at this radius or a smaller one.

        An example for a smaller radius lies in the larger ball too, so the curve falls by construction.
        A wrong answer counts before an abstention, an abstention before a right answer.
        """
        worst = self.clean["ito"].clone()
        for labels in self.labels[: level + 1]:
            for found in labels.values():
                answered = (found != self.truth) & (found != ABSTAIN)
                refused = (found == ABSTAIN) & (worst == self.truth)
                worst = torch.where((answered & ((worst == self.truth) | (worst == ABSTAIN))) | refused, found, worst)
        return worst

    def worst_resnet(self, level: int) -> Tensor:
        """The ResNet's labels under attacks on itself up to this radius."""
        worst = self.clean["resnet"].clone()
        for found in self.resnet[: level + 1]:
            worst = torch.where((worst == self.truth) & (found != self.truth), found, worst)
        return worst


def attack_sweep(
    ensemble: ItoEnsemble,
    resnet: nn.Module,
    data: Split,
    attacks: Sequence[PGD],
    surrogates: Sequence[str] = SURROGATES,
    seed: int = 0,
    batch_size: int = 100,
    tick: Tick = lambda n: None,
) -> Sweep:
    """Attack the ensemble through each surrogate, and the ResNet through itself, at each radius.

    Labels are the ensemble's votes on the report panel, which no attack has seen.

    Args:
        ensemble, resnet: on one device.
        data: the images.
        attacks: one a radius, the same but for ``eps``.
        surrogates: names in `SURROGATES`.
        seed: of gradient, selection and report panels.
        batch_size: images at a time.
        tick: called with 1 whenever one attack on one batch is done.
    """
    attacks = sorted(attacks, key=lambda attack: attack.eps)
    models = surrogate_models(ensemble, resnet, surrogates)
    device = next(ensemble.parameters()).device
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    labels: list[dict[str, list[Tensor]]] = [{name: [] for name in models} for _ in attacks]
    images: list[dict[str, list[Tensor]]] = [{name: [] for name in models} for _ in attacks]
    own: list[list[Tensor]] = [[] for _ in attacks]
    cost = [dict.fromkeys(models, (0, 0)) for _ in attacks]
    for index, x, y in data.batches(batch_size, device):
        clean = ensemble.predict(x, seed, index).labels
        columns.append((index.cpu(), y.cpu(), classify(resnet, x).cpu(), clean.cpu()))
        for level, attack in enumerate(attacks):
            for name, model in models.items():
                # What fools a surrogate by a hair seldom fools the ensemble: a transfer goes on to the end.
                own_gradients = name in ("ensemble", "member")
                found = (attack if own_gradients else replace(attack, stop=False)).run(model, x, y, seed, index)
                decided = ensemble.predict(found.images, seed, index).labels
                labels[level][name].append(decided.cpu())
                images[level][name].append(found.images.cpu())
                backwards, forwards = cost[level][name]
                cost[level][name] = (backwards + found.backwards, forwards + found.forwards)
                tick(1)
            # The attack on the ResNet is the one that was transferred from it.
            adversarial = (
                images[level]["resnet"][-1].to(device)
                if "resnet" in models
                else attack.run(resnet, x, y, seed, index).images
            )
            own[level].append(classify(resnet, adversarial).cpu())
    index, truth, base, clean = (torch.cat(column) for column in zip(*columns, strict=True))
    return Sweep(
        [attack.eps for attack in attacks],
        truth,
        index,
        {"resnet": base, "ito": clean},
        [{name: torch.cat(parts) for name, parts in level.items()} for level in labels],
        [torch.cat(parts) for parts in own],
        [{name: torch.cat(parts) for name, parts in level.items()} for level in images],
        cost,
    )
