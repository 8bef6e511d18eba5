"""From a photo or a drawing to what a generator reads: ink 1 on paper 0, in the middle, of one size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from mini_ht.datasets.images import eight_bits, read_upright
from mini_ht.errors import InputError

PREPROCESS = ("ink", "none")
POLARITY = ("auto", "dark", "light")
CHUNK = 32  # images that are cut and scaled together
WORKING = 112  # longer side, in pixels, at which ink is looked for; a smaller image stays as it is
STROKE = 0.223  # a pen stroke is narrower than this share of the longer side
SHARE = 18 / 28  # of the side that the drawing takes, as Omniglot's do
FAINTEST = 0.1  # contrast, 1 being black on white, below which there is no ink
CLEAN, NOISY = (0.02, 0.98), (0.35, 0.85)  # what becomes 0 and 1, as shares of the darkest: on a screen, in a photo
GREY = np.array([[0.299], [0.587], [0.114]], np.float32)  # of red, green and blue, as eyes weigh them
GREYS = np.arange(256, dtype=np.float32)
LOBES = 3  # of Lanczos' filter on either side, as Pillow has it
Source = Any  # a path, a Pillow image, or [H, W], [H, W, 1], [H, W, 3], [H, W, 4] of uint8, bool, or floats in [0, 1]
Floats = NDArray[np.float32]
Ink = tuple[Floats, Floats, Floats]


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
    names = [str(image) if isinstance(image, str | Path) else f"image {k}" for k, image in enumerate(images)]
    if preprocess == "ink":
        for start in range(0, len(images), CHUNK):
            some = slice(start, start + CHUNK)
            # One kind of work at a time: taking turns is a tenth slower.
            pictures = [_picture(image, name) for image, name in zip(images[some], names[some], strict=True)]
            inks = [_ink(picture, polarity, name) for picture, name in zip(pictures, names[some], strict=True)]
            prepared[some, ..., 0] = _cut(inks, shape[0])
        return prepared
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        pixels = _pixels(image, shape[2], name)
        if pixels.shape != shape:
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
        turned = ImageOps.exif_transpose(image)
        image = np.asarray((eight_bits(turned) if turned.mode.startswith("I;16") else turned).convert("RGBA"))
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


def _picture(image: Source, name: str) -> Image.Image:
    """The image in 8-bit grey."""
    if isinstance(image, str | Path):
        return read_upright(image, 1, still=True)
    return Image.fromarray((255 * _pixels(image, 1, name)[..., 0] + 0.5).astype(np.uint8))


def _ink(picture: Image.Image, polarity: str, name: str) -> Ink:
    """8-bit grey -> ink in whole numbers 0 .. 255 [H, W], and the most in each row [H] and column [W], up to 1."""
    if max(picture.size) > WORKING:
        scale = WORKING / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    counts = np.array(picture.histogram())  # [256]
    drawn = bool(2 * counts.max() > counts.sum())  # on a screen: most pixels are of one grey, which is the median
    if polarity == "light" or (polarity == "auto" and _light_on_dark(picture, counts, drawn)):
        picture, counts = ImageOps.invert(picture), counts[::-1]
    grey = np.asarray(picture)  # [H, W]
    if drawn:
        ink = np.float32(counts.argmax()) - GREYS  # [256], by grey: a table will do
        strongest, (low, high) = ink[counts > 0][0], CLEAN
    else:
        ink = _paper(picture) - grey  # [H, W]
        ranks = [ink.size // 2, int(0.998 * ink.size)]
        ground, strongest = np.partition(ink, ranks, axis=None)[ranks]  # median, and nearly the largest
        ink -= ground  # noise lifts the paper
        strongest, (low, high) = strongest - ground, NOISY
    if strongest < 255 * FAINTEST:
        what = "wanted a drawing, dark or light on its ground"
        raise InputError(f"{name} shows no ink (contrast {max(0, strongest) / 255:.2f}); {what}")
    ink = ((ink / strongest - low) / (high - low)).clip(0, 1)
    page = np.floor(255 * ink + np.float32(0.5))
    if drawn:
        return page.take(grey), ink[grey.min(1)], ink[grey.min(0)]
    return page, ink.max(1), ink.max(0)


def _cut(inks: Sequence[Ink], size: int) -> Floats:
    """A square around each drawing, with the ink in its middle: [n, size, size] in [0, 1].

    What Pillow's `resize` gives for each, with paper all around: columns, then rows, in whole numbers.
    """
    most = max(max(page.shape) for page, _, _ in inks)
    pages = np.zeros((len(inks), most, most), np.float32)
    profiles = np.zeros((2, len(inks), most + 2), np.float32)  # of rows and columns, with paper at both ends
    for number, (page, *both) in enumerate(inks):
        pages[number, : page.shape[0], : page.shape[1]] = page
        for profile, part in zip(profiles, both, strict=True):
            profile[number, 1 : 1 + len(part)] = part
    begin, end = _ends(profiles)  # [2, n] each
    sides = (end - begin).max(0) / SHARE  # [n]
    rows, columns = _lanczos((begin + end) / 2, sides, size, most)  # [n, size, most] each
    across = np.rint(pages @ columns.mT).clip(0, 255)  # [n, most, size]
    return np.rint(rows @ across).clip(0, 255) / np.float32(255)  # [n, size, size]


def _ends(profiles: Floats) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Where ink begins and ends along an axis, by its profiles [..., H + 2] with 0 at both ends: two of [...].

    Pixels count from 0.25, those at the ends by how full they are.
    """
    inked = profiles > 0.25

    def full(at: NDArray[np.integer]) -> NDArray[np.floating]:
        return np.take_along_axis(profiles, at[..., None], -1)[..., 0].astype(float)

    first, last = inked.argmax(-1), inked.shape[-1] - 1 - inked[..., ::-1].argmax(-1)
    return first - full(first) - full(first - 1), last - 1 + full(last) + full(last + 1)


