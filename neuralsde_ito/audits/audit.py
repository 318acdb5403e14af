"""An audit: is the accuracy that an attack leaves the model's strength, or the attack's weakness?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attacks.norms import BALLS
from ..attacks.pgd import PGD
from ..outcomes import Outcomes, Rate
from ..validation import recordable
from .binarisation import binarisation
from .case import Reseeded, Subject, frozen
from .check import BESIDE, FAIL, PASS, Check
from .gradients import eot_adequacy, logits, randomness, solver_gradient, zero_gradients
from .optimisation import (
    convergence,
    monotone,
    more_iterations,
    one_step,
    rough_landscape,
    silent_success,
    unbounded_attack,
)
from .other_attacks import black_box, known_noise, random_noise, transfer
from .reporting import extraordinary_claim, selection_bias, the_ball

CHECKS: tuple[Callable[[Subject], Check], ...] = (
    randomness, logits, zero_gradients, eot_adequacy, more_iterations, convergence, silent_success, rough_landscape,
    unbounded_attack, monotone, one_step, black_box, random_noise, transfer, known_noise, selection_bias, binarisation,
    solver_gradient, the_ball, extraordinary_claim,
)  # fmt: skip

__all__ = ["Audit", "Check", "Landscape", "audit"]


@dataclass(frozen=True)
class Landscape:
    """The loss around one image on fixed paths: along the gradient, and along a random direction.

    Attributes:
        row: the image's position among those audited.
        reach: ``(K,)``, steps in either direction, in units of eps.
        loss: ``(K, K)``; the first axis is the gradient's.
    """

    row: int
    reach: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Audit:
    """The verdicts, and what a report shows beside them.

    Attributes:
        checks: all twenty, by number.
        attack: the attack whose figure was in doubt.
        clean, attacked: outcomes before and under it.
        curve: radius and accuracy with its interval, from 0 on; never rising, as successes are carried upward.
        landscape: None where the noise cannot be fixed.
        x, images: clean and adversarial ``(N, C, H, W)``; ``truth``, ``before`` and ``after``: labels ``(N,)``; all
            on the CPU.
    """

    checks: list[Check]
    attack: PGD
    clean: Outcomes
    attacked: Outcomes | None
    curve: list[tuple[float, Rate]]
    landscape: Landscape | None
    x: Tensor
    images: Tensor
    truth: Tensor
    before: Tensor
    after: Tensor

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.verdict == FAIL]

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        count = {word: sum(check.verdict == word for check in self.checks) for word in (PASS, FAIL, BESIDE)}
        others = f"{count[PASS]} passed, {count[BESIDE]} not applicable"
        if self.failed:
            return (
                f"{count[FAIL]} of {len(self.checks)} checks failed ({others}): do not trust the attacked accuracy yet."
            )
        return f"No check failed ({others}): no sign that the attack was fooled."

    def as_dict(self) -> dict[str, Any]:
        """All but the pictures, ready for JSON."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "attack": asdict(self.attack) | {"step_size": self.attack.step},
            "clean": self.clean.as_dict(),
            "attacked": self.attacked and self.attacked.as_dict(),
            "curve": [{"eps": eps, **asdict(rate)} for eps, rate in self.curve],
            "checks": [asdict(check) for check in self.checks],
        }


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str = "linf",
    eps: float = 8 / 255,
    *,
    steps: int = 20,
    eot: int = 20,
    seed: int = 0,
    index: Tensor | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    queries: int = 500,
    draws: int = 10_000,
    batch_size: int | None = None,
    tick: Callable[[int], object] = lambda n: None,
    **settings: Any,
) -> Audit:
    """Run the twenty checks for a false sense of security on a model under PGD.

    Args:
        model: `ItoEnsemble` or `ItoResNet`, in eval mode; or any module from images in [0, 1] to logits, in the modes
            that it has: with dropout left on it is audited as a randomised model.
        x, y: images ``(N, C, H, W)`` in [0, 1] and their true labels ``(N,)``.
        norm, eps, steps, eot: of the attack, see `PGD`; so are ``settings``.
        seed: of all noise.
        index: int64 ``(N,)``, the images' names in the noise's address, no two alike; default their position.
        surrogates: networks to transfer attacks from, by name; for Itô models the noise-free network is added.
        queries: of the black-box attack, an image.
        draws: random points an image; for a randomised model, points in all.
        batch_size: images that go through a module at a time, each on all paths of a gradient; see `ModuleTarget`. It
            does not change the figures of a module without noise. An ensemble has its own ``chunk``.
        tick: called with 1 after every check.

    Raises:
        ItoError: images, labels or settings that cannot be; a model that gives no gradient, or in which the answer to
            an image depends on the others in its batch (BatchNorm in train mode).

    Example:
        ``audit(net, x, y, norm="linf", eps=8/255).passed``
    """
    attack = PGD(norm=norm, eps=eps, steps=steps, eot=eot, **settings)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        x, y = recordable(x), recordable(y)
        index = None if index is None else recordable(index)
        s = Subject(model, x, y, attack, seed, index, surrogates, queries, draws, batch_size)
        for net in (s.model, *s.surrogates.values()):
            stack.enter_context(frozen(net))
        _ = s.classes, None if s.adaptive else s.others  # refuse what cannot be audited before anything is run
        checks = []
        for check in CHECKS:
            checks.append(check(s))
            tick(1)
        attacked = None if s.adaptive else s.main
        after = s.clean if attacked is None else attacked.labels
        return Audit(
            checks,
            attack,
            Outcomes.of(s.clean, s.y),
            None if attacked is None else Outcomes.of(after, s.y),
            [] if s.adaptive else s.curve,
            None if s.adaptive else _landscape(s),
            *(part.cpu() for part in (s.x, s.x if attacked is None else attacked.images, s.y, s.clean, after)),
        )


def _landscape(s: Subject, size: int = 21) -> Landscape | None:
    """The loss around a survivor, or around any image that was known, within twice the radius."""
    rows = s.survivors if len(s.survivors) else s.right
    model = s.fixed
    if model is None or not len(rows):
        return None
    row, ball, reach = int(rows[0]), BALLS[s.attack.norm], torch.linspace(-2, 2, size)
    x, y = s.x[row : row + 1], s.y[row : row + 1]
    with torch.enable_grad():
        start = x.clone().requires_grad_()
        out = s.answers(model, start)
        loss = F.cross_entropy(out, y)
        gradient = torch.autograd.grad(loss, start)[0] if loss.requires_grad else torch.zeros_like(x)
    along = ball.steepest(gradient.nan_to_num(0, 0, 0))
    aside = ball.steepest(s.noise(x, rows[:1], 1.0, 1 << 22) - x)
    grid = (reach * s.attack.eps).to(x)
    points = x + grid[:, None, None, None, None] * along + grid[None, :, None, None, None] * aside
    with torch.no_grad():
        # A module draws by place in the batch: point after point, so that all meet the same path.
        parts = points.flatten(0, 1).split(1 if isinstance(model, Reseeded) else 128)
        losses = torch.cat([F.cross_entropy(s.answers(model, p), y.expand(len(p)), reduction="none") for p in parts])
    return Landscape(row, reach, losses.view(size, size).cpu())
