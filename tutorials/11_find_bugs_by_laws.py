r"""
11 Find bugs by laws: property-based tests
==========================================

**What you will do.** State what must hold for every support set, let Hypothesis look for one that breaks it, and
plant bugs of real HyperTransformer code to see which law finds which.

**What you will learn.** What a property-based test is; laws that need no right answer; why they run in float64; what
shrinking does; why small worlds find more than large ones; what laws miss.

**What you need.** Tutorial 01 for attention and sets. ``hypothesis``, which ``pip install -e '.[test]'`` brings.

A generator of CNNs is hard to test. Nobody knows the right weights for a task, so there is nothing to compare with.
And wrong code trains, too: worse, but it trains. Yet much is known about how answers to *related* tasks are related.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from mini_ht import Config, attention, draw_parameters, generate, generator
from mini_ht.arrays import as_indices
from mini_ht.datasets import ImageSet
from mini_ht.episodes import sample
from mini_ht.features import shared_features
from mini_ht.generator import present_classes
from mini_ht.plan import plan
from mini_ht.tokens import read_slices, slices_to_conv, support_tokens

full = os.environ.get("TUTORIAL_SIZE") == "full"
options = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# %%
# The first law
# -------------
# An example says: for *these* labels, expect *that*. A law says: for *all* labels, expect a relation.
# ``present_classes`` tells which classes have a labelled image. The law: class ``c`` is present exactly if ``c`` stands
# among the labels. ``@given`` draws labels, -1 for unlabelled ones included, and calls the test 100 times. The labels
# come as small integers of one byte, as people store them; ``as_indices`` makes the wide ones that index arrays.


@options
@given(labels=st.lists(st.integers(-1, 4), min_size=1))
def law_of_presence(labels):
    narrow = np.array([labels], np.int8)  # [E, n]
    present = present_classes(as_indices(narrow), None, 5)  # [E, 5]
    assert present[0].tolist() == [c in labels for c in range(5)]


law_of_presence()

# %%
# Now a false belief: in five images of five classes, every class is present. Hypothesis finds a counterexample and then
# *shrinks* it. It tries shorter lists and smaller numbers as long as the law still fails. What is left shows the reason
# and nothing else: labels may repeat.


@options
@given(labels=st.lists(st.integers(0, 4), min_size=5, max_size=5))
def false_belief(labels):
    assert present_classes(np.array([labels]), None, 5).all()


try:
    false_belief()
except AssertionError as error:
    print("\n".join(error.__notes__))

# %%
# A small world
# -------------
# For the generator we draw four numbers: sizes, and a seed from which NumPy fills all arrays. Counterexamples are then
# short to read, and shrinking goes towards small tasks. Sizes are tiny on purpose; we will see why.

WORLD = {"way": st.integers(2, 4), "channels": st.integers(1, 4), "images": st.integers(1, 5)}
WORLD["number"] = st.integers(0, 1000)


def make(way: int, channels: int, images: int, number: int) -> tuple[Any, ...]:
    """Config, parameters, support [n, 8, 8, 1], labels [n] and query [3, 8, 8, 1] of a small task, in float64."""
    rng = np.random.default_rng(number)
    sizes = {"blocks": 2, "image_size": 8, "encoding": 8, "layers": 1, "shared_features": 4, "local_features": 3}
    config = Config(way=way, channels=channels, norm="support", **sizes)
    parameters = draw_parameters(config, number, np.float64)
    # As after some training: no number is still at its start of 0 or 1.
    parameters = {name: array + 0.1 * rng.standard_normal(array.shape) for name, array in parameters.items()}
    return config, parameters, rng.random((images, 8, 8, 1)), rng.integers(0, way, images), rng.random((3, 8, 8, 1))


def weights(cnn: Any) -> np.ndarray:
    """All that was generated, as one vector."""
    return np.concatenate([array.ravel() for array in (*(conv.weight for conv in cnn.convs), cnn.logits_weight)])


def assert_close(a: np.ndarray, b: np.ndarray) -> None:
    assert np.allclose(a, b, rtol=1e-9, atol=1e-9)  # rounding is far below; -inf, for an absent class, equals itself


# %%
# Six laws
# --------
# None of them knows a right weight. Five relate two runs of the generator: such laws are called *metamorphic*. The
# sixth looks at one step of it, from the transformer's outputs to a kernel: one placeholder is one output channel.
# (They call functions through the module ``generator``, so that a bug planted there is seen.)


def order(**world: int) -> None:
    """Support images in another order give the same weights."""
    config, parameters, support, labels, _ = make(**world)
    other = np.random.default_rng(world["number"]).permutation(len(labels))
    again = generator.generate(parameters, config, support[other], labels[other])
    assert_close(weights(again), weights(generator.generate(parameters, config, support, labels)))


def names(**world: int) -> None:
    """Classes renamed, with their encodings xi and placeholders mu: the logits trade places, and that is all."""
    config, parameters, support, labels, query = make(**world)
    roll = np.roll(np.arange(config.way), 1)  # the new class c is the old class roll[c]
    rows = np.append(roll, config.way)  # the last row of xi is that of unlabelled images
    renamed = {name: array[rows] if name.endswith(".xi") else array for name, array in parameters.items()}
    renamed["logits.mu"] = parameters["logits.mu"][roll]
    logits = generator.generate(parameters, config, support, labels)(query)  # [m, way]
    assert_close(generator.generate(renamed, config, support, np.argsort(roll)[labels])(query), logits[:, roll])


def padding(**world: int) -> None:
    """Masked images change no weight, whatever they show."""
    config, parameters, support, labels, query = make(**world)
    mask = np.arange(len(labels) + 3) < len(labels)  # [n + 3]
    padded, more = np.concatenate([support, query]), np.concatenate([labels, [0, 1, -1]])
    again = generator.generate(parameters, config, padded, more, mask)
    assert_close(weights(again), weights(generator.generate(parameters, config, support, labels)))


def batch(**world: int) -> None:
    """A task in a batch has the weights that it has alone."""
    config, parameters, support, labels, _ = make(**world)
    both = np.stack([support[::-1] ** 2, support]), np.stack([labels, labels])  # [2, n, 8, 8, 1] and [2, n]
    together = generator.generate(parameters, config, *both).logits_weight[1]
    assert_close(together, generator.generate(parameters, config, support, labels).logits_weight[0])


def queries(**world: int) -> None:
    """In norm mode "support", a query's logits do not depend on the queries beside it."""
    config, parameters, support, labels, query = make(**world)
    cnn = generator.generate(parameters, config, support, labels)
    assert_close(cnn(query), np.concatenate([cnn(query[i : i + 1]) for i in range(3)]))


