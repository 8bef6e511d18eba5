"""Presets, named after the rows of the paper's tables; the suffix -released takes the sizes of the released code."""

from __future__ import annotations

import dataclasses
import difflib

from mini_ht.config import Config
from mini_ht.errors import InputError

QUICKSTART = "quickstart"


def presets() -> dict[str, Config]:
    """All presets by name."""
    table = {QUICKSTART: Config(dataset="glyphs", way=5, queries=5, minutes=1.8)}
    for shot in (1, 5):
        for channels in (4, 6, 8, 16, 32, 48, 64):
            name = f"omniglot-20way-{shot}shot-{channels}ch"
            table[f"{name}-released"] = Config(
                shot=shot,
                queries=3 if shot == 1 else 5,
                channels=channels,
                shared_features=32,
                local_features=channels,
            )
            table[name] = dataclasses.replace(
                table[f"{name}-released"], readout="linear", shared_features=64, taper=True, local_features=16
            )
    return table


def preset(name: str) -> Config:
    """The preset of that name; InputError with the nearest names for an unknown one."""
    table = presets()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.3)
        raise InputError(
            f"there is no preset {name!r}; nearest: {', '.join(near) or 'none'}. 'mini-ht presets' lists all"
        )
    return table[name]
