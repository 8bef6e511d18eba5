r"""
05 Write a CNN: a transformer at work, layer by layer
=====================================================

**What you will do.** Generate a CNN by hand, one layer after the other, until it equals ``generate`` to the last bit.
Then open a trained generator, look where it looks, and swap parts between the CNNs that it writes.

**What you will learn.** What the transformer sees of an image; why layers are written in order; what batch norm gives
away about other queries; which part of the CNN really depends on the task.

**What you need.** NumPy, tutorials 01 and 02.

Tutorial 02 ended with slices from an encoder's output. Now the whole machine runs: images in, a classifier out.
"""

import dataclasses
import os

import numpy as np
import torch

import mini_ht
from mini_ht.arrays import belongs, fused, relu
from mini_ht.attention import encoder, softmax
from mini_ht.cnn import ConvLayer, GeneratedCNN, linear
from mini_ht.datasets import open_dataset
from mini_ht.episodes import sample
from mini_ht.features import (
    POOLED_SCALE,
    SHARED_STRIDES,
    local_features,
    mean_neighbourhood,
    normed,
    shared_features,
    shared_widths,
)
from mini_ht.generator import conv_weights, generate, generated_slices, layer_tokens, present_classes
from mini_ht.inspection import attention_maps, spread
from mini_ht.kernels import NORM_EPS, conv2d, conv_block, conv_max_pool
from mini_ht.maps import draw_attention, draw_kernels, draw_plane
from mini_ht.norms import towards_learned
from mini_ht.parameters import draw_parameters, load_pretrained, to_numpy, to_torch
from mini_ht.plan import plan
from mini_ht.tokens import placeholder_tokens, read_slices, slices_to_affine, slices_to_conv, support_tokens

folder = os.environ.get("MINI_HT_OMNIGLOT")
images = open_dataset("omniglot" if folder else "glyphs", folder)["test"]  # characters that no generator has seen

# %%
# A fresh generator and one task: five characters, two images each to learn from, three to ask about. All in float64.

config = mini_ht.Config(way=5, channels=4, encoding=16, shared_features=8, taper=True, layers=2)
parameters = draw_parameters(config, seed=0, dtype=np.float64)
task = sample(images, np.random.default_rng(0), 1, way=5, shot=2, queries=3)
support, query, labels = task.support.astype(np.float64), task.query.astype(np.float64), task.labels
print("support", support.shape, "query", query.shape)

# %%
# What the transformer sees of an image
# -------------------------------------
# It never sees pixels, it sees two summaries. The *shared* features look at the image itself: four convs with ReLU,
# then the mean over space. All layers get the same ones. With ``taper``, the first convs, which work on the largest
# maps, are narrow.

