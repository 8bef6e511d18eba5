"""Laws of the generated CNN: what a query's logits depend on."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, make_case, permutations, seeds
from tolerances import assert_close, assert_different

from mini_ht import Config, InputError, cnn, generate
from mini_ht.cnn import linear
from mini_ht.folded import fold
from mini_ht.kernels import conv_stack


def run(library, case, query=None, mask=None, norm=None):
    """Logits of other queries, padding or norm mode than the case's own."""
    cnn = case.generate(library)
    query, mask = library.to((case.query if query is None else query, mask))
    return library.back((cnn.with_norm(norm) if norm else cnn)(query, mask))


@given(case=cases(queries=(2, 4)), seed=seeds)
def test_in_support_mode_queries_are_alone(library, case, seed):
    """With the statistics of the support set, a query's logits are the same alone, and whatever the others are."""
    together = run(library, case, norm="support")
    assert_close(run(library, case, case.query[:, :1], norm="support"), together[:, :1])
    others = np.random.default_rng(seed).random(case.query.shape)
    others[:, -1] = case.query[:, -1]
    assert_close(run(library, case, others, norm="support")[:, -1], together[:, -1])


@given(case=cases(queries=(2, 4), way=3, channels=4, slope=0.1), seed=seeds)
def test_in_batch_mode_queries_depend_on_each_other(library, case, seed):
    """With their own statistics, other queries beside it change a query's logits."""
    others = np.random.default_rng(seed).random(case.query.shape) * 0.5
    others[:, -1] = case.query[:, -1]
    before, after = (run(library, case, query, norm="batch")[:, -1] for query in (case.query, others))
    for e in range(len(before)):
        assert_different(after[e], before[e])


@given(data=st.data(), norm=st.sampled_from(["batch", "support"]))
def test_queries_have_no_order(library, data, norm):
    """Queries in another order have their logits in that order."""
    case = data.draw(cases(queries=(2, 4)))
    order = data.draw(permutations(case.query.shape[1]))
    assert_close(run(library, case, case.query[:, order], norm=norm), run(library, case, norm=norm)[:, order])


@given(case=cases(), count=st.integers(1, 3), scale=st.sampled_from([0.0, 1.0, 1e6]), seed=seeds)
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_query_padding_has_no_influence(library, norm, case, count, scale, seed):
    """Queries that are masked out, of any finite content, change no other query's logits."""
    rng = np.random.default_rng(seed)
    episodes, queries = case.query.shape[:2]
    shape = (episodes, count, *case.query.shape[2:])
    padded = np.concatenate([scale * rng.standard_normal(shape), case.query], axis=1)
    mask = np.broadcast_to(np.arange(count + queries) >= count, (episodes, count + queries)).copy()
    assert_close(run(library, case, padded, mask, norm)[:, count:], run(library, case, norm=norm))


@given(case=cases(learned=False))
def test_on_the_support_set_the_modes_agree(library, case):
    """For the support images themselves the two norm modes use the same statistics, and give the same logits.

    Unless statistics were learned, towards which the support set's are shrunk.
    """
    logits = [run(library, case, case.support, case.mask, norm) for norm in ("batch", "support")]
    assert_close(*logits)


@given(case=cases(norm="batch"))
def test_with_norm_changes_the_mode_only(library, case):
    """`with_norm` gives a CNN with the same weights; the original keeps its mode; other words are InputErrors."""
    cnn = case.generate(library)
    other = cnn.with_norm("support")
    assert (cnn.norm, other.norm) == ("batch", "support")
    assert other.convs is cnn.convs and other.logits_weight is cnn.logits_weight
    with pytest.raises(InputError, match=r"norm is 'layer'; choose batch or support"):
        cnn.with_norm("layer")


