"""Claims of an evidence bundle, held against the data, the ensemble's votes and the attack, each made again.

A bundle says: these images, chosen by nobody, were attacked by this suite with this seed; these votes were cast; these
labels follow. Nearly all of that is a pure function of the seed, so it is computed again and must come out again: all
votes, and for a random sample of images the whole attack. What the seed's luck may have done is then tested with other
seeds. Images and votes of an honest bundle are interchangeable with those of another seed, image by image, so the exact
test is McNemar's: of the images that differ, each falls to either side like a fair coin.

What verify cannot show
    - That the ensemble, the data and the surrogates are those that a reader has in mind: they are the verifier's own.
    - That no stronger attack exists. A weak suite that says that it is weak (``effort`` 0.01) is an honest bundle.
    - That the seed was not chosen out of many, as far as luck goes: of a hundred honest bundles one is the best. The
      tests on other seeds bound what that gains.
    - A forgery of few images: the attack is made again on a sample. With 30 images, images that this attack did not
      make are found with 99 % where they are every fifth, with 82 % where every tenth, with 45 % where every twentieth.
      Votes and labels are checked of all images.
    - Who ran it, when and at which cost in time: the command and the date are words.
    - The cost of an attack that stops early, closer than its least and greatest possible cost and what the sample says.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from scipy.stats import binom, hypergeom
from torch import Tensor

from ..attacks.apgd import APGD
from ..attacks.objectives import TARGETED
from ..attacks.selection import worst_labels
from ..attacks.square import Square
from ..attacks.suite import Step, Suite, SuiteResult
from ..attacks.targets import KnownPaths, as_target
from ..data import Split
from ..models.ensemble import ItoEnsemble
from ..modules import evaluating
from ..outcomes import ABSTAIN, Paired, Rate
from ..validation import ItoError, whole_number
from .bundle import (
    CLEAN,
    ROUNDING,
    Evidence,
    attack_names,
    cases_of,
    check_evidence,
    fingerprint,
    fingerprint_choice,
    fingerprint_split,
    norms_of,
    votes_in,
    votes_of,
)

LEVEL = 0.01  # at most so many honest bundles fail by chance, all tests together
_EACH = LEVEL / 10  # of each of the tests: clean, denial, evasion, three of order, two attacks again, images met, costs
# What another machine's last bits may change; none of it differs on one machine (measured).
_TIES = 0.002  # of all inferences, and of the images' labels
_SPARE = 20  # one image of so many that are attacked again with the bundle's own seed
_IMAGES = ("true labels", "original images")  # the claims without which votes and attacks are of something else
_APART = 0.3  # of a perturbation's length: what two runs of one attack differ by, where a few signs of a gradient flip


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
    """Claims held against what was found; ``seed`` is that of the fresh noise, the sample and the second attack."""

    claims: tuple[Claim, ...]
    seed: int | None = None

    @property
    def stands(self) -> bool:
        """Whether every claim does."""
        return all(claim.stands for claim in self.claims)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"stands": self.stands, "seed": self.seed, "claims": [asdict(claim) for claim in self.claims]}


def verify_bundle(
    evidence: Evidence,
    ensemble: ItoEnsemble | None,
    split: Split | None,
    suite: Suite | None,
    seed: int | None = None,
    sample: int = 30,
    batch_size: int = 250,
    tick: Callable[[int], object] = lambda n: None,
) -> Verification:
    """Hold every claim of a bundle against what can be computed again. What cannot be compared does not stand.

    An honest bundle fails in at most 1 % of seeds, all tests together (measured on digits: 0 of 352, over 200 seeds).

    Args:
        evidence: as read by `load_bundle`, which has compared the images with their SHA-256.
        ensemble: the defender, on any device, with the inferences and the rule that are claimed; None: not there.
        split: the whole test split of which the images are `Split.first`; None: not there.
        suite: the attacks that the bundle claims, their surrogates made from ``ensemble``; its seed, noise and
            repeat are the bundle's. None: not there.
        seed: of fresh noise, sample and second attack; default one that nobody can foretell.
        sample: images that are attacked again, twice.
        batch_size: images at a time; not in the result.
        tick: called with a number of images done; `work` of them in all.

    Raises:
        ItoError: evidence that does not fit together, or the bundle's own seed.

    Example:
        ::

            from functools import partial
            from neuralsde_ito.checkpoints import load_base
            from neuralsde_ito.evaluation import NoiseFree

            evidence = ito.load_bundle("evidence/linf-8of255")
            ensemble, config = ito.load_ensemble("runs/mine")
            nets = {"resnet": load_base("runs/mine", config), "noise-free": NoiseFree(ensemble)}
            effort = evidence.config["suite"]["effort"]
            suite = ito.Suite(partial(ito.standard, evidence.norm, noisy=ensemble.noisy, effort=effort), nets)
            found = ito.verify_bundle(evidence, ensemble, ito.load_data("digits").test, suite)
            print(found.stands)
    """
    check_evidence(evidence)
    whole_number("sample", sample)
    if seed is None:
        seed = secrets.randbits(62)
    if abs(seed - evidence.seed) < evidence.repeat:  # reports count upward from a seed
        own = f"{evidence.seed}" + (f" to {evidence.seed + evidence.repeat - 1}" if evidence.repeat > 1 else "")
        raise ItoError(f"With the seed {seed} the noise would be the bundle's own (seed {own}); give another.")
    claims = [_ball(evidence), _unattacked(evidence), _labels(evidence), _order(evidence)]
    claims += _data(evidence, split)
    defender = _defender(evidence, ensemble)
    radii = _radii(evidence)
    settings = _settings(evidence, suite, radii)
    claims += [defender, settings, _sources(evidence, radii)]
    if not defender.stands or ensemble is None:
        names = ["clean votes", "denial's votes", "evasion's votes", "votes on fresh noise", "attacks made again"]
        return Verification((*claims, *(_absent(name, "no such ensemble to compare with") for name in names)), seed)
    if split is not None and not all(claim.stands for claim in claims if claim.name in _IMAGES):
        return Verification((*claims, _absent("votes and attacks", "not the data set's images")), seed)
    claims += _replayed(evidence, ensemble, batch_size, tick)
    claims += _fresh(evidence, ensemble, seed, batch_size, tick)
    if not settings.stands or suite is None:
        return Verification((*claims, _absent("attacks made again", "no such suite to compare with")), seed)
    claims += _attacked(evidence, ensemble, suite, radii, seed, sample, batch_size, tick)
    return Verification(tuple(claims), seed)


def work(evidence: Evidence, sample: int = 30) -> int:
    """The sum of what `verify_bundle` reports to ``tick``."""
    n = len(evidence.index)
    votes, attacks = (6, 2) if evidence.noise == "fresh" else (3, 1 if evidence.noise == "known" else 2)
    return votes * n + attacks * min(sample, n)


def _absent(name: str, why: str) -> Claim:
    return Claim(name, "to be computed again", why, False)


def _differing(name: str, claimed: str, differing: Tensor, note: str = "", allowed: int = 0) -> Claim:
    """A claim of every image: bool ``(N,)``, whether it is otherwise."""
    count = int(differing.sum())
    return Claim(name, claimed, f"{count} of {len(differing)} differ", count <= allowed, note)


# --- what the bundle alone must hold ----------------------------------------------------------------------


def _ball(evidence: Evidence) -> Claim:
    cases = cases_of(evidence).values()
    largest = max(float(norms_of(evidence, case).amax()) for case in cases)
    values = torch.stack([evidence.originals, *(case.images for case in cases)])
    pixels = bool(((values >= 0) & (values <= 1)).all())  # false of NaN too
    found = f"at most {largest:.6g}, pixels {'in' if pixels else 'NOT in'} [0, 1]"
    stands = pixels and largest <= evidence.eps + ROUNDING
    return Claim("inside the ball", f"{evidence.norm} at most {evidence.eps:.6g}", found, stands)


def _unattacked(evidence: Evidence) -> Claim:
    """An image that no attack made is the clean one, bit for bit."""
    differing = torch.zeros(len(evidence.index), dtype=torch.bool)
    for case in cases_of(evidence).values():
        differing |= (case.source == CLEAN) & (case.images != evidence.originals).flatten(1).any(1)
    return _differing("unattacked images", "the originals, bit for bit", differing)


def _labels(evidence: Evidence) -> Claim:
    """`worst_labels` of the recorded votes, and no more votes than inferences."""
    claimed = {"clean": evidence.clean, **{name: case.labels for name, case in cases_of(evidence).items()}}
    differing = torch.zeros(len(evidence.index), dtype=torch.bool)
    for name, votes in votes_in(evidence).items():
        differing |= worst_labels(votes, evidence.truth, evidence.rule, evidence.inferences) != claimed[name]
        differing |= ((votes < 0).any(3) | (votes.sum(3) > evidence.inferences)).any(1).any(0)
    what = f"by the {evidence.rule} rule, {evidence.inferences} inferences, worst of {evidence.repeat}"
    return _differing("labels follow from votes", what, differing)


def _order(evidence: Evidence) -> Claim:
    """Denial is right no more often than the clean images or evasion, evasion is wrong no less often than denial."""
    truth, denial, evasion = evidence.truth, evidence.denial.labels, evidence.evasion.labels
    pairs = (
        (evidence.clean == truth, denial == truth),
        (evasion == truth, denial == truth),
        (_wrong(evasion, truth), _wrong(denial, truth)),
    )
    gains = [_excess(low, high) for high, low in pairs]
    against, for_ = zip(*((one, two) for one, two, _ in gains), strict=True)
    note = (
        f"Images right under denial and not clean: {against[0]} (the other way round {for_[0]}); right under denial "
        f"and not under evasion: {against[1]} ({for_[1]}); wrong under denial and not under evasion: "
        f"{against[2]} ({for_[2]})."
    )
    found = f"{', '.join(map(str, against))} against it"
    return Claim("worst cases in order", "no right answer gained", found, min(p for *_, p in gains) >= _EACH, note)


def _wrong(labels: Tensor, truth: Tensor) -> Tensor:
    return (labels != truth) & (labels != ABSTAIN)


def _excess(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """McNemar's exact test to one side, of bool ``(N,)``: only the first, only the second, p of so many first ones."""
    one, two = int((first & ~second).sum()), int((second & ~first).sum())
    return one, two, float(binom.sf(one - 1, one + two, 0.5)) if one + two else 1.0


