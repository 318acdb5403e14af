"""What the verbs write: tables, sentences and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tabulate import tabulate
from tqdm import tqdm

from neuralsde_ito.sde.schedules import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from neuralsde_ito.attacks.precision import PrecisionTrial
    from neuralsde_ito.outcomes import Outcomes, Paired, Rate
    from neuralsde_ito.runs.config import Config
    from neuralsde_ito.runs.evaluate import Evaluation

    from .options import Defender


def progress(total: int, what: str, unit: str) -> tqdm:
    """A bar on stderr if that is a terminal, else nothing."""
    return tqdm(total=total, desc=what, unit=f" {unit}", leave=False, disable=None)


def command_line() -> str:
    """The command as it was typed, for the record beside a result; bytes that are not UTF-8 are escaped."""
    return " ".join(["ito-sde", *sys.argv[1:]]).encode(errors="backslashreplace").decode()


def radius_name(norm: str, written: str) -> str:
    """The name of a file or folder with the results of one radius: ``linf-8of255``.

    Args:
        norm: ``linf`` or ``l2``.
        written: the radius as it was typed, such as ``8/255``.
    """
    return f"{norm}-{written.strip().replace('/', 'of')}"


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> None:
    """An aligned table on stdout."""
    click.echo(tabulate(rows, headers, tablefmt="simple", disable_numparse=True, stralign="left"))


def sentence(text: str) -> None:
    """A paragraph on stdout, at most 110 columns wide."""
    click.echo(textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False))


def count(n: int, what: str) -> str:
    """``1 member``, ``2 members``."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def percent(rate: Rate) -> str:
    """``97.2 [95.3, 98.3]``, in per cent with the 95 % interval."""
    return f"{100 * rate.value:5.1f} [{100 * rate.low:4.1f}, {100 * rate.high:5.1f}]"


def outcome_cells(outcomes: Outcomes, abstains: bool = True) -> list[str]:
    """Correct, wrong, abstained, correct + abstained; a dash for a network that cannot abstain."""
    return [
        percent(outcomes.rate("correct")),
        percent(outcomes.rate("wrong")),
        percent(outcomes.rate("abstained")) if abstains else "    -",
        percent(outcomes.rate("correct", "abstained")),
    ]


WORST_HEADERS = ["correct (denial)", "abstained (denial)", "wrong (evasion)", "correct + abst. (evasion)"]


def worst_cells(denial: Outcomes, evasion: Outcomes, abstains: bool = True) -> list[str]:
    """The cells under `WORST_HEADERS` for the two worst cases; a dash for a network that cannot abstain."""
    return [
        percent(denial.rate("correct")),
        percent(denial.rate("abstained")) if abstains else "    -",
        percent(evasion.rate("wrong")),
        percent(evasion.rate("correct", "abstained")),
    ]


def worst_sentence() -> None:
    """Print what the columns of `WORST_HEADERS` mean."""
    sentence(
        "Two worst cases. Denial: the attack wants no right answer; correct is what it leaves, abstained what it "
        "brings to no answer. Evasion: it wants a wrong answer; wrong is what it reaches, correct + abstained the rest."
    )


def invalid_sentence(invalid: int, before: str = "") -> None:
    """Print how many inferences were invalid and cast no vote; nothing if all are valid."""
    if invalid:
        sentence(f"{before}{count(invalid, 'inference')} had logits that are not finite and voted for nobody.")


def precision_sentence(trial: PrecisionTrial) -> None:
    """Print in which precision gradients were taken, and why; nothing where it is the default and nobody asked."""
    if trial.why or trial.precision != "float32":
        why = f" {trial.why}" if trial.why else ""
        sentence(f"Gradients were taken in {trial.precision}, decisions in float32.{why}")


def seconds(value: float) -> str:
    """A time with three digits: ``12.3 ms`` or ``4.56 s``."""
    return f"{1e3 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def p_value(p: float) -> str:
    """``p = 0.04``, with two digits."""
    # No-break spaces, so that no line breaks after "p =".
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.2g}"


def paired_sentence(paired: Paired, other: str) -> None:
    """Print the paired test of another model against the ensemble."""
    sentence(
        f"On the same images (McNemar's exact test): only {other} is right on {paired.only_first}, "
        f"only the ensemble on {paired.only_second}; {p_value(paired.p)}."
    )


def paired_json(paired: Paired, other: str) -> dict[str, Any]:
    """The content of `paired_sentence` for ``--json``."""
    return {f"only_{other}": paired.only_first, "only_ito": paired.only_second, "p": paired.p}


def describe(config: Config, folder: Path, members: int, inferences: int, rule: str) -> None:
    """Print the run as `describe_networks` does, and its vote."""
    describe_networks(config, folder)
    vote = f"{count(members, 'member')} x {count(inferences, 'inference')}"
    click.echo(f"Ensemble  {vote}, {rule} majority, else it abstains")


