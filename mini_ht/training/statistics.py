"""Norm statistics learned over training tasks, for classifying an image alone."""

import dataclasses
from collections.abc import Mapping

from mini_ht.arrays import Array, as_floats, namespace
from mini_ht.config import Config
from mini_ht.datasets.images import ImageSet
from mini_ht.evaluation import converters, evaluation_episodes
from mini_ht.generator import generate

TASKS = 64


def learn_statistics(parameters: Mapping[str, Array], config: Config, images: ImageSet) -> dict[str, Array]:
    """`conv1.mean` and `conv1.variance` [Cout], and so on: of the support passes of 64 tasks of training classes.

    They belong among the parameters: `generate` then mixes them into a support set's own, see `Config.shrink`.
    """
    config = dataclasses.replace(config, norm="batch")
    convert, _ = converters(parameters)
    found = []
    task = {name: getattr(config, name) for name in ("way", "shot", "unlabelled")}
    for batch in evaluation_episodes(images, TASKS, queries=1, protocol="released", **task):
        support = as_floats(convert(batch.support), parameters["logits.xi"])
        cnn = generate(parameters, config, support, convert(batch.labels), check=False)
        found.append([conv.statistics for conv in cnn.convs])
    learned: dict[str, Array] = {}
    for number, layer in enumerate(zip(*found, strict=True), start=1):
        xp = namespace(layer[0][0])
        mean, variance = (xp.concat(parts) for parts in zip(*layer, strict=True))  # [tasks, Cout] each
        middle = mean.mean(0)  # [Cout]
        spread = (variance + (mean - middle) ** 2).mean(0)  # [Cout]
        learned |= {f"conv{number}.mean": middle, f"conv{number}.variance": spread}
    return learned