def _radii(evidence: Evidence) -> list[float]:
    """Those of the sweep up to this one; none if the config has none that can be."""
    settings = evidence.config.get("suite")
    radii = settings.get("radii") if isinstance(settings, dict) else None
    if not isinstance(radii, list) or not radii or not all(type(eps) in (int, float) for eps in radii):
        return []
    rising = all(a < b for a, b in itertools.pairwise(radii))
    return [float(eps) for eps in radii] if rising and radii[0] >= 0 and radii[-1] == evidence.eps else []


def _sources(evidence: Evidence, radii: list[float]) -> Claim:
    """An image lies in the ball of the attack that made it; that attack has met it; attacks meet ever fewer images."""
    name, n = "sources", len(evidence.index)
    claimed = "attacks that met the image, at its radius"
    if not radii or len(evidence.attacks) % (2 * len(radii)):
        return Claim(name, claimed, "the config names no radii that fit the attacks", False)
    goals = len(evidence.attacks) // (2 * len(radii))  # steps of one goal at one radius
    reached = torch.tensor(radii).double().repeat_interleave(2 * goals)
    outside = torch.zeros(n, dtype=torch.bool)
    for case in cases_of(evidence).values():
        outside |= (case.source != CLEAN) & (norms_of(evidence, case) > reached[case.source] + ROUNDING)
    # An image that a later step of a goal changed had not fallen before it.
    met = torch.tensor(evidence.attacked).view(-1, goals)
    made = torch.stack([case.source for case in cases_of(evidence).values()])  # (2, N)
    least = torch.zeros_like(met)
    for number in range(len(evidence.attacks)):
        last = (number // goals + 1) * goals
        least[number // goals, number % goals] = int(((made >= number) & (made < last)).any(0).sum())
    possible = bool(((met >= least) & (met <= n)).all() and (met[:, 1:] <= met[:, :-1]).all())
    found = f"{int(outside.sum())} outside, numbers of images {'possible' if possible else 'NOT possible'}"
    return Claim(name, claimed, found, possible and not bool(outside.any()))


# --- the data, the ensemble, the suite --------------------------------------------------------------------


def _data(evidence: Evidence, split: Split | None) -> Iterator[Claim]:
    """The split, and whether the images are the split's own choice of so many: otherwise a forger could leave out
    the images that fell."""
    prints, n = evidence.fingerprints, len(evidence.index)
    claimed = {name: str(prints.get(name))[:12] for name in ("split", "choice")}
    if split is None:
        for name in ("data split", "choice of images", "true labels", "original images"):
            yield _absent(name, "no data to compare with")
        return
    found = fingerprint_split(split)
    yield Claim("data split", claimed["split"], found[:12], prints.get("split") == found)
    note = f"The split's own choice of {n} images. Of another choice it cannot be told who was left out."
    if n > len(split):
        yield Claim("choice of images", claimed["choice"], f"the split has {len(split)} images", False, note)
        yield _absent("true labels", "another choice")
        yield _absent("original images", "another choice")
        return
    names, x, y = (torch.cat(parts) for parts in zip(*split.first(n).batches(250), strict=True))
    found = fingerprint_choice(names, y, x)
    own = fingerprint_choice(evidence.index, evidence.truth, evidence.originals.nan_to_num(0))
    yield Claim("choice of images", claimed["choice"], found[:12], prints.get("choice") == found == own, note)
    yield _differing("true labels", "the data set's", (evidence.truth != y) | (evidence.index != names))
    alike = x.shape == evidence.originals.shape
    distance = (x - evidence.originals).abs().flatten(1).amax(1) if alike else torch.full((n,), math.inf)
    yield _differing("original images", "the data set's", ~(distance <= ROUNDING) | (evidence.index != names))


def _defender(evidence: Evidence, ensemble: ItoEnsemble | None) -> Claim:
    """Weights and solver by fingerprint, and how the ensemble votes."""
    name, members = "ensemble", evidence.clean_votes.shape[1]
    vote = f"{members} x {evidence.inferences}, {evidence.rule}"
    claimed = f"{str(evidence.fingerprints.get('weights'))[:12]}, {vote}"
    if ensemble is None:
        return Claim(name, claimed, "no ensemble to compare with", False)
    found = fingerprint(ensemble)
    own = f"{len(ensemble.members)} x {ensemble.inferences}, {ensemble.rule}"
    stands = evidence.fingerprints.get("weights") == found and vote == own
    note = "" if own == vote else "Give --inferences and --rule as the bundle claims them."
    return Claim(name, claimed, f"{found[:12]}, {own}", stands, note)


def _settings(evidence: Evidence, suite: Suite | None, radii: list[float]) -> Claim:
    """The norm, and the names of all attacks at all radii."""
    settings = evidence.config.get("suite")
    said = settings if isinstance(settings, dict) else {}
    claimed = f"{str(said.get('name'))[:30]}, effort {str(said.get('effort'))[:12]}"
    if suite is None:
        return Claim("suite", claimed, "no suite to compare with", False)
    try:
        names, norms = attack_names(suite, radii), {s.attack.norm for eps in radii for s in suite.steps(eps)}
    except ItoError as error:
        return Claim("suite", claimed, str(error).rstrip("."), False)
    same = names == evidence.attacks and norms == {evidence.norm}
    found = f"{len(names)} attacks, {'the same' if same else 'others'}"
    return Claim("suite", f"{claimed}, {len(evidence.attacks)} attacks", found, same and bool(radii))


# --- votes ------------------------------------------------------------------------------------------------


def _replayed(
    evidence: Evidence, ensemble: ItoEnsemble, batch_size: int, tick: Callable[[int], object]
) -> Iterator[Claim]:
    """All recorded votes, cast again on the same paths."""
    pictures = {"clean": evidence.originals, **{name: case.images for name, case in cases_of(evidence).items()}}
    for name, claimed in votes_in(evidence).items():
        title = "clean votes" if name == "clean" else f"{name}'s votes"
        x = pictures[name].nan_to_num(0).clamp(0, 1)  # what is no image has failed the claim about the ball
        found = votes_of(ensemble, x, evidence.seed, evidence.names, evidence.repeat, batch_size, tick)
        if found.shape != claimed.shape:
            yield Claim(title, f"of {claimed.shape[3]} classes", f"of {found.shape[3]} classes", False)
            continue
        changed = (found - claimed).abs().sum((0, 1, 3)).double() / 2  # inferences of each image
        each, total = evidence.repeat * claimed.shape[1] * evidence.inferences, int(found.sum())
        decided, before = (
            worst_labels(votes, evidence.truth, evidence.rule, evidence.inferences) for votes in (found, claimed)
        )
        flips = int((decided != before).sum())
        stands = (
            float(changed.sum()) <= 2 + _TIES * total
            and float(changed.max()) <= 2 + 0.05 * each
            and flips <= 1 + _TIES * len(changed)
        )
        yield Claim(
            title, f"{int(claimed.sum())} inferences", f"{float(changed.sum()):g} differ, {flips} labels", stands
        )


def _fresh(
    evidence: Evidence, ensemble: ItoEnsemble, seed: int, batch_size: int, tick: Callable[[int], object]
) -> Iterator[Claim]:
    """The figures on paths that nobody has met: interchangeable with the claimed ones, image by image."""
    pictures = {"clean": (evidence.originals, evidence.clean)}
    pictures |= {name: (case.images, case.labels) for name, case in cases_of(evidence).items()}
    for name, (images, labels) in pictures.items():
        title = f"{name}, fresh noise"
        what = "correct or abstained" if name == "evasion" else "correct"
        good = _good(name, labels, evidence.truth)
        if evidence.noise != "fresh":
            note = f"The paths are part of the noise model {evidence.noise!r}; the votes above are the check."
            yield Claim(title, _text(good), "not asked", True, note)
            continue
        x = images.nan_to_num(0).clamp(0, 1)
        votes = votes_of(ensemble, x, seed, evidence.names, evidence.repeat, batch_size, tick)
        again = worst_labels(votes, evidence.truth, evidence.rule, evidence.inferences)
        found = _good(name, again, evidence.truth)
        paired = Paired.of(good, found)
        note = (
            f"McNemar's exact test: {paired.only_first} images are so only in the bundle, {paired.only_second} only on "
            f"fresh noise; p = {paired.p:.2g}."
        )
        yield Claim(title, f"{_text(good)} {what}", _text(found), paired.p >= _EACH, note)


def _good(case: str, labels: Tensor, truth: Tensor) -> Tensor:
    """What an attack has not achieved, bool ``(N,)``: right, or under evasion not wrong."""
    return ~_wrong(labels, truth) if case == "evasion" else labels == truth


def _text(good: Tensor) -> str:
    rate = Rate.of(int(good.sum()), len(good))
    return f"{rate.count}/{rate.n} = {100 * rate.value:.1f} %"


# --- the attack -------------------------------------------------------------------------------------------


def _attacked(
    evidence: Evidence,
    ensemble: ItoEnsemble,
    suite: Suite,
    radii: list[float],
    seed: int,
    sample: int,
    batch_size: int,
    tick: Callable[[int], object],
) -> Iterator[Claim]:
    """A random sample of images, through the whole sweep: with the bundle's seed, and with another."""
    n = len(evidence.index)
    chosen = (
        torch.randperm(n, generator=torch.Generator().manual_seed(seed % 2**63), device="cpu")[:sample].sort().values
    )
    again = replace(suite, seed=evidence.seed, noise=evidence.noise, repeat=evidence.repeat, state=None)
    found = _sweep(evidence, ensemble, again, radii, chosen, batch_size, tick)
    for name, case in cases_of(evidence).items():
        made = torch.cat([getattr(result[-1], name).images.cpu() for result in found])
        source = torch.cat([getattr(result[-1], name).source.cpu() for result in found])
        apart = (made - case.images[chosen]).flatten(1).norm(dim=1)
        length = (made - evidence.originals[chosen]).flatten(1).norm(dim=1)
        yield _differing(
            f"{name} made again",
            "images and sources of its seed",
            ~(apart <= _APART * length + ROUNDING) | (source != case.source[chosen]),
            f"The bundle's own attack with its own seed, on a sample; another machine may change one in {_SPARE}.",
            len(chosen) // _SPARE,
        )
    yield from _costs(evidence, ensemble, again, radii, found, len(chosen))
    other = replace(again, seed=seed)
    if evidence.noise != "known":
        found = _sweep(evidence, ensemble, other, radii, chosen, batch_size, tick)
    for name, case in cases_of(evidence).items():
        title = f"{name}, another attack"
        good = _good(name, case.labels, evidence.truth)[chosen]
        if evidence.noise == "known":
            note = "An attacker who knows the paths has no other seed; the attack made again is the check."
            yield Claim(title, _text(good), "not asked", True, note)
            continue
        # Both attacks meet the report's own paths: what differs then is the attacks' luck alone.
        x = torch.cat([getattr(result[-1], name).images.cpu() for result in found])
        votes = votes_of(ensemble, x, evidence.seed, evidence.names[chosen], evidence.repeat, batch_size)
        labels = worst_labels(votes, evidence.truth[chosen], evidence.rule, evidence.inferences)
        left = _good(name, labels, evidence.truth[chosen])
        lost, kept, p = _excess(good, left)
        note = (
            f"The same suite with another seed, on a sample: {lost} fell that have not in the bundle, {kept} the other "
            f"way round; p = {p:.2g} to one side."
        )
        yield Claim(title, _text(good), _text(left), p >= _EACH, note)


def _sweep(
    evidence: Evidence,
    ensemble: ItoEnsemble,
    suite: Suite,
    radii: list[float],
    chosen: Tensor,
    batch_size: int,
    tick: Callable[[int], object],
) -> list[list[SuiteResult]]:
    """Results of every batch of the chosen images at every radius."""
    device = next(ensemble.parameters()).device
    batches = []
    for number, rows in enumerate(chosen.split(batch_size)):
        x = evidence.originals[rows].nan_to_num(0).clamp(0, 1).to(device)
        y, index = evidence.truth[rows].to(device), evidence.index[rows].to(device)
        reached = {result.eps: result for _, result in suite.run(ensemble, x, y, index, radii, str(number))}
        batches.append([reached[eps] for eps in radii])
        tick(len(rows))
    return batches


def _costs(
    evidence: Evidence,
    ensemble: ItoEnsemble,
    suite: Suite,
    radii: list[float],
    found: list[list[SuiteResult]],
    sample: int,
) -> Iterator[Claim]:
    """Images met and evaluations of each attack, against what is possible and against those of the sample."""
    n = len(evidence.index)
    device = next(ensemble.parameters()).device
    x = evidence.originals[:8].nan_to_num(0).clamp(0, 1).to(device)
    limits = [
        limit
        for eps in radii
        for _ in ("denial", "evasion")
        for limit in [_limits(step, ensemble, suite, x, evidence.clean_votes.shape[3]) for step in suite.steps(eps)]
    ]
    total = {}
    for what in ("attacked", "queries", "gradients"):
        batches = ([count for result in batch for count in getattr(result, what)] for batch in found)
        total[what] = [sum(counts) for counts in zip(*batches, strict=True)]
    level = _EACH / len(evidence.attacks)
    odd = []
    for number, (met, own) in enumerate(zip(evidence.attacked, total["attacked"], strict=True)):
        # Of n images ``met`` were met; a random sample has a hypergeometric share. One image more or less is rounding.
        law = hypergeom(n, min(met, n), sample)
        if met > n or min(law.cdf(own + 1), law.sf(own - 2)) < level / 2:
            odd.append(number)
    note = "By a random sample of the images, attack by attack"
    yield _named("images met", f"{sum(evidence.attacked)} by {len(evidence.attacked)} attacks", odd, evidence, note)
    odd = []
    for number, limit in enumerate(limits):
        met, own = evidence.attacked[number], total["attacked"][number]
        for what, (low, high) in limit.items():
            claimed = getattr(evidence, what)[number]
            near = True
            if own and met:
                # Hoeffding's bound where one draws without replacement (Serfling 1974); last bits may change 2 %.
                left = max(0.0, 1 - (own - 1) / met)
                slack = (high - low) * math.sqrt(left * math.log(4 / level) / (2 * own)) + 0.02 * high
                near = abs(claimed / met - total[what][number] / own) <= slack
            if not (low * met <= claimed <= high * met and near):
                odd.append(number)
    said = f"{sum(evidence.gradients):,} gradients, {sum(evidence.queries):,} queries"
    yield _named("costs", said, odd, evidence, "Of each attack, against its settings and a sample of the images")


def _named(name: str, claimed: str, odd: list[int], evidence: Evidence, note: str) -> Claim:
    """A claim of every attack; the first for which it is not so is named."""
    found = f"{len(set(odd))} of {len(evidence.attacks)} attacks differ"
    return Claim(name, claimed, found, not odd, f"{note}: {evidence.attacks[odd[0]]}." if odd else f"{note}.")


def _limits(step: Step, ensemble: ItoEnsemble, suite: Suite, x: Tensor, classes: int) -> dict[str, tuple[int, int]]:
    """The least and the greatest number of evaluations of one image in one attack."""
    attack = step.attack
    if step.through != "itself":
        model = suite.surrogates[step.through]
        with evaluating(model):
            distinct = as_target(model, x).distinct
    elif suite.noise == "known":
        distinct = KnownPaths(ensemble, x, suite.seed).distinct
    else:
        distinct = None if ensemble.noisy else len(ensemble.members)
    eot, selection = distinct or attack.eot, distinct or attack.selection
    attempts = attack.restarts * (min(attack.targets, classes - 1) if attack.objective in TARGETED else 1)
    ascents = 0 if isinstance(attack, Square) else attack.steps + isinstance(attack, APGD)
    least = ascents if not attack.stop else min(ascents, 1)
    # A query at each iterate, one more where it seems to have fallen, and those that compare attempts.
    queries = attempts * ((attack.steps + 2) * (eot + 2 * selection) + selection) + selection
    return {"gradients": (least * eot, attempts * ascents * eot), "queries": (selection, queries)}
