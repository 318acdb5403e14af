"""Pictures of a reproduction's figures: what they show, in grey too, and the same bytes at a second run."""

import itertools
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.text import Text
from neuralsde_ito.cli import reproduction_pictures
from neuralsde_ito.cli.reproduction_pictures import draw
from PIL import Image

from neuralsde_ito import ItoError


def line(label: str = "suite", style: str = "strong", **changes) -> dict[str, Any]:
    y = [0.9, 0.5, 0.25]
    bounds = {"low": [0.8, 0.4, 0.15], "high": [0.95, 0.6, 0.35]}
    return {"label": label, "style": style, "x": [0, 0.1, 0.2], "y": y, **bounds, **changes}


def curves(*lines: dict[str, Any], panels: int = 1, kind: str = "curves", **changes) -> dict[str, Any]:
    panel = {
        "title": "L2, omega 0.2", "x_label": "eps (L2, pixel units)", "y_label": "correct (%)",
        "x_ticks": ["0", "0.1", "0.2"], "lines": list(lines), **changes,
    }  # fmt: skip
    return {"name": "figure2", "title": "Figure 2", "caption": "", "kind": kind, "panels": [panel] * panels}


def heatmap(values: list[list[float | None]], panels: int = 1) -> dict[str, Any]:
    panel = {"title": "benign", "members": list(range(3, 3 + len(values))), "inferences": [3, 4], "values": values}
    panel |= {"label": "correct + abstained (%)"}
    return {"name": "figure4", "title": "Figure 4", "caption": "", "kind": "heatmap", "panels": [panel] * panels}


def gallery(n: int) -> dict[str, Any]:
    answers = [["3", 0.45], ["8", 0.35], ["5", 0.15], ["1", 0.05]]
    card = {"index": 17, "truth": "8", "answers": answers, "members": [["3", 2], ["8", 1], ["none", 2]]}
    return {"name": "figure1", "title": "Figure 1", "caption": "", "kind": "gallery", "images": [card] * n}


