"""``ito-sde verify``: the claims of an evidence bundle, computed again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.attacks.suite import Suite
    from neuralsde_ito.audits.bundle import Evidence
    from neuralsde_ito.audits.verify import Verification
    from neuralsde_ito.data import Split
    from neuralsde_ito.runs.config import Config


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--run", "run", help="Name or path of a run.  [default: the bundle's, else the newest finished one]")
@options.runs_root
@options.device
@options.votes
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    metavar="N",
    help="Images that are attacked again, chosen at random.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    help="Of the fresh noise, the sample and the second attack; not the bundle's.  [default: at random]",
)
@options.batch_size
@options.as_json
def command(
    bundle: Path,
    run: str | None,
    root: Path,
    device: str,
    inferences: int | None,
    rule: str | None,
    sample: int,
    seed: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Compute again what an evidence bundle claims, and say which claims stand.

    All votes are cast again and once more on fresh noise; a sample of the images is attacked again. What cannot be
    compared, as its run or its data is not there, does not stand. Exit code 0 if all claims stand, 1 if one does not.

    \b
    ito-sde verify evidence/linf-8of255
    ito-sde verify evidence/linf-8of255 --run mine --sample 100
    """
    from dataclasses import replace

    from neuralsde_ito.audits.bundle import Altered, load_bundle
    from neuralsde_ito.audits.verify import Claim, Verification, verify_bundle, work
    from neuralsde_ito.validation import ItoError

    files = Claim("files unaltered", "SHA-256 and summary", "the same", True)
    try:
        evidence = load_bundle(bundle)
    except Altered as error:
        _finish(bundle, None, Verification((replace(files, found="others", stands=False, note=str(error)),)), as_json)
        return
    opened: options.Opened | None = None
    try:
        opened = options.open_run(root, run or _run_of(evidence), device, inferences, rule)
    except ItoError as error:
        if run is not None:
            raise
        _warn("The ensemble is not compared", error)
    split = None if opened is None else _split(opened.config)
    suite = None if opened is None else _suite(evidence, opened)
    ensemble = None if opened is None else opened.ensemble
    with output.progress(work(evidence, sample), "verify", "images") as bar:
        found = verify_bundle(evidence, ensemble, split, suite, seed, sample, batch_size, bar.update)
    folder = None if opened is None else opened.folder
    _finish(bundle, folder, replace(found, claims=(files, *found.claims)), as_json)


def _run_of(evidence: Evidence) -> str | None:
    run = evidence.config.get("run")
    return run if isinstance(run, str) else None


def test_split(config: Config) -> Split:
    """The whole test split of a run, whatever limit its configuration has: what images are chosen from."""
    from neuralsde_ito.data import load_data

    data = config.data
    return load_data(data.name, data.path, data.size, data.augment, train_limit=1).test


def _split(config: Config) -> Split | None:
    """The same; none, and a warning, where it cannot be had."""
    from neuralsde_ito.validation import ItoError

    try:
        return test_split(config)
    except ItoError as error:
        _warn("Images and labels are not compared with the data set's", error)
        return None


def _suite(evidence: Evidence, opened: options.Opened) -> Suite | None:
    """The suite that the bundle names, on the run's networks; none, and a warning, if there is no such suite."""
    from neuralsde_ito.attacks.suite import Suite, standard
    from neuralsde_ito.models.ensemble import NoiseFree
    from neuralsde_ito.validation import ItoError

    settings = evidence.config.get("suite")
    settings = settings if isinstance(settings, dict) else {}
    steps = partial(standard, evidence.norm, noisy=opened.ensemble.noisy, effort=settings.get("effort", 0.0))
    try:
        if settings.get("name") != "standard":
            raise ItoError("the bundle names no suite")
        steps(evidence.eps)
    except ItoError as error:
        _warn("The attack is not made again", error)
        return None
    return Suite(steps, {"resnet": opened.resnet, "noise-free": NoiseFree(opened.ensemble)})


def _warn(what: str, error: Exception) -> None:
    click.echo(f"Warning: {what}: {str(error).rstrip('.')}.", err=True)


def _finish(bundle: Path, run: Path | None, found: Verification, as_json: bool) -> None:
    """Print the verdicts and leave with their exit code."""
    if as_json:
        head = {"command": "verify", "bundle": str(bundle), "run": None if run is None else str(run)}
        output.print_json({**head, **found.as_dict()})
    else:
        rows = [[c.name, c.claimed, c.found, "stands" if c.stands else "DOES NOT STAND"] for c in found.claims]
        output.table(rows, ["claim", "claimed", "found", "verdict"])
        click.echo()
        notes: dict[str, list[str]] = {}
        for claim in found.claims:
            if claim.note:
                notes.setdefault(claim.note, []).append(claim.name)
        for note, names in notes.items():
            text = f"{', '.join(names)}: {note}"
            output.sentence(text[0].upper() + text[1:])
        fallen = [claim.name for claim in found.claims if not claim.stands]
        seeds = "" if found.seed is None else f" (seed {found.seed})"
        click.echo()
        if fallen:
            output.sentence(f"Does not stand{seeds}: {', '.join(fallen)}.")
        else:
            output.sentence(f"All {len(found.claims)} claims stand{seeds}.")
    if not found.stands:
        click.get_current_context().exit(1)
