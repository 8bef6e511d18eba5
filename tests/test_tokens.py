"""Laws of tokens, and of the way from weight slices to conv weights and back."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, generic_parameters, seeds
from tolerances import assert_close

from mini_ht import Config
from mini_ht.arrays import namespace
from mini_ht.plan import plan
from mini_ht.tokens import pad_width, placeholder_tokens, read_slices, slices_to_affine, slices_to_conv, support_tokens


def conv_to_slices(weight, bias, config, affine=None):
    """The inverse of `slices_to_conv` and `slices_to_affine`: [E, 3, 3, Cin, Cout] -> [E, placeholders, slice length].

    affine, where a norm is generated, are the scale and the offset [E, Cout].
    """
    xp = namespace(weight)
    episodes, _, _, inputs, outputs = weight.shape
    if config.allocation == "spatial":
        return weight.reshape(episodes, 9, inputs * outputs)
    slices = xp.moveaxis(weight, -1, 1).reshape(episodes, outputs, 9 * inputs)
    more = ([] if bias is None else [bias]) + list(affine or ())
    return xp.concat([slices, *(part[..., None] for part in more)], axis=-1)


def conv_layer(config):
    """The last conv layer's plan."""
    return plan(config)[-2]


def slices_for(config, seed, episodes=2):
    layer = conv_layer(config)
    return layer, np.random.default_rng(seed).standard_normal((episodes, layer.placeholders, layer.slice_length))


@given(config=configs(), seed=seeds)
def test_slices_to_weights_to_slices(library, config, seed):
    """Slices become weights and the same slices again; weights become slices and the same weights again. Exactly."""
    layer, slices = slices_for(config, seed)
    weight, bias = slices_to_conv(library.to(slices), layer, config)
    open_gate = library.to({f"{layer.name}.norm_gate": np.ones(2)})
    affine = slices_to_affine(open_gate, library.to(slices), layer) if config.generate_norm else None
    assert tuple(weight.shape) == (2, 3, 3, layer.inputs, layer.outputs)
    assert (bias is not None) == config.generate_bias
    again = conv_to_slices(weight, bias, config, affine)
    np.testing.assert_array_equal(library.back(again), slices)
    other, other_bias = slices_to_conv(again, layer, config)
    np.testing.assert_array_equal(library.back(other), library.back(weight))
    if bias is not None:
        assert tuple(bias.shape) == (2, layer.outputs)
        np.testing.assert_array_equal(library.back(other_bias), library.back(bias))


@given(config=configs(allocation="output"), seed=seeds, data=st.data())
def test_one_output_slice_is_one_channel(library, config, seed, data):
    """With allocation "output", slice i holds every number of output channel i, its bias too, and nothing else."""
    layer, slices = slices_for(config, seed)
    i = data.draw(st.integers(0, layer.placeholders - 1))
    changed = slices.copy()
    changed[1, i] += 1
    before, after = (library.back(slices_to_conv(library.to(s), layer, config)[0]) for s in (slices, changed))
    wanted = np.zeros(before.shape, bool)
    wanted[1, ..., i] = True
    np.testing.assert_array_equal(before != after, wanted)
    if config.generate_bias:
        before, after = (library.back(slices_to_conv(library.to(s), layer, config)[1]) for s in (slices, changed))
        np.testing.assert_array_equal(before != after, wanted[:, 0, 0, 0])


@given(config=configs(allocation="output", generate_norm=True), seed=seeds)
def test_the_last_two_of_a_slice_are_scale_and_offset_of_its_norm(library, config, seed):
    """Slice i ends with scale and offset of channel i, each through its own gate, the same for all channels."""
    layer, slices = slices_for(config, seed)
    gate = np.random.default_rng(seed + 1).standard_normal(2)
    found = slices_to_affine(library.to({f"{layer.name}.norm_gate": gate}), library.to(slices), layer)
    for part, column in zip(found, (-2, -1), strict=True):
        np.testing.assert_array_equal(library.back(part), slices[..., column] * gate[column])


