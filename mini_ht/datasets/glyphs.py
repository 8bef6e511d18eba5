"""A procedural alphabet: characters that nobody has seen, in as many handwritings as asked for.

A stroke is a heading as a function of the way travelled: steady turning makes arcs and loops, a jump makes a corner.
Each hand repeats the strokes with slightly different headings, turns, lengths and joints, as in real handwriting.
"""

from functools import partial

import numpy as np

from mini_ht.datasets.images import ImageSet
from mini_ht.errors import InputError

STROKES, POINTS = 4, 40  # most strokes of a character; pen positions along each
_CHUNK = 16  # characters rendered together: 16 x 20 drawings of 28 x 28 need about 50 MB


def glyphs(seed: int, classes: int, drawings: int = 20, size: int = 28) -> ImageSet:
    """Draws `classes` characters, each by `drawings` hands.

    Returns pixels [classes * drawings, size, size, 1] uint8, background 0 and full ink 255. The same seed gives the
    same pixels, and a character depends on its seed and number only, not on `classes`.
    Raises InputError for a negative seed, no classes, no drawings or a size under 8.
    """
    if seed < 0 or classes < 1 or drawings < 1 or size < 8:
        came = f"seed {seed}, {classes} classes, {drawings} drawings, size {size}"
        raise InputError(f"glyphs got {came}; give seed >= 0, classes >= 1, drawings >= 1, size >= 8")
    pixels = np.empty((classes, drawings, size, size), np.uint8)
    for first in range(0, classes, _CHUNK):
        numbers = range(first, min(first + _CHUNK, classes))
        sources = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,))) for i in numbers]
        plan = np.stack([_plan(source) for source in sources], 1)
        strokes = np.stack([source.standard_normal((10, drawings, STROKES)) for source in sources], 1)
        whole = np.stack([source.standard_normal((8, drawings)) for source in sources], 1)
        pixels[first : numbers.stop] = _ink(_trace(plan, strokes), whole, size)
    names = tuple(f"glyph{seed}-{i}" for i in range(classes))
    return ImageSet(pixels.reshape(-1, size, size, 1), np.full(classes, drawings, np.int64), names)


