"""Pictures of the paper's figures, from the ``figures`` of a reproduction's ``results.json``.

Each is written as SVG and as PNG. They can be read without colour: lines differ in dashes and markers, bars in
hatching, and the cells of a heat map hold their numbers.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

from neuralsde_ito.files import write_atomically
from neuralsde_ito.validation import ItoError, one_of, shown

from .pictures import BLUE, GREY, ORANGE, RED

_WIDTH = 6.4  # inches, of two panels side by side
_TEXT = 9.0  # points

# A second run writes the same bytes: ids in the SVG come from the salt, and no date is written. Text stays text, which
# is smaller than outlines; a browser without the first font takes one that is as wide or narrower.
_SETTINGS: Any = {
    "svg.hashsalt": "ito-sde", "svg.fonttype": "none", "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    "font.size": _TEXT, "axes.titlesize": _TEXT, "axes.labelsize": _TEXT, "legend.fontsize": _TEXT,
    "xtick.labelsize": _TEXT, "ytick.labelsize": _TEXT, "hatch.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip

# The looks of each style of line: (colour, dashes, marker). Lines of one style take one look after the other.
_DARK = "#5a5a5a"
_LOOKS: dict[str, list[tuple[str, Any, str]]] = {
    "strong": [
        (BLUE, "-", "o"), ("#0b2d56", (0, (9, 2)), "s"), ("#4b9cd3", (0, (6, 1.5, 1.5, 1.5)), "P"),
        ("#00798c", (0, (3, 1)), "h"), ("#6a8caf", (0, (1, 0.8)), "p"), ("#003049", (0, (9, 1, 1, 1, 1, 1)), "8"),
    ],
    "weak": [
        (ORANGE, "--", "^"), (RED, ":", "v"), ("#7a5195", "-.", "<"), ("#8a6d1f", (0, (4, 1, 1, 1, 1, 1)), ">"),
        ("#d1495b", (0, (8, 2, 2, 2)), "*"), ("#5c4d7d", (0, (2, 3)), "X"),
    ],
    "resnet": [
        (GREY, "-.", "s"), (_DARK, (0, (1, 1)), "p"), (GREY, (0, (7, 3)), "o"), (_DARK, (0, (3, 1, 3, 3)), "8"),
    ],
    "clean": [
        ("black", ":", "."), (_DARK, (0, (1, 3)), "."), ("black", (0, (3, 2)), "|"), (_DARK, (0, (5, 1, 1, 1)), "|"),
    ],
    "paper": [("black", "none", "D"), (RED, "none", "d"), (BLUE, "none", "H"), (_DARK, "none", "s")],
    "quoted": [("black", "none", "x"), (_DARK, "none", "+"), (RED, "none", "1"), (BLUE, "none", "2")],
}  # fmt: skip
# What the lines of a style have in common. The paper's points are hollow, and lie above all lines.
_COMMON: dict[str, dict[str, Any]] = {
    "strong": {"lw": 2, "ms": 5.5},
    "weak": {"lw": 1.5, "ms": 6},
    "resnet": {"lw": 1.5, "ms": 5.5, "mfc": "white"},
    "clean": {"lw": 1, "ms": 5},
    "paper": {"ms": 7.5, "mfc": "none", "zorder": 4},
    "quoted": {"ms": 7.5, "zorder": 4},
}


def draw(figure: dict[str, Any], folder: Path, images: Sequence[ArrayLike] | None = None) -> dict[str, str]:
    """Draw one figure of ``results.json`` as ``NAME.svg`` and ``NAME.png``.

    Args:
        figure: ``name``, ``title``, ``kind`` and what the kind needs. A label with "%" means that its values are
            fractions, shown in per cent. A value that is None or not finite leaves a gap.

            - ``curves`` and ``density``: ``panels`` with ``title``, ``x_label``, ``y_label``, ``x_ticks`` (a label for
              each ``x`` that occurs, or None) and ``lines``, each with ``label``, ``style``, ``x``, ``y``, ``low`` and
              ``high``;
            - ``heatmap``: ``panels`` with ``title``, ``label``, ``members``, ``inferences`` and ``values``, a row for
              each number of members;
            - ``gallery``: ``images`` with ``index``, ``truth``, ``answers`` (an answer and its share) and ``members``
              (an answer, "none" without a majority, and how many members give it).
        folder: is made if it is missing.
        images: pixels of a gallery, for each of its images ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``, uint8 or from 0
            to 1.

    Returns:
        The names of the files in ``folder``, by format.

    Raises:
        ItoError: an unknown kind or style, or lists whose lengths do not fit one another.
    """
    name, kind = figure["name"], one_of("kind of figure", figure["kind"], _KINDS)
    if Path(name).name != name:
        raise ItoError(f"A figure's name becomes the name of its file, and cannot be {shown(name)}.")
    files = {"svg": f"{name}.svg", "png": f"{name}.png"}
    with matplotlib.rc_context(_SETTINGS):
        canvas = _KINDS[kind](figure, images)
        _write_svg(canvas, folder / files["svg"], figure["title"])
        _write_png(canvas, folder / files["png"], colours=None if kind == "gallery" else 256)
    return files


# --- curves ---------------------------------------------------------------------------------------------


def _curves(figure: dict[str, Any], _: Any) -> Figure:
    panels = [panel for panel in figure["panels"] if any(_points(line)[1].size for line in panel["lines"])]
    if not panels:
        return _sentence("Nothing was measured for this figure.")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    looks = _looks(panels)
    width = _WIDTH if columns == 2 else 5.0
    legend = {key: textwrap.fill(key[1], 38 if columns == 2 else 56) for key in looks}
    legend_rows = math.ceil(sum(label.count("\n") + 1 for label in legend.values()) / columns)
    canvas = Figure(figsize=(width, 2.6 * rows + 0.19 * legend_rows + 0.1), layout="constrained")
    axes = np.ravel(canvas.subplots(rows, columns, squeeze=False))
    for axis in axes[len(panels) :]:
        axis.remove()
    handles = {}
    for axis, panel in zip(axes, panels, strict=False):
        for line in panel["lines"]:
            key = line["style"], line["label"]
            handles[key] = _draw_line(axis, line, looks[key], _scale(panel["y_label"]))
        _name_axes(axis, panel, width / columns - 0.9)
    labels = [legend[key] for key in handles]
    canvas.legend(handles.values(), labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.2)
    return canvas


def _looks(panels: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The look of each line by style and label: the same in all panels, so that one legend serves them all."""
    looks: dict[tuple[str, str], dict[str, Any]] = {}
    for style, label in dict.fromkeys((line["style"], line["label"]) for panel in panels for line in panel["lines"]):
        choice = _LOOKS[one_of("style of line", style, _LOOKS)]
        used = sum(other == style for other, _ in looks)
        if used == len(choice):
            raise ItoError(
                f"A figure can tell {used} lines of style {style!r} apart, and {shown(label)} is one more; leave some "
                "out."
            )
        colour, dashes, marker = choice[used]
        looks[style, label] = {"color": colour, "ls": dashes, "marker": marker, **_COMMON[style]}
    return looks