def slices(**world: int) -> None:
    """What comes out at one placeholder decides about one output channel and no other."""
    config, parameters, *_ = make(**world)
    layer = plan(config)[1]  # the second conv
    outputs = np.random.default_rng(0).standard_normal((1, layer.placeholders, layer.token_width))
    moved = outputs + (np.arange(layer.placeholders) == layer.placeholders - 1)[:, None]  # the last one moves
    read = (read_slices(parameters, layer, config, x) for x in (outputs, moved))
    one, other = (generator.slices_to_conv(slices, layer, config)[0] for slices in read)  # [1, 3, 3, Cin, Cout]
    assert (one != other).any((0, 1, 2, 3)).tolist() == [False] * (layer.outputs - 1) + [True]


LAWS = (order, names, padding, batch, queries, slices)

# %%
# ``hunt`` hands a law to Hypothesis, counts the examples up to the first that fails, and keeps the shrunk one. All six
# laws hold.


def hunt(law: Callable[..., None], world: dict[str, Any] = WORLD, start: int = 0, **more: Any) -> tuple[int, str]:
    """(number of the first example that fails, or 0; the smallest failing example as text)."""
    tried, first = 0, 0

    def counted(**drawn):
        nonlocal tried, first
        tried += 1
        try:
            law(**drawn)
        except AssertionError:
            first = first or tried
            raise

    counted.__name__ = getattr(law, "__name__", "law")  # what the report calls it
    try:
        seed(start)(settings(options, **more)(given(**world)(counted)))()
    except AssertionError as error:
        return first, error.__notes__[0]
    return 0, ""


assert [hunt(law, max_examples=20)[0] for law in LAWS] == [0] * 6

# %%
# Why float64
# -----------
# "The same weights" means: up to rounding. A sum in another order rounds differently, by parts in :math:`2^{53}` in
# float64 and :math:`2^{24}` in float32. So the errors should differ by :math:`2^{29}`, five hundred million times, and
# a law in float32 has to forgive that much more.


def shuffling_error(dtype: Any, number: int) -> float:
    """Relative change of the weights when the support images are reversed."""
    config, parameters, support, labels, _ = make(3, 4, 5, number)
    parameters = {name: array.astype(dtype) for name, array in parameters.items()}
    one, other = (weights(generate(parameters, config, support.astype(dtype)[::d], labels[::d])) for d in (1, -1))
    return float(np.abs(one - other).max() / np.abs(one).max())


