"""The standard suite on a whole split, against an ensemble and the ResNet it came from, side by side.

Example:
    ::

        run, split = ito.Run.open("runs/mine"), ito.load_data("digits").test
        settings = ito.SuiteSettings(norm="linf", radii=(8 / 255,))
        both = ito.run_suite(run.ensemble(), run.resnet(), split.first(100), settings)
        print(both.ito.outcomes(0), both.resnet.outcomes(0), both.paired(0))
        ito.save_bundle("evidence/linf-8of255", ito.evidence_of(both.ito, split))
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Split
from ..distributed import ALONE, World
from ..files import write_atomically
from ..models.ensemble import ItoEnsemble, NoiseFree
from ..models.recast import recast
from ..models.vote import as_voter
from ..models.voting import Voter
from ..names import PRECISIONS
from ..outcomes import Outcomes, Paired
from ..validation import ItoError, check_eps, one_of, shown, whole_number
from .base import Attack
from .fingerprints import fingerprint, fingerprint_choice
from .images import Images
from .norms import BALLS
from .other_libraries import peer_attack
from .panels import GOALS
from .report import Report, invalid, worst_labels
from .suite import Step, Suite, SuiteResult, check_rising, join_results, standard, with_known_paths

OnAttack = Callable[[str, Step, SuiteResult], object]


@dataclass(frozen=True)
class SuiteSettings:
    """Settings of the suite ``standard``.

    Attributes:
        norm: a name in `BALLS`.
        radii: rising, in pixel units.
        effort: scales the numbers of iterations; above 0.
        noise, repeat: what the attacker knows of the report's paths and how often he may ask, see `Report`.
        seed: of all panels.
        batch_size: images at a time; not in the result.
        precision: of all gradients, see `Attack`.

    Raises:
        ItoError: a setting that cannot be.
    """

    norm: str = "linf"
    radii: tuple[float, ...] = (8 / 255,)
    effort: float = 1.0
    noise: str = "fresh"
    repeat: int = 1
    seed: int = 0
    batch_size: int = 250
    precision: str = "float32"

    def __post_init__(self) -> None:
        one_of("norm", self.norm, BALLS)
        one_of("precision", self.precision, PRECISIONS)
        if not isinstance(self.radii, Sequence) or isinstance(self.radii, str) or not len(self.radii):
            raise ItoError(
                f"radii must be one or more radii in pixel units, such as (8 / 255,), got {shown(self.radii)}."
            )
        object.__setattr__(self, "radii", tuple(check_eps(self.norm, eps) for eps in self.radii))
        for name, least in (("repeat", 1), ("seed", 0), ("batch_size", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        check_rising(self.radii)
        standard(self.norm, 0.0, True, self.effort)  # checks the effort
        Report(self.seed, self.noise, self.repeat)

    def suite(self, ensemble: nn.Module, resnet: nn.Module | None = None) -> Suite:
        """The suite against one defender; attacks through a network that there is not are left out.

        Args:
            ensemble: the defender, an `ItoEnsemble`, or a `Vote` that has seen images (see `Vote.observe`).
            resnet: the network that it came from, a surrogate; None for a stranger's model.
        """
        surrogates: dict[str, nn.Module] = {}
        if resnet is not None and isinstance(ensemble, ItoEnsemble):
            surrogates = {"resnet": resnet, "noise-free": NoiseFree(ensemble)}
        noisy, names = as_voter(ensemble).noisy, ("itself", *surrogates)

        def steps(eps: float) -> list[Step]:
            every = standard(self.norm, eps, noisy, self.effort)
            return [replace(step, attack=precise(step.attack)) for step in every if step.through in names]

        def precise(attack: Attack) -> Attack:
            return replace(attack, precision=self.precision)

        def known(eps: float) -> Attack:
            return precise(with_known_paths(self.norm, eps, self.effort))

        return Suite(steps, surrogates, self.noise, self.repeat, self.seed, known=known)

    def attacks(self, ensemble: Voter, images: int, resnet: bool = True) -> int:
        """How many attacks `run_suite` makes on so many images: each step, goal, radius, batch and defender counts."""
        steps = standard(self.norm, 0.0, ensemble.noisy, self.effort)
        count = len(steps) if resnet else sum(step.through == "itself" for step in steps)
        count += len(standard(self.norm, 0.0, False, self.effort)) if resnet else 0
        return 2 * count * len(self.radii) * -(-images // self.batch_size)


@dataclass(frozen=True)
class SuiteRun:
    """What a suite has left of one defender: all images, all radii.

    Attributes:
        ensemble, suite: the defender, and what attacked it.
        images: all ``N`` images before the attack, on the CPU.
        clean_votes: int64 ``(repeat, members, N, classes)``, the report's votes on them, on the CPU.
        results: at each radius, rising; on the CPU.
        description: what evidence says of the suite, as JSON has it: ``name``, ``effort``, ``batch_size``,
            ``precision``.
    """

    ensemble: Voter
    suite: Suite
    images: Images
    clean_votes: Tensor
    results: tuple[SuiteResult, ...]
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def norm(self) -> str:
        """The ball, a name in `BALLS`."""
        return self.suite.steps(self.results[0].eps)[0].attack.norm

    @property
    def radii(self) -> list[float]:
        """Rising, in pixel units."""
        return [result.eps for result in self.results]

    @property
    def clean(self) -> Tensor:
        """The report's decisions ``(N,)`` without attack."""
        return worst_labels(self.clean_votes, self.images.y, self.ensemble.rule, self.ensemble.inferences)

    @property
    def invalid(self) -> int:
        """Inferences in the report's votes that voted for no class; a vote that decides several rows counts in each."""
        cases = [case for result in self.results for case in (result.denial, result.evasion)]
        return sum(invalid(votes, self.ensemble.inferences) for votes in (self.clean_votes, *(c.votes for c in cases)))

    def outcomes(self, level: int, goal: str = "denial") -> Outcomes:
        """Correct, wrong and abstained at the radius of number ``level``, under ``denial`` or ``evasion``."""
        return Outcomes.of(getattr(self.results[level], one_of("goal", goal, GOALS)).labels, self.images.y)

    def under(self, level: int, noise: str, goal: str = "denial") -> Outcomes:
        """The same under another noise model, a name in `SuiteResult.noises` at this radius."""
        noises = self.results[level].noises
        return Outcomes.of(
            getattr(noises[one_of("noise model", noise, noises)], one_of("goal", goal, GOALS)), self.images.y
        )


