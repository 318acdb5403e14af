"""What attacks cost, ours and those of other libraries: on the same images, judged by the same fresh vote."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..attacks.base import AttackResult
from ..attacks.images import Images
from ..attacks.objectives import Objective
from ..attacks.other_libraries import peer_attack
from ..attacks.pgd import PGD
from ..attacks.suite_run import SuiteSettings
from ..attacks.targets import Ascent, EnsembleTarget, Target, in_precision
from ..bfloat16 import computes_in_bfloat16
from ..models.ensemble import ItoEnsemble
from ..models.inference import in_bfloat16, quicken
from ..models.recast import ItoResNet
from ..noise.keys import PathRange
from ..validation import ItoError
from .record import Row
from .turns import Pause, run_in_turns

Case = Callable[[Pause], Tensor | AttackResult]


def bench_attack(ensemble: ItoEnsemble, x: Tensor, y: Tensor, radii: list[float], steps: int, eot: int) -> list[Row]:
    """PGD on the first member, L-inf: ours, and torchattacks' EOTPGD on the reference and on our engine's forward.

    Args:
        ensemble: its first member is attacked, with the ensemble's number of inferences.
        x: images ``(N, C, H, W)`` in [0, 1].
        y: labels ``(N,)``.
        radii: in pixel units.
        steps: steps of each attack.
        eot: paths a gradient.

    Raises:
        ImportError: torchattacks is not installed.
    """
    import torchattacks

    member: ItoResNet = ensemble.members[0]
    single = ItoEnsemble([member], ensemble.inferences)

    def peer(model: nn.Module, eps: float, pause: Pause) -> Tensor:
        pausing = _PausingModule(model, pause, eot)
        return torchattacks.EOTPGD(pausing, eps=eps, alpha=2.5 * eps / steps, steps=steps, eot_iter=eot)(x, y).detach()

    def ours(eps: float, pause: Pause, **settings) -> AttackResult:
        target = _PausingTarget(EnsembleTarget(single), pause)
        return PGD(eps=eps, steps=steps, eot=eot, **settings).run(target, x, y)

    def correct(images: Tensor) -> int:
        return int((single.predict(images).labels == y).sum())

    rows = []
    for eps in radii:
        cases: dict[str, Case] = {
            "torchattacks EOTPGD, reference": partial(peer, member, eps),
            "torchattacks EOTPGD, our engine": partial(peer, quicken(member, x), eps),
            "ours, every image to the end": partial(ours, eps, stop=False, keep="last"),
            "ours": partial(ours, eps),
        }
        if _has_bfloat16(single, x):
            cases["ours in bfloat16, every image to the end"] = partial(
                ours, eps, stop=False, keep="last", precision="bfloat16"
            )
            cases["ours, gradients in bfloat16"] = partial(ours, eps, precision="bfloat16")
        rows += _attack_rows("attack", cases, eps, correct, x.device)
    return rows


class _PausingModule(nn.Module):
    """A model that pauses before every ``every``-th forward."""

    def __init__(self, model: nn.Module, pause: Pause, every: int) -> None:
        super().__init__()
        self.model, self.pause, self.every, self.calls = model, pause, every, 0
        self.training = model.training  # torchattacks restores this mode after the attack

    def forward(self, x: Tensor) -> Tensor:
        if self.calls % self.every == 0:
            self.pause()
        self.calls += 1
        return self.model(x)


class _PausingTarget:
    """A target that pauses before every gradient."""

    def __init__(self, target: Target, pause: Pause) -> None:
        self.target, self.path_logits, self.distinct = target, target.path_logits, target.distinct
        self._pause = pause

    def in_bfloat16(self) -> _PausingTarget:
        return _PausingTarget(in_precision(self.target, "bfloat16"), self._pause)

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        self._pause()
        return self.target.ascend(objective, x, y, paths)


def _has_bfloat16(ensemble: ItoEnsemble, x: Tensor) -> bool:
    """Whether gradients can be taken in bfloat16, and the processor does not only imitate it."""
    if not computes_in_bfloat16(x.device):
        return False
    try:
        for member in ensemble.members:
            in_bfloat16(quicken(member, x))
    except ItoError:
        return False
    return True


def _attack_rows(
    part: str, cases: dict[str, Case], eps: float, correct: Callable[[Tensor], int], device: torch.device
) -> list[Row]:
    """Run attacks in turns; the notes say how many images stay correct, and what an attack of ours computed."""
    rows: list[Row] = []
    for name, (result, seconds) in run_in_turns(cases, device).items():
        note = f"{correct(result.images if isinstance(result, AttackResult) else result)} correct"
        if isinstance(result, AttackResult):
            note += f"; {result.gradients:,} gradients, {result.queries:,} queries"
        ratio = seconds / (rows[0].seconds if rows else seconds)
        rows.append(Row(part, f"{255 * eps:g}/255: {name}", seconds, ratio, note=note))
    return rows


def bench_suite(net: nn.Module, ensemble: ItoEnsemble, x: Tensor, y: Tensor, radii: list[float]) -> list[Row]:
    """The whole ensemble, L-inf: AutoAttack (its ``rand`` where there is noise) and our suite ``standard``.

    Both attack the images that are right without attack, and the same fresh vote judges both.

    Args:
        net: the original network, a surrogate of the suite.
        ensemble: what is attacked.
        x: images ``(N, C, H, W)`` in [0, 1].
        y: labels ``(N,)``.
        radii: in pixel units.

    Returns:
        No rows if no image is right without attack.

    Raises:
        ItoError: pyautoattack is not installed.
    """
    index = torch.arange(len(x), device=x.device)
    right = ensemble.predict(x, 0, index).labels == y
    x, y, index = x[right], y[right], index[right]
    if not len(x):
        return []

    def peer(eps: float, pause: Pause) -> AttackResult:
        return peer_attack("autoattack", ensemble, x, y, "linf", eps)

    def ours(eps: float, pause: Pause, precision: str = "float32") -> AttackResult:
        suite = SuiteSettings("linf", (eps,), precision=precision).suite(ensemble, net)
        [result] = suite.attack(ensemble, Images(x, y, index), [eps])
        fooled = result.denial.labels != y
        costs = sum(result.queries), sum(result.gradients)
        return AttackResult(result.denial.images, fooled, *costs, torch.zeros_like(fooled))

    def correct(images: Tensor) -> int:
        return int((ensemble.predict(images, 0, index).labels == y).sum())

    rows = []
    for eps in radii:
        cases: dict[str, Case] = {"AutoAttack": partial(peer, eps), "ours, standard": partial(ours, eps)}
        if _has_bfloat16(ensemble, x):
            cases["ours, gradients in bfloat16"] = partial(ours, eps, precision="bfloat16")
        rows += _attack_rows("suite", cases, eps, correct, x.device)
    return rows