def _points(line: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """The line's x, y, low and high, float64 ``(n,)`` with NaN for gaps; empty ones if no point is known."""
    x, y = _numbers(line["x"]), _numbers(line["y"])
    bounds = [y if line.get(name) is None else _numbers(line[name]) for name in ("low", "high")]
    if any(values.shape != x.shape for values in (y, *bounds)):
        raise ItoError(
            f"The line {shown(line['label'])} has {len(x)} x, {len(y)} y, {len(bounds[0])} low and {len(bounds[1])} "
            "high; give as many of each."
        )
    known = np.isfinite(x) & np.isfinite(y)
    return tuple(values if known.any() else values[:0] for values in (x, y, *bounds))


def _draw_line(axis: Any, line: dict[str, Any], look: dict[str, Any], scale: float) -> Any:
    """Draw a line with the band of its intervals, or a bar where a point has no neighbour.

    Returns:
        What the legend shows.
    """
    x, *values = _points(line)
    y, low, high = (scale * each for each in values)
    [handle] = axis.plot(x, y, label=line["label"], **look)
    known = np.isfinite(y)
    neighbours = np.zeros_like(known)
    neighbours[1:] |= known[:-1]
    neighbours[:-1] |= known[1:]
    if look["ls"] == "none":
        neighbours[:] = False
    axis.fill_between(x, low, high, where=known & neighbours, color=look["color"], alpha=0.13, lw=0)
    alone = known & ~neighbours & (high > low)
    axis.vlines(x[alone], low[alone], high[alone], color=look["color"], lw=1)
    return handle


def _name_axes(axis: Any, panel: dict[str, Any], inches: float) -> None:
    """Title, names and ticks of the axes; ``inches`` is about the length of the x axis."""
    axis.set(xlabel=panel["x_label"], ylabel=textwrap.fill(panel["y_label"], 30))
    axis.set_title(textwrap.fill(panel["title"], int(16 * inches)))
    if _scale(panel["y_label"]) == 100:
        axis.set(ylim=(-3, 103), yticks=range(0, 101, 20))
    else:
        axis.set_ylim(bottom=min(0, axis.dataLim.y0))
    axis.grid(True, axis="y", lw=0.4, alpha=0.5)
    if panel.get("x_ticks") is None:
        return
    x = sorted({value for line in panel["lines"] for value in _points(line)[0].tolist() if math.isfinite(value)})
    labels = panel["x_ticks"]
    if len(x) != len(labels):
        raise ItoError(f"{shown(panel['title'])} has {len(x)} different x, and {len(labels)} labels for them.")
    axis.set_xticks(x, labels)
    inches /= (x[-1] - x[0]) or 1
    for (a, left), (b, right) in itertools.pairwise(zip(x, labels, strict=True)):
        if (b - a) * inches < 0.035 * len(left + right) + 0.05:  # a character is about 0.07 inches wide
            axis.set_xticks(x, _apart(x, labels, 0.16 / inches), rotation=45, ha="right", rotation_mode="anchor")


def _apart(x: list[float], labels: list[str], least: float) -> list[str]:
    """The labels, empty where the next one on the right is nearer than ``least``: they would lie on each other."""
    kept, before = [], math.inf
    for value, label in zip(reversed(x), reversed(labels), strict=True):
        near = before - value < least
        kept.append("" if near else label)
        before = before if near else value
    return kept[::-1]


# --- heat maps ------------------------------------------------------------------------------------------


def _heatmap(figure: dict[str, Any], _: Any) -> Figure:
    panels = figure["panels"]
    if not panels:
        return _sentence("Nothing was measured for this figure.")
    cell = 0.33  # inches: one decimal in text of 8 points
    heights = [cell * len(panel["members"]) + 0.85 for panel in panels]
    width = max(cell * len(panel["inferences"]) for panel in panels) + 0.8
    canvas = Figure(figsize=(max(4.0, width), sum(heights)), layout="constrained")
    ratios = [len(panel["members"]) for panel in panels]
    axes = canvas.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_cells(axis, panel)
    return canvas


def _draw_cells(axis: Any, panel: dict[str, Any]) -> None:
    rows, columns = panel["members"], panel["inferences"]
    lengths = [len(row) for row in panel["values"]]
    if lengths != [len(columns)] * len(rows):
        raise ItoError(
            f"The heat map {shown(panel['title'])} needs {len(rows)} rows of {len(columns)} values, for its members "
            f"and inferences, and has rows of {shown(lengths)}."
        )
    values = _scale(panel["label"]) * np.array([_numbers(row) for row in panel["values"]])
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0, 1)
    spread = max(high - low, 1 if _scale(panel["label"]) == 100 else 0.01)  # chance alone should not fill the scale
    # An image of one pixel a cell: as shapes, two such panels would be a third of a megabyte.
    shades = axis.imshow(
        np.ma.masked_invalid(values), cmap="cividis", vmin=high - spread, vmax=high, origin="lower", aspect="auto",
        interpolation="none",
    )  # fmt: skip
    for (i, j), value in np.ndenumerate(values):
        text, colour = "–", "black"
        if math.isfinite(value):
            red, green, blue, _ = shades.cmap(shades.norm(value))
            text, colour = f"{value:.1f}", "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.46 else "black"
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="inferences of each member", ylabel="members")
    axis.set_title(textwrap.fill(f"{panel['title']}: {panel['label']}", max(40, 4 * len(columns))))