errors = [np.median([shuffling_error(dtype, number) for number in range(20)]) for dtype in (np.float32, np.float64)]
print(f"rounding: float32 {errors[0]:.0e}, float64 {errors[1]:.0e}, ratio {errors[0] / errors[1]:.0e}")
assert 1e7 < errors[0] / errors[1] < 1e10

# %%
# Planted bugs
# ------------
# **A scrambled kernel.** A public port of the released code stacks the slices along the wrong axis and then reshapes.
# All numbers are there, each channel just gets some of every slice. The shape is right. With equal slices even the
# values are.


def scrambled(slices, layer, config):
    shape = (len(slices), layer.outputs, 3, 3, layer.inputs)
    return np.moveaxis(slices.swapaxes(1, 2).reshape(shape), 1, -1), None


layer, config = plan(Config(blocks=2))[1], Config(blocks=2)
for example in (np.zeros((2, 8, 72)), np.full((2, 8, 72), 0.5)):  # two example-based tests
    assert scrambled(example, layer, config)[0].shape == (2, 3, 3, 8, 8)
    assert (scrambled(example, layer, config)[0] == slices_to_conv(example, layer, config)[0]).all()

# %%
# Which law finds it? One that says what a slice *means*. Hypothesis reports the shrunk example, and which of its
# numbers do not matter. Two channels do: with one there is nothing to mix. One example of four has one channel, so we
# expect a find among the first few examples.

with mock.patch.object(generator, "slices_to_conv", scrambled):
    first, smallest = hunt(slices)
print(f"found by example {first}\n{smallest}")
assert "channels=2" in smallest and first <= 10

# %%
# **More bugs.** Statistics of the query batch where the CNN was to stand alone, as in the released code. A mask that
# attention forgets. Shared features centred over the batch. A code of the position added to tokens, as in language
# models, here so small that it would drown in float32's rounding. The label as a number in the token. And no root under
# the scores of attention.


def query_statistics(*arguments):
    return generate(*arguments).with_norm("batch")


def forgotten_mask(parameters, name, x, config, mask, outputs):
    return attention.encoder(parameters, name, x, config, None, outputs)


def batch_mean(*arguments):
    features = shared_features(*arguments)  # [E, n, width]
    return features - features.mean((0, 1))


def positions(*arguments):
    tokens = support_tokens(*arguments)  # [E, n, D]
    tokens[..., 0] += 1e-6 * np.arange(tokens.shape[1])
    return tokens


def label_as_number(parameters, layer, labels, *features):
    tokens = support_tokens(parameters, layer, labels, *features)
    tokens[..., 0] += 0.1 * labels
    return tokens


def no_root(query, key, value, mask=None, plain=attention.attention):
    return plain(query * query.shape[-1] ** 0.5, key, value, mask)


BUGS = {  # and where they are planted
    scrambled: (generator, "slices_to_conv"),
    query_statistics: (generator, "generate"),
    forgotten_mask: (generator, "encoder"),
    batch_mean: (generator, "shared_features"),
    positions: (generator, "support_tokens"),
    label_as_number: (generator, "support_tokens"),
    no_root: (attention, "attention"),
}
repeats, examples = (10, 40) if full else (3, 10)
needed = np.full((len(BUGS), len(LAWS)), np.inf)  # median number of examples
for row, (bug, place) in enumerate(BUGS.items()):
    with mock.patch.object(*place, bug):
        for column, law in enumerate(LAWS):
            hunts = [hunt(law, start=k, max_examples=examples, phases=[Phase.generate])[0] for k in range(repeats)]
            needed[row, column] = np.median([first or np.inf for first in hunts])


