"""Claims of an evidence bundle, compared with the data, the votes and the attack, which are all made again.

A bundle claims: these images are the data set's own choice, this suite attacked them with this seed, the ensemble cast
these votes, and these labels follow. Nearly all of that is a pure function of the seed. So it is computed again and
must come out the same: all votes, and the whole attack for a random sample of the images. Other seeds then test what
the luck of the seed may have done. Images and votes of an honest bundle are interchangeable with those of another seed,
image by image, so the exact test is McNemar's: of the images that differ, each falls to either side like a fair coin.

What verify cannot show
    - That the ensemble, the data and the surrogates are those that a reader has in mind: they are the verifier's own.
    - That no stronger attack exists. A weak suite that says that it is weak (``effort`` 0.01) is an honest bundle.
    - That the seed was not chosen out of many, as far as luck goes: of a hundred honest bundles one is the best. The
      tests on other seeds bound what that gains.
    - A forgery of few images: the attack is made again on a sample. With 30 images, it finds images that this attack
      did not make with 99 % where every fifth is such an image, 82 % where every tenth, 45 % where every twentieth.
      Votes and labels are checked on all images.
    - Who ran it, when, and how long it took: the command and the date are words.
    - The cost of an attack that stops early, more exactly than its least and greatest possible cost and the sample say.
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
from torch import Tensor, nn

from ..attacks.apgd import APGD
from ..attacks.fingerprints import fingerprint, fingerprint_choice, fingerprint_split
from ..attacks.images import Images
from ..attacks.objectives import TARGETED
from ..attacks.report import Report, worst_labels
from ..attacks.square import Square
from ..attacks.suite import Step, Suite, SuiteResult, join_results
from ..attacks.targets import KnownPaths, as_target
from ..data import Split
from ..models.vote import as_voter
from ..models.voting import Voter
from ..modules import evaluating
from ..outcomes import ABSTAIN, Paired, Rate, WorstCase
from ..validation import ItoError, whole_number
from .bundle import (
    CLEAN,
    ROUNDING,
    Evidence,
    attack_names,
    cases_of,
    check_evidence,
    norms_of,
    votes_in,
    votes_of,
)
from .gradient_free import NES

LEVEL = 0.01  # at most this share of honest bundles fails by chance, all tests together
# The level of each test: clean, denial, evasion, three of order, two other attacks, images attacked, costs.
_EACH = LEVEL / 10
# What the last bits of another machine may change; on one machine nothing differs (measured).
_TIES = 0.002  # this share of all inferences, and of the images' labels
_SPARE = 20  # one image in so many that the bundle's own attack attacks again
_IMAGES = ("true labels", "original images")  # if these claims fail, votes and attacks would be of other images
_APART = 0.3  # two runs of one attack differ by this share of a perturbation's length, where a gradient's signs flip


@dataclass(frozen=True)
class Claim:
    """One thing that a bundle claims, what was found instead, and whether the claim stands."""

    name: str
    claimed: str
    found: str
    stands: bool
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """All claims of a bundle, each with its verdict; ``seed`` is that of fresh noise, sample and second attack."""

    claims: tuple[Claim, ...]
    seed: int | None = None

    @property
    def stands(self) -> bool:
        """Whether every claim stands."""
        return all(claim.stands for claim in self.claims)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"stands": self.stands, "seed": self.seed, "claims": [asdict(claim) for claim in self.claims]}


def verify_bundle(
    evidence: Evidence,
    ensemble: nn.Module | None,
    split: Split | None,
    suite: Suite | None,
    seed: int | None = None,
    sample: int = 30,
    batch_size: int = 250,
    tick: Callable[[int], object] = lambda n: None,
) -> Verification:
    """Compare every claim of a bundle with what can be computed again. A claim that cannot be compared does not stand.

    An honest bundle fails in at most 1 % of seeds, all tests together (measured on digits: 0 of 352, over 200 seeds).

    Args:
        evidence: as read by `load_bundle`, which has compared the images with their SHA-256.
        ensemble: the defender, on any device, with the inferences and the rule that are claimed; any other module
            than an ensemble votes as a `Vote`. None: it is not there.
        split: the whole test split, of which the images are `Split.first`; None: it is not there.
        suite: the attacks that the bundle claims, see `suite_of`; seed, noise and repeat are taken from the bundle.
            None: it is not there.
        seed: of fresh noise, sample and second attack; default one that nobody can foretell.
        sample: images that are attacked again, twice.
        batch_size: images at a time; not in the result.
        tick: called with a number of images done; `work` of them in all.

    Raises:
        ItoError: evidence that does not fit together, or the bundle's own seed.

    Example:
        ::

            run, evidence = ito.Run.open("runs/mine"), ito.load_bundle("evidence/linf-8of255")
            ensemble = run.ensemble()
            suite = ito.suite_of(evidence, ensemble, run.resnet())
            verification = ito.verify_bundle(evidence, ensemble, ito.load_data("digits").test, suite)
            print(verification.stands)
    """
    check_evidence(evidence)
    whole_number("sample", sample)
    ensemble = None if ensemble is None else as_voter(ensemble)
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
    claims += [defender, settings, _sources(evidence, radii, suite)]
    if not defender.stands or ensemble is None:
        names = ["clean votes", "denial's votes", "evasion's votes", "votes on fresh noise", "attacks made again"]
        return Verification((*claims, *(_absent(name, "no such ensemble to compare with") for name in names)), seed)
    if split is not None and not all(claim.stands for claim in claims if claim.name in _IMAGES):
        return Verification((*claims, _absent("votes and attacks", "not the data set's images")), seed)
    again = _Again(evidence, ensemble, seed, batch_size, tick)
    claims += again.recorded_votes()
    claims += again.fresh_votes()
    if not settings.stands or suite is None:
        return Verification((*claims, _absent("attacks made again", "no such suite to compare with")), seed)
    claims += again.attacks(suite, radii, sample)
    return Verification(tuple(claims), seed)


def work(evidence: Evidence, sample: int = 30) -> int:
    """The sum of what `verify_bundle` reports to ``tick``."""
    n = len(evidence.index)
    votes, attacks = (6, 2) if evidence.noise == "fresh" else (3, 1 if evidence.noise == "known" else 2)
    return votes * n + attacks * min(sample, n)


def _absent(name: str, why: str) -> Claim:
    """A claim that could not be compared."""
    return Claim(name, "to be computed again", why, False)


def _differing(name: str, claimed: str, differing: Tensor, note: str = "", allowed: int = 0) -> Claim:
    """A claim about every image; ``differing``, bool ``(N,)``, says on which images it is wrong."""
    count = int(differing.sum())
    return Claim(name, claimed, f"{count} of {len(differing)} differ", count <= allowed, note)


# --- what the bundle alone must hold ----------------------------------------------------------------------


def _ball(evidence: Evidence) -> Claim:
    """No perturbation is longer than eps, and all pixels are in [0, 1]."""
    cases = cases_of(evidence).values()
    largest = max(float(norms_of(evidence, case).amax()) for case in cases)
    values = torch.stack([evidence.originals, *(case.images for case in cases)])
    pixels = bool(((values >= 0) & (values <= 1)).all())  # false of NaN too
    outcome = f"at most {largest:.6g}, pixels {'in' if pixels else 'NOT in'} [0, 1]"
    stands = pixels and largest <= evidence.eps + ROUNDING
    return Claim("inside the ball", f"{evidence.norm} at most {evidence.eps:.6g}", outcome, stands)


def _unattacked(evidence: Evidence) -> Claim:
    """An image whose source is no attack is the clean one, bit for bit."""
    differing = torch.zeros(len(evidence.index), dtype=torch.bool, device="cpu")
    for case in cases_of(evidence).values():
        differing |= (case.source == CLEAN) & (case.images != evidence.originals).flatten(1).any(1)
    return _differing("unattacked images", "the originals, bit for bit", differing)


def _labels(evidence: Evidence) -> Claim:
    """The labels are `worst_labels` of the recorded votes, and there are no more votes than inferences."""
    claimed = {"clean": evidence.clean, **{name: case.labels for name, case in cases_of(evidence).items()}}
    differing = torch.zeros(len(evidence.index), dtype=torch.bool, device="cpu")
    for name, votes in votes_in(evidence).items():
        differing |= worst_labels(votes, evidence.truth, evidence.rule, evidence.inferences) != claimed[name]
        differing |= ((votes < 0).any(3) | (votes.sum(3) > evidence.inferences)).any(1).any(0)
    what = f"by the {evidence.rule} rule, {evidence.inferences} inferences, worst of {evidence.repeat}"
    return _differing("labels follow from votes", what, differing)


def _order(evidence: Evidence) -> Claim:
    """Denial is right no more often than clean images or evasion; evasion is wrong no less often than denial."""
    truth, denial, evasion = evidence.truth, evidence.denial.labels, evidence.evasion.labels
    pairs = (
        (evidence.clean == truth, denial == truth),
        (evasion == truth, denial == truth),
        (_wrong(evasion, truth), _wrong(denial, truth)),
    )
    tests = [_excess(low, high) for high, low in pairs]
    against, expected = zip(*((one, two) for one, two, _ in tests), strict=True)
    note = (
        f"Images right under denial and not clean: {against[0]} (the other way round {expected[0]}); right under "
        f"denial and not under evasion: {against[1]} ({expected[1]}); wrong under denial and not under evasion: "
        f"{against[2]} ({expected[2]})."
    )
    outcome = f"{', '.join(map(str, against))} against it"
    return Claim("worst cases in order", "no right answer gained", outcome, min(p for *_, p in tests) >= _EACH, note)


def _wrong(labels: Tensor, truth: Tensor) -> Tensor:
    return (labels != truth) & (labels != ABSTAIN)


def _excess(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """McNemar's exact test to one side, of two bool ``(N,)``.

    Returns:
        How many are true in the first only and in the second only, and the probability of so many in the first only.
    """
    one, two = int((first & ~second).sum()), int((second & ~first).sum())
    return one, two, float(binom.sf(one - 1, one + two, 0.5)) if one + two else 1.0


def _radii(evidence: Evidence) -> list[float]:
    """The radii of the sweep up to this one; none, if the config names none or they do not rise to this one."""
    settings = evidence.config.get("suite")
    radii = settings.get("radii") if isinstance(settings, dict) else None
    if not isinstance(radii, list) or not radii or not all(type(eps) in (int, float) for eps in radii):
        return []
    rising = all(a < b for a, b in itertools.pairwise(radii))
    return [float(eps) for eps in radii] if rising and radii[0] >= 0 and radii[-1] == evidence.eps else []


def _sources(evidence: Evidence, radii: list[float], suite: Suite | None) -> Claim:
    """An image lies in the ball of the attack that made it, and the numbers of attacked images are possible.

    Steps of a goal are run on the images that have not reached it yet, on ever fewer: so on those that it or a later
    such step made. A step that also goes on with images that have barely reached it is run on those that any later step
    made, and may be run on more images than the one before it.
    """
    name, n = "sources", len(evidence.index)
    claimed = "attacks on the image, at its radius"
    if not radii or len(evidence.attacks) % (2 * len(radii)):
        return Claim(name, claimed, "the config names no radii that fit the attacks", False)
    steps = len(evidence.attacks) // (2 * len(radii))  # of one goal at one radius
    reached = torch.tensor(radii, device="cpu").double().repeat_interleave(2 * steps)
    outside = torch.zeros(n, dtype=torch.bool, device="cpu")
    for case in cases_of(evidence).values():
        outside |= (case.source != CLEAN) & (norms_of(evidence, case) > reached[case.source] + ROUNDING)
    # Without the suite it is not known which steps these are.
    barely = [True] * steps if suite is None else [step.barely for step in suite.steps(radii[-1])]
    if len(barely) != steps:
        return Claim(name, claimed, "the attacks are not those of the suite", False)
    attacked = torch.tensor(evidence.attacked, device="cpu").view(-1, steps)
    made = torch.stack([case.source for case in cases_of(evidence).values()])  # (2, N)
    least = torch.zeros_like(attacked)
    for number in range(len(evidence.attacks)):
        goal, step = divmod(number, steps)
        later = [number, *(goal * steps + s for s in range(step + 1, steps) if barely[step] or not barely[s])]
        least[goal, step] = int(torch.isin(made, torch.tensor(later, device="cpu")).any(0).sum())
    strict = attacked[:, [not own for own in barely]]
    falling = (strict[:, 1:] <= strict[:, :-1]).all()
    possible = bool(((attacked >= least) & (attacked <= n)).all() and falling)
    outcome = f"{int(outside.sum())} outside, numbers of images {'possible' if possible else 'NOT possible'}"
    return Claim(name, claimed, outcome, possible and not bool(outside.any()))


# --- the data, the ensemble, the suite --------------------------------------------------------------------


def _data(evidence: Evidence, split: Split | None) -> Iterator[Claim]:
    """The split is the claimed one, and the images are the split's own choice of so many.

    Otherwise a forger could leave out the images on which the attack succeeded.
    """
    prints, n = evidence.fingerprints, len(evidence.index)
    claimed = {name: str(prints.get(name))[:12] for name in ("split", "choice")}
    if split is None:
        for name in ("data split", "choice of images", "true labels", "original images"):
            yield _absent(name, "no data to compare with")
        return
    own = fingerprint_split(split)
    yield Claim("data split", claimed["split"], own[:12], prints.get("split") == own)
    note = f"The split's own choice of {n} images. Of another choice it cannot be told who was left out."
    if n > len(split):
        yield Claim("choice of images", claimed["choice"], f"the split has {len(split)} images", False, note)
        yield _absent("true labels", "another choice")
        yield _absent("original images", "another choice")
        return
    images = Images.of(split.first(n))
    own = fingerprint_choice(images.index, images.y, images.x)
    recorded = fingerprint_choice(evidence.index, evidence.truth, evidence.originals.nan_to_num(0))
    yield Claim("choice of images", claimed["choice"], own[:12], prints.get("choice") == own == recorded, note)
    misnamed = evidence.index != images.index
    yield _differing("true labels", "the data set's", (evidence.truth != images.y) | misnamed)
    alike = images.x.shape == evidence.originals.shape
    distance = (
        (images.x - evidence.originals).abs().flatten(1).amax(1) if alike else torch.full((n,), math.inf, device="cpu")
    )
    yield _differing("original images", "the data set's", ~(distance <= ROUNDING) | misnamed)


def _defender(evidence: Evidence, ensemble: Voter | None) -> Claim:
    """The ensemble has the claimed weights and solver, by its fingerprint, and votes as claimed."""
    name, members = "ensemble", evidence.clean_votes.shape[1]
    vote = f"{members} x {evidence.inferences}, {evidence.rule}"
    claimed = f"{str(evidence.fingerprints.get('weights'))[:12]}, {vote}"
    if ensemble is None:
        return Claim(name, claimed, "no ensemble to compare with", False)
    own, own_vote = fingerprint(ensemble), f"{len(ensemble.members)} x {ensemble.inferences}, {ensemble.rule}"
    stands = evidence.fingerprints.get("weights") == own and vote == own_vote
    note = "" if own_vote == vote else "Give --inferences and --rule as the bundle claims them."
    return Claim(name, claimed, f"{own[:12]}, {own_vote}", stands, note)


def _settings(evidence: Evidence, suite: Suite | None, radii: list[float]) -> Claim:
    """The suite has the claimed norm, and the claimed attacks at all radii, by their names."""
    settings = evidence.config.get("suite")
    settings = settings if isinstance(settings, dict) else {}
    claimed = f"{str(settings.get('name'))[:30]}, effort {str(settings.get('effort'))[:12]}"
    if suite is None:
        return Claim("suite", claimed, "no suite to compare with", False)
    try:
        names, norms = attack_names(suite, radii), {s.attack.norm for eps in radii for s in suite.steps(eps)}
    except ItoError as error:
        return Claim("suite", claimed, str(error).rstrip("."), False)
    same = names == evidence.attacks and norms == {evidence.norm}
    outcome = f"{len(names)} attacks, {'the same' if same else 'others'}"
    return Claim("suite", f"{claimed}, {len(evidence.attacks)} attacks", outcome, same and bool(radii))


# --- votes and attacks, made again ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Again:
    """Makes the votes and the attacks of a bundle again.

    Attributes:
        evidence, ensemble: what is claimed, and the defender.
        seed: of fresh noise, sample and second attack.
        batch_size, tick: see `verify_bundle`.
    """

    evidence: Evidence
    ensemble: Voter
    seed: int
    batch_size: int
    tick: Callable[[int], object]

    def _votes(self, x: Tensor, report: Report) -> Tensor:
        """The report's votes on all images ``x`` of the bundle."""
        x = x.nan_to_num(0).clamp(0, 1)  # values that are not in [0, 1] have failed the claim about the ball
        return votes_of(self.ensemble, x, self.evidence.index, report, self.batch_size, self.tick)

    def recorded_votes(self) -> Iterator[Claim]:
        """All recorded votes come out again on the same paths."""
        evidence = self.evidence
        images = {"clean": evidence.originals, **{name: case.images for name, case in cases_of(evidence).items()}}
        for name, claimed in votes_in(evidence).items():
            title = "clean votes" if name == "clean" else f"{name}'s votes"
            votes = self._votes(images[name], evidence.report)
            if votes.shape != claimed.shape:
                yield Claim(title, f"of {claimed.shape[3]} classes", f"of {votes.shape[3]} classes", False)
                continue
            changed = (votes - claimed).abs().sum((0, 1, 3)).cpu().double() / 2  # inferences of each image
            each, total = evidence.repeat * claimed.shape[1] * evidence.inferences, int(votes.sum())
            flips = int((self._decide(votes) != self._decide(claimed)).sum())
            stands = (
                float(changed.sum()) <= 2 + _TIES * total
                and float(changed.max()) <= 2 + 0.05 * each
                and flips <= 1 + _TIES * len(changed)
            )
            outcome = f"{float(changed.sum()):g} differ, {flips} labels"
            yield Claim(title, f"{int(claimed.sum())} inferences", outcome, stands)

    def _decide(self, votes: Tensor) -> Tensor:
        """Labels from votes on all images."""
        return worst_labels(votes, self.evidence.truth, self.evidence.rule, self.evidence.inferences)

    def fresh_votes(self) -> Iterator[Claim]:
        """The figures on new paths are interchangeable with the claimed ones, image by image."""
        evidence = self.evidence
        recorded = {"clean": (evidence.originals, evidence.clean)}
        recorded |= {name: (case.images, case.labels) for name, case in cases_of(evidence).items()}
        for name, (images, labels) in recorded.items():
            title = f"{name}, fresh noise"
            what = "correct or abstained" if name == "evasion" else "correct"
            claimed = _survived(name, labels, evidence.truth)
            if evidence.noise != "fresh":
                note = f"The paths are part of the noise model {evidence.noise!r}; the votes above are the check."
                yield Claim(title, _text(claimed), "not asked", True, note)
                continue
            votes = self._votes(images, replace(evidence.report, seed=self.seed))
            fresh = _survived(name, self._decide(votes), evidence.truth)
            paired = Paired.of(claimed, fresh)
            note = (
                f"McNemar's exact test: {paired.only_first} images are so only in the bundle, {paired.only_second} "
                f"only on fresh noise; p = {paired.p:.2g}."
            )
            yield Claim(title, f"{_text(claimed)} {what}", _text(fresh), paired.p >= _EACH, note)

    def attacks(self, suite: Suite, radii: list[float], sample: int) -> Iterator[Claim]:
        """A random sample of images passes through the whole sweep: with the bundle's seed, and with another."""
        evidence = self.evidence
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        rows = torch.randperm(len(evidence.index), generator=generator, device="cpu")[:sample].sort().values
        own = replace(suite, seed=evidence.seed, noise=evidence.noise, repeat=evidence.repeat, state=None)
        results = _attack_again(evidence, self.ensemble, own, radii, rows, self.batch_size, self.tick)
        yield from self._same_images(results[-1], rows)
        counts = {
            what: [count for result in results for count in getattr(result, what)]
            for what in ("attacked", "queries", "gradients")
        }
        yield _attacked_counts(evidence, counts["attacked"], len(rows))
        yield _costs(evidence, counts, self._limits(own, radii))
        if evidence.noise == "known":
            for name, case in cases_of(evidence).items():
                claimed = _survived(name, case.labels, evidence.truth)[rows]
                note = "An attacker who knows the paths has no other seed; the attack made again is the check."
                yield Claim(f"{name}, another attack", _text(claimed), "not asked", True, note)
            return
        other = replace(own, seed=self.seed)
        results = _attack_again(evidence, self.ensemble, other, radii, rows, self.batch_size, self.tick)
        yield from self._other_attack(results[-1], rows)

    def _same_images(self, result: SuiteResult, rows: Tensor) -> Iterator[Claim]:
        """The bundle's own attack makes the same images again."""
        originals = self.evidence.originals[rows]
        for name, case in cases_of(self.evidence).items():
            again: WorstCase = getattr(result, name)
            apart = (again.images - case.images[rows]).flatten(1).norm(dim=1)
            length = (again.images - originals).flatten(1).norm(dim=1)
            yield _differing(
                f"{name} made again",
                "images and sources of its seed",
                ~(apart <= _APART * length + ROUNDING) | (again.source != case.source[rows]),
                f"The bundle's own attack with its own seed, on a sample; another machine may change one in {_SPARE}.",
                len(rows) // _SPARE,
            )

    def _other_attack(self, result: SuiteResult, rows: Tensor) -> Iterator[Claim]:
        """The same suite with another seed is not much more successful than the bundle's."""
        evidence, truth = self.evidence, self.evidence.truth[rows]
        for name, case in cases_of(evidence).items():
            claimed = _survived(name, case.labels[rows], truth)
            # Both attacks are judged on the report's own paths, so that only the luck of the attacks differs.
            images = getattr(result, name).images
            votes = votes_of(self.ensemble, images, evidence.index[rows], evidence.report, self.batch_size)
            labels = worst_labels(votes, truth, evidence.rule, evidence.inferences)
            survived = _survived(name, labels, truth)
            lost, kept, p = _excess(claimed, survived)
            note = (
                f"The same suite with another seed, on a sample: it succeeds on {lost} images where the bundle's "
                f"attack does not, and the other way round on {kept}; p = {p:.2g} to one side."
            )
            yield Claim(f"{name}, another attack", _text(claimed), _text(survived), p >= _EACH, note)

    def _limits(self, suite: Suite, radii: list[float]) -> list[dict[str, tuple[int, int]]]:
        """The least and the greatest possible cost of each attack, see `_limits`."""
        device = self.ensemble.device
        x = self.evidence.originals[:8].nan_to_num(0).clamp(0, 1).to(device)
        classes = self.evidence.clean_votes.shape[3]
        limits = []
        for eps in radii:
            limits += 2 * [_limits(step, self.ensemble, suite, x, classes) for step in suite.steps(eps)]  # both goals
        return limits


