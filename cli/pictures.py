"""Pictures of results. They can be read without colour: lines differ in style and marker, bars in hatching."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from neuralsde_ito.files import write_atomically
from neuralsde_ito.outcomes import ABSTAIN, Outcomes

if TYPE_CHECKING:
    from torch import Tensor

    from neuralsde_ito.attacks.sweep import Sweep
    from neuralsde_ito.benchmarks.record import Row
    from neuralsde_ito.certificates.certify_run import CertifiedSplit
    from neuralsde_ito.data import Dataset
    from neuralsde_ito.runs.evaluate import Evaluation
    from neuralsde_ito.runs.frontier import Frontier
    from neuralsde_ito.studies.compare import SolverComparison
    from neuralsde_ito.studies.depth import Reading

GREY, BLUE, ORANGE, RED = "#9a9a9a", "#1f5fa8", "#e39b2d", "#b8352a"


def evaluation_picture(path: Path, result: Evaluation, data: Dataset) -> None:
    """Outcomes of both models, and the images on which the ensemble is least sure (the paper's Figure 1)."""
    figure = plt.figure(figsize=(9, 4.6), layout="constrained")
    top, bottom = _stack(figure, 2, 1, height_ratios=[1, 1.25])
    axes = top.subplots(1, 2)
    parts = (("wrong", RED, "xx"), ("abstained", ORANGE, "//"))
    both = [outcomes for outcomes in (result.ito, result.resnet) if outcomes]
    for axis, (name, colour, hatch) in zip(axes, parts, strict=True):
        for row, outcomes in enumerate(both):
            rate = outcomes.rate(name)
            axis.barh(row, 100 * rate.value, color=colour, hatch=hatch, edgecolor="white", height=0.5)
            axis.plot([100 * rate.low, 100 * rate.high], [row, row], color="black", lw=1.2, marker="|")
            axis.text(100 * rate.high, row, f"  {100 * rate.value:.1f} %", va="center", fontsize=9)
            axis.set_yticks([0, 1], ["Itô ensemble", "original ResNet"] if axis is axes[0] else ["", ""])
        high = max(100 * o.rate(name).high for o in both)
        axis.set(title=f"{name} (% of {result.ito.n} test images, 95 % interval)", xlim=(0, 1.25 * high))
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    # (N, classes). If the logits of an image are never finite, it has no votes.
    share = result.votes.sum(0).float() / result.votes.sum((0, 2)).clamp(min=1)[:, None]
    lead = share.topk(2).values
    doubtful = (lead[:, 0] - lead[:, 1]).argsort()[:8].tolist()
    images = _images(data, [int(result.index[i]) for i in doubtful])
    for axis, i, image in zip(np.ravel(bottom.subplots(1, 8)), doubtful, images, strict=False):
        _show(axis, image)
        label = int(result.labels[i])
        answer = "abstains" if label == ABSTAIN else data.classes[label]
        picks = share[i].topk(2)
        votes = "\n".join(
            f"{data.classes[c]}: {100 * s:.0f} %" for s, c in zip(*(p.tolist() for p in picks), strict=True) if s
        )
        axis.set_title(f"true: {data.classes[int(result.truth[i])]}\nsays: {answer}", fontsize=8)
        axis.set_xlabel(votes, fontsize=8)
    bottom.suptitle("Images on which the ensemble is least sure, with the shares of its inferences", fontsize=9)
    _save(figure, path)


def attack_picture(path: Path, sweep: Sweep, names: dict[float, str], norm: str, data: Dataset) -> None:
    """Accuracy against eps (the paper's Figures 2 and 3), and images that are fooled at a small radius."""
    figure = plt.figure(figsize=(9, 4), layout="constrained")
    left, right = _stack(figure, 1, 2, width_ratios=[1.5, 1])
    axis = left.subplots()
    eps = [0.0, *sweep.eps]
    levels = range(len(sweep.eps))
    curves: list[tuple[str, list[Tensor], dict[str, Any]]] = []
    if sweep.resnet:
        labels = [sweep.clean["resnet"], *(sweep.worst_resnet(i) for i in levels)]
        curves.append(("original ResNet", labels, {"color": GREY, "ls": "--", "marker": "s"}))
    labels = [sweep.clean["ito"], *(sweep.worst(i) for i in levels)]
    name = f"{'Itô ensemble' if sweep.resnet else 'model'}, strongest attack"
    curves.append((name, labels, {"color": BLUE, "ls": "-", "marker": "o", "lw": 2}))
    if "noise-free" in sweep.labels[0]:
        labels = [sweep.clean["ito"], *(level["noise-free"] for level in sweep.labels)]
        curves.append(("Itô ensemble, gradient without its noise", labels, {"color": ORANGE, "ls": ":", "marker": "^"}))
    for name, decisions, style in curves:
        rates = [Outcomes.of(labels, sweep.truth).rate("correct") for labels in decisions]
        axis.plot(eps, [100 * r.value for r in rates], label=name, **style)
        axis.fill_between(
            eps, [100 * r.low for r in rates], [100 * r.high for r in rates], color=style["color"], alpha=0.15
        )
    axis.set(xlabel=f"eps ({norm}, pixel units)", ylabel="correct (%)", ylim=(-3, 103))
    axis.set_xticks(eps, ["0", *(names[e] for e in sweep.eps)])
    axis.set_title(f"{len(sweep.truth)} test images of {data.name}; bands: 95 % Wilson", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="best")
    axis.spines[["top", "right"]].set_visible(False)
    _draw_pairs(right, sweep, names, data)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix(".").lower(), dpi=130)
    plt.close(figure)
    write_atomically(path, content.getvalue())


