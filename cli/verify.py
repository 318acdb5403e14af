"""``ito-sde verify``: the claims of an evidence bundle, computed again."""

from __future__ import annotations

import os
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
@options.gathered(
    "chosen",
    options.DefenderOptions,
    click.option("--run", "run", help="Name or path of a run.  [default: the bundle's, else the newest finished one]"),
    options.runs_root,
    options.device,
    options.a_model,
    options.votes,
)
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
    help="Seed of the fresh noise, the sample and the second attack; not the bundle's.  [default: at random]",
)
@options.batch_size
@options.as_json
def command(
    bundle: Path,
    chosen: options.DefenderOptions,
    sample: int,
    seed: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Compute again what an evidence bundle claims, and say which claims stand.

    All votes are cast again, and once more on fresh noise; a sample of the images is attacked again. A claim that
    cannot be compared, because the run or the data is missing, does not stand. Exit code 0 if all claims stand, else 1.

    \b
    ito-sde verify evidence/linf-8of255
    ito-sde verify evidence/linf-8of255 --run mine --sample 100
    ito-sde verify evidence/linf-0.1 --model mymodels:make_net --data digits
    """
    from dataclasses import replace

    from neuralsde_ito.validation import ItoError, shown

    if not os.path.isdir(bundle):  # before torch is imported
        raise ItoError(f"There is no evidence bundle in {shown(str(bundle))}: there is no such folder.")
    if chosen.run is not None or chosen.model is not None:
        chosen.check()

    from neuralsde_ito.audits.bundle import Altered, load_bundle
    from neuralsde_ito.audits.verify import Claim, Verification, verify_bundle, work

    files = Claim("files unaltered", "SHA-256 and summary", "the same", True)
    try:
        evidence = load_bundle(bundle)
    except Altered as error:
        _finish(bundle, None, Verification((replace(files, found="others", stands=False, note=str(error)),)), as_json)
        return
    opened: options.Defender | None = None
    try:
        opened = _defender(chosen, evidence)
    except ItoError as error:
        if chosen.run is not None or chosen.model is not None:
            raise
        _warn("The ensemble is not compared", error)
    split = None if opened is None else _split(opened.config)
    suite = None if opened is None else _suite(evidence, opened)
    ensemble = None if opened is None else opened.ensemble
    with output.progress(work(evidence, sample), "verify", "images") as bar:
        verification = verify_bundle(evidence, ensemble, split, suite, seed, sample, batch_size, bar.update)
    folder = None if opened is None else opened.folder
    if chosen.model is not None and any(c.name == "ensemble" and not c.stands for c in verification.claims):
        click.echo(
            f"Warning: {chosen.model}() made another network. It must make the same one at every call.", err=True
        )
    _finish(bundle, folder, replace(verification, claims=(files, *verification.claims)), as_json)


def _defender(chosen: options.DefenderOptions, evidence: Evidence) -> options.Defender:
    """The model that the user names, else the run that the bundle names, else the newest run.

    Raises:
        ItoError: there is none; or the bundle names a function that makes it. A bundle must not say what code runs.
    """
    from dataclasses import replace

    from neuralsde_ito.validation import ItoError, shown

    if chosen.model is None and chosen.run is None and isinstance(made := evidence.config.get("model"), str):
        data = evidence.config.get("data")
        name = data.get("name") if isinstance(data, dict) else None
        raise ItoError(f"it is not a run's, {shown(made)} made it: give --model {made} --data {name or 'DATA'}")
    run = chosen.run or (_run_of(evidence) if chosen.model is None else None)
    return replace(chosen, run=run).defender()


def _run_of(evidence: Evidence) -> str | None:
    """The path of the run that the bundle names, if it names one."""
    run = evidence.config.get("run")
    return run if isinstance(run, str) else None


def whole_test_split(config: Config) -> Split:
    """The test split of a run, without the limit of its configuration: the images are chosen from it."""
    from neuralsde_ito.data import load_data

    data = config.data
    return load_data(data.name, data.path, data.size, data.augment, train_limit=1).test


def _split(config: Config) -> Split | None:
    """The whole test split; none, and a warning, if it cannot be read."""
    from neuralsde_ito.validation import ItoError

    try:
        return whole_test_split(config)
    except ItoError as error:
        _warn("Images and labels are not compared with the data set's", error)
        return None


def _suite(evidence: Evidence, opened: options.Defender) -> Suite | None:
    """The suite that the bundle names, on the run's networks; none, and a warning, if there is no such suite."""
    from neuralsde_ito.audits.bundle import suite_of
    from neuralsde_ito.validation import ItoError

    try:
        return suite_of(evidence, opened.ensemble, opened.resnet)
    except ItoError as error:
        _warn("The attack is not made again", error)
        return None


def _warn(what: str, error: Exception) -> None:
    click.echo(f"Warning: {what}: {str(error).rstrip('.')}.", err=True)


def _finish(bundle: Path, run: Path | None, verification: Verification, as_json: bool) -> None:
    """Print the verdicts, and leave with exit code 1 if a claim does not stand."""
    if as_json:
        head = {"command": "verify", "bundle": str(bundle), "run": None if run is None else str(run)}
        output.print_json({**head, **verification.as_dict()})
    else:
        _print(verification)
    if not verification.stands:
        click.get_current_context().exit(1)


def _print(verification: Verification) -> None:
    """A row for each claim, each note with the claims that it explains, and the verdict."""
    claims = verification.claims
    rows = [[c.name, c.claimed, c.found, "stands" if c.stands else "DOES NOT STAND"] for c in claims]
    output.table(rows, ["claim", "claimed", "found", "verdict"])
    click.echo()
    notes: dict[str, list[str]] = {}
    for claim in claims:
        if claim.note:
            notes.setdefault(claim.note, []).append(claim.name)
    for note, names in notes.items():
        text = f"{', '.join(names)}: {note}"
        output.sentence(text[0].upper() + text[1:])
    wrong = [claim.name for claim in claims if not claim.stands]
    seed = "" if verification.seed is None else f" (seed {verification.seed})"
    click.echo()
    output.sentence(f"Does not stand{seed}: {', '.join(wrong)}." if wrong else f"All {len(claims)} claims stand{seed}.")
