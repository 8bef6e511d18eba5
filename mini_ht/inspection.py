"""What a generator does, in numbers: where its tokens look, and how much what it writes varies from task to task."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mini_ht.arrays import Array, as_indices, namespace
from mini_ht.attention import attention, dense, encoder_layer, layer_norm, sigmoid_attention, split_heads
from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.features import shared_features
from mini_ht.generator import generate, layer_tokens
from mini_ht.kernels import conv_block
from mini_ht.plan import plan


@dataclass(frozen=True)
class AttentionMaps:
    """Who attends to whom in the transformer of one layer; tokens are the placeholders, then the support images."""

    weights: tuple[Array, ...]  # for each encoder layer [E, heads, T, T]; for the last [E, heads, placeholders, T]
    placeholders: int
    labels: Array  # [E, n]
    mask: Array | None  # [E, n], False for padding


def attention_maps(
    parameters: Mapping[str, Array],
    config: Config,
    support: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    layer: str = "logits",
) -> AttentionMaps:
    """The attention weights with which `generate` writes one layer of the CNN.

    Args:
        parameters, config, support, labels, mask: as for `generate`.
        layer: a layer of the plan that is generated, `conv1` ... or `logits`.

    Returns:
        AttentionMaps; rows are the tokens that ask, and with softmax sum to 1 over the tokens that they look at.

    Raises:
        InputError: a layer that is not generated, a generator with a decoder, and what `generate` refuses.
    """
    if config.generator != "joint":
        raise InputError(f"generator is {config.generator!r}; maps of attention want one whose generator is 'joint'")
    written = [part.name for part in plan(config) if part.generated and not part.discriminant]
    if layer not in written:
        raise InputError(f"layer is {layer!r}, which no transformer writes; choose one of {', '.join(written)}")
    cnn = generate(parameters, config, support, labels, mask)
    labels = as_indices(labels)
    if not cnn.batched:
        support, labels, mask = support[None], labels[None], None if mask is None else mask[None]
    number = [part.name for part in plan(config)].index(layer)
    chosen, activations = plan(config)[number], support
    for conv in cnn.convs[:number]:
        activations, _ = conv_block(
            *(activations, conv.weight, conv.gamma, conv.beta),
            **{"bias": conv.bias, "statistics": conv.statistics, "mask": mask, "slope": config.slope},
        )
        activations = conv.rescaled(activations)
    shared = shared_features(parameters, config, support)
    x, seen = layer_tokens(parameters, chosen, activations, labels, shared, mask)  # [E, T, D] and [E, T]
    weights = []
    for index in range(config.layers):
        name = f"{layer}.generator.layer{index}"
        outputs = chosen.placeholders if index == config.layers - 1 else x.shape[1]
        weights.append(attention_weights(parameters, name, x, config, seen, outputs))
        x = encoder_layer(parameters, name, x, config, seen, outputs, None)
    return AttentionMaps(tuple(weights), chosen.placeholders, labels, mask)


def attention_weights(
    parameters: Mapping[str, Array], name: str, x: Array, config: Config, mask: Array | None, outputs: int
) -> Array:
    """The weights in one encoder layer: tokens x [E, T, D], mask [E, T] -> [E, heads, outputs, T]."""
    if config.encoder == "pre-norm":
        x = layer_norm(x, parameters[f"{name}.attention_norm_gain"], parameters[f"{name}.attention_norm_offset"])
    query, key = dense(parameters, f"{name}.query", x[:, :outputs]), dense(parameters, f"{name}.key", x)
    query, key = split_heads(query, config.heads), split_heads(key, config.heads)  # [E, heads, .., width]
    # With the identity as its values, attention returns its weights.
    same = namespace(x).eye(x.shape[1], dtype=x.dtype, device=x.device)  # [T, T]
    same = namespace(x).broadcast_to(same, (*key.shape[:-1], x.shape[1]))  # [E, heads, T, T]
    attend = attention if config.attention == "softmax" else sigmoid_attention
    return attend(query, key, same, None if mask is None else mask[:, None, None, :])


def spread(weights: Array) -> Array:
    """How much each weight varies over episodes, relative to the root mean square of all: [E, ...] -> [...]."""
    xp = namespace(weights)
    return ((weights - weights.mean(0)) ** 2).mean(0) ** 0.5 / xp.sqrt((weights**2).mean())


def principal_plane(points: NDArray[np.floating]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The plane in which points vary most (PCA): points [N, F] -> (coordinates [N, 2], share of the variance [2])."""
    centred = points - points.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * values[:2], values[:2] ** 2 / (values**2).sum()
