"""``ito-sde suite``: attack after attack on the images that the last ones left, for the ensemble and for the ResNet."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from neuralsde_ito.validation import check_eps

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.attacks.precision import PrecisionTrial
    from neuralsde_ito.attacks.suite import Step, SuiteResult
    from neuralsde_ito.attacks.suite_run import SuiteComparison, SuiteRun, SuiteSettings

NAMES = {"ito": "Itô ensemble", "resnet": "original ResNet"}  # what tables call the two defenders


def names_of(opened: options.Defender) -> dict[str, str]:
    """What tables call the defenders: the two of a run, or a network of the user's."""
    return NAMES if opened.model is None else {"ito": "model"}


@dataclass(frozen=True)
class Asked:
    """The options that set up the suite, as the user gave them."""

    norm: Literal["linf", "l2", "l1"]
    radii: tuple[str, ...]
    effort: float
    noise: str
    repeat: int
    seed: int | None
    batch_size: int

    def settings(self, radii: tuple[float, ...], seed: int) -> SuiteSettings:
        """The same for the library."""
        from neuralsde_ito.attacks.suite_run import SuiteSettings

        return SuiteSettings(self.norm, radii, self.effort, self.noise, self.repeat, seed, self.batch_size)


@click.command("suite")
@options.defender
@options.gathered(
    "asked",
    Asked,
    options.norm,
    click.option(
        "--eps",
        "radii",
        multiple=True,
        help="Radius in pixel units, 8/255 or 0.03; repeatable.  [default: the run's]",
    ),
    click.option("--effort", default=1.0, show_default=True, help="Scales the iterations of every attack."),
    click.option(
        "--noise",
        type=options.one_noise,
        default="fresh",
        show_default=True,
        help="The report's paths: new for each image, the same for all images, or known to the attacker.",
    ),
    click.option("--repeat", default=1, show_default=True, help="Votes that the attacker may ask for on each image."),
    options.seed,
    options.batch_size,
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="Attack N test images, a fixed choice.  [default: the run's]",
)
@options.precision
@click.option("--resume", is_flag=True, help="Go on where the same command was interrupted.")
@click.option(
    "--bundle",
    **options.out_folder,
    metavar="DIR",
    help="Keep evidence that 'ito-sde verify' checks.",
)
@click.option(
    "--peer",
    "peers",
    type=options.one_peer,
    multiple=True,
    help="Attack by another library as well; repeatable.",
)
@options.as_json
def command(
    chosen: options.DefenderOptions,
    asked: Asked,
    limit: int | None,
    precision: str,
    resume: bool,
    bundle: Path | None,
    peers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Attack a run's ensemble by a sequence of attacks, each on the images that the last ones left; or a network of
    yours.

    The original ResNet is attacked in the same way beside it. Every attack that has finished is kept in the run's
    folder (for a network of yours, in one with its name beside the runs) until the suite ends, so that --resume goes
    on after an interruption.

    \b
    ito-sde suite --norm linf --eps 8/255 --bundle evidence
    ito-sde suite --norm l2 --eps 0.5 --eps 1 --noise known --repeat 5
    ito-sde suite --model mymodels:make_net --data digits --norm linf --eps 0.1
    """
    radii = tuple(sorted({check_eps(asked.norm, text) for text in asked.radii})) or (0.0,)  # before torch is imported
    if resume and precision == "auto":  # a second trial may choose the other one, and would find nothing to go on with
        raise click.UsageError("With --resume name the precision that the suite began with: it said which.")
    chosen.check()

    from neuralsde_ito.attacks.other_libraries import check_peer
    from neuralsde_ito.attacks.suite_run import run_suite
    from neuralsde_ito.distributed import world
    from neuralsde_ito.files import write_atomically
    from neuralsde_ito.runs.build import load_dataset

    asked.settings(radii, 0)  # wrong settings are refused before the networks are read
    for peer in peers:
        check_peer(peer, asked.norm)
    opened, norm = chosen.defender(), asked.norm
    labels = opened.radii(norm, asked.radii, also=not asked.radii)
    seed = opened.config.seed if asked.seed is None else asked.seed
    data = load_dataset(opened.config, train_limit=1, test_limit=limit or opened.config.attack.images)
    options.check_folder(opened.folder)
    trial = opened.in_precision(precision, data)
    settings = replace(asked.settings(tuple(sorted(labels)), seed), precision=trial.precision)
    for text in labels.values():
        if bundle is not None:
            options.check_folder(bundle / output.radius_name(norm, text), new=True)

    begun, among, names = time.monotonic(), world(), names_of(opened)
    attacks = settings.attacks(opened.ensemble, len(among.share(data.test)), opened.resnet is not None)
    with output.progress(attacks, "suite", "attacks") as bar:

        def on_attack(defender: str, step: Step, result: SuiteResult) -> None:
            fooled = f"{sum(result.fooled)} fooled"
            bar.set_postfix_str(f"{names[defender]}, eps {labels[result.eps]}, {step.name}: {fooled}")
            bar.update()

        defenders = (opened.ensemble, opened.resnet)
        both = run_suite(*defenders, data.test, settings, opened.folder, resume, on_attack, among)
    seconds = time.monotonic() - begun
    if not among.first:
        return

    report = _report(both, settings, opened, data.name, labels, seconds)
    report["peers"] = [
        _peer_row(run, names[name], peer, eps, labels[eps], settings.batch_size)
        for (name, run), eps, peer in itertools.product(both.runs.items(), settings.radii, peers)
    ]
    record = opened.run.result_file("suite", norm)
    write_atomically(record, output.json_bytes(report))
    folders = [] if bundle is None else _save_bundles(bundle, both.ito, opened, report)
    both.discard_state()
    if as_json:
        output.print_json(report)
        return
    ensemble = opened.ensemble
    output.describe_defender(opened)
    _tables(both, report, names, trial)
    click.echo(f"\nRecord    {record}")
    own = opened.config.ensemble
    vote = f" --inferences {ensemble.inferences}" if ensemble.inferences != own.inferences else ""
    vote += f" --rule {ensemble.rule}" if ensemble.rule != own.rule else ""
    if opened.model:
        vote = f" --model {opened.model} --data {chosen.data}" + vote
    for folder in folders:
        click.echo(f"Evidence  {folder}    (check it: ito-sde verify {folder}{vote})")


# --- the record -----------------------------------------------------------------------------------------


def _report(
    both: SuiteComparison,
    settings: SuiteSettings,
    opened: options.Defender,
    data: str,
    labels: dict[float, str],
    seconds: float,
) -> dict[str, Any]:
    """All figures, ready for JSON; and the names, true labels and decided labels of the images, for paired tests."""
    from neuralsde_ito.attacks.fingerprints import fingerprint
    from neuralsde_ito.outcomes import Outcomes
    from neuralsde_ito.runs.run import environment

    ensemble, truth, names = opened.ensemble, both.ito.images.y, names_of(opened)
    said = asdict(settings)
    said["eps"] = said.pop("radii")
    return {
        "command": output.command_line(),
        **opened.about,
        "suite": "standard",
        **{key: said[key] for key in ("norm", "eps", "noise", "repeat", "effort", "seed", "batch_size", "precision")},
        "data": data,
        "images": len(truth),
        "index": both.ito.images.index.tolist(),
        "truth": truth.tolist(),
        "vote": opened.vote,
        "weights": fingerprint(ensemble),
        "seconds": round(seconds, 1),
        "environment": environment(),
        "clean": {
            names[name]: Outcomes.of(run.clean, truth).as_dict() | {"labels": run.clean.tolist()}
            for name, run in both.runs.items()
        },
        "attacked": [
            {
                "eps": eps,
                "written": labels[eps],
                **{name: _entry(run, level) for name, run in both.runs.items()},
                **({"paired": output.paired_json(both.paired(level), "resnet")} if both.resnet else {}),
            }
            for level, eps in enumerate(settings.radii)
        ],
        "invalid": {names[name]: run.invalid for name, run in both.runs.items()},
    }


def _entry(run: SuiteRun, level: int) -> dict[str, Any]:
    """One defender at one radius: what denial leaves, its labels, what evasion leaves, and what each attack did."""
    result = run.results[level]
    attacks = [
        {
            "name": step.name,
            "goal": goal,
            "through": step.through,
            "images": result.attacked[i],
            "fooled": result.fooled[i],
            "queries": result.queries[i],
            "gradients": result.gradients[i],
            "blind": result.blind[i],
        }
        for i, (goal, step) in enumerate(itertools.product(("denial", "evasion"), run.suite.steps(result.eps)))
    ]
    evasion = run.outcomes(level, "evasion").as_dict()
    noises = {
        noise: run.under(level, noise).as_dict()
        | {
            "evasion": run.under(level, noise, "evasion").as_dict(),
            "gradients": other.gradients,
            "queries": other.queries,
        }
        for noise, other in result.noises.items()
    }
    labels = result.denial.labels.tolist()
    return run.outcomes(level).as_dict() | {"labels": labels, "evasion": evasion, "steps": attacks, "noises": noises}


def _peer_row(run: SuiteRun, model: str, peer: str, eps: float, written: str, batch_size: int) -> dict[str, Any]:
    """Another library's attack on one defender at one radius, judged by the suite's report."""
    from neuralsde_ito.attacks.suite_run import peer_result

    begun = time.monotonic()
    result = peer_result(run, peer, eps, batch_size)
    return {
        "model": model,
        "eps": eps,
        "written": written,
        "peer": peer,
        "images": result.attacked,
        "queries": result.queries,
        "gradients": result.gradients,
        "seconds": round(time.monotonic() - begun, 1),
        **result.outcomes.as_dict(),
    }


def _save_bundles(folder: Path, run: SuiteRun, opened: options.Defender, report: dict[str, Any]) -> list[Path]:
    """One bundle of evidence for each radius; gives their folders."""
    from neuralsde_ito.audits.bundle import evidence_of, save_bundle

    from .verify import whole_test_split

    split, folders = whole_test_split(opened.config), []
    about = opened.about | {"data": {"name": report["data"]}}
    for level, entry in enumerate(report["attacked"]):
        folders.append(folder / output.radius_name(report["norm"], entry["written"]))
        save_bundle(folders[-1], evidence_of(run, split, level, report["command"], about))
    return folders


# --- the terminal ---------------------------------------------------------------------------------------


def _tables(both: SuiteComparison, report: dict[str, Any], names: dict[str, str], trial: PrecisionTrial) -> None:
    """The outcomes, then every attack, then other libraries, then what it all means."""
    _outcome_table(both, report, names)
    for name, run in both.runs.items():
        click.echo(f"\n{names[name]}, step by step\n")
        rows = []
        for level, entry in enumerate(report["attacked"]):
            block = _step_rows(run, level)
            rows += [[entry["written"] if i == 0 else "", *row] for i, row in enumerate(block)]
        headers = ["eps", "attack", "images", "fooled", "survivors", "gradients / image", "queries / image"]
        output.table(rows, headers)
    if report["peers"]:
        _peer_table(report)
    click.echo()
    _sentences(report, trial)


def _outcome_table(both: SuiteComparison, report: dict[str, Any], names: dict[str, str]) -> None:
    """The defenders on clean images and at every radius."""
    from neuralsde_ito.outcomes import Outcomes

    truth, norm = both.ito.images.y, report["norm"]
    images = f"{output.count(len(truth), 'test image')} of {report['data']}"
    click.echo(f"\n{images}, {norm}, eps in pixel units; % with 95 % Wilson intervals\n")
    rows: list[list[str]] = []
    for name, run in both.runs.items():
        clean = Outcomes.of(run.clean, truth)
        rows.append(["0" if name == "ito" else "", names[name], *output.worst_cells(clean, clean, name == "ito"), ""])
    for level, entry in enumerate(report["attacked"]):
        for name, run in both.runs.items():
            cells = output.worst_cells(run.outcomes(level), run.outcomes(level, "evasion"), name == "ito")
            written, p = (entry["written"], "") if name == "ito" else ("", output.p_value(entry["paired"]["p"]))
            rows.append([written, names[name], *cells, p])
            for noise in run.results[level].noises:
                cells = output.worst_cells(run.under(level, noise), run.under(level, noise, "evasion"), True)
                rows.append(["", f"{names[name]}, {noise} noise", *cells, ""])
    headers = ["eps", "model", *output.WORST_HEADERS, "paired"]
    if both.resnet is None:
        rows, headers = [row[:-1] for row in rows], headers[:-1]
    output.table(rows, headers)


def _step_rows(run: SuiteRun, level: int) -> list[list[str]]:
    """One defender at one radius: a row for each attack that had images to attack, and one for each goal's report."""
    from neuralsde_ito.outcomes import Rate

    result = run.results[level]
    steps, rows = run.suite.steps(result.eps), []
    for turn, (goal, counted) in enumerate((("denial", ("correct",)), ("evasion", ("correct", "abstained")))):
        for i, step in enumerate(steps, turn * len(steps)):
            if attacked := result.attacked[i]:
                name = f"evasion: {step.name}" if turn else step.name
                survivors = output.percent(Rate.of(result.survivors[i], len(run.images)))
                each = [f"{counts[i] / attacked:,.0f}" for counts in (result.gradients, result.queries)]
                rows.append([name, str(attacked), str(result.fooled[i]), survivors, *each])
        rate = output.percent(run.outcomes(level, goal).rate(*counted))
        rows.append([f"report, {goal}: {' + '.join(counted)}", "", "", rate, "", ""])
    return rows


def _peer_table(report: dict[str, Any]) -> None:
    """Other libraries' attacks."""
    from neuralsde_ito.outcomes import Rate

    click.echo("\nOther libraries, each on all images that were right, judged by the same report\n")
    rows = []
    for row in report["peers"]:
        counts, attacked = row["counts"], max(1, row["images"])
        cells = [output.percent(Rate.of(counts["correct"], counts["n"]))]
        cells += [f"{row[what] / attacked:,.0f}" for what in ("gradients", "queries")]
        rows.append([row["model"], row["written"], row["peer"], *cells, output.seconds(row["seconds"])])
    output.table(rows, ["model", "eps", "attack", "correct", "gradients / image", "queries / image", "time"])


def _sentences(report: dict[str, Any], trial: PrecisionTrial) -> None:
    """What the columns mean, what the attacks cost, and what to do next."""
    steps = [step for entry in report["attacked"] for name in NAMES if name in entry for step in entry[name]["steps"]]
    gradients, queries, blind = (sum(step[what] for step in steps) for what in ("gradients", "queries", "blind"))
    paths = {
        "fresh": "on fresh noise, which no attack and no selection saw",
        "fixed": "on one set of paths for all images, which no attack saw",
        "known": "on paths that the attacker knows",
    }[report["noise"]]
    votes = f", the worst of {report['repeat']} votes" if report["repeat"] > 1 else ""
    resnet = any("paired" in entry for entry in report["attacked"])
    paired = "Paired: McNemar's exact test, ResNet against ensemble, of correct (denial). " if resnet else ""
    known = [entry["ito"]["noises"]["known"]["gradients"] for entry in report["attacked"] if entry["ito"]["noises"]]
    output.worst_sentence()
    output.sentence(
        "Each attack runs on the images that are not yet denied, by votes on noise of the selection; the searches by "
        "PGD through the model also on those that are denied by fewer than 70 % of the votes. Images that are denied "
        "without a wrong answer are then attacked for evasion. Survivors: the images of a row that it did not "
        f"fool, in % of all images. Report: the decision on the best candidate of each image, {paths}{votes}. "
        f"Candidates, not labels, are carried to larger radii. {paired}{gradients:,} gradients and {queries:,} "
        f"queries in {report['seconds']:.0f} s."
    )
    if known:
        output.sentence(
            "Fixed noise: a vote on the same candidates along one set of paths for all images. Known noise: a short "
            "attack that knows the report's paths goes on from them, and the worse image counts; both goals share it "
            f"({sum(known):,} gradients more). Noise that protects only while nobody knows it is an assumption on the "
            "defender's generator."
        )
    if blind:
        output.sentence(
            f"In {blind:,} attacks on an image some gradient was not finite: that an image survives them is no sign of "
            "robustness."
        )
    output.invalid_sentence(
        sum(report["invalid"].values()), "Of the report's votes (one that decides several rows counts in each): "
    )
    output.precision_sentence(trial)
    output.sentence("An upper bound on robustness. Next: 'ito-sde audit' checks whether it can be trusted.")
