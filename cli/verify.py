"""``ito-sde verify``: the claims of an evidence bundle, recomputed on fresh noise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options, output

if TYPE_CHECKING:
    from torch import Tensor

    from neuralsde_ito.bundle import Evidence
    from neuralsde_ito.config import Config
    from neuralsde_ito.verification import Verification


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--run", "run", help="Name or path of a run.  [default: the bundle's, else the newest finished one]")
@options.runs_root
@options.device
@click.option(
    "--repeat",
    "repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="K",
    help="Reports under attack; an image must be right in all.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    help="Of the fresh noise, not the bundle's.  [default: at random]",
)
@options.batch_size
@options.as_json
def command(
    bundle: Path,
    run: str | None,
    root: Path,
    device: str,
    repeats: int,
    seed: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Recompute the figures of an evidence bundle, and say which claims stand.

    Exit code 0 if all do, 1 if one does not.

    \b
    ito-sde verify evidence/
    ito-sde verify evidence/ --run mine --repeat 10
    """
    from dataclasses import replace

    from neuralsde_ito.bundle import Altered, load_bundle
    from neuralsde_ito.verification import Claim, Verification, verify_bundle

    files = Claim("files unaltered", "SHA-256 and summary", "the same", True)
    try:
        evidence = load_bundle(bundle)
    except Altered as error:
        _finish(bundle, None, Verification((replace(files, found="others", stands=False, note=str(error)),)), as_json)
        return
    config = evidence.config
    vote = config["vote"] if isinstance(config.get("vote"), dict) else {}
    opened = options.open_run(root, run or config.get("run"), device, vote.get("inferences"), vote.get("rule"))
    x, y = _data(opened.config, evidence)
    with output.progress(len(evidence.index) * (1 + repeats), "verify", "images") as bar:
        found = verify_bundle(evidence, opened.ensemble, seed, repeats, x, y, batch_size, bar.update)
    _finish(bundle, opened.folder, replace(found, claims=(files, *found.claims)), as_json)


def _data(config: Config, evidence: Evidence) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The data set's images and labels in the bundle's order; none, and a warning, where they cannot be had."""
    import torch

    from neuralsde_ito.recipes import load_dataset
    from neuralsde_ito.validation import ItoError

    wanted = evidence.index.tolist()
    missing = "the test split does not hold all of the bundle's images"
    try:
        # Most likely an attack's fixed choice of so many images; else they are looked for in the whole split.
        for limit in (len(wanted), sys.maxsize):
            found: dict[int, tuple[Tensor, Tensor]] = {}
            for index, x, y in load_dataset(config, train_limit=1, test_limit=limit).test.batches(250):
                found.update(zip(index.tolist(), zip(x, y, strict=True), strict=True))
            if found.keys() >= set(wanted):
                images, labels = zip(*(found[i] for i in wanted), strict=True)
                return torch.stack(images), torch.stack(labels)
    except ItoError as error:
        missing = str(error).rstrip(".")
    click.echo(f"Warning: originals and labels are not compared with the data set's: {missing}.", err=True)
    return None, None


def _finish(bundle: Path, run: Path | None, found: Verification, as_json: bool) -> None:
    """Print the verdicts and leave with their exit code."""
    if as_json:
        head = {"command": "verify", "bundle": str(bundle), "run": None if run is None else str(run)}
        output.print_json({**head, **found.as_dict()})
    else:
        rows = [[c.name, c.claimed, c.found, "stands" if c.stands else "DOES NOT STAND"] for c in found.claims]
        output.table(rows, ["claim", "claimed", "found", "verdict"])
        click.echo()
        for claim in found.claims:
            if claim.note:
                output.sentence(f"{claim.name[0].upper()}{claim.name[1:]}: {claim.note}")
        fallen = [claim.name for claim in found.claims if not claim.stands]
        seeds = f" on fresh noise (seed {found.seeds[0]})" if found.seeds else ""
        if fallen:
            output.sentence(f"Does not stand{seeds}: {', '.join(fallen)}.")
        else:
            output.sentence(f"All {len(found.claims)} claims stand{seeds}.")
    if not found.stands:
        click.get_current_context().exit(1)
