"""Prototypical networks (Snell et al. 2017): the class whose mean activations are nearest, behind one learned CNN.

The CNN is the conv blocks that a HyperTransformer generates, with weights that all tasks share. Support and query
images go through it in one pass: with norm "batch" its statistics are those of all images of an episode, with norm
"support" those of the support images, so that one image can be classified alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mini_ht.arrays import belongs
from mini_ht.config import Config
from mini_ht.generator import present_classes
from mini_ht.kernels import conv_stack


def embed(
    parameters: Mapping[str, Tensor], config: Config, support: Tensor, query: Tensor, norm: str
) -> tuple[Tensor, Tensor]:
    """Flattened activations of the last block: [E, n, H, W, C], [E, m, H, W, C] -> [E, n, F], [E, m, F]."""
    counts = [support.shape[1], query.shape[1]]
    mask = None
    if norm == "support":
        mask = (torch.arange(sum(counts), device=support.device) < counts[0]).expand(len(support), -1)  # [E, n + m]
    names = [f"conv{number}" for number in range(1, config.blocks + 1)]
    weights = [parameters[f"{name}.weight"] for name in names]
    x, _ = conv_stack(
        torch.cat([support, query], dim=1),  # [E, n + m, H, W, C]
        [x.expand(len(support), *x.shape) for x in weights],  # [E, 3, 3, Cin, Cout]
        *([parameters[f"{name}.{part}"][0] for name in names] for part in ("gamma", "beta")),
        mask=mask,
        slope=config.slope,
    )
    features = x.flatten(2).to(weights[0].dtype).split(counts, dim=1)  # [E, n, F] and [E, m, F]
    return features[0], features[1]


def class_means(features: Tensor, labels: Tensor, way: int) -> Tensor:
    """Mean features of each class: [E, n, F], labels [E, n] with -1 for unlabelled -> [E, way, F], 0 without images."""
    one_hot = belongs(labels, way).to(features.dtype)  # [E, n, way]
    return one_hot.mT @ features / one_hot.sum(1)[..., None].clamp(min=1)  # [E, way, F]


def prototype_logits(
    parameters: Mapping[str, Tensor], config: Config, support: Tensor, labels: Tensor, query: Tensor, norm: str
) -> Tensor:
    """Minus the squared distances to class means, [E, m, way]; -inf for a class without a labelled image.

    support [E, n, H, W, C], labels [E, n] with -1 for unlabelled, query [E, m, H, W, C].
    """
    known, asked = embed(parameters, config, support, query, norm)
    means = class_means(known, labels, config.way)  # [E, way, F]
    distances = (asked[:, :, None] - means[:, None]).square().sum(-1)  # [E, m, way]
    return (-distances).masked_fill(~present_classes(labels, None, config.way)[:, None], -torch.inf)
