"""What the transformer reads and writes: support tokens, placeholder tokens, and weight slices (paper, section 4.1)."""

from mini_ht.arrays import Array, Parameters, namespace
from mini_ht.config import Config
from mini_ht.plan import KERNEL, Layer


def pad_width(x: Array, width: int) -> Array:
    """Zeros behind the last axis, up to `width`: [E, T, w] -> [E, T, width]."""
    xp, missing = namespace(x), width - x.shape[-1]
    shape = (*x.shape[:-1], missing)  # of zeros, which pass on no gradient
    return x if missing == 0 else xp.concat([x, xp.broadcast_to(xp.zeros_like(x[..., :1]), shape)], axis=-1)


def support_tokens(parameters: Parameters, layer: Layer, labels: Array, local: Array, shared: Array) -> Array:
    """[xi(label) | local | shared | zeros] for each support image.

    Args:
        labels: [E, n] integers in -1 .. way-1; -1, unlabelled, takes the last row of xi, which is xi-hat.
        local: [E, n, local width], features of this layer's input activations.
        shared: [E, n, shared width], features of the images.

    Returns:
        [E, n, D].
    """
    xi = parameters[f"{layer.name}.xi"]  # [way + 1, d]
    # An index of -1 means the last row to NumPy and torch alike: the row of xi-hat.
    tokens = namespace(xi).concat([xi[labels], local, shared], axis=-1)  # [E, n, d + features]
    return pad_width(tokens, layer.token_width)


def placeholder_tokens(parameters: Parameters, layer: Layer, episodes: int) -> Array:
    """[mu(i) | zeros] for each weight slice i, the same in every episode: [E, placeholders, D]."""
    tokens = pad_width(parameters[f"{layer.name}.mu"][None], layer.token_width)  # [1, placeholders, D]
    return namespace(tokens).broadcast_to(tokens, (episodes, *tokens.shape[1:]))


def read_slices(parameters: Parameters, layer: Layer, config: Config, outputs: Array) -> Array:
    """Weight slices from the transformer's outputs at the placeholders: [E, placeholders, D] -> [.., slice length]."""
    if config.readout == "slice":
        return outputs[..., config.encoding : config.encoding + layer.slice_length]
    name = f"{layer.name}.readout"
    return outputs @ parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def slices_to_conv(slices: Array, layer: Layer, config: Config) -> tuple[Array, Array | None]:
    """A conv layer's weight [E, 3, 3, Cin, Cout] and bias ([E, Cout] or None) from its slices.

    "output": a slice is an output channel: (row, column, input channel), bias if any, what `slices_to_affine` reads.
    "spatial": one slice is one kernel position, row by row, in the order (input channel, output channel).
    """
    episodes = slices.shape[0]
    if config.allocation == "spatial":
        return slices.reshape(episodes, KERNEL, KERNEL, layer.inputs, layer.outputs), None
    length = KERNEL * KERNEL * layer.inputs
    weight = slices[..., :length].reshape(episodes, layer.outputs, KERNEL, KERNEL, layer.inputs)
    weight = namespace(slices).moveaxis(weight, 1, -1)  # [E, 3, 3, Cin, Cout]
    return weight, slices[..., length] if config.generate_bias else None


def slices_to_affine(parameters: Parameters, slices: Array, layer: Layer) -> tuple[Array, Array]:
    """What a conv layer's norm is scaled (by 1 + it) and shifted by, [E, Cout] each: its slices' last two numbers.

    Both come through a learned gate, which starts at 0 and leaves the norm as it is.
    """
    scale_and_offset = slices[..., -2:] * parameters[f"{layer.name}.norm_gate"]  # [E, Cout, 2]
    return scale_and_offset[..., 0], scale_and_offset[..., 1]
