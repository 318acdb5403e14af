"""``ito-sde audit``: is an attacked accuracy the model's strength or the attack's weakness?"""

from __future__ import annotations

import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from neuralsde_ito.validation import ItoError, check_eps, parse_eps, whole_number

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.attacks.precision import PrecisionTrial
    from neuralsde_ito.audits.audit import Audit


@dataclass(frozen=True)
class WhiteBoxOptions:
    """The options of the white-box attack, as they were typed."""

    norm: Literal["linf", "l2", "l1"]
    eps: str | None
    steps: int | None
    step_size: str | None
    restarts: int | None
    eot: int | None

    def check(self) -> None:
        """Refuse what can be refused without torch: the radius, and numbers below 1.

        Raises:
            ItoError: with the value it saw.
        """
        for name in ("steps", "restarts", "eot"):
            if (value := getattr(self, name)) is not None:
                whole_number(name, value)
        if self.eps is not None and check_eps(self.norm, self.eps) == 0:
            raise ItoError("An audit needs a ball to attack in: eps must be above 0.")

    def settings(self) -> dict[str, Any]:
        """The settings of `PGD`, without the norm and the radius.

        Raises:
            ItoError: a setting that cannot be used.
        """
        from neuralsde_ito.attacks import PGD

        step_size = None if self.step_size is None else parse_eps(self.step_size)
        typed = {"steps": self.steps, "step_size": step_size, "restarts": self.restarts, "eot": self.eot}
        settings: dict[str, Any] = {name: value for name, value in typed.items() if value is not None}
        PGD(norm=self.norm, eps=parse_eps(self.eps or 0), **settings)
        return settings


white_box = options.gathered(
    "attack",
    WhiteBoxOptions,
    options.norm,
    click.option("--eps", help="Radius in pixel units, 8/255 or 0.03.  [default: the run's largest]"),
    click.option("--steps", type=int, help="Iterations of the attack in doubt.  [default: 40, with momentum]"),
    click.option("--step-size", help="Length of an iteration in pixel units.  [default: eps / 4]"),
    click.option("--restarts", type=int, help="Attempts, each from a random start.  [default: 2]"),
    click.option("--eot", type=int, help="Paths that a gradient averages.  [default: 8, with momentum]"),
)


