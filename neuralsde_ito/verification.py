"""Claims of an evidence bundle, held against votes on noise that they have never met."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .bundle import ROUNDING, Evidence, check_evidence, norms_of
from .ensemble import ItoEnsemble
from .outcomes import Paired, Rate
from .validation import ItoError

_LEVEL = 0.01  # of the paired test


@dataclass(frozen=True)
class Claim:
    """One thing that a bundle says, what was found instead, and whether it stands."""

    name: str
    claimed: str
    found: str
    stands: bool
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """Claims held against votes on fresh noise: the ``seeds`` of the reports, one each."""

    claims: tuple[Claim, ...]
    seeds: tuple[int, ...] = ()

    @property
    def stands(self) -> bool:
        """Whether every claim does."""
        return all(claim.stands for claim in self.claims)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"stands": self.stands, "seeds": list(self.seeds), "claims": [asdict(claim) for claim in self.claims]}


def verify_bundle(
    evidence: Evidence,
    ensemble: ItoEnsemble,
    seed: int | None = None,
    repeats: int = 1,
    x: Tensor | None = None,
    y: Tensor | None = None,
    batch_size: int = 250,
    tick: Callable[[int], object] = lambda n: None,
) -> Verification:
    """Hold every claim of a bundle against the ensemble, on paths that the claims have never met.

    A figure stands where its recomputation lies in its 95 % Wilson interval, rounded outward to whole images, and does
    not differ from it beyond chance image by image (McNemar's exact test at 1 %). With ``repeats`` above 1, an attacker
    who may ask as often counts too: the images that are right in every report must not fall below the interval.

    Args:
        evidence: as read by `load_bundle`, which has compared the images with their SHA-256.
        ensemble: the one of the claims, on any device, with as many inferences and the same rule.
        seed: of the first report, others follow it; default one that nobody can foretell.
        repeats: fresh reports under attack.
        x, y: the data set's own images ``(N, C, H, W)`` and labels ``(N,)`` in the order of ``evidence.index``, to
            be held against the bundle's. Without labels, swapped ones show only where the figures change with them.
        batch_size: images at a time; not in the result.
        tick: called with the number of images done, ``(1 + repeats) N`` in all.

    Raises:
        ItoError: the bundle's own seed, an ensemble of other size, data of other shape, noise that is not fresh.
    """
    check_evidence(evidence)
    if evidence.noise != "fresh":
        raise ItoError(f"Only claims on fresh noise can be verified on other paths; these are on {evidence.noise!r}.")
    if seed == evidence.seed:
        raise ItoError(f"The seed {seed} is the bundle's own: it would repeat the claims instead of checking them.")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ItoError(f"repeats must be a whole number of at least 1, got {repeats!r}.")
    if len(ensemble.members) != len(evidence.votes):
        raise ItoError(f"The claims are of {len(evidence.votes)} members; this ensemble has {len(ensemble.members)}.")
    seed = secrets.randbits(63) if seed is None else seed
    seeds = tuple(s for s in range(seed, seed + repeats + 1) if s != evidence.seed)[:repeats]
    truth, index = evidence.truth.cpu(), evidence.index
    device = next(ensemble.parameters()).device

    def correct(images: Tensor, seed: int) -> Tensor:
        # What is no image cannot be voted on; the claim about the ball has failed by then.
        batches = images.nan_to_num(0).clamp(0, 1).split(batch_size)
        parts = []
        for part, names in zip(batches, index.split(batch_size), strict=True):
            parts.append(ensemble.predict(part.to(device), seed, names).labels.cpu())
            tick(len(part))
        return torch.cat(parts) == truth

    claims = [_ball_claim(evidence), _harm_claim(evidence)]
    if y is not None:
        _same_shape("y", y, truth)
        claims.append(_equal_claim("true labels", y.cpu() == truth))
    if x is not None:
        _same_shape("x", x, evidence.originals)
        distance = (x.cpu() - evidence.originals.cpu()).abs().flatten(1).amax(1)
        claims.append(_equal_claim("original images", distance <= ROUNDING))
    unseen = "" if y is not None else " True labels were not compared: swapped ones would show only here."
    claims.append(
        _figure_claim("clean accuracy", evidence.clean.cpu() == truth, correct(evidence.originals, seeds[0]), unseen)
    )
    claimed = evidence.labels.cpu() == truth
    reports = [correct(evidence.images, s) for s in seeds]
    claims.append(_figure_claim("accuracy under attack", claimed, reports[0]))
    if repeats > 1:
        before, always = _rate(claimed), _rate(torch.stack(reports).all(0))
        note = f"Right in each of {repeats} reports: what is left to an attacker who may ask as often."
        stands = always.count >= _within(before)[0]
        claims.append(Claim(f"worst of {repeats} reports", _text(before), _text(always), stands, note))
    return Verification(tuple(claims), seeds)


def _ball_claim(evidence: Evidence) -> Claim:
    largest = float(norms_of(evidence).amax())
    both = torch.stack([evidence.originals, evidence.images])
    pixels = bool(((both >= 0) & (both <= 1)).all())  # false of NaN too
    found = f"at most {largest:.6g}, pixels {'in' if pixels else 'NOT in'} [0, 1]"
    stands = pixels and largest <= evidence.eps + ROUNDING
    return Claim("inside the ball", f"{evidence.norm} at most {evidence.eps:.6g}", found, stands)


def _harm_claim(evidence: Evidence) -> Claim:
    """More right answers under attack than without are beyond chance the mark of true labels made to fit."""
    paired = Paired.of(evidence.clean == evidence.truth, evidence.labels == evidence.truth)
    stands = paired.only_second <= paired.only_first or paired.p >= _LEVEL
    found = f"{paired.only_first} lost, {paired.only_second} gained"
    return Claim("no gain from attacks", "right answers are lost, not gained", found, stands)


def _equal_claim(name: str, equal: Tensor) -> Claim:
    differing = int((~equal).sum())
    return Claim(name, f"{len(equal)} of the data set", f"{differing} differ", differing == 0)


def _figure_claim(name: str, claimed: Tensor, found: Tensor, note: str = "") -> Claim:
    """Two times "is correct" ``(N,)``, claimed and recomputed."""
    before, after, paired = _rate(claimed), _rate(found), Paired.of(claimed, found)
    low, high = _within(before)
    stands = low <= after.count <= high and paired.p >= _LEVEL
    test = f"Right only as claimed: {paired.only_first}, only as recomputed: {paired.only_second}; p = {paired.p:.2g}."
    return Claim(name, _text(before), _text(after), stands, test + note)


def _within(rate: Rate) -> tuple[int, int]:
    """The interval in whole images, rounded outward: with 1 image of 30 claimed, 0 of 30 is no contradiction."""
    return math.floor(rate.low * rate.n), math.ceil(rate.high * rate.n)


def _rate(correct: Tensor) -> Rate:
    return Rate.of(int(correct.sum()), len(correct))


def _text(rate: Rate) -> str:
    return f"{rate.count}/{rate.n} = {100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _same_shape(name: str, given: Tensor, own: Tensor) -> None:
    if given.shape != own.shape:
        raise ItoError(f"{name} must be {tuple(own.shape)}, in the bundle's order, got {tuple(given.shape)}.")