def _lanczos(middles: NDArray[np.floating], sides: NDArray[np.floating], size: int, most: int) -> NDArray[np.float32]:
    """Weights [2, n, size, most] that bring windows around `middles` [2, n], `sides` [n] wide, to `size` pixels."""
    scale = sides[:, None] / size  # [n, 1]
    width = np.maximum(scale, 1)
    centres = middles[..., None] + (np.arange(size) + 0.5 - size / 2) * scale  # [2, n, size]
    first = np.floor(centres - LOBES * width)  # [2, n, size]
    taps = np.arange(int(2 * LOBES * width.max()) + 2)
    x = ((first + 0.5 - centres) / width).astype(np.float32)[..., None]
    x = (x + (taps / width).astype(np.float32)[:, None]).clip(-LOBES, LOBES)  # [2, n, size, taps]
    x = np.float32(np.pi / LOBES) * x + np.float32(1e-9)  # not 0, and the quotient below is 1 there all the same
    squared = np.square(np.sin(x))
    weights = squared * (3 - 4 * squared) / np.square(x)  # sinc(3 x) sinc(x), as sin 3x = 3 sin x - 4 sin^3 x
    weights /= weights.sum(-1, keepdims=True)
    margin = len(taps)  # on either side, for what lies outside
    dense = np.zeros((*centres.shape, most + 2 * margin), np.float32)
    places = np.lib.stride_tricks.sliding_window_view(dense, margin, -1, writeable=True)
    rows = np.indices(first.shape, sparse=True)
    places[(*rows, (first + margin).clip(0, most + margin).astype(int))] = weights
    return dense[..., margin:-margin]


def _light_on_dark(picture: Image.Image, counts: NDArray[np.integer], drawn: bool) -> bool:
    """Whether the few pixels that differ from the ground are lighter than it: the sign of the skewness."""
    if drawn:
        grey = GREYS - counts @ GREYS / counts.sum()
        return bool(counts @ (grey * grey * grey) > 0)
    blurred = picture.filter(ImageFilter.BoxBlur(max(picture.size) / 5))
    slopeless = np.asarray(picture, np.float32) - np.asarray(blurred, np.float32)  # without the light's slope
    slopeless -= slopeless.mean()
    return bool((slopeless * slopeless * slopeless).mean() > 0)


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
