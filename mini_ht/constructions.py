"""Attention with parameters set by hand: what it can do with a support set (paper, section 3.2 and appendix A).

The tokens are the model's: [xi(label) | e] for a support image with embedding e, [mu(i) | 0] for placeholder i, with
orthonormal encodings, mu(i) = xi(i), and xi-hat, for unlabelled images, orthogonal to all of them. Nothing is trained.
"""

import math
from collections.abc import Mapping

import numpy as np

from mini_ht.arrays import Array, as_floats, namespace
from mini_ht.attention import multi_head_attention
from mini_ht.plan import Layer
from mini_ht.tokens import placeholder_tokens, support_tokens


def make_tokens(labels: Array, e: Array, way: int) -> tuple[Array, Array]:
    """Placeholders [E, way, D] and support tokens [E, n, D], with D = way + 1 + F.

    labels: [E, n] in -1 .. way-1, -1 for unlabelled. e: [E, n, F], the embeddings.
    """
    episodes, _, features = e.shape
    encodings = as_array(np.eye(way + 1), e)  # xi(0) .. xi(way - 1) and xi-hat
    layer = Layer("a", True, 1, features, way, way, features, (), way + 1 + features)
    parameters = {"a.xi": encodings, "a.mu": encodings[:way]}
    return placeholder_tokens(parameters, layer, episodes), support_tokens(parameters, layer, labels, e, e[..., :0])


def as_array(x: np.ndarray, like: Array) -> Array:
    """A NumPy array as one of the library, dtype and device of `like`."""
    if isinstance(like, np.ndarray):
        return x.astype(like.dtype)
    return namespace(like).as_tensor(x, dtype=like.dtype, device=like.device)


def head(like: Array, **matrices: np.ndarray) -> Mapping[str, Array]:
    """Parameters of one attention head without biases, named "a", from query, key, value and output matrices."""
    parameters = {f"a.{name}": as_array(matrix, like) for name, matrix in matrices.items()}
    return parameters | {f"{name}_bias": 0 * matrix[0] for name, matrix in parameters.items()}


def selectors(way: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices that pick parts of a token x: x P is its encoding [D, way + 1], x R its embedding [D, F]."""
    everything = np.eye(way + 1 + features)
    return everything[:, : way + 1], everything[:, way + 1 :]


def prototypes(labels: Array, e: Array, way: int, beta: float, placeholders_as_keys: bool = True) -> Array:
    """Logits weights [E, way, F] by one attention layer whose placeholders look for the encoding of their class.

    Query and key are the encoding, times sqrt(beta); the value is the embedding, written back to its place. With k
    images of every class and embeddings of mean zero, row i is `prototype_factor` times the mean of class i.

    Args:
        labels: [E, n] in -1 .. way-1.
        e: [E, n, F].
        beta: inverse temperature, at least 0; the larger, the less of other classes gets in.
        placeholders_as_keys: whether placeholders are attended to as well, where they dilute.
    """
    placeholders, samples = make_tokens(labels, e, way)
    tokens = namespace(e).concat([placeholders, samples], axis=1)  # [E, way + n, D]
    p, r = selectors(way, e.shape[-1])
    sharp = math.sqrt(beta * math.sqrt(way + 1))  # as scores are divided by the square root of the width
    layer = head(e, query=sharp * p, key=sharp * p, value=r, output=r.T)
    mask = None if placeholders_as_keys else keys_after(way, tokens)
    out = placeholders + multi_head_attention(layer, "a", tokens, 1, mask, way)  # [E, way, D]
    return out[..., way + 1 :]


def keys_after(first: int, tokens: Array) -> Array:
    """A mask [E, T] that lets only the tokens from `first` on be attended to."""
    return namespace(tokens).cumsum(0 * tokens[..., 0] + 1, 1) > first


def prototype_factor(shot: int, way: int, beta: float, placeholders_as_keys: bool = True) -> float:
    """How many times the class mean a row of `prototypes` is, for `shot` images a class and mean embedding zero.

    At most way * exp(-beta) below its limit: 1, or shot / (shot + 1) with placeholders as keys, which act like one
    more, empty, image of each class.
    """
    t = math.exp(-beta)  # numerator and denominator are divided by exp(beta), which could overflow
    limit = shot / (shot + 1) if placeholders_as_keys else 1.0
    return limit * (1 - t) / (1 + (way - 1) * t)


def gradient_step(labels: Array, e: Array, way: int, gamma: float) -> Array:
    """Change of the logits layer [E, way, F + 1] by one step of gradient descent, by attention without softmax.

    The step, of size gamma, is on the mean cross-entropy of the labelled images, from a start that favours no class:
    dW_i = gamma / n * sum over m of (y_i^m - 1 / way) e^m (appendix A); the last column is the bias, whose embedding is
    1. Unlabelled images have no part in it; without any labelled one there is no change. Exact for any number of images
    a class.
    """
    xp = namespace(e)
    e = xp.concat([e, 0 * e[..., :1] + 1], axis=-1)  # [E, n, F + 1]
    placeholders, samples = make_tokens(labels, e, way)
    p, r = selectors(way, e.shape[-1])
    centred = p[:, :way] - p[:, :way].mean(1, keepdims=True)  # xi(c) to y - 1 / way
    centred[way] = 0  # xi-hat
    query = placeholders @ as_array(p[:, :way], e)  # [E, way, way]
    key = samples @ as_array(centred, e)  # [E, n, way]
    value = samples @ as_array(r, e)  # [E, n, F + 1]
    labelled = as_floats(labels >= 0, e).sum(1).clip(1)[:, None, None]  # [E, 1, 1]
    return gamma / labelled * (query @ key.mT @ value)


def semi_supervised(
    labels: Array, e: Array, way: int, beta: tuple[float, float], alpha: float, suppression: float = 0.0
) -> Array:
    """Logits weights [E, way, F] by two layers, of which the first tells unlabelled images whom they resemble.

    Layer 1: scores beta[0] * e . e'; the value is alpha times the class encoding, so that an unlabelled image takes on
    the classes of similar labelled ones. A key loses `suppression` in its score if it is unlabelled and has nothing to
    tell. Layer 2 is that of `prototypes` with beta[1], blind to xi-hat.
    """
    features = e.shape[-1]
    placeholders, samples = make_tokens(labels, e, way)
    tokens = namespace(e).concat([placeholders, samples], axis=1)  # [E, way + n, D]
    p, r = selectors(way, features)
    classes = p[:, :way]  # without xi-hat
    width = math.sqrt(features + 1)
    sharp = math.sqrt(beta[0] * width)
    unlabelled = -suppression * width * p[:, way:]  # [D, 1]
    first = dict(head(e, query=np.hstack([sharp * r, 0 * unlabelled]), key=np.hstack([sharp * r, unlabelled]),
                      value=alpha * classes, output=classes.T))  # fmt: skip
    first["a.query_bias"] = as_array(np.eye(features + 1)[-1], e)  # every query asks for the last key coordinate
    tokens = tokens + multi_head_attention(first, "a", tokens, 1, keys_after(way, tokens), tokens.shape[1])
    sharp = math.sqrt(beta[1] * math.sqrt(way))
    second = head(e, query=sharp * classes, key=sharp * classes, value=r, output=r.T)
    return multi_head_attention(second, "a", tokens, 1, None, way)[..., way + 1 :]