# %%
def draw_needed(needed: np.ndarray) -> plt.Figure:
    """Bugs by laws: how many examples a law needs."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.imshow(np.isfinite(needed), cmap="Blues", vmax=2.5, aspect="auto")
    for row, column in np.ndindex(needed.shape):
        text = f"{needed[row, column]:.0f}" if np.isfinite(needed[row, column]) else "\u2013"
        axes.text(column, row, text, ha="center", va="center")
    axes.set_xticks(range(len(LAWS)), [law.__name__ for law in LAWS])
    axes.set_yticks(range(len(BUGS)), [bug.__name__.replace("_", " ") for bug in BUGS])
    title = "examples until the law finds the bug, median (\u2013: not found)"
    axes.set(xlabel="law", ylabel="planted bug", title=title)
    return figure


draw_needed(needed)

# %%
# Every law finds what it speaks of within a few examples, and hardly anything else. The bug that two find breaks both.
# So laws add up; one law is no test suite.

caught = [{law.__name__ for law, n in zip(LAWS, row, strict=True) if n <= 10} for row in needed]
assert caught == [{"slices"}, {"queries"}, {"padding"}, {"padding", "batch"}, {"order"}, {"names"}, set()]

# %%
# What laws miss
# --------------
# Nothing finds the last bug. Attention without its root treats all tokens alike, too: it is a *different* function with
# the same symmetries. Laws say how answers are related, not what they are. For that one needs a second source: a
# formula by hand, as in tutorial 01, another library, or the accuracy after training. And laws do not find what has no
# effect. In a first draft, ``positions`` added the same number to all coordinates of a token. No law objected, and
# rightly: layer norm takes that out again.
#
# Small worlds
# ------------
# One more bug of the released code. It draws support and query of a class independently, so a query may be an image
# that stands, labelled, in the support set. ``sample`` does so with ``protocol="released"``. The law: no image is in
# both.


def disjoint(way: int, drawings: int, number: int, protocol: str = "released") -> None:
    """No query is a support image."""
    images = ImageSet(np.zeros((way * drawings, 1, 1, 1), np.uint8), np.full(way, drawings), ("",) * way)
    batch = sample(images, np.random.default_rng(number), 1, way=way, shot=1, queries=1, protocol=protocol)
    assert not set(batch.support_rows[0]) & set(batch.query_rows[0])


world = {"way": st.integers(1, 5), "drawings": st.integers(2, 20), "number": st.integers(0, 1000)}
first, smallest = hunt(disjoint, world)
print(f"found by example {first}\n{smallest}")
assert first and hunt(partial(disjoint, protocol="disjoint"), world)[0] == 0

# %%
# How likely does an example see it? With :math:`c` drawings, a query is its class's support image with probability
# :math:`1 / c`, so one 5-way episode shows the bug with probability
#
# .. math::
#
#    1 - \left(1 - \frac{1}{c}\right)^5
#
# This is 23 % for 20 drawings and 97 % for 2. A test with one fixed seed on Omniglot would pass three times of four,
# and then for ever. We count.

drawings, episodes = np.array([2, 3, 5, 10, 20]), 50_000 if full else 2000
shares = []
for c in drawings:
    images = ImageSet(np.zeros((5 * c, 1, 1, 1), np.uint8), np.full(5, c), ("",) * 5)
    batch = sample(images, np.random.default_rng(c), episodes, way=5, shot=1, queries=1, protocol="released")
    shares.append((batch.support_rows == batch.query_rows).any(1).mean())
predicted = 1 - (1 - 1 / drawings) ** 5
print("show it:", np.round(shares, 3), "predicted:", predicted.round(3))
assert (np.abs(shares - predicted) < 5 * np.sqrt(predicted * (1 - predicted) / episodes)).all()


# %%
# That is why the worlds above are tiny. Where there are few drawings, few channels, few images, the odd cases are not
# odd.
#
# Exercises
# ---------
# Write them into ``tutorials/exercises/exercise_11.py``; ``pytest -m exercise tutorials/exercises/exercise_11.py``
# checks them.
#
# **1. A law for the sampler.** Images carry their class in their pixels. Write the law that classes and labels of an
# episode fit: it must pass for ``sample`` and fail for the three broken samplers that the checker plants.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def labels_fit(episodes):
#           # Different classes; and behind each label the class that the pixels show, in support and query.
#           for e, classes in enumerate(episodes.classes):
#               assert len(set(classes)) == len(classes)
#               for images, labels in ((episodes.support, episodes.labels), (episodes.query, episodes.query_labels)):
#                   assert (np.rint(255 * images[e, :, 0, 0, 0]) == classes[labels[e]]).all()
#
# **2. Shrink.** Write what Hypothesis does with a list of counts that makes a law fail: make it as small as you can by
# dropping one entry or lowering one by 1, as long as it still fails.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def shrink(numbers, fails):
#           # Take any smaller list that still fails, and start again from it.
#           for i, number in enumerate(numbers):
#               for middle in ([], [number - 1] if number else []):
#                   smaller = numbers[:i] + middle + numbers[i + 1 :]
#                   if fails(smaller):
#                       return shrink(smaller, fails)
#           return numbers