@given(config=configs(allocation="spatial"), seed=seeds, i=st.integers(0, 8))
def test_one_spatial_slice_is_one_kernel_position(library, config, seed, i):
    """With allocation "spatial", slice i holds every number of kernel position (i // 3, i % 3), and nothing else."""
    layer, slices = slices_for(config, seed)
    assert layer.placeholders == 9
    changed = slices.copy()
    changed[1, i] += 1
    before, after = (library.back(slices_to_conv(library.to(s), layer, config)[0]) for s in (slices, changed))
    wanted = np.zeros(before.shape, bool)
    wanted[1, i // 3, i % 3] = True
    np.testing.assert_array_equal(before != after, wanted)


def test_the_order_inside_a_slice(library):
    """A slice counts (row, column, input channel) for "output", (input channel, output channel) for "spatial"."""
    config = Config(way=3, channels=4, blocks=2, image_size=8)
    layer, _ = slices_for(config, 0)
    slices = np.arange(layer.placeholders * layer.slice_length, dtype=float).reshape(1, layer.placeholders, -1)
    weight = library.back(slices_to_conv(library.to(slices), layer, config)[0])
    assert weight[0, 2, 1, 0, 3] == slices[0, 3, (2 * 3 + 1) * layer.inputs]
    assert weight[0, 0, 0, 1, 0] == 1
    config = Config(way=3, channels=4, blocks=2, image_size=8, allocation="spatial")
    layer, _ = slices_for(config, 0)
    slices = np.arange(9 * layer.slice_length, dtype=float).reshape(1, 9, -1)
    weight = library.back(slices_to_conv(library.to(slices), layer, config)[0])
    assert weight[0, 2, 1, 1, 3] == slices[0, 7, 1 * layer.outputs + 3]


@given(config=configs(), seed=seeds)
def test_support_tokens(library, config, seed):
    """A support token is [xi(label) | local | shared | zeros]; an unlabelled image takes the last row of xi."""
    layer, parameters = plan(config)[-1], generic_parameters(config, seed)
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, config.way, (2, 5))
    labels[0, :2] = [-1, config.way - 1]
    widths = sum(conv.outputs for conv in layer.local), config.shared_features
    local, shared = (rng.standard_normal((2, 5, width)) for width in widths)
    tokens = library.back(support_tokens(library.to(parameters), layer, *library.to((labels, local, shared))))
    assert tokens.shape == (2, 5, layer.token_width)
    for e in range(2):
        for i in range(5):
            row = parameters["logits.xi"][config.way if labels[e, i] == -1 else labels[e, i]]
            front = np.concatenate([row, local[e, i], shared[e, i]])
            np.testing.assert_array_equal(tokens[e, i, : len(front)], front)
            assert (tokens[e, i, len(front) :] == 0).all()


@given(config=configs(), seed=seeds)
def test_placeholder_tokens(library, config, seed):
    """A placeholder is [mu(i) | zeros], the same in every episode."""
    layer, parameters = plan(config)[-1], generic_parameters(config, seed)
    tokens = library.back(placeholder_tokens(library.to(parameters), layer, 3))
    assert tokens.shape == (3, config.way, layer.token_width)
    for token in tokens:
        np.testing.assert_array_equal(token[:, : config.encoding], parameters["logits.mu"])
        assert (token[:, config.encoding :] == 0).all()


@given(config=configs(readout="slice"), seed=seeds)
def test_the_slice_readout_starts_behind_the_encoding(library, config, seed):
    """Read straight, a slice is the token's coordinates behind the class encoding's."""
    layer = plan(config)[-1]
    outputs = np.random.default_rng(seed).standard_normal((2, config.way, layer.token_width))
    slices = library.back(read_slices({}, layer, config, library.to(outputs)))
    assert slices.shape == (2, config.way, layer.slice_length)
    np.testing.assert_array_equal(slices, outputs[..., config.encoding :][..., : layer.slice_length])


@given(config=configs(readout="linear"), seed=seeds)
def test_the_linear_readout_is_one_map_for_all_slices(library, config, seed):
    """Read through a map, every slice of a layer uses the same weight and bias."""
    layer, parameters = plan(config)[-1], generic_parameters(config, seed)
    outputs = np.random.default_rng(seed).standard_normal((2, config.way, layer.token_width))
    slices = read_slices(library.to(parameters), layer, config, library.to(outputs))
    weight, bias = (parameters[f"logits.readout.{part}"] for part in ("weight", "bias"))
    assert_close(slices, [[token @ weight + bias for token in episode] for episode in outputs])


@given(width=st.integers(1, 4), more=st.integers(0, 3))
def test_pad_width_and_dtype(library, width, more):
    """Zeros stand behind, nothing is changed, and float32 stays float32."""
    x = np.arange(6 * width, dtype=np.float32).reshape(2, 3, width)
    y = library.back(pad_width(library.to(x), width + more))
    assert y.dtype == np.float32 and y.shape == (2, 3, width + more)
    np.testing.assert_array_equal(y[..., :width], x)
    assert (y[..., width:] == 0).all()


@given(config=configs(generate="all", discriminant=0), seed=seeds)
def test_float32_stays_float32(library, config, seed):
    """float32 in, float32 out, for tokens, read-out and weights."""
    layer = conv_layer(config)
    parameters = library.to(generic_parameters(config, seed, np.float32))
    features = library.to(np.ones((2, 4, layer.token_width - config.encoding), np.float32))
    images = support_tokens(parameters, layer, library.to(np.array([[0, 1, -1, 0]] * 2)), features, features[..., :0])
    tokens = placeholder_tokens(parameters, layer, 2)
    slices = read_slices(parameters, layer, config, tokens)
    weight, bias = slices_to_conv(slices, layer, config)
    affine = slices_to_affine(parameters, slices, layer) if config.generate_norm else ()
    results = [images, tokens, slices, weight, *([] if bias is None else [bias]), *affine]
    assert {str(library.back(x).dtype) for x in results} == {"float32"}
