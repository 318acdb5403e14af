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
    """Label pictures, or abstain. They are scaled and cropped to the size that the network was trained on.

    Transparent pictures are read on a white ground. The noise follows the pixels: a picture gets the same votes
    whatever its name is, and whatever is beside it.
    """
    from neuralsde_ito.attacks.targets import classify
    from neuralsde_ito.data import load_image
    from neuralsde_ito.noise.keys import content_index
    from neuralsde_ito.outcomes import ABSTAIN
    from neuralsde_ito.runs.build import load_dataset

    opened = options.open_run(root, run, device, inferences, rule)
    images = load_dataset(opened.config, train_limit=1, test_limit=1)
    seed = opened.config.seed if seed is None else seed
    names = images.classes
    total = len(opened.ensemble.members) * opened.ensemble.inferences
    records: list[dict[str, Any]] = []
    loaded = [load_image(path, images.image_shape) for path in pictures]  # all of them, before any work is done
    for path, picture in zip(pictures, loaded, strict=True):
        x = picture[None].to(opened.device)
        # One by one: in batches of another size, convolutions differ in the last bit.
        prediction = opened.ensemble.predict(x, seed, content_index(x), full=True)  # the counts are shown
        share = prediction.votes[:, 0].sum(0) / total  # (classes,)
        label, base = int(prediction.labels[0]), int(classify(opened.resnet, x)[0])
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