def _survived(case: str, labels: Tensor, truth: Tensor) -> Tensor:
    """Where an attack has not reached its goal, bool ``(N,)``: right, or under evasion not wrong."""
    return ~_wrong(labels, truth) if case == "evasion" else labels == truth


def _text(survived: Tensor) -> str:
    rate = Rate.of(int(survived.sum()), len(survived))
    return f"{rate.count}/{rate.n} = {100 * rate.value:.1f} %"


def _attack_again(
    evidence: Evidence,
    ensemble: Voter,
    suite: Suite,
    radii: list[float],
    rows: Tensor,
    batch_size: int,
    tick: Callable[[int], object],
) -> list[SuiteResult]:
    """The results at every radius on some of a bundle's images."""
    device = ensemble.device
    x = evidence.originals[rows].nan_to_num(0).clamp(0, 1)
    batches = []
    for number, batch in enumerate(Images(x, evidence.truth[rows], evidence.index[rows]).batches(batch_size)):
        batches.append(suite.attack(ensemble, batch.to(device), radii, str(number)))
        tick(len(batch))
    return [join_results(parts) for parts in zip(*batches, strict=True)]


def _attacked_counts(evidence: Evidence, counts: list[int], sample: int) -> Claim:
    """The number of images that each attack was run on, against that in a sample of so many images."""
    n, level = len(evidence.index), _EACH / len(evidence.attacks)
    odd = []
    for number, (claimed, own) in enumerate(zip(evidence.attacked, counts, strict=True)):
        # A random sample of all n images holds a hypergeometric number of the attacked ones. A difference of one image
        # is rounding.
        law = hypergeom(n, min(claimed, n), sample)
        if claimed > n or min(law.cdf(own + 1), law.sf(own - 2)) < level / 2:
            odd.append(number)
    said = f"{sum(evidence.attacked)} by {len(evidence.attacked)} attacks"
    return _by_attack("images attacked", said, odd, evidence, "By a random sample of the images, attack by attack")


