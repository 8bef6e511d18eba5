r"""
02 Make tokens: what the transformer reads and writes
=====================================================

**What you will do.** Turn labelled images into tokens, put placeholders beside them, and fold what comes out at the
placeholders into the weights of a convolution.

**What you will learn.** What a token holds and why part of it is zero; which number of a slice becomes which weight;
how a folding mistake shows; what the sizes of generator and CNN follow from.

**What you need.** NumPy, tutorial 01, and to know what a convolution is.

Attention maps a set of vectors to a set of vectors. A support set is images and labels; a CNN is arrays of weights.
Between them stand two translations: images to *tokens*, and tokens to *slices* of weights. This tutorial is about both.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap

from mini_ht.arrays import as_floats, as_indices, namespace
from mini_ht.config import Config
from mini_ht.datasets import glyphs
from mini_ht.features import local_features, shared_features
from mini_ht.kernels import conv_block
from mini_ht.parameters import draw_parameters, generator_size, parameter_table
from mini_ht.plan import Layer, LocalConv, cnn_size, local_convs, plan, token_width
from mini_ht.tokens import pad_width, placeholder_tokens, read_slices, slices_to_conv, support_tokens

rng = np.random.default_rng(0)

# %%
# The plan
# --------
# A ``Config`` holds every choice. ``plan`` follows from it: one ``Layer`` for each layer of the CNN. ``conv1`` to
# ``conv4`` halve the image, 28 to 14 to 7 to 3 to 1; ``logits`` turns what is left into one score a class.

config = Config(way=5, channels=4, encoding=16, shared_features=8, local_features=4)
for layer in plan(config):
    print(f"{layer.name:6} {layer.size:2} x {layer.size:2}, {layer.inputs} -> {layer.outputs}:", end=" ")
    print(f"{layer.placeholders} slices of {layer.slice_length:2}, token width {layer.token_width}")

# %%
# Read one line. ``conv2`` takes 4 channels to 4 with 3 x 3 kernels: :math:`3 \cdot 3 \cdot 4 \cdot 4 = 144` numbers.
# They are written in 4 *slices* of 36, one for each output channel. The logits layer has one slice a class: a weight
# for each of its 4 inputs and a bias.

conv2, logits = plan(config)[1], plan(config)[-1]
assert isinstance(conv2, Layer) and conv2.placeholders * conv2.slice_length == 3 * 3 * 4 * 4
assert (logits.placeholders, logits.slice_length) == (5, 4 + 1)

# %%
# A support token
# ---------------
# Support image :math:`x_i` with label :math:`c_i` becomes
#
# .. math::
#
#    \left[\, \xi(c_i) \;|\; \mathrm{local}_i \;|\; \mathrm{shared}_i \;|\; 0 \,\right]
#
# The *encoding* :math:`\xi(c)` is a learned vector for each label. The features are learned summaries of the image.
# Tutorial 05 opens them; here they are two black boxes. ``draw_parameters`` makes fresh numbers for all that is
# learned.

parameters = draw_parameters(config, seed=0)
images = glyphs(0, classes=5).select([0, 1, 2, 3, 4])
support = images.pixels[images.starts][None].astype(np.float32) / 255  # [E, n, H, W, C]: one image of each class
support = np.concatenate([support, support[:, :1]], axis=1)  # and the first one again ...
labels = as_indices(np.array([[0, 1, 2, 3, 4, -1]], dtype=np.int8))  # [E, n]: ... without its label

conv1 = plan(config)[0]
local = local_features(parameters, conv1, support)  # [E, n, 8]
shared = shared_features(parameters, config, support)  # [E, n, 8]
tokens = support_tokens(parameters, conv1, labels, local, shared)  # [E, n, D]
print(labels.dtype, tokens.shape)

# %%
# The table of :math:`\xi` has a row more than there are classes: :math:`\hat\xi`, "no label". The label -1 picks it,
# as -1 means the last row to NumPy and to torch. So image 0 and its copy differ in the first 16 numbers and no others.

xi = parameters["conv1.xi"]  # [way + 1, d]
assert xi.shape == (5 + 1, 16)
assert np.array_equal(tokens[0, 5, :16], xi[5]) and np.array_equal(tokens[0, 0, :16], xi[0])
assert np.array_equal(tokens[0, 5, 16:], tokens[0, 0, 16:])

# %%
# One source, two libraries
# -------------------------
# All of this also runs on torch, from the same source. ``namespace(x)`` is the library that ``x`` belongs to. Where
# the two spell a thing differently, there is a word for it: ``as_indices`` is int64 in both, because torch takes 8-bit
# integers for masks or refuses them; ``as_floats`` casts to the dtype of another array. A mean for each class needs
# all three:


def class_means(x, labels):
    """x [n, F], labels [n] in 0 .. 4 -> [5, F], in whichever library they came."""
    member = as_floats(namespace(x).stack([as_indices(labels) == c for c in range(5)]), x)  # [5, n]
    return member @ x / member.sum(-1)[:, None]


x, small = shared[0], np.array([0, 1, 2, 3, 4, 0], dtype=np.int8)
assert np.allclose(class_means(x, small), class_means(torch.tensor(x), torch.tensor(small)).numpy())

# %%
# A placeholder, and why it is mostly zeros
# -----------------------------------------
# For slice :math:`i` there is a *placeholder* token :math:`[\mu(i) \;|\; 0]`. A learned name, then nothing. It asks
# the support tokens for what it needs, and what it gathers is added to it (tutorial 01: a residual connection). So the
# zeros are paper to write on: the slice is read from there when the encoder is done.

blanks = placeholder_tokens(parameters, conv1, episodes=1)  # [E, placeholders, D]
assert np.array_equal(blanks[0, :, :16], parameters["conv1.mu"]) and not blanks[0, :, 16:].any()
# In the logits layer, mu of class c starts as xi of class c: like finds like.
assert np.array_equal(parameters["logits.mu"], parameters["logits.xi"][:5])

# %%
# Zeros also make tokens equally wide, which a set of vectors needs. A matrix does not feel them: zero times any weight
# is zero. (The layer norm does. It brings the padded token as a whole to mean 0 and variance 1.)

narrow, matrix = rng.standard_normal((1, 3, 20)), parameters["conv1.generator.layer0.query"]
assert np.allclose(pad_width(narrow, conv1.token_width) @ matrix, narrow @ matrix[:20])

# %%
# How wide is a token?
# --------------------
# Room for the encoding, beside room for the features or for the slice, whichever is wider:
#
# .. math::
#
#    D = d + \max(\mathrm{features}, \mathrm{slice\ length})
#
# The features are 8 shared and 4 from each of the layer's own convs, of which ``local_convs`` plans two where the map
# is large enough. Predict D for ``conv2``: :math:`16 + \max(8 + 2 \cdot 4, 36) = 52`.

own = local_convs(conv2.size, conv2.inputs, config.local_features, depth=2)
assert own[0] == LocalConv(kernel=3, stride=2, inputs=4, outputs=4) and len(own) == 2
assert token_width(config, conv2.slice_length, own) == conv2.token_width == 52

# %%
# From slices to kernels
# ----------------------
# Say the encoder has run. ``read_slices`` cuts coordinates :math:`d` to :math:`d + \mathrm{slice\ length}` out of each
# placeholder's output, and ``slices_to_conv`` folds them. One token is one output channel, its numbers in the order
# row, column, input channel.

outputs = rng.standard_normal((1, 4, conv2.token_width))  # [E, placeholders, D], as if from an encoder
slices = read_slices(parameters, conv2, config, outputs)  # [E, 4, 36]
weight, bias = slices_to_conv(slices, conv2, config)  # [E, 3, 3, Cin, Cout], and no bias in this config
row, column, channel_in, channel_out = 2, 0, 3, 1
place = 16 + (row * 3 + column) * 4 + channel_in  # in the token
assert bias is None and weight[0, row, column, channel_in, channel_out] == outputs[0, channel_out, place]

# %%
# The paper tried another *allocation*: one token is one of the nine positions in the kernel, for all channels.

spatial = Config(**{**vars(config), "allocation": "spatial"})
assert (plan(spatial)[1].placeholders, plan(spatial)[1].slice_length) == (9, 4 * 4)

# %%
# A mistake that no shape check finds
# -----------------------------------
# Here is a third way to fold. It stacks the slices as columns and reinterprets the memory. Its shapes are right, it
# trains, and a public reimplementation does it. What is wrong?


def folded_wrongly(slices):
    """Slices [E, placeholders, length] -> [E, 3, 3, Cin, Cout], mixed up."""
    columns = slices.swapaxes(1, 2)  # [E, length, placeholders]
    kernels = columns.reshape(1, 4, 4, 3, 3)  # [E, Cout, Cin, 3, 3] by name, but not in fact
    return np.moveaxis(kernels, (1, 2), (4, 3))


# %%
# Ask which token wrote which weight. We fill every slice with the number of its token and fold.


def writers(fold, placeholders: int, length: int) -> np.ndarray:
    """Which token wrote each weight: -> [Cout, 36], kernel positions one after the other."""
    numbered = np.broadcast_to(np.arange(placeholders)[None, :, None], (1, placeholders, length))
    return np.moveaxis(fold(numbered)[0], -1, 0).reshape(4, 36)


def folded(slices):
    """As the library folds."""
    return slices_to_conv(slices, conv2, config)[0]


by_position = writers(lambda slices: slices_to_conv(slices, plan(spatial)[1], spatial)[0], 9, 16)
folds = {"output": writers(folded, 4, 36), "spatial": by_position, "mixed up": writers(folded_wrongly, 4, 36)}


def draw_writers(folds: dict[str, np.ndarray]) -> plt.Figure:
    """For each way to fold: a row for each output channel, a square for each weight in its token's colour."""
    colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000", "#999999"]
    figure, panels = plt.subplots(3, 1, figsize=(7, 4.2), layout="constrained", sharex=True)
    for axes, (name, who) in zip(panels, folds.items(), strict=True):
        axes.imshow(who, cmap=ListedColormap(colours), vmin=-0.5, vmax=8.5)
        axes.set_xticks(np.arange(0, 37, 4) - 0.5, minor=True)
        axes.set_yticks(np.arange(5) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.set(title=name, yticks=range(4), ylabel="output channel")
    panels[-1].set_xticks(np.arange(9) * 4 + 1.5, [f"({i // 3}, {i % 3})" for i in range(9)])
    panels[-1].set_xlabel("kernel position (row, column), four input channels each; a colour is a token")
    return figure


draw_writers(folds)

# %%
# The measured claim
# ------------------
# Predict: if one placeholder's output changes, exactly one output channel of the convolution changes. With the wrong
# fold, number :math:`l` of slice :math:`p` lands in channel :math:`(4 l + p) / 36`, rounded down. As :math:`l` runs to
# 35, that takes all four values: every channel changes. We measure on what the convolution does to images, 100 times
# each.


def channels_that_change(fold) -> np.ndarray:
    """How many output channels of a conv block feel a change of one placeholder's output: [trials]."""
    x, ones, zeros = rng.standard_normal((1, 3, 14, 14, 4)), np.ones(4), np.zeros(4)
    counts = []
    for _ in range(100):
        slices = rng.standard_normal((1, 4, 36))
        other = slices.copy()
        other[0, rng.integers(4)] += rng.standard_normal(36)
        before, after = (conv_block(x, fold(s), ones, zeros)[0] for s in (slices, other))  # [E, N, 7, 7, 4]
        counts.append((np.abs(after - before).max((0, 1, 2, 3)) > 1e-9).sum())
    return np.array(counts)


right, wrong = channels_that_change(folded), channels_that_change(folded_wrongly)
print("channels that change, right and wrong:", np.unique(right), np.unique(wrong))
assert (right == 1).all() and (wrong == 4).all()

# %%
# Does it matter, if it trains? The wrong fold still reaches every weight. But a token then no longer stands for a
# thing: swapping two placeholders does not swap two channels, and one token cannot decide on one kernel. Shapes,
# losses and gradients all look healthy. Only a law shows it: *one token, one channel*.

swap = [1, 0, 2, 3]
assert np.array_equal(folded(slices[:, swap]), weight[..., swap])
assert not np.array_equal(folded_wrongly(slices[:, swap]), folded_wrongly(slices)[..., swap])

# %%
# Reading through a linear map
# ----------------------------
# A slice cut from the token makes the token as wide as the slice, and a slice has 9 numbers for every input channel.
# With ``readout="linear"`` a learned matrix takes each output, D wide, to its slice. Now D only has to hold the
# features.

linear = Config(**{**vars(config), "readout": "linear"})
layer, learned = plan(linear)[1], draw_parameters(linear, seed=0)
outputs = rng.standard_normal((1, 4, layer.token_width))
by_hand = outputs @ learned["conv2.readout.weight"] + learned["conv2.readout.bias"]
assert np.array_equal(read_slices(learned, layer, linear, outputs), by_hand) and by_hand.shape == (1, 4, 36)
print("tokens of conv2:", conv2.token_width, "wide read from the token,", layer.token_width, "through a map")

# %%
# How many numbers?
# -----------------
# Two counts. The CNN of one task, by hand: conv weights, a learned scale and offset for each channel's norm, logits.
# The generator: ``parameter_table`` names every array, its shape and its start; ``generator_size`` adds them up.

convs = 3 * 3 * (1 * 4 + 3 * 4 * 4)
assert cnn_size(config) == convs + 4 * 4 * 2 + 5 * (4 + 1)
table = parameter_table(config)
assert table["conv2.generator.layer0.query"] == ((52, 52), 1 / math.sqrt(52))  # shape, standard deviation of the start
assert generator_size(config) == sum(math.prod(shape) for shape, _ in table.values())
print(f"this generator: {generator_size(config):,} numbers; each CNN that it writes: {cnn_size(config)}")

# %%
# A transformer's matrices are D x D. So once the slice rules D, twice the channels means nearly four times the
# generator. Predict from 32 to 64 channels: somewhat below 4 read from the token, because encoding and the small
# layers do not grow; not far above 1 through a map, because only the map grows.


def growth(readout: str) -> float:
    """How many times as large the generator of a 64-channel CNN is as that of a 32-channel one."""
    large, small = (generator_size(Config(channels=channels, readout=readout)) for channels in (64, 32))
    return large / small


from_token, through_map = growth("slice"), growth("linear")
print(f"32 to 64 channels: generator x {from_token:.2f} from the token, x {through_map:.2f} through a map")
assert 3 < from_token < 4 and 1 < through_map < 1.5

# %%
# Exercises
# ---------
# Write them into ``exercise_02.py``. Check them with ``pytest -m exercise tutorials/exercises/exercise_02.py``.
#
# **1. One token by hand.** Put one support image's token together from its parts. Mind the order, and the label -1.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def support_token(xi, label, local, shared, width):
#           # xi has a row more than there are classes; -1 is that last row.
#           parts = np.concatenate([xi[label], local, shared])
#           return np.concatenate([parts, np.zeros(width - len(parts))])
#
# **2. Unfold.** Go back from conv weights to slices, for "output" allocation with generated biases: the slice of a
# channel is its kernel and then its bias. Folding your slices must return what you started from.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def conv_to_slices(weight, bias):
#           # The channel becomes the token; what is left is already in the order row, column, input channel.
#           kernels = np.moveaxis(weight, -1, 1)  # [E, Cout, 3, 3, Cin]
#           kernels = kernels.reshape(*kernels.shape[:2], -1)  # [E, Cout, 9 Cin]
#           return np.concatenate([kernels, bias[..., None]], axis=-1)
#
# **3. What a wide token costs.** Derive how many numbers one encoder layer has for tokens D wide, when keys, values
# and the inner feed-forward layer are D wide, too. The names in ``parameter_table`` tell you what to count.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def encoder_layer_numbers(width):
#           # Six matrices; a bias for each but the key; gain and offset of two norms.
#           return 6 * width**2 + 5 * width + 4 * width