print("widths of the shared convs:", shared_widths(config))
x = support[0]  # [n, H, W, C]
for number, stride in enumerate(SHARED_STRIDES):
    name = f"shared.conv{number}"
    x = relu(conv2d(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"], stride, padding=1))
shared = shared_features(parameters, config, support)  # [E, n, 8]
assert np.array_equal(shared[0], x.mean((1, 2)))

# %%
# Most Omniglot presets have ``shared_convs="pooled"``: each conv is followed by a max-pool and ReLU, and an image's map
# is brought to mean 0 and variance 1. Such features learn faster (``docs/recipe.md``). (``"blurred"`` is that
# with a blur before pixels are dropped.)

pooled = dataclasses.replace(config, shared_convs="pooled")
x = support[0]  # [n, H, W, C]
for number in range(4):
    name = f"shared.conv{number}"
    x = normed(relu(conv_max_pool(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])))
    print("after conv", number, x.shape, f"mean {x[0].mean():+.0e}, variance {x[0].var():.3f}")
assert np.allclose(shared_features(parameters, pooled, support)[0], POOLED_SCALE * x.mean((1, 2)))

# %%
# The *local* features look at what a layer will receive: pixels for ``conv1``, the activations behind ``conv1`` for
# ``conv2``. Two more convs; the mean over space of each, taken before its ReLU.

conv1 = plan(config)[0]
one = conv2d(support[0], parameters["conv1.local0.weight"], parameters["conv1.local0.bias"], stride=2)
two = conv2d(relu(one), parameters["conv1.local1.weight"], parameters["conv1.local1.bias"], stride=1)
local = local_features(parameters, conv1, support)  # [E, n, 16]
assert np.allclose(local[0], np.concatenate([one.mean((1, 2)), two.mean((1, 2))], axis=-1))

# %%
# Of the second conv only the mean is wanted, and that is the conv of the mean neighbourhood: so its map is never made.

seen = mean_neighbourhood(relu(one), conv1.local[1])  # [n, 3 * 3 * 16]
weight, bias = (parameters[f"conv1.local1.{part}"] for part in ("weight", "bias"))
assert np.allclose(seen @ weight.reshape(len(seen[0]), -1) + bias, two.mean((1, 2)))

# %%
# One layer
# ---------
# Placeholders before support tokens, through this layer's own encoder, slices out, folded into kernels.
# ``layer_tokens`` does the first of these, ``generated_slices`` the first three.

samples = support_tokens(parameters, conv1, labels, local, shared)  # [E, n, D]
tokens = np.concatenate([placeholder_tokens(parameters, conv1, 1), samples], axis=1)  # [E, placeholders + n, D]
assert np.array_equal(tokens, layer_tokens(parameters, conv1, support, labels, shared, None)[0])
outputs = encoder(parameters, "conv1.generator", tokens, config, None, outputs=conv1.placeholders)
slices = read_slices(parameters, conv1, config, outputs)  # [E, 4, 9]
assert np.array_equal(slices, generated_slices(parameters, config, conv1, support, labels, shared, None))
weight, _ = slices_to_conv(slices, conv1, config)  # [E, 3, 3, 1, 4]

# %%
# One block
# ---------
# The support images now go through the layer just written: conv, ReLU, the largest of each 2 x 2 pixels, and a norm
# that brings each channel to mean 0 and variance 1 over the images at hand. Its scale :math:`\gamma` and offset
# :math:`\beta` are learned, not generated. With ``generate_norm`` in a config slices end in two more numbers, by which
# a task scales and shifts what comes out of the norm, through a gate that starts at 0:

scale, offset = slices_to_affine({"conv1.norm_gate": np.zeros(2)}, slices, conv1)  # [E, 4] each
assert not scale.any() and not offset.any()

x = relu(conv2d(support[0], weight[0], np.zeros(4), padding=1))  # [n, 28, 28, 4]
x = x.reshape(10, 14, 2, 14, 2, 4).max((2, 4))  # [n, 14, 14, 4]
mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
gamma, beta = parameters["conv1.gamma"], parameters["conv1.beta"]
x = (x - mean) / np.sqrt(variance + NORM_EPS) * gamma + beta
block, statistics = conv_block(support, weight, gamma, beta)
assert np.allclose(block[0], x) and np.allclose(statistics[0], mean)

# %%
# All layers, in order
# --------------------
# Why in order? The local features of ``conv2`` are features of what ``conv1`` puts out. So each layer is written for
# the layers before it, as they came out for this task. In the end stand the logits: one slice, one class.

*conv_layers, logits_layer = plan(config)
x, convs = support, []
for layer in conv_layers:
    weight, bias, _ = conv_weights(parameters, config, layer, x, labels, shared, None)
    gamma, beta = parameters[f"{layer.name}.gamma"], parameters[f"{layer.name}.beta"]
    x, statistics = conv_block(x, weight, gamma, beta)
    convs.append(ConvLayer(weight, bias, gamma, beta, statistics))
logits_weight = generated_slices(parameters, config, logits_layer, x, labels, shared, None)  # [E, way, F + 1]

# %%
# Then the same blocks for the queries, and a linear layer:

y = query
for conv in convs:
    y, _ = conv_block(y, conv.weight, conv.gamma, conv.beta)
by_hand = linear(y, logits_weight)  # [E, m, way]

cnn = generate(parameters, config, support, labels)
assert isinstance(cnn, GeneratedCNN) and np.array_equal(cnn.logits_weight, logits_weight)
assert np.array_equal(cnn(query), by_hand)
print("generated by hand and by generate: equal to the last bit")

# %%
# The same on torch
# -----------------
# ``to_torch`` makes tensors that record gradients, and the very same functions run on them; ``fused`` tells where
# torch has one call for what NumPy spells out. So a loss on queries has a gradient in every parameter of the
# generator. That is all the training there is: the generated CNN itself is never trained.

tensors = to_torch(parameters)
logits = generate(tensors, config, torch.tensor(support), torch.tensor(labels))(torch.tensor(query))
assert fused(query) is None and fused(logits) is torch.nn.functional
assert np.allclose(logits.detach().numpy(), by_hand, atol=1e-9)
torch.nn.functional.cross_entropy(logits[0], torch.tensor(task.query_labels[0])).backward()
print(f"gradient of the first encoding's first number: {tensors['conv1.xi'].grad[0, 0]:.1e}")
assert all(np.array_equal(array, parameters[name]) for name, array in to_numpy(tensors).items())

# %%
# A class that is absent
# ----------------------
# The generator always writes a row for each of its classes. For a class without a labelled image that row means
# nothing, so its logit is minus infinity, and the softmax gives it exactly zero.

some = np.where(labels == 3, -1, labels)  # the images of class 3 lose their label
print("images of each class:", belongs(some, config.way).sum(1)[0])  # [E, n, way] -> [E, way] -> [way]
print("present:", present_classes(some, None, config.way)[0])
chances = softmax(generate(parameters, config, support, some)(query))  # [E, m, way]
assert (chances[..., 3] == 0).all() and np.allclose(chances.sum(-1), 1)

# %%
# A trained generator
# -------------------
# ``load_pretrained`` gives a generator that has read 357,360 tasks of 20 Omniglot characters. On built-in glyphs,
# which it has never seen the like of, it is right less often than on Omniglot; the findings below hold on both.

parameters, config = load_pretrained("omniglot")
tasks = sample(images, np.random.default_rng(0), 48, way=20, shot=1, queries=3)
cnns = generate(parameters, config, tasks.support, tasks.labels)  # 48 CNNs


def accuracy(cnn: GeneratedCNN) -> float:
    """Share of right answers on the queries of all tasks."""
    return (cnn(tasks.query).argmax(-1) == tasks.query_labels).mean()


print(f"20-way 1-shot, batch norm {accuracy(cnns):.1%}, support norm {accuracy(cnns.with_norm('support')):.1%}")

# %%
# What batch norm lets a query see
# --------------------------------
# In norm mode ``batch`` the queries are normed by their own mean and variance. So the answer to one depends on the
# others. Predict the extreme: one query alone. Behind the last block its map is 1 x 1. The mean of one number is that
# number, so the norm leaves 0, whatever the image. All queries get the same logits, and of 20 balanced classes 1 in 20
# is right by accident. In mode ``support`` the mean and variance are those of the support images: company cannot
# matter.

one_task = generate(parameters, config, tasks.support[0], tasks.labels[0])
query = tasks.query[0]  # [60, H, W, C]
for norm in ("batch", "support"):
    judge = one_task.with_norm(norm)
    together, halves = judge(query), np.concatenate([judge(query[:30]), judge(query[30:])])
    alone = np.concatenate([judge(image[None]) for image in query])
    right = [(logits.argmax(-1) == tasks.query_labels[0]).mean() for logits in (together, halves, alone)]
    print(f"{norm:7} right: 60 together {right[0]:.0%}, in two halves {right[1]:.0%}, one by one {right[2]:.0%}")
    if norm == "batch":
        assert np.abs(halves - together).max() > 0.1 and np.abs(alone - alone[0]).max() < 1e-4 and right[2] == 0.05
    else:
        assert np.allclose(halves, together, atol=1e-3) and np.allclose(alone, together, atol=1e-3)

# %%
# (In the halves there are ten classes each, so also the company's statistics are others.) Neither mode is wrong, but
# they are different promises. This generator was trained with ``batch`` and loses a little in ``support``. A CNN that
# must classify the one image you hold needs ``support``. An accuracy without its mode says half.
#
# The loss can be had back. The support set is a small sample; what activations look like is known better from the
# thousands of tasks of the training. A generator whose config says ``support`` from the start mixes nine parts of those
# statistics with one of its own:

shrunk = generate(parameters, dataclasses.replace(config, norm="support"), tasks.support, tasks.labels)
print(f"20-way 1-shot, support norm with statistics of training tasks {accuracy(shrunk):.1%}")
assert accuracy(shrunk) > accuracy(cnns.with_norm("support"))
first = shrunk.convs[0]
x, own = conv_block(tasks.support, first.weight, first.gamma, first.beta)
_, mixed = towards_learned(parameters, "conv1", config.shrink, x, own)
assert np.allclose(mixed[0], first.statistics[0])
print(f"mean of channel 0 over 48 tasks: own {own[0][:, 0].std():.4f} apart, mixed {mixed[0][:, 0].std():.4f}")

# %%
# Where does it look?
# -------------------
# Attention weights of the transformer behind the logits layer, for five characters with two images each. What do we
# expect? The paper argues that a class's placeholder should find the images of its class and average them. If the
# generator does otherwise, the rows at the top have no bright pairs.

few = sample(images, np.random.default_rng(0), 1, way=5, shot=2, queries=1)
draw_attention(attention_maps(parameters, config, few.support, few.labels))

# %%
# There they are: in layer 0, each of the first five placeholders puts its weight on the two images of its class. Rows
# 5 to 19 belong to classes that are absent; nobody reads what they become. In layer 1 placeholders look at
# placeholders, hardly at images. Measured over 48 tasks of 20 characters, an even look would give each image 1 / 40:

maps = attention_maps(parameters, config, tasks.support, tasks.labels)
own = np.einsum("ehii->eh", maps.weights[0][:, :, :20, 20:]).mean(0) / 20  # [heads]; image i is that of class i
print("weight on the image of one's class, by head:", own.round(3))
assert (own > 0.9).all()

# %%
# And where do the writers of ``conv1`` look? In layer 0 at placeholders, above all at themselves. In layer 1 one head
# gives the images some weight. But looking is not using: what counts is weight times value, and the values may be
# alike.

maps = attention_maps(parameters, config, tasks.support, tasks.labels, layer="conv1")
for number, weights in enumerate(maps.weights):
    on_images = weights[:, :, :8, 8:].sum(-1).mean((0, 2))  # [heads]
    print(f"conv1, layer {number}: weight on all 20 images together, by head: {on_images.round(3)}")
assert maps.weights[0][:, :, :8, 8:].sum(-1).mean() < 0.05

# %%
# Kernels across tasks
# --------------------
# So look at what they write: nearly the same kernels for every task. Six tasks of different characters, and in the
# last row the spread: how far a weight strays from its mean over tasks, relative to the size of the weights.

draw_kernels(cnns.convs[0].weight[:6])

# %%
# In numbers, as root mean square over a layer's weights, and beside it a fresh generator, which has learned nothing.


def spreads(cnn: GeneratedCNN) -> np.ndarray:
    """Spread over tasks of conv1 .. conv4 and logits, in per cent of the weights' size: [5]."""
    weights = [*(conv.weight for conv in cnn.convs), cnn.logits_weight]
    return np.array([100 * np.sqrt((spread(weight) ** 2).mean()) for weight in weights])


fresh = generate(draw_parameters(config, seed=0), config, tasks.support, tasks.labels)
for layer, before, after in zip(plan(config), spreads(fresh), spreads(cnns), strict=True):
    print(f"{layer.name:6} fresh {before:5.2f} %, trained {after:7.4f} %")
assert spreads(cnns)[:4].max() < 3 and spreads(cnns)[4] > 50

# %%
# Two things stand here. A fresh generator already writes much the same kernels for each task: perhaps what a
# placeholder brings along outweighs what it gathers. And training did not make more of it. In three layers it took the
# rest away; in the logits layer it multiplied it.
#
# The measured claim
# ------------------
# A small spread could still matter. So we operate: give each CNN the conv kernels of the next task, and leave its
# logits rows. If the kernels hold nothing about the task, the accuracy stays. Then the other way round: own kernels,
# the logits rows of the next task. If all knowledge of the task is there, what is left is chance, 5 %.

convs = tuple(dataclasses.replace(conv, weight=np.roll(conv.weight, 1, axis=0)) for conv in cnns.convs)
other_kernels = accuracy(dataclasses.replace(cnns, convs=convs))
other_rows = accuracy(dataclasses.replace(cnns, logits_weight=np.roll(cnns.logits_weight, 1, axis=0)))
print(f"own CNN {accuracy(cnns):.1%}, another task's kernels {other_kernels:.1%}, its logits rows {other_rows:.1%}")
assert abs(other_kernels - accuracy(cnns)) < 0.01 and 0.02 < other_rows < 0.08

# %%
# Honestly: this generator *can* write each kernel for the task, and does not. Its convs are one good feature
# extractor, its logits layer is written anew each time. Of 2,044 numbers, 180 say which task it is.
# ``docs/results.md`` has the same finding for Omniglot. The paper, too, finds that at 8 channels generating the last
# layer alone is enough, and that smaller CNNs gain from generating all. A loss from swapping would have meant kernels
# made for the task; a large spread without a loss, idle variation. Whether another start would end elsewhere, we have
# not measured.
#
# Rows of the logits layer
# ------------------------
# So the rows carry the task. What do they hold: the label's number, or the character? We draw 60 tasks of the same
# five characters. In each, other images stand for them and labels are dealt out anew. If rows were about labels, a
# character's points would lie in five heaps.

five = images.select(np.arange(5) * 7 + 3)
again = sample(five, np.random.default_rng(1), 60, way=5, shot=1, queries=1)
rows = generate(parameters, config, again.support, again.labels).logits_weight[:, :5, :-1].reshape(-1, 8)  # [300, F]
draw_plane(rows, again.classes.reshape(-1), [f"character {number}" for number in range(5)])

# %%
# One heap for each character, whatever its label. In numbers: the share of the rows' variance that lies between
# groups.


def between(groups: np.ndarray) -> float:
    """Variance of the group means over all variance of the rows: 1 if the group says everything, near 0 if nothing."""
    means = np.stack([rows[groups == group].mean(0) for group in range(5)])[groups]  # [300, F]
    return ((means - rows.mean(0)) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()


by_character, by_label = between(again.classes.reshape(-1)), between(again.labels.reshape(-1))
print(f"share of variance between characters {by_character:.2f}, between labels {by_label:.2f}")
assert by_character > 0.5 and by_label < 0.1

# %%
# A row follows the image and forgets the label's number, as a class mean would. Within a heap the points differ,
# because from one image a generator cannot know the whole class. That is the price of one shot.

# %%
# Exercises
# ---------
# Write them into ``exercise_05.py``. Check them with ``pytest -m exercise tutorials/exercises/exercise_05.py``.
#
# **1. Support norm by hand.** A CNN in batch mode keeps what its norms saw of the support set. Classify with that,
# without ``with_norm``.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def support_norm_logits(cnn, query):
#           # conv_block norms with the statistics that it is given.
#           x = query
#           for conv in cnn.convs:
#               x, _ = conv_block(x, conv.weight, conv.gamma, conv.beta, statistics=conv.statistics)
#           return linear(x, cnn.logits_weight)
#
# **2. Freeze the kernels.** Give all tasks the mean of their conv kernels. With the trained generator the accuracy
# stays; then each further task costs 180 numbers. Try it with a fresh one, too.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def frozen(cnn):
#           # The mean over episodes, kept as an axis and repeated; all else stays.
#           convs = []
#           for conv in cnn.convs:
#               mean = np.broadcast_to(conv.weight.mean(0, keepdims=True), conv.weight.shape)
#               convs.append(dataclasses.replace(conv, weight=mean))
#           return dataclasses.replace(cnn, convs=tuple(convs))
#
# **3. Own class, any shot.** How much weight does the placeholder of class c put on all images of class c, on average
# over classes? Labels may come in any order, and several to a class.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def weight_on_own_class(weights, labels, way):
#           # Rows 0 .. way-1 are the placeholders; the last columns are the images.
#           to_images = weights[:, :way, -len(labels) :]  # [heads, way, n]
#           mine = labels[None] == np.arange(way)[:, None]  # [way, n]
#           return (to_images * mine).sum(-1).mean(-1)