def drawn(figure: dict[str, Any], folder: Path, images: Any = None) -> list[str]:
    """The texts of the SVG, after both files were checked."""
    files = draw(figure, folder, images)
    assert files == {"svg": f"{figure['name']}.svg", "png": f"{figure['name']}.png"}
    for name in files.values():
        assert (folder / name).stat().st_size < 300_000
    assert min(Image.open(folder / files["png"]).size) > 100
    root = ElementTree.parse(folder / files["svg"]).getroot()
    return ["".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text")]


ALL_STYLES = [line(f"line {style}", style) for style in ("strong", "weak", "resnet", "clean", "paper", "quoted")]
FIGURES = {
    "curves": (curves(*ALL_STYLES, panels=3), None),
    "density": (curves(line(), kind="density"), None),
    "heatmap": (heatmap([[0.901, 0.912], [0.923, None]]), None),
    "gallery": (gallery(3), [np.full((8, 8), 100, np.uint8)] * 3),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_a_second_run_writes_the_same_bytes(kind, tmp_path):
    figure, images = FIGURES[kind]
    for folder in ("one", "two"):
        drawn(figure, tmp_path / folder, images)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert "date" not in (tmp_path / "one" / f"{figure['name']}.svg").read_text().lower()


@pytest.mark.parametrize("kind", FIGURES)
def test_text_is_large_enough(kind, tmp_path, canvas):
    figure, images = FIGURES[kind]
    draw(figure, tmp_path, images)
    canvas().draw_without_rendering()  # at its own resolution
    texts = [text for text in canvas().findobj(Text) if text.get_text()]
    assert texts
    assert min(text.get_fontsize() for text in texts) >= 8
    width, height = canvas().get_size_inches() * canvas().dpi
    for text in texts:  # and not cut off
        box = text.get_window_extent()
        assert -1 <= box.x0 <= box.x1 <= width + 1, text.get_text()
        assert -1 <= box.y0 <= box.y1 <= height + 1, text.get_text()


# --- curves ---------------------------------------------------------------------------------------------


def test_axes_are_named_and_the_legend_names_each_line_once(tmp_path):
    texts = drawn(curves(*ALL_STYLES, panels=2), tmp_path)
    assert texts.count("eps (L2, pixel units)") == texts.count("correct (%)") == texts.count("L2, omega 0.2") == 2
    for each in ALL_STYLES:
        assert texts.count(each["label"]) == 1
    assert {"0", "0.1", "0.2", "100"} <= set(texts)


def test_the_legend_hides_no_data(tmp_path, canvas):
    long = line("a protocol whose name is long enough for two lines of the legend", "weak")
    draw(curves(*ALL_STYLES, long), tmp_path)
    canvas().draw_without_rendering()
    [legend] = canvas().legends
    for axis in canvas().axes:
        assert not legend.get_window_extent().overlaps(axis.get_window_extent())


def test_lines_differ_without_colour(tmp_path, canvas):
    looks = reproduction_pictures._LOOKS
    draw(curves(*(line(f"{style} {i}", style) for style, some in looks.items() for i in range(len(some)))), tmp_path)
    lines = canvas().axes[0].lines
    seen = {
        (each.get_marker(), str(each._dash_pattern), each.get_markerfacecolor() in ("white", "none")) for each in lines
    }
    assert len(seen) == len(lines) == 28
    by_label = {each.get_label(): each for each in lines}
    assert len(by_label) == 28
    assert by_label["paper 0"].get_marker() == "D"
    assert by_label["paper 0"].get_markerfacecolor() == "none"  # a hollow diamond
    assert by_label["quoted 0"].get_marker() == "x"
    for name in ("paper 0", "quoted 0"):
        assert by_label[name].get_linestyle() == "None"


def test_a_line_looks_the_same_in_each_panel(tmp_path, canvas):
    figure = curves(line("a"), line("b"))
    figure["panels"] = [figure["panels"][0], {**figure["panels"][0], "lines": [line("b"), line("c")]}]
    draw(figure, tmp_path)
    left, right = (axis.lines for axis in canvas().axes)
    assert left[1].get_marker() == right[0].get_marker()
    assert len({each.get_marker() for each in (*left, *right)}) == 3
    assert [text.get_text() for text in canvas().legends[0].get_texts()] == ["a", "b", "c"]


def test_fractions_are_shown_in_per_cent_and_distances_as_they_are(tmp_path, canvas):
    draw(curves(line()), tmp_path)
    assert canvas().axes[0].lines[0].get_ydata().tolist() == [90, 50, 25]
    assert canvas().axes[0].get_ylim() == (-3, 103)
    draw(curves(line(y=[-0.1, 5, 20]), kind="density", y_label="energy distance of logits"), tmp_path)
    assert canvas().axes[0].lines[0].get_ydata().tolist() == [-0.1, 5, 20]
    assert canvas().axes[0].get_ylim()[0] <= -0.1


@pytest.mark.parametrize("gap", [None, math.nan])
def test_gaps(gap, tmp_path, canvas):
    x = [0, 0.1, 0.2, 0.3, 0.4]
    bounds = {"low": [0.8, gap, 0.4, 0.1, 0.05], "high": [1, gap, 0.6, 0.3, 0.15]}
    drawn(curves(line(x=x, y=[0.9, gap, 0.5, 0.2, 0.1], **bounds), x_ticks=None), tmp_path)
    [axis] = canvas().axes
    assert np.isnan(axis.lines[0].get_ydata()).tolist() == [False, True, False, False, False]
    band, bars = axis.collections
    assert band.get_paths()[0].get_extents().extents.tolist() == [0.2, 5, 0.4, 60]
    [bar] = bars.get_segments()  # the point alone has its interval too
    assert bar.tolist() == [[0, 80], [0, 100]]


def test_one_point_and_no_intervals(tmp_path, canvas):
    one = {"x": [0.1], "y": [0.5], "low": [0.4], "high": [0.6]}
    drawn(curves(line(**one), line("paper", "paper", **{**one, "low": None, "high": None}), x_ticks=["0.1"]), tmp_path)
    segments = [len(bars.get_segments()) for bars in canvas().axes[0].collections if hasattr(bars, "get_segments")]
    assert segments == [1, 0]


def test_labels_of_ticks_do_not_overlap(tmp_path, canvas):
    x = [0, 1 / 255, 2 / 255, 8 / 255]
    bounds = {"low": None, "high": None}
    for labels in (["0", "1/255", "2/255", "8/255"], ["0", "1", "2", "8"]):
        draw(curves(line(x=x, y=[1, 0.5, 0.3, 0], **bounds), panels=2, x_ticks=labels), tmp_path)
        canvas().draw_without_rendering()
        ticks = canvas().axes[0].get_xticklabels()
        assert {tick.get_rotation() for tick in ticks} == {45 if "/" in labels[1] else 0}
        boxes = [tick.get_window_extent() for tick in ticks]
        if "/" not in labels[1]:
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("figure", [curves(panels=0), curves(line(x=[], y=[], low=[], high=[])), heatmap([], panels=0)])
def test_a_figure_without_data_says_so(figure, tmp_path):
    assert drawn(figure, tmp_path) == ["Nothing was measured for this figure."]


# --- heat maps and galleries ----------------------------------------------------------------------------


def test_a_heat_map_holds_its_numbers(tmp_path):
    texts = drawn(heatmap([[0.901, 0.912], [0.923, None]]), tmp_path)
    assert [text for text in texts if re.fullmatch(r"[0-9.]{4,}|–", text)] == ["90.1", "91.2", "92.3", "–"]
    assert {"benign: correct + abstained (%)", "members", "inferences of each member"} <= set(texts)


def test_the_largest_heat_map_is_small_enough(tmp_path):
    values = np.random.default_rng(0).uniform(0.9, 0.95, (18, 18)).tolist()
    figure = heatmap(values, panels=2)
    for panel in figure["panels"]:
        panel["inferences"] = panel["members"]
    assert len(drawn(figure, tmp_path)) > 2 * 18 * 18


def test_equal_values_are_not_spread_over_all_shades(tmp_path, canvas):
    draw(heatmap([[0.9, 0.9], [0.9, 0.901]]), tmp_path)
    [image] = canvas().axes[0].images
    assert image.norm.vmax - image.norm.vmin == pytest.approx(1)  # a point, not the tenth that chance gives
    draw(heatmap([[None, None]]), tmp_path)


@pytest.mark.parametrize(
    ("pixels", "shown"),
    [
        (np.full((8, 8), 100, np.uint8), np.full((8, 8), 100)),
        (np.full((8, 8, 1), 0.4), np.full((8, 8), 102)),
        (np.full((8, 8, 3), 7, np.uint8), np.full((8, 8, 3), 7)),
        ([[0.0, 1.0], [0.5, 0.2]], [[0, 255], [128, 51]]),
        (np.full((224, 112, 3), 0.2), np.full((80, 40, 3), 51)),
    ],
)
def test_a_gallery_shows_shares_and_members(pixels, shown, tmp_path, canvas):
    texts = drawn(gallery(1), tmp_path, [pixels])
    assert {"image 17", "true: 8", "3: 45 %", "8: 35 %", "5: 15 %"} <= set(texts)
    assert "1: 5 %" not in texts  # the fourth
    assert any("abstains" in text for text in texts)
    assert "members: 2 say 3, 1 says 8, 2 without a label" in texts
    left, right = canvas().axes
    assert np.array_equal(left.images[0].get_array(), shown)
    assert left.images[0].get_clim() == (0, 255)  # grey levels are not stretched
    assert [bool(bar.get_hatch()) for bar in right.patches] == [True, False, True]  # the true class is not hatched


def test_a_gallery_of_large_images_is_small_enough(tmp_path):
    ramp = np.linspace(0, 0.8, 224)
    noise = np.random.default_rng(0).uniform(0, 0.2, (8, 224, 224, 3))
    drawn(gallery(8), tmp_path, list(noise + ramp[:, None] * np.ones(3)))


def test_an_empty_gallery_is_a_sentence(tmp_path):
    assert drawn(gallery(0), tmp_path) == ["The ensemble abstains on none of these images."]
    assert drawn(gallery(0), tmp_path, []) == ["The ensemble abstains on none of these images."]


def test_names_that_are_long_or_hold_signs(tmp_path):
    figure = gallery(1)
    names = {"truth": "American Staffordshire terrier", "answers": [["a $ b $", 1.0]]}
    figure["images"] = [{**figure["images"][0], **names}]
    texts = drawn(figure, tmp_path, [np.zeros((8, 8))])
    assert "true: American Stafford…" in texts
    assert "a $ b $: 100 %" in texts


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "images", "words"),
    [
        ({**curves(line()), "kind": "curve"}, None, "Unknown kind of figure 'curve'; did you mean 'curves'"),
        (curves(line(style="strang")), None, "Unknown style of line 'strang'; did you mean 'strong'"),
        (
            curves(*(line(str(i), "paper") for i in range(5))),
            None,
            "4 lines of style 'paper' apart, and '4' is one more",
        ),
        (curves(line(y=[0.1])), None, r"'suite' has 3 x, 1 y, 3 low and 3 high"),
        (curves(line(), x_ticks=["0"]), None, "'L2, omega 0.2' has 3 different x, and 1 labels"),
        (heatmap([[0.1], [0.2]]), None, r"needs 2 rows of 2 values.* rows of \[1, 1\]"),
        (heatmap([[0.1], [0.2, 0.3]]), None, r"rows of \[1, 2\]"),
        (gallery(2), None, "describes 2 images, and the pixels of 0"),
        (gallery(2), [np.zeros((8, 8))], "describes 2 images, and the pixels of 1"),
        (gallery(1), [np.zeros((3, 8, 8))], r"\(H, W, 1\) or \(H, W, 3\), got \(3, 8, 8\)"),
        ({**curves(line()), "name": "../figure2"}, None, "name of its file, and cannot be '../figure2'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(figure, images, words, tmp_path):
    with pytest.raises(ItoError, match=words):
        draw(figure, tmp_path, images)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_would_lie_on_each_other_are_left_out_from_the_left() -> None:
    from neuralsde_ito.cli.reproduction_pictures import _apart

    assert _apart([0.0, 0.1, 1.0, 2.0], ["0", "1/255", "b", "c"], 0.2) == ["", "1/255", "b", "c"]
    assert _apart([0.0, 0.1, 0.2, 0.3], list("abcd"), 0.15) == ["", "b", "", "d"]
    assert _apart([0.0], ["a"], 1.0) == ["a"]
