"""CNNs trained for their task: the oracle of figure 3, from scratch, and what training adds to a generated CNN.

    python results/oracle/measure.py --data-dir ../shared/data/omniglot
    python results/oracle/measure.py --start runs/omniglot/5shot-4ch-logits-quick --data-dir ../shared/data/omniglot
    python results/oracle/measure.py --table    # measured.jsonl as Markdown

Of the 20 drawings of each of a task's 20 classes the CNN trains on 15, moved by up to `shift` pixels but not turned, as
classes are fixed, and is measured on the other 5, in norm "batch". All tasks train side by side, each with weights,
scales and offsets of its own. Steps, rate and its schedule were chosen on validation characters (`--parts validation`).

With `--start` each CNN begins as a generator wrote it, from `--drawings` images a class, and the same images are what
it trains on: nothing of it (0 steps), its logits layer, that and the last conv, or everything.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini_ht import InputError, generate, load, to_torch
from mini_ht.baselines.maml import layer_names
from mini_ht.baselines.method import Method, draw
from mini_ht.cnn import linear
from mini_ht.config import Config
from mini_ht.datasets import ImageSet, open_dataset
from mini_ht.episodes import Episodes, shifted
from mini_ht.episodes import draw as draw_rows
from mini_ht.evaluation import Score, evaluation_episodes
from mini_ht.files import write_atomically
from mini_ht.kernels import conv_block
from mini_ht.presets import preset
from mini_ht.training.schedule import learning_rate

FILE = Path(__file__).with_name("measured.jsonl")
TRAINED, MEASURED = 15, 5  # drawings of a class; a step sees as many of each class as are measured
STEPS, TUNING_STEPS, RATE = 800, 100, 0.01
SCRATCH = "scratch"
SETTING = ("start", "trained", "part", "channels", "drawings", "tasks", "steps", "learning_rate", "decay")
Weights = dict[str, Tensor]  # by name, each [E, ...]


def logits(weights: Mapping[str, Tensor], config: Config, x: Tensor) -> Tensor:
    """The CNN with other weights, scales and offsets for every task: x [E, N, H, W, C] -> [E, N, way]."""
    ones = torch.ones(config.channels, dtype=x.dtype)
    for name in layer_names(config)[:-1]:
        x, _ = conv_block(x, weights[f"{name}.weight"], ones, 0 * ones, slope=config.slope)
        # The block's own are shared by all episodes.
        gamma, beta = (weights[f"{name}.{part}"][:, None, None] for part in ("gamma", "beta"))  # [E, 1, 1, 1, Cout]
        x = x * gamma + beta
    return linear(x, weights["logits.weight"])


def fresh(config: Config, tasks: Episodes) -> Weights:
    """Random starts, another for each task."""
    seeds = range(config.seed, config.seed + len(tasks.labels))
    starts = [draw(dataclasses.replace(config, seed=seed), Method("maml")) for seed in seeds]
    return {name: torch.from_numpy(np.stack([start[name] for start in starts])) for name in starts[0]}


def written(start: str, tasks: Episodes) -> Weights:
    """What the generator `start` writes for each task."""
    parameters, config = load(start)
    if config.generate_bias or config.generate_norm:
        raise InputError(f"{start} generates biases or norms; wanted a generator of weights alone")
    with torch.no_grad():
        cnn = generate(to_torch(parameters), config, *map(torch.from_numpy, (tasks.support, tasks.labels)))
    weights = {"logits.weight": cnn.logits_weight}
    for name, conv in zip(layer_names(config)[:-1], cnn.convs, strict=True):
        weights[f"{name}.weight"] = conv.weight
        for part in ("gamma", "beta"):
            weights[f"{name}.{part}"] = getattr(conv, part).expand(len(tasks.labels), 1, -1)  # [E, 1, Cout]
    return {name: x.detach() for name, x in weights.items()}


def fit(config: Config, weights: Weights, tasks: Episodes, steps: int, layers: Sequence[str]) -> Weights:
    """The weights after `steps` steps of AdamW on the support images, those of `layers` trained; tasks do not meet."""
    weights = {name: x.clone() for name, x in weights.items()}
    episodes, each = len(tasks.labels), tasks.labels.shape[1] // config.way  # tasks, and drawings of a class
    groups: list[dict[str, Any]] = []
    for name, x in weights.items():
        if name.split(".")[0] in layers:
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


def score(config: Config, weights: Weights, tasks: Episodes) -> Score:
    """Accuracy over tasks, on drawings that were not trained on."""
    guesses = logits(weights, config, torch.from_numpy(tasks.query)).argmax(-1).numpy()  # [E, m]
    return Score.of((guesses == tasks.query_labels).mean(-1))


def drawn(config: Config, images: ImageSet, tasks: int, drawings: int) -> Episodes:
    """The tasks, all at once."""
    task = {"way": config.way, "shot": drawings, "queries": MEASURED}
    return next(evaluation_episodes(images, tasks, seed=config.seed, batch=tasks, **task))


def read() -> list[dict[str, Any]]:
    """The rows that were measured so far."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def keep(setting: tuple[Any, ...], score: Score, seconds: float) -> None:
    """Write a row, in place of one of the same setting, and print it."""
    row = dict(zip(SETTING, setting, strict=True)) | dataclasses.asdict(score) | {"seconds": round(seconds, 1)}
    others = [other for other in read() if tuple(other[name] for name in SETTING) != setting]
    write_atomically(FILE, "".join(json.dumps(some) + "\n" for some in [*others, row]).encode())
    print(json.dumps(row), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = [*(name.replace("_", " ") for name in SETTING), "accuracy", "CPU seconds"]
    columns[SETTING.index("part")] = "characters"
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        found = f"{100 * row['accuracy']:.2f} +- {100 * row['interval']:.2f} %", f"{row['seconds']:.0f}"
        lines.append(f"| {' | '.join([*(str(row[name]) for name in SETTING), *found])} |")
    return "\n".join(lines)


def measure(config: Config, options: argparse.Namespace) -> None:
    """All rows of one CNN."""
    start, (*_, last, _) = options.start, layer_names(config)
    images = open_dataset(config.dataset, options.data_dir, **config.data)
    drawings = options.drawings or (config.shot if start else TRAINED)
    steps = options.steps or (TUNING_STEPS if start else STEPS)
    choices = {"nothing": [], "logits": ["logits"], "last conv, logits": [last, "logits"]} if start else {}
    for part in options.parts:
        tasks = drawn(config, images[part], options.tasks, drawings)
        for trained, layers in {**choices, "all": layer_names(config)}.items():
            begun = time.process_time()
            weights = written(start, tasks) if start else fresh(config, tasks)
            if layers:
                weights = fit(config, weights, tasks, steps, layers)
            name, count = Path(start).name if start else SCRATCH, steps if layers else 0
            rates = config.learning_rate, config.decay
            setting = (name, trained, part, config.channels, drawings, options.tasks, count, *rates)
            keep(setting, score(config, weights, tasks), time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the two Omniglot archives; downloaded if not given")
    parser.add_argument("--start", metavar="RUN", help="begin with the CNNs of this generator, not from scratch")
    parser.add_argument("--channels", type=int, nargs="+", default=[4, 6, 8], help="from scratch only")
    parser.add_argument("--parts", nargs="+", default=["test", "train"], choices=["test", "train", "validation"])
    parser.add_argument("--tasks", type=int, default=48)
    parser.add_argument("--drawings", type=int, help=f"trained on, of each class: {TRAINED}, or the generator's shots")
    parser.add_argument("--steps", type=int, help=f"{STEPS}, or {TUNING_STEPS} of a generated CNN")
    parser.add_argument("--learning-rate", type=float, default=RATE, help="peak, of all but the convs")
    parser.add_argument("--table", action="store_true", help="measure nothing, print measured.jsonl as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table(read()))
        return
    for name in ("tasks", "drawings", "steps"):
        if (came := getattr(options, name)) is not None and came < 1:
            parser.error(f"--{name} {came} came; wanted at least 1")
    torch.set_num_threads(1)
    try:
        begun = [load(options.start)[1]] if options.start else []
        configs = begun or [preset(f"omniglot-20way-5shot-{channels}ch") for channels in options.channels]
        for config in configs:
            decay = 1.0 if begun else config.decay  # a few steps take a cosine, many the preset's schedule
            measure(dataclasses.replace(config, learning_rate=options.learning_rate, decay=decay), options)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