@click.command("audit")
@options.defender
@white_box
@options.precision
@click.option("--queries", type=int, default=500, show_default=True, help="Queries an image of the black-box attack.")
@click.option("--draws", type=int, help="Random points an image.  [default: 10,000, fewer where images are large]")
@click.option("--limit", type=click.IntRange(1), metavar="N", default=50, show_default=True, help="Use N test images.")
@options.seed
@click.option("--html", **options.out_file, metavar="FILE", help="Write a report, one page.")
@click.option("--bundle", **options.out_folder, metavar="DIR", help="Keep evidence that 'ito-sde verify' checks.")
@click.option("--strict", is_flag=True, help="Exit with 1 unless the verdict is sound and no check fails.")
@options.as_json
@click.pass_context
def command(
    context: click.Context,
    chosen: options.DefenderOptions,
    attack: WhiteBoxOptions,
    precision: str,
    queries: int,
    draws: int | None,
    limit: int,
    seed: int | None,
    html: Path | None,
    bundle: Path | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Check whether a robustness figure is the model's strength or the attack's weakness.

    The model is a run's ensemble, or a network of yours. The verdict is "masked" (an attack of the audit's own found
    more, and its figure is the bottom line), "undecided" or "sound as far as seen"; docs/audit.md says what each check
    is.

    \b
    ito-sde audit --eps 8/255 --html audit.html
    ito-sde audit --norm l2 --eps 0.5 --strict
    ito-sde audit --model mymodels:make_net --data digits --eps 0.1
    """
    attack.check()  # before torch is imported
    chosen.check()

    from neuralsde_ito.audits.audit import PROGRESS, audit
    from neuralsde_ito.runs.build import load_dataset

    settings = attack.settings()  # which refuses what is wrong, before the networks are read
    opened = chosen.defender()
    *_, eps = opened.radii(attack.norm, (attack.eps,) if attack.eps else (), also=False).values()
    images = load_dataset(opened.config, train_limit=1, test_limit=limit)
    settings |= {"seed": opened.config.seed if seed is None else seed, "queries": queries, "draws": draws}
    trial = opened.in_precision(precision, images)
    index, x, y = next(images.test.batches(len(images.test), opened.device))
    if bundle is not None:
        options.check_folder(bundle, new=True)
    start = time.monotonic()
    with output.progress(PROGRESS, "audit", "steps") as bar:
        result = audit(
            opened.ensemble,
            x,
            y,
            attack.norm,
            parse_eps(eps),
            index=index,
            surrogates={} if opened.resnet is None else {"resnet": opened.resnet},
            evidence=bundle is not None,
            tick=bar.update,
            precision=trial.precision,
            **settings,
        )
    report = _about(opened, images.name, settings, round(time.monotonic() - start, 1)) | result.as_dict()
    if bundle is not None:
        _save_bundle(bundle, result, opened, report)
    if html is not None:
        from .report import write_report

        write_report(html, result, report, images.classes)
    if as_json:
        output.print_json(report)
    else:
        output.describe_defender(opened)
        _print(result, eps, report, html, trial)
        if bundle is not None:
            model = f" --model {opened.model} --data {chosen.data}" if opened.model else ""
            click.echo(f"Evidence  {bundle}    (check it: ito-sde verify {bundle}{model})")
    if strict and (result.failed or not result.sound):
        context.exit(1)


def _save_bundle(folder: Path, result: Audit, opened: options.Defender, report: dict[str, Any]) -> None:
    """Write the evidence of the audit's attacks.

    Raises:
        ItoError: no attack ran.
    """
    from neuralsde_ito.audits.bundle import evidence_of, save_bundle
    from neuralsde_ito.validation import ItoError

    from .verify import whole_test_split

    if result.run is None:
        raise ItoError(f"There is no evidence to keep: {result.summary}")
    about = opened.about | {"data": {"name": report["data"]}}
    split = whole_test_split(opened.config)
    save_bundle(folder, evidence_of(result.run, split, command=report["command"], config=about))


def _about(opened: options.Defender, data: str, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """How the audit was made, for ``--json`` and for the page.

    Args:
        opened: the run.
        data: the images' name.
        settings: of the audit, with ``seed``, ``queries`` and ``draws``.
        seconds: how long it took.
    """
    from neuralsde_ito.runs.run import environment

    return {
        "command": output.command_line(),
        **opened.about,
        "data": data,
        "seed": settings["seed"],
        "device": str(opened.device),
        "seconds": seconds,
        "vote": opened.vote,
        "queries": settings["queries"],
        "draws": settings["draws"],
        **opened.about_config,
        "environment": environment(),
    }


def _print(result: Audit, eps: str, about: dict[str, Any], html: Path | None, trial: PrecisionTrial) -> None:
    """Print the table of checks, the accuracies and what to do next; ``eps`` is the radius as it was typed."""
    attack = result.attack
    click.echo(
        f"\n{output.count(result.clean.n, 'test image')} of {about['data']}, {attack.norm}, eps {eps}; PGD, "
        f"{output.count(attack.steps, 'step')}, {output.count(attack.eot, 'path')} a gradient; "
        f"{about['seconds']:.0f} s\n"
    )
    rows = []
    for check in result.checks:
        cells = [textwrap.fill(text, n) for text, n in ((check.name, 20), (check.figure, 36), (check.threshold, 26))]
        rows.append((check.number, *cells, "FAIL" if check.verdict == "fail" else check.verdict))
    output.table(rows, ["", "check", "figure", "fails if", "verdict"])
    click.echo()
    if result.attacked is not None:
        output.sentence(
            f"Correct: {output.percent(result.clean.rate('correct')).strip()} % without attack, "
            f"{output.percent(result.attacked.rate('correct')).strip()} % under the attack in doubt (95 % Wilson "
            "intervals)."
        )
    if result.best is not None:
        output.sentence(
            f"Bottom line: {output.percent(result.best.outcomes.rate('correct')).strip()} % correct under all attacks "
            f"together, the audit's own among them."
        )
    output.sentence(result.summary)
    for check in (*result.failed, *result.undecided):
        output.sentence(f"{check.number} {check.name}: {check.note}")
    if attack.precision != "float32":
        output.sentence(
            result.remarks[0]
        )  # which gradients are in this precision: not those of the audit's own attacks
    if trial.why:
        output.sentence(trial.why)
    click.echo()
    if result.failed or not result.sound:
        output.sentence(
            "Next: fix the attack as said above, and audit again, or take 'ito-sde suite'; the "
            "lower accuracy is the one to report."
        )
    else:
        output.sentence("Next: 'ito-sde attack' for the figures. An audit finds known faults: no proof of robustness.")
    if html is not None:
        click.echo(f"Report    {html}")
