"""Views: images are seen where they are and a pixel beside; of support images the CNN gets the mean weights.

A drawing's features depend on where max-pools happen to cut it; their mean over places does less. The CNN keeps its
size; writing it costs more, and so does classifying, where queries are seen so, too: their logits are averaged.
Training has no use for it (docs/recipe.md).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from mini_ht.arrays import Array, Parameters, namespace
from mini_ht.checks import check_support
from mini_ht.cnn import GeneratedCNN
from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.generator import generate

VIEWS = (1, 5, 9)
# By how many rows and columns an image is moved; the first 1, 5 or 9 of them are used.
MOVES = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def generate_from_views(
    parameters: Parameters,
    config: Config,
    support: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    views: int,
    **options: Any,
) -> GeneratedCNN:
    """The CNN with the mean of the weights, and norm statistics, that `generate` writes for each place of the images.

    views: 1, as they are; 5, also moved up, down, left and right; 9, also to the corners; InputError for other numbers.
    Everything else, and errors, as in `generate`.
    """
    check_views(views)
    if views == 1:
        return generate(parameters, config, support, labels, mask, **options)
    check_support(parameters, config, support, labels, mask, values=False)
    batched, concat = support.ndim == 5, namespace(support).concat
    if not batched:
        support, labels, mask = support[None], labels[None], None if mask is None else mask[None]
    seen = concat([moved(support, *move) for move in MOVES[:views]])  # [views * E, n, H, W, C]
    masks = None if mask is None else concat([mask] * views)  # [views * E, n]
    cnn = generate(parameters, config, seen, concat([labels] * views), masks, **options)
    return dataclasses.replace(mean_over_views(cnn, views), batched=batched)


def logits_from_views(network: Callable[[Array], Array], images: Array, views: int) -> Array:
    """The mean of a network's logits over the places of its images: [..., m, H, W, C] -> [..., m, way].

    network: a GeneratedCNN, or what else gives logits; it runs `views` times. views, and errors, as above.
    """
    check_views(views)
    return sum(network(moved(images, *move)) for move in MOVES[:views]) / views


def check_views(views: int) -> None:
    """InputError unless it is one of the numbers of views that there are."""
    if views not in VIEWS or not hasattr(views, "__index__"):  # 5.0 is among them, and no count
        raise InputError(f"views is {views!r}; choose one of {', '.join(map(str, VIEWS))}")


def moved(images: Array, rows: int, columns: int) -> Array:
    """Images [..., H, W, C] moved down and to the right (or back, below 0); zeros come in."""
    result = namespace(images).zeros_like(images)
    sizes = list(zip(images.shape[-3:-1], (rows, columns), strict=True))
    to, come = ([slice(max(0, s * k), size + min(0, s * k)) for size, k in sizes] for s in (1, -1))
    result[(..., *to, slice(None))] = images[(..., *come, slice(None))]
    return result


def mean_over_views(cnn: GeneratedCNN, views: int) -> GeneratedCNN:
    """From the CNNs of the support sets as they are, and behind them moved (views * E), those of the mean (E)."""

    def mean(x: Any) -> Any:
        if x is None or isinstance(x, tuple):
            return x and tuple(map(mean, x))
        x = x.reshape(views, -1, *x.shape[1:])  # [views * E, ...] -> [views, E, ...]
        return x[0] + (x - x[0]).mean(0)  # [E, ...], exactly x[0] where all views agree, as on learned convs

    parts = ("weight", "bias", "statistics", "affine")
    convs = [dataclasses.replace(conv, **{part: mean(getattr(conv, part)) for part in parts}) for conv in cnn.convs]
    present = cnn.present[: len(cnn.present) // views]
    return dataclasses.replace(cnn, convs=tuple(convs), logits_weight=mean(cnn.logits_weight), present=present)
