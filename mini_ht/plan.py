"""The plan: from a Config, the sizes of every layer of the CNN and of the transformer that writes it."""

import functools
from dataclasses import dataclass

from mini_ht.config import Config

KERNEL = 3


@dataclass(frozen=True)
class LocalConv:
    """One 'valid' conv of a layer's local feature extractor."""

    kernel: int
    stride: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Layer:
    """One layer of the generated CNN: `conv1` ... `convB`, then `logits` (paper, section 4.1)."""

    name: str
    generated: bool
    size: int  # height and width of the input activations
    inputs: int  # Cin; for the logits layer F, the flattened activations
    outputs: int  # Cout; for the logits layer way
    placeholders: int  # weight slices, one token each
    slice_length: int
    local: tuple[LocalConv, ...]
    token_width: int  # D
    discriminant: bool = False  # generated, but not by a transformer


@functools.cache
def plan(config: Config) -> tuple[Layer, ...]:
    """All layers in the order in which they are generated, the logits layer last."""
    layers: list[Layer] = []
    size, inputs = config.image_size, config.image_channels

    def add(name: str, generated: bool, inputs: int, outputs: int, placeholders: int, length: int) -> None:
        channels = config.channels if name == "logits" else inputs  # logits see flattened maps, local convs do not
        local = local_convs(size, channels, config.local_features, depth=1 if name == "logits" else 2)
        width = token_width(config, length, local)
        found = config.discriminant > 0 and name == f"conv{config.blocks}"
        layers.append(Layer(name, generated, size, inputs, outputs, placeholders, length, local, width, found))

    for number in range(1, config.blocks + 1):
        if config.allocation == "output":
            more = config.generate_bias + 2 * config.generate_norm
            placeholders, length = config.channels, KERNEL * KERNEL * inputs + more
        else:
            placeholders, length = KERNEL * KERNEL, inputs * config.channels
        add(f"conv{number}", number in config.generated_convs, inputs, config.channels, placeholders, length)
        size, inputs = size // 2, config.channels
    add("logits", True, size * size * inputs, config.way, config.way, size * size * inputs + 1)
    return tuple(layers)


def local_convs(size: int, inputs: int, width: int, depth: int) -> tuple[LocalConv, ...]:
    """The convs over activations [size, size, inputs]: stride 2, then stride 1; a map too small for one ends it."""
    convs: list[LocalConv] = []
    while width and len(convs) < depth and (size >= KERNEL or not convs):
        kernel = min(KERNEL, size)
        stride = 2 if not convs and size > KERNEL else 1
        convs.append(LocalConv(kernel, stride, inputs, width))
        size, inputs = (size - kernel) // stride + 1, width
    return tuple(convs)


def token_width(config: Config, slice_length: int, local: tuple[LocalConv, ...]) -> int:
    """D: the encoding beside the features; read-out by coordinates also needs room for a slice."""
    features = config.shared_features + sum(conv.outputs for conv in local)
    return config.encoding + (max(features, slice_length) if config.readout == "slice" else features)


def cnn_size(config: Config) -> int:
    """Numbers in one task's CNN: conv weights, biases, scale and offset of each norm, logits weights and biases."""
    *convs, logits = plan(config)
    conv = sum(KERNEL * KERNEL * layer.inputs * layer.outputs for layer in convs)
    channels = sum(layer.outputs * (2 + (config.generate_bias and layer.generated)) for layer in convs)
    return conv + channels + logits.outputs * (logits.inputs + 1)
