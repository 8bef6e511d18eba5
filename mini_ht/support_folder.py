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
    places = [place for place in _visible(root) if place.is_dir()]
    files = {place.name: _visible(place) for place in places}
    unlabelled = files.pop(UNLABELLED, [])
    classes = list(files)
    if not 2 <= len(classes) <= way:
        advice = "take fewer" if len(classes) > way else "put the images of each class into a folder of their own"
        raise InputError(f"{root} has {len(classes)} class folders; this generator tells 2 .. {way} apart: {advice}")
    if empty := [name for name, some in files.items() if not some]:
        raise InputError(f"no images in class folder {', '.join(str(root / name) for name in empty)}; put some in")
    images = [image for some in files.values() for image in some] + unlabelled
    if len(images) > MOST_IMAGES:
        raise InputError(f"{root} has {len(images):,} images; a support set has up to {MOST_IMAGES:,}: take fewer")
    check_paths(root, [*places, *images])
    paths = [image.path for image in images]
    labels = np.repeat(np.arange(len(classes)), [len(some) for some in files.values()])
    labels = np.concatenate([labels, np.full(len(unlabelled), -1)])
    task = Task(prepare(paths, preprocess, shape, polarity), labels, classes)
    pairs = duplicates(task.images, labels)
    return task, [f"{paths[one]} and {paths[two]} are equal, and their classes are not" for one, two in pairs]


def _visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted, without hidden files."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        place = os.fspath(folder)
        raise InputError(f"cannot list {place} ({error.strerror}); give a folder of class folders") from error
