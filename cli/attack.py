"""``ito-sde attack``: the ensemble and the ResNet it came from, under FGSM or PGD, side by side."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from neuralsde_ito.validation import check_eps, parse_eps

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.attacks import PGD
    from neuralsde_ito.attacks.precision import PrecisionTrial
    from neuralsde_ito.attacks.sweep import Sweep


@dataclass(frozen=True)
class Asked:
    """The options that set up the attack, as the user gave them; None for the preset's value."""

    norm: Literal["linf", "l2", "l1"]
    radii: tuple[str, ...]
    preset: str
    steps: int | None
    step_size: str | None
    eot: int | None
    restarts: int | None
    objective: str | None
    random_start: bool | None

    def template(self) -> PGD:
        """The attack, but for its radius."""
        from neuralsde_ito.attacks import PRESETS

        step_size = None if self.step_size is None else parse_eps(self.step_size)
        typed = {
            "steps": self.steps,
            "step_size": step_size,
            "eot": self.eot,
            "restarts": self.restarts,
            "objective": self.objective,
            "random_start": self.random_start,
        }
        settings: dict[str, Any] = {name: value for name, value in typed.items() if value is not None}
        if step_size is not None:
            settings["decay"] = False  # whoever names a length means every step
        return replace(PRESETS[self.preset], norm=self.norm, eps=0.0, **settings)

    def at(self, eps: float) -> PGD:
        """The attack at one radius; FGSM's only step is as long as the radius."""
        template = self.template()
        fgsm = self.preset == "fgsm" and template.step_size is None and eps > 0
        return replace(template, eps=eps, step_size=eps if fgsm else template.step_size)


