"""Accuracy and its interval against formulas written out by hand, and evaluation against itself in other ways."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from strategies import generic_parameters

from mini_ht import Config, InputError, generate, to_torch
from mini_ht.datasets.images import ImageSet
from mini_ht.evaluation import Score, evaluate, evaluation_episodes, pixel_nearest_mean, score

CONFIG = Config(way=3, channels=2, blocks=2, image_size=8, encoding=8, layers=1, shared_features=4, local_features=2)
OPTIONS = {"way": 3, "shot": 2}


def noisy(classes: int = 8, count: int = 8, size: int = 8) -> ImageSet:
    """Classes that are noise around one random image each."""
    rng = np.random.default_rng(0)
    means = np.repeat(rng.integers(80, 170, (classes, size, size, 1)), count, axis=0)
    pixels = np.clip(means + rng.normal(0, 60, means.shape), 0, 255).astype(np.uint8)
    return ImageSet(pixels, np.full(classes, count), tuple(f"c{i}" for i in range(classes)))


IMAGES = noisy()
PARAMETERS = generic_parameters(CONFIG, 0, np.float32)


def test_score_by_hand():
    """The mean and 1.96 standard errors of it; of one episode the interval is all there is."""
    values = [0.2, 0.4, 0.9, 0.5]
    mean = sum(values) / 4
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / 3) / math.sqrt(4)
    found = Score.of(np.array(values))
    assert found.episodes == 4
    assert found.accuracy == pytest.approx(mean) and found.interval == pytest.approx(half)
    assert Score.of(np.array([0.3])) == Score(0.3, 1.0, 1)  # one episode may be anything


def test_interval_holds_the_truth():
    """Of many measurements of a known accuracy about 95 % have it inside their interval."""
    draws = np.random.default_rng(0).binomial(25, 0.7, (2000, 100)) / 25
    inside = np.mean([abs(s.accuracy - 0.7) <= s.interval for s in map(Score.of, draws)])
    assert 0.93 < inside < 0.965, inside


def test_perfect_and_constant_classifiers():
    """Who knows the labels scores 1; who always says the same class scores chance, in every episode."""
    assert score(lambda batch: batch.query_labels, evaluation_episodes(IMAGES, 10, **OPTIONS)) == Score(1.0, 0.0, 10)
    constant = score(lambda batch: np.ones_like(batch.query_labels), evaluation_episodes(IMAGES, 10, **OPTIONS))
    assert constant.accuracy == pytest.approx(1 / 3) and constant.interval == pytest.approx(0, abs=1e-12)


def test_numpy_equals_torch():
    """NumPy and torch parameters give the same accuracy on the same episodes."""
    one = evaluate(PARAMETERS, CONFIG, evaluation_episodes(IMAGES, 20, **OPTIONS))
    with torch.no_grad():
        two = evaluate(to_torch(PARAMETERS), CONFIG, evaluation_episodes(IMAGES, 20, **OPTIONS))
    # Rounding may turn one query in 300 from one side of a tie to the other.
    assert one.accuracy == pytest.approx(two.accuracy, abs=1 / 300 + 1e-9) and one.episodes == two.episodes == 20


def test_evaluate_is_the_mean_over_single_episodes():
    """evaluate is what generating and asking one CNN an episode gives."""
    right = []
    for batch in evaluation_episodes(IMAGES, 6, **OPTIONS):
        for e in range(len(batch.support)):
            cnn = generate(PARAMETERS, CONFIG, batch.support[e], batch.labels[e])
            right.append(np.mean(cnn(batch.query[e]).argmax(-1) == batch.query_labels[e]))
    found = evaluate(PARAMETERS, CONFIG, evaluation_episodes(IMAGES, 6, **OPTIONS))
    assert found.accuracy == pytest.approx(np.mean(right), abs=1 / 90 + 1e-9)


@pytest.mark.parametrize("unlabelled", [0, 1])
def test_pixel_nearest_mean_by_hand(unlabelled):
    """The yardstick is the class whose labelled images have the nearest mean; unlabelled ones do not count."""
    right = []
    for batch in evaluation_episodes(IMAGES, 12, unlabelled=unlabelled, **OPTIONS):
        for support, labels, query, truth in zip(
            batch.support, batch.labels, batch.query, batch.query_labels, strict=True
        ):
            means = [support[labels == label].mean(0) for label in range(3)]
            guesses = [int(np.argmin([((image - mean) ** 2).sum() for mean in means])) for image in query]
            right.append(np.mean(guesses == truth))
    found = pixel_nearest_mean(evaluation_episodes(IMAGES, 12, unlabelled=unlabelled, **OPTIONS))
    assert found.accuracy == pytest.approx(np.mean(right)) and 1 / 3 < found.accuracy < 1


def test_same_seed_same_episodes():
    """The same arguments give the same episodes, another seed others, and they are never turned."""
    one, two, other = (
        np.concatenate([b.query_rows for b in evaluation_episodes(IMAGES, 11, seed=seed, **OPTIONS)])
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert len(one) == 11 and (one != other).any()
    for batch in evaluation_episodes(IMAGES, 3, **OPTIONS):
        np.testing.assert_array_equal(batch.query, IMAGES.pixels[batch.query_rows] / np.float32(255))


def test_batches_differ():
    """Each batch draws its own episodes."""
    first, second = evaluation_episodes(IMAGES, 16, **OPTIONS)
    assert (first.query_rows != second.query_rows).any()


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_batch_size(batch):
    """The batch size settles which episodes are drawn, not how many, and the accuracy only within its interval."""
    batches = list(evaluation_episodes(IMAGES, 40, batch=batch, **OPTIONS))
    assert [len(b.support) for b in batches] == [min(batch, 40 - start) for start in range(0, 40, batch)]
    found, usual = pixel_nearest_mean(iter(batches)), pixel_nearest_mean(evaluation_episodes(IMAGES, 40, **OPTIONS))
    assert abs(found.accuracy - usual.accuracy) < found.interval + usual.interval


def test_norm_override():
    """norm overrides the config's: the result is that of a config with the other norm, and differs from its own."""
    other = dataclasses.replace(CONFIG, norm="support")

    def accuracy(config, norm=None):
        return evaluate(PARAMETERS, config, evaluation_episodes(IMAGES, 40, **OPTIONS), norm).accuracy

    assert accuracy(CONFIG, "support") == accuracy(other) != accuracy(CONFIG)
    assert accuracy(other, "batch") == accuracy(CONFIG, "batch") == accuracy(CONFIG)


def test_fewer_classes_than_trained_for():
    """A generator serves episodes of fewer classes, and never answers with a class that is not there."""
    found = evaluate(PARAMETERS, CONFIG, evaluation_episodes(IMAGES, 10, way=2, shot=1))
    assert found.accuracy + 3 * found.interval > 0.45
    for batch in evaluation_episodes(IMAGES, 8, way=2, shot=1):
        cnn = generate(PARAMETERS, CONFIG, batch.support, batch.labels)
        assert cnn(batch.query).argmax(-1).max() <= 1


def test_a_negative_seed():
    """It is refused before any episode is drawn."""
    with pytest.raises(InputError, match="seed is -1; it must be at least 0"):
        next(evaluation_episodes(IMAGES, 2, seed=-1, way=2, shot=1))


def test_no_episodes():
    """0 episodes raise InputError instead of giving NaN."""
    with pytest.raises(InputError, match="at least 1"):
        evaluate(PARAMETERS, CONFIG, evaluation_episodes(IMAGES, 0, **OPTIONS))
