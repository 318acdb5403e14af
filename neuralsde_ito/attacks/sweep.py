"""One attack at several radii: the ensemble through each surrogate, and beside it the ResNet that it came from."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Split
from ..distributed import ALONE, World
from ..models.ensemble import ItoEnsemble, NoiseFree
from ..models.vote import as_voter
from ..models.voting import Voter
from ..outcomes import WorstCase
from ..validation import ItoError, image_names, one_of
from .base import Attack, AttackResult
from .images import Images
from .pgd import PGD
from .report import Report
from .selection import Selection, join_cases, selection_votes
from .targets import classify

SURROGATES = ("ensemble", "member", "noise-free", "resnet")
Tick = Callable[[int], object]


def surrogate_models(ensemble: Voter, resnet: nn.Module | None, names: Sequence[str]) -> dict[str, nn.Module]:
    """The networks through which gradients may be taken, by name.

    ``ensemble`` itself; its first ``member``, with noise; the ``noise-free`` members averaged; the original ``resnet``.
    A stranger's model has only itself.

    Raises:
        ItoError: an unknown name, or a network that there is not.
    """
    models: dict[str, nn.Module] = {}
    for name in names:
        if one_of("surrogate", name, SURROGATES) == "ensemble":
            models[name] = ensemble
        elif name == "resnet" and resnet is not None:
            models[name] = resnet
        elif name != "resnet" and isinstance(ensemble, ItoEnsemble):
            models[name] = ItoEnsemble([ensemble.members[0]]) if name == "member" else NoiseFree(ensemble)
        else:
            raise ItoError(f"There is no network for the surrogate {name!r}: take 'ensemble', the model itself.")
    return models


@dataclass(frozen=True)
class Cost:
    """Inferences of attacks, over all images and paths: with a gradient, and without (``queries``)."""

    gradients: int = 0
    queries: int = 0

    @classmethod
    def of(cls, result: AttackResult) -> Cost:
        """What one attack has cost."""
        return cls(result.gradients, result.queries)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.gradients + other.gradients, self.queries + other.queries)


@dataclass
class Sweep:
    """Decisions under one attack at several radii, all on the same ``N`` images.

    Attributes:
        eps: the radii, rising, in pixel units.
        truth, index: int64 ``(N,)``, true labels and names.
        clean: labels ``(N,)`` without attack, of ``resnet`` (where there is one) and ``ito``.
        labels: for every radius, the ensemble's labels by surrogate, each on the images of that attack.
        resnet: for every radius, the ResNet's worst labels under the attack on itself and the images of all surrogates;
            empty where there is no ResNet.
        images: for every radius and surrogate, the adversarial images ``(N, C, H, W)``.
        cost: for every radius and surrogate, the cost of the attack.
        denial, evasion: for every radius the worst cases over all surrogates up to it; the report votes on them once.
        evasion_cost, resnet_cost: for every radius, the cost of the attacks that went on for evasion, and of the
            attack on the ResNet, with the queries to judge all images that it gets.
        invalid: inferences of the report whose logits were not finite.
    """

    eps: list[float]
    truth: Tensor
    index: Tensor
    clean: dict[str, Tensor]
    labels: list[dict[str, Tensor]]
    resnet: list[Tensor]
    images: list[dict[str, Tensor]]
    cost: list[dict[str, Cost]] = field(default_factory=list)
    denial: list[WorstCase] = field(default_factory=list)
    evasion: list[WorstCase] = field(default_factory=list)
    evasion_cost: list[Cost] = field(default_factory=list)
    resnet_cost: list[Cost] = field(default_factory=list)
    invalid: int = 0

    def worst(self, level: int) -> Tensor:
        """The ensemble's labels under denial, on the images that selection votes chose up to this radius."""
        return self.denial[level].labels

    def worst_resnet(self, level: int) -> Tensor:
        """The ResNet's labels under the attacks up to this radius: of a network without noise they are final."""
        return _first_wrong(self.truth, [self.clean["resnet"], *self.resnet[: level + 1]])


