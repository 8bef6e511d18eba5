"""Prints the best rows for each number of channels beside the paper's figures, as Markdown for docs/results.md."""

import argparse
from pathlib import Path
from typing import Any

import rows

COLUMNS = (
    "shots",
    "channels",
    "paper: HT, MAML++",
    "logits layer generated",
    "norm support",
    "protocol released",
    "thousands of episodes",
    "all layers generated",
    "norm support",
    "thousands of episodes",
    "last conv among class means",
    "norm support",
    "protocol released",
    "thousands of episodes",
    "split alphabet",
)


def training_episodes(row: str) -> float:
    """Counted as if all had 20 classes, with those of the row that this one began with."""
    found, command = rows.kept_summary(row), rows.training(row)
    before = training_episodes(Path(command[command.index("--start") + 1]).name) if "--start" in command else 0
    return before + found["episodes"] * found["config"]["way"] / 20


def best(means: bool | None = None, **wanted: Any) -> dict[int, str]:
    """The row of the highest accuracy by channels, of those whose config has these values.

    means: with a last conv by attention among class means, without one, or either.
    """
    found: dict[int, str] = {}
    for row in rows.found_rows():
        config = rows.kept_summary(row)["config"]
        if any(config[name] != value for name, value in wanted.items()):
            continue
        if means is not None and means != bool(config.get("discriminant")):  # older rows do not have it
            continue
        beaten = found.setdefault(config["channels"], row)
        if rows.kept_figures(row)[0]["accuracy"] > rows.kept_figures(beaten)[0]["accuracy"]:
            found[config["channels"]] = row
    return dict(sorted(found.items()))


def entries(row: str | None, *ways: int) -> list[str]:
    """A row's accuracy with a link, those in other ways, and how long it was trained; empty where there is no row."""
    if row is None:
        return [""] * (len(ways) + 2)
    first, *others = (rows.percent(rows.kept_figures(row)[way]) for way in (0, *ways))
    return [f"[{first}](../results/omniglot/{row})", *others, f"{training_episodes(row) / 1000:,.0f}"]


def table() -> str:
    """The best rows, split random but in the last column, as Markdown."""
    lines = [rows.cells(COLUMNS), rows.cells(["---"] * len(COLUMNS))]
    for shot, published in rows.PAPER.items():
        logits, layers = (best(False, shot=shot, split="random", generate=which) for which in ("logits", "all"))
        found, unseen = best(True, shot=shot, split="random"), best(shot=shot, split="alphabet", generate="logits")
        for channels in sorted({*logits, *layers}):
            known = [str(shot), str(channels), published.get(channels, "")]
            ours = [*entries(logits.get(channels), 1, 2), *entries(layers.get(channels), 1)]
            ours += entries(found.get(channels), 1, 2)
            lines.append(rows.cells([*known, *ours, entries(unseen.get(channels))[0]]))
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(table())
