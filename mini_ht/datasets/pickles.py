"""Pickles of arrays, read as data: nothing in them is imported or called.

Python's own unpickler runs what a file tells it to run. This one knows the instructions that build numbers, text,
lists, dicts and NumPy arrays; it leaves the arrays' bytes in the mapped file, so a pickle may be larger than memory.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mini_ht.errors import InputError

# Instructions, live objects of one kind, and values waiting to be put together: tieredImageNet needs about half.
MOST_STEPS, MOST_ITEMS, MOST_WAITING = 1 << 24, 1 << 21, 1 << 16
SMALL, LONGEST_TEXT = 256, 1 << 28  # bytes: longer ones stay in the file; text does not, and is refused
LONG = 1024  # characters; longer text is part of an array
KINDS = re.compile(r"[iuf][1248]|b1|[SU]\d{1,4}|O8?")  # of dtypes: numbers, text, and lists that were object arrays
_SIZED = {  # instruction: how its length is written, what the bytes are
    **{0x55: ("<B", "latin"), 0x54: ("<i", "latin")},  # text of Python 2, which is also its bytes
    **{0x43: ("<B", "bytes"), 0x42: ("<I", "bytes"), 0x8E: ("<Q", "bytes"), 0x96: ("<Q", "bytes")},
    **{0x8C: ("<B", "utf8"), 0x58: ("<I", "utf8"), 0x8D: ("<Q", "utf8"), 0x8A: ("<B", "integer")},
}
_NUMBERS = {0x4B: "<B", 0x4D: "<H", 0x4A: "<i", 0x47: ">d"}
_CONSTANTS: dict[int, Any] = {0x4E: None, 0x88: True, 0x89: False}
_EMPTY: dict[int, Callable[[], Any]] = {0x5D: list, 0x7D: dict, 0x29: tuple}
_PUT, _GET = {0x71: "<B", 0x72: "<I"}, {0x68: "<B", 0x6A: "<I"}


class _Unfinished:
    """An array or a dtype that waits for the instruction that fills it; then `value` is what it became."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def fill(self, state: Any) -> Any:
        """The finished array, or the finished dtype."""
        if self.value is None:
            self.value = _array(*state[1:])
        else:
            _, order, parent, names, fields = state[:5]
            if (parent, names, fields) != (None, None, None):
                raise ValueError("it holds an array of records; only plain arrays are read")
            self.value = self.value.newbyteorder(order)
        return self.value


def _array(shape: Any, dtype: Any, fortran: Any, data: Any) -> Any:
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("an array's shape is not made of lengths")
    if not isinstance(dtype, np.dtype):
        raise ValueError("an array's dtype is none")
    if dtype.hasobject:
        if type(data) is not list or len(data) != math.prod(shape):
            raise ValueError("an array of objects does not hold what it says")
        return list(data)
    data = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _dtype(kind: str, *_: Any) -> _Unfinished:
    if not KINDS.fullmatch(kind):
        raise ValueError(f"it holds an array of {kind[:20]!r}; only numbers and text are read")
    return _Unfinished(np.dtype(kind))


def _bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")  # how Python 3 writes bytes for Python 2; other encodings raise


# What a file may name; numpy.core became numpy._core. Each is a function of this file, none of the one that is named.
NAMES: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray _reconstruct": lambda kind, shape, code: _Unfinished(),
    "numpy.core.multiarray scalar": lambda dtype, data: _array((1,), dtype, False, data)[0].item(),
    "numpy.core.numeric _frombuffer": lambda data, dtype, shape, order: _array(shape, dtype, order == "F", data),
    "numpy ndarray": lambda: None,
    "numpy dtype": _dtype,
    "_codecs encode": _bytes,
    "__builtin__ bytes": lambda: b"",
    "collections OrderedDict": lambda: {},
}


def read_pickle(path: str | Path) -> Any:
    """What a pickle of protocol 2 or higher holds: None, bool, int, float, str, bytes, list, tuple, dict, arrays.

    Long bytes and the elements of arrays are read-only views of the file. An array of objects becomes a list. Keys of
    dicts are text. Raises InputError, which says why, for a pickle that holds or does anything else, and a broken one.
    """
    file = Path(path)
    try:
        if not file.is_file() and file.exists():
            raise InputError(f"cannot read {file} (it is no plain file); give a pickle")
        with file.open("rb") as stream:
            data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped, a name has a NUL
        raise InputError(f"cannot read {file} ({getattr(error, 'strerror', None) or error}); get it again") from error
    try:
        return _Machine(data).run()
    except Exception as error:  # what instructions do to values that do not suit them has many names
        what = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise InputError(f"{file} is no pickle of plain arrays ({what[:200]}); use the published file") from error


