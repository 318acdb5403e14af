"""The audit on one HTML page: values and pictures for ``templates/audit.html``."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from neuralsde_ito.audits.audit import Audit
from neuralsde_ito.files import write_atomically
from neuralsde_ito.outcomes import ABSTAIN

from . import output

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#b45f06", "#6e7781"


@dataclass(frozen=True)
class Picture:
    """One diagram of the page.

    Attributes:
        title: its headline.
        parts: what each part shows, and the part itself, a PNG in base64.
        caption: the sentence below.
    """

    title: str
    parts: dict[str, str]
    caption: str


@dataclass(frozen=True)
class Pair:
    """An image without and under attack, two PNGs in base64, with the model's answers in words."""

    clean: str
    attacked: str
    before: str
    after: str


def write_report(path: Path, audit: Audit, about: dict[str, Any], classes: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: the file.
        audit: the audit.
        about: how it was made: ``command``, ``run``, ``data``, ``seed``, ``device``, ``seconds``, ``vote`` and
            ``environment``.
        classes: names of the labels.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["count"] = output.count
    fooled = _fooled_rows(audit)
    page = environment.get_template("audit.html").render(
        audit=audit,
        about=about,
        pictures=_pictures(audit),
        pairs=_pairs(audit, fooled or range(min(6, len(audit.x))), classes) if audit.attacked else [],
        pairs_fooled=bool(fooled),
    )
    write_atomically(path, page.lstrip().encode(errors="backslashreplace"))


def _pictures(audit: Audit) -> list[Picture]:
    """The robustness curve, and the landscape where there is one; nothing where no attack ran."""
    if not audit.attacked:
        return []
    pictures = [
        Picture(
            "Robustness curve",
            {"accuracy against eps": curve_picture(audit)},
            f"Correct answers against eps ({audit.attack.norm}, pixel units), with 95 % Wilson intervals. An image "
            "that falls counts as fallen at every larger eps. Dotted: the audit's eps.",
        )
    ]
    if audit.landscape:
        pictures.append(
            Picture(
                "Loss landscape",
                {"lines along both directions": landscape_lines(audit), "plane of both": landscape_plane(audit)},
                "Cross-entropy around one image on fixed paths, along the direction of the gradient and along a random "
                "one; dotted: eps. A smooth slope along the gradient is what an attack needs; jumps or a flat plain "
                "are signs of masked gradients.",
            )
        )
    return pictures


def curve_picture(audit: Audit) -> str:
    """Accuracy with its interval against the radius, as a PNG in base64."""
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    eps = [radius for radius, _ in audit.curve]
    rates = [rate for _, rate in audit.curve]
    values = [100 * rate.value for rate in rates]
    spread = [[100 * (r.value - r.low) for r in rates], [100 * (r.high - r.value) for r in rates]]
    axis.errorbar(eps, values, yerr=spread, color=_BLUE, marker="o", capsize=4, lw=1.8)
    for radius, value in zip(eps, values, strict=True):
        axis.annotate(f"{value:.0f}", (radius, value), xytext=(6, 5), textcoords="offset points", fontsize=9)
    if audit.attack.eps in eps:
        axis.axvline(audit.attack.eps, color=_GREY, ls=":", lw=1)
    axis.set(xlabel=f"eps ({audit.attack.norm})", ylabel="correct (%)", ylim=(-3, 108))
    axis.set_xticks(eps, [f"{radius:.3g}" for radius in eps])
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def landscape_lines(audit: Audit) -> str:
    """The loss along each direction, as a PNG in base64."""
    reach, loss = _log_landscape(audit)
    figure, axis = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    middle = len(reach) // 2
    axis.plot(reach, loss[:, middle], color=_BLUE, lw=1.8, label="along the gradient")
    axis.plot(reach, loss[middle], color=_ORANGE, lw=1.8, ls="--", label="along a random direction")
    for edge in (-1, 1):
        axis.axvline(edge, color=_GREY, ls=":", lw=1)
    axis.set(xlabel="steps of eps", ylabel="log10 of the loss")
    axis.legend(fontsize=9, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def landscape_plane(audit: Audit) -> str:
    """The loss in the plane of both directions, as a PNG in base64."""
    reach, loss = _log_landscape(audit)
    finite = loss[np.isfinite(loss)]
    figure, axis = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    if len(finite) and np.ptp(finite) > 0:
        shade = axis.contourf(reach, reach, loss.T, levels=12, cmap="Blues")
        axis.contour(reach, reach, loss.T, levels=12, colors="black", linewidths=0.4)
        figure.colorbar(shade, ax=axis, label="log10 of the loss")
    else:
        axis.text(0, 0, "the loss is the same everywhere" if len(finite) else "the loss is not finite", ha="center")
        axis.set(xlim=(-2, 2), ylim=(-2, 2))
    axis.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], color="black", ls=":", lw=1.2)
    axis.set(xlabel="gradient (eps)", ylabel="random (eps)")
    return _png(figure)


def _log_landscape(audit: Audit) -> tuple[np.ndarray, np.ndarray]:
    """Distances ``(K,)`` in units of eps, and the logarithm of the loss ``(K, K)``; NaN where it is not finite.

    The scale is logarithmic, as the loss of a confident answer rises exponentially. A loss below 1e-8 is drawn as 1e-8:
    float32 resolves no smaller one.
    """
    assert audit.landscape is not None
    loss = audit.landscape.loss.double().numpy()
    return audit.landscape.reach.numpy(), np.log10(np.where(np.isfinite(loss), loss, np.nan).clip(1e-8))


def _fooled_rows(audit: Audit) -> list[int]:
    """Positions of up to six images that are decided rightly without attack and not under it."""
    return ((audit.before == audit.truth) & (audit.after != audit.truth)).nonzero()[:, 0].tolist()[:6]


def _pairs(audit: Audit, rows: Iterable[int], classes: Sequence[str]) -> list[Pair]:
    """The images at ``rows``."""

    def answer(label: Tensor) -> str:
        return "abstains" if int(label) == ABSTAIN else classes[int(label)]

    return [
        Pair(_pixels(audit.x[row]), _pixels(audit.images[row]), answer(audit.before[row]), answer(audit.after[row]))
        for row in rows
    ]


def _pixels(image: Tensor) -> str:
    """An image ``(C, H, W)`` in [0, 1], as a PNG in base64 with one pixel for each of its own."""
    pixels = (255 * image.permute(1, 2, 0)).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _png(figure: Any) -> str:
    """A figure as a PNG in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()
