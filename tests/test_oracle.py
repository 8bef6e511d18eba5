"""The script of CNNs trained for their task, in a small version: they are generated ones, and see nothing held out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_results import load
from tolerances import assert_close, assert_different

from mini_ht import Config, draw_parameters, generate, save
from mini_ht.baselines.maml import layer_names, network
from mini_ht.baselines.method import Method, draw
from mini_ht.datasets import ImageSet, glyphs

SCRIPT = Path(__file__).parents[1] / "results/oracle/measure.py"
CONFIG = Config(way=5, channels=4, blocks=2, image_size=12, shift=1, seed=3, learning_rate=0.02, conv_rate=10.0)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    return load(SCRIPT, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def images():
    return glyphs(8, 12, drawings=20, size=12)


def batch_of(script, images, tasks=2):
    """Tasks as the script draws them."""
    return script.drawn(CONFIG, images, tasks, script.TRAINED)


def fit(script, config, batch, steps):
    """All layers, from a random start."""
    return script.fit(config, script.fresh(config, batch), batch, steps, layer_names(config))


def test_it_is_the_generated_cnn(script):
    """With scales and offsets that tasks share, logits are those of the CNN that a HyperTransformer generates."""
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, slope=0.1)
    shared = {name: rng.standard_normal(x.shape) for name, x in draw(config, Method("maml")).items()}
    shared = {name: torch.from_numpy(x) for name, x in shared.items()}
    own = {name: x.expand(2, *x.shape).clone() for name, x in shared.items()}  # [E, ...]
    own["conv2.weight"][1] += 0.1
    weights = [own[f"{layer}.weight"] for layer in ("conv1", "conv2", "logits")]
    x, labels = torch.from_numpy(rng.random((2, 10, 12, 12, 1))), torch.arange(10).expand(2, 10) % config.way
    found = script.logits(own, config, x)
    assert_close(found, network(shared, config, weights, 0, x, labels, "batch")(x))
    own["conv1.beta"][1] += 0.1
    moved = script.logits(own, config, x)
    assert_close(moved[0], found[0])
    assert_different(moved[1], found[1])


def test_tasks_do_not_meet(script, images):
    """What a task's CNN becomes does not depend on the images of the tasks beside it, and does on its own."""
    batch = batch_of(script, images)
    support = batch.support.copy()
    support[1] = 1 - support[1]
    one, other = (fit(script, CONFIG, b, 3) for b in (batch, dataclasses.replace(batch, support=support)))
    for name, x in one.items():
        assert_close(other[name][0], x[0], "float32", name)
        assert_different(other[name][1], x[1], name)
        assert_different(x[0], draw(CONFIG, Method("maml"))[name], name)
    begun = script.fresh(CONFIG, batch)["conv1.weight"]
    assert_different(begun[0], begun[1])


def test_convs_learn_faster(script, images):
    """Convs move `conv_rate` times as far as scales and offsets, once the logits weights have left zero, and decay
    no faster; scales and offsets do not decay; images are moved."""
    batch, start = batch_of(script, images), draw(CONFIG, Method("maml"))
    config = dataclasses.replace(CONFIG, weight_decay=0.0, warmup=0.0)
    found = fit(script, config, batch, 2)
    moved = {name: float((x[0] - torch.from_numpy(start[name])).abs().max()) for name, x in found.items()}
    # AdamW's second step with its default betas, the first gradient being 0, at half the peak of the rate.
    step = 0.5 * config.learning_rate * (0.1 / (1 - 0.9**2)) / (0.001 / (1 - 0.999**2)) ** 0.5
    decayed = fit(script, dataclasses.replace(config, weight_decay=0.5), batch, 1)
    for layer in ("conv1", "conv2"):
        weight, gamma = f"{layer}.weight", f"{layer}.gamma"
        assert moved[weight] == pytest.approx(config.conv_rate * step, rel=1e-2)
        assert moved[gamma] == pytest.approx(step, rel=1e-2)
        assert_close(decayed[weight][0], (1 - 0.5 * config.learning_rate) * start[weight], "float32", weight)
        assert_close(decayed[gamma][0], start[gamma])
    still = fit(script, dataclasses.replace(config, shift=0), batch, 2)
    assert_different(still["logits.weight"], found["logits.weight"])


def test_it_learns_what_there_is(script, images):
    """It tells unseen drawings of built-in characters apart, and noise, which no held-out image shares, not at all."""

    def accuracy(images, tasks):
        batch = script.drawn(CONFIG, images, tasks, script.TRAINED)
        return script.score(CONFIG, fit(script, CONFIG, batch, 60), batch).accuracy

    assert accuracy(images, 4) > 0.85  # chance is 0.2
    noise = np.random.default_rng(0).integers(0, 256, images.pixels.shape, dtype=np.uint8)
    assert accuracy(ImageSet(noise, images.counts, images.names), 8) < 0.3


