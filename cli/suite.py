"""``ito-sde attack --suite standard``: attack after attack on what the last ones left, ensemble and ResNet alike."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options, output

if TYPE_CHECKING:
    from torch import Tensor

    from neuralsde_ito.attacks.suite import Step, SuiteResult
    from neuralsde_ito.data import Dataset
    from neuralsde_ito.models.ensemble import ItoEnsemble


def run(
    opened: options.Opened,
    data: Dataset,
    norm: str,
    labels: dict[float, str],
    noise: str,
    repeat: int,
    effort: float,
    seed: int,
    batch_size: int,
    resume: bool,
    bundle: Path | None,
    peers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Attack the ensemble and the ResNet at every radius, and print what is left after each step."""
    import torch

    from neuralsde_ito.attacks.selection import invalid, worst_labels
    from neuralsde_ito.attacks.suite import Suite, joined, standard
    from neuralsde_ito.audits.bundle import evidence_of, fingerprint, save_bundle
    from neuralsde_ito.files import write_atomically
    from neuralsde_ito.models.ensemble import ItoEnsemble, NoiseFree
    from neuralsde_ito.models.recast import recast
    from neuralsde_ito.outcomes import Outcomes, Paired
    from neuralsde_ito.runs.run import command_line, environment
    from neuralsde_ito.validation import ItoError

    from .verify import test_split

    ensemble, radii = opened.ensemble, sorted(labels)
    batches = list(data.test.batches(batch_size, opened.device))
    resnet = ItoEnsemble([recast(opened.resnet, 0.0, image_shape=tuple(batches[0][1].shape[1:]))], 1)  # type: ignore[arg-type]
    settings = {
        "norm": norm,
        "eps": radii,
        "noise": noise,
        "repeat": repeat,
        "effort": effort,
        "seed": seed,
        "batch_size": batch_size,
        "data": data.name,
        "images": len(data.test),
        "vote": {"members": len(ensemble.members), "inferences": ensemble.inferences, "rule": ensemble.rule},
        "weights": fingerprint(ensemble),
    }
    state = opened.folder / f"suite-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
    if not resume:
        shutil.rmtree(state, ignore_errors=True)
    elif not state.is_dir():
        raise ItoError("There is nothing to resume: this command was not interrupted; leave --resume out.")
    defenders: dict[str, tuple[ItoEnsemble, Suite]] = {
        "Itô ensemble": (
            ensemble,
            Suite(
                partial(standard, norm, noisy=ensemble.noisy, effort=effort),
                {"resnet": opened.resnet, "noise-free": NoiseFree(ensemble)},
                noise,
                repeat,
                seed,
                state / "ito",
            ),
        ),
        "original ResNet": (
            resnet,
            Suite(partial(standard, norm, noisy=False, effort=effort), seed=seed, state=state / "resnet"),
        ),
    }
    begun = time.monotonic()
    found: dict[str, list[SuiteResult]] = {}
    clean_votes: dict[str, Tensor] = {}
    clean: dict[str, Tensor] = {}
    truth = torch.cat([y for _, _, y in batches]).cpu()
    index = torch.cat([names for names, _, _ in batches]).cpu()
    originals = torch.cat([x for _, x, _ in batches]).cpu()
    total = sum(2 * len(suite.steps(eps)) for _, suite in defenders.values() for eps in radii) * len(batches)
    with output.progress(total, "suite", "attacks") as bar:
        for name, (model, suite) in defenders.items():
            parts: dict[float, list[SuiteResult]] = {eps: [] for eps in radii}
            answers = []
            for number, (names, x, y) in enumerate(batches):
                answers.append(suite.votes(model, x, names).cpu())
                for step, reached in suite.run(model, x, y, names, radii, str(number)):
                    bar.set_postfix_str(f"{name}, eps {labels[reached.eps]}, {step.name}: {sum(reached.fooled)} fooled")
                    bar.update()
                    if len(reached.denial.labels):  # the report has voted
                        parts[reached.eps].append(reached)
            found[name] = [joined(parts[eps]) for eps in radii]
            clean_votes[name] = torch.cat(answers, -2)
            clean[name] = worst_labels(clean_votes[name], truth, model.rule, model.inferences)
    seconds = time.monotonic() - begun
    others = _peers(peers, defenders, batches, norm, labels)

    steps = {name: suite.steps for name, (_, suite) in defenders.items()}
    entries: list[dict[str, Any]] = []
    for level, eps in enumerate(radii):
        ito, base = found["Itô ensemble"][level], found["original ResNet"][level]
        paired = Paired.of(base.denial.labels == truth, ito.denial.labels == truth)
        entries.append(
            {
                "eps": eps,
                "written": labels[eps],
                "ito": _entry(steps["Itô ensemble"](eps), ito, truth),
                "resnet": _entry(steps["original ResNet"](eps), base, truth),
                "paired": output.paired_json(paired, "resnet"),
            }
        )
    report = {
        "command": command_line(),
        "run": str(opened.folder),
        "suite": "standard",
        **settings,
        "seconds": round(seconds, 1),
        "environment": environment(),
        "clean": {name: Outcomes.of(answers, truth).as_dict() for name, answers in clean.items()},
        "attacked": entries,
        "invalid": {
            name: sum(
                invalid(votes, defenders[name][0].inferences)
                for votes in (
                    clean_votes[name],
                    *(case.votes for reached in levels for case in (reached.denial, reached.evasion)),
                )
            )
            for name, levels in found.items()
        },
        "peers": others,
    }
    record = opened.folder / f"suite-{norm}-{datetime.now():%Y%m%d-%H%M%S}.json"
    write_atomically(record, output.json_bytes(report))
    bundles = []
    if bundle is not None:
        levels = found["Itô ensemble"]
        config = {
            "run": report["run"],
            "data": {"name": data.name},
            "suite": {"name": "standard", "effort": effort, "batch_size": batch_size},
        }
        for level, eps in enumerate(radii):
            evidence = evidence_of(
                levels[: level + 1],
                clean_votes["Itô ensemble"],
                *defenders["Itô ensemble"],
                test_split(opened.config),
                originals,
                truth,
                index,
                command_line(),
                config,
            )
            bundles.append(bundle / output.radius_name(norm, labels[eps]))
            save_bundle(bundles[-1], evidence)
    shutil.rmtree(state, ignore_errors=True)
    if as_json:
        output.print_json(report)
        return
    output.describe(opened.config, opened.folder, len(ensemble.members), ensemble.inferences, ensemble.rule)
    _tables(report, found, steps, truth, clean, labels, seconds)
    click.echo(f"\nRecord    {record}")
    own = opened.config.ensemble
    vote = f" --inferences {ensemble.inferences}" if ensemble.inferences != own.inferences else ""
    vote += f" --rule {ensemble.rule}" if ensemble.rule != own.rule else ""
    for folder in bundles:
        click.echo(f"Evidence  {folder}    (check it: ito-sde verify {folder}{vote})")


