"""Tables: an ensemble beside the ResNet it came from, on clean images and under attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Split
from ..models.ensemble import ItoEnsemble, NoiseFree
from ..outcomes import WorstCase
from ..validation import ItoError, image_names, nearest
from .base import Attack
from .pgd import PGD
from .selection import Selection, joined_cases, judge
from .targets import classify


def least_norm(
    ensemble: ItoEnsemble,
    x: Tensor,
    y: Tensor,
    attack: Callable[[float], Attack],
    most: float,
    rounds: int = 8,
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """The least radius at which each image was made to fall, by bisection: ``(N,)``, in pixel units.

    0 where it is wrong without attack, infinite where it stands at ``most``. An upper bound on the true least radius.
    An image has fallen where votes on the selection's noise agree that it has, see `judge`.

    Args:
        ensemble, x, y, seed, index: as in `Attack.run`.
        attack: from a radius to the attack.
        most: the largest radius.
        rounds: bisections; the result is exact to ``most / 2**rounds``, as far as the attack is.
    """
    index = image_names(index, x)
    low = torch.zeros(len(x), device=x.device)
    found = torch.full((len(x),), math.inf, device=x.device)
    found[ensemble.predict(x, seed, index).labels != y] = 0
    high = torch.full_like(found, most)
    for turn in range(rounds + 1):
        middle = high if turn == 0 else (low + high) / 2
        rows = ((found > 0) & ((found < math.inf) if turn else found.isinf())).nonzero()[:, 0]
        for eps in middle[rows].unique().tolist():
            here = rows[middle[rows] == eps]
            images = attack(eps).run(ensemble, x[here], y[here], seed, index[here]).images
            fell = judge(ensemble, images, y[here], index[here], seed).denial  # the report must not choose a radius
            found[here[fell]], high[here[fell]], low[here[~fell]] = eps, eps, eps
    return found


SURROGATES = ("ensemble", "member", "noise-free", "resnet")
Tick = Callable[[int], object]


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
            models[name] = ItoEnsemble([ensemble.members[0]])
        else:
            models[name] = NoiseFree(ensemble) if name == "noise-free" else resnet
    return models


@dataclass
class Sweep:
    """Decisions under one attack at several radii, all on the same images.

    Attributes:
        truth, index: ``(N,)``; ``clean``: labels without attack, of ``resnet`` and ``ito``.
        eps: the radii, rising, in pixel units.
        labels: for every radius, the ensemble's labels by surrogate, each on the images of that attack.
        resnet: for every radius, the ResNet's worst labels under the attack on itself and the images of all surrogates.
        images: for every radius and surrogate, the adversarial images ``(N, C, H, W)``.
        cost: for every radius and surrogate, inferences (with a gradient, without).
        denial, evasion: for every radius the worst cases over all surrogates up to it; the report votes on them once.
        evasion_cost, resnet_cost: for every radius, inferences (with a gradient, without) of the attacks that went on
            for evasion, and of those on the ResNet.
        invalid: inferences of the report whose logits were not finite.
    """

    eps: list[float]
    truth: Tensor
    index: Tensor
    clean: dict[str, Tensor]
    labels: list[dict[str, Tensor]]
    resnet: list[Tensor]
    images: list[dict[str, Tensor]]
    cost: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    denial: list[WorstCase] = field(default_factory=list)
    evasion: list[WorstCase] = field(default_factory=list)
    evasion_cost: list[tuple[int, int]] = field(default_factory=list)
    resnet_cost: list[tuple[int, int]] = field(default_factory=list)
    invalid: int = 0

    def worst(self, level: int) -> Tensor:
        """The ensemble's labels under denial, on the images that selection votes chose up to this radius."""
        return self.denial[level].labels

    def worst_resnet(self, level: int) -> Tensor:
        """The ResNet's labels under the attacks on it up to this radius: of a network without noise they are final."""
        return _worst_of(self.truth, [self.clean["resnet"], *self.resnet[: level + 1]])


