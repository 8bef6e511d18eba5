"""What unlabelled images are worth to attention set by hand, on embeddings of Omniglot: writes summary.json.

    python results/unlabelled-embeddings/measure.py --data-dir ../shared/data/omniglot

Task: 20-way, 1 labelled and 4 unlabelled support images and 5 queries a class. An embedding depends on one image alone,
so each drawing is embedded once. Temperatures are chosen on the validation characters, whichever part is measured.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np

import mini_ht
from mini_ht.constructions import prototypes, semi_supervised
from mini_ht.datasets import ImageSet, open_dataset
from mini_ht.evaluation import Score, evaluation_episodes
from mini_ht.features import shared_features

TASK = {"way": 20, "shot": 1, "unlabelled": 4, "queries": 5}
# beta[0], beta[1], alpha, suppression of `semi_supervised`
GRID = itertools.product((5, 10, 20, 40, 80, 160), (0.1, 0.2, 0.3, 0.4, 0.6, 0.8), (10, 30), (0, 100))
BETA = 10.0  # of `prototypes`: the mean of a class, but for way * exp(-BETA)
CHOOSING = 200  # episodes of validation characters


def embedder(parameters, config, train: ImageSet):
    """A function from pixels [n, H, W, C] uint8 to embeddings [n, F] of length 1, fitted to training characters.

    An embedding is the generator's 64 image features beside the 8 activations of the last block of a generated CNN.
    That CNN and its norm statistics come from 20 training characters. Whitened: features in which the drawings of one
    training character differ much are scaled down.
    """
    some = train.select(slice(0, config.way))
    support = some.pixels.astype(np.float32) / 255
    cnn = mini_ht.generate(parameters, config, support, np.repeat(np.arange(config.way), some.counts))
    width = cnn.logits_weight.shape[-1] - 1
    identity = np.eye(width, width + 1, dtype=np.float32)[None]  # in place of the logits layer: activations come out
    last = dataclasses.replace(cnn, logits_weight=identity, present=np.ones((1, width), bool), norm="support")

    def features(pixels: np.ndarray) -> np.ndarray:
        x = pixels.astype(np.float32) / 255
        return np.concatenate([shared_features(parameters, config, x[None])[0], last(x)], axis=-1)  # [n, F]

    x = np.concatenate([features(part) for part in np.array_split(train.pixels, 40)])  # [total, F]
    within = x - (np.add.reduceat(x, train.starts) / train.counts[:, None]).repeat(train.counts, axis=0)
    spread, axes = np.linalg.eigh(within.T @ within / len(x))
    whiten = axes / np.sqrt(spread + 1e-3 * spread.mean())  # [F, F]
    mean = x.mean(0)
    return lambda pixels: unit((features(pixels) - mean) @ whiten)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def right(weights: np.ndarray, query: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Accuracy of each episode [E], with rows of the logits weights [E, way, F] brought to length 1."""
    return ((query @ unit(weights).mT).argmax(-1) == wanted).mean(-1)


def measure(images: ImageSet, embed, episodes: int, seed: int, settings: list, *generator) -> dict[str, np.ndarray]:
    """Accuracy of each episode by each way to logits weights; of `semi_supervised`, a row for each setting.

    generator: parameters and config, for the accuracy of the CNNs that it writes from the labelled images.
    """
    e = np.concatenate([embed(part) for part in np.array_split(images.pixels, 20)])
    found, way = [], TASK["way"]
    for batch in evaluation_episodes(images, episodes, seed=seed, **TASK):
        labels, support = batch.labels, e[batch.support_rows]  # [E, n], [E, n, F]
        query = e[batch.query_rows]  # [E, m, F]
        known, truth = labels[0] >= 0, np.repeat(np.arange(way), TASK["unlabelled"] + 1) + 0 * labels  # [n], [E, n]
        weights = {
            "nearest_mean": support[:, known],
            "labelled_only": prototypes(labels[:, known], support[:, known], way, BETA),
            "oracle": prototypes(truth, support, way, BETA),
        }
        rows = {name: right(w, query, batch.query_labels) for name, w in weights.items()}
        two = [semi_supervised(labels, support, way, (b0, b1), a, s) for b0, b1, a, s in settings]
        rows["two_layers"] = np.stack([right(w, query, batch.query_labels) for w in two])
        if generator:
            cnn = mini_ht.generate(*generator, batch.support[:, known], labels[:, known])
            for norm in ("support", "batch"):
                guesses = cnn.with_norm(norm)(batch.query).argmax(-1)
                rows[f"generator_norm_{norm}"] = (guesses == batch.query_labels).mean(-1)
        found.append(rows)
    return {name: np.concatenate([rows[name] for rows in found], axis=-1) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the two Omniglot archives")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the episodes")
    parser.add_argument("--part", choices=["test", "validation"], default="test")
    options = parser.parse_args()
    data, generator, settings = open_dataset("omniglot", options.data_dir), mini_ht.load_pretrained(), list(GRID)
    embed = embedder(*generator, data["train"])
    tried = measure(data["validation"], embed, CHOOSING, 1, settings)["two_layers"].mean(-1)  # [settings]
    best = settings[int(tried.argmax())]
    plain = max((i for i, s in enumerate(settings) if s[3] == 0), key=tried.__getitem__)  # best without suppression
    found = measure(data[options.part], embed, options.episodes, options.seed, [best, settings[plain]], *generator)
    found["two_layers"], found["two_layers_without_suppression"] = found["two_layers"]
    gain = found["two_layers"] - found["labelled_only"]
    figures = {name: dataclasses.asdict(Score.of(rows)) for name, rows in (found | {"gain": gain}).items()}
    summary = {"part": options.part, "seed": options.seed, **TASK, **figures}
    summary["settings"] = {"two_layers": best, "two_layers_without_suppression": settings[plain]}  # in GRID's order
    summary["validation"] = {"accuracy": float(tried.max()), "episodes": CHOOSING, "settings_tried": len(settings)}
    Path(__file__).with_name("summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
