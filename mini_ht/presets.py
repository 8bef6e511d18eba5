"""Presets, named after the rows of the paper's tables; the suffix -released takes the released code's sizes.

With the suffix -logits only the logits layer is generated, and the convs are learned, the same for every task.

A preset with `any` trains on tasks of all sizes, 2 to 20 classes with 1 to 10 images each.
"""

import dataclasses
from typing import Any

from mini_ht.config import Config
from mini_ht.errors import InputError

QUICKSTART = "quickstart"


def presets() -> dict[str, Config]:
    """All presets by name."""
    # Read-out through a linear map lets features be wider than the slices ask for (docs/recipe.md).
    best: dict[str, Any] = {"readout": "linear", "layers": 2}
    best |= {"shared_features": 64, "taper": True, "local_features": 16}
    pooled: dict[str, Any] = {"shared_convs": "pooled", "learning_rate": 4e-3, "decay": 0.3}  # measured at 8 channels
    pooled |= {"turned": 0.5}  # measured at 8 channels, the logits layer generated
    table = {QUICKSTART: Config(way=5, queries=5, dataset="glyphs", minutes=1.8, **best)}
    for shot in (1, 5):
        for channels in (4, 6, 8, 16, 32, 48, 64):
            released = Config(
                shot=shot, queries=3 if shot == 1 else 5, channels=channels, local_features=channels,
                episodes_per_step=24,
            )  # fmt: skip
            mine = {"episodes_per_step": 16, "mirror": True, "shift": 2, **best}
            name = f"omniglot-20way-{shot}shot-{channels}ch"
            table |= {name: dataclasses.replace(released, **mine, **pooled), f"{name}-released": released}
            table[f"{name}-logits"] = dataclasses.replace(table[name], generate="logits")
            if shot == 1 and channels in (8, 16):
                table[f"omniglot-any-{channels}ch"] = dataclasses.replace(released, **mine, vary=10)
    for shot in (1, 5):
        for channels in (8, 16, 32, 48, 64):
            released = Config(
                dataset="mini-imagenet", rotate=False, way=5, shot=shot, queries=20, image_size=84, image_channels=3,
                channels=channels, slope=0.01, heads=8, key_width=0.5, value_width=0.5, inner_width=0.5,
                shared_features=16, local_features=16, minutes=240,
            )  # fmt: skip
            name = f"mini-imagenet-5way-{shot}shot-{channels}ch"
            table |= {name: dataclasses.replace(released, **best), f"{name}-released": released}
    return table


def preset(name: str) -> Config:
    """The preset of that name; InputError with the nearest names for an unknown one."""
    table = presets()
    if name not in table:
        import difflib  # seldom needed, and slow to import

        near = difflib.get_close_matches(name, table, n=3, cutoff=0.3) or list(table)[:3]
        raise InputError(f"there is no preset {name!r}; try {', '.join(near)}. 'mini-ht presets' lists them all")
    return table[name]
