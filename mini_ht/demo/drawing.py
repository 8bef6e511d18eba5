"""From pen strokes to the ink image that a generator of drawings has been trained on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

# In shares of the image, as in Omniglot, where they are about 18 and 1.4 of 28 pixels.
SIDE, PEN = 18 / 28, 1.4 / 28
SMALLEST = 0.1  # of the pad: a smaller drawing is not enlarged to fill the image, so that a dot stays a dot
FINE = 8  # the pen draws on a page so many times as fine, which is then averaged


def strokes_to_ink(strokes: Sequence[NDArray[np.floating]], size: int) -> NDArray[np.float32]:
    """Draws strokes, each [points, 2] of (x, y) with y down, in the middle, the longer side at 18 / 28 of the image.

    Returns [size, size, 1] in [0, 1], ink 1 on 0. Where on the pad the strokes were, and how large, does not matter.
    """
    points = np.concatenate(strokes)
    low, high = points.min(0), points.max(0)
    page = FINE * size
    scale = (SIDE - PEN) * page / max((high - low).max(), SMALLEST)
    radius = (PEN * page - 1) / 2  # Pillow draws the outermost pixels, too
    image = Image.new("L", (page, page))
    pen = ImageDraw.Draw(image)
    for stroke in strokes:
        path = [(float(x), float(y)) for x, y in (stroke - (low + high) / 2) * scale + (page - 1) / 2]
        pen.line(path, fill=255, width=round(PEN * page))
        for x, y in path:  # round joints and ends; a stroke of one point is a dot
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    ink = np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32)
    return ink[..., None] / np.float32(255)
