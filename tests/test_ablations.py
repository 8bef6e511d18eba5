"""The script behind the ablations runs, in a small version, and every one of its variants is another generator."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mini_ht import Config
from mini_ht.datasets import glyphs
from mini_ht.parameters import generator_size

FILE = Path(__file__).parents[1] / "results/ablations/run.py"
SMALL = Config(way=3, queries=2, channels=2, blocks=2, image_size=8, layers=1, encoding=8, dataset="glyphs",
               shared_features=4, local_features=4, episodes_per_step=8, ema=0.5, readout="linear")  # fmt: skip


@pytest.fixture
def script(tmp_path, monkeypatch) -> ModuleType:
    """The script, from a copy, as it writes beside itself; it trains a tiny model on built-in characters."""
    spec = importlib.util.spec_from_file_location("ablations", shutil.copy(FILE, tmp_path))
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "EVALUATED", 16)
    data = {"train": glyphs(0, 20, drawings=8, size=8), "validation": glyphs(1, 10, drawings=8, size=8)}
    monkeypatch.setattr(script, "open_dataset", lambda *_, **__: data)
    return script


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", "--episodes", "32", *arguments])
    threads = torch.get_num_threads()
    script.main()
    torch.set_num_threads(threads)


def test_variants(script):
    """Each variant changes one choice of the base (the last two together), and no two are the same model."""
    configs = {name: dataclasses.replace(script.BASE, **fields) for name, fields in script.VARIANTS.items()}
    assert configs["base"] == script.BASE and len(set(configs.values())) == len(configs) > 25
    assert max(len(fields) for fields in script.VARIANTS.values()) == 2
    larger = {name for name, config in configs.items() if generator_size(config) > generator_size(script.BASE)}
    assert {"layers=3", "generator=decoder", "generator=separate", "attention=sigmoid"} < larger
    assert not {"layers=1", "heads=4", "key_width=0.5", "encoding=16"} & larger


def test_a_run_goes_on_where_it_stopped(script, monkeypatch, capsys):
    """A line a run, the same for the same seed but for its time; what is there is skipped; the table has it all."""
    monkeypatch.setattr(script, "BASE", SMALL)
    chosen = ["base", "attention=sigmoid", "generator=separate", "generate_bias,norm=True"]
    run(script, monkeypatch, "--only", *chosen[:2], "--seeds", "0", "1")
    before = script.FILE.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, seed) for seed in (0, 1) for name in chosen[:2]]
    run(script, monkeypatch, "--only", *chosen, "--seeds", "0")
    after = script.FILE.read_text()
    assert after.startswith(before) and len(after.splitlines()) == 6
    assert capsys.readouterr().err.count("measured before") == 2
    script.FILE.unlink()
    run(script, monkeypatch, "--only", "base", "--seeds", "0")
    again = json.loads(script.FILE.read_text())
    timed = {"cpu_seconds", "episodes_per_cpu_second"}
    assert {key: again[key] for key in again.keys() - timed} == {key: rows[0][key] for key in rows[0].keys() - timed}
    assert rows[0]["validation"] != rows[2]["validation"] or rows[0]["train"] != rows[2]["train"]
    for row in rows:
        assert row["evaluated"] == 16 and row["norm"] == "batch" and row["episodes_per_cpu_second"] > 0
        assert 0 < row["validation"] <= 1 and 0 < row["train"] <= 1
        assert row["generator_size"] == generator_size(dataclasses.replace(SMALL, **script.VARIANTS[row["variant"]]))


def test_the_table(script, monkeypatch, capsys):
    """Seeds side by side, the mean of their differences to the base, runs of as many episodes only, in fixed order."""
    common = {"episodes": 32, "train": 0.9, "generator_size": 1234, "episodes_per_cpu_second": 10.0}
    found = [("layers=3", 1, 0.75), ("base", 1, 0.7), ("layers=3", 0, 0.52), ("base", 0, 0.5), ("layers=1", 7, 0.4)]
    rows = [common | {"variant": name, "seed": seed, "validation": value} for name, seed, value in found]
    rows.append(rows[0] | {"episodes": 64, "validation": 0.1})
    script.FILE.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(script, monkeypatch, "--table")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| base | 50.00, 70.00 |  | 90.00 | 1,234 | 10.0 |",
        "| layers=1 | 40.00 |  | 90.00 | 1,234 | 10.0 |",
        "| layers=3 | 52.00, 75.00 | +3.50 | 90.00 | 1,234 | 10.0 |",
    ]
