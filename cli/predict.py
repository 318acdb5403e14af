"""``ito-sde predict``: a label or an abstention for each picture, with its vote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from neuralsde_ito.validation import ItoError

from . import options, output


@click.command("predict")
@click.argument("pictures", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@options.voting_run
@options.seed
@options.as_json
def command(
    pictures: tuple[Path, ...],
    chosen: options.RunOptions,
    seed: int | None,
    as_json: bool,
) -> None:
    """Label pictures, or abstain. Each is scaled and cropped to the size that the network was trained on.

    Transparent pictures are read on a white ground. The noise depends on the pixels only: a picture gets the same
    votes under any name and beside any other pictures.
    """
    for path in pictures:  # before torch is imported
        if not os.path.exists(path):
            raise ItoError(f"There is no image file {str(path)!r}.")
    opened = chosen.open()

    from neuralsde_ito.data import load_image
    from neuralsde_ito.models.inspection import as_called
    from neuralsde_ito.models.votes import winners
    from neuralsde_ito.noise.keys import content_index
    from neuralsde_ito.outcomes import ABSTAIN

    seed = opened.config.seed if seed is None else seed
    names, shape = opened.run.images()
    total = len(opened.ensemble.members) * opened.ensemble.inferences
    records: list[dict[str, Any]] = []
    loaded = [load_image(path, shape) for path in pictures]  # all of them, before any work is done
    for path, picture in zip(pictures, loaded, strict=True):
        x = picture[None].to(opened.device)
        # One by one, because the last bit of a convolution depends on the batch size.
        prediction = opened.ensemble.predict(x, seed, content_index(x), full=True)  # the table shows all counts
        share = prediction.votes[:, 0].sum(0) / total  # (classes,)
        with as_called(opened.resnet):
            label, base = int(prediction.labels[0]), int(winners(opened.resnet(x))[0])
        records.append(
            {
                "image": str(path),
                "label": None if label == ABSTAIN else names[label],
                "resnet": None if base == ABSTAIN else names[base],
                "top": {names[c]: round(float(share[c]), 4) for c in share.topk(min(3, len(names))).indices.tolist()},
                "member_votes": prediction.votes[:, 0].tolist(),
                "invalid": int(prediction.invalid[0]),
            }
        )
    if as_json:
        output.print_json({"command": "predict", "run": str(opened.folder), "seed": seed, "images": records})
        return
    rows = []
    for record in records:
        top = ", ".join(f"{name} {100 * share:.0f} %" for name, share in record["top"].items() if share)
        rows.append([record["image"], record["label"] or "(abstains)", top, record["resnet"] or "(no answer)"])
    output.table(rows, ["image", "Itô ensemble", f"share of {total} inferences", "original ResNet"])
    for record in records:
        if record["invalid"]:
            output.sentence(
                f"{record['image']}: {record['invalid']} of {total} inferences were invalid and voted for nobody, "
                "as their logits are not finite."
            )
