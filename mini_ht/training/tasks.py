"""Which episodes a training step sees: the same whoever asks and whenever."""

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.config import Config
from mini_ht.datasets.images import ImageSet
from mini_ht.episodes import Choice, Episodes, choose, look_up, shifted, thin

TRAINING_STREAM = 1  # keeps training episodes apart from others drawn with the same seed
HIDDEN = 0.5  # the largest share of labels that a step with unlabelled images hides


def step_task(config: Config, images: ImageSet, rng: np.random.Generator) -> tuple[dict[str, Any], int, float]:
    """With `config.vary`: how `choose` draws a step's episodes, and `count` and `hidden` by which `thin` thins them.

    Many classes are drawn more often than few, as they are harder to tell apart, and few images more often than many.
    Half of the steps have as many images of each class; in the others a class may have twice the average. A third of
    all steps have images without a label. Few classes have more queries each, so that norm statistics always come from
    about as many images.
    """
    way = int(rng.integers(2, config.way + 1, 2).max())
    shot = int(math.exp(rng.uniform(0, math.log(config.vary + 1))))
    most = shot if rng.random() < 0.5 else min(2 * shot, config.vary)
    spare = int(images.counts.min()) - (most if config.protocol == "disjoint" else 0)
    queries = max(1, min(spare, math.ceil(config.queries * config.way / way)))
    hidden = rng.uniform(0, HIDDEN) if rng.random() < 1 / 3 else 0.0
    return config.task | {"way": way, "shot": most, "queries": queries, "unlabelled": 0}, way * shot, hidden


def step_unlabelled(config: Config, rng: np.random.Generator, step: int) -> int:
    """With `config.introduce`: how many unlabelled images a class a step has, uniformly 0 .. most.

    most rises from 0 to `config.unlabelled` in even stages over the first `config.introduce` episodes. All at once, a
    generator can get stuck with guessing (paper, appendix C).
    """
    stage = config.unlabelled * step * config.episodes_per_step // config.introduce
    return int(rng.integers(min(stage, config.unlabelled), endpoint=True))


def training_choice(
    config: Config, images: ImageSet, step: int, upright: bool = False
) -> tuple[Choice, NDArray[np.integer]]:
    """The episodes of a step: a resumed run continues as if never interrupted.

    upright: no class is turned or mirrored. Returns which images, and how far each is moved, rows and columns:
    [E, n + m, 2].
    """
    rng = np.random.default_rng([config.seed, TRAINING_STREAM, step])
    task, count, hidden = step_task(config, images, rng) if config.vary else (config.task, 0, 0.0)
    if config.introduce:  # a stream of its own: the episodes are those of a training with always as many
        task["unlabelled"] = step_unlabelled(config, rng.spawn(1)[0], step)
    task |= {"rotate": config.rotate and not upright, "mirror": config.mirror and not upright, "turned": config.turned}
    choice = choose(images, rng, config.episodes_per_step, **task)
    if config.vary:
        choice = thin(choice, rng, count, hidden)
    total = choice.labels.shape[1] + choice.query_labels.shape[1]
    return choice, rng.integers(-config.shift, config.shift + 1, (config.episodes_per_step, total, 2))


def training_episodes(
    config: Config, images: ImageSet, step: int, part: slice = slice(None), upright: bool = False
) -> Episodes:
    """The images of some of a step's episodes."""
    choice, offsets = training_choice(config, images, step, upright)
    batch = look_up(images, choice.of(part))
    if not config.shift:
        return batch
    support, query = np.split(offsets[part], [batch.labels.shape[1]], axis=1)  # [E, n, 2] and [E, m, 2]
    return dataclasses.replace(batch, support=shifted(batch.support, support), query=shifted(batch.query, query))