def _draw_pairs(figure: Any, sweep: Sweep, names: dict[float, str], data: Dataset) -> None:
    """Up to four clean images and the adversarial ones, at the first radius that fools at least four (or the last)."""
    level = next((i for i in range(len(sweep.eps)) if len(_fooled(sweep, i)) >= 4), len(sweep.eps) - 1)
    rows = _fooled(sweep, level)[:4]
    if not rows:
        figure.suptitle("no image fell", fontsize=9)
        return
    clean = _images(data, [int(sweep.index[row]) for row, _ in rows])
    grid = figure.subplots(2, len(rows), squeeze=False)
    for column, (row, surrogate) in enumerate(rows):
        label = int(sweep.labels[level][surrogate][row])
        _show(grid[0][column], clean[column])
        _show(grid[1][column], sweep.images[level][surrogate][row].numpy())
        grid[0][column].set_title(data.classes[int(sweep.truth[row])], fontsize=8)
        grid[1][column].set_title("abstains" if label == ABSTAIN else data.classes[label], fontsize=8)
    grid[0][0].set_ylabel("clean", fontsize=8)
    grid[1][0].set_ylabel("attacked", fontsize=8)
    figure.suptitle(f"the ensemble's answers, eps {names[sweep.eps[level]]}", fontsize=9)


def _fooled(sweep: Sweep, level: int) -> list[tuple[int, str]]:
    """Rows of images that are right without attack and not under it, each with a surrogate that achieves this."""
    right = sweep.clean["ito"] == sweep.truth
    surrogates: dict[int, str] = {}
    for name, labels in sweep.labels[level].items():
        for row in (right & (labels != sweep.truth)).nonzero()[:, 0].tolist():
            surrogates.setdefault(row, name)
    return sorted(surrogates.items())


def _stack(figure: Any, rows: int, columns: int, **ratios: Any) -> list[Any]:
    return list(np.ravel(figure.subfigures(rows, columns, **ratios)))


def _images(data: Dataset, index: list[int]) -> list[np.ndarray]:
    """Images of the test split, ``(C, H, W)``, by their names in the noise's address."""
    by_name: dict[int, np.ndarray] = {}
    for names, x, _ in data.test.batches(256):
        for name, image in zip(names.tolist(), x, strict=True):
            if name in index:
                by_name[name] = image.numpy()
    return [by_name[i] for i in index]


def _show(axis: Any, image: np.ndarray) -> None:
    pixels = image.transpose(1, 2, 0)
    axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])


