"""How far an attack moves the law of an ensemble's output: the paper's own argument, measured.

The paper argues that noise keeps "the density of the output in place" under attack. Here the density is that of an
image's logits over the paths of the noise. Two samples of paths, one on the clean image and one on the attacked image,
are compared by three distances (`DensityShift`), each beside what it is when nothing moved.

    import neuralsde_ito as ito
    from neuralsde_ito.studies.density import path_sample

    ensemble, config = ito.load_ensemble("runs/digits")
    attacked = ito.attacks.pgd(ensemble, x, y, norm="linf", eps=8 / 255)
    clean = path_sample(ensemble, x, paths=200)
    moved = path_sample(ensemble, attacked, paths=200, first=200)  # other paths than those of the clean images
    shift = ito.density_shift(clean, moved, members=len(ensemble.members))
    print(shift.energy.mean(), (shift.energy_p <= 0.05).double().mean())
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.ensemble import ItoEnsemble
from ..models.votes import winners
from ..noise.keys import PathRange
from ..validation import ItoError, image_names, shown, whole_number


@dataclass(frozen=True)
class DensityShift:
    """Distances between the clean and the attacked law of the output, for ``N`` images; tensors are float64 ``(N,)``.

    Attributes:
        energy: energy distance of logits, ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, in units of logits (Székely & Rizzo
            2013, https://doi.org/10.1016/j.jspi.2013.03.018). It is the plug-in estimate, at least 0. It grows with the
            spread of the logits, so compare two models by ``mmd`` or ``votes``.
        mmd: squared maximum mean discrepancy of logits, without unit; unbiased, so that it may fall below 0 (Gretton et
            al. 2012, https://jmlr.org/papers/v13/gretton12a.html). The kernel is ``exp(-d^2 / (2 h^2))``; ``h`` is the
            median distance in the image's pooled sample. With several members it lies lower by at most ``2 / paths``,
            and so does its null, because the paths of a sample are spread evenly over them.
        votes: Jensen-Shannon divergence of the shares of votes, in bits, from 0 to 1 (Lin 1991,
            https://doi.org/10.1109/18.61115).
        energy_null, mmd_null, votes_null: the 95 % quantile of each when nothing moved, by permutation.
        energy_p, mmd_p, votes_p: p-values: the share of permutations whose value is at least as large. The sample as it
            is counts as one of them.
        paths: size of each of the two samples.
    """

    energy: Tensor
    mmd: Tensor
    votes: Tensor
    energy_null: Tensor
    mmd_null: Tensor
    votes_null: Tensor
    energy_p: Tensor
    mmd_p: Tensor
    votes_p: Tensor
    paths: int


def density_shift(
    clean: Tensor, attacked: Tensor, permutations: int = 200, seed: int = 0, members: int = 1
) -> DensityShift:
    """Compare the outputs of the same images, clean and attacked, path by path.

    If nothing moved, all paths of an image come from one law, and any division of them into two halves is as likely as
    the given one. Random divisions therefore give the null of each distance. All distances and all images share the
    same divisions, so an image's figures do not depend on its batch.

    A model without noise is no special case: its laws are two points, and any move of them has the smallest p-value.

    Args:
        clean: logits ``(P, N, classes)`` along paths of the clean images.
        attacked: logits ``(P, N, classes)`` of the attacked images, along other paths. On the same paths the two
            samples would move together, and the null would not hold.
        permutations: random divisions; at least 19, since p-values cannot fall below ``1 / (permutations + 1)``.
        seed: of the divisions.
        members: of the ensemble; path ``p`` belongs to member ``p % members``, as in `path_sample`. Each sample holds
            equally many paths of every member, and so does each half of a division.

    Raises:
        ItoError: the shapes differ or are not those above, there are fewer than two paths, ``members`` does not divide
            them, or a logit is not finite.
    """
    permutations = whole_number("permutations", permutations, 19)
    paths = _check(clean, attacked, whole_number("members", members))
    halves = _halves(paths, members, permutations, seed)
    pooled = torch.cat([clean, attacked]).detach().cpu().double()
    # One matrix of distances at a time: those of all images together might not fit the memory.
    columns = [_judged(values) for image in pooled.unbind(1) for values in _distances(image, halves)]
    energy, mmd, votes = (torch.stack(columns[i::3], 1) for i in range(3))  # (3, N) each
    return DensityShift(
        energy[0], mmd[0], votes[0], energy[1], mmd[1], votes[1], energy[2], mmd[2], votes[2], paths
    )  # fmt: skip


@torch.no_grad()
def path_sample(
    ensemble: ItoEnsemble, x: Tensor, paths: int, seed: int = 0, index: Tensor | None = None, first: int = 0
) -> Tensor:
    """Logits ``(paths, N, classes)`` along paths of the report, on a quick copy of the ensemble.

    Sample the clean images on ``first=0`` and the attacked ones on ``first=paths``: common paths would hide the null.

    Args:
        ensemble: whose output is sampled.
        x: images ``(N, C, H, W)`` in [0, 1].
        paths: of each image; path ``p`` belongs to member ``p % members``.
        seed, index: name the paths, as in `ItoEnsemble.predict`; ``index`` is int64 ``(N,)``.
        first: number of the first path.

    Raises:
        ItoError: paths or first are not a multiple of the members.
    """
    members = len(ensemble.members)
    for name, number in (("paths", whole_number("paths", paths)), ("first", whole_number("first", first, 0))):
        if number % members:
            raise ItoError(
                f"{name} must be a multiple of the {members} members, so that each has equally many paths; got "
                f"{number}, take {number + members - number % members}."
            )
    named = PathRange(seed, "report", image_names(index, x), first, paths)
    return ensemble.quick(x).path_logits(x, named)


def _check(clean: Tensor, attacked: Tensor, members: int) -> int:
    """The number of paths of each sample, if the samples can be compared."""
    if clean.dim() != 3 or clean.shape != attacked.shape or not clean.numel():
        raise ItoError(
            "clean and attacked must be logits of one shape (paths, images, classes), got "
            f"{tuple(clean.shape)} and {tuple(attacked.shape)}."
        )
    paths = len(clean)
    if paths < 2:
        raise ItoError("One path of each image has no density; give at least two.")
    if paths % members:
        raise ItoError(f"{paths} paths cannot belong evenly to {members} members; take a multiple of {members}.")
    for name, logits in (("clean", clean), ("attacked", attacked)):
        odd = ~logits.isfinite().all(-1)  # (P, N)
        if bool(odd.any()):
            images = odd.any(0).nonzero()[:, 0].tolist()
            raise ItoError(
                f"{int(odd.sum())} of the {odd.numel()} {name} paths have logits that are not finite, and so no "
                f"distance from others; leave these images out: {shown(images)}."
            )
    return paths


def _halves(paths: int, members: int, permutations: int, seed: int) -> Tensor:
    """Divisions of the ``2P`` pooled paths: 1 for the first half, 0 for the second; the given one comes first.

    Returns:
        float64 ``(1 + permutations, 2P)``.
    """
    generator = torch.Generator().manual_seed(seed)
    own = paths // members
    # Pooled path p is at [p // members, p % members]; a division takes half of each column.
    ranks = torch.rand(permutations, 2 * own, members, generator=generator, device="cpu").argsort(1)
    given = torch.arange(2 * paths, device="cpu") < paths
    return torch.cat([given[None], (ranks < own).flatten(1)]).double()


def _distances(pooled: Tensor, halves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three distances between the halves of one image's logits ``(2P, classes)``, for each division: ``(D,)`` each.

    The sum over all pairs is the same for each division, so the sum over pairs across the halves gives that within.
    """
    n = len(pooled) // 2
    # Without the detour over a matrix product: equal logits must be at distance 0.
    distance = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist")

    def across(matrix: Tensor) -> Tensor:
        return ((halves @ matrix) * (1 - halves)).sum(1)

    energy = (4 * across(distance) - distance.sum()) / n**2

    above = torch.triu_indices(2 * n, 2 * n, 1, device=distance.device)
    bandwidth = distance[above[0], above[1]].median().clamp_min(torch.finfo(distance.dtype).tiny ** 0.25)
    kernel = (-((distance / bandwidth) ** 2) / 2).exp()
    cross = across(kernel)
    within = kernel.sum() - 2 * cross - 2 * n  # without a path's kernel with itself
    mmd = within / (n * (n - 1)) - 2 * cross / n**2

    votes = torch.nn.functional.one_hot(winners(pooled), pooled.shape[1]).double()  # (2P, classes)
    first = halves @ votes / n
    second = votes.sum(0) / n - first
    entropies = [torch.special.entr(shares).sum(1) for shares in ((first + second) / 2, first, second)]
    divergence = (entropies[0] - (entropies[1] + entropies[2]) / 2) / math.log(2)
    return energy, mmd, divergence


def _judged(values: Tensor) -> Tensor:
    """The given distance, its null's 95 % quantile and its p-value, ``(3,)``, from those of all divisions, ``(D,)``."""
    least = values[0] - 1e-9 * values.abs().amax()  # divisions that give the same differ in rounding
    quantile = values.quantile(0.95, interpolation="higher")  # above it p <= 0.05
    return torch.stack([values[0], quantile, (values >= least).double().mean()])
