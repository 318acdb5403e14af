"""``ito-sde attack``: the ensemble and the ResNet it came from, under FGSM or PGD, side by side."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.attacks import PGD
    from neuralsde_ito.attacks.sweep import Sweep


@click.command("attack")
@options.on_run
@click.option("--norm", default="linf", show_default=True, help="linf or l2.")
@click.option(
    "--eps",
    "radii",
    multiple=True,
    help="Radius in pixel units, 8/255 or 0.03; repeatable.  [default: the run's]",
)
@click.option(
    "--preset",
    default="default",
    show_default=True,
    help="default, madry20 (the tables the paper quotes) or fgsm.",
)
@click.option("--steps", type=int, help="Iterations.")
@click.option("--step-size", help="Length of an iteration in pixel units.  [default: 2.5 eps / steps]")
@click.option("--eot", type=int, help="Paths that a gradient averages.")
@click.option("--restarts", type=int, help="Attempts, each from a random start.")
@click.option("--objective", help=f"{', '.join(options.OBJECTIVES)}.  [default: mean-loss]")
@click.option("--random-start/--no-random-start", default=None, help="Begin at a random point of the ball.")
@click.option(
    "--surrogate",
    "surrogates",
    multiple=True,
    help="ensemble, member, noise-free or resnet; repeatable.  [default: all]",
)
@click.option(
    "--suite", type=click.Choice(["standard"]), help="A sequence of attacks, each on what the last ones left."
)
@click.option("--noise", default="fresh", show_default=True, help="With --suite: fresh, fixed or known paths.")
@click.option("--repeat", default=1, show_default=True, help="With --suite: votes that the attacker may ask for.")
@click.option("--effort", default=1.0, show_default=True, help="With --suite: scales the iterations.")
@click.option("--resume", is_flag=True, help="With --suite: go on where the same command was interrupted.")
@click.option(
    "--bundle",
    **options.out_folder,
    metavar="DIR",
    help="With --suite: keep evidence that 'ito-sde verify' checks.",
)
@click.option(
    "--peer", "peers", multiple=True, help="With --suite: also foolbox, torchattacks or autoattack.  [repeatable]"
)
@options.votes
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="Attack N test images, a fixed choice.  [default: the run's]",
)
@options.seed
@options.batch_size
@click.option(
    "--save",
    **options.out_folder,
    metavar="DIR",
    help="Keep the adversarial images.",
)
@options.as_json
def command(
    run: str | None,
    root: Path,
    device: str,
    norm: str,
    radii: tuple[str, ...],
    preset: str,
    surrogates: tuple[str, ...],
    suite: str | None,
    noise: str,
    repeat: int,
    effort: float,
    resume: bool,
    bundle: Path | None,
    peers: tuple[str, ...],
    inferences: int | None,
    rule: str | None,
    limit: int | None,
    seed: int | None,
    batch_size: int,
    save: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Attack a run's ensemble by FGSM or PGD, and the original ResNet beside it.

    Gradients go through the solver exactly as it stepped. The strongest row is the result.

    \b
    ito-sde attack --norm linf --eps 8/255
    ito-sde attack --norm l2 --eps 0.25 --eps 0.5 --restarts 3
    ito-sde attack --suite standard --norm linf --eps 8/255 --bundle evidence
    """
    if suite:
        options.without_effect({*settings, "preset", "surrogates", "save"}, "With --suite")
    else:
        suites = ("noise", "repeat", "effort", "resume", "bundle", "peers")
        options.without_effect(suites, "Without --suite", "add --suite standard, or leave it out")

    from neuralsde_ito.attacks import BALLS, PRESETS, parse_eps
    from neuralsde_ito.attacks.other_libraries import check_peer
    from neuralsde_ito.attacks.suite import standard
    from neuralsde_ito.attacks.sweep import SURROGATES, attack_sweep, surrogate_models
    from neuralsde_ito.files import write_atomically
    from neuralsde_ito.runs.run import load_dataset
    from neuralsde_ito.validation import ItoError, nearest

    if norm not in BALLS:
        raise ItoError(nearest("norm", norm, BALLS))
    if preset not in PRESETS:
        raise ItoError(nearest("preset", preset, PRESETS))
    if settings["step_size"] is not None:
        settings["step_size"] = parse_eps(settings["step_size"])
    chosen = {key: value for key, value in settings.items() if value is not None}
    template = replace(PRESETS[preset], norm=norm, eps=0.0, **chosen)
    named = {parse_eps(text): text for text in radii}
    [replace(template, eps=eps) for eps in named]  # refuse a wrong radius before the run is read
    for peer in peers:
        check_peer(peer)
    if suite:
        standard(norm, 0.0, True, effort)  # refuse a wrong effort
    opened = options.open_run(root, run, device, inferences, rule)
    defaults = opened.config.attack
    wanted = [*(radii or defaults.eps.get(norm, ())), *(() if suite and radii else defaults.also.get(norm, ()))]  # type: ignore[call-overload]
    labels = {parse_eps(text): text for text in reversed(wanted)}
    attacks = [_at(template, eps, preset) for eps in sorted(labels)]
    names = surrogates or SURROGATES
    surrogate_models(opened.ensemble, opened.resnet, names)
    images = load_dataset(opened.config, train_limit=1, test_limit=limit or defaults.images)
    seed = opened.config.seed if seed is None else seed
    options.check_folder(opened.folder)
    for text in labels.values():
        if bundle is not None:
            options.check_folder(bundle / output.radius_name(norm, text), new=True)
        if save is not None:
            options.check_file(save / f"{output.radius_name(norm, text)}.safetensors")
    if suite:
        from .suite import run as run_suite

        run_suite(opened, images, norm, labels, noise, repeat, effort, seed, batch_size, resume, bundle, peers, as_json)
        return

    batches = -(-len(images.test) // batch_size)
    begun = time.monotonic()
    with output.progress(batches * len(attacks) * len(names), "attack", "runs") as bar:
        sweep = attack_sweep(opened.ensemble, opened.resnet, images.test, attacks, names, seed, batch_size, bar.update)
    seconds = time.monotonic() - begun

    report = _report(sweep, attacks, labels, opened, images.name, seed, seconds)
    stem = opened.folder / f"attack-{norm}-{datetime.now():%Y%m%d-%H%M%S}"
    write_atomically(stem.with_suffix(".json"), output.json_bytes(report))
    from .pictures import attack_picture

    attack_picture(stem.with_suffix(".png"), sweep, labels, norm, images)
    if save is not None:
        _save(save, sweep, report)
    if as_json:
        output.print_json(report)
        return
    ensemble = opened.ensemble
    output.describe(opened.config, opened.folder, len(ensemble.members), ensemble.inferences, ensemble.rule)
    _tables(sweep, attacks, labels, images.name, seconds)
    click.echo(f"\nPicture   {stem.with_suffix('.png')}")
    click.echo(f"Record    {stem.with_suffix('.json')}")
    if save is not None:
        click.echo(f"Images    {save}")


def _at(template: PGD, eps: float, preset: str) -> PGD:
    """The attack at one radius; FGSM's only step is as long as the radius."""
    fgsm = preset == "fgsm" and template.step_size is None and eps > 0
    return replace(template, eps=eps, step_size=eps if fgsm else template.step_size)


def _tables(sweep: Sweep, attacks: list[PGD], labels: dict[float, str], data: str, seconds: float) -> None:
    from neuralsde_ito.outcomes import Outcomes, Paired

    first = attacks[0]
    start = "a random start" if first.random_start else "the image itself"
    length = f"{first.step_size:g}" if first.step_size and len({a.step for a in attacks}) == 1 else "eps"
    length = f"2.5 eps / {first.steps}" if first.step_size is None else length
    images_of = f"{output.count(len(sweep.truth), 'test image')} of {data}"
    click.echo(f"\n{images_of}, {first.norm}, eps in pixel units; % with 95 % Wilson intervals\n")
    rows: list[list[str]] = []
    clean = [Outcomes.of(sweep.clean[name], sweep.truth) for name in ("resnet", "ito")]
    rows.append(["0", "(clean)", output.percent(clean[0].rate("correct")), *output.outcome_cells(clean[1]), ""])
    for level, eps in enumerate(sweep.eps):
        for name, found in sweep.labels[level].items():
            rows.append(["", name, "", *output.outcome_cells(Outcomes.of(found, sweep.truth)), ""])
        base, ito = sweep.worst_resnet(level), sweep.worst(level)
        paired = Paired.of(base == sweep.truth, ito == sweep.truth)
        own = output.percent(Outcomes.of(base, sweep.truth).rate("correct"))
        denial, evasion = (Outcomes.of(case[level].labels, sweep.truth) for case in (sweep.denial, sweep.evasion))
        cells = [
            output.percent(rate)
            for rate in (
                denial.rate("correct"),
                evasion.rate("wrong"),
                denial.rate("abstained"),
                evasion.rate("correct", "abstained"),
            )
        ]
        rows.append(["", "strongest", own, *cells, output.p_value(paired.p)])
        rows[-1 - len(sweep.labels[level])][0] = labels[eps]
    headers = [
        "eps",
        "gradient through",
        "ResNet correct",
        "Itô correct",
        "Itô wrong",
        "Itô abstained",
        "Itô correct + abst.",
        "paired",
    ]
    output.table(rows, headers)
    costs = [*(cost for level in sweep.cost for cost in level.values()), *sweep.evasion_cost]
    gradients, spent = sum(cost[0] for cost in costs), sum(cost[0] for cost in sweep.resnet_cost)
    click.echo()
    output.sentence(
        f"Attack: {output.count(first.steps, 'step')} of {length} from {start}, "
        f"{output.count(first.restarts, 'restart')}, {output.count(first.eot, 'path')} a gradient, objective "
        f"{first.objective}, {first.keep} iterate; {output.count(gradients, 'gradient')} for the ensemble and "
        f"{spent:,} for the ResNet in {seconds:.0f} s. Votes are on paths that no attack saw."
    )
    output.sentence(
        "Strongest: per image the worst case over all rows up to this eps, chosen by votes of their own, then voted on "
        "once. Its correct and abstained: where the attack wants no right answer (denial); its wrong and correct + "
        "abst.: where it wants a wrong one (evasion), for which it goes on through all sources while the ensemble "
        f"abstains. The ResNet meets as much: {len(sweep.labels[0])} x {first.restarts} attempts of the attack on "
        "itself, and the images of all rows. This is an upper bound on robustness: a stronger attack may leave less. "
        "'paired': McNemar's exact test, ResNet against ensemble, of correct in their strongest rows."
    )
    output.invalid_sentence(sweep.invalid)


def _report(
    sweep: Sweep,
    attacks: list[PGD],
    labels: dict[float, str],
    opened: options.Opened,
    data: str,
    seed: int,
    seconds: float,
) -> dict[str, Any]:
    from neuralsde_ito.outcomes import Outcomes, Paired
    from neuralsde_ito.runs.run import command_line, environment

    levels = []
    for level, eps in enumerate(sweep.eps):
        base, ito = sweep.worst_resnet(level), sweep.worst(level)
        paired = Paired.of(base == sweep.truth, ito == sweep.truth)
        levels.append(
            {
                "eps": eps,
                "written": labels[eps],
                "attack": asdict(attacks[level]) | {"step_size": attacks[level].step},
                "resnet": Outcomes.of(base, sweep.truth).as_dict()
                | {"gradients": sweep.resnet_cost[level][0], "queries": sweep.resnet_cost[level][1]},
                "ito": Outcomes.of(ito, sweep.truth).as_dict()
                | {
                    "evasion": Outcomes.of(sweep.evasion[level].labels, sweep.truth).as_dict()
                    | {"gradients": sweep.evasion_cost[level][0], "queries": sweep.evasion_cost[level][1]},
                },
                "paired": output.paired_json(paired, "resnet"),
                "through": {
                    name: Outcomes.of(found, sweep.truth).as_dict()
                    | {"gradients": sweep.cost[level][name][0], "queries": sweep.cost[level][name][1]}
                    for name, found in sweep.labels[level].items()
                },
            }
        )
    clean = {name: Outcomes.of(found, sweep.truth).as_dict() for name, found in sweep.clean.items()}
    ensemble = opened.ensemble
    return {
        "command": command_line(),
        "run": str(opened.folder),
        "data": data,
        "seed": seed,
        "device": str(opened.device),
        "seconds": round(seconds, 1),
        "vote": {"members": len(ensemble.members), "inferences": ensemble.inferences, "rule": ensemble.rule},
        "config": opened.config.model_dump(mode="json"),
        "environment": environment(),
        "clean": clean,
        "attacked": levels,
        "invalid": sweep.invalid,
    }


def _save(folder: Path, sweep: Sweep, report: dict[str, Any]) -> None:
    """One safetensors file a radius: ``index``, ``truth``, the images by surrogate and by worst case, in [0, 1]."""
    from safetensors.torch import save as safetensors_bytes

    from neuralsde_ito.files import write_atomically

    for level, entry in enumerate(report["attacked"]):
        tensors = {name: images.contiguous() for name, images in sweep.images[level].items()}
        tensors |= {"denial": sweep.denial[level].images, "evasion": sweep.evasion[level].images}
        tensors |= {"index": sweep.index, "truth": sweep.truth}
        name = f"{output.radius_name(entry['attack']['norm'], entry['written'])}.safetensors"
        about = {"command": report["command"], "attack": json.dumps(entry["attack"]), "data": report["data"]}
        write_atomically(folder / name, safetensors_bytes(tensors, metadata=about))
