"""Laws of attention, of the encoder and of the decoder."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, generic_parameters, permutations, seeds
from tolerances import assert_close, assert_different

from mini_ht import Config
from mini_ht.arrays import as_floats, namespace, relu
from mini_ht.attention import (
    activate,
    attention,
    encoder,
    feed_forward,
    layer_norm,
    multi_head_attention,
    sigmoid_attention,
    softmax,
)
from mini_ht.plan import plan

NAME = "logits.generator"
sizes = st.integers(1, 6)


def test_namespace_is_the_library_of_the_array(library):
    """`namespace` gives the library, `as_floats` and `relu` stay in the dtype of their input."""
    x = library.to(np.array([-1.0, 0.0, 2.0], np.float32))
    assert namespace(x) is (np if library.name == "numpy" else torch)
    assert library.back(relu(x)).tolist() == [0, 0, 2] and relu(x).dtype == x.dtype
    assert library.back(as_floats(x > 0, x)).tolist() == [0, 0, 1] and as_floats(x > 0, x).dtype == x.dtype


@given(seed=seeds, rows=sizes, width=sizes, shift=st.floats(-700, 700))
def test_softmax_is_a_distribution(library, seed, rows, width, shift):
    """Rows are positive, sum to 1, do not feel a shift, and have the ratios exp(x_i - x_j), however large x is."""
    x = np.random.default_rng(seed).standard_normal((rows, width))
    p = library.back(softmax(library.to(x)))
    assert (p > 0).all()
    assert_close(p.sum(-1), np.ones(rows))
    assert_close(np.log(p) - np.log(p[:, :1]), x - x[:, :1])
    assert_close(library.back(softmax(library.to(x + shift * 1000))), p, "float32")  # x + shift has rounded


@given(seed=seeds, width=st.integers(2, 6))
def test_softmax_gives_minus_infinity_no_weight(library, seed, width):
    """An entry of -inf has weight exactly 0, and the others share as if it were not there."""
    rng = np.random.default_rng(seed)
    x, gone = rng.standard_normal(width), rng.integers(width)
    p = library.back(softmax(library.to(np.where(np.arange(width) == gone, -np.inf, x))))
    assert p[gone] == 0
    assert_close(np.delete(p, gone), library.back(softmax(library.to(np.delete(x, gone)))))


@given(seed=seeds, rows=sizes, width=st.integers(2, 9), scale=st.sampled_from([1.0, 100.0]))
def test_layer_norm_has_mean_0_and_variance_1(library, seed, rows, width, scale):
    """Every token has mean 0 and variance v / (v + 1e-6), then gain and offset apply coordinate by coordinate."""
    rng = np.random.default_rng(seed)
    x = scale * (rng.standard_normal((2, rows, width)) + 3)
    gain, offset = rng.standard_normal((2, width))
    y = library.back(layer_norm(*library.to((x, np.ones(width), np.zeros(width)))))
    assert np.abs(y.mean(-1)).max() < 1e-12
    variance = x.var(-1)
    assert_close(y.var(-1), variance / (variance + 1e-6))
    assert_close(layer_norm(*library.to((x, gain, offset))), y * gain + offset)
    assert_close(library.back(layer_norm(*library.to((x + 7, gain, offset)))), y * gain + offset, "float32")


@given(seed=seeds, keys=sizes, queries=sizes, masked=st.booleans())
def test_attention_stays_in_the_convex_hull_of_the_values(library, seed, keys, queries, masked):
    """Every output is a weighted mean of the values that may be attended to: in each direction no farther than they."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((2, n, 3)) for n in (queries, keys, keys))
    mask = rng.random((2, queries, keys)) < 0.5
    mask[..., 0] = True
    y = library.back(attention(*library.to((query, key, value, mask if masked else None))))
    allowed = mask if masked else np.ones_like(mask)
    for direction in np.concatenate([np.eye(3), rng.standard_normal((10, 3))]):
        heights = np.where(allowed, (value @ direction)[:, None], -np.inf)
        assert (y @ direction <= heights.max(-1) + 1e-9).all()


