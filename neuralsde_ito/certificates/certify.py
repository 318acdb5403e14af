"""Certificates by randomised smoothing (Cohen, Rosenfeld & Kolter 2019, https://arxiv.org/abs/1902.02918).

**What is certified.** Let ``v_m(z)`` be the probabilities with which one inference of member ``m`` on the image ``z``
votes for each class, over the noise inside the network. The smoothed vote of ``M`` members is::

    g(x) = E[ (v_1 + ... + v_M) / M  at  x + sigma W ],    W standard normal, one number a pixel

A certificate of class ``c`` with radius ``R`` says: ``g_c > 1/2`` at every ``x + d`` with ``|d|_2 < R``. There, class
``c`` has more than half of all inferences, if there were infinitely many. It says nothing of one vote of a few
inferences, which may miss ``c`` by chance, nor of the rule ``hierarchical``.

**Why it holds.**

1. *Noise inside only makes the base classifier random.* It is averaged out of ``v_m``, which is one fixed function of
   the image into [0, 1]; so is the members' mean. For every such function ``h``, ``Phi^-1(E h(x + sigma W))`` is
   Lipschitz in ``x`` with constant ``1 / sigma`` (Salman et al. 2019, Lemma 2, https://arxiv.org/abs/1906.04584). So
   ``g_c(x) >= p > 1/2`` gives ``g_c(x + d) >= Phi(Phi^-1(p) - |d| / sigma)``, which is above 1/2 for
   ``|d| < sigma Phi^-1(p)``. This needs noise of the image that is independent of the noise inside (its address is its
   own) and that is not clipped to [0, 1].
2. *The bound holds for members that differ.* Path ``q`` belongs to member ``q % M``, and ``n`` is a multiple of ``M``.
   So the count ``S`` of votes for ``c`` is a sum of independent Bernoulli draws whose mean probability is ``g_c(x)``,
   though they do not share one probability. Clopper and Pearson's bound exceeds ``p = g_c(x)`` only where ``S >= k``
   for a ``k`` with ``P(Bin(n, p) >= k) < alpha``. For ``k >= n p + 1`` the sum has no heavier tail than the binomial,
   ``P(S >= k) <= P(Bin(n, p) >= k)`` (Hoeffding 1956, Theorem 4, https://doi.org/10.1214/aoms/1177728178). A smaller
   ``k`` cannot occur: with ``alpha < 1/4`` it would contradict ``P(Bin(n, p) >= n p) > 1/4`` for ``p > 1/n`` (Greenberg
   & Mohri 2014, https://arxiv.org/abs/1306.1433); for ``p <= 1/n`` a bound above 1/2 needs ``k >= 2 >= n p + 1``.
   So a certificate is false with probability ``alpha`` at most, for each image.
3. *The class is chosen by other samples*: ``n0`` paths of the purpose ``selection``; the ``n`` that count are of the
   purpose ``report``.
4. *Early stops end in an abstention only*, so they add nothing to ``alpha``. Of an image that all ``n`` samples would
   have certified, they lose the certificate with probability ``beta`` at most (`bounds.out_of_reach`, which spends
   ``beta / 7`` at each of at most seven looks).

Of ``N`` images up to ``alpha N`` certificates are expected to be false. Two things lie outside of the proof: the
normals come from a generator (their tails end at 6.6 standard deviations), and the network rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..attacks.targets import as_target
from ..models.ensemble import ItoEnsemble
from ..models.inspection import as_called
from ..models.recast import ItoResNet
from ..models.vote import Vote
from ..models.votes import winners
from ..models.voting import Voter
from ..modules import copied
from ..noise.keys import PathRange
from ..outcomes import ABSTAIN, Rate
from ..sde.solvers import find_solver
from ..validation import ItoError, check_images, check_input_sigma, check_labels, image_names, shown, whole_number
from . import bounds

BATCH = 20  # images at a time, by default: each is sampled 10,000 times
COLUMNS = ("index", "selected", "votes", "drawn")  # the tensors of a `Certificate`
_MOST = 10**9  # samples
_AT_ONCE = 1 << 14  # samples in one call, whose logits are held together


@dataclass(frozen=True)
class Sampling:
    """How an image is sampled.

    Attributes:
        sigma: standard deviation of the noise on the image, in pixel units.
        n0: samples that choose the class.
        n: samples that count for it; `certify` rounds it up to a multiple of the members.
        alpha: the probability, for each image, of a false certificate.
        beta: the probability, for each image, that stopping early loses a certificate; 0 stops only where it is certain
            that there is none.
        seed: of the noise.

    Raises:
        ItoError: a number out of range.
    """

    sigma: float
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    beta: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        if check_input_sigma(self.sigma) == 0:
            raise ItoError("A certificate needs noise on the image: give a sigma above 0 (pixel units), such as 0.25.")
        for name, least in (("n0", 1), ("n", 1), ("seed", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if max(self.n0, self.n) > _MOST:
            raise ItoError(f"n0 and n must be at most {_MOST:,}, got {self.n0:,} and {self.n:,}.")
        if not 0 < self.alpha < 0.25:
            raise ItoError(f"alpha must be above 0 and below 1/4, such as 0.001, got {shown(self.alpha)}.")
        if not 0 <= self.beta < 0.25:
            raise ItoError(f"beta must be at least 0 and below 1/4, such as 0.001, got {shown(self.beta)}.")
        bounds.least_count(self.n, self.alpha)

    def among(self, members: int) -> Sampling:
        """The same with as many samples of each member."""
        return replace(self, n=-(-self.n // members) * members)

    @property
    def largest_radius(self) -> float:
        """The radius of an image on which all ``n`` samples agree."""
        return float(bounds.radius(self.n, self.n, self.sigma, self.alpha))


@dataclass(frozen=True, eq=False)
class Certificate:
    """Certificates of ``N`` images; tensors are on the CPU.

    Attributes:
        sampling: what was drawn; its ``n`` is a multiple of the members.
        index: int64 ``(N,)``, the images' names in the noise's address.
        selected: int64 ``(N, classes)``, votes of the ``n0`` samples that chose the class.
        votes: int64 ``(N, classes)``, votes of the samples that count.
        drawn: int64 ``(N,)``, how many of these there are; fewer than ``n`` where the sampling stopped early. Samples
            whose logits were not finite vote for no class.
    """

    sampling: Sampling
    index: Tensor
    selected: Tensor
    votes: Tensor
    drawn: Tensor

    @property
    def candidates(self) -> Tensor:
        """The class that each image may be certified for: that of most of the ``n0`` samples. int64 ``(N,)``."""
        return self.selected.argmax(1)

    @property
    def counts(self) -> Tensor:
        """The samples that vote for the candidate, int64 ``(N,)``."""
        return self.votes.gather(1, self.candidates[:, None])[:, 0]

    @cached_property
    def radii(self) -> Tensor:
        """Certified L2 radii in pixel units, float64 ``(N,)``; 0 without a certificate."""
        radii = bounds.radius(self.counts.numpy(), self.sampling.n, self.sampling.sigma, self.sampling.alpha)
        return torch.from_numpy(radii) * (self.drawn == self.sampling.n)

    @property
    def labels(self) -> Tensor:
        """The certified classes, int64 ``(N,)``; `ABSTAIN` without a certificate."""
        return torch.where(self.radii > 0, self.candidates, ABSTAIN)

    def holds(self, truth: Tensor, radius: float) -> Tensor:
        """Which images are certified for their true label ``(N,)`` against all changes of length ``radius``."""
        truth = check_labels(truth, len(self.index)).cpu()
        return (self.labels == truth) & (self.radii > radius)

    def accuracy(self, truth: Tensor, radius: float) -> Rate:
        """Certified accuracy at a radius, with its 95 % Wilson interval over images."""
        holds = self.holds(truth, radius)
        return Rate.of(int(holds.sum()), len(holds))

    def average_radius(self, truth: Tensor) -> float:
        """The mean radius over all images, where wrong ones and abstentions have 0 (Zhai et al. 2020).

        The weaker summary: a few images with a large radius hide many with none, and its largest value is set by ``n``
        and ``alpha``. Read `accuracy` at the radii that matter.
        """
        return float((self.radii * (self.labels == check_labels(truth, len(self.index)).cpu())).mean())

    @classmethod
    def join(cls, parts: Sequence[Certificate]) -> Certificate:
        """Several batches as one."""
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS}
        return cls(parts[0].sampling, **columns)


class Smoothed(nn.Module):
    """A network of the image plus normal noise; `Vote` gives what it draws an address."""

    def __init__(self, net: nn.Module, sigma: float) -> None:
        super().__init__()
        self.net, self.sigma = net, sigma
        self.training = net.training

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        return self.net(x + self.sigma * torch.randn_like(x))


def smoothed(model: nn.Module, sigma: float | None = None) -> tuple[Voter, float]:
    """A model with noise on its images, and the standard deviation of that noise.

    Args:
        model: an `ItoEnsemble` or `ItoResNet` with ``input_sigma``, or any other module from images to logits.
        sigma: of the noise, which is added to the images of any other module.

    Raises:
        ItoError: no sigma, or another one than that of the members; a solver that chooses its steps.
    """
    if isinstance(model, ItoEnsemble | ItoResNet):
        ensemble = model if isinstance(model, ItoEnsemble) else ItoEnsemble([model])
        own = sorted({float(member.input_sigma) for member in ensemble.members})
        if len(own) > 1:
            raise ItoError(f"The members have noise of {own} on their images; a certificate needs one input_sigma.")
        if (own[0] if sigma is None else sigma) != own[0] or not own[0]:
            raise ItoError(
                f"The members have input_sigma {own[0]:g}: recast them with the sigma of the certificate, such as "
                "recast(net, input_sigma=0.25), or take with_input_sigma(ensemble, 0.25)."
            )
        for member in ensemble.members:
            if find_solver(str(member.solver)).adaptive:
                raise ItoError(
                    f"Solver {member.solver!r} chooses its steps for the whole batch, so that samples are not "
                    "independent; certify with a solver of fixed steps."
                )
        return ensemble, own[0]
    if sigma is None:
        raise ItoError("The noise on the image is not known: give sigma, in pixel units, such as 0.25.")
    net = model.module if isinstance(model, Vote) else model
    if not isinstance(net, nn.Module):
        raise ItoError(f"A model must be an nn.Module, got {type(net).__name__}; wrap a function in one.")
    return Vote(Smoothed(net, check_input_sigma(sigma))), float(sigma)


def with_input_sigma(ensemble: ItoEnsemble, sigma: float) -> ItoEnsemble:
    """A copy of the ensemble whose members have this noise on their images, in pixel units."""
    ensemble = copied(ensemble)
    for member in ensemble.members:
        member.input_sigma = check_input_sigma(sigma)
    return ensemble


class Certifier:
    """A model that is sampled; use it inside `as_called`.

    Args:
        voter: from `smoothed`.
        sampling: how; its sigma is the voter's.
        x: images ``(N, C, H, W)``, by which a module shows what it draws.

    Raises:
        ItoError: images that cannot be; a module whose answer to an image depends on its batch.
    """

    def __init__(self, voter: Voter, sampling: Sampling, x: Tensor) -> None:
        check_images(x, voter.channels)
        self.members, self.sampling = len(voter.members), sampling.among(len(voter.members))
        self.target = as_target(voter, x)

    @torch.no_grad()
    def certify(self, x: Tensor, index: Tensor) -> Certificate:
        """The certificates of a batch: images ``(N, C, H, W)`` and their names ``(N,)``."""
        check_images(x)
        s, n = self.sampling, len(x)
        selected = self._votes(x, index, "selection", 0, s.n0)
        candidates, votes = selected.argmax(1), torch.zeros_like(selected)
        drawn, active = torch.zeros(n, dtype=torch.int64, device="cpu"), torch.arange(n, device="cpu")
        least = bounds.least_count(s.n, s.alpha)
        for look in (*bounds.looks(s.n, self.members), s.n):
            first = int(drawn[active[0]])
            rows = active.to(x.device)
            votes[active] += self._votes(x[rows], index[rows], "report", first, look - first)
            drawn[active] = look
            agreed = votes[active].gather(1, candidates[active, None])[:, 0]
            stop = bounds.out_of_reach(agreed.numpy(), look, s.n, least, s.beta / bounds.LOOKS)
            active = active[~torch.from_numpy(stop)]
            if not len(active):
                break
        return Certificate(s, index.cpu(), selected, votes, drawn)

    def _votes(self, x: Tensor, index: Tensor, purpose: str, first: int, count: int) -> Tensor:
        """Votes of samples ``first`` to ``first + count - 1`` of each image, int64 ``(N, classes)`` on the CPU."""
        votes: Tensor | None = None
        for start in range(first, first + count, piece := max(1, _AT_ONCE // len(x))):
            paths = PathRange(self.sampling.seed, purpose, index, start, min(piece, first + count - start))
            logits = self.target.path_logits(x, paths)
            labels = winners(logits).T + 1  # 0: no class
            drawn = labels.new_zeros(len(x), 1 + logits.shape[2]).scatter_add_(1, labels, torch.ones_like(labels))
            votes = drawn if votes is None else votes + drawn
        assert votes is not None
        return votes[:, 1:].contiguous().cpu()


def certify(
    model: nn.Module,
    x: Tensor,
    sigma: float | None = None,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    beta: float = 0.001,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int = BATCH,
    tick: Callable[[int], object] = lambda images: None,
) -> Certificate:
    """L2 radii within which the smoothed vote of a model provably keeps its class.

    One sample is one inference along one path. Each certificate is false with probability ``alpha`` at most; what
    exactly is certified, and why that holds for an ensemble with noise inside, is said at the top of this file.

    Args:
        model: an `ItoEnsemble` whose members have one ``input_sigma`` above 0, or any other module from images in
            [0, 1] to logits, random or not; it must take values outside of [0, 1].
        x: images ``(N, C, H, W)`` in [0, 1].
        sigma: standard deviation of the noise on the image, in pixel units; default the members'.
        n0: samples that choose the class.
        n: samples that count, rounded up to a multiple of the members.
        alpha: the probability, for each image, of a false certificate.
        beta: the probability, for each image, that stopping early loses a certificate that ``n`` samples would have
            given; 0 stops only where no certificate is possible any more.
        seed: of the noise.
        index: int64 ``(N,)``, the images' names in the noise's address; default their position in ``x``.
        batch_size: images at a time; not in the result.
        tick: called after each batch with its number of images.

    Raises:
        ItoError: images or numbers out of range; no sigma, or not that of the members; a model whose answer to an image
            depends on its batch.

    Example:
        ``certify(ensemble, x).radii``
    """
    voter, sigma = smoothed(model, sigma)
    sampling = Sampling(sigma, n0, n, alpha, beta, seed)
    check_images(x, voter.channels)
    index, size = image_names(index, x), whole_number("batch_size", batch_size)
    parts = []
    with as_called(voter):
        certifier = Certifier(voter, sampling, x[:size])
        for images, names in zip(x.split(size), index.split(size), strict=True):
            parts.append(certifier.certify(images, names))
            tick(len(images))
    return Certificate.join(parts)
