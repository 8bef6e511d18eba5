"""The script of what adapting costs: its counts are those made by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_results import load

from mini_ht import Config

SCRIPT = Path(__file__).parents[1] / "results/cost/measure.py"
CONFIG = Config(
    way=3,
    queries=2,
    channels=3,
    blocks=2,
    image_size=8,
    slope=0.1,
    generate="logits",
    shared_features=4,
    encoding=8,
    layers=1,
)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    return load(SCRIPT, tmp_path_factory.mktemp("cost"))


def test_cost_by_hand(script):
    """Multiply-adds are those counted by hand; backward they cost weights and, but for pixels, inputs."""
    found, size = script.cost(CONFIG, steps=2), CONFIG.way * CONFIG.shot
    first, second, logits = 64 * 9 * 1 * 3, 16 * 9 * 3 * 3, 12 * 3
    assert found["classify_one_image"] == first + second + logits
    assert found["prototypes"]["multiply_adds"] == size * (first + second) + size * CONFIG.way * 12
    step = size * (2 * first + 3 * second + 3 * logits)
    assert found["maml"]["multiply_adds"] == found["maml++"]["multiply_adds"] == 2 * step + size * (first + second)
    norms = 4 * CONFIG.channels
    assert found["maml"]["learned"] == found["maml"]["classifier"] == found["maml"]["per_task"] + norms
    assert found["hypertransformer"]["per_task"] == 13 * 3 and found["prototypes"]["per_task"] == 12 * 3
    assert all(row["milliseconds"] > 0 for row in found.values() if isinstance(row, dict))


def test_the_command(script, monkeypatch, capsys):
    """It prints one line of JSON for a preset; another name is an error with exit code 2 that names some."""
    monkeypatch.setattr(script, "REPEATS", 1)
    monkeypatch.setattr(sys, "argv", ["measure.py", "quickstart", "--steps", "1"])
    script.main()
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == "quickstart" and found["maml"]["multiply_adds"] > 0
    monkeypatch.setattr(sys, "argv", ["measure.py", "no-such-preset"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "no-such-preset" in capsys.readouterr().err