@given(seed=seeds, keys=sizes, queries=sizes)
def test_attention_equals_loops(library, seed, keys, queries):
    """softmax(q . k / sqrt(width)) v, number by number."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal(shape) for shape in ((queries, 5), (keys, 5), (keys, 2)))
    wanted = np.zeros((queries, 2))
    for i in range(queries):
        weights = np.array([np.exp(sum(query[i] * key[j]) / 5**0.5) for j in range(keys)])
        wanted[i] = sum(weights[j] / weights.sum() * value[j] for j in range(keys))
    assert_close(attention(*library.to((query, key, value))), wanted)


@given(seed=seeds, keys=sizes, queries=sizes, scale=st.sampled_from([1.0, 30.0, 1e4]))
def test_sigmoid_attention_equals_loops(library, seed, keys, queries, scale):
    """sigmoid(q . k / sqrt(width)) v, number by number, however large the scores are."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal(shape) for shape in ((queries, 5), (keys, 5), (keys, 2)))
    wanted = np.zeros((queries, 2))
    for i in range(queries):
        scores = [scale * sum(query[i] * key[j]) / 5**0.5 for j in range(keys)]
        wanted[i] = sum(value[j] / (1 + np.exp(-max(scores[j], -700))) for j in range(keys))
    found = library.back(sigmoid_attention(*library.to((query, scale * key, value))))
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@given(data=st.data(), seed=seeds)
@pytest.mark.parametrize("attention", [attention, sigmoid_attention])
def test_a_mask_equals_deletion(library, attention, data, seed):
    """Keys that are masked out might as well not be there, whatever finite numbers they hold."""
    rng = np.random.default_rng(seed)
    keys = data.draw(st.integers(2, 6))
    mask = rng.random(keys) < 0.5
    mask[0] = True
    query, key, value = (rng.standard_normal((n, 4)) for n in (3, keys, keys))
    key[~mask], value[~mask] = 1e6, -1e6
    y = attention(*library.to((query, key, value, mask[None])))
    assert_close(y, attention(*library.to((query, key[mask], value[mask]))))


def tokens_for(config, seed, tokens=6):
    """Parameters and random tokens [2, tokens, D] of the logits layer's encoder."""
    width = plan(config)[-1].token_width
    return generic_parameters(config, seed), np.random.default_rng(seed).standard_normal((2, tokens, width))


@given(config=configs(), seed=seeds, outputs=st.integers(1, 6), masked=st.booleans())
def test_outputs_only_drops_rows(library, config, seed, outputs, masked):
    """Asking the encoder for the first K tokens gives the first K rows of what it gives for all."""
    parameters, x = tokens_for(config, seed)
    mask = np.random.default_rng(seed).random((2, 6)) < 0.6
    mask[:, 0] = True
    parameters, x, mask = library.to((parameters, x, mask if masked else None))
    everything = library.back(encoder(parameters, NAME, x, config, mask, 6))
    some = library.back(encoder(parameters, NAME, x, config, mask, outputs))
    assert some.shape == (2, outputs, x.shape[-1])
    assert_close(some, everything[:, :outputs])


@given(data=st.data(), config=configs(), seed=seeds)
def test_the_encoder_has_no_positions(library, data, config, seed):
    """Permuted tokens give the same outputs, permuted; other tokens' order does not matter to the first ones."""
    parameters, x = tokens_for(config, seed)
    order = data.draw(permutations(6))
    parameters = library.to(parameters)
    y = library.back(encoder(parameters, NAME, library.to(x), config, None, 6))
    assert_close(encoder(parameters, NAME, library.to(x[:, order]), config, None, 6), y[:, order])


@given(config=configs(), seed=seeds, masked=st.integers(1, 5))
def test_the_encoder_ignores_masked_tokens(library, config, seed, masked):
    """Masked tokens of any finite content change no other token's output, through all layers; unmasked ones do."""
    parameters, x = tokens_for(config, seed)
    kept = 6 - masked
    noisy = x.copy()
    noisy[:, kept:] = np.random.default_rng(seed + 1).standard_normal(noisy[:, kept:].shape) * 10
    mask = np.broadcast_to(np.arange(6) < kept, (2, 6)).copy()
    parameters = library.to(parameters)

    def run(x, mask):
        return library.back(encoder(parameters, NAME, library.to(x), config, library.to(mask), kept))

    assert_close(run(noisy, mask), run(x[:, :kept], None))
    assert_different(run(noisy, None), run(x, None))