# --- the gallery ----------------------------------------------------------------------------------------


def _gallery(figure: dict[str, Any], images: Sequence[ArrayLike] | None) -> Figure:
    cards, pixels = figure["images"], [] if images is None else list(images)
    if len(cards) != len(pixels):
        raise ItoError(
            f"The gallery {shown(figure['name'])} describes {len(cards)} images, and the pixels of {len(pixels)} were "
            "given; give those of each."
        )
    if not cards:
        return _sentence("The ensemble abstains on none of these images.")
    columns = min(2, len(cards))
    rows = math.ceil(len(cards) / columns)
    canvas = Figure(figsize=(_WIDTH * columns / 2, 1.65 * rows), layout="constrained")
    panels = np.ravel(canvas.subfigures(rows, columns, squeeze=False))
    for panel, card, image in zip(panels, cards, pixels, strict=False):
        _draw_card(panel, card, np.asarray(image))
    return canvas


def _draw_card(panel: Any, card: dict[str, Any], image: np.ndarray) -> None:
    """One image, the shares of all inferences as bars, and what the members say."""
    left, right = panel.subplots(1, 2, width_ratios=[1, 1.6])
    left.imshow(_small(image), cmap="gray", vmin=0, vmax=255, interpolation="none")
    left.set_xticks([])
    left.set_yticks([])
    left.spines[:].set_visible(True)
    left.set_title(f"image {card['index']}\ntrue: {_short(card['truth'])}")
    top = card["answers"][:3]
    for row, (answer, share) in enumerate(top):
        colour, hatch = (BLUE, "") if answer == card["truth"] else (ORANGE, "///")
        right.barh(row, 100 * share, height=0.32, color=colour, hatch=hatch, edgecolor="white")
        right.text(1, row - 0.2, f"{_short(answer)}: {100 * share:.0f} %", va="bottom")
    right.set(xlim=(0, 100), ylim=(2.4, -0.85))
    right.set_xticks([0, 50, 100], ["0", "50", "100 %"], fontsize=8)
    right.set_yticks([])
    right.set_title("abstains: shares of inferences")
    says = ", ".join(
        f"{count} without a label" if answer == "none" else f"{count} say{'s' * (count == 1)} {_short(answer, 14)}"
        for answer, count in card["members"]
    )
    panel.supxlabel(textwrap.fill(f"members: {says}", 46), fontsize=_TEXT)


