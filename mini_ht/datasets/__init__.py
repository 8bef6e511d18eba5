"""Data sets: named parts, each a set of images grouped by class."""

from pathlib import Path

from mini_ht.datasets.folder import folder, read_class_folders
from mini_ht.datasets.glyphs import glyphs
from mini_ht.datasets.imagenet import mini_imagenet, tiered_imagenet
from mini_ht.datasets.images import ImageSet, read_image
from mini_ht.datasets.mapped import cache_dir
from mini_ht.datasets.omniglot import download, omniglot
from mini_ht.errors import InputError

DATASETS = ("glyphs", "omniglot", "folder", "mini-imagenet", "tiered-imagenet")
__all__ = ["DATASETS", "ImageSet", "cache_dir", "download", "folder", "glyphs", "omniglot", "open_dataset"]
__all__ += ["mini_imagenet", "read_class_folders", "read_image", "tiered_imagenet"]


def open_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    size: int = 28,
    channels: int = 1,
    split: str = "random",
    seed: int = 0,
) -> dict[str, ImageSet]:
    """Opens a data set by name and returns its parts "train", "validation" and "test", with no class in common.

    "glyphs" is drawn from `seed`. "omniglot" is read from `data_dir`, split by `split` ("random" or "alphabet");
    without `data_dir` it is downloaded once. "folder" reads class folders in `data_dir`, "mini-imagenet" and
    "tiered-imagenet" the pickles there. Pixels are [total, size, size, channels] uint8, of large sets mapped from
    `cache_dir()`. Raises InputError for an unknown name, options that do not fit and bad data.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    if size < 1 or seed < 0:
        raise InputError(f"got image size {size} and seed {seed}; give a size of at least 1 and a seed of at least 0")
    if name not in ("glyphs", "omniglot"):
        if data_dir is None:
            raise InputError(f"data set {name!r} came without a data directory; name the one with its files")
        if channels not in (1, 3):
            raise InputError(f"{channels} channels were asked for; data set {name!r} has 3, or 1 for grey")
        if name == "folder":
            return folder(data_dir, size, channels, seed)
        return (mini_imagenet if name == "mini-imagenet" else tiered_imagenet)(data_dir, size, channels)
    if channels != 1:
        raise InputError(f"data set {name!r} has 1 channel, {channels} were asked for; set channels to 1")
    if name == "glyphs":
        if data_dir is not None:
            raise InputError("data set 'glyphs' is built in and takes no data directory; name another with --dataset")
        numbers = (("train", 400), ("validation", 50), ("test", 200))
        # Seeds 3s, 3s + 1 and 3s + 2: no two parts of any two seeds share a character.
        return {part: glyphs(3 * seed + i, classes, size=size) for i, (part, classes) in enumerate(numbers)}
    if data_dir is None:
        data_dir = cache_dir() / "omniglot"
        download(data_dir)
    return omniglot(data_dir, size, split)
