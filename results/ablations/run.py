"""What each choice of the generator is worth (paper, appendix D): one model, one change at a time, two seeds.

    python results/ablations/run.py --data-dir ../shared/data/omniglot
    python results/ablations/run.py --table

Every run trains the same small preset on one core. What ablations.jsonl, beside this script, has already is skipped,
so that a killed run goes on where it stopped, and several processes with other variants in --only may share the work.
Accuracy is measured on characters that were never trained on (the validation part) and on those of the training.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mini_ht
from mini_ht.datasets import ImageSet, open_dataset
from mini_ht.evaluation import Score, evaluate, evaluation_episodes
from mini_ht.parameters import generator_size
from mini_ht.training.loop import train

FILE = Path(__file__).with_name("ablations.jsonl")
BASE = dataclasses.replace(mini_ht.preset("omniglot-20way-1shot-4ch"), turned=1.0)  # as when this began
EVALUATED = 400  # episodes
# The grid: each name is a field and its value; BASE has the values that are missing.
GRID: dict[str, tuple[Any, ...]] = {
    "layers": (1, 3),
    "encoding": (16, 64),
    "local_features": (0, 8, 32),
    "shared_features": (0, 16, 32),
    "heads": (1, 4, 8),
    "key_width": (0.2, 0.5, 1.5),
    "value_width": (0.2, 0.5, 1.5),
    "inner_width": (0.2, 0.5, 1.5),
    "generator": ("decoder", "separate"),
    "allocation": ("spatial",),
    "attention": ("sigmoid",),
    "generate_bias": (True,),
    "generate_norm": (True,),
}
VARIANTS: dict[str, dict[str, Any]] = {"base": {}}
VARIANTS |= {f"{field}={value}": {field: value} for field, values in GRID.items() for value in values}
VARIANTS["generate_bias,norm=True"] = {"generate_bias": True, "generate_norm": True}


def results() -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def measure(name: str, seed: int, episodes: int, data: dict[str, ImageSet]) -> dict[str, Any]:
    """Train one variant and evaluate it; times are CPU seconds of this process."""
    config = dataclasses.replace(BASE, episodes=episodes, seed=seed, **VARIANTS[name])
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        train(config, {"train": data["train"]}, Path(folder), workers=1, quiet=True)
        seconds = time.process_time() - begun
        parameters = mini_ht.to_torch(mini_ht.load(folder)[0])
    row: dict[str, Any] = {"variant": name, "seed": seed, "episodes": episodes, "norm": "batch"}
    for part in ("validation", "train"):
        batches = evaluation_episodes(data[part], EVALUATED, way=config.way, shot=config.shot)
        with torch.no_grad():
            score: Score = evaluate(parameters, config, batches, norm="batch")
        row |= {part: round(score.accuracy, 5), f"{part}_interval": round(score.interval, 5)}
    speed = {"cpu_seconds": round(seconds, 1), "episodes_per_cpu_second": round(episodes / seconds, 1)}
    return row | {"evaluated": EVALUATED, "generator_size": generator_size(config)} | speed


def table(episodes: int) -> str:
    """Markdown; accuracies in percent, differences to the base in points, means over the seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(results(), key=lambda row: row["seed"]):
        if row["episodes"] == episodes:
            found.setdefault(row["variant"], []).append(row)
    base = {row["seed"]: row for row in found.get("base", [])}
    lines = ["| variant | unseen characters, % | difference | training characters, % | numbers | episodes / CPU s |"]
    lines.append("|---|---|---|---|---|---|")
    for name in (name for name in VARIANTS if name in found):
        rows = found[name]
        pairs = [100 * (row["validation"] - base[row["seed"]]["validation"]) for row in rows if row["seed"] in base]
        gain = f"{np.mean(pairs):+.2f}" if pairs and name != "base" else ""
        unseen = ", ".join(f"{100 * row['validation']:.2f}" for row in rows)
        seen, speed = (np.mean([row[key] for row in rows]) for key in ("train", "episodes_per_cpu_second"))
        lines.append(f"| {name} | {unseen} | {gain} | {100 * seen:.2f} | {rows[0]['generator_size']:,} | {speed:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the two Omniglot archives")
    parser.add_argument("--episodes", type=int, default=12288)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(options.episodes))
        return
    torch.set_num_threads(1)
    data = open_dataset(BASE.dataset, options.data_dir, **BASE.data)
    for seed in options.seeds:
        for name in options.only:
            if (name, seed, options.episodes) in {(row["variant"], row["seed"], row["episodes"]) for row in results()}:
                print(f"{name}, seed {seed}: measured before", file=sys.stderr)
                continue
            row = measure(name, seed, options.episodes, data)
            with FILE.open("a") as file:
                file.write(json.dumps(row) + "\n")
            figures = f"{row['validation']:.2%} unseen, {row['train']:.2%} training, {row['cpu_seconds']:.0f} s"
            print(f"{name}, seed {seed}: {figures}", file=sys.stderr)


if __name__ == "__main__":
    main()
