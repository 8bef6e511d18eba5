"""Exercises of tutorial 05: fill in the functions, then `pytest -m exercise tutorials/exercises/exercise_05.py`."""

import dataclasses  # noqa: F401

import numpy as np
import pytest

from mini_ht import Config, draw_parameters, generate
from mini_ht.cnn import linear  # noqa: F401
from mini_ht.inspection import attention_maps
from mini_ht.kernels import conv_block  # noqa: F401

pytestmark = pytest.mark.exercise

CONFIG = Config(way=3, channels=4, blocks=2, image_size=8, encoding=8, layers=2, shared_features=8, local_features=4)


def support_norm_logits(cnn, query):
    """Logits of queries normed with the support set's statistics: a GeneratedCNN, query [E, m, H, W, C] -> [E, m, way].

    All classes are present, convs have no bias, and the activation is ReLU.
    """
    raise NotImplementedError("exercise 1")


def frozen(cnn):
    """A GeneratedCNN whose conv weights [E, 3, 3, Cin, Cout] are the mean over the E episodes; nothing else changes."""
    raise NotImplementedError("exercise 2")


def weight_on_own_class(weights, labels, way):
    """Attention of class c's placeholder on the images of class c, summed over these, averaged over the classes.

    weights [heads, T or way, T] of one episode of the logits layer, whose first `way` tokens are the placeholders of
    classes 0 .. way-1; labels [n] of the support images, which are the last n tokens -> [heads].
    """
    raise NotImplementedError("exercise 3")


def drawn(seed=0):
    """Parameters in float64, support [E, n, H, W, C], labels [E, n] and query [E, m, H, W, C] of four tasks."""
    rng = np.random.default_rng(seed)
    labels = np.array([rng.permutation([0, 0, 1, 2, 2, 2]) for _ in range(4)])
    return draw_parameters(CONFIG, seed, np.float64), rng.random((4, 6, 8, 8, 1)), labels, rng.random((4, 5, 8, 8, 1))


def test_support_norm_logits():
    parameters, support, labels, query = drawn()
    cnn = generate(parameters, CONFIG, support, labels)
    assert cnn.norm == "batch"
    np.testing.assert_allclose(support_norm_logits(cnn, query), cnn.with_norm("support")(query), atol=1e-9)


def test_frozen():
    parameters, support, labels, query = drawn()
    cnn = generate(parameters, CONFIG, support, labels)
    found = frozen(cnn)
    for before, after in zip(cnn.convs, found.convs, strict=True):
        assert after.weight.shape == before.weight.shape
        np.testing.assert_allclose(after.weight, np.stack([before.weight.mean(0)] * 4))
        np.testing.assert_array_equal(after.gamma, before.gamma)
    np.testing.assert_array_equal(found.logits_weight, cnn.logits_weight)
    assert found(query).shape == (4, 5, 3) and np.ptp(cnn.convs[0].weight, axis=0).max() > 0


@pytest.mark.parametrize("number", [0, 1])
def test_weight_on_own_class(number):
    parameters, support, labels, _ = drawn()
    weights = attention_maps(parameters, CONFIG, support, labels).weights[number]
    for episode in range(4):
        wanted = np.zeros(2)
        for label in range(3):
            for image in np.flatnonzero(labels[episode] == label):
                wanted += weights[episode, :, label, 3 + image] / 3
        np.testing.assert_allclose(weight_on_own_class(weights[episode], labels[episode], 3), wanted)
