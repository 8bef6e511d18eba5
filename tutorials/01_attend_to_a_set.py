r"""
01 Attend to a set: why order does not matter
=============================================

**What you will do.** Build self-attention from a softmax and two matrix products, stack it into the encoder of a
HyperTransformer, and shuffle its input.

**What you will learn.** What queries, keys and values are; why attention treats its input as a set; what a position
code would break; why tokens may differ in number from task to task.

**What you need.** NumPy, and to have met matrix products and the softmax.

A HyperTransformer reads a few labelled images, the *support set*, and writes the weights of a small CNN. A set has no
first and no last member. So whatever reads it should give the same answer for every order. Attention does.
"""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np

import mini_ht
from mini_ht.attention import (
    activate,
    attention,
    dense,
    encoder,
    encoder_layer,
    feed_forward,
    layer_norm,
    multi_head_attention,
    sigmoid_attention,
    softmax,
    split_heads,
)

rng = np.random.default_rng(0)

# %%
# A softmax makes a weighted mean
# -------------------------------
# Scores can be any numbers. The softmax turns them into weights: positive, and with sum 1. A score of minus infinity
# gets weight 0, which is how a mask works.

scores = np.array([2.0, 1.0, -1.0, -np.inf])
weights = softmax(scores)
print(weights.round(3))
assert np.isclose(weights.sum(), 1) and weights[-1] == 0

# %%
# Query, key, value
# -----------------
# Think of a library. Each book has a *key*, its label, and a *value*, its content. You bring a *query*. You read every
# book, more of those whose key is like your query:
#
# .. math::
#
#    \mathrm{attention}(Q, K, V) = \mathrm{softmax}\left(\frac{Q K^T}{\sqrt{w}}\right) V
#
# with :math:`w` the width of queries and keys. The root keeps the scores near size 1 when the width grows.
# Here are three books. The query is five times the key of the second.

key = np.eye(3)  # [T, width]
value = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])  # [T, value width]
query = 5 * key[1:2]  # [Tq, width]
print(attention(query, key, value).round(2))

# %%
# By hand, so that nothing is hidden:

by_hand = softmax(query @ key.T / np.sqrt(3)) @ value
assert np.allclose(attention(query, key, value), by_hand)

# %%
# Softmax makes the books compete. With ``attention="sigmoid"`` in a config each gets a weight of its own between 0 and
# 1, so a second copy of the whole shelf counts twice, where softmax does not notice it.

twice = np.tile(key, (2, 1)), np.tile(value, (2, 1))  # [2 T, width]
assert np.allclose(attention(query, *twice), by_hand)
assert np.allclose(sigmoid_attention(query, *twice), 2 * sigmoid_attention(query, key, value))

# %%
# Shuffle the books
# -----------------
# Move keys and values together to other shelves. The answer is a sum over books, so it stays.

order = rng.permutation(3)
assert np.allclose(attention(query, key[order], value[order]), by_hand)

# %%
# Self-attention: every token asks
# --------------------------------
# In *self*-attention one set of tokens :math:`x` asks, labels and answers. Three matrices make queries, keys and values
# from it. Several *heads* do this side by side, each in its own slice of the width; a last matrix joins them.
#
# Parameters of ``mini_ht`` are a flat mapping from names to arrays. Here is one layer of 8-wide tokens with 2 heads.

width, heads = 8, 2
parameters = {
    f"a.{name}": rng.standard_normal((width, width)) / np.sqrt(width) for name in ("query", "key", "value", "output")
}
parameters |= {f"a.{name}_bias": np.zeros(width) for name in ("query", "value", "output")}

x = rng.standard_normal((1, 5, width))  # [E, T, D]: one episode of five tokens
y = multi_head_attention(parameters, "a", x, heads, mask=None, outputs=5)  # [E, T, D]
print(x.shape, "->", y.shape)

# %%
# The same in four steps. ``dense`` is a matrix product and a bias; ``split_heads`` moves the heads to the front.

q, v = dense(parameters, "a.query", x), dense(parameters, "a.value", x)  # [E, T, D]
k = x @ parameters["a.key"]  # a bias would add the same to all scores of a query: the softmax does not feel it
mixed = attention(*(split_heads(part, heads) for part in (q, k, v)))  # [E, heads, T, width]
joined = mixed.swapaxes(1, 2).reshape(1, 5, width)  # [E, T, D]
assert np.allclose(dense(parameters, "a.output", joined), y)

# %%
# Shuffle the tokens and the answers shuffle with them: each token keeps its own. This is *equivariance*.

order = rng.permutation(5)
shuffled = multi_head_attention(parameters, "a", x[:, order], heads, None, 5)
assert np.allclose(shuffled, y[:, order])

# %%
# A layer, a stack of layers
# --------------------------
# An encoder layer is attention and then a small network on each token alone, each added to what came in. A layer norm
# in front brings each token to mean 0 and variance 1. None of that looks at other tokens, so the law stands.

one = layer_norm(x, gain=np.ones(width), offset=np.zeros(width))
assert np.allclose(one.mean(-1), 0) and np.allclose(one.var(-1), 1, atol=1e-4)
print("the activation between its two dense layers:", activate(np.array([-1.0, 0.0, 1.0]), "relu"))

# %%
# ``draw_parameters`` makes all parameters of a generator. We take those of its logits layer, in float64, so that
# rounding does not hide anything, and nudge every number, so that no zero or one is left.

