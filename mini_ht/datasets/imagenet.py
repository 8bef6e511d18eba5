"""Subsets of ImageNet in the pickles that they are published as: mini-ImageNet and tieredImageNet."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mini_ht.datasets.images import ImageSet, read_image, to_square
from mini_ht.datasets.mapped import Source, mapped
from mini_ht.datasets.pickles import read_pickle
from mini_ht.errors import InputError

PARTS = {"train": "train", "validation": "val", "test": "test"}  # how their files call them


def mini_imagenet(data_dir: str | Path, size: int = 84, channels: int = 3) -> dict[str, ImageSet]:
    """mini-ImageNet (Vinyals et al., 2016; split by Ravi & Larochelle): 64 / 16 / 20 classes of 600 images, 84 x 84.

    Read from `mini-imagenet-cache-{train,val,test}.pkl` in `data_dir`: {"image_data": [n, 84, 84, 3] uint8,
    "class_dict": {name: rows}}. Converted once and mapped: pixels [total, size, size, channels] uint8. Raises
    InputError for files that are missing, damaged or hold anything else.
    """

    def source(file: Path) -> Source:
        pixels, classes = _entries(file, "image_data", "class_dict")
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 4:
            raise InputError(f"image_data of {file} is no array [n, H, W, 3] of uint8; use the published file")
        if pixels.shape[3] != 3 or 0 in pixels.shape:
            raise InputError(f"image_data of {file} has shape {list(pixels.shape)}; wanted [n, H, W, 3]: use another")
        if not isinstance(classes, dict):
            raise InputError(f"class_dict of {file} is no dict of rows by class; use the published file")
        rows = [_numbers(some, len(pixels), f"class {name!r} of {file}") for name, some in classes.items()]

        def image(row: Any) -> np.ndarray:
            return to_square(Image.fromarray(pixels[row]), size, channels)

        return Source(list(classes), rows, image)

    files = {part: Path(data_dir, f"mini-imagenet-cache-{name}.pkl") for part, name in PARTS.items()}
    kept = {file.name: file for file in files.values()}
    return mapped(
        "mini-imagenet", kept, size, channels, lambda: {part: source(file) for part, file in files.items()}
    )  # fmt: skip


def tiered_imagenet(data_dir: str | Path, size: int = 84, channels: int = 3) -> dict[str, ImageSet]:
    """tieredImageNet (Ren et al., 2018): 351 / 97 / 160 classes of about 1,300 images, 84 x 84.

    Read from `{train,val,test}_images_png.pkl`, a list of PNG files as bytes or arrays of uint8, and
    `{train,val,test}_labels.pkl`, {"label_specific": [n], "label_specific_str": names}, in `data_dir`. Converted once
    and mapped: pixels [total, size, size, channels] uint8. Raises InputError as `mini_imagenet` does.
    """

    def source(images: Path, labels: Path) -> Source:
        pictures, (numbers, names) = read_pickle(images), _entries(labels, "label_specific", "label_specific_str")
        names = names.tolist() if isinstance(names, np.ndarray) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"label_specific_str of {labels} is no list of names; use the published file")
        if not isinstance(pictures, list):
            raise InputError(f"{images} holds no list of images; use the published file")
        classes = _numbers(numbers, len(names), f"label_specific of {labels}")
        if len(pictures) != len(classes) or len(set(names)) != len(names):
            came = f"{len(pictures)} images, {len(classes)} labels, {len(names)} names"
            raise InputError(f"{images} and {labels.name} do not fit: {came}; use those of one publication")
        order = np.argsort(classes, kind="stable")
        rows = np.split(order, np.cumsum(np.bincount(classes, minlength=len(names)))[:-1])

        def image(row: Any) -> np.ndarray:
            picture = pictures[row]
            plain = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
            if not (plain or isinstance(picture, bytes | memoryview)):
                raise InputError(f"image {row} of {images} is no array of uint8 and no bytes; use the published file")
            (stream := io.BytesIO(picture.tobytes() if plain else picture)).name = f"image {row} of {images}"
            return read_image(stream, size, channels)

        return Source(names, rows, image)

    files = {
        part: (Path(data_dir, f"{name}_images_png.pkl"), Path(data_dir, f"{name}_labels.pkl"))
        for part, name in PARTS.items()
    }
    kept = {file.name: file for pair in files.values() for file in pair}
    return mapped(
        "tiered-imagenet", kept, size, channels, lambda: {part: source(*pair) for part, pair in files.items()}
    )  # fmt: skip


def _entries(file: Path, *names: str) -> list[Any]:
    """Entries of the dict in a pickle."""
    content = read_pickle(file)
    if not isinstance(content, dict) or not content.keys() >= set(names):
        raise InputError(f"{file} does not hold {' and '.join(names)}; use the published file")
    return [content[name] for name in names]


def _numbers(values: Any, limit: int, where: str) -> np.ndarray:
    """Whole numbers below `limit`, at least one: [n] int64."""
    array = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu"
    listed = isinstance(values, list) and all(type(value) is int for value in values)
    if not (array or listed) or not len(values) or min(values) < 0 or max(values) >= limit:
        raise InputError(f"{where} is no list of numbers from 0 to {limit - 1}; use the published file")
    return np.array(values, np.int64)
