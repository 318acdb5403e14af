"""``ito-sde frontier``: honest accuracy against clean accuracy of several runs."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralsde_ito.validation import ItoError, check_eps, nearest, shown

from . import options, output

if TYPE_CHECKING:
    from neuralsde_ito.outcomes import Paired
    from neuralsde_ito.runs.frontier import Frontier, Point
    from neuralsde_ito.runs.run import Run


@click.command("frontier")
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@options.runs_root
@options.norm
@click.option("--eps", help="Radius in pixel units, 8/255 or 0.03.  [default: the largest that all runs have]")
@click.option("--against", metavar="RUN", help="Pair the others with this run.  [default: the first]")
@click.option("--label", "texts", multiple=True, metavar="RUN=TEXT", help="What to call a run; repeatable.")
@click.option(
    "--out",
    **options.out_picture,
    metavar="PNG|SVG",
    help="The picture; JSON goes beside it.  [default: in the folder of the run that the others are paired with]",
)
@options.as_json
def command(
    names: tuple[str, ...],
    root: Path,
    norm: str,
    eps: str | None,
    against: str | None,
    texts: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Set the honest accuracy of runs beside their clean accuracy.

    Figures come from the newest record of each run's 'ito-sde suite'; nothing is attacked here. The other runs, and the
    ResNets from which they began, are paired with one run on the same images.

    \b
    ito-sde frontier robust robust-omega0 plain --norm linf --eps 0.1
    ito-sde frontier robust plain --label robust="Itô, PGD" --against plain --out frontier.png
    """
    if eps is not None:
        check_eps(norm, eps)
    runs, reference = _runs(root, names, texts, against)
    if out:
        options.check_file(out.with_suffix(".json"))

    from neuralsde_ito.files import write_atomically
    from neuralsde_ito.runs.frontier import read_frontier

    frontier = read_frontier(runs, norm, eps, reference)
    picture = out or frontier.reference.record.run.result_file("frontier", norm, ".png")
    report = _report(frontier)

    from .pictures import frontier_picture

    frontier_picture(picture, frontier)
    write_atomically(picture.with_suffix(".json"), output.json_bytes(report))
    if as_json:
        output.print_json(report)
        return
    _table(frontier)
    if frontier.twins:
        _twin_table(frontier)
    click.echo()
    _sentences(frontier)
    click.echo(f"\nPicture   {picture}")
    click.echo(f"Record    {picture.with_suffix('.json')}")


def _runs(
    root: Path, names: tuple[str, ...], texts: tuple[str, ...], against: str | None
) -> tuple[dict[str, Run], str | None]:
    """The runs by their labels, and the label of the reference if one was named.

    Raises:
        ItoError: there is no such run, one is named twice, or two have one label.
    """
    found = {name: options.find_run(root, name) for name in names}
    folders = [run.folder.resolve() for run in found.values()]
    if len(found) < len(names) or len(set(folders)) < len(folders):
        raise ItoError("A run would be drawn twice: name each run once.")
    short = [run.folder.name for run in found.values()]
    labels = {n: run.folder.name if short.count(run.folder.name) == 1 else str(run.folder) for n, run in found.items()}
    for text in texts:
        name = next((name for name in names if text.startswith(f"{name}=")), None)
        if name is None:
            raise ItoError(nearest("run in --label", text.partition("=")[0], names) + " It looks like RUN=TEXT.")
        labels[name] = text.removeprefix(f"{name}=").strip() or labels[name]
    if len(set(labels.values())) < len(labels):
        twice = next(label for label in labels.values() if [*labels.values()].count(label) > 1)
        raise ItoError(f"Two runs are called {shown(twice)}: give one of them another --label.")
    if against is not None and against not in labels:
        raise ItoError(nearest("run in --against", against, names))
    return {labels[name]: run for name, run in found.items()}, None if against is None else labels[against]


# --- the record -----------------------------------------------------------------------------------------


def _report(frontier: Frontier) -> dict[str, Any]:
    """All figures, ready for JSON."""
    reference, content = frontier.reference, frontier.reference.record.content
    return {
        "command": output.command_line(),
        "norm": frontier.norm,
        "eps": frontier.eps,
        "written": frontier.written,
        **{key: content[key] for key in ("data", "noise", "repeat", "effort")},
        "reference": reference.label,
        "points": [_point(point, reference) for point in frontier.points],
        "twins": [
            {"noisy": noisy.label, "still": still.label, **_pairs(noisy, still, "noisy", "still")}
            for noisy, still in frontier.twins
        ],
        "remarks": list(frontier.remarks),
    }


def _point(point: Point, reference: Point) -> dict[str, Any]:
    record = point.record
    return {
        "label": point.label,
        "defender": point.defender,
        "run": str(record.run.folder),
        "record": record.file.name,
        "omega": point.omega,
        "members": point.members,
        "adversary": point.adversary,
        "vote": record.content["vote"] if point.defender == "ito" else None,
        "seed": record.content["seed"],
        "clean": point.clean.outcomes.as_dict(),
        "honest": point.honest.outcomes.as_dict(),
        **({} if point is reference else _pairs(reference, point, "reference", "this")),
    }


