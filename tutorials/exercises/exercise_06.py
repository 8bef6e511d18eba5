"""Exercises of tutorial 06: fill in the functions, then `pytest -m exercise tutorials/exercises/exercise_06.py`."""

import numpy as np
import pytest

from mini_ht.evaluation import Score  # for your solutions, too

pytestmark = pytest.mark.exercise


def episode_rows(rng, classes, images, way, shot, queries):
    """Rows of an episode's images, from `classes` classes that have `images` rows each, one class after the other.

    All chance comes from `rng`. Returns support [way, shot] and query [way, queries]: row i of both is of the i-th
    class that was drawn. Every class, and every image of it, is equally likely at every place.
    """
    raise NotImplementedError("exercise 1")


def score_of(right):
    """Accuracy, 95 % interval and number of episodes, from right [episodes, m] (booleans), as a Score."""
    raise NotImplementedError("exercise 2")


def average_weights(decay, steps):
    """How much the vectors v0 .. v_steps weigh in the average a, which starts as v0 and at step t = 1 .. steps becomes
    decay * a + (1 - decay) * v_t: -> [steps + 1], sum 1."""
    raise NotImplementedError("exercise 3")


def test_episode_rows():
    rng = np.random.default_rng(0)
    first, images = np.zeros((3, 6)), np.zeros((3, 6, 7))
    for _ in range(600):
        support, query = episode_rows(rng, 6, 7, way=3, shot=2, queries=4)
        assert support.shape == (3, 2) and query.shape == (3, 4)
        rows = np.concatenate([support, query], axis=1)  # [way, shot + queries]
        assert (rows // 7 == rows[:, :1] // 7).all(), "a row of the episode has images of one class"
        assert len(set(rows[:, 0] // 7)) == 3, "classes differ"
        assert len(set(rows.ravel())) == rows.size, "no image comes twice"
        first[np.arange(3), rows[:, 0] // 7] += 1
        images[np.arange(3)[:, None], np.arange(6), rows % 7] += 1
    # Counts of 600 draws: 5 standard deviations of a fair one.
    assert np.abs(first - 100).max() < 5 * np.sqrt(100 * 5 / 6), "classes are equally likely at every place"
    assert np.abs(images - 600 / 7).max() < 5 * np.sqrt(600 / 7 * 6 / 7), "images are equally likely"


def test_score_of():
    rng = np.random.default_rng(0)
    right = rng.random((50, 30)) < rng.uniform(0.3, 1.0, (50, 1))
    found, wanted = score_of(right), Score.of(right.mean(1))
    assert found.accuracy == pytest.approx(wanted.accuracy)
    assert found.interval == pytest.approx(wanted.interval), "episodes are the unit; divide by n - 1"
    assert found.episodes == 50


def test_average_weights():
    vectors = np.random.default_rng(0).standard_normal((9, 4))
    for decay in (0.5, 0.9):
        average = vectors[0]
        for vector in vectors[1:]:
            average = decay * average + (1 - decay) * vector
        weights = average_weights(decay, 8)
        assert np.shape(weights) == (9,)
        np.testing.assert_allclose(weights @ vectors, average)
        np.testing.assert_allclose(np.sum(weights), 1)
