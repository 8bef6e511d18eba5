"""Exercises of tutorial 04: fill in the functions, then `pytest -m exercise tutorials/exercises/exercise_04.py`."""

import numpy as np
import pytest
import torch

from mini_ht.attention import softmax  # noqa: F401 (for your solutions)
from mini_ht.constructions import gradient_step, prototype_factor, prototypes  # noqa: F401 (for your solutions)

pytestmark = pytest.mark.exercise


def step_from(W, e, labels, gamma):
    """Change of W [way, F] by one gradient step of size gamma on the mean cross-entropy: logits are e @ W.T.

    e [n, F], labels [n] in 0 .. way-1 -> [way, F].
    """
    raise NotImplementedError("exercise 1")


def step_by_softmax(labels, e, way, gamma, beta):
    """What `gradient_step` gives without its last column, [E, way, F], by calls of `prototypes` alone; beta > 0.

    labels [E, n], as many of each of 0 .. way-1, e [E, n, F] of any mean.
    """
    raise NotImplementedError("exercise 2")


def fair_step(labels, e, way, gamma):
    """One step from equal rows, without bias, on a mean over classes of each class's mean cross-entropy: -> [way, F].

    labels [n] in 0 .. way-1, each at least once; e [n, F].
    """
    raise NotImplementedError("exercise 3")


def torch_step(W, e, labels, gamma, weight=None):
    """-gamma times the gradient of cross-entropy by autograd, with a weight for each class."""
    start = torch.tensor(W, requires_grad=True)
    logits = torch.from_numpy(e) @ start.T
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), weight=weight).backward()
    return -gamma * start.grad.numpy()


def drawn(labels, features=5, seed=0):
    """Embeddings [n, F] for these labels, of mean about 1."""
    return 1 + np.random.default_rng(seed).standard_normal((len(labels), features))


def test_step_from():
    labels = np.array([0, 1, 2, 0, 0, 1])
    e, W = drawn(labels), np.random.default_rng(1).standard_normal((3, 5))
    np.testing.assert_allclose(step_from(W, e, labels, 0.7), torch_step(W, e, labels, 0.7), atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 8.0])
def test_step_by_softmax(monkeypatch, beta):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 3))
    e = drawn(labels)[None]
    wanted = gradient_step(labels[None], e, 4, 0.7)[..., :-1]
    monkeypatch.setitem(globals(), "gradient_step", None)  # it would be too easy
    np.testing.assert_allclose(step_by_softmax(labels[None], e, 4, 0.7, beta), wanted, atol=1e-12)


def test_fair_step():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    e = drawn(labels)
    weight = torch.from_numpy(1 / np.bincount(labels))  # torch divides by the sum of the images' weights
    wanted = torch_step(np.ones((3, 5)), e, labels, 0.7, weight)
    np.testing.assert_allclose(fair_step(labels, e, 3, 0.7), wanted, atol=1e-12)