def _small(image: np.ndarray) -> np.ndarray:
    """The image as uint8, at most 80 pixels wide and high: the file holds it as it is, and it is drawn that small."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ItoError(f"The pixels of an image must be (H, W), (H, W, 1) or (H, W, 3), got {image.shape}.")
    if image.dtype != np.uint8:
        image = np.rint(255 * image).astype(np.uint8)
    picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    picture.thumbnail((80, 80))
    return np.asarray(picture)


# --- files and helpers ----------------------------------------------------------------------------------


def _write_svg(canvas: Figure, path: Path, title: str) -> None:
    content = io.BytesIO()
    canvas.savefig(content, format="svg", metadata={"Title": title, "Creator": None, "Date": None})
    write_atomically(path, content.getvalue())


def _write_png(canvas: Figure, path: Path, colours: int | None) -> None:
    """Write the figure at 160 dots an inch; a heat map of few colours takes a third of the space."""
    drawn, content = io.BytesIO(), io.BytesIO()
    canvas.savefig(drawn, format="png", dpi=160)
    image = Image.open(drawn).convert("RGB")
    if colours is not None:
        image = image.quantize(colours, dither=Image.Dither.NONE)
    image.save(content, "PNG", optimize=True)
    write_atomically(path, content.getvalue())


def _sentence(text: str) -> Figure:
    canvas = Figure(figsize=(5.4, 0.8))
    canvas.text(0.5, 0.5, text, ha="center", va="center")
    return canvas


def _scale(label: str) -> float:
    return 100.0 if "%" in label else 1.0


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _short(text: str, width: int = 18) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


_KINDS = {"curves": _curves, "density": _curves, "heatmap": _heatmap, "gallery": _gallery}
