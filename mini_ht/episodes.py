"""Episodes: few-shot tasks drawn from a set of images, a whole batch at a time."""

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.datasets.images import ImageSet
from mini_ht.errors import InputError

Integers = NDArray[np.integer]


@dataclass(frozen=True)
class Episodes:
    """E few-shot tasks; images are float32 in [0, 1], class by class in the order of their labels."""

    support: NDArray[np.float32]  # [E, way * (unlabelled + shot), H, W, C]
    labels: Integers  # [E, way * (unlabelled + shot)], -1 for unlabelled
    query: NDArray[np.float32]  # [E, way * queries, H, W, C]
    query_labels: Integers  # [E, way * queries]
    classes: Integers  # [E, way], the image set's class behind each label
    support_rows: Integers  # like labels, rows of the image set's pixels
    query_rows: Integers  # like query_labels


@dataclass(frozen=True)
class Choice:
    """Which images make a batch of episodes, before any pixel is touched; class by class."""

    classes: Integers  # [E, way]
    labels: Integers  # [E, n]
    support_rows: Integers  # [E, n]
    support_turns: Integers  # [E, n], quarter circles, and 4 more for a mirrored class
    query_labels: Integers  # [E, m]
    query_rows: Integers  # [E, m]
    query_turns: Integers  # [E, m]

    def of(self, part: slice) -> "Choice":
        """Some of the episodes."""
        return Choice(*(getattr(self, field.name)[part] for field in fields(self)))


def choose(
    images: ImageSet,
    rng: np.random.Generator,
    episodes: int,
    *,
    way: int,
    shot: int,
    queries: int,
    unlabelled: int = 0,
    rotate: bool = False,
    mirror: bool = False,
    turned: float = 1.0,
    protocol: str = "disjoint",
) -> Choice:
    """Draw which images make a batch of episodes; arguments and errors are those of `sample`."""
    if min(way, shot, queries) < 1 or unlabelled < 0:
        came = f"way {way}, shot {shot}, queries {queries}, unlabelled {unlabelled} came"
        raise InputError(f"{came}; wanted at least 1, 1, 1 and 0")
    support_count = unlabelled + shot
    apart = protocol == "disjoint"
    need = support_count + queries if apart else max(support_count, queries)
    if images.classes < way:
        raise InputError(f"an episode needs {way} classes and there are {images.classes}: lower way or add classes")
    fewest = int(images.counts.min())
    if fewest < need:
        name = images.names[int(images.counts.argmin())]
        raise InputError(
            f"class {name!r} has {fewest} images; wanted {need} (shot {shot} + unlabelled {unlabelled} + queries "
            f"{queries} a class, protocol {protocol}): lower one of them or add images"
        )
    chosen = np.argpartition(rng.random((episodes, images.classes)), way - 1, axis=1)[:, :way]
    classes = rng.permuted(chosen, axis=1)  # [E, way], as a partition is not in random order
    counts = images.counts[classes]
    if apart:
        drawn = draw(rng, counts, support_count + queries)  # [E, way, support_count + queries]
        support_drawn, query_drawn = drawn[..., :support_count], drawn[..., support_count:]
    else:
        support_drawn, query_drawn = draw(rng, counts, support_count), draw(rng, counts, queries)
    turns = rng.integers(0, 4 if rotate else 1, classes.shape) + 4 * rng.integers(0, 2 if mirror else 1, classes.shape)
    if turned < 1:  # a stream of its own: the images are those of a sampling in which all are turned
        turns *= rng.spawn(1)[0].random((episodes, 1)) < turned
    labels = np.broadcast_to(np.arange(way)[:, None], support_drawn.shape).copy()  # [E, way, support_count]
    labels[..., :unlabelled] = -1
    first = images.starts[classes][..., None]  # [E, way, 1]
    return Choice(
        classes=classes,
        labels=labels.reshape(episodes, -1),
        support_rows=(first + support_drawn).reshape(episodes, -1),
        support_turns=turns.repeat(support_count, axis=1),
        query_labels=np.tile(np.arange(way).repeat(queries), (episodes, 1)),
        query_rows=(first + query_drawn).reshape(episodes, -1),
        query_turns=turns.repeat(queries, axis=1),
    )


