"""Training with `vary`: every step has a task of its own, and all kinds of tasks come."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from test_training import CONFIG, IMAGES, run

from mini_ht import Config, InputError
from mini_ht.datasets.images import ImageSet
from mini_ht.training.tasks import HIDDEN, step_task, training_choice, training_episodes


def blank(classes: int, count: int) -> ImageSet:
    """Images of nothing."""
    names = tuple(map(str, range(classes)))
    return ImageSet(np.zeros((classes * count, 4, 4, 1), np.uint8), np.full(classes, count), names)


@given(seed=seeds, way=st.integers(2, 6), vary=st.integers(1, 5), spare=st.integers(1, 6), queries=st.integers(1, 3))
def test_a_steps_tasks_lie_in_range(seed, way, vary, spare, queries):
    """2 .. way classes, each with 1 .. vary support images, and images enough for all of its queries."""
    images = blank(8, vary + spare)
    config = Config(way=way, vary=vary, queries=queries, seed=seed, episodes_per_step=2, image_size=16)
    for step in range(5):
        choice, offsets = training_choice(config, images, step)
        classes = choice.classes.shape[1]
        assert 2 <= classes <= way and offsets.shape[1] == choice.labels.shape[1] + choice.query_labels.shape[1]
        of = np.searchsorted(images.starts, choice.support_rows, side="right") - 1  # [E, n], class of each image
        for e in range(2):
            counts = [int((of[e] == label).sum()) for label in choice.classes[e]]
            assert sum(counts) == choice.labels.shape[1] and 1 <= min(counts) and max(counts) <= vary
            assert set(choice.labels[e]) - {-1} == set(range(classes))
            assert not set(choice.support_rows[e]) & set(choice.query_rows[e])
        wanted = -(-queries * way // classes)
        assert wanted * classes >= choice.query_labels.shape[1] >= min(wanted, spare) * classes


def test_all_kinds_of_tasks_come():
    """Every number of classes and of images a class comes; half of the steps are balanced, a third hide labels."""
    images, config = blank(12, 20), Config(way=10, vary=8, image_size=16)
    drawn = [step_task(config, images, np.random.default_rng(seed)) for seed in range(2000)]
    ways, means = ({f(*one) for one in drawn} for f in (lambda t, n, h: t["way"], lambda t, n, h: n / t["way"]))
    assert ways == set(range(2, 11)) and means == set(range(1, 9))
    balanced = np.mean([count == task["way"] * task["shot"] for task, count, _ in drawn])
    hiding = np.array([hidden for *_, hidden in drawn])
    assert 0.5 < balanced < 0.65  # the largest numbers cannot be doubled
    assert abs((hiding > 0).mean() - 1 / 3) < 0.05 and hiding.max() <= HIDDEN


def test_the_same_step_is_the_same_task():
    """A step's episodes depend on the config's seed and the step's number alone; a part of them is a slice."""
    images, config = blank(12, 20), Config(way=10, vary=8, image_size=16, episodes_per_step=4)
    one, two = (training_episodes(config, images, 5, part) for part in (slice(None), slice(1, 3)))
    np.testing.assert_array_equal(one.labels[1:3], two.labels)
    np.testing.assert_array_equal(one.support_rows[1:3], two.support_rows)
    shapes = {training_episodes(config, images, step).labels.shape for step in range(12)}
    assert len(shapes) > 4


def test_too_few_images_for_vary(tmp_path):
    """A class with too few images for the largest support set and its queries is noticed before training."""
    with pytest.raises(InputError, match=r"train images: class .* has 5 images; wanted 6 \(shot 4"):
        run(dataclasses.replace(CONFIG, vary=4), tmp_path / "run")
    assert not (tmp_path / "run").exists() and IMAGES["train"].counts.min() == 5