@given(case=cases(channels=4, image_size=8, slope=0.1), data=st.data())
def test_one_channels_weights_change_one_channel(library, case, data):
    """Another weight slice for channel i of the last conv block changes no feature but that channel's."""
    i = data.draw(st.integers(0, 3))
    cnn = case.generate(library).with_norm("support")
    size = case.config.image_size // 2**case.config.blocks
    head = library.back(cnn.logits_weight).copy()
    blind = head.copy()  # a head that does not look at channel i
    blind[..., :-1].reshape(*head.shape[:2], size * size, 4)[..., i] = 0
    last = cnn.convs[-1]
    weight = library.back(last.weight).copy()
    weight[..., i] = 3 - weight[..., i]
    changed = (*cnn.convs[:-1], dataclasses.replace(last, weight=library.to(weight)))
    query = library.to(case.query)
    for logits_weight, same in ((head, False), (blind, True)):
        before = dataclasses.replace(cnn, logits_weight=library.to(logits_weight))
        after = dataclasses.replace(before, convs=changed)
        if same:
            assert_close(library.back(after(query)), library.back(before(query)))
        else:
            assert_different(library.back(after(query)), library.back(before(query)))


@given(case=cases(generate_norm=True, allocation="output"), norm=st.sampled_from(["batch", "support"]))
def test_a_generated_norm_scales_and_shifts_each_channel(library, case, norm):
    """Each task's CNN with generated norms is one with gamma (1 + scale) and beta (1 + scale) + offset, block by block.

    Blocks that are not generated have none, and folding leads to the same network.
    """
    cnn = case.generate(library).with_norm(norm)
    logits = library.back(cnn(library.to(case.query)))
    generated = [conv.affine is not None for conv in cnn.convs]
    assert generated == [k in case.config.generated_convs for k in range(1, case.config.blocks + 1)]
    for e in range(len(logits)):
        own = []
        for conv in cnn.convs:
            scale, offset = (0, 0) if conv.affine is None else (part[e] for part in conv.affine)  # [Cout] each
            one = {"weight": conv.weight[e : e + 1], "bias": None if conv.bias is None else conv.bias[e : e + 1]}
            one |= {"gamma": conv.gamma * (1 + scale), "beta": conv.beta * (1 + scale) + offset, "affine": None}
            own.append(dataclasses.replace(conv, **one, statistics=tuple(x[e : e + 1] for x in conv.statistics)))
        head = {"logits_weight": cnn.logits_weight[e : e + 1], "present": cnn.present[e : e + 1]}
        alone = dataclasses.replace(cnn, convs=tuple(own), **head)
        assert_close(library.back(alone(library.to(case.query[e : e + 1])))[0], logits[e])
        if library.name == "numpy" and norm == "support":
            folded = fold(cnn, case.config.way, e)(case.query[e])  # [m, way]
            there = np.isfinite(logits[e, 0])
            assert_close(folded[:, there], logits[e][:, there])


@given(case=cases(generate_norm=True, allocation="output", generate="all", channels=3))
def test_generated_norms_count(library, case):
    """Another scale, or another offset, of the last block's norm gives other logits."""
    cnn = case.generate(library)
    *convs, last = cnn.convs
    query = library.to(case.query)
    for part in (0, 1):
        affine = tuple(x + 1 if k == part else x for k, x in enumerate(last.affine))
        other = dataclasses.replace(cnn, convs=(*convs, dataclasses.replace(last, affine=affine)))
        assert_different(library.back(other(query)), library.back(cnn(query)))


def test_blocks_are_fused_unless_norms_are_generated(monkeypatch):
    """With learned norms the query pass is one call for all blocks; with generated ones it is a call a block."""
    for generated, wanted in ((False, [3]), (True, [1, 1, 1])):
        config = Config(way=2, blocks=3, image_size=8, layers=1, channels=2, generate_norm=generated)
        case, calls = make_case(config, 0, 1, 3, 2, False, False), []
        network = generate(case.parameters, config, case.support, case.labels)

        def counted(x, weights, *rest, calls=calls):
            calls.append(len(weights))
            return conv_stack(x, weights, *rest)

        monkeypatch.setattr(cnn, "conv_stack", counted)
        network(case.query)
        assert calls == wanted