@click.command("attack")
@options.defender
@options.gathered(
    "asked",
    Asked,
    options.norm,
    click.option(
        "--eps",
        "radii",
        multiple=True,
        help="Radius in pixel units, 8/255 or 0.03; repeatable. The run's attack.also are added.  [default: the run's]",
    ),
    click.option(
        "--preset",
        type=options.one_preset,
        default="default",
        show_default=True,
        help="madry20: the setting of the tables that the paper quotes.",
    ),
    click.option("--steps", type=int, help="Iterations."),
    click.option(
        "--step-size",
        help="Length of every iteration in pixel units.  [default: ever shorter, 5 eps / steps on average; "
        "with madry20 2.5 eps / steps]",
    ),
    click.option("--eot", type=int, help="Paths that a gradient averages."),
    click.option("--restarts", type=int, help="Attempts, each from a random start."),
    click.option("--objective", type=options.one_objective, help="What the attack raises.  [default: mean-loss]"),
    click.option("--random-start/--no-random-start", default=None, help="Begin at a random point of the ball."),
)
@options.precision
@click.option(
    "--surrogate",
    "surrogates",
    type=options.one_surrogate,
    multiple=True,
    help="Network whose gradients are taken; repeatable.  [default: all]",
)
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
    chosen: options.DefenderOptions,
    asked: Asked,
    precision: str,
    surrogates: tuple[str, ...],
    limit: int | None,
    seed: int | None,
    batch_size: int,
    save: Path | None,
    as_json: bool,
) -> None:
    """Attack a run's ensemble by FGSM or PGD, and the original ResNet beside it; or a network of yours.

    Gradients go through the solver exactly as it stepped. The strongest row is the result. What is written goes into
    the run's folder; for a network of yours, into one with its name beside the runs.

    \b
    ito-sde attack --norm linf --eps 8/255
    ito-sde attack --norm l2 --eps 0.25 --eps 0.5 --restarts 3
    ito-sde attack --model mymodels:make_net --data digits --norm linf --eps 0.1
    ito-sde suite --norm linf --eps 8/255 --bundle evidence     (the strongest attack)
    """
    radii = [check_eps(asked.norm, text) for text in asked.radii]  # before torch is imported
    chosen.check()

    from neuralsde_ito.attacks.sweep import SURROGATES, attack_sweep
    from neuralsde_ito.distributed import world
    from neuralsde_ito.files import write_atomically
    from neuralsde_ito.runs.build import load_dataset

    asked.template()
    for eps in radii:  # wrong settings are refused before the networks are read
        asked.at(eps)
    opened, norm = chosen.defender(), asked.norm
    labels = opened.radii(norm, asked.radii)
    names = surrogates or (SURROGATES if opened.resnet else SURROGATES[:1])
    images = load_dataset(opened.config, train_limit=1, test_limit=limit or opened.config.attack.images)
    seed = opened.config.seed if seed is None else seed
    options.check_folder(opened.folder)
    trial = opened.in_precision(precision, images)
    attacks = [replace(asked.at(eps), precision=trial.precision) for eps in labels]
    if save is not None:
        for text in labels.values():
            options.check_file(save / f"{output.radius_name(norm, text)}.safetensors")

    among = world()
    batches = -(-len(among.share(images.test)) // batch_size)
    begun = time.monotonic()
    with output.progress(batches * len(attacks) * len(names), "attack", "runs") as bar:
        defenders = (opened.ensemble, opened.resnet)
        sweep = attack_sweep(*defenders, images.test, attacks, names, seed, batch_size, bar.update, among)
    seconds = time.monotonic() - begun
    if not among.first:
        return

    report = _report(sweep, attacks, labels, opened, images.name, seed, seconds)
    record = opened.run.result_file("attack", norm)
    write_atomically(record, output.json_bytes(report))
    from .pictures import attack_picture

    attack_picture(record.with_suffix(".png"), sweep, labels, norm, images)
    if save is not None:
        _save(save, sweep, report)
    if as_json:
        output.print_json(report)
        return
    output.describe_defender(opened)
    _table(sweep, attacks[0], labels, images.name)
    click.echo()
    _sentences(sweep, attacks, seconds, trial)
    click.echo(f"\nPicture   {record.with_suffix('.png')}")
    click.echo(f"Record    {record}")
    if save is not None:
        click.echo(f"Images    {save}")


def _table(sweep: Sweep, attack: PGD, labels: dict[float, str], data: str) -> None:
    """A row for each surrogate at each radius, and the strongest of each radius."""
    from neuralsde_ito.outcomes import Outcomes, Paired, Rate

    images = f"{output.count(len(sweep.truth), 'test image')} of {data}"
    click.echo(f"\n{images}, {attack.norm}, eps in pixel units; % with 95 % Wilson intervals\n")
    both, truth = bool(sweep.resnet), sweep.truth  # whether there is a ResNet
    clean = {name: Outcomes.of(decided, truth) for name, decided in sweep.clean.items()}
    first = output.percent(clean["resnet"].rate("correct")) if both else ""
    rows = [["0", "(clean)", first, *output.outcome_cells(clean["ito"]), ""]]
    for level, eps in enumerate(sweep.eps):
        for name, decided in sweep.labels[level].items():
            rows.append(["", name, "", *output.outcome_cells(Outcomes.of(decided, truth)), ""])
        denial, evasion = (Outcomes.of(case[level].labels, truth) for case in (sweep.denial, sweep.evasion))
        rates = (
            denial.rate("correct"),
            evasion.rate("wrong"),
            denial.rate("abstained"),
            evasion.rate("correct", "abstained"),
        )
        first = last = ""
        if both:
            resnet = sweep.worst_resnet(level) == truth
            first = output.percent(Rate.of(int(resnet.sum()), len(truth)))
            last = output.p_value(Paired.of(resnet, sweep.worst(level) == truth).p)
        rows.append(["", "strongest", first, *map(output.percent, rates), last])
        rows[-1 - len(sweep.labels[level])][0] = labels[eps]
    headers = ["eps", "gradient through", "ResNet correct"]
    headers += ["Itô correct", "Itô wrong", "Itô abstained", "Itô correct + abst.", "paired"]
    if not both:
        rows = [[*row[:2], *row[3:-1]] for row in rows]
        headers = ["eps", "gradient through", "correct", "wrong", "abstained", "correct + abst."]
    output.table(rows, headers)


def _sentences(sweep: Sweep, attacks: list[PGD], seconds: float, trial: PrecisionTrial) -> None:
    """What was done, what it cost, and what the columns mean."""
    first = attacks[0]
    start = "a random start" if first.random_start else "the image itself"
    length = f"{first.step_size:g}" if first.step_size and len({a.step for a in attacks}) == 1 else "eps"
    length = f"{5 if first.decay else 2.5:g} eps / {first.steps}" if first.step_size is None else length
    length += " on average, which shrink to nothing," if first.decay else ""
    costs = [*(cost for level in sweep.cost for cost in level.values()), *sweep.evasion_cost]
    gradients = output.count(sum(cost.gradients for cost in costs), "gradient")
    beside = f" for the ensemble and {sum(cost.gradients for cost in sweep.resnet_cost):,} for the ResNet"
    output.sentence(
        f"Attack: {output.count(first.steps, 'step')} of {length} from {start}, "
        f"{output.count(first.restarts, 'restart')}, {output.count(first.eot, 'path')} a gradient, objective "
        f"{first.objective}, {first.keep} iterate; {gradients}{beside if sweep.resnet else ''} in {seconds:.0f} s. "
        "Votes are on paths that no attack saw."
    )
    resnet, paired = "", ""
    if sweep.resnet:
        resnet = (
            f"The ResNet gets as much: {len(sweep.labels[0])} x {first.restarts} attempts of the attack on itself, and "
            "the images of all rows. "
        )
        paired = " Paired: McNemar's exact test, ResNet against ensemble, of correct in their strongest rows."
    output.sentence(
        "Strongest: for each image the worst case over all rows up to this eps. Votes of their own choose it, then the "
        "report votes on it once. Correct and abstained are those under denial, where the attack wants no right "
        "answer; wrong and correct + abst. are those under evasion, where it wants a wrong answer and goes on through "
        f"all surrogates while the model abstains. {resnet}This is an upper bound on robustness: a stronger attack may "
        f"leave less.{paired}"
    )
    output.invalid_sentence(sweep.invalid)
    output.precision_sentence(trial)
    output.sentence(
        "Next: 'ito-sde suite' attacks more strongly; 'ito-sde audit' checks whether figures can be trusted."
    )


def _report(
    sweep: Sweep,
    attacks: list[PGD],
    labels: dict[float, str],
    opened: options.Defender,
    data: str,
    seed: int,
    seconds: float,
) -> dict[str, Any]:
    """All figures, ready for JSON."""
    from neuralsde_ito.outcomes import Outcomes, Paired
    from neuralsde_ito.runs.run import environment

    truth, levels = sweep.truth, []
    for level, eps in enumerate(sweep.eps):
        evasion = Outcomes.of(sweep.evasion[level].labels, truth).as_dict() | asdict(sweep.evasion_cost[level])
        entry: dict[str, Any] = {
            "eps": eps,
            "written": labels[eps],
            "attack": asdict(attacks[level]) | {"step_size": attacks[level].step},
        }
        if sweep.resnet:
            entry["resnet"] = Outcomes.of(sweep.worst_resnet(level), truth).as_dict() | asdict(sweep.resnet_cost[level])
        entry["ito"] = Outcomes.of(sweep.worst(level), truth).as_dict() | {"evasion": evasion}
        if sweep.resnet:
            paired = Paired.of(sweep.worst_resnet(level) == truth, sweep.worst(level) == truth)
            entry["paired"] = output.paired_json(paired, "resnet")
        entry["through"] = {
            name: Outcomes.of(decided, truth).as_dict() | asdict(sweep.cost[level][name])
            for name, decided in sweep.labels[level].items()
        }
        levels.append(entry)
    clean = {name: Outcomes.of(decided, truth).as_dict() for name, decided in sweep.clean.items()}
    return {
        "command": output.command_line(),
        **opened.about,
        "data": data,
        "seed": seed,
        "device": str(opened.device),
        "seconds": round(seconds, 1),
        "vote": opened.vote,
        **opened.about_config,
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