def _pairs(first: Point, second: Point, one: str, other: str) -> dict[str, Any]:
    """The paired tests of two points, on clean images and under attack; None if they cannot be paired."""

    def as_json(paired: Paired | None) -> dict[str, Any] | None:
        if paired is None:
            return None
        return {f"only_{one}": paired.only_first, f"only_{other}": paired.only_second, "p": paired.p}

    return {"paired": as_json(first.paired(second)), "paired_clean": as_json(first.paired(second, clean=True))}


# --- the terminal ---------------------------------------------------------------------------------------


def _table(frontier: Frontier) -> None:
    """A row for each defender; the row of a twin says whose it is."""
    reference = frontier.reference
    counts = sorted({point.clean.outcomes.n for point in frontier.points})
    many = output.count(counts[0], "test image") if len(counts) == 1 else "test images"
    data = reference.record.content["data"]
    click.echo(
        f"\n{many} of {data}, {frontier.norm}, eps {frontier.written} in pixel units; % with 95 % Wilson intervals\n"
    )
    rows = []
    for point in frontier.points:
        resnet = point.defender == "resnet"
        noisy = [first.label for first, second in frontier.twins if second is point]
        twin = f"twin of {', '.join(noisy)} at omega 0" if noisy else ""
        name = textwrap.wrap(point.label, 24) + textwrap.wrap(twin, 24)
        paired = reference.paired(point)
        rows.append([
            "\n".join(name),
            "-" if resnet else f"{point.omega:g}",
            "-" if resnet else str(point.members),
            point.adversary,
            output.percent(point.clean.outcomes.rate("correct")),
            output.percent(point.honest.outcomes.rate("correct")),
            "    -" if resnet else f"{100 * point.honest.outcomes.rate('abstained').value:5.1f}",
            "reference" if point is reference else "-" if paired is None else output.p_value(paired.p),
            *([] if len(counts) == 1 else [str(point.clean.outcomes.n)]),
        ])  # fmt: skip
    headers = ["label", "omega", "members", "adversary", "clean", "honest", "abst.", "paired"]
    output.table(rows, headers + ([] if len(counts) == 1 else ["images"]))


def _sentences(frontier: Frontier) -> None:
    """What the columns mean, what cannot be paired, and what comes next."""
    reference = frontier.reference
    content = reference.record.content
    effort = f", effort {content['effort']:g}" if content["effort"] != 1 else ""
    repeat = f", the worst of {content['repeat']} votes" if content["repeat"] > 1 else ""
    output.sentence(
        "Clean: right without attack. Honest: right on what 'ito-sde suite' found against the right answer (denial; "
        f"{content['noise']} noise{effort}{repeat}), an upper bound on robustness. Abst.: abstained under that attack. "
        "Adversary: in the training of the ResNet, then of the members. Paired: McNemar's exact test of honest against "
        f"that of {reference.label}, on the same images; p-values are not corrected for their number."
    )
    for remark in frontier.remarks:
        output.sentence(remark)
    output.sentence(_next(frontier))


def _twin_table(frontier: Frontier) -> None:
    """What the noise adds: each ensemble beside its twin without noise, on the same images."""
    rows = []
    for noisy, still in frontier.twins:
        cells = []
        for paired in (noisy.paired(still), noisy.paired(still, clean=True)):
            cells += ["-"] * 3 if paired is None else [
                str(paired.only_first), str(paired.only_second), output.p_value(paired.p)
            ]  # fmt: skip
        names = [f"{noisy.label}, omega {noisy.omega:g}", still.label]
        rows.append(["\n".join(textwrap.wrap(name, 24)) for name in names] + cells)
    click.echo("\nWhat the noise adds: images that only one of two twins is right on\n")
    headers = ["with noise", "twin at omega 0", "honest: noise", "twin", "paired", "clean: noise", "twin", "paired"]
    output.table(rows, headers)


def _next(frontier: Frontier) -> str:
    """The twins that are missing, or the audit of the best."""
    ensembles = [point for point in frontier.points if point.defender == "ito"]
    twins = [noisy for noisy, _ in frontier.twins]
    alone = next((point for point in ensembles if point.omega and point not in twins), None)
    if alone is not None:
        run, name = alone.record.run, shlex.quote(f"{alone.record.run.folder.name}-omega0")
        train = f"ito-sde train --config {shlex.quote(str(run.config_file))} --omega 0 --run {name}"
        return f"Next: what does the noise of {alone.label} add? Train its twin ('{train}'), and attack it as before."
    best = max(ensembles, key=lambda point: point.honest.outcomes.correct / point.honest.outcomes.n)
    folder = shlex.quote(str(best.record.run.folder))
    return (
        f"Next: 'ito-sde audit --run {folder} --norm {frontier.norm} --eps {frontier.written}' checks whether the best "
        "figure can be trusted."
    )