def _costs(evidence: Evidence, counts: dict[str, list[int]], limits: list[dict[str, tuple[int, int]]]) -> Claim:
    """The cost of each attack, against what its settings allow and against its cost in a sample."""
    level, odd = _EACH / len(evidence.attacks), []
    for number, limit in enumerate(limits):
        attacked, own = evidence.attacked[number], counts["attacked"][number]
        for what, (low, high) in limit.items():
            claimed, near = getattr(evidence, what)[number], True
            if own and attacked:
                # Hoeffding's bound where one draws without replacement (Serfling 1974); last bits may change 2 %.
                rest = max(0.0, 1 - (own - 1) / attacked)
                slack = (high - low) * math.sqrt(rest * math.log(4 / level) / (2 * own)) + 0.02 * high
                near = abs(claimed / attacked - counts[what][number] / own) <= slack
            if not (low * attacked <= claimed <= high * attacked and near):
                odd.append(number)
    said = f"{sum(evidence.gradients):,} gradients, {sum(evidence.queries):,} queries"
    note = "Of each attack, against its settings and a sample of the images"
    return _by_attack("costs", said, odd, evidence, note)


def _by_attack(name: str, claimed: str, odd: list[int], evidence: Evidence, note: str) -> Claim:
    """A claim about every attack; the note names the first attack for which it is wrong."""
    outcome = f"{len(set(odd))} of {len(evidence.attacks)} attacks differ"
    return Claim(name, claimed, outcome, not odd, f"{note}: {evidence.attacks[odd[0]]}." if odd else f"{note}.")


