"""The benchmark of the kernels runs, refuses what is wrong, and writes what it measured."""

import csv

import pytest
import torch

from mini_ht.kernels import alternatives, benchmark
from mini_ht.kernels.problems import Problem


def test_it_measures_every_net(tmp_path, capsys, monkeypatch):
    """A row for each net with times and ratios, in the table, benchmark.csv and benchmark.png."""
    monkeypatch.setattr(benchmark, "problems", lambda cuda: [Problem("small", 2, 3, 16, 1, 4)])
    benchmark.main(["--seconds", "0.001", "--out", str(tmp_path)])
    with (tmp_path / "benchmark.csv").open() as file:
        rows = {row["net"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"torch path", "numpy", *alternatives.alternatives(False)}
    assert all(float(row["both_us"]) > 0 and float(row["both_ratio"]) > 0 for row in rows.values())
    assert "torch path" in capsys.readouterr().out and (tmp_path / "benchmark.png").exists()


def test_a_benchmark_is_made_in_parts(tmp_path, capsys, monkeypatch):
    """Rows of the same device stay until they are measured again, which --resume leaves out; others' go."""
    nets = [Problem("small", 2, 3, 16, 1, channels) for channels in (4, 8)]
    monkeypatch.setattr(benchmark, "problems", lambda cuda: nets)

    def measured(*options: str) -> list[tuple[str, str, str]]:
        benchmark.main(["--seconds", "0.001", "--out", str(tmp_path), *options])
        with (tmp_path / "benchmark.csv").open() as file:
            return [(row["channels"], row["net"], row["both_us"]) for row in csv.DictReader(file)]

    first = measured("--only", "small-4")
    assert {row[0] for row in first} == {"4"}
    both = measured("--resume")
    assert both[: len(first)] == first and {row[0] for row in both[len(first) :]} == {"8"}
    assert measured("--resume") == both
    again = measured("--only", "small-4 cpu")
    others = both[len(first) :]
    assert again[: len(others)] == others and [row[:2] for row in again[len(others) :]] == [row[:2] for row in first]
    assert again[len(others) :] != first  # other times
    with pytest.raises(SystemExit):
        benchmark.main(["--out", str(tmp_path), "--only", "large"])
    assert "--only 'large' is in none of these: small-4 cpu fp32, small-8 cpu fp32" in capsys.readouterr().err
    monkeypatch.setattr(torch, "__version__", "another")
    assert {row[0] for row in measured("--only", "small-8")} == {"8"}


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
