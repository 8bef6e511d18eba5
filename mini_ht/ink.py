"""From a photo or a drawing to what a generator reads: ink 1 on paper 0, in the middle, of one size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from mini_ht.datasets.images import read_upright
from mini_ht.errors import InputError

PREPROCESS = ("ink", "none")
POLARITY = ("auto", "dark", "light")
WORKING = 112  # longer side, in pixels, at which ink is looked for; a smaller image stays as it is
STROKE = 0.223  # a pen stroke is narrower than this share of the longer side
SHARE = 18 / 28  # of the side that the drawing takes, as Omniglot's do
FAINTEST = 0.1  # contrast, 1 being black on white, below which there is no ink
CLEAN, NOISY = (0.02, 0.98), (0.35, 0.85)  # what becomes 0 and 1, as shares of the darkest: on a screen, in a photo
GREY = np.array([[0.299], [0.587], [0.114]], np.float32)  # of red, green and blue, as eyes weigh them
Source = Any  # a path, a Pillow image, or [H, W], [H, W, 1], [H, W, 3], [H, W, 4] of uint8, bool, or floats in [0, 1]


def prepare(
    images: Sequence[Source] | NDArray[Any], preprocess: str, shape: tuple[int, ...], polarity: str = "auto"
) -> NDArray[np.float32]:
    """Images as a generator for images of `shape` (H, W, C) wants them: [n, H, W, C] float32 in [0, 1].

    preprocess: "ink" makes ink of each by `to_ink`, so any size will do; "none" keeps the pixels and checks them.
    polarity: see `to_ink`. Raises InputError, which names the file or the number of the image.
    """
    if preprocess not in PREPROCESS or polarity not in POLARITY:
        raise InputError(
            f"preprocess is {preprocess!r} and polarity {polarity!r}; choose one of {', '.join(PREPROCESS)}, "
            f"and one of {', '.join(POLARITY)}"
        )
    if isinstance(images, str | Path) or not hasattr(images, "__len__"):
        raise InputError(f"images came as {type(images).__name__}; wanted a list of paths or an array [n, H, W, C]")
    if isinstance(images, np.ndarray) and images.ndim not in (1, 3, 4):
        raise InputError(f"images have shape {list(images.shape)}; wanted [n, H, W] or [n, H, W, C]: reshape them")
    if len(images) == 0:
        raise InputError("there is no image; give at least one")
    if preprocess == "ink" and shape[2] != 1:
        raise InputError(f"this generator reads {shape[2]} channels, and ink has one; use preprocess='none'")
    prepared = np.empty((len(images), *shape), np.float32)
    for number, image in enumerate(images):
        name = str(image) if isinstance(image, str | Path) else f"image {number}"
        pixels = _pixels(image, shape[2], name)
        if preprocess == "ink":
            pixels = _ink(pixels, shape[0], polarity, name)[..., None]
        elif pixels.shape != shape:
            what = "give images of that size, or use preprocess='ink'"
            raise InputError(f"{name} has shape {list(pixels.shape)}; wanted {list(shape)}: {what}")
        prepared[number] = pixels
    return prepared


def to_ink(image: Source, size: int = 28, polarity: str = "auto") -> NDArray[np.float32]:
    """Ink 1 on paper 0, in the middle, its longer side 18/28 of the picture's: [size, size, 1] float32.

    Args:
        image: a path, a Pillow image or an array, see `Source`. EXIF turns are honoured, transparency is paper.
        size: height and width of the result.
        polarity: "dark" ink on light paper, "light" on dark; "auto" decides.

    Raises:
        InputError: an unreadable file, an array of another kind, or no ink on it.
    """
    return prepare([image], "ink", (size, size, 1), polarity)[0]


def _pixels(image: Source, channels: int, name: str) -> NDArray[np.float32]:
    """The image as [H, W, channels] float32 in [0, 1]; for channels 1 colours become grey."""
    if isinstance(image, str | Path):
        image = np.asarray(read_upright(image, channels, still=True))
    elif isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGBA"))
    dtype = getattr(image, "dtype", np.dtype(object))
    if not isinstance(image, np.ndarray) or not (dtype in (np.uint8, bool) or dtype.kind == "f"):
        what = f"{type(image).__name__} of {getattr(image, 'dtype', 'no dtype')}"
        raise InputError(f"{name} is a {what}; wanted a path, or an array of uint8, bool or floats in [0, 1]")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise InputError(f"{name} has shape {list(image.shape)}; wanted [H, W], or [H, W, C] with 1, 3 or 4 channels")
    pixels = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
    low, high = float(pixels.min()), float(pixels.max())
    if not (0 <= low and high <= 1):  # false for NaN, too
        raise InputError(f"{name}: its pixels run from {low:g} to {high:g}; wanted [0, 1], or uint8")
    if pixels.shape[2] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]  # over white
    if channels == 1 and pixels.shape[2] == 3:
        pixels = pixels @ GREY
    return pixels


def _ink(pixels: NDArray[np.float32], size: int, polarity: str, name: str) -> NDArray[np.float32]:
    """Grey [H, W, 1] -> ink [size, size]."""
    height, width = pixels.shape[:2]
    picture = Image.fromarray((255 * pixels[..., 0] + 0.5).astype(np.uint8))
    if max(height, width) > WORKING:
        scale = WORKING / max(height, width)
        at = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(at, Image.Resampling.BICUBIC, reducing_gap=2.0)
    counts = picture.histogram()
    drawn = 2 * max(counts) > picture.width * picture.height  # on a screen: most pixels are of one grey
    if polarity == "light" or (polarity == "auto" and _light_on_dark(picture, drawn)):
        picture = ImageOps.invert(picture)
    grey = np.asarray(picture, np.float32)
    if drawn:
        ink = np.float32(np.median(grey)) - grey
        strongest, (low, high) = ink.max(), CLEAN
    else:
        ink = _paper(picture) - grey
        ranks = [ink.size // 2, int(0.998 * ink.size)]
        ground, strongest = np.partition(ink, ranks, axis=None)[ranks]  # median, and nearly the largest
        ink -= ground  # noise lifts the paper
        strongest, (low, high) = strongest - ground, NOISY
    if strongest < 255 * FAINTEST:
        what = "wanted a drawing, dark or light on its ground"
        raise InputError(f"{name} shows no ink (contrast {max(0, strongest) / 255:.2f}); {what}")
    ink = ((ink / strongest - low) / (high - low)).clip(0, 1)
    (top, bottom), (left, right) = _ends(ink.max(1)), _ends(ink.max(0))
    half = max(bottom - top, right - left) / SHARE / 2
    pad = int(2 * half) + 1  # so that the square to be cut lies inside
    y, x = (top + bottom) / 2 + pad, (left + right) / 2 + pad
    page = np.zeros((ink.shape[0] + 2 * pad, ink.shape[1] + 2 * pad), np.uint8)
    page[pad:-pad, pad:-pad] = 255 * ink + 0.5
    box = (x - half, y - half, x + half, y + half)
    cut = Image.fromarray(page).resize((size, size), Image.Resampling.LANCZOS, box)
    return np.asarray(cut, np.float32) / np.float32(255)


def _ends(profile: NDArray[np.float32]) -> tuple[float, float]:
    """Where ink begins and ends along an axis: pixels count from 0.25, those at the ends by how full they are."""
    inked = np.flatnonzero(profile > 0.25)
    first, last = inked[0] + 1, inked[-1] + 1
    full = np.pad(profile, 1)
    return float(first - full[first] - full[first - 1]), float(last - 1 + full[last] + full[last + 1])


def _light_on_dark(picture: Image.Image, drawn: bool) -> bool:
    """Whether the few pixels that differ from the ground are lighter than it: the sign of the skewness."""
    grey = np.asarray(picture, np.float32)
    if not drawn:  # without the light's slope
        grey = grey - np.asarray(picture.filter(ImageFilter.BoxBlur(max(picture.size) / 5)), np.float32)
    grey = grey - grey.mean()
    return bool((grey * grey * grey).mean() > 0)


def _paper(picture: Image.Image) -> NDArray[np.float32]:
    """What the paper alone would look like, under its light: dark ink on [H, W] is wiped out by what is around it."""
    stroke = max(picture.size) * STROKE
    grey = np.asarray(picture)
    for axis in (0, 1):
        grey = _widest(grey, axis, 2 * int(stroke / 2) + 1)
    return np.asarray(Image.fromarray(grey).filter(ImageFilter.GaussianBlur(stroke / 4)), np.float32)


def _widest(x: NDArray[np.uint8], axis: int, width: int) -> NDArray[np.uint8]:
    """The largest of `width` neighbours, an odd number, along one axis: in steps, each a window twice as wide."""
    pads = [(0, 0), (0, 0)]
    pads[axis] = (width // 2, width // 2)
    x = np.moveaxis(np.pad(x, pads, "edge"), axis, 0)
    window = 1
    while window < width:
        step = min(window, width - window)
        x = np.maximum(x[:-step], x[step:])
        window += step
    return np.ascontiguousarray(np.moveaxis(x, 0, axis))
