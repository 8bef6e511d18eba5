"""Lists of tiles: read, refused, searched for; whatever the tile, the numbers are the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from mini_ht import InputError
from mini_ht.kernels import tune
from mini_ht.kernels.problems import Problem
from mini_ht.kernels.tiles import LIST, candidates, choose, job_key, listed, read_channels
from mini_ht.kernels.triton_launch import hopper
from mini_ht.kernels.tune import agrees, as_json, gradients, in_force, refine

pytestmark = pytest.mark.device

SMALL = Problem("small", 1, 2, 16, 1, 4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_list_goes_before_the_table(tmp_path, monkeypatch):
    """A job in the list gets its tile; other jobs, dtypes and precisions get the table's."""
    table = choose("forward", 1, 8, "bfloat16", "tf32")
    other = candidates(table)[0]
    assert other != table and table not in candidates(table)
    file = tmp_path / "tiles.json"
    file.write_text(as_json({job_key("forward", 1, 8, "bfloat16", "tf32"): other}))
    monkeypatch.setenv(LIST, str(file))
    assert choose("forward", 1, 8, "bfloat16", "ieee") == other
    monkeypatch.delenv(LIST)
    assert choose("forward", 1, 8, "bfloat16", "tf32") == table


@pytest.mark.parametrize("text", ["", "[1]", '{"forward 1-8 bfloat16": {"form": "window"}}', '{"a": 3}'])
def test_what_is_no_list_is_refused(tmp_path, monkeypatch, text):
    """A file that is missing, cut short or holds something else gets one clear sentence."""
    file = tmp_path / "tiles.json"
    monkeypatch.setenv(LIST, str(file))
    with pytest.raises(InputError, match="which is no list of tiles"):
        choose("forward", 1, 8, "bfloat16", "tf32")
    file.write_text(text)
    with pytest.raises(InputError, match="which is no list of tiles"):
        listed(str(file))


def test_the_search_takes_what_is_faster_and_right(monkeypatch, capsys):
    """Every candidate is computed; the fastest right one is taken, a wrong one or one that fails never is."""
    tried = []

    def two(tile):
        return candidates(tile)[1:3]

    def seconds():
        tried.append(json.loads(Path(os.environ[LIST]).read_text()))
        return 1.0 / len(tried)  # each faster than all before

    monkeypatch.setattr(tune, "candidates", two)
    found = refine(SMALL, torch.float32, DEVICE, seconds, {})
    jobs = {key.rsplit(" ", 2)[0] for key in found}
    assert jobs == {"forward 1-4", "weight 1-4", "forward 4-4", "weight 4-4", "input 4-4"}
    for key, tile in found.items():
        job, shape, kind, precision = key.split()
        assert tile == two(choose(job, *map(int, shape.split("-")), kind, precision, hopper(torch.device(DEVICE))))[-1]
    with in_force(found):
        mine = gradients(SMALL, torch.float32, DEVICE)
    assert agrees(mine, gradients(SMALL, torch.float32, DEVICE), 1e-4)

    monkeypatch.setattr(tune, "candidates", lambda tile: candidates(tile)[:1])
    monkeypatch.setattr(tune, "agrees", lambda *arguments: False)
    assert refine(SMALL, torch.float32, DEVICE, seconds, {}) == {}
    monkeypatch.setattr(tune, "agrees", agrees)
    monkeypatch.setattr(tune, "candidates", lambda tile: [type(tile)("window", 3, 3, 5, 7, 4)])
    assert refine(SMALL, torch.float32, DEVICE, seconds, {}) == {} and "does not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("inputs", "channels", "kind"),
    [
        *((3, 12, "float16"), (16, 16, "float16"), (32, 32, "float16")),
        *((3, 32, "float32"), (16, 16, "float32"), (32, 32, "float32")),
    ],
)
def test_tiles_of_older_gpus_give_the_same_numbers(inputs, channels, kind):
    """What is taken before compute capability 9 computes what the other tiles compute."""
    problem, dtype = Problem("older", 1, 4, 16, inputs, channels), getattr(torch, kind)
    shapes = {(read_channels(inputs), channels), (channels, channels)}
    jobs = [(job, *shape, kind, "tf32") for job in ("forward", "weight", "input") for shape in shapes]
    older = {job_key(*job): choose(*job, hopper=False) for job in jobs}
    assert any(tile != choose(*job) for tile, job in zip(older.values(), jobs, strict=True)) or kind == "float32"
    with in_force(older):
        found = gradients(problem, dtype, DEVICE)
    assert agrees(found, gradients(problem, dtype, DEVICE), tune.TOLERANCE[dtype])


def test_agreement_can_fail():
    """A difference above the tolerance is seen in any tensor."""
    a = [torch.ones(3), torch.ones(4)]
    assert agrees(a, a, 1e-3) and not agrees(a, [a[0], 1.01 * a[1]], 1e-3)
