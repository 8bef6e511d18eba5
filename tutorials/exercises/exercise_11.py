"""Exercises of tutorial 11: fill in the functions, then `pytest -m exercise tutorials/exercises/exercise_11.py`."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from mini_ht.datasets import ImageSet
from mini_ht.episodes import sample

pytestmark = pytest.mark.exercise


def labels_fit(episodes):
    """Assert that every episode has different classes, and every image the class of its label, as its pixels show.

    episodes: from `sample`, all images labelled; all pixels of an image hold its class's number / 255. Returns None.
    """
    raise NotImplementedError("exercise 1")


def shrink(numbers, fails):
    """A smaller list that still fails, and which no dropped entry and no entry lowered by 1 makes smaller still.

    numbers: a list of integers from 0 up, with fails(numbers) True; fails: list -> bool. The order stays.
    """
    raise NotImplementedError("exercise 2")


def drawn(seed):
    """Two episodes of 3 classes out of 6."""
    pixels = np.repeat(np.arange(6, dtype=np.uint8), 4)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    images = ImageSet(pixels, np.full(6, 4), tuple("abcdef"))
    return sample(images, np.random.default_rng(seed), 2, way=3, shot=1, queries=2)


def refused(episodes):
    try:
        labels_fit(episodes)
    except AssertionError:
        return True
    return False


def test_labels_fit():
    for seed in range(10):
        right = drawn(seed)
        assert not refused(right)
        for name in ("labels", "query_labels"):
            for e in range(2):
                labels = getattr(right, name).copy()
                labels[e] = np.roll(labels[e], 1)  # in one episode the boundary of each class is off by one
                assert refused(dataclasses.replace(right, **{name: labels}))
        support = right.support.copy()
        support[1, [0, 2]] = support[1, [2, 0]]  # two images of one episode changed places
        assert refused(dataclasses.replace(right, support=support))
        twice, support, query = right.classes.copy(), right.support.copy(), right.query.copy()
        twice[:, 2], support[:, 2], query[:, 4:] = twice[:, 0], support[:, 0], query[:, :2]  # class 2 is class 0 again
        assert refused(dataclasses.replace(right, classes=twice, support=support, query=query))


def test_shrink():
    rules = {
        "sum": lambda numbers: sum(numbers) >= 10,
        "two of a kind": lambda numbers: len(set(numbers)) < len(numbers),
        "a large one": lambda numbers: max(numbers, default=0) >= 5,
        "falls": lambda numbers: any(a > b for a, b in pairwise(numbers)),
        "three, or one that is 0": lambda numbers: len(numbers) >= 3 or 0 in numbers,
    }
    rng = np.random.default_rng(0)
    for name, fails in rules.items():
        for _ in range(20):
            numbers = [int(n) for n in rng.integers(0, 9, 8)]
            if not fails(numbers):
                continue
            small = shrink(list(numbers), fails)
            assert fails(small), name
            for i, number in enumerate(small):
                assert not fails(small[:i] + small[i + 1 :]), f"{name}: {small} without entry {i} fails, too"
                assert not (number and fails([*small[:i], number - 1, *small[i + 1 :]])), f"{name}: lower entry {i}"
    assert shrink([9, 1, 8], rules["a large one"]) == [5]
