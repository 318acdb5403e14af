"""``ito-sde audit``: twenty checks of whether an attacked accuracy can be trusted."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.audits.audit import Audit


@click.command("audit")
@options.on_run
@click.option("--norm", default="linf", show_default=True, help="linf or l2.")
@click.option("--eps", "radius", help="Radius in pixel units, 8/255 or 0.03.  [default: the run's largest]")
@click.option("--steps", type=int, default=20, show_default=True, help="Iterations of the white-box attack.")
@click.option("--step-size", help="Length of an iteration in pixel units.  [default: 2.5 eps / steps]")
@click.option("--restarts", type=int, default=1, show_default=True, help="Attempts, each from a random start.")
@click.option("--eot", type=int, default=20, show_default=True, help="Paths that a gradient averages.")
@click.option("--queries", type=int, default=500, show_default=True, help="Queries an image of the black-box attack.")
@click.option("--draws", type=int, default=10_000, show_default=True, help="Random points in the ball, in all.")
@options.votes
@click.option("--limit", type=click.IntRange(1), metavar="N", default=50, show_default=True, help="Use N test images.")
@options.seed
@click.option("--html", **options.out_file, metavar="FILE", help="Write a report, one page.")
@click.option("--strict", is_flag=True, help="Exit with 1 if a check fails.")
@options.as_json
@click.pass_context
def command(
    context: click.Context,
    run: str | None,
    root: Path,
    device: str,
    norm: str,
    radius: str | None,
    steps: int,
    step_size: str | None,
    restarts: int,
    eot: int,
    queries: int,
    draws: int,
    inferences: int | None,
    rule: str | None,
    limit: int,
    seed: int | None,
    html: Path | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Check whether a robustness figure is the model's strength or the attack's weakness.

    \b
    ito-sde audit --eps 8/255 --html audit.html
    ito-sde audit --norm l2 --eps 0.5 --strict
    """
    from neuralsde_ito.attacks import BALLS, PGD, parse_eps
    from neuralsde_ito.audits.audit import CHECKS, audit
    from neuralsde_ito.runs.run import command_line, environment, load_dataset
    from neuralsde_ito.validation import ItoError, nearest

    if norm not in BALLS:
        raise ItoError(nearest("norm", norm, BALLS))
    if radius is not None and parse_eps(radius) == 0:
        raise ItoError("An audit needs a ball to attack in: eps must be above 0.")
    length = None if step_size is None else parse_eps(step_size)
    settings: dict[str, Any] = {"steps": steps, "step_size": length, "restarts": restarts, "eot": eot}
    PGD(norm=norm, eps=parse_eps(radius or 0), **settings)  # refuse what is wrong before the run is read
    opened = options.open_run(root, run, device, inferences, rule)
    defaults = opened.config.attack
    written = radius or max(defaults.eps.get(norm, ("8/255",)), key=parse_eps)  # type: ignore[call-overload]
    images = load_dataset(opened.config, train_limit=1, test_limit=limit)
    seed = opened.config.seed if seed is None else seed
    index, x, y = next(images.test.batches(len(images.test), opened.device))

    begun = time.monotonic()
    with output.progress(len(CHECKS), "audit", "checks") as bar:
        found = audit(
            opened.ensemble,
            x,
            y,
            norm,
            parse_eps(written),
            seed=seed,
            index=index,
            surrogates={"resnet": opened.resnet},
            queries=queries,
            draws=draws,
            tick=bar.update,
            **settings,
        )
    ensemble = opened.ensemble
    report: dict[str, Any] = {
        "command": command_line(),
        "run": str(opened.folder),
        "data": images.name,
        "seed": seed,
        "device": str(opened.device),
        "seconds": round(time.monotonic() - begun, 1),
        "vote": {"members": len(ensemble.members), "inferences": ensemble.inferences, "rule": ensemble.rule},
        "queries": queries,
        "draws": draws,
        "config": opened.config.model_dump(mode="json"),
        "environment": environment(),
        **found.as_dict(),
    }
    if html is not None:
        from .report import write_report

        write_report(html, found, report, images.classes)
    if as_json:
        output.print_json(report)
    else:
        output.describe(opened.config, opened.folder, len(ensemble.members), ensemble.inferences, ensemble.rule)
        _print(found, written, images.name, report["seconds"], html)
    if strict and not found.passed:
        context.exit(1)


def _print(found: Audit, written: str, data: str, seconds: float, html: Path | None) -> None:
    attack = found.attack
    click.echo(
        f"\n{output.count(found.clean.n, 'test image')} of {data}, {attack.norm}, eps {written}; PGD, "
        f"{output.count(attack.steps, 'step')}, {output.count(attack.eot, 'path')} a gradient; {seconds:.0f} s\n"
    )
    rows = [
        (c.number, textwrap.fill(c.name, 22), textwrap.fill(c.figure, 40), textwrap.fill(c.threshold, 30), c.verdict)
        for c in found.checks
    ]
    output.table(rows, ["", "check", "figure", "fails if", "verdict"])
    click.echo()
    if found.attacked is not None:
        output.sentence(
            f"Correct: {output.percent(found.clean.rate('correct')).strip()} % without attack, "
            f"{output.percent(found.attacked.rate('correct')).strip()} % under it (95 % Wilson intervals)."
        )
    output.sentence(found.verdict)
    for check in found.failed:
        output.sentence(f"{check.number} {check.name}: {check.note}")
    click.echo()
    if found.failed:
        output.sentence(
            "Next: mend the attack as said above, and audit again, or take 'ito-sde attack --suite standard'; the "
            "lower accuracy is the one to report."
        )
    else:
        output.sentence("Next: 'ito-sde attack' for the figures. An audit finds known faults: no proof of robustness.")
    if html is not None:
        click.echo(f"Report    {html}")
