"""Figures: PNG files of a sane size that show something."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from strategies import generic_parameters

from mini_ht import Config, figures, generate
from mini_ht.datasets.images import ImageSet
from mini_ht.episodes import sample
from mini_ht.figures import draw_curve, draw_episode, read_metrics

SMALL = {"blocks": 2, "image_size": 8, "encoding": 8, "layers": 1, "shared_features": 4, "local_features": 2}


def picture(file):
    """The file's pixels, after making sure that it is a PNG of a size one can look at, with much white and some ink."""
    with Image.open(file) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert 200 <= pixels.shape[0] <= 3000 and 200 <= pixels.shape[1] <= 3000, pixels.shape
    ink = (pixels < 200).any(-1).mean()
    assert 0.002 < ink < 0.9, f"{100 * ink:.2f} % ink"
    return pixels


RIGHT, WRONG = (26, 127, 55), (207, 34, 46)


def near(pixels, colour):
    """How many pixels have about this colour."""
    return int((np.abs(pixels - np.array(colour)).max(-1) < 25).sum())


def test_curve(tmp_path):
    """The curve shows both accuracies, also with rows that have no validation yet, and is made from metrics.jsonl."""
    rows = [
        {"episodes": 10 * i, "train_accuracy": 0.2 + i / 20, "validation_accuracy": 0.3 if i > 3 else None}
        for i in range(10)
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert read_metrics(metrics) == rows
    draw_curve(rows, {"nearest pixel mean": 0.4, "chance": 0.2}, tmp_path / "new" / "curve.png")
    blue = near(picture(tmp_path / "new" / "curve.png"), (9, 105, 218))
    assert blue > 100, blue
    draw_curve([], {"chance": 0.2}, tmp_path / "empty.png")
    assert near(picture(tmp_path / "empty.png"), (9, 105, 218)) < blue


@pytest.mark.parametrize("way, channels, colours, unlabelled", [(2, 2, 1, 0), (3, 5, 3, 1)])
def test_episode(tmp_path, way, channels, colours, unlabelled):
    """Grey and RGB episodes are drawn with a green or a red frame around each query, and the images can be seen."""
    config = Config(way=way, channels=channels, image_channels=colours, **SMALL)
    pixels = np.random.default_rng(0).integers(0, 256, (4 * 6, 8, 8, colours), dtype=np.uint8)
    images = ImageSet(pixels, np.full(4, 6), tuple("abcd"))
    episode = sample(images, np.random.default_rng(0), 2, way=way, shot=1, queries=2, unlabelled=unlabelled)
    file = tmp_path / "episode.png"
    draw_episode(generic_parameters(config, 0, np.float32), config, episode, file)
    drawn = picture(file)
    assert near(drawn, RIGHT) + near(drawn, WRONG) > 200, "no frames"
    colourful = (drawn.max(-1) - drawn.min(-1) > 60).mean()
    assert colourful > (0.05 if colours == 3 else 0.005), colourful


@pytest.mark.parametrize("wrong", [0, 1])
def test_frames_tell_right_from_wrong(tmp_path, monkeypatch, wrong):
    """Where all guesses are right all frames are green, where all are wrong red; kernels are red and blue."""
    config = Config(way=2, channels=2, **SMALL)
    images = ImageSet(np.full((4 * 6, 8, 8, 1), 128, np.uint8), np.full(4, 6), tuple("abcd"))
    episode = sample(images, np.random.default_rng(0), 2, way=2, shot=1, queries=2)
    cnn = generate(generic_parameters(config, 0, np.float32), config, episode.support[0], episode.labels[0])
    logits = np.eye(2)[(episode.query_labels[0] + wrong) % 2]  # [m, way]
    answers = type("Answers", (), {"convs": cnn.convs, "__call__": lambda self, query: logits})()
    monkeypatch.setattr(figures, "generate", lambda *arguments: answers)
    draw_episode({}, config, episode, tmp_path / "episode.png")
    drawn = picture(tmp_path / "episode.png")
    assert [near(drawn, colour) > 200 for colour in (RIGHT, WRONG)] == [not wrong, bool(wrong)]
    assert near(drawn, (103, 0, 31)) + near(drawn, (5, 48, 97)) > 50, "the largest number of the kernels is the darkest"
