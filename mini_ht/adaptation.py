"""From support sets to classifiers: a generator by its name, and many tasks in one pass."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.folded import fold
from mini_ht.parameters import PRETRAINED, checkpoint_path, load, load_pretrained
from mini_ht.task_classifier import TaskClassifier, class_array
from mini_ht.views import check_views, generate_from_views

PASS = 8  # tasks that share a pass of the generator


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

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over the parameters, sorted by name: each one's name, shape and bytes."""
        found = hashlib.sha256()
        for name, array in sorted(self.parameters.items()):
            found.update(f"{name} {list(array.shape)}".encode())
            found.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        return found.hexdigest()[:16]


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


def adapt(
    generator: Generator, tasks: Sequence[Task], preprocess: str = "ink", polarity: str = "auto", views: int = 1
) -> list[TaskClassifier]:
    """The classifier of each task, with norm "support": it classifies one image alone.

    Tasks of one size share a pass of the generator, which computes each for itself: a classifier is the same to the
    last bit, whichever others are made with it. preprocess and polarity say how the images were prepared, and those to
    come will be. views: at how many places the generator sees each image, see `generate_from_views`.

    Raises InputError for a task of one class, of too many or with an empty one, and for another number of views.
    """
    check_views(views)
    for task in tasks:
        _check(task, generator.config.way)
    config = dataclasses.replace(generator.config, norm="support")
    origin = provenance(generator) | {"views": str(views)}
    classifiers: dict[int, TaskClassifier] = {}
    for numbers in _equal_sizes(tasks):
        support = np.stack([tasks[k].images for k in numbers])  # [E, n, H, W, C]
        labels = np.stack([tasks[k].labels for k in numbers])  # [E, n]
        cnn = generate_from_views(generator.parameters, config, support, labels, views=views, impl="reference")
        for row, number in enumerate(numbers):
            task = tasks[number]
            classifiers[number] = TaskClassifier(
                network=fold(cnn, len(task.classes), row),
                classes_=class_array(task.classes),
                image_shape=generator.image_shape,
                preprocess=preprocess,
                polarity=polarity,
                provenance=origin | {"support": _counts(task)},
            )
    return [classifiers[number] for number in range(len(tasks))]


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
    program = f"mini_ht {sys.modules['mini_ht'].__version__}"
    origin = {"program": program, "generator": generator.name, "config": digest}
    return origin | {"weights": generator.digest, "norm": "support"}


def _equal_sizes(tasks: Sequence[Task]) -> Iterator[list[int]]:
    """The numbers of all tasks, in groups of up to PASS tasks with as many images each."""

    def size(number: int) -> int:
        return len(tasks[number].labels)

    for _, numbers in itertools.groupby(sorted(range(len(tasks)), key=size), size):
        group = list(numbers)
        for start in range(0, len(group), PASS):
            yield group[start : start + PASS]


def _counts(task: Task) -> str:
    """What a classifier was made from, in words."""
    return f"{len(task.labels)} images, {int((task.labels < 0).sum())} unlabelled"


def _check(task: Task, way: int) -> None:
    """Raise InputError unless the generator, for up to `way` classes, can serve the task."""
    count = len(task.classes)
    if not 2 <= count <= way:
        what = "give images of at least 2" if count < 2 else "take fewer, or another generator"
        raise InputError(f"there are {count} classes; this generator tells 2 .. {way} apart: {what}")
    empty = [str(name) for label, name in enumerate(task.classes) if not (task.labels == label).any()]
    if empty:
        raise InputError(f"no labelled image of class {', '.join(empty)}; give one or leave the class out")