@given(seed=seeds, heads=st.sampled_from([1, 2, 4]))
def test_multi_head_attention_equals_heads_one_by_one(library, seed, heads):
    """Head h uses its own columns of the query, key and value maps, and its own rows of the output map."""
    rng = np.random.default_rng(seed)
    shapes = {"query": (6, 8), "key": (6, 8), "value": (6, 4), "output": (4, 6)}
    p = {f"a.{part}": rng.standard_normal(shape) for part, shape in shapes.items()}
    p |= {f"a.{part}_bias": rng.standard_normal(shapes[part][1]) for part in ("query", "value", "output")}
    x = rng.standard_normal((2, 5, 6))
    parts = {part: x @ p[f"a.{part}"] + p.get(f"a.{part}_bias", 0) for part in ("query", "key", "value")}
    wanted = p["a.output_bias"] + sum(
        attention(*(np.split(parts[part], heads, -1)[h] for part in ("query", "key", "value")))
        @ np.split(p["a.output"], heads)[h]
        for h in range(heads)
    )
    p, x = library.to((p, x))
    assert_close(multi_head_attention(p, "a", x, heads, None, 3), wanted[:, :3])


@given(seed=seeds, kind=st.sampled_from(["softmax", "sigmoid"]), masked=st.booleans())
def test_attention_to_a_memory_is_attention_to_tokens_behind(library, seed, kind, masked):
    """Tokens that attend to a memory get what the first of a sequence get that may attend to the memory's part only."""
    rng = np.random.default_rng(seed)
    p = {f"a.{part}": rng.standard_normal((6, 6)) for part in ("query", "key", "value", "output")}
    p |= {f"a.{part}_bias": rng.standard_normal(6) for part in ("query", "key", "value", "output")}
    x, memory, mask = rng.standard_normal((2, 3, 6)), rng.standard_normal((2, 5, 6)), rng.random((2, 5)) < 0.6
    mask[:, 0] = True
    mask = mask if masked else np.ones_like(mask)
    behind = np.concatenate([np.zeros((2, 3), bool), mask], axis=1)  # [E, T + S]
    both = np.concatenate([x, memory], axis=1)  # [E, T + S, D]
    wanted = multi_head_attention(*library.to((p, "a", both, 2, behind, 3)), kind=kind)
    seen = library.to((memory, mask if masked else None))
    found = multi_head_attention(*library.to((p, "a", x, 2)), seen[1], 3, seen[0], kind)
    assert_close(found, library.back(wanted))
    other = {"softmax": "sigmoid", "sigmoid": "softmax"}[kind]
    assert_different(multi_head_attention(*library.to((p, "a", both, 2, behind, 3)), kind=other), library.back(wanted))


decoders = configs(generator="separate")


def decode(library, config, parameters, x, memory, mask=None):
    """The logits layer's decoder."""
    x, memory, mask = library.to((x, memory, mask))
    return library.back(encoder(library.to(parameters), f"{NAME}.decoder", x, config, mask, x.shape[1], memory))


@given(data=st.data(), config=decoders, seed=seeds)
def test_the_decoder_has_no_positions(library, data, config, seed):
    """Permuted tokens give the same outputs, permuted; the order of the memory does not matter."""
    parameters, tokens = tokens_for(config, seed, 11)
    x, memory = tokens[:, :5], tokens[:, 5:]
    y = decode(library, config, parameters, x, memory)
    own, others = data.draw(permutations(5)), data.draw(permutations(6))
    assert_close(decode(library, config, parameters, x[:, own], memory[:, others]), y[:, own])
    tensors = library.to((x, memory))
    some = encoder(library.to(parameters), f"{NAME}.decoder", tensors[0], config, None, 2, tensors[1])
    assert_close(some, y[:, :2])


@given(config=decoders, seed=seeds, masked=st.integers(1, 5))
def test_the_decoder_ignores_masked_memory(library, config, seed, masked):
    """A masked part of the memory, of any finite content, changes nothing; an unmasked one does."""
    parameters, tokens = tokens_for(config, seed, 9)
    x, memory, kept = tokens[:, :3], tokens[:, 3:], 6 - masked
    noisy = memory.copy()
    noisy[:, kept:] = np.random.default_rng(seed + 1).standard_normal(noisy[:, kept:].shape) * 10
    mask = np.broadcast_to(np.arange(6) < kept, (2, 6)).copy()
    y = decode(library, config, parameters, x, memory[:, :kept])
    assert_close(decode(library, config, parameters, x, noisy, mask), y)
    assert_different(decode(library, config, parameters, x, noisy), y)


