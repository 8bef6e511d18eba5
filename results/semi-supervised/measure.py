"""What unlabelled images are worth to trained generators of 1, 2 and 3 encoder layers: appends to measured.jsonl.

    python results/semi-supervised/measure.py --data-dir ../shared/data/omniglot
    python results/semi-supervised/measure.py --table --figure

For each number of layers two generators see equally many training episodes: the control no unlabelled image, the other
one up to 9 a class, which come in over the first half. Each is then given 0 to 9 unlabelled images a class, with the
same labelled images and queries (norm batch), so that all differences are paired by episode. A line is written as a
training ends and has for each test episode how many queries were right. Killed, the same command goes on.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mini_ht
from mini_ht.datasets import ImageSet, open_dataset
from mini_ht.episodes import Episodes
from mini_ht.evaluation import Score, evaluation_episodes
from mini_ht.figures import new_figure, read_metrics, save_figure
from mini_ht.training.checkpoint import STATE
from mini_ht.training.loop import train

PRESET = "omniglot-20way-1shot-8ch-logits"
RECIPE = {"shared_convs": "strided", "learning_rate": 2e-3, "decay": 1.0, "turned": 1.0}  # the preset's own then
EPISODES = 40_960  # of a training
UNLABELLED, COUNTS = 9, (0, 1, 3, 5, 9)  # images a class, in training at most, and in the test
TEST_EPISODES, QUERIES = 1000, 5
MEASURED, FIGURE = (Path(__file__).with_name(name) for name in ("measured.jsonl", "accuracy.png"))
KEY = ("layers", "unlabelled", "seed")  # what tells trainings of equally many episodes apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def keep_unlabelled(batch: Episodes, count: int) -> Episodes:
    """The same episodes with the first `count` unlabelled images of each class."""
    known = batch.labels[0] >= 0  # [n], the same in each episode: class by class, unlabelled ones first
    kept = known | (np.arange(len(known)) % (len(known) // batch.classes.shape[1]) < count)
    some = {name: getattr(batch, name)[:, kept] for name in ("support", "labels", "support_rows")}
    return dataclasses.replace(batch, **some)


def count_right(parameters, config: mini_ht.Config, images: ImageSet) -> np.ndarray:
    """How many queries of each episode are right, by the number of unlabelled images: [counts, episodes]."""
    found, task = [], config.task | {"unlabelled": UNLABELLED, "queries": QUERIES}
    for batch in evaluation_episodes(images, TEST_EPISODES, **task):
        rows = []
        for some in (keep_unlabelled(batch, count) for count in COUNTS):
            support, labels, query = map(torch.from_numpy, (some.support, some.labels, some.query))
            guesses = mini_ht.generate(parameters, config, support, labels, check=False)(query).argmax(-1)  # [E, m]
            rows.append((guesses.numpy() == some.query_labels).sum(-1))
        found.append(rows)
    return np.concatenate(found, axis=1)


def measure(config: mini_ht.Config, images: dict[str, ImageSet], run_dir: Path) -> dict[str, Any]:
    """Train, or go on, and test: a line of the file."""
    # Without validation characters: with unlabelled images a look at them would take a fifth of the time.
    state = train(config, {"train": images["train"]}, run_dir, resume=(run_dir / STATE).exists(), workers=1)
    with torch.no_grad():
        right = count_right(mini_ht.to_torch(mini_ht.load(run_dir)[0]), config, images["test"])
    said = ("layers", "unlabelled", "seed", "episodes", "introduce", "norm", "protocol", "split", "way", "shot")
    line = {"preset": PRESET} | {name: getattr(config, name) for name in said}
    line |= {"queries": QUERIES, "seconds": round(state.seconds), "counts": list(COUNTS)}
    accuracy = right.mean(1) / (config.way * QUERIES)
    return line | {"accuracy": accuracy.round(4).tolist(), "right": right.tolist()}


def read(episodes: int) -> dict[tuple[int, ...], np.ndarray]:
    """The accuracies [counts, test episodes] of finished trainings of so many episodes, by KEY."""
    lines = read_metrics(MEASURED) if MEASURED.exists() else []
    return {
        tuple(line[name] for name in KEY): np.array(line["right"]) / (line["way"] * line["queries"])
        for line in lines
        if line["episodes"] == episodes
    }


def percent(accuracies: np.ndarray) -> str:
    """Mean and 95 % interval of accuracies or differences [episodes]."""
    score = Score.of(accuracies)
    return f"{100 * score.accuracy:.2f} +- {100 * score.interval:.2f}"


def table(found: dict[tuple[int, ...], np.ndarray]) -> str:
    """A row a training. Gain: most unlabelled images over none; over control: over the control without any."""
    names = ["layers", "seed", "trained with", *(f"{count} unlabelled" for count in COUNTS), "gain", "over control"]
    rows = [names, ["---"] * len(names)]
    for (layers, unlabelled, seed), accuracies in sorted(found.items()):
        control = found.get((layers, 0, seed))
        over = "not run" if control is None else percent(accuracies[-1] - control[0])
        own = [*map(percent, accuracies), percent(accuracies[-1] - accuracies[0])]
        rows.append([str(layers), str(seed), f"0 .. {unlabelled}" if unlabelled else "0", *own, over])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(found: dict[tuple[int, ...], np.ndarray], file: Path) -> None:
    """Accuracy against the number of unlabelled images, by layers: means over seeds, bars for test episodes alone."""
    figure, axes = new_figure(7, 4.5)
    for layers, unlabelled in sorted({key[:2] for key in found}):
        mean = np.mean([accuracies for key, accuracies in found.items() if key[:2] == (layers, unlabelled)], axis=0)
        scores = [Score.of(row) for row in mean]
        y, bars = (100 * np.array([getattr(score, name) for score in scores]) for name in ("accuracy", "interval"))
        label = f"{layers} layer{'s' * (layers > 1)}{'' if unlabelled else ', control'}"
        style = {"color": COLOURS[(layers - 1) % len(COLOURS)], "linestyle": "-" if unlabelled else ":", "capsize": 3}
        axes.errorbar(COUNTS, y, bars, label=label, marker="o", markersize=4, **style)
    axes.set(xlabel="unlabelled images a class", ylabel="accuracy on test characters (%)", xticks=COUNTS)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)  # inside it would hide a line
    save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the two Omniglot archives; downloaded if not given")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3], help="encoder layers")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    parser.add_argument("--runs", type=Path, default=Path("runs/semi-supervised"), help="folder of the checkpoints")
    parser.add_argument("--table", action="store_true", help="train nothing; print a Markdown table")
    parser.add_argument("--figure", action="store_true", help=f"train nothing; draw {FIGURE.name}")
    options = parser.parse_args()
    if options.table:
        print(table(read(options.episodes)))
    if options.figure:
        draw(read(options.episodes), FIGURE)
    if options.table or options.figure:
        return
    preset = dataclasses.replace(mini_ht.preset(PRESET), episodes=options.episodes, **RECIPE)
    images = open_dataset(preset.dataset, options.data_dir, **preset.data)
    for seed in options.seeds:
        for layers in options.layers:
            for unlabelled in (0, UNLABELLED):
                if (layers, unlabelled, seed) in read(options.episodes):
                    continue
                task = {"unlabelled": unlabelled, "introduce": options.episodes // 2 if unlabelled else 0}
                config = dataclasses.replace(preset, layers=layers, seed=seed, **task)
                name = f"{layers}-layers-{unlabelled}-unlabelled-{options.episodes}-episodes-seed-{seed}"
                line = measure(config, images, options.runs / name)
                with MEASURED.open("ab", buffering=0) as stream:  # in one go, as several processes may write
                    stream.write(json.dumps(line).encode() + b"\n")
                print({key: value for key, value in line.items() if key != "right"}, flush=True)


if __name__ == "__main__":
    main()
