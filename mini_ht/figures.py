"""Figures: how a training went, and one episode with what was generated for it."""

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.config import Config
from mini_ht.episodes import Episodes
from mini_ht.files import write_atomically
from mini_ht.generator import generate

RIGHT, WRONG = "#1a7f37", "#cf222e"
DRAWN = ("episodes", "train_accuracy")
MOST_CLASSES = 10  # more rows would be too small to read


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without lines that are none, such as a last one that was cut short."""
    rows = []
    for line in file.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def complete(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that have the numbers which a curve shows."""
    return [row for row in rows if all(isinstance(row.get(name), int | float) for name in DRAWN)]


def draw_curve(rows: Sequence[Mapping[str, Any]], lines: Mapping[str, float], file: Path) -> None:
    """Accuracy against episodes: training classes, unseen classes, and horizontal lines such as chance."""
    figure, axes = new_figure(7, 4)
    rows = complete(rows)
    episodes = [row["episodes"] for row in rows]
    axes.plot(episodes, [100 * row["train_accuracy"] for row in rows], color="#8c959f", label="training classes")
    seen = [row for row in rows if isinstance(row.get("validation_accuracy"), int | float)]
    x, y = [row["episodes"] for row in seen], [100 * row["validation_accuracy"] for row in seen]
    axes.plot(x, y, color="#0969da", linewidth=2, label="validation classes, never trained on")
    for (name, value), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(100 * value, color="#57606a", linestyle=style, linewidth=1, label=f"{name} {100 * value:.1f} %")
    axes.set(xlabel="training episodes", ylabel="query accuracy (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", framealpha=0.95, edgecolor="none")
    save_figure(figure, file)


def draw_episode(parameters: Mapping[str, NDArray[np.floating]], config: Config, episode: Episodes, file: Path) -> None:
    """The first episode of a batch: support images, generated first-layer kernels, queries with their guesses.

    One row a class. A green frame is a right answer, a red one a wrong answer; the number is the guessed class.
    """
    cnn = generate(parameters, config, episode.support[0], episode.labels[0])
    guesses = cnn(episode.query[0]).argmax(-1)  # [m]
    way = min(config.way, MOST_CLASSES)
    support = [episode.support[0][episode.labels[0] == label] for label in range(way)]
    shots = min(len(support[0]), 3)
    queries = min(int((episode.query_labels[0] == 0).sum()), 5)
    kernels = np.asarray(cnn.convs[0].weight[0]).mean(2)  # [3, 3, Cout], averaged over input channels
    columns = 4  # kernels a row
    kernel_rows = -(-kernels.shape[-1] // columns)

    figure, _ = new_figure(1.0 * (shots + queries + columns) + 2, max(way, kernel_rows) + 1.0, axes=False)
    place = {"wspace": 0.25, "left": 0.06, "right": 0.98, "top": 0.86, "bottom": 0.03}
    grid = figure.add_gridspec(1, 3, width_ratios=[shots, columns, queries], **place)
    parts = [grid[i].subgridspec(rows, n) for i, (rows, n) in enumerate([(way, shots), (way, columns), (way, queries)])]
    for row in range(way):
        for column in range(shots):
            axes = figure.add_subplot(parts[0][row, column])
            show(axes, support[row][column])
            if column == 0:
                axes.set_ylabel(f"class {row}", rotation=0, ha="right", va="center")
        right = episode.query_labels[0] == row
        for column, (image, guess) in enumerate(zip(episode.query[0][right], guesses[right], strict=True)):
            if column == queries:
                break
            axes = figure.add_subplot(parts[2][row, column])
            show(axes, image)
            colour = RIGHT if guess == row else WRONG
            axes.set_xlabel(f"{guess}", color=colour, fontsize=8, labelpad=1)
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=2)
    limit = float(np.abs(kernels).max())
    for index in range(min(kernels.shape[-1], columns * way)):
        axes = figure.add_subplot(parts[1][index // columns, index % columns])
        axes.imshow(kernels[..., index], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(xticks=[], yticks=[])
    for index, title in enumerate(["support set", "generated 3x3 kernels, layer 1", "queries and guessed class"]):
        box = grid[index].get_position(figure)
        figure.text((box.x0 + box.x1) / 2, 0.93, title, ha="center", fontsize=10)
    save_figure(figure, file)


def show(axes: Any, image: NDArray[np.floating]) -> None:
    """An image [H, W, C] in [0, 1]; grey ones with dark ink on white paper."""
    axes.imshow(1 - image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def new_figure(width: float, height: float, axes: bool = True) -> tuple[Any, Any]:
    """A figure in inches that needs no screen, with one set of axes or none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained" if axes else None)
    FigureCanvasAgg(figure)
    return figure, figure.subplots() if axes else None


def save_figure(figure: Any, file: Path) -> None:
    """Write a PNG, whole or not at all."""
    figure.savefig(packed := io.BytesIO(), format="png", dpi=120, facecolor="white")
    write_atomically(file, packed.getvalue())
