"""Accuracy on episodes of unseen classes, with its interval, beside what needs no learning."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.arrays import Parameters, namespace
from mini_ht.config import Config, Norm
from mini_ht.datasets.images import ImageSet
from mini_ht.episodes import Episodes, sample
from mini_ht.errors import InputError
from mini_ht.views import generate_from_views, logits_from_views

EVALUATION_STREAM = 2  # keeps evaluation episodes apart from training episodes of the same seed
QUERIES = 5  # a class; as many as in the released evaluation, whose query batches hold 100 images


@dataclass(frozen=True)
class Score:
    """A mean accuracy over episodes, with the half-width of its 95 % interval."""

    accuracy: float
    interval: float
    episodes: int

    @staticmethod
    def of(accuracies: NDArray[np.floating]) -> "Score":
        """From the accuracy of each episode: 1.96 standard errors of the mean; of a single one it is 1."""
        count = len(accuracies)
        interval = 1.96 * float(accuracies.std(ddof=1)) / math.sqrt(count) if count > 1 else 1.0
        return Score(float(accuracies.mean()), interval, count)


def evaluation_episodes(
    images: ImageSet, episodes: int, *, seed: int = 0, batch: int = 8, queries: int = QUERIES, **task: Any
) -> Iterator[Episodes]:
    """Episodes for evaluation, never turned, `batch` of them at a time; the same for the same arguments.

    task: way, shot, and if wanted unlabelled and protocol, see `sample`. Raises InputError for a seed below 0.
    """
    if seed < 0:
        raise InputError(f"seed is {seed}; it must be at least 0")
    for start in range(0, episodes, batch):
        rng = np.random.default_rng([seed, EVALUATION_STREAM, start])
        yield sample(images, rng, min(batch, episodes - start), queries=queries, **task)


def affordable_queries(images: ImageSet, config: Config, most: int) -> int:
    """Query images a class, up to `most`, that the smallest class has beside its support images."""
    taken = config.shot + config.unlabelled if config.protocol == "disjoint" else 0
    return max(1, min(most, int(images.counts.min()) - taken))


def evaluate(
    parameters: Parameters,
    config: Config,
    batches: Iterator[Episodes],
    norm: Norm | None = None,
    views: int = 1,
    query_views: int = 1,
) -> Score:
    """Accuracy of the CNNs generated for the support set of each episode, on its query images.

    parameters may be NumPy or torch (then on their device, without gradients); norm defaults to the config's; views: at
    how many places the generator sees each support image, see `generate_from_views`; query_views: and the CNN each
    query image, see `logits_from_views`.
    """
    config = dataclasses.replace(config, norm=norm or config.norm)

    def classify(batch: Episodes) -> NDArray[np.integer]:
        convert, back = converters(parameters)
        support, labels = convert(batch.support), convert(batch.labels)
        cnn = generate_from_views(parameters, config, support, labels, views=views, check=False)
        return back(logits_from_views(cnn, convert(batch.query), query_views).argmax(-1))  # [E, m]

    return score(classify, batches)


def pixel_nearest_mean(batches: Iterator[Episodes]) -> Score:
    """Accuracy of choosing the class with the nearest mean of labelled support images, in pixels: a yardstick."""

    def classify(batch: Episodes) -> NDArray[np.integer]:
        support = batch.support.reshape(*batch.labels.shape, -1)  # [E, n, H * W * C]
        query = batch.query.reshape(*batch.query_labels.shape, -1)  # [E, m, H * W * C]
        one_hot = (batch.labels[..., None] == np.arange(batch.classes.shape[1])).astype(support.dtype)  # [E, n, way]
        means = one_hot.mT @ support / one_hot.sum(1)[..., None]  # [E, way, H * W * C]
        # |q - mean|^2 without the part that all classes share.
        distances = (means**2).sum(-1)[:, None, :] - 2 * query @ means.mT  # [E, m, way]
        return distances.argmin(-1)

    return score(classify, batches)


def score(classify: Callable[[Episodes], NDArray[np.integer]], batches: Iterator[Episodes]) -> Score:
    """Mean accuracy over episodes of a function from a batch of episodes to the classes [E, m] of its queries."""
    right = [(classify(batch) == batch.query_labels).mean(-1) for batch in batches]
    if not right:
        raise InputError("0 episodes were asked for; an accuracy needs at least 1, a result to quote 1,000")
    return Score.of(np.concatenate(right))


def converters(parameters: Parameters) -> tuple[Callable, Callable]:
    """From NumPy to the parameters' library and device, and back."""
    like = parameters["logits.xi"]
    if isinstance(like, np.ndarray):
        return np.asarray, np.asarray
    torch = namespace(like)
    return lambda array: torch.as_tensor(array, device=like.device), lambda tensor: tensor.cpu().numpy()