@given(seed=seeds, size=st.integers(1, 3))
def test_linear_equals_loops(library, seed, size):
    """The logits layer flattens (row, column, channel); the last column of its weight is the bias."""
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((2, 3, size, size, 4)), rng.standard_normal((2, 5, size * size * 4 + 1))
    wanted = [[[image.ravel() @ row[:-1] + row[-1] for row in rows] for image in images]
              for images, rows in zip(x, weight, strict=True)]  # fmt: skip
    assert_close(linear(*library.to((x, weight))), wanted)


@given(case=cases())
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_float32_in_float32_out(library, norm, case):
    """A generator and images in float32 give weights, statistics and logits in float32."""
    parameters = {name: x.astype(np.float32) for name, x in case.parameters.items()}
    support, query = case.support.astype(np.float32), case.query.astype(np.float32)
    case = case.replace(parameters=parameters, support=support, query=query)
    cnn = case.generate(library)
    arrays = [cnn.with_norm(norm)(library.to(query)), cnn.logits_weight]
    for conv in cnn.convs:
        arrays += [conv.weight, conv.gamma, conv.beta, *conv.statistics, *([] if conv.bias is None else [conv.bias])]
        arrays += conv.affine or ()
    assert {str(library.back(x).dtype) for x in arrays} == {"float32"}


# Bad input


def small(library, batched=True):
    case = make_case(Config(way=2, blocks=1, image_size=8, layers=1, channels=2), 0, 2, 4, 3, False, False)
    if not batched:
        case = case.replace(support=case.support[0], labels=case.labels[0], query=case.query[0])
    return case.generate(library), case.query


@pytest.mark.parametrize(
    "change",
    [lambda q: q[:, :, :7], lambda q: q[..., [0, 0, 0]], lambda q: q[0], lambda q: q[:1], lambda q: q[0, 0, 0]],
)
def test_queries_of_another_shape(library, change):
    """Another size, channel count, number of episodes or axes: the error names what came and what was wanted."""
    cnn, query = small(library)
    bad = change(query)
    shape = str(list(bad.shape)).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(InputError, match=rf"query has shape {shape}; wanted \[E, m, H, W, C\].*\(8, 8, 1\) and E = 2"):
        cnn(library.to(bad))


def test_one_query_needs_its_axis(library):
    """Without E, queries are [m, H, W, C]; a single image without m, and a batch of episodes, are errors."""
    cnn, query = small(library, batched=False)
    assert tuple(cnn(library.to(query)).shape) == (3, 2)
    for bad in (query[0], query[None]):
        with pytest.raises(InputError, match=r"query has shape .*; wanted \[m, H, W, C\] with .* \(8, 8, 1\)"):
            cnn(library.to(bad))


def test_queries_in_bytes(library):
    """Pixels in 0 .. 255 are an InputError, as for support images, and not logits of overexposed images."""
    cnn, query = small(library)
    with pytest.raises(InputError, match="uint8"):
        cnn(library.to((query * 255).astype(np.uint8)))


def test_queries_of_the_other_library_or_dtype(library):
    """Queries have the library and the dtype of the support set."""
    cnn, query = small(library)
    for bad in (torch.from_numpy(query) if library.name == "numpy" else query, library.to(query.astype(np.float32))):
        with pytest.raises(InputError, match="query"):
            cnn(bad)


def test_queries_with_nan(library):
    """A NaN pixel, which in batch mode reaches every query, is an InputError."""
    cnn, query = small(library)
    query = query.copy()
    query[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"query holds pixels from nan to nan"):
        cnn(library.to(query))


@pytest.mark.parametrize("mask", [np.ones((2, 4), bool), np.ones((2, 3))])
def test_query_masks_of_another_shape_or_dtype(library, mask):
    """A query mask is [E, m] booleans."""
    cnn, query = small(library)
    with pytest.raises(InputError, match="mask"):
        cnn(library.to(query), library.to(mask))