def _peers(
    peers: tuple[str, ...], defenders: dict[str, Any], batches: list[Any], norm: str, labels: dict[float, str]
) -> list[dict[str, Any]]:
    """Other libraries' attacks on the same images, judged by the same report."""
    import torch

    from neuralsde_ito.attacks.other_libraries import peer_attack
    from neuralsde_ito.outcomes import Outcomes

    rows = []
    for (name, (model, suite)), eps, peer in itertools.product(defenders.items(), sorted(labels), peers):
        answers, queries, gradients, met, begun = [], 0, 0, 0, time.monotonic()
        for names, x, y in batches:
            decided = suite.decide(model, x, y, names)
            right = (decided == y).nonzero()[:, 0]
            if len(right):
                found = peer_attack(peer, model, x[right], y[right], norm, eps)
                queries, gradients, met = queries + found.queries, gradients + found.gradients, met + len(right)
                decided[right] = suite.decide(model, found.images, y[right], names[right])
            answers.append(decided.cpu())
        outcomes = Outcomes.of(torch.cat(answers), torch.cat([y for _, _, y in batches]).cpu())
        rows.append(
            {"model": name, "eps": eps, "written": labels[eps], "peer": peer, "images": met, "queries": queries}
            | {"gradients": gradients, "seconds": round(time.monotonic() - begun, 1), **outcomes.as_dict()}
        )
    return rows


def _entry(steps: Sequence[Step], reached: SuiteResult, truth: Tensor) -> dict[str, Any]:
    """One model at one radius: what denial leaves, what evasion leaves, and what each attack did."""
    from neuralsde_ito.outcomes import Outcomes

    attacks = [
        {
            "name": step.name,
            "goal": goal,
            "through": step.through,
            "images": reached.attacked[i],
            "fooled": reached.fooled[i],
            "queries": reached.queries[i],
            "gradients": reached.gradients[i],
            "blind": reached.blind[i],
        }
        for i, (goal, step) in enumerate(itertools.product(("denial", "evasion"), steps))
    ]
    evasion = Outcomes.of(reached.evasion.labels, truth).as_dict()
    return Outcomes.of(reached.denial.labels, truth).as_dict() | {"evasion": evasion, "steps": attacks}