def certificate_picture(path: Path, certified: CertifiedSplit, about: str) -> None:
    """Certified accuracy against the radius, with its band.

    Args:
        path: of the picture.
        certified: the certificates.
        about: the title.
    """
    certificate, truth = certified.certificate, certified.truth
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    largest = certificate.sampling.largest_radius
    grid = np.linspace(0, largest, 201)
    rates = [certificate.accuracy(truth, radius) for radius in grid]
    axis.plot(grid, [100 * r.value for r in rates], color=BLUE, lw=2, drawstyle="steps-post")
    low, high = [100 * r.low for r in rates], [100 * r.high for r in rates]
    axis.fill_between(grid, low, high, color=BLUE, alpha=0.15, step="post")
    axis.axvline(largest, color=GREY, ls="--", lw=1)
    said = f"largest radius of {certificate.sampling.n:,} samples"
    axis.text(0.99 * largest, 100, said, color="#606060", fontsize=8, rotation=90, ha="right", va="top")
    axis.set(xlabel="L2 radius (pixel units)", xlim=(0, 1.05 * largest))
    axis.set(ylabel="certified accuracy (%)", ylim=(-3, 103))
    axis.set_title(about, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def bench_picture(rows: list[Row], path: Path) -> None:
    """Bars of ratios, a panel for each part; the part's first row is 1."""
    parts = list(dict.fromkeys(row.part for row in rows))
    heights = [sum(row.part == part for row in rows) for part in parts]
    figure, axes = plt.subplots(
        len(parts), 1, figsize=(8.5, 0.9 + 0.32 * sum(heights) + 0.55 * len(parts)), squeeze=False,
        layout="constrained", height_ratios=[height + 1 for height in heights],
    )  # fmt: skip
    for axis, part in zip(axes[:, 0], parts, strict=True):
        bars = [row for row in rows if row.part == part]
        for position, row in enumerate(bars):
            reference = row.ratio == 1
            axis.barh(position, row.ratio, color=GREY if reference else BLUE, hatch="" if reference else "//",
                      edgecolor="white", height=0.6)  # fmt: skip
            axis.text(row.ratio, position, f" {row.ratio:.2f}", va="center", fontsize=8)
        axis.axvline(1, color="black", lw=0.8, ls=":")
        axis.set_yticks(range(len(bars)), [row.name for row in bars], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(row.ratio for row in bars))
        axis.set_title(f"{part}: {'memory' if part == 'memory' else 'time'} relative to the first bar", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def compare_picture(report: SolverComparison, path: Path) -> None:
    """Work and precision: the state's error against drift evaluations, both on log scales, beside slopes of orders."""
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    styles = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--"), ("X", "-."), ("*", ":")]
    names = list(dict.fromkeys(row.solver for row in report.rows))
    drawn = []
    for i, name in enumerate(names):
        rows = [row for row in report.rows if row.solver == name and row.diverged is None and row.state_error > 0]
        if not rows:
            continue
        marker, line = styles[i % len(styles)]
        x, y = [row.evaluations for row in rows], [row.state_error for row in rows]
        colour = (BLUE, RED, ORANGE, "black", GREY)[i % 5]
        axis.loglog(x, y, marker=marker, ls=line, color=colour, label=name, ms=6, lw=1.3, mfc="white")
        drawn += rows
    if drawn:
        # Triangles of orders, side by side in the lower left corner, below all curves.
        left, right = min(r.evaluations for r in drawn), max(r.evaluations for r in drawn)
        width, top = (right / left) ** 0.12, min(r.state_error for r in drawn) * 0.8
        for i, order in enumerate((0.5, 1.0, 1.5)):
            start = left * width ** (1.8 * i)
            corner = top * width**-order
            axis.fill([start, start, start * width], [top, corner, corner], fill=False, ec="black", lw=0.9)
            axis.text(start, corner, f"{order:g}", fontsize=8, va="top")
        axis.text(left, top, "slope of order", fontsize=8, va="bottom")
    errors = [row.state_error for row in drawn]
    for each in (axis.xaxis, axis.yaxis):
        if each is axis.xaxis or (
            errors and max(errors) < 30 * min(errors)
        ):  # a smaller range holds at most one power of ten
            each.set_major_locator(LogLocator(subs=(1, 2, 5)))
            each.set_minor_locator(NullLocator())
            each.set_major_formatter("{x:g}")
    axis.set(xlabel="drift evaluations of one inference", ylabel="relative strong error of the last state")
    solver, steps = report.reference
    axis.set_title(f"Against {solver} at {steps} steps a block, on the same Brownian paths", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(True, which="both", lw=0.3, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def depth_picture(readings: list[Reading], path: Path) -> None:
    """Accuracy against steps a block; a filled marker at the steps of training."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    lines: dict[str, list[Reading]] = {}
    for r in readings:
        lines.setdefault(f"{r.network}: {r.solver}, {r.schedule}, horizon {r.horizon:g}", []).append(r)
    styles = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--")]
    for i, (name, of_line) in enumerate(lines.items()):
        marker, line = styles[i % len(styles)]
        colour = (BLUE, RED, ORANGE, "black", GREY)[i % 5]
        values = np.array([[100 * v for v in (r.correct.low, r.correct.value, r.correct.high)] for r in of_line])
        steps = [r.steps for r in of_line]
        axis.plot(steps, values[:, 1], ls=line, marker=marker, color=colour, mfc="white", label=name)
        axis.fill_between(steps, values[:, 0], values[:, 2], color=colour, alpha=0.12)
        for r, value in zip(of_line, values[:, 1], strict=True):
            if r.trained:
                axis.plot([r.steps], [value], marker=marker, color=colour, ms=9)
    ticks = sorted({r.steps for r in readings})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.set(xlabel="solver steps a block", ylabel="correct (%)")
    axis.set_title("One inference an image; bands: 95 % Wilson; filled: as trained", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


# Shapes that differ at a glance, without colour; those of ResNets are none of an ensemble's.
_ENSEMBLE_SHAPES, _RESNET_SHAPES = "o^Dv*Ph<>", "sXp8"


def frontier_picture(path: Path, frontier: Frontier) -> None:
    """Honest against clean accuracy: a marker for each defender, filled if it has noise, and a line between twins."""
    figure, axis = plt.subplots(figsize=(9, 4.8), layout="constrained")
    places: dict[str, tuple[float, float]] = {}
    legend: list[tuple[Any, str]] = []
    for defender, shapes in (("ito", _ENSEMBLE_SHAPES), ("resnet", _RESNET_SHAPES)):
        for number, point in enumerate(point for point in frontier.points if point.defender == defender):
            colour = GREY if defender == "resnet" else (BLUE, RED, ORANGE, "black")[number % 4]
            marker = shapes[number % len(shapes)]
            clean, honest = point.clean.outcomes, point.honest.outcomes
            x, y = places[point.label] = (100 * clean.rate("correct").value, 100 * honest.rate("correct").value)
            _abstained(axis, clean, honest, color=colour, marker=marker)
            axis.errorbar(x, y, _ends(honest), _ends(clean), color=colour, lw=0.8, capsize=2, zorder=2)
            style: dict[str, Any] = {
                "marker": marker,
                "color": colour,
                "mfc": colour if point.omega else "white",
                "ms": 9,
                "mew": 1.5,
            }
            [handle] = axis.plot(x, y, ls="", zorder=3, **style)
            legend.append((handle, "\n".join(textwrap.wrap(_plain(point.label), 34))))
    legend.append((plt.Line2D([], [], color="black", lw=5, alpha=0.25), "abstained, on top of correct"))
    for twins in frontier.twins:
        xs, ys = zip(*(places[point.label] for point in twins), strict=True)
        [handle] = axis.plot(xs, ys, color="black", lw=1, ls=":", zorder=1)
        if twins is frontier.twins[0]:
            legend.append((handle, "twins: they differ in omega only"))
    counts = sorted({point.clean.outcomes.n for point in frontier.points})
    many = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    data = _plain(frontier.reference.record.content["data"])
    axis.set_title(f"{many} test images of {data}, ito-sde suite; thin bars: 95 % Wilson", fontsize=9)
    honest_axis = f"honest: correct under {frontier.norm} attack, eps {frontier.written} (%)"
    axis.set(xlabel="clean: correct (%)", ylabel=honest_axis)
    axis.grid(True, lw=0.3, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*zip(*legend, strict=True), loc="outside right center", fontsize=8, frameon=False,
                  title="filled: with noise", title_fontsize=8, alignment="left", labelspacing=0.9)  # fmt: skip
    _save(figure, path)


def _plain(text: str) -> str:
    """A text without mathematics: a dollar sign stays one."""
    return text.replace("$", r"\$")


def _ends(outcomes: Outcomes) -> list[list[float]]:
    """The interval of correct as an error bar: below and above, in per cent."""
    rate = outcomes.rate("correct")
    return [[100 * max(0.0, rate.value - rate.low)], [100 * max(0.0, rate.high - rate.value)]]


def _abstained(axis: Any, clean: Outcomes, honest: Outcomes, **style: Any) -> None:
    """Light segments from correct to correct + abstained: to the right on clean images, upward under attack."""
    x, y = (100 * outcomes.rate("correct").value for outcomes in (clean, honest))
    right, top = (100 * outcomes.rate("correct", "abstained").value for outcomes in (clean, honest))
    for xs, ys in (([x, right], [y, y]), ([x, x], [y, top])):
        if (xs[1], ys[1]) != (x, y):  # the marker at the end tells whose segment it is where several lie on a line
            axis.plot(xs, ys, lw=5, ms=7, mew=0, alpha=0.3, markevery=[1], solid_capstyle="butt", zorder=1, **style)
