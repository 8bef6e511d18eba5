"""Data sets: named parts, each a set of images grouped by class."""

from pathlib import Path

from mini_ht.datasets.folder import folder, read_class_folders
from mini_ht.datasets.glyphs import glyphs
from mini_ht.datasets.images import ImageSet, read_image
from mini_ht.datasets.omniglot import cache_dir, download, omniglot
from mini_ht.errors import InputError

DATASETS = ("glyphs", "omniglot", "folder")
__all__ = ["DATASETS", "ImageSet", "cache_dir", "download", "folder", "glyphs", "omniglot", "open_dataset"]
__all__ += ["read_class_folders", "read_image"]


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
    without `data_dir` it is downloaded once. "folder" reads class folders in `data_dir`. Pixels are
    [total, size, size, channels] uint8. Raises InputError for an unknown name, options that do not fit and bad data.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    if size < 1 or seed < 0:
        raise InputError(f"got image size {size} and seed {seed}; give a size of at least 1 and a seed of at least 0")
    if name == "folder":
        if data_dir is None:
            raise InputError("data set 'folder' came without a data directory; name the one with the class folders")
        return folder(data_dir, size, channels, seed)
    if channels != 1:
        raise InputError(f"data set {name!r} has 1 channel, {channels} were asked for; set channels to 1")
    if name == "glyphs":
        numbers = (("train", 400), ("validation", 50), ("test", 200))
        # Seeds 3s, 3s + 1 and 3s + 2: no two parts of any two seeds share a character.
        return {part: glyphs(3 * seed + i, classes, size=size) for i, (part, classes) in enumerate(numbers)}
    if data_dir is None:
        data_dir = cache_dir() / "omniglot"
        download(data_dir)
    return omniglot(data_dir, size, split)
