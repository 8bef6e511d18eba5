"""What the page sends, checked in every respect before anything is computed with it."""

import json
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mini_ht.errors import InputError

CLASSES, DRAWINGS, STROKES, POINTS = 5, 5, 60, 600  # at most: in a message, a class, a drawing, a drawing

Drawing = list[NDArray[np.float64]]  # strokes, each [points, 2] in [0, 1]


class Refused(InputError):
    """A request that the server does not serve: an HTTP status from 400 to 499, and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def read_adapt(body: bytes, most_classes: int) -> list[list[Drawing]]:
    """The drawings of each class in the message {"classes": [[[[[x, y], ...], ...], ...], ...]}.

    From outside in: classes, drawings, strokes, points. Raises InputError for all else, with the place of the mistake.
    """
    (classes,) = read_object(body, ("classes",))
    check_list(classes, "classes", 2, most_classes)
    drawings = [check_list(some, f"classes[{i}]", 1, DRAWINGS) for i, some in enumerate(classes)]
    return [[read_drawing(x, f"classes[{i}][{j}]") for j, x in enumerate(some)] for i, some in enumerate(drawings)]


def read_predict(body: bytes) -> tuple[str, Drawing]:
    """Identifier and drawing in the message {"id": "...", "strokes": [[[x, y], ...], ...]}; raises InputError."""
    name, strokes = read_object(body, ("id", "strokes"))
    if not isinstance(name, str) or not 1 <= len(name) <= 64:
        raise InputError("id: wanted the text of 1 to 64 characters that /adapt answered with")
    return name, read_drawing(strokes, "strokes")


def read_object(body: bytes, names: tuple[str, ...]) -> list[Any]:
    """The values of a JSON object with exactly these names; raises InputError."""
    try:
        message = json.loads(body, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise InputError("the message is not valid JSON in UTF-8; send one JSON object") from error
    if not isinstance(message, dict) or message.keys() != set(names):
        raise InputError(f"wanted one JSON object with {' and '.join(names)}, and nothing else")
    return [message[name] for name in names]


def not_a_number(name: str) -> NoReturn:
    """NaN and Infinity, which Python's reader takes although JSON does not have them."""
    raise ValueError(name)


def read_drawing(strokes: Any, where: str) -> Drawing:
    """Strokes of points [x, y], numbers from 0 to 1; raises InputError."""
    for i, stroke in enumerate(check_list(strokes, where, 1, STROKES)):
        check_list(stroke, f"{where}[{i}]", 1, POINTS)
        for j, point in enumerate(stroke):
            check_list(point, f"{where}[{i}][{j}]", 2, 2)
            if not all(type(z) in (int, float) and 0 <= z <= 1 for z in point):  # NaN and bool are outside, too
                raise InputError(f"{where}[{i}][{j}]: wanted a point [x, y] of two numbers from 0 to 1")
    if (total := sum(len(stroke) for stroke in strokes)) > POINTS:
        raise InputError(f"{where}: {total} points came, at most {POINTS} are taken; undo some strokes")
    return [np.array(stroke, np.float64) for stroke in strokes]


def check_list(value: Any, where: str, least: int, most: int) -> list[Any]:
    """The value, if it is a list with `least` to `most` entries; raises InputError."""
    if not isinstance(value, list) or not least <= len(value) <= most:
        came = f"{len(value)} came" if isinstance(value, list) else "something else came"
        wanted = str(least) if least == most else f"{least} to {most}"
        raise InputError(f"{where}: wanted a list with {wanted} entries, {came}")
    return value
