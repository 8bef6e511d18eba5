"""Attention, and the transformer's encoder and decoder: pure functions over arrays, bottom-up."""

import math
from collections.abc import Callable

import numpy as np

from mini_ht.arrays import Array, Mask, Parameters, fused, namespace, relu
from mini_ht.config import Config

LAYER_NORM_EPS = 1e-6


def dense(parameters: Parameters, name: str, x: Array) -> Array:
    """x W + b, or x W: x [..., inputs], W = parameters[name] [inputs, outputs], b = parameters[name_bias], if any."""
    weight, bias = parameters[name], parameters.get(f"{name}_bias")
    if torch_functions := fused(x):
        return torch_functions.linear(x, weight.mT, bias)
    return x @ weight if bias is None else x @ weight + bias


def softmax(x: Array) -> Array:
    """Over the last axis, any shape; an entry of -inf gets weight 0."""
    if torch_functions := fused(x):
        return torch_functions.softmax(x, -1)
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def layer_norm(x: Array, gain: Array, offset: Array) -> Array:
    """Each token to mean 0, variance 1 over its D coordinates, then scaled, shifted: x [..., D], gain, offset [D]."""
    if torch_functions := fused(x):
        return torch_functions.layer_norm(x, gain.shape, gain, offset, LAYER_NORM_EPS)
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred * (variance + LAYER_NORM_EPS) ** -0.5 * gain + offset


def activate(x: Array, name: str) -> Array:
    """ReLU, or GELU in its tanh form (Hendrycks & Gimpel 2016)."""
    if name == "relu":
        return relu(x)
    return 0.5 * x * (1 + namespace(x).tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(query: Array, key: Array, value: Array, mask: Mask = None) -> Array:
    """softmax(Q K^T / sqrt(width)) V for every episode and head.

    Args:
        query: [..., Tq, width].
        key: [..., T, width].
        value: [..., T, value width].
        mask: broadcastable to [..., Tq, T]; True where a key may be attended to. None allows all.

    Returns:
        [..., Tq, value width].
    """
    if torch_functions := fused(query):
        return torch_functions.scaled_dot_product_attention(query, key, value, mask)
    scores = query @ key.mT * key.shape[-1] ** -0.5  # [..., Tq, T]
    if mask is not None:
        scores = np.where(mask, scores, -math.inf)
    return softmax(scores) @ value


def sigmoid_attention(query: Array, key: Array, value: Array, mask: Mask = None) -> Array:
    """sigmoid(Q K^T / sqrt(width)) V: as `attention`, but a key's weight, in 0 .. 1, is its own affair."""
    xp = namespace(query)
    scores = query @ key.mT * key.shape[-1] ** -0.5  # [..., Tq, T]
    weights = 0.5 + 0.5 * xp.tanh(0.5 * scores)  # the logistic function, in a form that never overflows
    return (weights if mask is None else xp.where(mask, weights, 0.0)) @ value


def split_heads(x: Array, heads: int) -> Array:
    """[E, T, heads * width] -> [E, heads, T, width]."""
    episodes, tokens, width = x.shape
    return x.reshape(episodes, tokens, heads, width // heads).swapaxes(1, 2)


def multi_head_attention(
    parameters: Parameters,
    name: str,
    x: Array,
    heads: int,
    mask: Mask,
    outputs: int,
    memory: Array | None = None,
    kind: str = "softmax",
) -> Array:
    """The first `outputs` of the tokens x [E, T, D] attend to all of them, or to others: -> [E, outputs, D].

    memory [E, S, D]: those others; None for x. mask is [E, T], or [E, S], over the keys. kind is "softmax" or
    "sigmoid"; only then the key projection has a bias: softmax would not feel it.
    """
    seen = x if memory is None else memory
    query = dense(parameters, f"{name}.query", x[:, :outputs])
    key, value = (dense(parameters, f"{name}.{part}", seen) for part in ("key", "value"))
    query, key, value = (split_heads(part, heads) for part in (query, key, value))
    attend = attention if kind == "softmax" else sigmoid_attention
    mixed = attend(query, key, value, None if mask is None else mask[:, None, None, :])  # [E, heads, outputs, width]
    joined = mixed.swapaxes(1, 2).reshape(x.shape[0], outputs, -1)  # [E, outputs, heads * width]
    return dense(parameters, f"{name}.output", joined)


def feed_forward(parameters: Parameters, name: str, x: Array, activation: str) -> Array:
    """Two dense layers with an activation between them, token by token: [E, T, D] -> [E, T, D]."""
    hidden = activate(dense(parameters, f"{name}.inner", x), activation)
    return dense(parameters, f"{name}.outer", hidden)


def _residual(parameters: Parameters, name: str, part: Callable[[Array], Array], x: Array, config: Config) -> Array:
    """x + part(norm(x)), or norm(x + part(x)), for x [E, T, D]; a part that is short gives only the first tokens."""
    pre, norm = config.encoder == "pre-norm", (parameters[f"{name}_gain"], parameters[f"{name}_offset"])
    added = part(layer_norm(x, *norm) if pre else x)  # [E, outputs, D]
    x = x[:, : added.shape[1]] + added
    return x if pre else layer_norm(x, *norm)


def encoder_layer(
    parameters: Parameters, name: str, x: Array, config: Config, mask: Mask, outputs: int, memory: Array | None
) -> Array:
    """Attention, then the feed-forward part, each with a residual connection: [E, T, D] -> [E, outputs, D]."""

    def attend(x: Array) -> Array:
        return multi_head_attention(parameters, name, x, config.heads, mask, outputs, memory, config.attention)

    def forward(x: Array) -> Array:
        return feed_forward(parameters, name, x, config.activation)

    x = _residual(parameters, f"{name}.attention_norm", attend, x, config)
    return _residual(parameters, f"{name}.inner_norm", forward, x, config) if f"{name}.inner" in parameters else x


def encoder(
    parameters: Parameters, name: str, x: Array, config: Config, mask: Mask, outputs: int, memory: Array | None = None
) -> Array:
    """A stack of encoder layers without position codes: x [E, T, D] -> its first `outputs` tokens [E, outputs, D].

    mask [E, T]: True for the tokens that may be attended to; None allows all. The last layer computes no other tokens.

    With memory [E, S, D], to which mask [E, S] then belongs, it is a decoder (Vaswani et al. 2017): in each layer the
    tokens attend to each other, then to the memory.
    """
    for number in range(config.layers):
        layer, count = f"{name}.layer{number}", outputs if number == config.layers - 1 else x.shape[1]
        if memory is not None:
            x = encoder_layer(parameters, f"{layer}.own", x, config, None, count, None)
        x = encoder_layer(parameters, layer, x, config, mask, count, memory)
    if config.encoder == "pre-norm":
        x = layer_norm(x, parameters[f"{name}.norm_gain"], parameters[f"{name}.norm_offset"])
    return x
