"""Figures of what a generator does, for tutorials and notebooks: pyplot figures that are returned, not saved."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.inspection import AttentionMaps, principal_plane, spread

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
MARKERS = "osD^vPX*<>"
FAINTEST = 1e-3  # attention weights below are drawn as this one


def draw_attention(maps: AttentionMaps, episode: int = 0) -> Any:
    """Attention weights of one episode: a panel for each encoder layer (rows) and head (columns), on one log scale.

    A panel's rows are the tokens that ask, its columns those that are looked at: placeholders, then the support images
    by class, the unlabelled ones (?) last, without padding. Lines stand between the groups. maps holds NumPy arrays.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    labels, first = maps.labels[episode], maps.placeholders
    seen = np.arange(len(labels)) if maps.mask is None else np.flatnonzero(maps.mask[episode])
    sortable = np.where(labels < 0, labels.max() + 1, labels)[seen]
    order = np.concatenate([np.arange(first), first + seen[np.argsort(sortable, kind="stable")]])  # [T]
    names, counts = np.unique(sortable, return_counts=True)
    borders = np.cumsum([0, first, *counts])  # where each group begins, and the end
    step = -(-len(names) // 8)  # names that overlap could not be read
    classes = ("?" if name > labels.max() else str(name) if k % step == 0 else "" for k, name in enumerate(names))
    words = ["$\\mu$", *classes]
    grid = (len(maps.weights), maps.weights[0].shape[1])
    figure, panels = plt.subplots(*grid, figsize=(7, 0.6 + 3.2 * grid[0]), layout="constrained", squeeze=False)
    for number, (row, weights) in enumerate(zip(panels, maps.weights, strict=True)):
        rows = order if weights.shape[2] > first else order[:first]
        for head, axes in enumerate(row):
            shown = np.maximum(weights[episode, head][rows][:, order], FAINTEST)  # [asking, looked at]
            image = axes.imshow(
                shown, cmap="cividis", norm=LogNorm(FAINTEST, 1), aspect="auto", interpolation="nearest"
            )
            for border in borders[1:-1] - 0.5:
                axes.axvline(border, color="white", linewidth=0.6)
                if border < len(rows) - 1:
                    axes.axhline(border, color="white", linewidth=0.6)
            middles = (borders[:-1] + borders[1:] - 1) / 2
            axes.set_xticks(middles, words, fontsize=7)
            axes.set_yticks(middles[middles < len(rows)], words[: int((middles < len(rows)).sum())], fontsize=7)
            axes.set_title(f"encoder layer {number}, head {head}", fontsize=9)
    figure.supxlabel("token looked at: placeholders ($\\mu$), then support images by class", fontsize=9)
    figure.supylabel("token that asks", fontsize=9)
    figure.colorbar(image, ax=panels, label=f"attention weight ({FAINTEST:g} or less is darkest)", shrink=0.7)
    return figure


def draw_kernels(weight: NDArray[np.floating]) -> Any:
    """Generated kernels: a row for each episode, a column for each output channel, and a last row with their spread.

    weight [E, 3, 3, Cin, Cout], drawn as means over the input channels; the spread is that of `spread`, in per cent.
    """
    import matplotlib.pyplot as plt

    kernels, varies = weight.mean(3), 100 * spread(weight).mean(2)  # [E, 3, 3, Cout], [3, 3, Cout]
    episodes, channels, limit = len(kernels), kernels.shape[-1], np.abs(kernels).max()
    size = (7, 0.9 + 0.72 * (episodes + 1))
    figure, panels = plt.subplots(episodes + 1, channels, figsize=size, layout="constrained", squeeze=False)
    for row, name in enumerate([*(f"task {e}" for e in range(episodes)), "spread"]):
        for channel, axes in enumerate(panels[row]):
            if row < episodes:
                style: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
                signed = axes.imshow(kernels[row, ..., channel], **style)
            else:
                style = {"cmap": "viridis", "vmin": 0, "vmax": max(varies.max(), 1e-30)}
                plain = axes.imshow(varies[..., channel], **style)
            axes.set(xticks=[], yticks=[])
        panels[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for channel, axes in enumerate(panels[0]):
        axes.set_title(f"channel {channel}", fontsize=8)
    figure.colorbar(signed, ax=panels[:-1], label="weight", aspect=30)
    figure.colorbar(plain, ax=panels[-1:], label="% of rms", format="%.2g")
    return figure


def draw_plane(points: NDArray[np.floating], groups: NDArray[np.integer], names: Sequence[str]) -> Any:
    """Points [N, F] in the plane in which they vary most (PCA), with a colour and marker for each group [N].

    Both axes have the same scale, so that distances can be compared. names: one for each group.
    """
    import matplotlib.pyplot as plt

    places, shares = principal_plane(points)  # [N, 2], [2]
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for group, name in enumerate(names):
        x, y = places[groups == group].T
        colour, marker = COLOURS[group % len(COLOURS)], MARKERS[group % len(MARKERS)]
        axes.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.75, linewidths=0, label=name)
    one, two = (f"principal component {k + 1} ({100 * share:.0f} % of the variance)" for k, share in enumerate(shares))
    axes.set(xlabel=one, ylabel=two, aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