def attack_images(
    suite: Suite,
    ensemble: nn.Module,
    images: Images,
    radii: Sequence[float],
    batch_size: int = 250,
    on_attack: Callable[[Step, SuiteResult], object] = lambda step, result: None,
    among: World = ALONE,
) -> SuiteRun:
    """Run a suite against one defender on all images, batch after batch; each batch passes through all radii.

    Args:
        suite: `SuiteSettings.suite`, or one's own.
        ensemble: the defender; any other module than an ensemble votes as a `Vote`.
        images: on the CPU; their batches go to the ensemble's device.
        radii: rising, in pixel units.
        batch_size: images at a time.
        on_attack: called after every attack with its step and the result of its batch so far.
        among: the processes that share the batches; each gets the whole result.

    Raises:
        ItoError: radii that do not rise; an unknown surrogate.
    """
    ensemble = as_voter(ensemble)
    device = ensemble.device
    done: list[tuple[Tensor, Tensor, list[SuiteResult]]] = []
    for number, batch in among.own(list(enumerate(images.batches(batch_size)))):
        batch = batch.to(device)
        votes = suite.report.votes(ensemble, batch.x, batch.index).cpu()
        last: dict[float, SuiteResult] = {}
        for step, result in suite.run(ensemble, batch, radii, str(number)):
            last[result.eps] = result
            on_attack(step, result)
        done.append((batch.index.cpu(), votes, [join_results([last[eps]]) for eps in radii]))
    index, clean_votes, batches = zip(*among.dealt(done), strict=True)
    if not torch.equal(torch.cat(index), images.index):
        raise RuntimeError("The results of the processes are not those of each image exactly once.")
    results = tuple(join_results(parts) for parts in zip(*batches, strict=True))
    return SuiteRun(ensemble, suite, images, torch.cat(clean_votes, -2), results)


@dataclass(frozen=True)
class PeerResult:
    """What another library's attack has left of a defender.

    Attributes:
        outcomes: on all images, judged by the suite's report.
        attacked: images that were right without attack; only those are attacked.
        queries, gradients: inferences without and with a gradient.
    """

    outcomes: Outcomes
    attacked: int
    queries: int
    gradients: int


def peer_result(run: SuiteRun, name: str, eps: float, batch_size: int = 250) -> PeerResult:
    """Attack the defender of a suite's run by another library, on the same images.

    Args:
        run: the suite's run; its report judges.
        name: of the library, in `other_libraries.PEERS`.
        eps: the radius, in pixel units.
        batch_size: images at a time.

    Raises:
        ItoError: the library is unknown or not installed.
    """
    device = run.ensemble.device
    labels, attacked, queries, gradients = [], 0, 0, 0
    for batch in run.images.batches(batch_size):
        batch = batch.to(device)
        decided = run.suite.report.decide(run.ensemble, batch)
        right = (decided == batch.y).nonzero()[:, 0]
        if len(right):
            some = batch[right]
            result = peer_attack(name, run.ensemble, some.x, some.y, run.norm, eps)
            attacked, queries, gradients = attacked + len(right), queries + result.queries, gradients + result.gradients
            decided[right] = run.suite.report.decide(run.ensemble, replace(some, x=result.images))
        labels.append(decided.cpu())
    return PeerResult(Outcomes.of(torch.cat(labels), run.images.y), attacked, queries, gradients)