config = mini_ht.Config(way=5, encoding=8, layers=2, shared_features=8, local_features=8)
parameters = {
    name: array + 0.1 * rng.standard_normal(array.shape)
    for name, array in mini_ht.draw_parameters(config, seed=1, dtype=np.float64).items()
}
name = "logits.generator"
width = parameters[f"{name}.layer0.query"].shape[0]
tokens = rng.standard_normal((1, 12, width))  # [E, T, D]

hidden = feed_forward(parameters, f"{name}.layer0", tokens, config.activation)
layer = encoder_layer(parameters, f"{name}.layer0", tokens, config, mask=None, outputs=12, memory=None)
print("one token of 12:", tokens.shape, "after a layer:", layer.shape, "its network alone:", hidden.shape)

# %%
# The measured claim
# ------------------
# The HyperTransformer puts *placeholder* tokens before the support tokens and keeps only what comes out at the
# placeholders. So shuffling the support tokens must not change the output at all. We measure it: five placeholders,
# seven support tokens, 200 shuffles. Beside it we do what language models do: add a code of the position to each token.


def change_after_shuffle(position_code: float, shuffles: int = 200) -> np.ndarray:
    """Largest change of the five placeholders' outputs, relative to their size, for each shuffle: [shuffles]."""
    positions = np.arange(12)[:, None] / 10.0 ** (np.arange(width) / width)  # [T, D]
    code = position_code * np.sin(positions)

    def outputs(x: np.ndarray) -> np.ndarray:
        return encoder(parameters, name, x + code, config, mask=None, outputs=5)  # [E, 5, D]

    wanted = outputs(tokens)
    changes = []
    for _ in range(shuffles):
        order = np.concatenate([np.arange(5), 5 + rng.permutation(7)])
        changes.append(np.abs(outputs(tokens[:, order]) - wanted).max() / np.abs(wanted).max())
    return np.array(changes)


without, with_code = change_after_shuffle(0.0), change_after_shuffle(0.3)
print(f"largest change without position codes {without.max():.1e}, median with them {np.median(with_code):.2f}")
assert without.max() < 1e-12
assert np.median(with_code) > 1e-3


# %%
def draw_shuffles(without: np.ndarray, with_code: np.ndarray) -> plt.Figure:
    """Two rows of points: how much the output changed for each shuffle, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    height = np.random.default_rng(0).uniform(-0.25, 0.25, len(without))
    axes.scatter(np.maximum(without, 1e-17), 1 + height, s=8, color="#0072B2")
    axes.scatter(np.maximum(with_code, 1e-17), height, s=8, color="#D55E00", marker="s")
    axes.axvline(2.2e-16, color="#57606a", linestyle=":", linewidth=1)
    axes.text(2.6e-16, 1.38, "float64 rounding", color="#57606a", fontsize=8)
    axes.set(xscale="log", yticks=[0, 1], yticklabels=["with position codes", "without (HyperTransformer)"])
    axes.set(xlabel="largest relative change of the placeholders' outputs", ylim=(-0.5, 1.6))
    return figure


draw_shuffles(without, with_code)

# %%
# Sets of any size
# ----------------
# Nothing above has the number of tokens in it. The same parameters read 3 support tokens or 300. And a *mask* makes
# tokens invisible, so that tasks of different size fit into one batch: ten extra tokens, masked, change nothing.

padded = np.concatenate([tokens, 100 * rng.standard_normal((1, 10, width))], axis=1)  # [E, T + 10, D]
mask = np.arange(22)[None] < 12  # [E, T + 10]
assert np.allclose(
    encoder(parameters, name, padded, config, mask, outputs=5),
    encoder(parameters, name, tokens, config, None, outputs=5),
)

# %%
# A choice the released code makes otherwise: it norms *after* each sum (post-norm). The law holds there, too.

post = dataclasses.replace(config, encoder="post-norm")
order = np.concatenate([np.arange(5), 5 + rng.permutation(7)])
a, b = (encoder(parameters, name, x, post, None, outputs=5) for x in (tokens, tokens[:, order]))
assert np.allclose(a, b)

# %%
# Exercises
# ---------
# Write them into ``tutorials/exercises/exercise_01.py``; ``pytest -m exercise tutorials/exercises/exercise_01.py``
# checks them.
#
# **1. A mean by attention.** Choose queries and keys such that attention returns the plain mean of the values.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def mean_by_attention(value):
#           # Equal scores give equal weights.
#           zeros = np.zeros((len(value), 1))
#           return attention(zeros[:1], zeros, value)[0]
#
# **2. Twice is once.** Show that a support set in which every token stands twice gives the same answer: write attention
# for tokens that carry a count, without repeating any.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def counted_attention(query, key, value, counts):
#           # n equal terms in the softmax are one term times n: add log n to its score.
#           scores = query @ key.T / np.sqrt(key.shape[-1]) + np.log(counts)
#           return softmax(scores) @ value
#
# **3. What order would need.** Write a score that lets a token attend only to tokens before itself and to itself, as
# language models do. Is the result still equivariant?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def causal_attention(query, key, value):
#           # A lower triangle as mask. Shuffled tokens see other predecessors: equivariance is gone.
#           mask = np.tri(len(key), dtype=bool)
#           return attention(query, key, value, mask)