def _limits(step: Step, ensemble: Voter, suite: Suite, x: Tensor, classes: int) -> dict[str, tuple[int, int]]:
    """The least and the greatest number of inferences that one attack makes on one image."""
    attack = step.attack
    if step.through != "itself":
        model = suite.surrogates[step.through]
        if isinstance(model, nn.Module):
            with evaluating(model):
                distinct = as_target(model, x).distinct
        else:
            distinct = model.distinct
    elif suite.noise == "known":
        distinct = KnownPaths(ensemble, x, suite.seed).distinct
    else:
        distinct = None if ensemble.noisy else len(ensemble.members)
    eot, selection = distinct or attack.eot, distinct or attack.selection
    attempts = attack.restarts * (min(attack.targets, classes - 1) if attack.objective in TARGETED else 1)
    ascents = 0 if isinstance(attack, Square | NES) else attack.steps + isinstance(attack, APGD)
    least = ascents if not attack.stop else min(ascents, 1)
    # A query at each iterate, one more where the goal seems reached, and those that compare attempts.
    asked = 2 * attack.pairs * eot if isinstance(attack, NES) else eot
    queries = attempts * ((attack.steps + 2) * (asked + 2 * selection) + selection) + selection
    return {"gradients": (least * eot, attempts * ascents * eot), "queries": (selection, queries)}
