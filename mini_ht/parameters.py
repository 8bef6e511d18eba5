"""Parameters: a flat mapping from names to arrays; how they are shaped, drawn, moved to torch, saved and loaded."""

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save as save_tensors

from mini_ht.arrays import Array
from mini_ht.config import Config
from mini_ht.discriminant import STEPS
from mini_ht.errors import InputError
from mini_ht.features import shared_widths
from mini_ht.files import check_regular, write_atomically
from mini_ht.plan import KERNEL, Layer, plan

FORMAT = "mini_ht 1"
CHECKPOINT = "model.safetensors"
STATISTICS = ("mean", "variance")  # of a norm, learned over training tasks; not every checkpoint has them
LARGEST_FILE = 1 << 30  # bytes; the state of the largest preset's training has half as many
PRETRAINED = Path(__file__).parent / "pretrained"

# What a feed-forward part adds starts small, so that a token begins as what attention gathered.
RESIDUAL_GAIN = 0.3

# Convs that see pixels start larger: ink covers little of a drawing, whose mean square is about 1 / 16.
PIXEL_GAIN = 4.0

# What a start's name stands for; bright activations are what `discriminant` can lift.
STARTS = {"zeros": 0.0, "ones": 1.0, "bright": 6.0}

# name -> (shape, start)
Table = dict[str, tuple[tuple[int, ...], float | str]]


@functools.cache
def parameter_table(config: Config) -> Table:
    """Every parameter's name, shape and start: a standard deviation, or a name of STARTS."""
    table: Table = {}

    def dense(name: str, inputs: int, outputs: int, bias: bool = True, gain: float = 1.0) -> None:
        table[name] = ((inputs, outputs), gain / math.sqrt(inputs))
        if bias:
            table[f"{name}_bias"] = ((outputs,), "zeros")

    def conv(name: str, kernel: int, inputs: int, outputs: int, gain: float = 1.0) -> None:
        table[f"{name}.weight"] = ((kernel, kernel, inputs, outputs), gain * math.sqrt(2 / (kernel**2 * inputs)))
        table[f"{name}.bias"] = ((outputs,), "zeros")

    def norm(name: str, width: int) -> None:
        table[f"{name}_gain"] = ((width,), "ones")
        table[f"{name}_offset"] = ((width,), "zeros")

    def transformer(name: str, width: int, decoder: bool = False) -> None:
        keys, values = (
            math.ceil(max(1, int(width * fraction)) / config.heads) * config.heads
            for fraction in (config.key_width, config.value_width)
        )
        inner = int(width * config.inner_width)
        for number in range(config.layers):
            layer = f"{name}.layer{number}"
            for part in (layer, f"{layer}.own")[: 1 + decoder]:
                norm(f"{part}.attention_norm", width)
                dense(f"{part}.query", width, keys)
                dense(f"{part}.key", width, keys, bias=config.attention == "sigmoid")
                dense(f"{part}.value", width, values)
                dense(f"{part}.output", values, width)
            if inner:
                norm(f"{layer}.inner_norm", width)
                dense(f"{layer}.inner", width, inner)
                dense(f"{layer}.outer", inner, width, gain=RESIDUAL_GAIN)
        if config.encoder == "pre-norm":
            norm(f"{name}.norm", width)

    def generator(layer: Layer) -> None:
        table[f"{layer.name}.xi"] = ((config.way + 1, config.encoding), 1.0)
        table[f"{layer.name}.mu"] = ((layer.placeholders, config.encoding), 1.0)
        for number, local in enumerate(layer.local):
            gain = PIXEL_GAIN if layer.name == "conv1" and number == 0 else 1.0
            conv(f"{layer.name}.local{number}", local.kernel, local.inputs, local.outputs, gain)
        transformer(f"{layer.name}.generator", layer.token_width)
        if config.generator != "joint":
            transformer(f"{layer.name}.generator.decoder", layer.token_width, decoder=True)
        if config.readout == "linear":
            shape = (layer.token_width, layer.slice_length)
            table[f"{layer.name}.readout.weight"] = (shape, 1 / math.sqrt(layer.token_width))
            table[f"{layer.name}.readout.bias"] = ((layer.slice_length,), "zeros")

    inputs = config.image_channels
    for number, width in enumerate(shared_widths(config)):
        conv(f"shared.conv{number}", KERNEL, inputs, width, PIXEL_GAIN if number == 0 else 1.0)
        inputs = width
    for layer in plan(config):
        if layer.discriminant:
            inputs = KERNEL * KERNEL * layer.inputs
            table[f"{layer.name}.discriminant.start"] = ((inputs, layer.outputs), 1 / math.sqrt(inputs))
            parts = {"prior": (inputs, inputs), "seen": (1,), "lift": (1,)}
            parts |= {"reach": (STEPS,), "turn": (STEPS,)}
            table |= {f"{layer.name}.discriminant.{part}": (shape, "zeros") for part, shape in parts.items()}
            table[f"conv{config.blocks - 1}.beta"] = ((layer.inputs,), "bright")
        elif layer.generated:
            generator(layer)
        if layer.name == "logits":
            continue
        shape = (KERNEL, KERNEL, layer.inputs, layer.outputs)
        if not layer.generated:
            table[f"{layer.name}.weight"] = (shape, math.sqrt(2 / (KERNEL * KERNEL * layer.inputs)))
        elif config.residual_weights:
            table[f"{layer.name}.weight"] = (shape, "zeros")
        if layer.generated and config.generate_norm:
            table[f"{layer.name}.norm_gate"] = ((2,), "zeros")  # so that a norm starts as it is learned
        table[f"{layer.name}.gamma"] = ((layer.outputs,), "ones")
        table[f"{layer.name}.beta"] = ((layer.outputs,), "zeros")
    return table