@given(config=decoders, seed=seeds)
def test_tokens_of_the_decoder_see_each_other(library, config, seed):
    """Of eight other last tokens one at least changes what comes out at the first; softmax may overlook some."""
    parameters, tokens = tokens_for(config, seed, 9)
    x, memory = np.tile(tokens[:1, :3], (9, 1, 1)), np.tile(tokens[:1, 3:], (9, 1, 1))
    x[1:, 2] = np.random.default_rng(seed + 1).standard_normal(x[1:, 2].shape)
    first = decode(library, config, parameters, x, memory)[:, 0]
    assert_different(first, np.broadcast_to(first[:1], first.shape))


@given(seed=seeds)
def test_activations_and_feed_forward(library, seed):
    """GELU is torch's tanh form; the feed-forward part treats every token alone."""
    x = np.random.default_rng(seed).standard_normal((2, 3, 4)) * 3
    gelu = torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh")
    assert_close(activate(library.to(x), "gelu"), gelu)
    assert_close(activate(library.to(x), "relu"), np.maximum(x, 0))
    rng = np.random.default_rng(seed)
    inner, outer = rng.standard_normal((4, 5)), rng.standard_normal((5, 4))
    p = {"f.inner": inner, "f.inner_bias": rng.random(5), "f.outer": outer, "f.outer_bias": rng.random(4)}
    y = library.back(feed_forward(library.to(p), "f", library.to(x), "relu"))
    assert_close(y, np.maximum(x @ inner + p["f.inner_bias"], 0) @ outer + p["f.outer_bias"])


@pytest.mark.parametrize("order", ["pre-norm", "post-norm"])
@pytest.mark.parametrize("inner", [1.0, 0.0])
@pytest.mark.parametrize("stack", ["", ".decoder"])
def test_where_the_norm_stands(library, order, inner, stack):
    """Post-norm outputs are normalised by the last layer's last part; pre-norm outputs by the final norm."""
    config = Config(blocks=1, image_size=8, layers=2, encoder=order, inner_width=inner, generator="decoder")
    parameters, x = tokens_for(config, 0)
    name = f"{NAME}{stack}"
    part = "inner_norm" if inner else "attention_norm"
    last = f"{name}.norm" if order == "pre-norm" else f"{name}.layer1.{part}"
    assert (f"{name}.norm_gain" in parameters) == (order == "pre-norm")
    width = x.shape[-1]
    parameters |= {f"{last}_gain": np.ones(width), f"{last}_offset": np.zeros(width)}
    if stack:
        y = decode(library, config, parameters, x, x)
    else:
        y = library.back(encoder(library.to(parameters), NAME, library.to(x), config, None, 6))
    assert_close(y.var(-1), np.ones((2, 6)), "float32")
    assert np.abs(y.mean(-1)).max() < 1e-12


@given(config=configs(), seed=seeds)
def test_float32_stays_float32(library, config, seed):
    """float32 in, float32 out: no constant widens the computation."""
    parameters, x = tokens_for(config, seed)
    parameters, x = ({k: v.astype(np.float32) for k, v in parameters.items()}, x.astype(np.float32))
    parameters, x = library.to((parameters, x))
    mask = library.to(np.ones((2, 6), bool))
    width = x.shape[-1]
    ones = library.to(np.ones(width, np.float32))
    results = [
        encoder(parameters, NAME, x, config, None, 3),
        encoder(parameters, NAME, x, config, mask, 6),
        attention(x, x, x, mask[:, None, :]),
        sigmoid_attention(x, x, x, mask[:, None, :]),
        softmax(x),
        layer_norm(x, ones, ones),
        activate(x, "gelu"),
        activate(x, "relu"),
    ]
    if config.generator != "joint":
        results.append(encoder(parameters, f"{NAME}.decoder", x[:, :3], config, mask, 3, x))
    assert {str(library.back(y).dtype) for y in results} == {"float32"}
