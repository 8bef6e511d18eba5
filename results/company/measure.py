"""What unlabelled company does to small support sets under norm "support": writes PART.json beside itself.

    python results/company/measure.py --data-dir ../shared/data/omniglot --part validation

The CNN takes its norm statistics from the support set. Company is a few built-in glyphs that join it without a label:
they belong to no class, and say what drawings look like. The same episodes for every number of them.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

import mini_ht
from mini_ht.datasets import ImageSet, glyphs, open_dataset
from mini_ht.evaluation import Score, evaluation_episodes

WAYS, SHOTS, COMPANY = (2, 3, 5, 10, 20), (1, 3, 5), (0, 4, 8, 16)


def measure(images: ImageSet, way: int, shot: int, episodes: int) -> list[dict[str, float]]:
    """A row for each number of companions: accuracy with its interval, mean loss, and the gain over none."""
    parameters, config = mini_ht.load_pretrained("omniglot")
    crowd = glyphs(5, max(COMPANY), drawings=1).pixels.astype(np.float32) / 255  # [most, H, W, C]
    right: dict[int, list[float]] = {count: [] for count in COMPANY}
    losses: dict[int, list[float]] = {count: [] for count in COMPANY}
    for batch in evaluation_episodes(images, episodes, way=way, shot=shot, queries=5):
        for count in COMPANY:
            others = np.broadcast_to(crowd[:count], (len(batch.support), count, *crowd.shape[1:]))
            support = np.concatenate([batch.support, others], axis=1)  # [E, n + count, H, W, C]
            labels = np.pad(batch.labels, ((0, 0), (0, count)), constant_values=-1)
            cnn = mini_ht.generate(parameters, config, support, labels).with_norm("support")
            logits = cnn(batch.query)[..., :way].astype(np.float64)  # [E, m, way]
            logits -= logits.max(-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            right[count] += (logits.argmax(-1) == batch.query_labels).mean(-1).tolist()
            losses[count] += (-np.take_along_axis(logits, batch.query_labels[..., None], -1)).mean((1, 2)).tolist()
    rows = []
    for count in COMPANY:
        score, gain = Score.of(np.array(right[count])), Score.of(np.array(right[count]) - np.array(right[0]))
        row = {"way": way, "shot": shot, "company": count, "accuracy": score.accuracy, "interval": score.interval}
        row |= {"gain": gain.accuracy, "gain_interval": gain.interval, "loss": float(np.mean(losses[count]))}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the two Omniglot archives")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--part", choices=["test", "validation"], default="validation")
    options = parser.parse_args()
    images = open_dataset("omniglot", options.data_dir)[options.part]
    rows = []
    for way, shot in itertools.product(WAYS, SHOTS):
        for row in measure(images, way, shot, options.episodes):
            print({key: round(value, 4) for key, value in row.items()}, flush=True)
            rows.append(row)
    Path(__file__).with_name(f"{options.part}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
