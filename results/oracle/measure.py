"""The oracle of figure 3: the CNN trained from scratch for each task, on most of the images of its classes.

    python results/oracle/measure.py --data-dir ../shared/data/omniglot
    python results/oracle/measure.py --table    # measured.jsonl as Markdown

Of the 20 drawings of each of a task's 20 classes the CNN trains on 15, moved by up to `shift` pixels but not turned, as
classes are fixed, and is measured on the other 5, in norm "batch". All tasks train side by side, each with weights,
scales and offsets of its own. Steps and learning rate were chosen on validation characters (`--parts validation`).
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini_ht.baselines.maml import layer_names
from mini_ht.baselines.method import Method, draw
from mini_ht.cnn import linear
from mini_ht.config import Config
from mini_ht.datasets import ImageSet, open_dataset
from mini_ht.episodes import Episodes, shifted
from mini_ht.episodes import draw as draw_rows
from mini_ht.evaluation import Score, evaluation_episodes
from mini_ht.kernels import conv_block
from mini_ht.presets import preset
from mini_ht.training.schedule import learning_rate

FILE = Path(__file__).with_name("measured.jsonl")
TRAINED, MEASURED = 15, 5  # drawings of a class; a step sees as many of each class as are measured
STEPS, RATE = 400, 0.01
SETTING = ("part", "channels", "tasks", "steps", "learning_rate")


def logits(weights: Mapping[str, Tensor], config: Config, x: Tensor) -> Tensor:
    """The CNN with other weights, scales and offsets for every task: x [E, N, H, W, C] -> [E, N, way]."""
    ones = torch.ones(config.channels, dtype=x.dtype)
    for name in layer_names(config)[:-1]:
        x, _ = conv_block(x, weights[f"{name}.weight"], ones, 0 * ones, slope=config.slope)
        # The block's own are shared by all episodes.
        gamma, beta = (weights[f"{name}.{part}"][:, None, None] for part in ("gamma", "beta"))  # [E, 1, 1, 1, Cout]
        x = x * gamma + beta
    return linear(x, weights["logits.weight"])


def fit(config: Config, tasks: Episodes, steps: int) -> dict[str, Tensor]:
    """Weights by name, each [E, ...], after `steps` steps of AdamW on the support images; tasks do not meet."""
    episodes, each = len(tasks.labels), tasks.labels.shape[1] // config.way  # tasks, and drawings of a class
    starts = [draw(dataclasses.replace(config, seed=config.seed + task), Method("maml")) for task in range(episodes)]
    weights = {name: torch.from_numpy(np.stack([start[name] for start in starts])) for name in starts[0]}  # [E, ...]
    groups: list[dict[str, Any]] = []
    for name, x in weights.items():
        rate = config.conv_rate if x.ndim == 5 else 1.0
        decay = config.weight_decay / rate if name.endswith(".weight") else 0.0
        groups.append({"params": [x.requires_grad_()], "weight_decay": decay, "rate": rate})
    optimiser = torch.optim.AdamW(groups, fused=True)
    rng, of_task = np.random.default_rng(config.seed), np.arange(episodes)[:, None]  # [E, 1]
    first = each * np.arange(config.way)[:, None]  # [way, 1]
    for step in range(steps):
        rows = (first + draw_rows(rng, np.full((episodes, config.way), each), MEASURED)).reshape(episodes, -1)  # [E, n]
        offsets = rng.integers(-config.shift, config.shift + 1, (*rows.shape, 2))
        images = shifted(tasks.support[of_task, rows], offsets)  # [E, n, H, W, C]
        targets = torch.from_numpy(tasks.labels[of_task, rows]).flatten()  # [E * n]
        guesses = logits(weights, config, torch.from_numpy(images)).flatten(0, 1)  # [E * n, way]
        for group in groups:
            group["lr"] = group["rate"] * learning_rate(config, step / steps)
        optimiser.zero_grad()
        F.cross_entropy(guesses, targets).backward()
        optimiser.step()
    return {name: x.detach() for name, x in weights.items()}


def oracle(config: Config, images: ImageSet, tasks: int, steps: int) -> Score:
    """Accuracy over tasks, on drawings that were not trained on."""
    task = {"way": config.way, "shot": TRAINED, "queries": MEASURED}
    (batch,) = evaluation_episodes(images, tasks, seed=config.seed, batch=tasks, **task)
    guesses = logits(fit(config, batch, steps), config, torch.from_numpy(batch.query)).argmax(-1).numpy()  # [E, m]
    return Score.of((guesses == batch.query_labels).mean(-1))


def read() -> list[dict[str, Any]]:
    """The rows that were measured so far."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [f"| characters | {' | '.join(SETTING[1:]).replace('_', ' ')} | accuracy | CPU seconds |", "|" + "---|" * 7]
    for row in rows:
        found = f"{100 * row['accuracy']:.2f} +- {100 * row['interval']:.2f} %", f"{row['seconds']:.0f}"
        lines.append(f"| {' | '.join([*(str(row[name]) for name in SETTING), *found])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the two Omniglot archives; downloaded if not given")
    parser.add_argument("--channels", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--parts", nargs="+", default=["test", "train"], choices=["test", "train", "validation"])
    parser.add_argument("--tasks", type=int, default=48)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learning-rate", type=float, default=RATE, help="peak, of all but the convs")
    parser.add_argument("--table", action="store_true", help="measure nothing, print measured.jsonl as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table(read()))
        return
    torch.set_num_threads(1)
    for channels in options.channels:
        config = preset(f"omniglot-20way-5shot-{channels}ch")
        config = dataclasses.replace(config, learning_rate=options.learning_rate, decay=1.0)
        images = open_dataset(config.dataset, options.data_dir, **config.data)
        for part in options.parts:
            start, setting = time.process_time(), (part, channels, options.tasks, options.steps, options.learning_rate)
            row = dict(zip(SETTING, setting, strict=True))
            row |= dataclasses.asdict(oracle(config, images[part], options.tasks, options.steps))
            row["seconds"] = round(time.process_time() - start, 1)
            others = [other for other in read() if tuple(other[name] for name in SETTING) != setting]
            FILE.write_text("".join(json.dumps(some) + "\n" for some in [*others, row]))
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
