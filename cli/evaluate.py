"""``ito-sde evaluate``: clean accuracy, with intervals, beside the original ResNet."""

from __future__ import annotations

from pathlib import Path

import click

from . import options, output


@click.command("evaluate")
@options.on_run
@options.votes
@options.limit
@options.seed
@options.batch_size
@options.as_json
def command(
    run: str | None,
    root: Path,
    device: str,
    inferences: int | None,
    rule: str | None,
    limit: int | None,
    seed: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Let a run's ensemble vote on test images, beside the original ResNet."""
    from neuralsde_ito.evaluation import evaluate
    from neuralsde_ito.recipes import load_dataset

    opened = options.open_run(root, run, device, inferences, rule)
    images = load_dataset(opened.config, train_limit=1, test_limit=limit)
    seed = opened.config.seed if seed is None else seed
    with output.progress(len(images.test), "vote", "images") as bar:
        result = evaluate(opened.ensemble, opened.resnet, images.test, seed, batch_size, bar.update)
    ensemble = opened.ensemble
    if as_json:
        vote = {"members": len(ensemble.members), "inferences": ensemble.inferences, "rule": ensemble.rule}
        head = {"command": "evaluate", "run": str(opened.folder), "data": images.name, "seed": seed, **vote}
        output.print_json({**head, **output.evaluation_json(result)})
        return
    output.describe(opened.config, opened.folder, len(ensemble.members), ensemble.inferences, ensemble.rule)
    output.evaluation_table(result, images.name)