def _worst_of(truth: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """The first label of each image that is not the true one."""
    worst = truth.clone()
    for found in labels:
        worst = torch.where(worst == truth, found, worst)
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
    """Attack the ensemble through each surrogate, and the ResNet as often, at each radius.

    The images of all surrogates and of smaller radii compete, by votes of the selection, for the two worst cases of an
    image. What falls without a wrong answer is attacked on, through each surrogate, with evasion as the goal. The
    report votes once on what was chosen, and on the images of each surrogate for a row of their own.

    The ResNet meets the attack on itself, with as many attempts as the surrogates have together, and all images that
    were made for the ensemble.

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
    parts = [
        _sweep_batch(ensemble, resnet, batch, attacks, models, seed, tick) for batch in data.batches(batch_size, device)
    ]
    whole = {column.name: _joined([getattr(part, column.name) for part in parts]) for column in fields(Sweep)}
    return Sweep(**whole | {"eps": parts[0].eps})


def _sweep_batch(
    ensemble: ItoEnsemble,
    resnet: nn.Module,
    batch: tuple[Tensor, Tensor, Tensor],
    attacks: Sequence[PGD],
    models: dict[str, nn.Module],
    seed: int,
    tick: Tick,
) -> Sweep:
    """A sweep of one batch."""
    index, x, y = batch
    chosen = Selection(ensemble, x, y, index, seed)
    chosen.begin()
    clean = ensemble.predict(x, seed, index)
    labels = {"resnet": classify(resnet, x).cpu(), "ito": clean.labels.cpu()}
    sweep = Sweep([attack.eps for attack in attacks], y.cpu(), index.cpu(), labels, [], [], [])
    sweep.invalid += int(clean.invalid.sum())
    for level, attack in enumerate(attacks):
        # What fools a surrogate by a hair seldom fools the ensemble: a transfer goes on to the end.
        through = {name: attack if name in ("ensemble", "member") else replace(attack, stop=False) for name in models}
        own = replace(attack, restarts=attack.restarts * len(models)).run(resnet, x, y, seed, index)
        fooled = [classify(resnet, own.images)]
        sweep.resnet_cost.append((own.gradients, own.queries + len(models) * len(x)))
        since, every = 2 * len(models) * level, torch.arange(len(x), device=x.device)
        sweep.labels.append({})
        sweep.images.append({})
        sweep.cost.append({})
        for number, (name, model) in enumerate(models.items()):
            found = through[name].run(model, x, y, seed, index)
            chosen.meet(every, found.images, since + number, since)
            decided = ensemble.predict(found.images, seed, index)
            fooled.append(classify(resnet, found.images))
            sweep.labels[level][name], sweep.images[level][name] = decided.labels.cpu(), found.images.cpu()
            sweep.cost[level][name] = (found.gradients, found.queries)
            sweep.invalid += int(decided.invalid.sum())
            tick(1)
        gradients = queries = 0
        for number, (name, model) in enumerate(models.items(), len(models)):
            rows = chosen.standing("evasion")
            if len(rows):
                evade, start = replace(through[name], goal="evasion"), chosen.held["evasion"].images[rows]
                found = evade.run(model, x[rows], y[rows], seed, index[rows], start)
                chosen.meet(rows, found.images, since + number, since)
                gradients, queries = gradients + found.gradients, queries + found.queries
                fooled.append(y.clone())
                fooled[-1][rows] = classify(resnet, found.images)
        sweep.resnet.append(_worst_of(y, fooled).cpu())
        sweep.evasion_cost.append((gradients, queries))
        votes = chosen.vote()
        for cases, case in zip((sweep.denial, sweep.evasion), chosen.worst_cases(votes), strict=True):
            cases.append(WorstCase(*(value.cpu() for value in vars(case).values())))
    sweep.invalid += chosen.invalid
    return sweep


def _joined(parts: Sequence[Any]) -> Any:
    """What several batches gave as one: tensors and worst cases end to end, counts added, in lists and dicts alike."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, WorstCase):
        return joined_cases(parts)
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(_joined(column) for column in zip(*parts, strict=True))
    return sum(parts)
