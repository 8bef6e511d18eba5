"""From support sets to classifiers: a generator by its name, and many tasks in one pass."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.config import Config
from mini_ht.datasets.glyphs import glyphs
from mini_ht.errors import InputError
from mini_ht.folded import fold
from mini_ht.generator import generate
from mini_ht.parameters import PRETRAINED, checkpoint_path, load, load_pretrained
from mini_ht.task_classifier import TaskClassifier, class_array

# A handful of images is little to take norm statistics from; unlabelled strangers beside them help (docs/results.md).
COMPANIONS = 16


@dataclass(frozen=True)
class Generator:
    """A trained generator, and what it is called in the classifiers that it writes."""

    parameters: Mapping[str, NDArray[np.floating]]
    config: Config
    name: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that it reads."""
        return (self.config.image_size, self.config.image_size, self.config.image_channels)


@dataclass(frozen=True)
class Task:
    """One support set: images [n, H, W, C] float32 as the generator reads them, labels [n] with -1 for unlabelled."""

    images: NDArray[np.float32]
    labels: NDArray[np.integer]
    classes: Sequence[Any]  # the name of each class


def open_generator(checkpoint: Any) -> Generator:
    """A generator from the name of a pretrained one, a file, a run folder, or (parameters, config).

    Raises InputError for a name or file that is not there, or cannot be read.
    """
    if isinstance(checkpoint, tuple) and len(checkpoint) == 2:
        return Generator(*checkpoint, name="given as parameters")
    if not isinstance(checkpoint, str | os.PathLike):
        raise InputError(f"checkpoint is a {type(checkpoint).__name__}; wanted a name, a path or (parameters, config)")
    known = sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))
    if checkpoint in known:
        return Generator(*load_pretrained(str(checkpoint)), name=str(checkpoint))
    file = checkpoint_path(checkpoint)
    if not file.exists():
        raise InputError(
            f"there is no checkpoint {file}, and no pretrained generator of that name; "
            f"give a run folder, a .safetensors file, or one of {', '.join(known)}"
        )
    parameters, config = load(file)
    single = {name: array.astype(np.float32) for name, array in parameters.items()}
    return Generator(single, config, Path(checkpoint).resolve().name)


@functools.cache
def company(config: Config, count: int) -> NDArray[np.float32]:
    """Built-in characters to join a support set: [count, H, W, C], ink is 1; none for a generator of other images."""
    if config.image_channels > 1 or config.dataset not in ("omniglot", "glyphs"):
        count = 0
    shape = (config.image_size, config.image_size, config.image_channels)
    if not count:
        return np.zeros((0, *shape), np.float32)
    return glyphs(5, count, drawings=1, size=config.image_size).pixels.astype(np.float32) / np.float32(255)


def adapt(
    generator: Generator,
    tasks: Sequence[Task],
    preprocess: str = "ink",
    polarity: str = "auto",
    companions: int = COMPANIONS,
) -> list[TaskClassifier]:
    """The classifier of each task, with norm "support": it classifies one image alone.

    Tasks of different sizes are padded, and what pads is kept out by a mask, so a classifier does not depend on which
    others are made with it. preprocess and polarity say how the images were prepared, and those to come will be.
    companions: so many unlabelled characters join each support set, if the generator was trained on characters.

    Raises InputError for a task of one class, of more classes than the generator serves, or with an empty class.
    """
    for task in tasks:
        _check(task, generator.config.way)
    others = company(generator.config, companions)  # [k, H, W, C]
    counts = np.array([len(task.labels) + len(others) for task in tasks])
    most = counts.max()
    support = np.zeros((len(tasks), most, *generator.image_shape), np.float32)
    labels = np.full((len(tasks), most), -1)
    for row, (task, count) in enumerate(zip(tasks, counts, strict=True)):
        support[row, :count] = np.concatenate([task.images, others])
        labels[row, : len(task.labels)] = task.labels
    mask = None if (counts == most).all() else np.arange(most) < counts[:, None]  # [E, n]
    cnn = generate(generator.parameters, generator.config, support, labels, mask, impl="reference")
    origin = provenance(generator)
    return [
        TaskClassifier(
            network=fold(cnn, len(task.classes), row),
            classes_=class_array(task.classes),
            image_shape=generator.image_shape,
            preprocess=preprocess,
            polarity=polarity,
            provenance=origin | {"support": _counts(task, len(others))},
        )
        for row, task in enumerate(tasks)
    ]


def duplicates(images: NDArray[np.floating], labels: NDArray[np.integer]) -> list[tuple[int, int]]:
    """Pairs of equal labelled images of different classes: each with the first one like it, (first, second)."""
    first: dict[bytes, int] = {}
    pairs = []
    for number in np.flatnonzero(labels >= 0).tolist():
        other = first.setdefault(images[number].tobytes(), number)
        if labels[other] != labels[number]:
            pairs.append((other, number))
    return pairs


def provenance(generator: Generator) -> dict[str, str]:
    """Where a classifier comes from. No date or path, so that the same input gives the same file."""
    digest = hashlib.sha256(generator.config.to_json().encode()).hexdigest()[:16]
    version = sys.modules["mini_ht"].__version__
    return {"program": f"mini_ht {version}", "generator": generator.name, "config": digest, "norm": "support"}


def _counts(task: Task, others: int) -> str:
    """What a classifier was made from, in words."""
    return f"{len(task.labels)} images, {int((task.labels < 0).sum())} unlabelled; {others} characters for company"


def _check(task: Task, way: int) -> None:
    """Raise InputError unless the generator, for up to `way` classes, can serve the task."""
    count = len(task.classes)
    if not 2 <= count <= way:
        what = "give images of at least 2" if count < 2 else "take fewer, or another generator"
        raise InputError(f"there are {count} classes; this generator tells 2 .. {way} apart: {what}")
    empty = [str(name) for label, name in enumerate(task.classes) if not (task.labels == label).any()]
    if empty:
        raise InputError(f"no labelled image of class {', '.join(empty)}; give one or leave the class out")
