"""Images grouped by class, and reading one image file into the shape the models take."""

import io
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mini_ht.errors import InputError
from mini_ht.files import read_regular

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")  # others start programs, or are decoded in Python
# A small file can unpack to gigabytes. JPEG files may go over every pixel many times: scans times pixels are limited.
MOST_BYTES, MOST_PIXELS, MOST_SCANNED = 1 << 28, 1 << 26, 1 << 30
RUN_LENGTH = (1, 2)  # compressions of BMP that are decoded in Python


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images: `pixels` [total, H, W, C] uint8, the images of a class one after the other;
    `counts` [classes] int64, images of each class; `names`, one for each class."""

    pixels: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.counts)

    @property
    def starts(self) -> np.ndarray:
        """[classes] int64: the row of `pixels` at which each class begins."""
        return np.cumsum(self.counts) - self.counts

    def select(self, class_ids: Any) -> "ImageSet":
        """The given classes, in the given order; `class_ids` is anything that indexes a vector. Copies the pixels."""
        ids = np.atleast_1d(np.arange(self.classes)[class_ids])
        counts = self.counts[ids]
        # A row lies as far from its class's start as it did here.
        rows = np.arange(counts.sum()) + np.repeat(self.starts[ids] - (np.cumsum(counts) - counts), counts)
        return ImageSet(self.pixels[rows], counts, tuple(self.names[i] for i in ids))


def read_image(source: str | Path | IO[bytes], size: int, channels: int, most: int = MOST_PIXELS) -> np.ndarray:
    """Reads an image file, turns it upright, cuts out its central square and scales that.

    PNG, JPEG, GIF, BMP, TIFF and WebP of up to `most` pixels, of any mode Pillow can convert: palette, 1-bit, 16-bit
    grey, CMYK; transparency is laid over white.
    Returns [size, size, channels] uint8 (channels 1 is grey, 3 is RGB).
    Raises InputError, which names the file, if it is missing, damaged, not an image or too large to be harmless.
    """
    if channels not in (1, 3) or size < 1:
        raise InputError(f"got image size {size} and {channels} channels; give a size >= 1 and 1 or 3 channels")
    return to_square(read_upright(source, channels, most=most), size, channels)


def to_square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """The central square of an 8-bit grey or colour image, scaled: [size, size, channels] uint8, channels 1 or 3."""
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels)


def read_upright(
    source: str | Path | IO[bytes], channels: int, still: bool = False, most: int = MOST_PIXELS
) -> Image.Image:
    """The whole image of a file, upright, as grey (channels 1) or RGB (3); what is taken and refused: `read_image`.

    With `still` an animation is refused, too; otherwise its first frame is read.
    """
    name = source if isinstance(source, (str, Path)) else getattr(source, "name", "image")
    try:
        if isinstance(source, (str, Path)):
            data = read_regular(source, MOST_BYTES)
        else:
            data = source.read(MOST_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                _check(opened, data, still, most)
                ImageOps.exif_transpose(opened, in_place=True)
                image = eight_bits(opened)
        if image.has_transparency_data:
            image = image if image.mode == "RGBA" else image.convert("RGBA")  # a copy is 256 MiB
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # decoders meet damage with errors of nearly every type
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):  # what it could not open may be an object in memory
            why = error.strerror or ("no known format" if isinstance(error, UnidentifiedImageError) else str(error))
        advice = "give a whole PNG, JPEG or other common image file of moderate size, or remove it"
        raise InputError(f"{name}: not an image that can be read ({why}); {advice}") from error


def _check(image: Image.Image, data: bytes, still: bool, most: int) -> None:
    """Refuse, before its pixels are decoded, an image that is too large or too slow, or an animation."""
    pixels = image.width * image.height
    if pixels > most:
        raise ValueError(f"{image.width} x {image.height} pixels exceeds the limit of {most:,}")
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") * pixels > MOST_SCANNED:
        raise ValueError(f"{image.width} x {image.height} pixels in {data.count(bytes([255, 218]))} scans are too slow")
    if image.format == "BMP" and image.info.get("compression") in RUN_LENGTH:
        raise ValueError("a BMP file with run lengths is too slow")
    # MPO is how some phones write a JPEG: the further frames are previews. Counting frames could take long.
    if still and getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("it holds at least 2 frames, one is wanted")


def eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey, which Pillow would clip at 255, to 8 bits; other images pass unchanged."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range, convert them to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.array(image).astype(np.int32, copy=False)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels reach from {values.min()} to {values.max()}, at most 16 bits are supported")
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8))


def progress(items: Iterable[Any], total: int, what: str, unit: str = "image") -> Iterator[Any]:
    """Passes `items` on; after two seconds with a progress bar, if stderr is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:  # training has tqdm, inference alone needs no more than NumPy and Pillow
        return iter(items)
    return iter(tqdm(items, what, total or None, unit=unit, delay=2.0, disable=None))