def thin(choice: Choice, rng: np.random.Generator, count: int, hidden: float = 0.0) -> Choice:
    """Keep `count` support images of each episode and hide the labels of some, so that classes have unequal numbers.

    The first labelled image of each class stays as it is; of the others, any may go, and each that stays loses its
    label with probability `hidden`. count lies between way and n.
    """
    first = np.diff(choice.labels, axis=1, prepend=-1) > 0  # [E, n], as choices are class by class
    keys = np.where(first, -1.0, rng.random(first.shape))
    kept = np.sort(keys.argpartition(count - 1, axis=1)[:, :count], axis=1)  # [E, count], still class by class

    def take(array: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(array, kept, axis=1)  # [E, n] -> [E, count]

    lost = ~take(first) & (rng.random(kept.shape) < hidden)
    return dataclasses.replace(
        choice,
        labels=np.where(lost, -1, take(choice.labels)),
        support_rows=take(choice.support_rows),
        support_turns=take(choice.support_turns),
    )


def sample(
    images: ImageSet, rng: np.random.Generator, episodes: int, *, part: slice = slice(None), **task: Any
) -> Episodes:
    """Draw a batch of episodes.

    Args:
        images: at least `way` classes of at least shot + unlabelled + queries images.
        rng: all chance comes from it; equal generators give equal episodes.
        episodes: E.
        part: of the E episodes drawn, those whose images are wanted (a worker's share).
        task: what `choose` takes: way, shot, queries, unlabelled are classes, and images a class in the support set
            (labelled), in the query set, and in the support set (unlabelled), and labels 0 .. way-1 go to the drawn
            classes at random; rotate turns each class of an episode by a random multiple of 90 degrees, support and
            query alike; mirror mirrors it or not; both do so in a share `turned` of the episodes, whose others are
            upright; protocol "disjoint" keeps support images out of the query, "released" draws the two independently,
            as the released code does.

    Raises:
        InputError: too few classes or images.
    """
    return look_up(images, choose(images, rng, episodes, **task).of(part))


def look_up(images: ImageSet, choice: Choice) -> Episodes:
    """The chosen images, turned."""
    return Episodes(
        support=pixels(images, choice.support_rows, choice.support_turns),
        labels=choice.labels,
        query=pixels(images, choice.query_rows, choice.query_turns),
        query_labels=choice.query_labels,
        classes=choice.classes,
        support_rows=choice.support_rows,
        query_rows=choice.query_rows,
    )


def shifted(images: NDArray[np.float32], offsets: Integers) -> NDArray[np.float32]:
    """Each image moved by its offset (rows, columns), zeros coming in: images [E, N, H, W, C], offsets [E, N, 2]."""
    most = int(np.abs(offsets).max())
    padded = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[2:4], (2, 3))  # [E, N, 2s+1, 2s+1, C, H, W]
    e, n = np.ogrid[: images.shape[0], : images.shape[1]]
    return np.moveaxis(windows[e, n, most - offsets[..., 0], most - offsets[..., 1]], 2, -1)  # [E, N, H, W, C]


def draw(rng: np.random.Generator, counts: Integers, k: int) -> Integers:
    """k different numbers below each count, in random order: counts [E, way] -> [E, way, k]."""
    keys = rng.random((*counts.shape, int(counts.max())))
    keys[np.arange(keys.shape[-1]) >= counts[..., None]] = 2  # behind every real image
    return keys.argsort(axis=-1)[..., :k]


def pixels(images: ImageSet, rows: Integers, turns: Integers) -> NDArray[np.float32]:
    """Images [E, n, H, W, C] in [0, 1], turned: rows [E, n], turns [E, n] in 0 .. 7.

    A turn is a number of quarter circles, plus 4 where the image is mirrored first.
    """
    taken = images.pixels[rows]  # [E, n, H, W, C]
    for turn in range(1, 8):
        which = turns == turn
        image = taken[which]  # [chosen, H, W, C]
        taken[which] = np.rot90(image[..., ::-1, :] if turn >= 4 else image, turn % 4, axes=(1, 2))
    return taken.astype(np.float32) / np.float32(255)
