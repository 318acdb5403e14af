"""What all attacks share: settings, restarts, classes to aim at, and the result."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..bfloat16 import warn_of_imitation
from ..models.inspection import as_called
from ..models.vote import as_voter
from ..models.voting import Voter
from ..names import PRECISIONS
from ..validation import ItoError, check_eps, check_images, check_labels, image_names, one_of, recordable, whole_number
from .active import START, ActiveSet
from .norms import BALLS
from .objectives import OBJECTIVES, TARGETED, nan_lowest, targeted_loss, zero_invalid
from .panels import AIMED, GOALS, Panels, goal_reached
from .targets import Target, as_target


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack on ``N`` images.

    Attributes:
        images: ``(N, C, H, W)``, inside the ball and [0, 1].
        fooled: bool ``(N,)``, the goal was reached on the selection panel. A claim to be checked on a report panel.
        queries, gradients: inferences made without and with a gradient, over all images and paths.
        blind: bool ``(N,)``, some gradient was not finite: that such an image survives is no sign of robustness.
    """

    images: Tensor
    fooled: Tensor
    queries: int
    gradients: int
    blind: Tensor


@dataclass(frozen=True)
class Attack:
    """Settings of an attack; `run` attacks. A new attack is a subclass that says what one `attempt` does.

    Example:
        Steps of eps / 4 by the sign of the gradient::

            class SignSteps(Attack):
                def attempt(self, active):
                    for step in active.steps(range(self.steps)):
                        loss, logits, gradient = active.ascend(step)
                        active.keep_best(loss, logits)
                        fooled = active.settle(logits, step)
                        moved = active.iterate + self.eps / 4 * gradient.sign()
                        active.iterate = self.project(moved, active.origin)
                        active.drop(fooled)

    Attributes:
        norm: a name in `BALLS`.
        eps: radius in pixel units.
        steps: iterations.
        restarts: each begins anew on the images that still survive; the best of all counts.
        eot: paths that a gradient (or a query) averages, spread over members (expectation over transformation, Athalye
            et al. 2018).
        selection: paths that judge an iterate.
        objective: a name in `OBJECTIVES`.
        targets: for an objective that aims at a class: how many wrong classes are tried, the likeliest first.
        stop: whether an image leaves the batch as soon as it is fooled beyond luck. Without noise: it is fooled. With
            noise: the right class wins at most 30 % of the gradient's paths and at most 15 % of a draw of the
            selection's (under evasion: at most these shares are not won by one wrong class).
        precision: of gradients, ``float32`` or ``bfloat16``, which is quicker on processors that have it. What settles
            an image and what chooses among attempts is float32 either way.
        goal: ``denial``, the right class loses its majority, so that the answer is wrong or there is none; or
            ``evasion``, a wrong class gets the majority. They differ where there are several paths.

    Raises:
        ItoError: a setting that is unknown or out of range.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    steps: int = 20
    restarts: int = 1
    eot: int = 20
    selection: int = 20
    objective: str = "mean-loss"
    targets: int = 9
    stop: bool = True
    goal: str = "denial"
    precision: str = field(default="float32", kw_only=True)

    def __post_init__(self) -> None:
        one_of("precision", self.precision, PRECISIONS)
        one_of("norm", self.norm, BALLS)
        one_of("objective", self.objective, OBJECTIVES)
        one_of("goal", self.goal, GOALS)
        object.__setattr__(self, "eps", check_eps(self.norm, self.eps))
        for name in ("steps", "restarts", "eot", "selection", "targets"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))

    def run(
        self,
        model: nn.Module | Target,
        x: Tensor,
        y: Tensor,
        seed: int = 0,
        index: Tensor | None = None,
        start: Tensor | None = None,
        target: Tensor | None = None,
    ) -> AttackResult:
        """Attack images.

        Args:
            model: `ItoEnsemble`, `ItoResNet`, attacked in eval mode; a `Vote`, or any module from images in [0, 1] to
                logits, in the modes that it has (see `as_called`); or a `Target` that stands for one.
            x, y: images ``(N, C, H, W)`` in [0, 1] and their true labels ``(N,)``.
            seed: of the panels and of random starts.
            index: int64 ``(N,)``, the images' names in the noise's address; default their position in ``x``.
            start: where the first attempt begins, ``(N, C, H, W)``, such as another attack's result. It is projected
                onto the ball.
            target: int64 ``(N,)``, the class that each image is to be answered with. This is then the goal, whatever
                ``goal`` says; the objective has to aim at a class.

        Warns where a gradient is not finite: such entries become 0, and the attack goes on.

        Raises:
            ItoError: images, labels or a model that cannot be attacked; a target for an objective that aims at none.
        """
        if isinstance(model, nn.Module):
            model = as_voter(model)
        check_images(x, model.channels if isinstance(model, Voter) else None)
        x, y, index = x.detach(), check_labels(y, len(x)), image_names(index, x)
        if target is not None:
            if self.objective not in TARGETED:
                aims = ", ".join(TARGETED)
                raise ItoError(f"The objective {self.objective!r} aims at no class: with target take one of {aims}.")
            y = torch.stack([y, check_labels(target, len(x)).to(y.device)], 1)
        if start is not None and start.shape != x.shape:
            raise ItoError(f"start must be images of shape {tuple(x.shape)}, got {tuple(start.shape)}.")
        with torch.inference_mode(False):  # which would record no gradient
            x, y, index = recordable(x), recordable(y), recordable(index)
            if start is not None:
                start = self.project(recordable(start.detach()), x)
            if isinstance(model, nn.Module):
                with as_called(model):
                    return self._attempts(as_target(model, x), x, y, seed, index, start)
            return self._attempts(model, x, y, seed, index, start)

    def project(self, images: Tensor, origin: Tensor) -> Tensor:
        """The images projected onto the ball around ``origin``, and then onto [0, 1]; all ``(N, C, H, W)``."""
        return BALLS[self.norm].project(images, origin, self.eps).clamp(0, 1)

    def first_iterate(self, active: ActiveSet) -> Tensor:
        """Where an attempt begins that was given no start: a random point of the ball, ``(N, C, H, W)``."""
        return BALLS[self.norm].start(active.origin, self.eps, active.keys(START)).clamp(0, 1)

    def attempt(self, active: ActiveSet) -> None:
        """One attempt, from ``active.iterate`` on. The best iterates are kept by the active set.

        A draw is the number of a step or query, from 0 to ``steps + 1``; each has paths of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no attempt(active): take PGD, APGD or Square.")

    def _attempts(
        self, target: Target, x: Tensor, y: Tensor, seed: int, index: Tensor, start: Tensor | None
    ) -> AttackResult:
        """Attempt after attempt, one for each restart and each class to aim at, on the images that still survive."""
        draws = self.steps + 2  # of one attempt: the start, each step or query, and one to spare
        if self.precision == "bfloat16":
            warn_of_imitation(x.device)
        panels = Panels(target, y, seed, index, self.eot, self.selection, draws, self.precision)
        if panels.noisy and self.eot == 1:
            warnings.warn(
                "A randomised model is attacked with one path a gradient (eot=1): the attack is weak, "
                "and its figure no measure of robustness.",
                stacklevel=3,
            )
        aimed = y.dim() == 2
        objective, goal = OBJECTIVES[self.objective], AIMED if aimed else self.goal
        aims = [y] if aimed else self._aims(panels, x, y)
        best, best_score = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for attempt in range(self.restarts * len(aims)):
            rows = (~fooled).nonzero()[:, 0]
            if not len(rows):
                break
            panels.attempt, panels.labels = attempt, aims[attempt % len(aims)]
            active = ActiveSet(panels, objective, x[rows], rows, goal, self.stop)
            active.given = start is not None and attempt < len(aims)  # each class has one attempt from the given start
            active.iterate = start[rows] if start is not None and active.given else self.first_iterate(active)
            self.attempt(active)
            images = active.result()
            logits = panels.compare(images, rows)
            reached, score = goal_reached(logits, y[rows], goal), self._score(logits, y[rows])
            better = reached | (score > best_score[rows])
            kept = rows[better]
            best[kept], best_score[kept], fooled[kept] = images[better], score[better], reached[better]
        if bool(panels.blind.any()):
            blind, survive = int(panels.blind.sum()), int((panels.blind & ~fooled).sum())
            warnings.warn(
                f"The gradient is not finite at {blind} of {len(x)} images: the model overflows or divides by zero "
                f"there, and that {survive} of them survive is no sign of robustness.",
                stacklevel=3,
            )
        return AttackResult(best, fooled, panels.queries, panels.gradients, panels.blind)

    def _aims(self, panels: Panels, x: Tensor, y: Tensor) -> list[Tensor]:
        """The labels of the attempts in turn: ``(N,)``, or ``(N, 2)`` with the class aimed at, the likeliest first."""
        if self.objective not in TARGETED:
            return [y]
        shares = panels.rank(x, torch.arange(len(x), device=x.device))
        ranking = shares.scatter(1, y[:, None].clamp(0, shares.shape[1] - 1), -1).argsort(1, descending=True)
        count = min(self.targets, ranking.shape[1] - 1)
        return [torch.stack([y, ranking[:, aim]], 1) for aim in range(count)]

    def _score(self, logits: Tensor, y: Tensor) -> Tensor:
        """The score ``(N,)`` by which attempts are compared; it does not depend on the class tried."""
        if y.dim() == 2:  # all attempts aim at the class that was given
            return targeted_loss(logits, y)
        if self.goal == "evasion":  # the mean probability of the best wrong class
            return zero_invalid(logits).softmax(-1).mean(0).scatter(1, y[:, None], 0).amax(1)
        return nan_lowest(OBJECTIVES["mean-loss" if self.objective in TARGETED else self.objective](logits, y))
