"""The benchmark of the kernels runs, refuses what is wrong, and writes what it measured."""

import csv

import pytest
import torch

from mini_ht.kernels import alternatives, benchmark
from mini_ht.kernels.problems import Problem

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the small CPU version is measured where there is no GPU")


@on_cpu
def test_it_measures_every_net(tmp_path, capsys, monkeypatch):
    """A row for each net with times and ratios, in the table, benchmark.csv and benchmark.png."""
    monkeypatch.setattr(benchmark, "problems", lambda cuda: [Problem("small", 2, 3, 16, 1, 4)])
    assert benchmark.main(["--seconds", "0.001", "--out", str(tmp_path)]) == 0
    with (tmp_path / "benchmark.csv").open() as file:
        rows = {row["net"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"torch path", "numpy", *alternatives.alternatives(False)}
    assert all(float(row["both_us"]) > 0 and float(row["both_ratio"]) > 0 for row in rows.values())
    assert "torch path" in capsys.readouterr().out and (tmp_path / "benchmark.png").exists()


@on_cpu
def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    """A net whose result is off ends the benchmark."""
    monkeypatch.setattr(benchmark, "problems", lambda cuda: [Problem("small", 2, 3, 16, 1, 4)])
    real = alternatives.torch_path
    monkeypatch.setattr(alternatives, "torch_path", lambda *arguments: 1.01 * real(*arguments))
    with pytest.raises(SystemExit, match="not timed, because wrong: torch path"):
        benchmark.main(["--seconds", "0.001", "--out", str(tmp_path)])


def test_bytes_and_flops_of_a_block_by_hand():
    """One episode of one 16 x 16 image, one channel throughout: the sums of kernels/README.md, two bytes a value."""
    problem = Problem("one", 1, 1, 16, 1, 1)
    assert problem.bytes(2)["forward"] == (256 + 64 + 16 + 4) * 2 + (64 + 16 + 4 + 1) * 3 + 2 * 2
    assert problem.flops()["forward"] == 18 * (256 + 64 + 16 + 4)
    assert problem.flops()["backward"] == 18 * (256 + 2 * (64 + 16 + 4))
