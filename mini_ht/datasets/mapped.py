"""Large sets: converted once into one array file a part, then mapped, so that only what is drawn is read."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mini_ht.datasets.images import ImageSet, progress
from mini_ht.errors import InputError

ABOUT = "classes.json"
_FORMAT = 1  # raise it when converted pixels would come out differently


def cache_dir() -> Path:
    """Where prepared and downloaded data is kept: $MINI_HT_CACHE, or ~/.cache/mini_ht."""
    return Path(os.environ.get("MINI_HT_CACHE") or Path.home() / ".cache" / "mini_ht")


@dataclass(frozen=True, eq=False)
class MappedSet(ImageSet):
    """An ImageSet whose pixels lie in a file; a copy for another process maps the same file."""

    def __reduce__(self) -> tuple[Any, ...]:
        file = self.pixels.filename  # type: ignore[attr-defined]
        return _open_part, (Path(file), self.counts, self.names)


@dataclass(frozen=True)
class Source:
    """A part before its conversion."""

    names: Sequence[str]  # of the classes
    rows: Sequence[Sequence[Any] | np.ndarray]  # of each class, what `image` wants to know of each of its images
    image: Callable[[Any], np.ndarray]  # -> [size, size, channels] uint8


def mapped(
    name: str, files: Mapping[str, Path], size: int, channels: int, sources: Callable[[], Mapping[str, Source]]
) -> dict[str, ImageSet]:
    """The parts of a data set, mapped from `cache_dir()`; converted first unless that was done.

    files: what the set is made from, by names that stay when it is moved; another size or date of one converts anew.
    sources: the parts, called for a conversion. It fills a folder of its own, which is put in place whole.

    Raises InputError for a file that is missing, a part or class without images, a class in two parts, or a cache that
    cannot be written; and what `sources` raises.
    """
    try:
        found = [(file, (about := path.stat()).st_size, about.st_mtime_ns) for file, path in files.items()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the files of {name} ({error}); get them again") from error
    digest = hashlib.blake2b(repr((_FORMAT, found)).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    home = cache_dir() / f"{name}-{size}-{channels}-{digest}"
    with suppress(Exception):  # none yet, or a damaged one
        return _open(home, size, channels)
    parts = sources()
    check_parts({part: source.names for part, source in parts.items()}, name)
    for source in parts.values():
        if empty := [label for label, rows in zip(source.names, source.rows, strict=True) if not len(rows)]:
            raise InputError(f"{name} has no images of class {', '.join(map(repr, empty[:5]))}; get its files again")
    try:
        _convert(home, (size, size, channels), parts)
        return _open(home, size, channels)
    except OSError as error:
        advice = "free some space, or name another folder in MINI_HT_CACHE"
        raise InputError(f"cannot write {home} ({error.strerror or error}); {advice}") from error


def check_parts(names: Mapping[str, Sequence[str]], where: Any) -> None:
    """Raise InputError unless each part has classes and no class is in two."""
    seen: dict[str, str] = {}
    for part, classes in names.items():
        if not classes:
            raise InputError(f"part {part} of {where} has no classes; put some in, with images")
        for label in classes:
            if label in seen:
                came = f"class {label!r} is in more than one of {', '.join(names)} under {where}"
                raise InputError(f"{came}; test classes must not be seen in training: give each part its own classes")
        seen |= dict.fromkeys(classes, part)


def _convert(home: Path, shape: tuple[int, int, int], parts: Mapping[str, Source]) -> None:
    """Write the arrays and class lists of all parts into the folder `home`, in one step."""
    home.parent.mkdir(parents=True, exist_ok=True)
    for left in home.parent.glob(".converting-*"):  # by a process that was killed
        if left.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=home.parent, prefix=".converting-"))
    try:
        for part, source in parts.items():
            rows = [row for rows in source.rows for row in rows]
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *shape)}
            # Written, not mapped: a full disk is then an error and not a signal.
            with (temporary / f"{part}.npy").open("wb") as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for row in progress(rows, len(rows), f"converting {part}"):
                    stream.write(source.image(row).tobytes())
                stream.flush()
                os.fsync(stream.fileno())
        lists = {part: [list(source.names), [len(rows) for rows in source.rows]] for part, source in parts.items()}
        (temporary / ABOUT).write_text(json.dumps(lists))
        shutil.rmtree(home, ignore_errors=True)
        os.rename(temporary, home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(home: Path, size: int, channels: int) -> dict[str, ImageSet]:
    """Map what `_convert` wrote; raises an exception of some kind if it is not that."""
    parts: dict[str, ImageSet] = {}
    for part, (names, numbers) in json.loads((home / ABOUT).read_text()).items():
        counts = np.array(numbers, np.int64)
        images = _open_part(home / f"{part}.npy", counts, tuple(names))
        if images.pixels.shape != (counts.sum(), size, size, channels) or images.pixels.dtype != np.uint8:
            raise ValueError("another shape")
        if len(names) != len(counts) or counts.min() < 1 or not all(isinstance(label, str) for label in names):
            raise ValueError("other classes")
        parts[part] = images
    return parts


def _open_part(file: Path, counts: np.ndarray, names: tuple[str, ...]) -> ImageSet:
    return MappedSet(np.load(file, mmap_mode="r", allow_pickle=False), counts, names)
