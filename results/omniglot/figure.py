"""Draws the rows of the Omniglot table.

accuracy.png: by channels beside the paper's, and by length of training. small.png: 4 channels and 5 shots, by what is
generated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import best
import numpy as np
import rows

from mini_ht.figures import new_figure, save_figure

# Words in a row's name.
RECIPES = {"strided": "-strided", "turned": "-turned", "today's": "", "wide": "-wide", "blurred": "-hours-blurred"}
LENGTHS = ("-brief", "-quick", "-twice", "-short", "", "-hour", "-hours", "-long", "-longer")
SMALL = {  # rows that follow each other
    "the logits layer, behind as many of 1 shot": ["5shot-4ch-logits-quick"],
    "all layers by transformers, the same": ["5shot-4ch-all-quick"],
    "the logits layer, and the last conv by class means": [
        f"5shot-4ch-last1-discriminant-{x}" for x in ("quick", "twice")
    ],
    "all layers, the last conv by class means, images moved by 1 pixel": [
        f"5shot-4ch-all-discriminant-{x}" for x in ("quick", "steady")
    ],
    "all layers, the last conv by class means": [
        f"5shot-4ch-all-discriminant-{x}" for x in ("quick", "twice", "thrice")
    ],
}
SMOOTHED = 7  # measurements
OURS, GENERATED, ADAPTED = "#0072B2", "#D55E00", "#57606a"
COLOURS = (ADAPTED, "#009E73", OURS, GENERATED, "#CC79A7")


def accuracy(row: str, name: str = "accuracy") -> float:
    """A row's accuracy or its interval (%), disjoint and norm batch."""
    return 100 * rows.kept_figures(row)[0][name]


def logarithmic(axes: Any, *ticks: int) -> None:
    """A logarithmic x axis with these numbers at it."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, labels=list(map(str, ticks)))
    axes.minorticks_off()


def draw_channels(axes: Any) -> None:
    """Accuracy against channels: the best rows, and what the paper has by its own protocol."""
    for shot, style in ((1, "-"), (5, "--")):
        here = {channels: accuracy(row) for channels, row in best.best(shot=shot, split="random").items()}
        paper = {channels: [float(text) for text in both.split(", ")] for channels, both in rows.PAPER[shot].items()}
        ht, maml = ({channels: both[which] for channels, both in paper.items()} for which in (0, 1))
        lines = (here, "here", OURS), (ht, "paper: HT", GENERATED), (maml, "paper: MAML++", ADAPTED)
        for points, name, colour in lines:
            label = f"{name}, {shot} shot{'s' * (shot > 1)}"
            axes.plot(list(points), list(points.values()), color=colour, linestyle=style, marker="o", label=label)
    axes.set(xlabel="channels of the CNN", ylabel="accuracy on unseen characters (%)")
    logarithmic(axes, 4, 8, 16, 32, 48, 64)


def draw_recipes(axes: Any) -> None:
    """Accuracy against the length of the training, 1 shot, 8 channels, the logits layer generated."""
    measured = rows.found_rows()
    for (label, word), colour in zip(RECIPES.items(), COLOURS, strict=True):
        trained = [row for length in LENGTHS if (row := f"1shot-8ch-logits{word}{length}") in measured]
        trained.sort(key=best.training_episodes)
        x = [best.training_episodes(row) / 1000 for row in trained]
        y, bars = ([accuracy(row, name) for row in trained] for name in ("accuracy", "interval"))
        axes.errorbar(x, y, bars, color=colour, marker="o", capsize=3, label=f"recipe: {label}")
    axes.set(xlabel="training: thousands of episodes of 20 classes", ylabel="accuracy, 1 shot, 8 channels (%)")
    logarithmic(axes, 20, 50, 100, 200, 500, 1000, 2000)


def draw(file: Path) -> None:
    """Both, side by side."""
    figure, _ = new_figure(11, 4.5, axes=False)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    draw_channels(left)
    draw_recipes(right)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize=8, handlelength=4)
    save_figure(figure, file)


def draw_small(file: Path) -> None:
    """Accuracy on validation characters in training, 4 channels and 5 shots, and on test characters behind it."""
    figure, axes = new_figure(8, 4.5)
    for (label, some), colour in zip(SMALL.items(), COLOURS, strict=True):
        before = 0
        for row in some:
            lines = map(json.loads, (rows.HERE / row / "metrics.jsonl").read_text().splitlines())
            found = [(line["episodes"], line["validation_accuracy"]) for line in lines if line["validation_accuracy"]]
            x, y = np.array(found).T
            x, y = (np.convolve(part, np.full(SMOOTHED, 1 / SMOOTHED), "valid") for part in (x, 100 * y))
            axes.plot((before + x) / 1000, y, color=colour, label=label if not before else None)
            before += rows.kept_summary(row)["episodes"]
            axes.errorbar(before / 1000, accuracy(row), accuracy(row, "interval"), color=colour, fmt="o", capsize=3)
    axes.set(xlabel="thousands of training episodes of 5 shots", ylim=(60, None))
    axes.set(ylabel="accuracy, 20-way 5-shot (%): lines, validation;\ndots, test characters")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    save_figure(figure, file)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw(rows.HERE / "accuracy.png")
    draw_small(rows.HERE / "small.png")
