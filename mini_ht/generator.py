"""The HyperTransformer: from a support set to the weights of a CNN, layer by layer (paper, section 4.1)."""

from typing import Any

from mini_ht.arrays import Array, Parameters, as_indices, belongs, namespace
from mini_ht.attention import encoder
from mini_ht.checks import check_support
from mini_ht.cnn import ConvLayer, GeneratedCNN
from mini_ht.config import Config
from mini_ht.discriminant import discriminant
from mini_ht.features import local_features, shared_features
from mini_ht.kernels import conv_block
from mini_ht.norms import towards_learned
from mini_ht.plan import Layer, plan
from mini_ht.tokens import placeholder_tokens, read_slices, slices_to_affine, slices_to_conv, support_tokens


def generate(
    parameters: Parameters,
    config: Config,
    support: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    impl: str = "auto",
    check: bool = True,
) -> GeneratedCNN:
    """Write the weights of the CNN that tells this support set's classes apart.

    Args:
        parameters: from `draw_parameters` or `load` (NumPy), or `to_torch` of those.
        config: the Config that the parameters were drawn for.
        support: [n, H, W, C] images of one task, or [E, n, H, W, C] of E tasks; values in [0, 1], ink is 1; the
            parameters' dtype, or on torch bfloat16, which the convs then keep. Any n, any number of images a class.
        labels: [n] or [E, n] integers in -1 .. way-1; -1 means unlabelled.
        mask: [n] or [E, n] booleans, False for padding; None for no padding.
        impl: who computes the conv blocks, see `mini_ht.kernels`.
        check: look at values, too (labels and pixels in range), here and of queries. Shapes and dtypes always are.

    Returns:
        A GeneratedCNN, to be called with query images.

    Raises:
        InputError: shapes, dtypes or values that do not fit the config.
    """
    check_support(parameters, config, support, labels, mask, values=check)
    labels, batched = as_indices(labels), support.ndim == 5
    if not batched:
        support, labels, mask = support[None], labels[None], None if mask is None else mask[None]
    shared = shared_features(parameters, config, support)  # [E, n, shared features]
    *conv_layers, logits_layer = plan(config)
    x, convs = support, list[ConvLayer]()
    for layer in conv_layers:
        weight, bias, affine = conv_weights(parameters, config, layer, x, labels, shared, mask)
        gamma, beta = parameters[f"{layer.name}.gamma"], parameters[f"{layer.name}.beta"]
        x, statistics = conv_block(x, weight, gamma, beta, bias=bias, mask=mask, slope=config.slope, impl=impl)
        if config.norm == "support":  # statistics that were learned say nothing of a discriminant's kernels
            share = 0.0 if layer.discriminant else config.shrink
            x, statistics = towards_learned(parameters, layer.name, share, x, statistics)
        convs.append(ConvLayer(weight, bias, gamma, beta, statistics, affine))
        x = convs[-1].rescaled(x)
    logits_weight = generated_slices(parameters, config, logits_layer, x, labels, shared, mask)
    return GeneratedCNN(
        convs=tuple(convs),
        logits_weight=logits_weight,
        present=present_classes(labels, mask, config.way),
        norm=config.norm,
        slope=config.slope,
        impl=impl,
        batched=batched,
        image_shape=tuple(support.shape[2:]),
        check=check,
    )


def conv_weights(
    parameters: Parameters, config: Config, layer: Layer, x: Array, *support: Array | None
) -> tuple[Array, Array | None, tuple[Array, Array] | None]:
    """Weight [E, 3, 3, Cin, Cout] and bias of one conv layer: generated from its input activations x, or learned.

    Behind them a generated scale and offset of its norm, see `ConvLayer`.
    """
    learned: Array = parameters.get(f"{layer.name}.weight")  # [3, 3, Cin, Cout]
    if not layer.generated:
        return namespace(learned).broadcast_to(learned[None], (x.shape[0], *learned.shape)), None, None
    if layer.discriminant:
        return discriminant(parameters, config, layer, x, support[0], support[2]), None, None  # by labels and mask
    slices = generated_slices(parameters, config, layer, x, *support)
    weight, bias = slices_to_conv(slices, layer, config)
    affine = slices_to_affine(parameters, slices, layer) if config.generate_norm else None
    return (weight if learned is None else weight + learned[None]), bias, affine


def layer_tokens(
    parameters: Parameters, layer: Layer, x: Array, labels: Array, shared: Array, mask: Array | None
) -> tuple[Array, Array | None]:
    """What one layer's transformer reads: placeholders, then support images, [E, placeholders + n, D].

    x [E, n, h, w, Cin]: the layer's input; labels [E, n]; shared [E, n, width]; mask [E, n] or None, which grows, too.
    """
    xp = namespace(x)
    samples = support_tokens(parameters, layer, labels, local_features(parameters, layer, x), shared)  # [E, n, D]
    placeholders = placeholder_tokens(parameters, layer, x.shape[0])  # [E, placeholders, D]
    tokens = xp.concat([placeholders, samples], axis=1)  # [E, placeholders + n, D]
    if mask is not None:  # placeholders, too, may always be attended to
        mask = xp.concat([xp.ones_like(placeholders[..., 0]) > 0, mask], axis=1)  # [E, placeholders + n]
    return tokens, mask


def generated_slices(parameters: Parameters, config: Config, layer: Layer, x: Array, *support: Any) -> Array:
    """One layer's own transformer: activations x [E, n, h, w, Cin] -> slices [E, placeholders, slice length].

    support is (labels [E, n], shared features [E, n, width], mask [E, n] or None).
    """
    tokens, mask = layer_tokens(parameters, layer, x, *support)
    name, count = f"{layer.name}.generator", layer.placeholders
    placeholders = tokens[:, :count]  # [E, placeholders, D]
    if config.generator == "separate":
        tokens, mask = tokens[:, count:], None if mask is None else mask[:, count:]  # [E, n, D] and [E, n]
    outputs = encoder(parameters, name, tokens, config, mask, count if config.generator == "joint" else tokens.shape[1])
    if config.generator != "joint":
        outputs = encoder(parameters, f"{name}.decoder", placeholders, config, mask, count, memory=outputs)
    return read_slices(parameters, layer, config, outputs)


def present_classes(labels: Array, mask: Array | None, way: int) -> Array:
    """Which classes have a labelled image: labels [E, n] -> booleans [E, way]."""
    return belongs(labels, way, mask).any(1)
