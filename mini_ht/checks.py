"""Early, clear errors for support and query sets that do not fit the parameters."""

from typing import Any

from mini_ht.arrays import Array, Parameters, as_floats
from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.parameters import parameter_table

KINDS = {"int": "integers (-1 for unlabelled)", "bool": "booleans"}


def check_support(
    parameters: Parameters, config: Config, support: Array, labels: Array, mask: Array | None, values: bool
) -> None:
    """Raise InputError unless parameters fit the config, and the support set fits both; if asked, look at values."""
    for name, (shape, _) in parameter_table(config).items():
        if name not in parameters or tuple(parameters[name].shape) != shape:
            came = f"have it as {list(parameters[name].shape)}" if name in parameters else "do not have it"
            raise InputError(f"the config wants parameter {name} {list(shape)}; these parameters {came}: use their own")
    size, channels = config.image_size, config.image_channels
    check_images("support", support, parameters["logits.xi"], (size, size, channels), (4, 5))
    for name, array, kind in (("labels", labels, "int"), ("mask", mask, "bool")):
        check_marks(name, array, kind, support)
    if not values:
        return
    check_pixels("support", support, mask)
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= config.way:
        raise InputError(
            f"labels run from {low} to {high}; wanted -1 (unlabelled) .. {config.way - 1}, "
            f"as this generator serves up to {config.way} classes"
        )
    labelled = labels >= 0 if mask is None else (labels >= 0) & mask
    if not bool(labelled.any(-1).all()):
        raise InputError("an episode has no labelled image; give one (classes without one are never predicted)")


def check_query(
    query: Array, mask: Array | None, weight: Array, shape: tuple[int, ...], batched: bool, values: bool
) -> None:
    """Raise InputError unless query and mask fit a CNN with this logits weight [E, way, F + 1] and image shape."""
    check_images("query", query, weight, shape, (5,) if batched else (4,), weight.shape[0] if batched else None)
    check_marks("mask", mask, "bool", query)
    if values:
        check_pixels("query", query, mask)


def check_images(
    name: str, images: Any, like: Array, shape: tuple[int, ...], ranks: tuple[int, ...], episodes: int | None = None
) -> None:
    """Images of `shape` (H, W, C), of as many episodes if given, of the library and dtype of `like`, at least one."""
    dtypes = (str(like.dtype), "torch.bfloat16")
    if not isinstance(images, type(like)) or str(images.dtype) not in dtypes:
        raise InputError(
            f"{name} is a {type(images).__name__} of {getattr(images, 'dtype', 'no dtype')} and the parameters are of "
            f"{type(like).__name__}, {like.dtype}: bring both to one library and dtype (pixels in [0, 1])"
        )
    letter = "m" if name == "query" else "n"
    wanted = " or ".join(f"[E, {letter}, H, W, C]" if rank == 5 else f"[{letter}, H, W, C]" for rank in ranks)
    many = "" if episodes is None else f" and E = {episodes}"
    right = images.ndim in ranks and tuple(images.shape[-3:]) == shape
    if not right or (episodes is not None and images.shape[0] != episodes):
        raise InputError(
            f"{name} has shape {list(images.shape)}; wanted {wanted} with (H, W, C) = {shape}{many}: "
            "resize the images or take another preset"
        )
    if 0 in images.shape:
        raise InputError(f"{name} has shape {list(images.shape)}: there is no image in it; give at least one")


def check_marks(name: str, marks: Any, kind: str, images: Array) -> None:
    """One label or mask entry for each image, of the same library; None, for no mask, passes."""
    if marks is None:
        return
    if not isinstance(marks, type(images)) or kind not in str(marks.dtype) or marks.shape != images.shape[:-3]:
        came = f"{type(marks).__name__} of {getattr(marks, 'dtype', 'no dtype')} {list(getattr(marks, 'shape', []))}"
        raise InputError(f"{name}: a {came} came; wanted {KINDS[kind]} {list(images.shape[:-3])}, one for each image")


def check_pixels(name: str, images: Array, mask: Array | None) -> None:
    """All pixels are numbers, in [0, 1] but for padding."""
    seen = images if mask is None else images * as_floats(mask, images)[..., None, None, None]
    low, high = float(seen.min()), float(seen.max())
    if not (0 <= low and high <= 1):  # false for NaN, too
        raise InputError(f"{name} holds pixels from {low:g} to {high:g}; wanted values in [0, 1]")
