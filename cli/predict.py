"""``ito-sde predict``: labels for pictures, or an abstention, with the vote that led to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, output


@click.command("predict")
@click.argument("pictures", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@options.on_run
@options.votes
@options.seed
@options.as_json
def command(
    pictures: tuple[Path, ...],
    run: str | None,
    root: Path,
    device: str,
    inferences: int | None,
    rule: str | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Label pictures, or abstain. They are scaled and cropped to the size that the network was trained on."""
    import torch

    from neuralsde_ito.data import load_image
    from neuralsde_ito.evaluation import classify
    from neuralsde_ito.outcomes import ABSTAIN
    from neuralsde_ito.recipes import load_dataset

    opened = options.open_run(root, run, device, inferences, rule)
    images = load_dataset(opened.config, train_limit=1, test_limit=1)
    seed = opened.config.seed if seed is None else seed
    x = torch.stack([load_image(path, images.image_shape) for path in pictures]).to(opened.device)
    prediction = opened.ensemble.predict(x, seed, full=True)  # the counts are shown
    names = images.classes
    records: list[dict[str, Any]] = []
    for i, path in enumerate(pictures):
        votes = prediction.votes[:, i]  # (members, classes)
        share = votes.sum(0) / votes.sum()
        label = int(prediction.labels[i])
        records.append(
            {
                "image": str(path),
                "label": None if label == ABSTAIN else names[label],
                "resnet": names[int(classify(opened.resnet, x[i : i + 1])[0])],
                "top": {names[c]: round(float(share[c]), 4) for c in share.topk(min(3, len(names))).indices.tolist()},
                "member_votes": votes.tolist(),
            }
        )
    if as_json:
        output.print_json({"command": "predict", "run": str(opened.folder), "seed": seed, "images": records})
        return
    rows = []
    for record in records:
        top = ", ".join(f"{name} {100 * share:.0f} %" for name, share in record["top"].items() if share)
        rows.append([record["image"], record["label"] or "(abstains)", top, record["resnet"]])
    total = len(opened.ensemble.members) * opened.ensemble.inferences
    output.table(rows, ["image", "Itô ensemble", f"share of {total} inferences", "original ResNet"])