def _plan(rng: np.random.Generator) -> np.ndarray:
    """Invents a character: [11, STROKES], what all its drawings share."""
    uniform = partial(rng.uniform, size=STROKES)
    order, signs = np.arange(STROKES), rng.choice([-1.0, 1.0], (3, STROKES))
    count = rng.choice([1, 2, 2, 2, 3, 3, 3, 4])
    kinds = ["s", "hook", "line", "line", "line", "arc", "arc", "loop"]
    kind = rng.choice(kinds[:2] if count == 1 else kinds, STROKES)  # a line or an arc alone would look like many others
    line = kind == "line"
    bent = rng.random(STROKES) < np.select([line, kind == "hook"], [0.3, 1.0], 0.1)
    fields = (
        (order < count) * np.where(line & ~bent, uniform(0.5, 1.1), uniform(0.9, 1.7)),  # length, 0 if there is none
        rng.integers(-1, 5, STROKES) * np.pi / 4 + uniform(-0.2, 0.2),  # heading, mostly down or right
        signs[0] * np.select([line, kind == "loop"], [0.0, uniform(4.8, 6.6)], uniform(1.0, 3.2)),  # turn, in all
        signs[1] * (kind == "s") * uniform(1.2, 2.2),  # sway: S-shaped deviation of the heading
        signs[2] * bent * uniform(1.2, 2.5),  # corner: a sudden turn
        uniform(0.35, 0.7),  # where on its way the corner is
        rng.choice([0, 0, 0, 0, POINTS // 2, POINTS - 1], STROKES),  # grip: the pen position that is placed ...
        np.where(rng.random(STROKES) < 0.7, (rng.random(STROKES) * order).astype(int), -1),  # ... on this stroke, or -1
        rng.choice([0, 0, POINTS // 2, POINTS - 1, POINTS - 1], STROKES),  # ... at that stroke's pen position
    )
    return np.stack([*fields, *rng.uniform(-0.5, 0.5, (2, STROKES))])  # x and y where it is placed if not on a stroke


def _trace(plan: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Follows `plan` [11, G, STROKES] with hands `noise` [10, G, D, STROKES], normal; y points down.

    Returns the pen positions [G, D, STROKES, POINTS, 2] (x, y) of each drawing.
    """
    length, heading, turn, sway, corner, corner_at = plan[:6, :, None, :, None]  # [G, 1, S, 1] each
    n = noise[..., None]  # [10, G, D, S, 1]
    t = np.linspace(0, 1, POINTS)
    angle = heading + 0.12 * n[0] + (turn * (1 + 0.12 * n[1]) + 0.15 * n[2]) * t
    angle = angle + (sway + 0.15 * n[3]) * np.sin(2 * np.pi * t) + 0.12 * n[4] * np.sin(3 * np.pi * t)
    angle = angle + corner * (1 + 0.1 * n[5]) * (t > corner_at + 0.05 * n[6])
    step = length * np.exp(0.15 * n[7]) / POINTS
    path = np.cumsum(np.stack([step * np.cos(angle), step * np.sin(angle)], -1), -2)  # [G, D, S, P, 2]

    g, (grip, parent, touch) = np.arange(len(path)), plan[6:9].astype(int)
    for s in range(STROKES):  # a stroke moves along with the one that it is attached to
        own = np.moveaxis(plan[9:, :, None, s], 0, -1)  # [G, 1, 2]
        loose = 0.04 * np.moveaxis(noise[8:, :, :, s], 0, -1)  # [G, D, 2]
        free = (s == 0) | (parent[:, None, s, None] < 0)
        place = np.where(free, own, path[g, :, parent[:, s], touch[:, s]]) + loose
        path[:, :, s] += (place - path[g, :, s, grip[:, s]])[:, :, None]
    return path


def _ink(path: np.ndarray, noise: np.ndarray, size: int) -> np.ndarray:
    """Draws pen positions [G, D, S, P, 2], set on the page by `noise` [8, G, D], normal: [G, D, size, size] uint8.

    A Gaussian pen is separable, so the ink of all positions of a drawing adds up in one product of matrices.
    """
    way = np.linalg.norm(np.diff(path, axis=3, prepend=path[:, :, :, :1]), axis=-1)  # [G, D, S, P]
    way, path = (x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in (way, path))  # strokes and points in one axis
    drawn = np.where(way[..., None] > 0, path, path[:, :, 1:2])  # absent strokes must not count for the extent
    low, high = drawn.min(2, keepdims=True), drawn.max(2, keepdims=True)
    extent = np.maximum((high - low).max(-1, keepdims=True), 0.4)
    path = (path - (low + high) / 2) / extent  # within -0.5 to 0.5
    n = noise[..., None]  # [8, G, D, 1]
    zoom = 0.66 * np.exp(0.1 * np.minimum(n[0], 1.5))
    tilt, shear, stretch = 0.08 * n[1], 0.12 * n[2], np.exp(0.1 * n[3])
    x, y = path[..., 0] * stretch + shear * path[..., 1], path[..., 1] / stretch
    x, y = zoom * (np.cos(tilt) * x - np.sin(tilt) * y), zoom * (np.sin(tilt) * x + np.cos(tilt) * y)
    x, y = (size * (0.5 + z + 0.04 * np.clip(shift, -2, 2)) for z, shift in ((x, n[4]), (y, n[5])))  # in pixels
    pressure = np.sin(np.linspace(0, 2 * np.pi, x.shape[2]) + n[6])
    width = size / 28 * 0.52 * np.exp(0.08 * n[7] + 0.1 * pressure)
    weight = 1.0 * way / extent[..., 0] * zoom * size / width  # a pen that lingers lays more ink

    centres = np.arange(size, dtype=np.float32) + 0.5
    x, y, width, weight = (z.astype(np.float32)[..., None] for z in (x, y, width, weight))
    across, down = (np.exp(-0.5 * ((centres - z) / width) ** 2) for z in (x, y))  # [G, D, S * P, size]
    ink = np.swapaxes(down * weight, -1, -2) @ across
    return np.rint(255 * (1 - np.exp(-ink))).astype(np.uint8)
