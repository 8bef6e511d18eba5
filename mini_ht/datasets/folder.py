"""Your own images: one folder for each class."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np

from mini_ht.datasets.images import ImageSet, progress, read_image
from mini_ht.errors import InputError


def folder(data_dir: str | Path, size: int, channels: int, seed: int = 0) -> dict[str, ImageSet]:
    """Reads class folders of images of any size and returns "train", "validation" and "test".

    If `data_dir` has the folders `train` and `test`, these hold the class folders; "validation" is then returned only
    if there is a folder `validation`. Otherwise the classes are shuffled by `seed` and split 70 / 10 / 20 %.
    Pixels are [total, size, size, channels] uint8. Raises InputError if there are fewer than three classes to split,
    if two parts share a class name, and as `read_class_folders` does.
    """
    root = Path(data_dir)
    if (root / "train").is_dir() and (root / "test").is_dir():
        parts = [name for name in ("train", "validation", "test") if (root / name).is_dir()]
        names = Counter(path.name for part in parts for path in _visible(root / part, folders=True))
        if max(names.values(), default=0) > 1:
            where = f"class {names.most_common(1)[0][0]!r} is in more than one of {', '.join(parts)} under {root}"
            raise InputError(f"{where}; test classes must not be seen in training: give each part its own classes")
        return {part: read_class_folders(root / part, size, channels) for part in parts}
    found = len(_visible(root, folders=True))
    if found < 3:
        raise InputError(f"{root} has {found} class folders; put in at least 3, or train/ and test/ with class folders")
    images = read_class_folders(root, size, channels)
    validation, test = max(1, round(0.1 * found)), max(1, round(0.2 * found))
    ids = np.split(np.random.default_rng(seed).permutation(found), [found - validation - test, found - test])
    return {name: images.select(part) for name, part in zip(("train", "validation", "test"), ids, strict=True)}


def read_class_folders(path: str | Path, size: int, channels: int) -> ImageSet:
    """Reads `path/<class>/<image>`, sorted by name, without hidden files: pixels [total, size, size, channels] uint8.

    Raises InputError if there are no class folders, if one has no images, or if a file is not a readable image.
    """
    files = {directory: _visible(directory, folders=False) for directory in _visible(Path(path), folders=True)}
    if not files:
        raise InputError(f"{path} has no class folders; put the images of each class into a folder of their own")
    if empty := [str(directory) for directory, images in files.items() if not images]:
        raise InputError(f"no images in class folder {', '.join(empty)}; put some in or remove it")
    counts = np.array([len(images) for images in files.values()], np.int64)
    pixels = np.empty((counts.sum(), size, size, channels), np.uint8)
    for row, file in enumerate(progress(chain(*files.values()), len(pixels), f"reading {path}")):
        pixels[row] = read_image(file, size, channels)
    return ImageSet(pixels, counts, tuple(directory.name for directory in files))


def _visible(path: Path, folders: bool) -> list[Path]:
    try:
        return sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_dir() == folders)
    except OSError as error:
        raise InputError(f"cannot list {path} ({error.strerror}); give a folder of class folders") from error
