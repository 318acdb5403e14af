"""The audit on one page: HTML that needs no network and no colour."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from neuralsde_ito.audits.audit import Audit
from neuralsde_ito.audits.check import FAIL, PASS
from neuralsde_ito.files import write_atomically
from neuralsde_ito.outcomes import ABSTAIN

from . import output

_STYLE = """
body { font: 15px/1.45 Georgia, serif; color: #000; background: #fff; margin: 2em auto; padding: 0 1em;
  max-width: 62em }
h1 { font-size: 1.6em; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 1.6em 0 .4em }
.verdict { border: 3px solid #000; padding: .6em .9em; font-size: 1.15em; font-weight: bold }
table { border-collapse: collapse; width: 100%; font-size: .88em }
th, td { text-align: left; vertical-align: top; padding: .3em .6em .3em 0; border-bottom: 1px solid #999 }
th { border-bottom: 2px solid #000 } .fail td { font-weight: bold; border-left: 5px solid #000; padding-left: .4em }
.beside td { color: #555 } code { font-size: .95em; overflow-wrap: anywhere } img { max-width: 100% }
figure { margin: 1em 0 } figcaption { font-size: .88em }
dt { float: left; clear: left; width: 9em } dd { margin-left: 9.5em }
@media print { body { margin: 0; max-width: none } figure, tr { break-inside: avoid } }
"""


def write_report(path: Path, audit: Audit, about: dict[str, Any], classes: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: the file.
        audit: what was found.
        about: what was run: ``command``, ``run``, ``data``, ``seed``, ``device``, ``seconds``, ``vote`` and
            ``environment``.
        classes: names of the labels.
    """
    figures = _figures(audit, classes) if audit.attacked else []
    attack, vote = audit.attack, about["vote"]
    settings = {
        "Command": f"<code>{escape(about['command'])}</code>",
        "Run": f"<code>{escape(about['run'])}</code>",
        "Images": escape(f"{audit.clean.n} of {about['data']}"),
        "Vote": escape(
            f"{output.count(vote['members'], 'member')}, {output.count(vote['inferences'], 'inference')} each, "
            f"{vote['rule']} majority"
        ),
        "Attack": escape(
            f"PGD, {attack.norm}, eps {attack.eps:.4g}, {attack.steps} steps of {attack.step:.3g}, {attack.restarts} "
            f"restart{'s' * (attack.restarts > 1)}, {attack.eot} paths a gradient, objective {attack.objective}"
        ),
        "Correct": escape(_rates(audit)),
        "Seed, device": escape(f"{about['seed']}, {about['device']}"),
        "Made": escape(f"{about['environment']['date']}, in {about['seconds']:.0f} s"),
        "Versions": escape(", ".join(f"{k} {v}" for k, v in about["environment"]["packages"].items())),
    }
    described = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in settings.items())
    kind, mark = {PASS: "pass", FAIL: "fail"}, {FAIL: "FAIL"}
    rows_html = "".join(
        f'<tr class="{kind.get(c.verdict, "beside")}"><td>{c.number}</td>'
        + "".join(f"<td>{escape(t)}</td>" for t in (c.name, c.figure, c.threshold, c.source))
        + f"<td>{mark.get(c.verdict, escape(c.verdict))}</td><td>{escape(c.note)}</td></tr>\n"
        for c in audit.checks
    )
    pictures = "".join(
        f'<h2>{title}</h2><figure><img alt="{escape(title)}" src="data:image/png;base64,{picture}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
        for title, picture, caption in figures
    )
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Audit of {escape(about["run"])}</title><style>{_STYLE}</style></head>
<body><h1>Is the robustness real?</h1>
<p class="verdict">{escape(audit.verdict)}</p>
<dl>{described}</dl>
<h2>Checks</h2>
<table><thead><tr><th></th><th>check</th><th>figure</th><th>fails if</th><th>source</th><th>verdict</th>
<th>meaning</th></tr></thead><tbody>
{rows_html}</tbody></table>
<p>“Beyond chance”: McNemar's exact test on the same images, at 1 %. An audit finds known faults of an attack; it is
no proof of robustness.</p>
{pictures}</body></html>
"""
    write_atomically(path, page.encode(errors="backslashreplace"))


def _figures(audit: Audit, classes: Sequence[str]) -> list[tuple[str, str, str]]:
    """Title, picture and caption."""
    curve = (
        f"Correct answers against eps ({audit.attack.norm}, pixel units), with 95 % Wilson intervals; successes are "
        "carried upward."
    )
    plane = (
        "Cross-entropy around one image on fixed paths, along the direction of the gradient and along a random one; "
        "dotted: eps. A smooth slope along the gradient is what an attack needs; jumps or a plain are signs of masking."
    )
    fell = _fell(audit)
    images = (
        "Images that were known, and what fooled the model." if fell else "No image fell; some as they were attacked."
    )
    return [
        ("Robustness curve", _curve(audit), curve),
        *([("Loss landscape", _landscape(audit), plane)] if audit.landscape else []),
        ("Images", _pairs(audit, fell, classes), images),
    ]


def _rates(audit: Audit) -> str:
    def text(what: Any) -> str:
        rate = what.rate("correct")
        return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"

    attacked = f", {text(audit.attacked)} under attack" if audit.attacked else ""
    return f"{text(audit.clean)} without attack{attacked}"


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _curve(audit: Audit) -> str:
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    eps = [radius for radius, _ in audit.curve]
    rates = [rate for _, rate in audit.curve]
    values = [100 * rate.value for rate in rates]
    spread = [[100 * (r.value - r.low) for r in rates], [100 * (r.high - r.value) for r in rates]]
    axis.errorbar(eps, values, yerr=spread, color="black", marker="o", capsize=4, lw=1.5)
    for radius, value in zip(eps, values, strict=True):
        axis.annotate(f"{value:.0f}", (radius, value), xytext=(6, 5), textcoords="offset points", fontsize=9)
    if audit.attack.eps in eps:
        axis.axvline(audit.attack.eps, color="grey", ls=":", lw=1)
    axis.set(xlabel=f"eps ({audit.attack.norm})", ylabel="correct (%)", ylim=(-3, 108))
    axis.set_xticks(eps, [f"{radius:.3g}" for radius in eps])
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _landscape(audit: Audit) -> str:
    assert audit.landscape is not None
    reach = audit.landscape.reach.numpy()
    # On a log scale: the loss of a confident answer rises exponentially. Float32 knows no smaller loss.
    loss = audit.landscape.loss.double().numpy()
    loss = np.log10(np.where(np.isfinite(loss), loss, np.nan).clip(1e-8))  # a gap where the loss is not finite
    known = loss[np.isfinite(loss)]
    figure, (lines, plane) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    middle = len(reach) // 2
    lines.plot(reach, loss[:, middle], color="black", label="along the gradient")
    lines.plot(reach, loss[middle], color="black", ls="--", label="along a random direction")
    for edge in (-1, 1):
        lines.axvline(edge, color="grey", ls=":", lw=1)
    lines.set(xlabel="steps of eps", ylabel="log10 of the loss")
    lines.legend(fontsize=8, frameon=False)
    lines.spines[["top", "right"]].set_visible(False)
    if len(known) and np.ptp(known) > 0:
        shade = plane.contourf(reach, reach, loss.T, levels=12, cmap="Greys")
        plane.contour(reach, reach, loss.T, levels=12, colors="black", linewidths=0.4)
        figure.colorbar(shade, ax=plane, label="log10 of the loss")
    else:
        said = "the loss is the same everywhere" if len(known) else "the loss is not finite"
        plane.text(0, 0, said, ha="center")
        plane.set(xlim=(-2, 2), ylim=(-2, 2))
    plane.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], color="black", ls=":", lw=1.2)
    plane.set(xlabel="gradient (eps)", ylabel="random (eps)")
    return _png(figure)


def _fell(audit: Audit) -> list[int]:
    """Up to six images that were known and are not any more."""
    return ((audit.before == audit.truth) & (audit.after != audit.truth)).nonzero()[:, 0].tolist()[:6]


def _pairs(audit: Audit, rows: list[int], classes: Sequence[str]) -> str:
    shown = rows or list(range(min(6, len(audit.x))))
    figure, axes = plt.subplots(
        2, len(shown), figsize=(1.5 * len(shown) + 0.5, 3.5), layout="constrained", squeeze=False
    )
    for column, row in enumerate(shown):
        pairs = ((audit.x, audit.before), (audit.images, audit.after))
        for axis, (images, labels) in zip(axes[:, column], pairs, strict=True):
            _show(axis, images[row].cpu().float().numpy())
            label = int(labels[row])
            axis.set_title("abstains" if label == ABSTAIN else classes[label], fontsize=9)
    axes[0][0].set_ylabel("clean", fontsize=9)
    axes[1][0].set_ylabel("attacked", fontsize=9)
    return _png(figure)


def _show(axis: Any, image: np.ndarray) -> None:
    pixels = image.transpose(1, 2, 0)
    axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