def describe_networks(config: Config, folder: Path) -> None:
    """Print the run, its ResNet, its SDE, and noise of the image if there is any, a line each."""
    sde = config.sde
    formula = Schedule(sde.omega, sde.schedule).formula
    source = (
        f"weights {config.network.weights}"
        if config.network.weights
        else f"trained {count(config.resnet.epochs, 'epoch')}"
    )
    horizon = f"time 0..{sde.horizon:g}" if sde.horizon else "one unit of time a block"
    steps = f"{count(sde.steps, 'step')} a block"
    click.echo(f"Run       {folder}")
    click.echo(f"ResNet    {config.network.arch}, {source}")
    click.echo(f"SDE       dx = (B(x) - x) dt + {formula} dB, {horizon}; solver {sde.solver}, {steps}")
    if sde.input_sigma:
        click.echo(
            f"Image     x + {sde.input_sigma:g} W before the stem, W standard normal (sde.input_sigma, in pixel units)"
        )


def describe_defender(defender: Defender) -> None:
    """Print what was attacked or evaluated: a run as `describe` does, or the user's network and the vote over it."""
    vote, ensemble = defender.vote, defender.ensemble
    if defender.model is None:
        describe(defender.config, defender.folder, *vote.values())
        return
    describe_model(defender)
    if not ensemble.noisy:
        click.echo("Vote      none: it answers every image in one way")
        return
    many = f"{count(vote['members'], 'member')} x " if vote["members"] > 1 else ""
    inferences = f"{many}{count(vote['inferences'], 'inference')}"
    click.echo(f"Vote      it is random, so a vote was laid over it: {inferences} an image; more than half decide")
    for remark in getattr(ensemble, "remarks", ()):
        sentence(f"Noise     {remark}")


def describe_model(defender: Defender) -> None:
    """Print the user's network and its modes."""
    parts = [module for module in defender.ensemble.members.modules() if not list(module.children())]
    training = sorted({type(module).__name__ for module in parts if module.training})
    mode = f"in eval mode but for {', '.join(training)}" if training else "in eval mode"
    click.echo(f"Model     {defender.model}(), {'in train mode' if all(m.training for m in parts) else mode}")


def evaluation_table(
    result: Evaluation, data: str, untrained: Evaluation | None = None, paired: Paired | None = None
) -> None:
    """Print the clean table of ``ito-sde train`` and ``ito-sde evaluate``.

    Args:
        result: the ensemble beside the ResNet; a stranger's model has none.
        data: name of the data set.
        untrained: the recast ResNet before its fine-tuning, for a row of its own.
        paired: the untrained recast against the ensemble.
    """
    click.echo(f"\n{count(result.ito.n, 'test image')} of {data}, clean; % with 95 % Wilson intervals\n")
    rows = [["original ResNet", *outcome_cells(result.resnet, abstains=False)]] if result.resnet else []
    if untrained:
        rows.append(["recast, not fine-tuned", *outcome_cells(untrained.ito)])
    rows.append(["Itô ensemble" if result.resnet else "model", *outcome_cells(result.ito)])
    table(rows, ["model", "correct", "incorrect", "abstained", "correct + abstained"])
    click.echo()
    if result.paired:
        paired_sentence(result.paired, "the ResNet")
    if paired:
        paired_sentence(paired, "the recast before fine-tuning")
    invalid_sentence(int(result.invalid.sum()))
    if untrained:
        invalid_sentence(int(untrained.invalid.sum()), "Before fine-tuning: ")


def drawn_sentence(drawn: Tensor, total: int, confidence: float | None) -> None:
    """Print what the votes cost and, if a probability ended them, under which assumptions.

    Args:
        drawn: ``(N,)``, inferences that were made for each image.
        total: inferences of a full vote.
        confidence: the probability that ended a vote, or None.
    """
    mean = float(drawn.double().mean())
    if confidence is None:
        what = "Each vote ended when no inference still out could have changed its label." if mean < total else ""
    else:
        what = (
            f"Each vote ended when its label was that of the full vote with probability {confidence:g}, if inferences "
            "are exchangeable and, before the first, every share of the leading class equally likely."
        )
    sentence(f"Inferences: {mean:.1f} an image on average, {total} in a full vote. {what}".strip())


def evaluation_json(result: Evaluation) -> dict[str, Any]:
    """The content of `evaluation_table` for ``--json``."""
    resnet = {"resnet": result.resnet.as_dict()} if result.resnet else {}
    return {
        **resnet,
        "ito": result.ito.as_dict(),
        **({"paired": paired_json(result.paired, "resnet")} if result.paired else {}),
        "inferences_per_image": float(result.drawn.double().mean()),
        "invalid_inferences": int(result.invalid.sum()),
    }


def json_bytes(content: dict[str, Any]) -> bytes:
    """One JSON object in UTF-8, each list of whole numbers on one line. JSON has no NaN and no infinity: they become
    null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    # In JSON a line ends between values only, never in a string.
    text = re.sub(r"\[\n\s*(-?\d+(?:,\s*-?\d+)*)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    return text.encode(errors="backslashreplace")  # a file name may hold bytes that are not UTF-8


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout, in UTF-8 whatever the terminal's encoding is."""
    click.echo(json_bytes(content))
