"""How training scales over ranks: measures on this machine, writes measured.json beside itself, prints two tables.

    python results/scale/measure.py             # about 6 minutes; nothing else should run
    python results/scale/measure.py --tables    # the tables of the last measurement

Each row is a training of its own by torchrun, one thread a rank; rows take turns, so that a machine whose speed drifts
is fair to all. Efficiency is what a rank does in a second, or in a second of its core, over what one rank alone does.
The second table is a model: a step of n ranks takes as long as a rank's own episodes, measured here, plus drawing what
the others see, plus a ring all-reduce over a network whose speed is assumed.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.json")
PRESET = "omniglot-20way-1shot-8ch"
# name -> trainings at once, ranks of each, episodes a step of each
ROWS = {
    "one rank": (1, 1, 16),
    "two ranks, as many episodes each": (1, 2, 32),
    "two ranks, as many in all": (1, 2, 16),
    "one rank, half as many": (1, 1, 8),
    "two trainings that share nothing": (2, 1, 16),
}
NETWORKS = {
    "1 Gbit/s, 100 us": (0.125e9, 1e-4),
    "10 Gbit/s, 50 us": (1.25e9, 5e-5),
    "100 Gbit/s, 10 us": (12.5e9, 1e-5),
}


def each(function: Callable[[], Any], times: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def rank(episodes: int, steps: int) -> None:
    """Train as one of the ranks of torchrun; the first prints what a step and its parts took."""
    import torch

    import mini_ht
    from mini_ht.datasets import open_dataset
    from mini_ht.training.checkpoint import save_run
    from mini_ht.training.distributed import join
    from mini_ht.training.loop import Trainer, fresh_state
    from mini_ht.training.tasks import training_choice

    config = dataclasses.replace(mini_ht.preset(PRESET), episodes_per_step=episodes)
    images = open_dataset("glyphs")["train"]
    state = fresh_state(config, torch.device("cpu"))
    ranks = join().begin(config, images, state)
    trainer = Trainer(config, images, 1, state, ranks=ranks)
    for _ in range(5):
        trainer.step(1e-6)
    cpu, waited = time.process_time(), ranks.same(0.0)
    found = {"step": each(lambda: (ranks.same(waited), trainer.step(1e-6)), steps)}
    found["cpu"] = (time.process_time() - cpu) / steps
    size = len(state.vector) + 2
    for name, numbers in (("few", 2), ("gradient", size), ("four gradients", 4 * size)):
        vector = torch.zeros(numbers)
        found[f"all_reduce, {name}"] = each(lambda vector=vector: ranks.add_up(vector), 100)
    found["same"] = each(lambda: ranks.same(0.0), 300)
    many = dataclasses.replace(config, episodes_per_step=1024)
    found["draw"] = each(lambda: training_choice(many, images, 0), 9) / 1024
    if ranks.first:
        with tempfile.TemporaryDirectory() as folder:
            found["checkpoint"] = each(lambda: save_run(Path(folder), config, state), 9)
            found["checkpoint bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(json.dumps(found | {"bytes": 4 * size, "threads": torch.get_num_threads()}))


def row(trainings: int, ranks: int, episodes: int, steps: int) -> dict[str, float]:
    """One measurement of a row; of trainings at once, the slower."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    command += ["--rank", str(episodes), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, stdout=-1, env=environment, text=True) for _ in range(trainings)]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    return max(found, key=lambda one: one["step"])


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Medians over the rounds, the ranges of the steps over them, and how busy the machine was before."""
    busy = os.getloadavg()
    runs = [{name: row(*shape, steps) for name, shape in ROWS.items()} for _ in range(rounds)]
    rows = {name: {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]} for name in ROWS}
    for name, found in rows.items():
        found["range"] = [round(pick(run[name]["step"] for run in runs), 5) for pick in (min, max)]
    return {"load before": busy, "rounds": rounds, "steps": steps, "preset": PRESET, "rows": rows}


def efficiency(found: dict[str, Any], name: str) -> tuple[float, float]:
    """Of a row: by the fastest rounds, as others' work only slows, and by the median CPU time."""
    (_, ranks, episodes), one, row = ROWS[name], found["rows"]["one rank"], found["rows"][name]
    share = episodes / (ROWS["one rank"][2] * ranks)
    return share * one["range"][0] / row["range"][0], share * one["cpu"] / row["cpu"]


def modelled(found: dict[str, Any], ranks: int, bandwidth: float, latency: float) -> float:
    """Efficiency of n ranks with 16 episodes each, against one."""
    one = found["rows"]["one rank"]
    draw = 16 * (ranks - 1) * one["draw"]
    ring = 2 * (ranks - 1) / ranks * one["bytes"] / bandwidth + 2 * (ranks - 1) * latency
    clock = math.ceil(math.log2(ranks)) * latency
    return one["step"] / (one["step"] + draw + ring + clock)


def tables(found: dict[str, Any]) -> None:
    """Both tables as Markdown."""
    heads = ("training", "step (ms), median (range)", "CPU of a rank (ms)", "efficiency", "of the core")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, one in found["rows"].items():
        low, high = (1000 * second for second in one["range"])
        times = f"{1000 * one['step']:.1f} ({low:.1f} to {high:.1f}) | {1000 * one['cpu']:.1f}"
        print(f"| {name} | {times} | " + " | ".join(f"{x:.1%}" for x in efficiency(found, name)) + " |")
    print(f"\n| ranks | {' | '.join(NETWORKS)} |\n|---|{'---|' * len(NETWORKS)}")
    for ranks in (1, 2, 4, 8, 16, 64):
        print(f"| {ranks} | " + " | ".join(f"{modelled(found, ranks, *net):.1%}" for net in NETWORKS.values()) + " |")
    both = found["rows"]["two ranks, as many episodes each"]
    print({key: x for key, x in both.items() if "reduce" in key or key in ("same", "draw", "bytes") or "check" in key})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables of the last measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return rank(options.rank, options.steps)
    if not options.tables:
        FILE.write_text(json.dumps(measure(options.rounds, options.steps), indent=1) + "\n")
    tables(json.loads(FILE.read_text()))


if __name__ == "__main__":
    main()
