"""Training with unlabelled images that come in gradually, and the script that measures what they are worth."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_device import device_step, shapes_of_equal_steps, take
from test_results import ROOT, load
from test_training import CONFIG, CPU, VECTORS, run

from mini_ht import to_torch
from mini_ht.datasets import glyphs
from mini_ht.evaluation import Score, evaluate, evaluation_episodes
from mini_ht.parameters import load as load_parameters
from mini_ht.training.checkpoint import load_run
from mini_ht.training.loop import Trainer

pytestmark = pytest.mark.device

# 12 steps of 4 episodes: at most 0 unlabelled images a class in the first three, 1 in the next, then 2.
INTRODUCING = dataclasses.replace(CONFIG, unlabelled=2, introduce=24, seed=1)
SCRIPT = ROOT / "results/semi-supervised/measure.py"
CHARACTERS = glyphs(0, 8)  # 20 drawings of each
SMALL = ("--episodes", "32", "--layers", "1")


def test_a_resumed_run_introduces_the_same_images(tmp_path, monkeypatch):
    """Stopped amid the introduction and resumed, a run ends in the bits of one that was never stopped."""
    whole = run(INTRODUCING, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", stopping_at(5))
        run(INTRODUCING, tmp_path / "halves")
    assert load_run(tmp_path / "halves", INTRODUCING, CPU).step == 5
    resumed = run(INTRODUCING, tmp_path / "halves", resume=True)
    assert resumed.step == whole.step == 12
    for name in VECTORS:
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name


def stopping_at(step: int):
    """Trainer.step, which in place of one step is interrupted."""
    real = Trainer.step

    def wrapped(self, *arguments, **options):
        if self.state.step == step:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    return wrapped


def test_the_device_takes_steps_of_these_shapes():
    """With `introduce` steps on the device have as many unlabelled images as the trainer's, and are equal."""
    assert shapes_of_equal_steps(INTRODUCING, 9, 0) == {(4, 2), (4, 4), (4, 6)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fields", [{"introduce": 24}, {"introduce": 0, "vary": 2}, {"introduce": 0}])
def test_no_graph_for_steps_of_different_shapes(fields):
    """On a CUDA device a graph is recorded only where all steps have one shape."""
    step = device_step(dataclasses.replace(INTRODUCING, **fields), device=torch.device("cuda"))
    assert (step.replay == step.compute) == any(fields.values())
    assert len({take(step, 1e-3)[0] for _ in range(9)}) == 9


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, small: 5-way on built-in characters, 6 test episodes; `call` is its command line."""
    module = load(SCRIPT, tmp_path)
    monkeypatch.setattr(module, "PRESET", "quickstart")
    monkeypatch.setattr(module, "TEST_EPISODES", 6)
    monkeypatch.setattr(module, "open_dataset", lambda *_, **__: {"train": CHARACTERS, "test": CHARACTERS})

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *SMALL, "--runs", str(tmp_path / "runs"), *arguments])
        module.main()

    module.call = call
    return module


def test_fewer_unlabelled_images_of_the_same_episodes(script):
    """Labelled images and queries stay; of the unlabelled ones each class keeps its first, to the number asked for."""
    task = {"way": 5, "shot": 2, "unlabelled": 9, "queries": 5}
    whole = next(evaluation_episodes(CHARACTERS, 3, **task))
    for count in script.COUNTS:
        some = script.keep_unlabelled(whole, count)
        assert some.query is whole.query and some.query_labels is whole.query_labels
        assert (some.support == CHARACTERS.pixels[some.support_rows] / np.float32(255)).all()
        for e, label in np.ndindex(3, 5):
            (known, unknown), (kept, fewer) = (drawings(batch, e, label) for batch in (whole, some))
            assert kept == known and len(known) == 2 and fewer == unknown[:count] and len(fewer) == count


def drawings(batch, e: int, label: int) -> tuple[list[int], list[int]]:
    """Rows of the images of a class with its label, and without one, in an episode."""
    rows, labels = batch.support_rows[e], batch.labels[e]
    own = rows // 20 == batch.classes[e, label]  # [n]
    return rows[own & (labels == label)].tolist(), rows[own & (labels == -1)].tolist()


def measured(folder: Path) -> list[dict]:
    """The lines that the script wrote."""
    return [json.loads(line) for line in (folder / "measured.jsonl").read_text().splitlines()]


def test_the_script_measures_once_and_goes_on(script, tmp_path, monkeypatch):
    """Each training leaves one line, which is not made twice; interrupted, the same command ends in the same lines."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", stopping_at(1))
        script.call()
    script.call()
    lines = measured(tmp_path)
    assert [(line["layers"], line["unlabelled"], line["introduce"]) for line in lines] == [(1, 0, 0), (1, 9, 16)]
    monkeypatch.setattr(script, "train", None)  # a finished training is not trained again
    script.call()
    assert measured(tmp_path) == lines
    for line in lines:
        run_dir = tmp_path / f"runs/1-layers-{line['unlabelled']}-unlabelled-32-episodes-seed-0"
        parameters, config = load_parameters(run_dir)
        assert (config.layers, config.unlabelled, config.introduce) == (1, line["unlabelled"], line["introduce"])
        right = np.array(line["right"])  # [counts, test episodes]
        assert right.shape == (5, 6)
        np.testing.assert_allclose(right.mean(1) / 25, line["accuracy"], atol=1e-4)
        batches = evaluation_episodes(CHARACTERS, 6, way=5, shot=1, unlabelled=9, queries=5)
        score = evaluate(to_torch(parameters), config, batches, "batch")
        assert score.accuracy == pytest.approx(line["accuracy"][-1], abs=1e-4)


def test_the_table_pairs_by_episode(script, tmp_path, capsys):
    """Gains are means of differences on the same episodes; a training without its control says so; figures are PNGs."""
    rng = np.random.default_rng(0)
    one = {"seed": 0, "episodes": 32, "way": 5, "queries": 5}
    lines = [one | {"layers": layers, "unlabelled": u} for layers, u in ((1, 0), (2, 9), (1, 9))]
    lines.append(lines[0] | {"layers": 3, "episodes": 33})
    for line in lines:
        line["right"] = rng.integers(0, 26, (5, 40)).tolist()
    (tmp_path / "measured.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn": 1')
    script.open_dataset = None  # needs no data
    script.call("--table", "--figure")
    header, _, *rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows] == [["1", "0", "0"], ["1", "0", "0 .. 9"], ["2", "0", "0 .. 9"]]
    assert header[3:8] == [f"{count} unlabelled" for count in script.COUNTS]
    control, _, own = (np.array(line["right"]) / 25 for line in lines[:3])
    for found, wanted in zip(rows[1][3:], [*own, own[4] - own[0], own[4] - control[0]], strict=True):
        score = Score.of(wanted)
        assert found == f"{100 * score.accuracy:.2f} +- {100 * score.interval:.2f}"
    assert rows[2][-1] == "not run" and rows[0][-1] == rows[0][-2]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
