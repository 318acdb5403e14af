"""``ito-sde certify``: L2 radii in which the smoothed vote provably keeps its class, by randomised smoothing."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from neuralsde_ito.validation import ItoError, parse_eps

from . import options, output

if TYPE_CHECKING:
    from torch import Tensor

    from neuralsde_ito.certificates.certify import Certificate, Sampling
    from neuralsde_ito.certificates.certify_run import CertifiedSplit
    from neuralsde_ito.models.voting import Voter

_QUARTER = click.FloatRange(0, 0.25, min_open=True, max_open=True)


@dataclass(frozen=True)
class Asked:
    """The options that say how images are sampled, as the user gave them."""

    sigma: float | None
    n0: int
    n: int
    alpha: float
    beta: float
    seed: int | None
    batch_size: int

    def sampling(self, sigma: float, seed: int) -> Sampling:
        """The same for the library."""
        from neuralsde_ito.certificates.certify import Sampling

        return Sampling(sigma, self.n0, self.n, self.alpha, self.beta, seed)


@click.command("certify")
@options.sampled_defender
@options.gathered(
    "asked",
    Asked,
    click.option(
        "--sigma",
        type=click.FloatRange(0, min_open=True),
        help="Standard deviation of the noise on the image, in pixel units.  [default: the run's sde.input_sigma]",
    ),
    click.option(
        "--n0", type=click.IntRange(1, 10**9), default=100, show_default=True, help="Samples that choose the class."
    ),
    click.option(
        "--n",
        type=click.IntRange(1, 10**9),
        default=10_000,
        show_default=True,
        help="Samples that count for the radius.",
    ),
    click.option(
        "--alpha", type=_QUARTER, default=0.001, show_default=True, help="Error of a certificate, for each image."
    ),
    click.option(
        "--beta",
        type=click.FloatRange(0, 0.25, max_open=True),
        default=0.001,
        show_default=True,
        help="Probability, for each image, that an early stop loses a certificate; 0: stop only where it is certain.",
    ),
    options.seed,
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=20,
        show_default=True,
        help="Images at a time, which are kept when they are done; the result does not depend on it.",
    ),
)
@click.option(
    "--radius",
    "radii",
    multiple=True,
    help="L2 radius in pixel units, 0.5 or 128/255; repeatable.  [default: 0 to 3 times sigma]",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    metavar="N",
    help="Certify N test images, a fixed choice.",
)
@click.option("--resume", is_flag=True, help="Go on where the same command was interrupted.")
@options.as_json
def command(
    chosen: options.DefenderOptions,
    asked: Asked,
    radii: tuple[str, ...],
    limit: int,
    resume: bool,
    as_json: bool,
) -> None:
    """Certify L2 radii of a run's ensemble, or of a network of yours, by randomised smoothing.

    Noise is added to the image, and single inferences are counted: a certified radius holds for the class that has more
    than half of all of them. The ensemble should have been trained with this noise. Results go into the run's folder.

    \b
    ito-sde train --set sde.input_sigma=0.25
    ito-sde certify --limit 500
    ito-sde certify --model mymodels:make_net --data digits --sigma 0.25
    """
    written = {parse_eps(text, "--radius"): text for text in reversed(radii)}
    chosen.check()
    sigma = _known_sigma(chosen, asked.sigma)

    from neuralsde_ito.certificates.certify_run import certify_split
    from neuralsde_ito.distributed import world
    from neuralsde_ito.files import write_atomically
    from neuralsde_ito.runs.build import load_dataset

    if sigma is not None:
        asked.sampling(sigma, 0)  # wrong numbers are refused before the networks are read
    opened = chosen.defender()
    voter, sigma, recast_from = _sampled(opened, sigma)
    sampling = asked.sampling(sigma, opened.config.seed if asked.seed is None else asked.seed)
    written = written or {k * sigma: f"{k * sigma:g}" for k in range(4)}
    data = load_dataset(opened.config, train_limit=1, test_limit=limit)
    options.check_folder(opened.folder)

    begun, among = time.monotonic(), world()
    with output.progress(len(among.share(data.test)), "certify", "images") as bar:
        settings = (asked.batch_size, opened.folder, resume, bar.update, among)
        try:
            certified = certify_split(voter, data.test, sampling, *settings)
        except KeyboardInterrupt:
            click.echo("Finished batches are kept; go on: the same command with --resume.", err=True)
            raise
    seconds = time.monotonic() - begun
    if not among.first:
        return

    from .pictures import certificate_picture

    report = _report(certified, opened, voter, data.name, dict(sorted(written.items())), recast_from, seconds)
    report["batch_size"] = asked.batch_size
    record = opened.run.result_file("certify", "l2")
    picture = record.with_suffix(".png")
    write_atomically(record, output.json_bytes(report))
    images = f"{output.count(len(certified.truth), 'test image')} of {data.name}"
    certificate_picture(picture, certified, f"{images}, sigma {sigma:g}; band: 95 % Wilson, pointwise")
    certified.discard_state()
    if as_json:
        output.print_json(report)
        return
    _describe(opened, report)
    _table(certified, report, images)
    click.echo(f"\nRecord    {record}\nPicture   {picture}")
    if opened.model is None and recast_from is None:
        click.echo(f"Next      ito-sde suite --norm l2 --eps {sigma:g}    (the upper bound beside it)")


def _known_sigma(chosen: options.DefenderOptions, typed: float | None) -> float | None:
    """The noise on the image, as far as it is known without the networks.

    Raises:
        ItoError: the run has none, and none was typed.
    """
    if typed is not None or chosen.model is not None:
        return typed
    run = options.find_run(chosen.root, chosen.run)
    if not run.config.sde.input_sigma:
        raise ItoError(
            f"The run {str(run.folder)!r} has no noise on its images (sde.input_sigma 0): give --sigma, such as 0.25, "
            "or train one with it: ito-sde train --set sde.input_sigma=0.25."
        )
    return run.config.sde.input_sigma


def _sampled(opened: options.Defender, sigma: float | None) -> tuple[Voter, float, float | None]:
    """What is sampled, its noise on the image, and the noise that its members had before, where that is another one."""
    from neuralsde_ito.certificates.certify import smoothed, with_input_sigma
    from neuralsde_ito.models.ensemble import ItoEnsemble

    ensemble, before = opened.ensemble, None
    if isinstance(ensemble, ItoEnsemble) and sigma is not None:
        own = {float(member.input_sigma) for member in ensemble.members}
        if own != {sigma}:
            before, ensemble = max(own), with_input_sigma(ensemble, sigma)
    return *smoothed(ensemble, sigma), before


# --- the record -----------------------------------------------------------------------------------------


def _report(
    certified: CertifiedSplit,
    opened: options.Defender,
    voter: Voter,
    data: str,
    written: dict[float, str],
    recast_from: float | None,
    seconds: float,
) -> dict[str, Any]:
    """All figures, ready for JSON."""
    from neuralsde_ito.attacks.fingerprints import fingerprint
    from neuralsde_ito.outcomes import ABSTAIN, Rate
    from neuralsde_ito.runs.run import environment

    certificate, truth = certified.certificate, certified.truth
    sampling, labels = certificate.sampling, certificate.labels
    rates = [(radius, text, certificate.accuracy(truth, radius)) for radius, text in written.items()]
    outcomes = {
        "correct": labels == truth,
        "wrong": (labels != truth) & (labels != ABSTAIN),
        "abstained": labels == ABSTAIN,
    }
    counted = {name: Rate.of(int(which.sum()), len(truth)) for name, which in outcomes.items()}
    return {
        "command": output.command_line(),
        **opened.about,
        "norm": "l2",
        **asdict(sampling),
        "members": len(voter.members),
        "recast_from_input_sigma": recast_from,
        "largest_radius": sampling.largest_radius,
        "data": data,
        "images": len(truth),
        "weights": fingerprint(voter),
        "seconds": round(seconds, 1),
        "device": str(opened.device),
        "environment": environment(),
        "certified": [
            {"radius": radius, "written": text, "count": r.count, "n": r.n, "rate": [r.value, r.low, r.high]}
            for radius, text, r in rates
        ],
        "outcomes": {name: {"count": r.count, "rate": [r.value, r.low, r.high]} for name, r in counted.items()},
        "average_radius": certificate.average_radius(truth),
        "stopped_early": int((certificate.drawn < sampling.n).sum()),
        "samples": int(certificate.drawn.sum()) + sampling.n0 * len(truth),
        "invalid": _invalid(certificate),
        "each": _each(certificate, truth),
    }


def _invalid(certificate: Certificate) -> int:
    """Samples whose logits were not finite."""
    drawn = int(certificate.drawn.sum()) + certificate.sampling.n0 * len(certificate.drawn)
    return drawn - int(certificate.votes.sum()) - int(certificate.selected.sum())


def _each(certificate: Certificate, truth: Tensor) -> list[dict[str, Any]]:
    """A row for each image; votes by class, without the classes that have none."""
    columns = zip(
        certificate.index.tolist(),
        truth.tolist(),
        certificate.labels.tolist(),
        certificate.candidates.tolist(),
        certificate.radii.tolist(),
        certificate.counts.tolist(),
        certificate.drawn.tolist(),
        certificate.selected.tolist(),
        certificate.votes.tolist(),
        strict=True,
    )
    return [
        {
            "index": index,
            "truth": true,
            "label": label if radius else None,
            "radius": radius or None,
            "candidate": candidate,
            "count": count,
            "drawn": drawn,
            "selected": {str(c): k for c, k in enumerate(selected) if k},
            "votes": {str(c): k for c, k in enumerate(votes) if k},
        }
        for index, true, label, candidate, radius, count, drawn, selected, votes in columns
    ]


# --- the terminal ---------------------------------------------------------------------------------------


def _describe(opened: options.Defender, report: dict[str, Any]) -> None:
    """What was sampled, and how."""
    sigma, members, remarks = report["sigma"], report["members"], report.get("remarks", ())
    if opened.model is None:
        config = opened.config
        sde = config.sde.model_copy(update={"input_sigma": sigma})
        output.describe_networks(config.model_copy(update={"sde": sde}), opened.folder)
    else:
        output.describe_model(opened)
        click.echo(f"Image     x + {sigma:g} W before the model, W standard normal (in pixel units)")
    each = f", {report['n'] // members:,} of each of {members} members" if members > 1 else ""
    said = f"{report['n0']:,} choose the class, {report['n']:,} count{each}"
    click.echo(f"Samples   {said}; alpha {report['alpha']:g}, seed {report['seed']}")
    for remark in remarks:
        output.sentence(f"Noise     {remark}")


def _table(certified: CertifiedSplit, report: dict[str, Any], images: str) -> None:
    """Certified accuracy at the radii that were asked for, and what it means."""
    from neuralsde_ito.outcomes import Rate

    sampling, n = certified.certificate.sampling, report["images"]
    click.echo(f"\n{images}; radius in pixel units, L2; % with 95 % Wilson intervals\n")
    rows = [
        [row["written"], output.percent(Rate.of(row["count"], row["n"])), f"{row['count']:,} of {row['n']:,}"]
        for row in report["certified"]
    ]
    output.table(rows, ["radius", "certified accuracy", "images"])
    click.echo()
    counts = {name: entry["count"] for name, entry in report["outcomes"].items()}
    output.sentence(
        f"{counts['abstained']} of {n} without a certificate, {counts['wrong']} certified for a wrong class. A "
        "certificate says that within its radius the class keeps more than half of all inferences under this noise; it "
        f"is no promise of a single vote. Each is false with probability {sampling.alpha:g} at most. "
        f"{sampling.n:,} samples give no radius above {sampling.largest_radius:.3f}."
    )
    cost = f"{report['samples']:,} samples in {report['seconds']:.0f} s."
    if stopped := report["stopped_early"]:
        certain = "no certificate was possible any more"
        likely = (
            "a certificate was out of reach; one that all samples would have given is lost so with probability "
            f"{sampling.beta:g} at most, for each image (--beta 0 loses none)"
        )
        cost += f" {stopped} of {n} images were stopped early, where {likely if sampling.beta else certain}."
    output.sentence(cost)
    output.sentence(
        f"Average certified radius {report['average_radius']:.3f}: the weaker summary, in which a few large radii hide "
        "many images without any; read the table."
    )
    if (before := report["recast_from_input_sigma"]) is not None:
        output.sentence(
            f"The members had sigma {before:g} on their images and were recast with {sampling.sigma:g}: a network that "
            "was not trained for this noise has a poor vote under it. Train one: ito-sde train --set "
            f"sde.input_sigma={sampling.sigma:g}."
        )
    output.invalid_sentence(report["invalid"])
