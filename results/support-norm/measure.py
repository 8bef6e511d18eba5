"""Where norm "support" could take its statistics from: writes PART.json beside itself.

    python results/support-norm/measure.py --data-dir ../shared/data/omniglot --part validation

Every row of a task is the same generator on the same episodes. Statistics come from the queries themselves (norm
"batch"), from the support set alone, from it and moved copies of its images, from it and 16 built-in characters
("company"), or from it and, with a share of 0.25 to 1, from training tasks ("shrunk"). Copies and company take part in
the support pass without a label.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import mini_ht
from mini_ht.cnn import GeneratedCNN
from mini_ht.datasets import ImageSet, glyphs, open_dataset
from mini_ht.episodes import Episodes, shifted
from mini_ht.evaluation import Score, evaluation_episodes

TASKS = tuple(itertools.product((2, 5, 20), (1, 5)))
SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)
CROWD, COPIES, MOVE = 16, 2, 2  # built-in characters; copies of each image, and by how many pixels at most


def beside(support: np.ndarray, labels: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A support set with unlabelled images [E, k, H, W, C] behind it."""
    more = np.full(others.shape[:2], -1)
    return np.concatenate([support, others], 1), np.concatenate([labels, more], 1)  # [E, n + k, ...] and [E, n + k]


def variants(parameters, config: mini_ht.Config, batch: Episodes) -> Iterator[tuple[str, GeneratedCNN]]:
    """The name and the generated CNN of each."""

    def make(support: np.ndarray, labels: np.ndarray, norm: str, shrink: float) -> GeneratedCNN:
        other = dataclasses.replace(config, norm=norm, shrink=shrink)
        return mini_ht.generate(parameters, other, torch.from_numpy(support), torch.from_numpy(labels))

    own = batch.support, batch.labels
    yield "batch", make(*own, "batch", 0.0)
    yield "support", make(*own, "support", 0.0)
    rng = np.random.default_rng(0)
    moves = [rng.integers(-MOVE, MOVE + 1, (*batch.labels.shape, 2)) for _ in range(COPIES)]
    moved = np.concatenate([shifted(batch.support, offsets) for offsets in moves], axis=1)  # [E, n * copies, H, W, C]
    yield "moved copies", make(*beside(*own, moved), "support", 0.0)
    crowd = glyphs(5, CROWD, drawings=1).pixels.astype(np.float32) / 255  # [16, H, W, C]
    together = beside(*own, np.broadcast_to(crowd, (len(batch.support), *crowd.shape)))
    yield "company", make(*together, "support", 0.0)
    for share in SHARES:
        yield f"shrunk {share}", make(*own, "support", share)
    yield "company, shrunk 0.9", make(*together, "support", 0.9)


def measure(parameters, config: mini_ht.Config, images: ImageSet, way: int, shot: int, episodes: int) -> list[dict]:
    """A row for each variant: accuracy, its gain over "support" on the same episodes, and the mean loss."""
    right: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for batch in evaluation_episodes(images, episodes, way=way, shot=shot, queries=5):
        query, targets = torch.from_numpy(batch.query), torch.from_numpy(batch.query_labels)
        for name, cnn in variants(parameters, config, batch):
            logits = cnn(query)[..., :way]  # [E, m, way]
            loss = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")  # [E, m]
            right.setdefault(name, []).extend((logits.argmax(-1) == targets).float().mean(1).tolist())
            losses.setdefault(name, []).extend(loss.mean(1).tolist())
    rows = []
    for name, values in right.items():
        score, gain = Score.of(np.array(values)), Score.of(np.array(values) - np.array(right["support"]))
        row = {"way": way, "shot": shot, "statistics": name, "accuracy": score.accuracy, "interval": score.interval}
        rows.append(row | {"gain": gain.accuracy, "gain_interval": gain.interval, "loss": float(np.mean(losses[name]))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the two Omniglot archives")
    parser.add_argument("--checkpoint", help="a finished run's folder; the generator of the package if not given")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--part", choices=["test", "validation", "glyphs"], default="validation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    parameters, config = mini_ht.load(options.checkpoint) if options.checkpoint else mini_ht.load_pretrained()
    data = open_dataset("omniglot", options.data_dir) | {"glyphs": open_dataset("glyphs")["test"]}
    rows = []
    for way, shot in TASKS:
        for row in measure(mini_ht.to_torch(parameters), config, data[options.part], way, shot, options.episodes):
            print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
            rows.append(row)
    Path(__file__).with_name(f"{options.part}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