def _first_wrong(truth: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """The first label of each image that is not the true one."""
    worst = truth.clone()
    for row in labels:
        worst = torch.where(worst == truth, row, worst)
    return worst


def attack_sweep(
    ensemble: nn.Module,
    resnet: nn.Module | None,
    data: Split,
    attacks: Sequence[PGD],
    surrogates: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 100,
    tick: Tick = lambda n: None,
    among: World = ALONE,
) -> Sweep:
    """Attack the ensemble through each surrogate, and the ResNet as often, at each radius.

    The images of all surrogates and of smaller radii compete, by votes of the selection, for the two worst cases of an
    image. An image that is denied without a wrong answer is attacked again, through each surrogate, with evasion as the
    goal. The report votes once on the worst cases, and on the images of each surrogate for a row of their own.

    The ResNet gets the attack on itself, with as many attempts as the surrogates have together, and all images that
    were made for the ensemble.

    Args:
        ensemble, resnet: on one device. A stranger's module, which votes as a `Vote`, has no ResNet beside it.
        data: the images.
        attacks: one a radius, the same but for ``eps``.
        surrogates: names in `SURROGATES`; default all, and without a ResNet the model itself.
        seed: of gradient, selection and report panels.
        batch_size: images at a time.
        tick: called with 1 whenever one attack on one batch is done.
        among: the processes that share the images; each gets the whole result.

    Raises:
        ItoError: an unknown surrogate.
    """
    ensemble, attacks = as_voter(ensemble), sorted(attacks, key=lambda attack: attack.eps)
    surrogates = surrogates or (SURROGATES if resnet is not None else SURROGATES[:1])
    models = surrogate_models(ensemble, resnet, surrogates)
    device = ensemble.device
    parts = []
    for index, x, y in among.share(data).batches(batch_size, device):
        batch = _Batch(ensemble, resnet, Images(x, y, index), models, seed)
        for attack in attacks:
            batch.attack(attack, tick)
        parts.append(batch.finished())
    parts = among.gather_lists(parts)
    whole = {column.name: _joined([getattr(part, column.name) for part in parts]) for column in fields(Sweep)}
    among.check_complete(whole["index"], data)
    return Sweep(**whole | {"eps": parts[0].eps})


class _Batch:
    """A sweep of one batch, radius after radius."""

    def __init__(
        self, ensemble: Voter, resnet: nn.Module | None, images: Images, models: dict[str, nn.Module], seed: int
    ) -> None:
        self.ensemble, self.resnet, self.images, self.models, self.seed = ensemble, resnet, images, models, seed
        self.selection = Selection(ensemble, images, Report(seed))
        self.selection.offer_clean()
        clean = ensemble.predict(images.x, seed, images.index)
        labels = {} if resnet is None else {"resnet": classify(resnet, images.x).cpu()}
        labels["ito"] = clean.labels.cpu()
        self.sweep = Sweep([], images.y.cpu(), images.index.cpu(), labels, [], [], [])
        self.sweep.invalid += int(clean.invalid.sum())

    def attack(self, attack: PGD, tick: Tick) -> None:
        """Attack ResNet and ensemble at the next radius, and let the report vote."""
        # What barely fools a surrogate seldom fools the ensemble: a transfer does not stop early.
        through = {
            name: attack if name in ("ensemble", "member") else replace(attack, stop=False) for name in self.models
        }
        since = 2 * len(self.models) * len(self.sweep.eps)  # the number of attacks at smaller radii
        self.sweep.eps.append(attack.eps)
        resnet_labels = [] if self.resnet is None else [self._attack_resnet(self.resnet, attack)]
        resnet_labels += self._deny(through, since, tick)
        resnet_labels += self._evade(through, since)
        if resnet_labels:
            self.sweep.resnet.append(_first_wrong(self.images.y, resnet_labels).cpu())
        cases = self.selection.worst_cases(self.selection.vote())
        for column, case in zip((self.sweep.denial, self.sweep.evasion), cases, strict=True):
            column.append(WorstCase(*(value.cpu() for value in vars(case).values())))

    def _attack_resnet(self, resnet: nn.Module, attack: PGD) -> Tensor:
        """The ResNet's labels under the attack on itself, with as many attempts as the surrogates have together."""
        x, y, index = self.images.x, self.images.y, self.images.index
        attempts = attack.restarts * len(self.models)
        own = replace(attack, restarts=attempts).run(resnet, x, y, self.seed, index)
        self.sweep.resnet_cost.append(Cost.of(own) + Cost(queries=len(self.models) * len(x)))
        return classify(resnet, own.images)

    def _deny(self, through: dict[str, PGD], since: int, tick: Tick) -> list[Tensor]:
        """Attack all images through each surrogate; gives the ResNet's labels on what comes out."""
        x, y, index = self.images.x, self.images.y, self.images.index
        every = torch.arange(len(x), device=x.device)
        labels: dict[str, Tensor] = {}
        images: dict[str, Tensor] = {}
        cost: dict[str, Cost] = {}
        resnet_labels = []
        for number, (name, model) in enumerate(self.models.items(), since):
            result = through[name].run(model, x, y, self.seed, index)
            self.selection.offer(every, result.images, number, since)
            prediction = self.ensemble.predict(result.images, self.seed, index)
            if self.resnet is not None:
                resnet_labels.append(classify(self.resnet, result.images))
            labels[name], images[name] = prediction.labels.cpu(), result.images.cpu()
            cost[name] = Cost.of(result)
            self.sweep.invalid += int(prediction.invalid.sum())
            tick(1)
        self.sweep.labels.append(labels)
        self.sweep.images.append(images)
        self.sweep.cost.append(cost)
        return resnet_labels

    def _evade(self, through: dict[str, PGD], since: int) -> list[Tensor]:
        """Attack the images that are denied without a wrong answer; gives the ResNet's labels on what comes out."""
        cost, resnet_labels = Cost(), []
        for number, (name, model) in enumerate(self.models.items(), since + len(self.models)):
            rows = self.selection.to_attack("evasion")
            if not len(rows):
                continue
            some, start = self.images[rows], self.selection.best["evasion"].images[rows]
            evasion = replace(through[name], goal="evasion")
            result = evasion.run(model, some.x, some.y, self.seed, some.index, start)
            self.selection.offer(rows, result.images, number, since)
            cost += Cost.of(result)
            if self.resnet is not None:
                labels = self.images.y.clone()
                labels[rows] = classify(self.resnet, result.images)
                resnet_labels.append(labels)
        self.sweep.evasion_cost.append(cost)
        return resnet_labels

    def finished(self) -> Sweep:
        """The sweep of this batch."""
        self.sweep.invalid += self.selection.invalid
        return self.sweep


def _joined(parts: Sequence[Any]) -> Any:
    """A column of `Sweep` of several batches as one: images and labels end to end, counts added, in lists and dicts."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, WorstCase):
        return join_cases(parts)
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, list):
        return [_joined(column) for column in zip(*parts, strict=True)]
    return reduce(operator.add, parts)


def least_norm(
    ensemble: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Callable[[float], Attack],
    most: float,
    rounds: int = 8,
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """The least radius at which the attack denies each image, by bisection: ``(N,)``, in pixel units.

    It is 0 where the image is wrong without attack, and infinite where the attack fails at ``most``. It is an upper
    bound on the true least radius. Votes on the selection's noise decide whether an image is denied, see
    `selection_votes`.

    Args:
        ensemble, x, y, seed, index: as in `Attack.run`.
        attack: from a radius to the attack.
        most: the largest radius.
        rounds: bisections; the result is exact to ``most / 2**rounds``, as far as the attack is.
    """
    ensemble = as_voter(ensemble)
    images, report = Images(x, y, image_names(index, x)), Report(seed)
    low = torch.zeros(len(x), device=x.device)
    least = torch.full((len(x),), math.inf, device=x.device)
    least[ensemble.predict(x, seed, images.index).labels != y] = 0
    high = torch.full_like(least, most)
    for turn in range(rounds + 1):
        middle = high if turn == 0 else (low + high) / 2
        rows = ((least > 0) & ((least < math.inf) if turn else least.isinf())).nonzero()[:, 0]
        for eps in middle[rows].unique().tolist():
            here = rows[middle[rows] == eps]
            some = images[here]
            attacked = attack(eps).run(ensemble, some.x, some.y, seed, some.index).images
            # The report must not choose a radius.
            denied = selection_votes(ensemble, replace(some, x=attacked), report).denial
            least[here[denied]], high[here[denied]], low[here[~denied]] = eps, eps, eps
    return least