class _Machine:
    """A stack of values and the instructions that work on it."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.items = self.puts = 0

    def run(self) -> Any:
        """The value that is left at the end."""
        for _ in range(MOST_STEPS):
            code = self.take(1)[0]
            if code == 0x2E:  # the end
                (value,) = self.stack
                return value
            self.step(code)
            if len(self.stack) > MOST_WAITING or len(self.memo) > MOST_ITEMS or self.items > MOST_ITEMS:
                raise ValueError("it has too many parts")
        raise ValueError("it has too many instructions")

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        start, self.at = self.at, self.at + count
        if count < 0 or self.at > len(self.data):
            raise ValueError("it is cut short")
        return self.data[start : self.at]

    def number(self, form: str) -> Any:
        """The next number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def step(self, code: int) -> None:
        """One instruction."""
        stack = self.stack
        if code in _SIZED:
            form, kind = _SIZED[code]
            stack.append(self.sized(self.take(self.number(form)), kind))
        elif code in _NUMBERS:
            stack.append(self.number(_NUMBERS[code]))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code in _PUT:
            self.put(self.number(_PUT[code]))
        elif code == 0x94:
            self.put(self.puts)
        elif code in _GET:
            if (number := self.number(_GET[code])) not in self.memo:
                raise ValueError("it refers to what is not kept, such as a tuple that it holds twice")
            value = self.memo[number]
            stack.append(value.value if isinstance(value, _Unfinished) and value.value is not None else value)
        elif code == 0x28:
            self.marks.append(len(stack))
            if len(self.marks) > MOST_WAITING:
                raise ValueError("it has too many parts")
        elif code in (0x85, 0x86, 0x87):
            self.group(code - 0x84)
        elif code == 0x74:
            self.group(len(stack) - self.marks.pop())
        elif code in (0x61, 0x65):
            self.extend(1 if code == 0x61 else len(stack) - self.marks.pop())
        elif code in (0x73, 0x75):
            self.enter(2 if code == 0x73 else len(stack) - self.marks.pop())
        elif code == 0x63:
            start = bytes(self.data[self.at : self.at + 200])  # two short lines
            module, name, _ = start.split(b"\n", 2)
            self.at += len(module) + len(name) + 2
            self.name(module.decode(), name.decode())
        elif code == 0x93:
            name = stack.pop()
            self.name(stack.pop(), name)
        elif code == 0x52:
            arguments = stack.pop()
            stack.append(stack.pop()(*arguments))
        elif code == 0x62:
            state, unfinished = stack.pop(), stack.pop()
            if not isinstance(unfinished, _Unfinished):
                raise ValueError("it changes a finished value")
            stack.append(unfinished.fill(state))
        elif code == 0x80:
            self.protocol(self.number("<B"))
        elif code == 0x95:
            self.take(8)  # how long a frame is, which changes nothing
        else:
            raise ValueError(f"it has instruction {code:#04x}, which plain arrays do not need")

    def protocol(self, number: int) -> None:
        """Protocols 0 and 1 do not say their number; a later one may have other instructions."""
        if not 2 <= number <= 5:
            raise ValueError(f"it has protocol {number}; only 2 to 5 are read")

    def sized(self, part: memoryview, kind: str) -> Any:
        """Text, bytes or a whole number."""
        if kind == "integer":
            return int.from_bytes(part, "little", signed=True)
        if kind == "utf8":
            if len(part) > LONGEST_TEXT:
                raise ValueError("it has bytes written as text: dump it again with a protocol above 2")
            return str(part, "utf-8", "surrogatepass")
        if len(part) > SMALL:
            return part
        return str(part, "latin-1") if kind == "latin" else bytes(part)

    def put(self, number: int) -> None:
        """Keep the last value for later; what makes up an array, of which there are many, is not referred to again."""
        value = self.stack[-1]
        self.puts += 1
        if not isinstance(value, tuple | memoryview) and not (isinstance(value, str | bytes) and len(value) > LONG):
            self.memo[number] = value

    def pop(self, count: int) -> list[Any]:
        """The last values."""
        if not 0 <= count <= len(self.stack):
            raise ValueError("it asks for more values than it gave")
        start = len(self.stack) - count
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def group(self, count: int) -> None:
        """A tuple of the last values."""
        self.items += count > 8  # the tuples of arrays are short and soon gone
        self.stack.append(tuple(self.pop(count)))

    def extend(self, count: int) -> None:
        """Put the last values into the list before them."""
        values = self.pop(count)
        if type(self.stack[-1]) is not list:
            raise ValueError("it fills a list that is none")
        self.stack[-1].extend(values)
        self.items += count

    def enter(self, count: int) -> None:
        """Put the last values, keys and values in turn, into the dict before them."""
        values = self.pop(count)
        if type(self.stack[-1]) is not dict or not all(type(key) is str for key in values[::2]):
            raise ValueError("its dicts must have text as keys")
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))
        self.items += count

    def name(self, module: Any, name: Any) -> None:
        """What stands for a function or class that the file names."""
        called = f"{module} {name}".replace("numpy._core", "numpy.core")
        if called not in NAMES:
            raise ValueError(f"it wants to use {called.replace(' ', '.')[:80]!r}, and only plain arrays are read")
        self.stack.append(NAMES[called])
