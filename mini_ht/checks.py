"""Early, clear errors for support sets that do not fit the config."""

from __future__ import annotations

from collections.abc import Mapping

from mini_ht.arrays import Array, namespace
from mini_ht.config import Config
from mini_ht.errors import InputError


def check_support(
    parameters: Mapping[str, Array],
    config: Config,
    support: Array,
    labels: Array,
    mask: Array | None,
    values: bool = True,
) -> None:
    """Raise InputError unless support, labels and mask have shapes, dtypes and (if asked) values that fit."""
    shape = (config.image_size, config.image_size, config.image_channels)
    if support.ndim not in (4, 5) or tuple(support.shape[-3:]) != shape:
        raise InputError(
            f"support has shape {list(support.shape)}; wanted [n, H, W, C] or [E, n, H, W, C] "
            f"with (H, W, C) = {shape}: resize the images or take another preset"
        )
    if 0 in support.shape:
        raise InputError(f"support has shape {list(support.shape)}: there is no image in it; give at least one a class")
    wanted = parameters["logits.xi"]
    if namespace(support) is not namespace(wanted) or support.dtype != wanted.dtype:
        raise InputError(
            f"support is a {type(support).__name__} of {support.dtype} and the parameters are of "
            f"{type(wanted).__name__}, {wanted.dtype}: bring both to one library and dtype (pixels in [0, 1])"
        )
    if tuple(labels.shape) != tuple(support.shape[:-3]):
        raise InputError(
            f"labels have shape {list(labels.shape)}; wanted one for each image, {list(support.shape[:-3])}"
        )
    if "int" not in str(labels.dtype):
        raise InputError(f"labels are {labels.dtype}; wanted integers in -1 .. {config.way - 1}, -1 for unlabelled")
    if mask is not None and (tuple(mask.shape) != tuple(labels.shape) or "bool" not in str(mask.dtype)):
        raise InputError(f"mask is {mask.dtype} {list(mask.shape)}; wanted booleans {list(labels.shape)}")
    if values:
        check_values(config, support, labels, mask)


def check_values(config: Config, support: Array, labels: Array, mask: Array | None) -> None:
    """Raise InputError for pixels that are not numbers, labels out of range, or an episode without a labelled image."""
    if not bool(namespace(support).isfinite(support).all()):
        raise InputError("support holds NaN or infinite pixels; wanted values in [0, 1]")
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= config.way:
        raise InputError(
            f"labels run from {low} to {high}; wanted -1 (unlabelled) .. {config.way - 1}, "
            f"as this generator serves up to {config.way} classes"
        )
    labelled = labels >= 0 if mask is None else (labels >= 0) & mask
    if not bool(labelled.any(-1).all()):
        raise InputError(
            "an episode has no labelled image; give at least one (classes without one are never predicted)"
        )
