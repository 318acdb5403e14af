"""``ito-sde evaluate``: clean accuracy with intervals, beside the original ResNet."""

from __future__ import annotations

from typing import Any

import click

from . import options, output


@click.command("evaluate")
@options.defender
@options.early
@click.option("--untrained", is_flag=True, help="Also vote with the recast ResNet before its fine-tuning.")
@options.limit
@options.seed
@options.batch_size
@options.as_json
def command(
    chosen: options.DefenderOptions,
    full: bool,
    confidence: float | None,
    untrained: bool,
    limit: int | None,
    seed: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Let a run's ensemble vote on test images, beside the original ResNet; or a network of yours."""
    if chosen.model is not None:
        options.without_effect({"untrained"}, "With --model")
    if full:
        options.without_effect({"confidence"}, "With --full")
    opened = chosen.defender()

    from neuralsde_ito.distributed import world
    from neuralsde_ito.models.ensemble import ItoEnsemble
    from neuralsde_ito.outcomes import Paired
    from neuralsde_ito.runs.build import load_dataset, recast_as
    from neuralsde_ito.runs.evaluate import evaluate

    among = world()
    images = load_dataset(opened.config, train_limit=1, test_limit=limit)
    seed = opened.config.seed if seed is None else seed
    ensemble, before, paired = opened.ensemble, None, None
    settings: tuple[Any, ...] = (full, confidence, among)
    with output.progress(len(among.share(images.test)) * (1 + untrained), "vote", "images") as bar:
        result = evaluate(ensemble, opened.resnet, images.test, seed, batch_size, bar.update, *settings)
        if untrained and opened.resnet is not None:
            member = recast_as(opened.config, opened.resnet)
            same = ItoEnsemble([member] * len(ensemble.members), ensemble.inferences, ensemble.rule)
            before = evaluate(same, opened.resnet, images.test, seed, batch_size, bar.update, *settings)
            paired = Paired.of(before.labels == before.truth, result.labels == result.truth)
    if not among.first:
        return
    if as_json:
        head = {"command": "evaluate", **opened.about, "data": images.name, "seed": seed, **opened.vote}
        content = {**head, **output.evaluation_json(result)}
        if before and paired:
            content["untrained"] = {**before.ito.as_dict(), "paired": output.paired_json(paired, "untrained")}
        output.print_json(content)
        return
    output.describe_defender(opened)
    output.evaluation_table(result, images.name, before, paired)
    total = len(ensemble.members) * ensemble.inferences
    output.drawn_sentence(result.drawn, total, confidence)