@dataclass(frozen=True)
class SuiteComparison:
    """The suite against an ensemble and against the ResNet it came from, on the same images.

    Attributes:
        ito, resnet: the two runs; the ResNet is an ensemble of one member without noise. A stranger's model has none.
        state: the folder of what is finished, if it was kept; `discard_state` deletes it.
    """

    ito: SuiteRun
    resnet: SuiteRun | None
    state: Path | None = field(default=None, repr=False)

    @property
    def runs(self) -> dict[str, SuiteRun]:
        """The runs by their names."""
        return {"ito": self.ito} if self.resnet is None else {"ito": self.ito, "resnet": self.resnet}

    def paired(self, level: int) -> Paired:
        """The paired test of ResNet against ensemble at the radius of number ``level``: who is right under denial.

        Raises:
            ItoError: there is no ResNet.
        """
        if self.resnet is None:
            raise ItoError("There is no ResNet to compare with.")
        truth = self.ito.images.y
        return Paired.of(*(run.results[level].denial.labels == truth for run in (self.resnet, self.ito)))

    def discard_state(self) -> None:
        """Delete what was kept for a resumption."""
        if self.state is not None:
            shutil.rmtree(self.state, ignore_errors=True)


def run_suite(
    ensemble: nn.Module,
    resnet: nn.Module | None,
    split: Split,
    settings: SuiteSettings,
    state: str | Path | None = None,
    resume: bool = False,
    on_attack: OnAttack = lambda defender, step, result: None,
    among: World = ALONE,
) -> SuiteComparison:
    """Attack an ensemble and its ResNet by the suite ``standard``, at every radius.

    Args:
        ensemble, resnet: on one device. Without a ResNet the ensemble, or a stranger's module, is attacked alone.
        split: the images, such as ``load_data("digits").test.first(100)``.
        settings: of the suite.
        state: a folder, such as that of the run. In it a folder of its own, named by the hash of settings, weights
            and images, keeps every finished attack.
        resume: take what is finished from there; otherwise it is deleted and the run begins anew.
        on_attack: called after every attack with ``ito`` or ``resnet``, the step, and the result so far of its batch.
        among: the processes that share the images, in pieces of a batch at most; each gets the whole result. A resumed
            run keeps its pieces, so that another number of processes takes all that is finished.

    Raises:
        ItoError: there is nothing to resume.
    """
    ensemble = as_voter(ensemble)
    device = ensemble.device
    images = Images.of(split, settings.batch_size, device)
    folder = None if state is None else Path(state) / f"suite-{_digest(ensemble, images, settings)}"
    pieces = (settings.batch_size, among.pieces(len(images), settings.batch_size))
    piece = among.gather(_begin(folder, resume, *pieces) if among.first else 0)[0]
    ensemble.observe(images.x[: settings.batch_size].to(device))
    defenders: dict[str, tuple[Voter, Suite]] = {"ito": (ensemble, settings.suite(ensemble, resnet))}
    if resnet is not None:
        plain = ItoEnsemble([recast(resnet, 0.0, image_shape=_shape(images))], 1)
        defenders["resnet"] = (plain, settings.suite(plain))
    description: dict[str, Any] = {"name": "standard", "effort": settings.effort, "batch_size": settings.batch_size}
    description["precision"] = settings.precision
    runs: dict[str, SuiteRun] = {}
    for name, (defender, suite) in defenders.items():
        suite.state = None if folder is None else folder / name
        run = attack_images(suite, defender, images, settings.radii, piece, partial(on_attack, name), among)
        runs[name] = replace(run, description=description)
    return SuiteComparison(runs["ito"], runs.get("resnet"), folder)


def _begin(folder: Path | None, resume: bool, batch_size: int, piece: int) -> int:
    """Make a state's folder ready, and remember in it how many images a piece has; gives that number.

    Args:
        folder: of the state, or None.
        resume: take what is finished, with its pieces; else it is deleted.
        batch_size: images of a piece in the states of earlier versions.
        piece: images of a piece, if the run begins anew.

    Raises:
        ItoError: there is nothing to resume.
    """
    if resume and (folder is None or not folder.is_dir()):
        raise ItoError(
            "There is nothing to resume: no suite with these settings, weights and images was interrupted here; "
            "leave --resume out."
        )
    if folder is None:
        return piece
    file = folder / "piece.json"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        return json.loads(file.read_text()) if file.is_file() else batch_size
    write_atomically(file, json.dumps(piece).encode())
    return piece


def _shape(images: Images) -> tuple[int, int, int]:
    _, channels, height, width = images.x.shape
    return channels, height, width


def _digest(ensemble: Voter, images: Images, settings: SuiteSettings) -> str:
    """What names the state of a run: another ensemble, other images or other settings have another state."""
    vote = {"members": len(ensemble.members), "inferences": ensemble.inferences, "rule": ensemble.rule}
    choice = fingerprint_choice(images.index, images.y, images.x)
    content = [asdict(settings), vote, fingerprint(ensemble), choice]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
