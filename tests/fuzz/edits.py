"""Small damage to good files: edits that Hypothesis can draw and shrink, and a loop can draw fast."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

Edit = tuple[int, float, bytes]  # what is done, where (a share of the length), with what
KINDS = ("overwrite", "insert", "remove", "repeat", "cut", "number", "flip", "swap")
NUMBERS = (0, 1, -1, 127, 255, 256, 65535, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**63 - 1, -(2**63))
TOKENS = (
    *(struct.pack(form, number % 2**bits) for form, bits in (("<I", 32), (">I", 32), ("<Q", 64)) for number in NUMBERS),
    *(b"NaN", b"-1", b"1e999", b"1" * 5000, b"null", b"true", b"[]", b"{}", b'""', b"[" * 2000, b'"\\ud800"'),
    *(b"\xff\xfe", b"..", b"/", b"\x00", b"\n", b"\r\n", b"PK\x05\x06", b"\xff\xda", b"\x89PNG\r\n\x1a\n"),
)  # fmt: skip


def edited(data: bytes, edits: Sequence[Edit], other: bytes = b"") -> bytes:
    """The data after the edits, one by one; `other` is another good file, whose end may take the place of the end."""
    for kind, where, what in edits:
        at = int(where * len(data))
        end = at + max(1, len(what))
        name = KINDS[kind % len(KINDS)]
        if name == "overwrite":
            data = data[:at] + what + data[end:]
        elif name == "insert":
            data = data[:at] + what + data[at:]
        elif name == "remove":
            data = data[:at] + data[end:]
        elif name == "repeat":
            data = data[:end] + data[at:end] * (1 + len(what)) + data[end:]
        elif name == "cut":
            data = data[:at]
        elif name == "number":
            data = data[:at] + TOKENS[sum(what) % len(TOKENS)] + data[at + len(TOKENS[sum(what) % len(TOKENS)]) :]
        elif name == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << sum(what) % 8)]) + data[at + 1 :]
        elif name == "swap":
            data = data[:at] + other[int(where * len(other)) :]
    return data


def random_edits(rng: random.Random) -> list[Edit]:
    """A few edits; often only one, since two kinds of damage hide each other."""
    count = rng.choice((1, 1, 1, 2, 2, 3, 5))
    return [
        (
            rng.randrange(len(KINDS)),
            rng.random(),
            rng.choice(TOKENS) if rng.random() < 0.3 else rng.randbytes(rng.randrange(9)),
        )
        for _ in range(count)
    ]
