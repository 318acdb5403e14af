"""A vote over any module: a stranger's network, random or not, becomes a voting, abstaining model."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..noise.keys import PathRange, make_keys
from ..noise.replay import SharedDraw, global_generators, replayed
from ..validation import ItoError, image_names, whole_number
from .ensemble import ItoEnsemble
from .inspection import alike, answers, as_called
from .recast import ItoResNet
from .voting import Inferences, Voter

_AT_ONCE = 256  # images in one call of the module without a gradient, unless `Vote.chunk` says how many
_OTHERS = "It draws from {0}: its draws are seeded by the path, but depend on the position of an image in its batch."
_NOT_REPLAYED = (
    "Two calls with the same seeds differ: it draws from a generator of its own or from the operating system, or calls "
    "change it. No path can be drawn again: two votes with one seed differ, noise cannot be fixed or known, and the "
    "votes of an evidence bundle do not come out again."
)
_BY_POSITION = "Its noise depends on the other images in its batch: a vote is repeated only on the same batch."


class Vote(Voter):
    """Any module from images in [0, 1] to logits, as a model that votes and abstains.

    A random module makes ``inferences`` forward passes for an image, its *paths*. What torch draws in them is a
    function of the seed, the number of the path and the image's name (see `neuralsde_ito.noise.replay`): the noise of
    an image does not depend on its batch or on the global generators, and can be drawn again. The module keeps its
    modes: a dropout that is on belongs to it.

    Args:
        module: from images ``(N, C, H, W)`` in [0, 1] to logits ``(N, classes)``.
        inferences: how many vote on an image. Without noise one is made, and counts as all of them.
        rule: how votes become a label, see `decide`; with one member all rules are equal.
        paths_per_call: over how many fresh paths one call ``vote(x)`` averages.

    Attributes:
        remarks: sentences on what does not hold, because the module draws from elsewhere; see `observe`.
        replayable: whether the same path comes out again.
        chunk: images in one call, at most; None: 256 without a gradient, and what memory allows with one.

    Raises:
        ItoError: not a module, or no inferences.

    Example:
        ``Vote(net, inferences=20).predict(x, seed=0).labels``
    """

    def __init__(
        self, module: nn.Module, inferences: int = 20, rule: str = "hierarchical", paths_per_call: int = 4
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ItoError(f"A model must be an nn.Module, got {type(module).__name__}; wrap a function in one.")
        self.members = nn.ModuleList([module])
        self.members.training, self.training = module.training, module.training  # the module keeps its modes
        self._set_vote(inferences, rule)
        self.paths_per_call = whole_number("paths_per_call", paths_per_call)
        self.remarks: list[str] = []
        self.replayable = True
        self.chunk: int | None = None
        self._noisy: bool | None = None
        self._modes: tuple[bool, ...] = ()
        self._others = False  # whether numpy's or Python's global generator has to be seeded, too
        self._together = (
            False  # whether one call takes images on several paths: nothing is drawn for all images at once
        )

    @property
    def module(self) -> nn.Module:
        """The stranger's module."""
        return self.members[0]

    @property
    def _at_once(self) -> int:
        return self.chunk or _AT_ONCE

    @property
    def noisy(self) -> bool:
        """Whether two forward passes can differ, as `observe` has seen it.

        Raises:
            ItoError: no image was seen yet.
        """
        if self._noisy is None:
            raise ItoError(
                "Only images show whether a module is random: make vote = ito.Vote(module) and call vote.observe(x)."
            )
        return self._noisy

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Find out by forward passes of images ``(N, C, H, W)`` whether the module is random, and what it draws from.

        Noise may show rarely: like AutoAttack's check, five passes of the whole batch are compared. They are made again
        only after the mode of some submodule has changed.
        """
        modes = tuple(module.training for module in self.module.modules())
        if self._noisy is not None and self._modes == modes:
            return
        self._modes, self.remarks, self.replayable, self._others = modes, [], True, False
        self._together = False
        devices = range(torch.cuda.device_count()) if x.device.type == "cuda" else []
        with as_called(self.module), torch.random.fork_rng(devices), global_generators() as changed:
            first = answers(self.module, x, self._at_once)
            self._noisy = any(not alike(answers(self.module, x, self._at_once), first) for _ in range(4))
            if self._noisy:
                drawn = changed()
                self._others = bool(drawn)
                self._find_sources(x, drawn)

    def _find_sources(self, x: Tensor, drawn: list[str]) -> None:
        """Compare calls on the same path, and on the same path in another batch."""
        some = x[: min(len(x), self._at_once)]
        paths = PathRange(0, "selection", torch.arange(len(some), device=x.device))
        turned = torch.arange(len(some), device=x.device).flip(0)
        first, again = (self._logits(some, paths)[0] for _ in range(2))
        self.replayable = alike(first, again)
        if drawn:
            self.remarks.append(_OTHERS.format(" and ".join(drawn)))
        if not self.replayable:
            self.remarks.append(_NOT_REPLAYED)
        elif not drawn and len(some) > 1:
            other = self._logits(some[turned], paths.of(turned))[0][turned]
            spread = (first.amax() - first.amin()).clamp_min(1e-12)
            if not float((first - other).abs().amax()) <= 1e-3 * float(spread):
                self.remarks.append(_BY_POSITION)
        self._together = self.replayable and not self.remarks

    def forward(self, x: Tensor) -> Tensor:
        """Log mean probability over fresh paths, ``(N, C, H, W) -> (N, classes)``; differentiable."""
        paths = PathRange(secrets.randbits(62), "fresh", torch.arange(len(x), device=x.device), 0, self.paths_per_call)
        logits = self.path_logits(x, paths)
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """See `Voter.path_logits`."""
        self.observe(x.detach())
        return self._logits(x, replace(paths, index=image_names(paths.index, x)))

    def _logits(self, x: Tensor, paths: PathRange) -> Tensor:
        if not self._noisy:
            return answers(self.module, x).expand(paths.count, -1, -1)
        rows = torch.arange(len(x), device=x.device).repeat(paths.count)
        numbers = torch.arange(paths.first, paths.first + paths.count, device=x.device).repeat_interleave(len(x))
        at_once = len(rows) if torch.is_grad_enabled() else self._at_once
        return self._along(x, rows, numbers, paths, at_once).unflatten(0, (paths.count, len(x)))

    def _along(self, x: Tensor, rows: Tensor, numbers: Tensor, paths: PathRange, at_once: int) -> Tensor:
        """Logits ``(K, classes)`` of images ``x[rows]`` along their paths ``numbers``, both ``(K,)``.

        A call of the module has images on several paths where no draw is shared, else on one path.
        """
        if self._together:
            pieces = list(torch.arange(len(rows), device=x.device).split(at_once))
        else:
            one_path = ((numbers == number).nonzero()[:, 0] for number in numbers.unique())
            pieces = [piece for places in one_path for piece in places.split(at_once)]
        taken = self._sizes_of_weights()
        keys = make_keys(paths.seed, paths.purpose, 0, numbers, paths.index[rows])
        # There is no second member: these are no image's keys.
        common = None if self._together else make_keys(paths.seed, paths.purpose, 1, numbers)
        try:
            parts = []
            for p in pieces:
                shared = None if common is None else int(common[p[0]])
                parts.append(self._call(x.index_select(0, rows[p]), keys[p], shared, taken))
        except SharedDraw:  # the module has not drawn so when it was observed
            self._together = False
            return self._along(x, rows, numbers, paths, at_once)
        return torch.cat(parts)[torch.cat(pieces).argsort()]

    def _call(self, x: Tensor, keys: Tensor, common: int | None, taken: set[int]) -> Tensor:
        """One call: logits ``(N, classes)`` of images with their keys ``(N,)``; ``common`` as in `replayed`.

        The batch gets a size that is not ``taken`` by a weight: noise on weights is not noise on images.
        """
        n, more = len(x), 0
        while n + more in taken:
            more += 1
        if more:
            x, keys = (torch.cat([t, t[-1:].expand(more, *t.shape[1:])]) for t in (x, keys))
        with replayed(keys, common, self._others):
            return answers(self.module, x)[:n]

    def _sizes_of_weights(self) -> set[int]:
        """The first sizes of parameters and buffers; and 1, which a shape has often."""
        return {1, *(len(own) for own in (*self.module.parameters(), *self.module.buffers()) if own.dim())}

    def _begin(self, x: Tensor, seed: int, purpose: str, index: Tensor) -> tuple[int, list[Inferences]]:
        self.observe(x)
        if not self._noisy:
            with as_called(self.module):
                known = answers(self.module, x, self._at_once)
            return known.shape[1], [lambda images, rows, numbers: known[images[rows]]]

        def inferences(images: Tensor, rows: Tensor, numbers: Tensor) -> Tensor:
            with as_called(self.module):
                return self._along(x, images[rows], numbers, PathRange(seed, purpose, index), self._at_once)

        with as_called(self.module):
            one = torch.zeros(1, dtype=torch.int64, device=x.device)
            classes = self._along(x, one, one, PathRange(seed, purpose, index), self._at_once).shape[1]
        return classes, [inferences]


def as_voter(model: nn.Module, inferences: int = 20) -> Voter:
    """A model that votes: an `ItoResNet` as an ensemble of one, a `Voter` as it is, any other module in a `Vote`."""
    if isinstance(model, Voter):
        return model
    return ItoEnsemble([model], inferences) if isinstance(model, ItoResNet) else Vote(model, inferences)