def _step_rows(steps: Sequence[Step], reached: SuiteResult, truth: Tensor) -> list[list[str]]:
    """One model at one radius, attack by attack and goal by goal: name, images, fooled, left, costs of an image."""
    from neuralsde_ito.outcomes import Outcomes, Rate

    rows = []
    goals = (("denial", reached.denial, ["correct"]), ("evasion", reached.evasion, ["correct", "abstained"]))
    for turn, (goal, case, kept) in enumerate(goals):
        numbers = range(turn * len(steps), (turn + 1) * len(steps))
        for step, i in zip(steps, numbers, strict=True):
            met, name = reached.attacked[i], f"evasion: {step.name}" if turn else step.name
            if met:
                each = [f"{value[i] / met:,.0f}" for value in (reached.gradients, reached.queries)]
                left = output.percent(Rate.of(met - reached.fooled[i], len(truth)))
                rows.append([name, str(met), str(reached.fooled[i]), left, *each])
        rate = output.percent(Outcomes.of(case.labels, truth).rate(*kept))
        rows.append([f"report, {goal}: {' + '.join(kept)}", "", "", rate, "", ""])
    return rows


def _tables(
    report: dict[str, Any],
    found: dict[str, list[SuiteResult]],
    steps: Any,
    truth: Tensor,
    clean: dict[str, Tensor],
    labels: dict[float, str],
    seconds: float,
) -> None:
    """What stands, then step by step."""
    from neuralsde_ito.outcomes import Outcomes, Rate

    n, norm = len(truth), report["norm"]
    click.echo(f"\n{n} test images of {report['data']}, {norm}; % with 95 % Wilson intervals\n")
    rows: list[list[str]] = []
    for name, answers in clean.items():
        outcomes = Outcomes.of(answers, truth)
        rows.append(["0", name, *output.worst_cells(outcomes, outcomes, "ResNet" not in name), ""])
    for level, entry in enumerate(report["attacked"]):
        for i, name in enumerate(found):
            reached = found[name][level]
            cases = [Outcomes.of(case.labels, truth) for case in (reached.denial, reached.evasion)]
            p = output.p_value(entry["paired"]["p"]) if i else ""
            cells = output.worst_cells(cases[0], cases[1], "ResNet" not in name)
            rows.append([entry["written"] if i == 0 else "", name, *cells, p])
    output.table(rows, ["eps", "model", *output.WORST_HEADERS, "paired"])
    for name, levels in found.items():
        click.echo(f"\n{name}, step by step\n")
        rows = []
        for reached, entry in zip(levels, report["attacked"], strict=True):
            block = _step_rows(steps[name](reached.eps), reached, truth)
            rows += [[entry["written"] if i == 0 else "", *row] for i, row in enumerate(block)]
        output.table(rows, ["eps", "attack", "images", "fooled", "left", "gradients / image", "queries / image"])
    if report["peers"]:
        click.echo("\nOther libraries, each on all images that were right, judged by the same report\n")
        rows = []
        for row in report["peers"]:
            count, met = row["counts"], max(1, row["images"])
            cells = [output.percent(Rate.of(count["correct"], count["n"]))]
            cells += [f"{row[what] / met:,.0f}" for what in ("gradients", "queries")]
            rows.append([row["model"], row["written"], row["peer"], *cells, output.seconds(row["seconds"])])
        output.table(rows, ["model", "eps", "attack", "correct", "gradients / image", "queries / image", "time"])
    click.echo()
    gradients = sum(s["gradients"] for e in report["attacked"] for m in ("ito", "resnet") for s in e[m]["steps"])
    queries = sum(s["queries"] for e in report["attacked"] for m in ("ito", "resnet") for s in e[m]["steps"])
    defender = {
        "fresh": "on fresh noise, which no attack and no selection saw",
        "fixed": "on one set of paths for all images, which no attack saw",
        "known": "on paths that the attacker knows",
    }[report["noise"]]
    output.worst_sentence()
    output.sentence(
        "Each attack meets the images that stand, by votes on noise of the selection; those that fell without a wrong "
        "answer are attacked on for evasion ('left': the images of a row that it did not fool, of all). Report: the "
        f"decision on what was kept, {defender}"
        f"{', the worst of ' + str(report['repeat']) + ' votes' if report['repeat'] > 1 else ''}. Images, not labels, "
        f"are carried to larger radii. {gradients:,} gradients and {queries:,} queries in {seconds:.0f} s."
    )
    blind = sum(s["blind"] for e in report["attacked"] for m in ("ito", "resnet") for s in e[m]["steps"])
    if blind:
        output.sentence(
            f"In {blind:,} attacks on an image some gradient was not finite: that an image survives them is no sign of "
            "robustness."
        )
    output.invalid_sentence(
        sum(report["invalid"].values()), "Of the report's votes (one that decides several rows counts in each): "
    )
    output.sentence("An upper bound on robustness. Whether it can be trusted: ito-sde audit.")