@pytest.mark.parametrize("generated", ["all", "logits"])
def test_it_begins_as_it_was_written(script, images, tmp_path, generated):
    """With what a generator writes, logits are those of its CNN; training changes the layers that are named alone."""
    config = dataclasses.replace(CONFIG, generate=generated)
    parameters = draw_parameters(config)
    parameters["conv2.gamma"][:] = 0.7
    save(tmp_path, parameters, config)
    batch = batch_of(script, images)
    begun = script.written(str(tmp_path), batch)
    expected = generate(parameters, config, batch.support, batch.labels)(batch.query)
    assert_close(script.logits(begun, config, torch.from_numpy(batch.query)), expected, "float32")
    for layers in (["logits"], ["conv2", "logits"]):
        found = script.fit(config, begun, batch, 1, layers)
        assert {name for name, x in found.items() if not torch.equal(x, begun[name])} == {
            name for name in begun if name.split(".")[0] in layers
        }


def test_rows_of_a_generator(script, images, monkeypatch, tmp_path, capsys):
    """A row for each choice of layers, of the generator's shots unless told otherwise, and one of what was written."""
    save(tmp_path / "run", draw_parameters(CONFIG), dataclasses.replace(CONFIG, decay=0.5))
    monkeypatch.setattr(script, "open_dataset", lambda *_, **__: {"validation": images})
    monkeypatch.setattr(script, "FILE", tmp_path / "measured.jsonl")
    threads = torch.get_num_threads()
    command = ["measure.py", "--start", str(tmp_path / "run"), "--parts", "validation", "--tasks", "2", "--steps", "2"]
    for more in ([], ["--drawings", "3"]):
        monkeypatch.setattr(sys, "argv", command + more)
        script.main()
    torch.set_num_threads(threads)
    rows = script.read()
    assert all(row["decay"] == 1.0 for row in rows)
    choices = [("nothing", 0), ("logits", 2), ("last conv, logits", 2), ("all", 2)]
    assert [(row["trained"], row["steps"], row["drawings"]) for row in rows] == [
        (*choice, drawings) for drawings in (CONFIG.shot, 3) for choice in choices
    ]
    save(tmp_path / "run", draw_parameters(biased := dataclasses.replace(CONFIG, generate_bias=True)), biased)
    with pytest.raises(SystemExit):
        script.main()
    assert "generates biases or norms; wanted" in capsys.readouterr().err
    save(tmp_path / "run", draw_parameters(CONFIG), CONFIG)
    wrong = (["--drawings", "0"], ["--steps", "-1"], ["--tasks", "0"], ["--drawings", "18"], ["--start", "nowhere"])
    for more in wrong:
        monkeypatch.setattr(sys, "argv", command + more)
        with pytest.raises(SystemExit):
            script.main()
        assert more[1] in capsys.readouterr().err


def test_rows_and_table(script, images, monkeypatch, capsys):
    """A row for each part and number of channels; measured again it is replaced, and the table shows each once."""
    monkeypatch.setattr(
        script, "preset", lambda name: dataclasses.replace(CONFIG, channels=int(name.split("-")[-1][:-2]), decay=0.5)
    )
    monkeypatch.setattr(script, "open_dataset", lambda *_, **__: {"train": images, "test": images})
    threads = torch.get_num_threads()
    for channels in (["2", "3"], ["3"]):
        command = ["measure.py", "--channels", *channels, "--tasks", "2", "--steps", "2", "--learning-rate", "0.03"]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
    torch.set_num_threads(threads)
    rows = script.read()
    assert sorted((row["part"], row["channels"]) for row in rows) == [
        ("test", 2),
        ("test", 3),
        ("train", 2),
        ("train", 3),
    ]
    assert all((row["tasks"], row["steps"], row["learning_rate"]) == (2, 2, 0.03) for row in rows)
    assert all(row["decay"] == 0.5 for row in rows)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and json.loads(printed[-1]) == rows[-1]
    monkeypatch.setattr(sys, "argv", ["measure.py", "--table"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1
    last = rows[-1]
    accuracy, interval = 100 * last["accuracy"], 100 * last["interval"]
    setting = f"| scratch | all | train | 3 | {script.TRAINED} | 2 | 2 | 0.03 | 0.5 |"
    assert lines[-1].startswith(f"{setting} {accuracy:.2f} +- {interval:.2f} % |")
