"""The figure and the sentences of the item ``density``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..outcomes import Rate

# Of each statistic: the column of `DensityShift`, its title, and its unit.
_STATISTICS = (
    ("votes", "Jensen-Shannon divergence of votes", "bits"),
    ("mmd", "squared maximum mean discrepancy of logits", "no unit"),
    ("energy", "energy distance of logits", "logits"),
)
_STYLES = ("weak", "strong", "resnet", "clean")


def density_figure(
    omegas: list[float], measured: Mapping[str, Sequence[Mapping[str, Tensor]]], clean: Sequence[Rate], resnet: Rate
) -> dict[str, Any]:
    """The figure, and whether noise keeps the law of the output in place.

    Args:
        omegas: the strengths of the noise.
        measured: by eps, for each omega the columns of `DensityShift`, each ``(N,)``.
        clean: for each omega the accuracy without attack.
        resnet: the original ResNet's.
    """
    lost = [resnet.value - rate.value for rate in clean]
    panels = []
    for name, title, unit in _STATISTICS:
        lines = [
            {
                "label": f"eps {eps}",
                "style": style,
                "x": omegas,
                "y": [float(columns[name].mean()) for columns in rows],
                "low": None,
                "high": None,
            }
            for (eps, rows), style in zip(measured.items(), _STYLES, strict=False)
        ]
        null = [max(float(rows[i][f"{name}_null"].mean()) for rows in measured.values()) for i in range(len(omegas))]
        lines.append({"label": "95 % of the null", "style": "paper", "x": omegas, "y": null, "low": None, "high": None})
        panels.append(
            {
                "title": title,
                "x_label": "omega",
                "y_label": f"mean over images ({unit})",
                "x_ticks": [f"{omega:g}" for omega in omegas],
                "lines": lines,
            }
        )
    n = len(next(iter(measured.values()))[0]["votes"])
    caption = (
        f"How far PGD with one path a gradient moves the law of the output, on {n} test images: the "
        "mean of each statistic over images, against omega, at each L-inf eps. A shift below the null's 95 % is none "
        "that these paths can see."
    )
    figure = {"kind": "density", "title": "Density of the output under attack", "caption": caption, "panels": panels}
    conclusions = [
        sentence for eps, rows in measured.items() for sentence in _sentences(eps, omegas, rows, clean, lost)
    ]
    return {"figures": [figure], "conclusions": conclusions}


def _sentences(
    eps: str,
    omegas: Sequence[float],
    rows: Sequence[Mapping[str, Tensor]],
    clean: Sequence[Rate],
    lost: Sequence[float],
) -> list[str]:
    """What noise buys at one eps: the share of moved images and the shift of votes, at the least and the most noise."""
    moved = [100 * float((columns["mmd_p"] <= 0.05).double().mean()) for columns in rows]
    votes = [float(columns["votes"].mean()) for columns in rows]
    return [
        f"eps {eps}: the law of the logits has moved (p <= 0.05, by MMD) on {moved[0]:.0f} % of images at omega "
        f"{omegas[0]:g} and on {moved[-1]:.0f} % at omega {omegas[-1]:g}; the votes move by {votes[0]:.2f} and "
        f"{votes[-1]:.2f} bits. {_price(votes, clean, lost)}"
    ]


def _price(votes: Sequence[float], clean: Sequence[Rate], lost: Sequence[float]) -> str:
    """What the shift of votes that noise saves costs in clean accuracy."""
    saved, points = votes[0] - votes[-1], 100 * (lost[-1] - lost[0])
    accuracy = f"clean accuracy goes from {100 * clean[0].value:.1f} to {100 * clean[-1].value:.1f} %"
    if saved <= 0:
        return f"More noise does not keep the votes in place, and {accuracy}."
    if points <= 0:
        return f"More noise saves {saved:.2f} bits, and {accuracy}: it costs nothing on these images."
    return f"More noise saves {saved:.2f} bits, {saved / points:.3f} for a point of clean accuracy ({accuracy})."