def generator_size(config: Config) -> int:
    """How many numbers are trained."""
    return sum(math.prod(shape) for shape, _ in parameter_table(config).values())


def draw_parameters(config: Config, seed: int = 0, dtype: Any = np.float32) -> dict[str, NDArray[np.floating]]:
    """Fresh parameters, bit for bit the same for the same config and seed."""
    rng = np.random.default_rng(seed)
    parameters: dict[str, NDArray[np.floating]] = {}
    for name, (shape, start) in parameter_table(config).items():
        if isinstance(start, str):
            parameters[name] = np.full(shape, STARTS[start])
        else:
            parameters[name] = rng.standard_normal(shape) * start
    start_as_prototypes(parameters, config)
    return {name: x.astype(dtype) for name, x in parameters.items()}


def start_as_prototypes(parameters: dict[str, NDArray[np.floating]], config: Config) -> None:
    """Turn fresh parameters, in place, towards logits weights that are class means (paper, section 3.2).

    Keys start as queries, so that like tokens find each other, and what a head reads from some coordinates of a token
    it adds to the same ones. Placeholder i of the logits layer starts as class i's encoding. Where that layer sees a
    1 x 1 map, its first local features are the activations themselves, and a linear read-out makes them the weights;
    slices read from the token lie there anyway. Weights of sigmoid attention do not compete, so it gets a threshold: a
    key counts half that is half as like the query as a token is like itself. docs/recipe.md, results.md: what it gains.
    """
    for name in parameters:
        if name.endswith(".key"):
            parameters[name] = parameters[name.removesuffix("key") + "query"].copy()
        elif name.endswith(".output"):
            parameters[name] = parameters[name.removesuffix("output") + "value"].T.copy()
        elif name.endswith(".key_bias") and (width := len(parameters[name]) // config.heads) > 1:  # softmax has none
            spent = slice(0, None, width)  # the first coordinate of each head: sqrt(w / 2) times -sqrt(w / 2)
            for projection, sign in ((name.replace(".key_bias", ".query"), 1), (name.removesuffix("_bias"), -1)):
                parameters[projection][:, spent] = 0
                parameters[f"{projection}_bias"][spent] = sign * math.sqrt(width / 2)
    parameters["logits.mu"] = parameters["logits.xi"][: config.way].copy()
    layer = plan(config)[-1]
    if not (layer.local and layer.size == 1):
        return
    same = np.eye(layer.inputs, config.local_features)  # [F, local features]
    parameters["logits.local0.weight"][0, 0] = same
    if config.readout == "linear":
        rows = slice(config.encoding, config.encoding + config.local_features)
        parameters["logits.readout.weight"][rows, : layer.inputs] += same.T


def to_torch(parameters: Mapping[str, NDArray[np.floating]], device: Any = None) -> dict[str, Array]:
    """The same mapping with torch tensors (copies) that record gradients, on `device`."""
    import torch

    return {name: torch.tensor(array, device=device, requires_grad=True) for name, array in parameters.items()}


def to_numpy(parameters: Mapping[str, Array]) -> dict[str, NDArray[np.floating]]:
    """The same mapping with NumPy arrays (copies), from torch tensors on any device."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in parameters.items()}


def save(path: str | os.PathLike[str], parameters: Mapping[str, NDArray[np.floating]], config: Config) -> Path:
    """Write parameters and config as one safetensors file; an existing file stays whole until the new one is complete.

    path is a file, or a folder in which `model.safetensors` is written. Raises InputError where it cannot be written.
    """
    return write_tensors(checkpoint_path(path), parameters, config, {})


def load(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[np.floating]], Config]:
    """Parameters (NumPy; float32 if stored as float16) and config of a file written by `save`, or of a run folder.

    No torch is needed.

    Raises InputError when the file is missing, cut short, from another program or version, or does not fit its config.
    """
    tensors, config, _ = read_tensors(checkpoint_path(path))
    return {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in tensors.items()}, config


def load_pretrained(name: str = "omniglot") -> tuple[dict[str, NDArray[np.floating]], Config]:
    """Parameters (NumPy, float32) and config of a generator that comes with the package.

    "omniglot": 20-way 1-shot, 8 channels, writes all layers; "omniglot-1shot": the last one, better with one image a
    class; "omniglot-any": all layers, for 2 to 20 classes of 1 to 10 images each.
    Their cards are in docs/pretrained.md. Raises InputError for an unknown name.
    """
    known = sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))
    if name not in known:
        raise InputError(f"there is no pretrained generator {name!r}; choose one of {', '.join(known)}")
    return load(PRETRAINED / f"{name}.safetensors")


def checkpoint_path(path: str | os.PathLike[str]) -> Path:
    """The checkpoint's file: `path` itself, or the one inside when it is a run folder."""
    file = Path(path)
    return file if file.suffix == ".safetensors" else file / CHECKPOINT


def write_tensors(file: Path, tensors: Mapping[str, NDArray[Any]], config: Config, more: Mapping[str, str]) -> Path:
    """Write tensors beside the config and further metadata, atomically."""
    metadata = {"format": FORMAT, "config": config.to_json(), **more}
    # NumPy arrays may be views with other strides; safetensors stores them as they lie in memory.
    data = save_tensors({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata)
    write_atomically(file, data)
    return file


def read_tensors(
    file: Path, prefixes: tuple[str, ...] = ("",)
) -> tuple[dict[str, NDArray[Any]], Config, dict[str, str]]:
    """Tensors, config and metadata of a checkpoint; for each prefix every parameter of the config must be there."""
    try:
        check_regular(file, LARGEST_FILE)
        with safe_open(file, framework="numpy") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
            config = _checked(file, metadata, {name: stored.get_slice(name) for name in stored.keys()}, prefixes)
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint {file}; train one with 'mini-ht train'") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # of safetensors, or of a dtype that NumPy does not have
        raise InputError(f"{file} is cut short or is no safetensors file ({error}); use another copy") from error
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(f"{file} holds numbers in {name} that are not finite; use another copy")
        if name.endswith(".variance") and array.min(initial=0) < 0:
            raise InputError(f"{file} holds a variance below zero in {name}; use another copy")
    return tensors, config, metadata


def _checked(file: Path, metadata: Mapping[str, str], found: Mapping[str, Any], prefixes: tuple[str, ...]) -> Config:
    """The config in a checkpoint's metadata, after a look at the shapes and dtypes of what is stored."""
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{file} has format {metadata.get('format')!r}; wanted {FORMAT!r}: it is from another program or version"
        )
    config = Config.from_json(metadata.get("config", "nothing"))
    shapes = {name: shape for name, (shape, _) in parameter_table(config).items()}
    for prefix in prefixes:
        learned = {f"{layer.name}.{kind}": (layer.outputs,) for layer in plan(config)[:-1] for kind in STATISTICS}
        present = any(prefix + name in found for name in learned)  # those of all norms, or of none
        for name, shape in (shapes | learned if present else shapes).items():
            stored = found.get(prefix + name)
            if stored is None or tuple(stored.get_shape()) != shape:
                came = "is missing" if stored is None else f"has shape {stored.get_shape()}"
                raise InputError(f"{file} does not fit its config: {prefix + name} {came}; wanted {list(shape)}")
    if odd := sorted({stored.get_dtype() for stored in found.values()} - {"F16", "F32", "F64"}):
        raise InputError(f"{file} holds numbers of type {', '.join(odd)}; wanted F16, F32 or F64: use another copy")
    return config
