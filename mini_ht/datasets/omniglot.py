"""Omniglot (Lake et al., Science 2015): 1,623 characters of 50 alphabets, 20 drawings each, from its two archives."""

import hashlib
import io
import urllib.request
import zipfile
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np

from mini_ht.datasets.images import ImageSet, progress, read_image
from mini_ht.datasets.mapped import cache_dir
from mini_ht.errors import InputError
from mini_ht.files import read_regular, write_atomically

HOME = "https://github.com/brendenlake/omniglot/raw/master/python/"
ARCHIVES = {  # name: (characters, MD5 of the published file)
    "images_background.zip": (964, "68d2efa1b9178cc56df9314c21c6e718"),
    "images_evaluation.zip": (659, "6b91aef0f799c5bb55b94e3f2daec811"),
}
DRAWINGS = 20
# The published archives have 10 MB, unpacked 6 MB, and drawings of 105 x 105; repacked ones differ a little.
MOST_BYTES, MOST_PIXELS = 1 << 25, 1 << 16  # of an archive, packed and unpacked; of a drawing
VALIDATION_ALPHABETS = ("Syriac_(Estrangelo)", "Tagalog", "Tifinagh")  # last three of the background set, 95 characters
_FORMAT = b"1"  # raise it when cached pixels would come out differently


def omniglot(data_dir: str | Path, size: int = 28, split: str = "random") -> dict[str, ImageSet]:
    """Reads Omniglot from `images_background.zip` and `images_evaluation.zip` in `data_dir`, ink 255 on 0.

    Split "random": 1,150 / 50 / 423 characters, all alphabets mixed. Split "alphabet", harder: test on the 659
    evaluation characters, validate on VALIDATION_ALPHABETS, train on the other 869 background characters.
    Returns "train", "validation" and "test", pixels [total, size, size, 1] uint8; keeps scaled images in `cache_dir()`.
    Raises InputError for an unknown split or size, and for archives that are missing, damaged or not Omniglot.
    """
    if split not in ("random", "alphabet"):
        raise InputError(f"unknown Omniglot split {split!r}; choose 'random' or 'alphabet'")
    characters = _load(Path(data_dir), size)
    if split == "random":
        parts = np.split(np.random.default_rng(2022).permutation(characters.classes), [1150, 1200])
    else:
        background, evaluation = np.split(np.arange(characters.classes), [ARCHIVES["images_background.zip"][0]])
        held_out = np.array([characters.names[i].split("/")[0] in VALIDATION_ALPHABETS for i in background])
        parts = [background[~held_out], background[held_out], evaluation]
    return {name: characters.select(part) for name, part in zip(("train", "validation", "test"), parts, strict=True)}


def download(data_dir: str | Path) -> None:
    """Fetches the archives that `data_dir` lacks, whole or not at all. Raises InputError, also for a wrong MD5."""
    for target in (Path(data_dir, name) for name in ARCHIVES if not Path(data_dir, name).exists()):
        try:
            with urllib.request.urlopen(HOME + target.name, timeout=30) as response:
                size = int(response.headers.get("Content-Length") or 0)
                pieces = iter(partial(response.read, 1 << 20), b"")
                content = b"".join(progress(pieces, -(-size >> 20), f"downloading {target.name}", unit="MiB"))
            digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if digest != ARCHIVES[target.name][1]:
                raise OSError(f"the MD5 of what came is {digest}, not {ARCHIVES[target.name][1]}")
        except (OSError, HTTPException) as error:
            by_hand = f"fetch it with a browser, put it into {target.parent} and name that as the data directory"
            what = f"{HOME}{target.name} could not be downloaded ({error})"
            raise InputError(f"{what}; try again, or {by_hand}") from error
        write_atomically(target, content)


def _load(data_dir: Path, size: int) -> ImageSet:
    """All characters, background before evaluation, each sorted by name; from the cache where it has them."""
    try:
        content = {name: read_regular(data_dir / name, MOST_BYTES) for name in ARCHIVES}
    except OSError as error:
        advice = f"get {' and '.join(ARCHIVES)} from {HOME}, or name no data directory to have that done"
        raise InputError(f"cannot read {error.filename} ({error.strerror}); {advice}") from error
    # Named after the archives' content: copies of them share a cache, and no change goes unnoticed.
    digest = hashlib.blake2b(b"".join([_FORMAT, *content.values()]), digest_size=8).hexdigest()
    cached = cache_dir() / f"omniglot-{size}-{digest}.npz"
    try:
        with np.load(io.BytesIO(cached.read_bytes())) as arrays:
            pixels, names = arrays["pixels"], arrays["names"]
        if pixels.shape != (DRAWINGS * len(names), size, size, 1) or (pixels.dtype, names.dtype.kind) != (
            np.uint8,
            "U",
        ):
            raise ValueError("another shape")
    except Exception:
        files = [(content[name], data_dir / name, classes) for name, (classes, _) in ARCHIVES.items()]
        parts = [_read_archive(io.BytesIO(data), path, classes, size) for data, path, classes in files]
        pixels, names = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        np.savez(packed := io.BytesIO(), pixels=pixels, names=names)
        with suppress(InputError):  # an unwritable cache costs seconds at the next start, nothing else
            write_atomically(cached, packed.getvalue())
    return ImageSet(pixels, np.full(len(names), DRAWINGS, np.int64), tuple(names.tolist()))


def _read_archive(data: io.BytesIO, path: Path, classes: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scaled pixels [classes * DRAWINGS, size, size, 1] uint8 and character names [classes] of one archive."""
    try:
        with zipfile.ZipFile(data) as archive:
            # What is read of a file ends at the size that the archive states.
            if (unpacked := sum(file.file_size for file in archive.infolist())) > MOST_BYTES:
                raise ValueError(f"{unpacked:,} bytes when unpacked")
            # Repacked copies may lie in another folder: the last three parts of a path are what counts.
            files = sorted((name.split("/")[-3:], name) for name in archive.namelist() if name.endswith(".png"))
            found, counts = np.unique(["/".join(parts[:-1]) for parts, _ in files], return_counts=True)
            if len(found) != classes or (counts != DRAWINGS).any():
                raise ValueError(f"{len(found)} characters with {sorted(set(counts.tolist()))} drawings")
            pixels = np.empty((len(files), size, size, 1), np.uint8)
            for row, (_, name) in enumerate(progress(files, len(files), f"reading {path.name}")):
                with archive.open(name) as file:
                    pixels[row] = 255 - read_image(file, size, channels=1, most=MOST_PIXELS)
    except Exception as error:  # damage of a zip file has many names
        expected = f"{classes} characters of {DRAWINGS} drawings"
        raise InputError(f"{path}: {error}; expected {expected}, get {path.name} again from {HOME}") from error
    return pixels, found
