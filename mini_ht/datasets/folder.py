"""Your own images: one folder for each class."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from mini_ht.datasets.images import ImageSet, progress, read_image
from mini_ht.datasets.mapped import Source, check_parts, mapped
from mini_ht.errors import InputError

PARTS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}  # their names on the disk
SMALL = 1 << 27  # bytes of pixels that are read anew each time; more are converted once and mapped


def folder(data_dir: str | Path, size: int, channels: int, seed: int = 0) -> dict[str, ImageSet]:
    """Reads class folders of images of any size and returns "train", "validation" and "test".

    If `data_dir` has the folders `train` and `test`, these hold the class folders; "validation" is then returned only
    if there is a folder `validation` or `val`. If it has the folders `data` and `splits`, as CIFAR-FS does, the class
    folders of `data` are split as `splits/<name>/{train,val,test}.txt` list them. Otherwise the classes are shuffled
    by `seed` and split 70 / 10 / 20 %. Pixels are [total, size, size, channels] uint8; more than 128 MiB of them are
    converted once and mapped. Raises InputError if there are fewer than three classes to split, if two parts share a
    class name, for a list of classes that are not there, and as `read_class_folders` does.
    """
    root = Path(data_dir)
    if (root / "train").is_dir() and (root / "test").is_dir():
        places = {part: root / name for part, names in PARTS.items() for name in names if (root / name).is_dir()}
        parts = {part: _visible(place, folders=True) for part, place in places.items()}
    elif (root / "data").is_dir() and (root / "splits").is_dir():
        parts = _listed(root)
    else:
        parts = _shuffled(root, seed)
    check_parts({part: [place.name for place in places] for part, places in parts.items()}, root)
    files = {part: _images(root, places) for part, places in parts.items()}
    total = sum(len(images) for part in files.values() for images in part.values())
    if total * size * size * channels <= SMALL:
        return {part: _read(root, images, size, channels) for part, images in files.items()}
    read = partial(read_image, size=size, channels=channels)
    known = {f"{part}/{x.relative_to(root)}": x for part, images in files.items() for x in chain(*images.values())}
    return mapped(
        "folder", known, size, channels,
        lambda: {part: Source([p.name for p in images], list(images.values()), read) for part, images in files.items()},
    )  # fmt: skip


def read_class_folders(path: str | Path, size: int, channels: int) -> ImageSet:
    """Reads `path/<class>/<image>`, sorted by name, without hidden files: pixels [total, size, size, channels] uint8.

    Raises InputError if there are no class folders, if one has no images, if a file is not a readable image, for names
    that are not UTF-8, and for links that lead out of `path`.
    """
    return _read(Path(path), _images(Path(path), _visible(Path(path), folders=True)), size, channels)


def _shuffled(root: Path, seed: int) -> dict[str, list[Path]]:
    """The class folders in `root`, split at random."""
    classes = _visible(root, folders=True)
    if (found := len(classes)) < 3:
        raise InputError(f"{root} has {found} class folders; put in at least 3, or train/ and test/ with class folders")
    validation, test = max(1, round(0.1 * found)), max(1, round(0.2 * found))
    ids = np.split(np.random.default_rng(seed).permutation(found), [found - validation - test, found - test])
    return {name: [classes[i] for i in part] for name, part in zip(PARTS, ids, strict=True)}


def _listed(root: Path) -> dict[str, list[Path]]:
    """The class folders in `root/data`, split as the lists of the one folder in `root/splits` say."""
    known = {place.name: place for place in _visible(root / "data", folders=True)}
    splits = _visible(root / "splits", folders=True)
    if len(splits) != 1:
        raise InputError(f"{root / 'splits'} holds {len(splits)} splits; keep the one folder that is wanted")
    parts = {}
    for part, names in PARTS.items():
        file = splits[0] / f"{names[-1]}.txt"
        try:
            listed = file.read_text("utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {file} ({error}); give a class name a line") from error
        listed = [line.strip() for line in listed if line.strip()]
        if unknown := [name for name in listed if name not in known]:
            raise InputError(f"{file} lists {unknown[0][:80]!r}, which is no folder in {root / 'data'}; correct it")
        parts[part] = [known[name] for name in listed]
    return parts


def _images(root: Path, classes: Sequence[Path]) -> dict[Path, list[Path]]:
    """The image files of each class folder."""
    files = {place: _visible(place, folders=False) for place in classes}
    if not files:
        raise InputError(f"{root} has no class folders; put the images of each class into a folder of their own")
    check_paths(root, chain({place.parent for place in files}, files, *files.values()))
    if empty := [str(place) for place, images in files.items() if not images]:
        raise InputError(f"no images in class folder {', '.join(empty)}; put some in or remove it")
    return files


def check_paths(root: Path, paths: Iterable[Path | os.DirEntry[str]]) -> None:
    """Raise InputError for a name that is not plain UTF-8, and for a link that leads out of `root`."""
    home = os.path.realpath(root)
    for path in paths:
        if path != root and not path.name.isprintable():  # bytes that are not UTF-8, and control characters
            place = os.path.dirname(path)
            raise InputError(f"{place} holds {path.name!a}, which is no plain UTF-8; give it another name")
        # A folder from elsewhere must not show what else lies on this computer.
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
            raise InputError(f"{os.fspath(path)} is a link that leads out of {root}; put a copy in its place")


def _read(root: Path, files: Mapping[Path, Sequence[Path]], size: int, channels: int) -> ImageSet:
    """All images of some class folders, in memory."""
    counts = np.array([len(images) for images in files.values()], np.int64)
    pixels = np.empty((counts.sum(), size, size, channels), np.uint8)
    for row, file in enumerate(progress(chain(*files.values()), len(pixels), f"reading {root}")):
        pixels[row] = read_image(file, size, channels)
    return ImageSet(pixels, counts, tuple(place.name for place in files))


def _visible(path: Path, folders: bool) -> list[Path]:
    """The folders or files in a folder, sorted, without hidden ones."""
    try:
        return sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_dir() == folders)
    except OSError as error:
        raise InputError(f"cannot list {path} ({error.strerror}); give a folder of class folders") from error
