"""A support set from a folder: a folder a class, its name the label, and `_unlabelled` for images without one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mini_ht.adaptation import Task, duplicates
from mini_ht.datasets.folder import check_paths
from mini_ht.errors import InputError
from mini_ht.ink import prepare

UNLABELLED = "_unlabelled"
MOST_IMAGES = 10_000  # a support set has a handful; more is a folder given by mistake


def read_support(
    folder: str | os.PathLike[str], shape: tuple[int, ...], way: int, preprocess: str = "ink", polarity: str = "auto"
) -> tuple[Task, list[str]]:
    """The support set `folder/<class>/<image>`, sorted by name, without hidden files; and what to warn of.

    shape (H, W, C) and way are the generator's; preprocess and polarity as in `mini_ht.ink.prepare`. Raises InputError
    for fewer than 2 classes or more than `way`, a class without images, and a file that is not an image.
    """
    root = Path(folder)
    files = {place.name: _visible(place) for place in _visible(root) if place.is_dir()}
    unlabelled = files.pop(UNLABELLED, [])
    classes = list(files)
    if not 2 <= len(classes) <= way:
        raise InputError(
            f"{root} has {len(classes)} class folders; this generator tells 2 .. {way} classes apart: "
            "put the images of each class into a folder of their own"
        )
    if empty := [name for name, images in files.items() if not images]:
        raise InputError(f"no images in class folder {', '.join(str(root / name) for name in empty)}; put some in")
    paths = [image for images in files.values() for image in images] + unlabelled
    if len(paths) > MOST_IMAGES:
        raise InputError(f"{root} has {len(paths):,} images; a support set has up to {MOST_IMAGES:,}: take fewer")
    check_paths(root, [*(root / name for name in files), *paths])
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in files.values()])
    labels = np.concatenate([labels, np.full(len(unlabelled), -1)])
    task = Task(prepare(paths, preprocess, shape, polarity), labels, classes)
    pairs = duplicates(task.images, labels)
    return task, [f"{paths[one]} and {paths[two]} are equal, and their classes are not" for one, two in pairs]


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden files."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot list {folder} ({error.strerror}); give a folder of class folders") from error
