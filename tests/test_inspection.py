"""Laws of the attention maps, the spread and the principal plane; figures draw the numbers they are given."""

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, generic_parameters, seeds
from tolerances import assert_all_close, assert_close, contents

from mini_ht import Config, InputError, attention
from mini_ht.inspection import AttentionMaps, attention_maps, principal_plane, spread
from mini_ht.maps import FAINTEST, draw_attention, draw_kernels, draw_plane
from mini_ht.plan import plan

matplotlib.use("agg")


def all_maps(library, case) -> dict[str, AttentionMaps]:
    """The maps of every layer that a transformer writes, by name, in the order in which they are generated."""
    parts = library.to((case.parameters, case.config, case.support, case.labels, case.mask))
    names = [layer.name for layer in plan(case.config) if layer.generated and not layer.discriminant]
    return {name: attention_maps(*parts, layer=name) for name in names}


@given(case=cases(generator="joint"))
def test_the_maps_are_what_the_generator_used(library, case):
    """A generator whose attention only multiplies the values by the maps, in their order, writes the same CNN."""
    replay = [weights for maps in all_maps(library, case).values() for weights in maps.weights]
    wanted = contents(case.generate(library))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("attention", "sigmoid_attention"):
            patch.setattr(attention, name, lambda query, key, value, mask=None: replay.pop(0) @ value)
        assert_all_close(contents(case.generate(library)), wanted)
    assert not replay, f"{len(replay)} maps were never asked for"


@given(case=cases(generator="joint"))
def test_rows_sum_to_one_and_padding_is_not_looked_at(library, case):
    """Every token spreads a weight of 1 over all tokens, nothing of it on padding; in the last, placeholders ask.

    With sigmoid attention each weight is in 0 .. 1, and they need not sum to 1.
    """
    episodes, images = case.labels.shape
    layers = {layer.name: layer for layer in plan(case.config)}
    for name, maps in all_maps(library, case).items():
        first = layers[name].placeholders
        assert maps.placeholders == first and len(maps.weights) == case.config.layers
        for number, weights in enumerate(map(library.back, maps.weights)):
            asking = first if number == case.config.layers - 1 else first + images
            assert weights.shape == (episodes, case.config.heads, asking, first + images)
            if case.config.attention == "softmax":
                assert_close(weights.sum(-1), np.ones(weights.shape[:-1]))
            assert (weights >= 0).all() and (weights <= 1).all()
            padded = np.broadcast_to(~case.padding()[:, None, None], (*weights.shape[:-1], images))
            assert (weights[..., first:][padded] == 0).all()


@given(case=cases(episodes=(1, 1), generator="joint"))
def test_a_single_task_needs_no_leading_axis(library, case):
    """A support set without E has the maps of a batch of one."""
    mask = None if case.mask is None else case.mask[0]
    alone = case.replace(support=case.support[0], labels=case.labels[0], mask=mask)
    parts = library.to((alone.parameters, alone.config, alone.support, alone.labels, alone.mask))
    for one, batch in zip(attention_maps(*parts).weights, all_maps(library, case)["logits"].weights, strict=True):
        assert_close(one, batch)


def test_a_layer_that_is_not_generated_has_no_maps():
    """The error names the layer that came and those that there are."""
    config = Config(way=2, blocks=2, image_size=8, generate="2")
    images, labels = np.zeros((2, 8, 8, 1)), np.array([0, 1])
    with pytest.raises(InputError, match=r"'conv1'.*choose one of conv2, logits"):
        attention_maps(generic_parameters(config, 0), config, images, labels, layer="conv1")


def test_a_generator_with_a_decoder_has_no_maps():
    """The error names the generator that came and the one that is wanted."""
    config = Config(way=2, blocks=2, image_size=8, generator="separate")
    images, labels = np.zeros((2, 8, 8, 1)), np.array([0, 1])
    with pytest.raises(InputError, match=r"generator is 'separate'; .*'joint'"):
        attention_maps(generic_parameters(config, 0), config, images, labels)


def test_spread(library):
    """Standard deviation over episodes in units of the root mean square: 0 for equal tasks, unchanged by scale."""
    weights = np.array([[3.0, 4.0], [3.0, -4.0]])  # [E, weights], mean square 12.5
    found = library.back(spread(library.to(weights)))
    assert_close(found, np.array([0, 4 / np.sqrt(12.5)]))
    assert_close(library.back(spread(library.to(-7 * weights))), found)
    kernels = np.random.default_rng(0).standard_normal((5, 3, 3, 2, 4))
    assert_close(library.back(spread(library.to(kernels))), kernels.std(0) / np.sqrt((kernels**2).mean()))


@given(seed=seeds, count=st.integers(3, 20))
def test_points_of_a_plane_keep_their_distances(seed, count):
    """Points that lie in a plane of a 6-dimensional space come out with all their distances, and centred."""
    rng = np.random.default_rng(seed)
    flat = rng.standard_normal((count, 2)) * [5, 1]
    axes = np.linalg.qr(rng.standard_normal((6, 2)))[0]  # [6, 2], orthonormal columns
    places, shares = principal_plane(flat @ axes.T + rng.standard_normal(6))
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (places, flat)]
    np.testing.assert_allclose(*distances, atol=1e-9)
    np.testing.assert_allclose(places.mean(0), 0, atol=1e-9)
    assert shares[0] >= shares[1] and np.isclose(shares.sum(), 1)


@pytest.fixture(autouse=True)
def close_figures():
    """pyplot keeps every figure until it is told not to."""
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def small_maps() -> AttentionMaps:
    """Two encoder layers, two heads, two placeholders, five support images of which one is unlabelled, one padding."""
    rng = np.random.default_rng(0)
    weights = tuple(rng.dirichlet(np.ones(7), (1, 2, asking)) for asking in (7, 2))  # [E, heads, asking, T]
    mask = np.array([[True, True, True, False, True]])
    return AttentionMaps(weights, 2, np.array([[1, -1, 0, 0, 1]]), mask)


def test_attention_figure():
    """A panel for each layer and head holds the weights: tokens by class, unlabelled ones last, padding left out."""
    maps = small_maps()
    figure = draw_attention(maps)
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == [f"encoder layer {i}, head {h}" for i in (0, 1) for h in (0, 1)]
    assert "attention weight" in bar.get_ylabel()
    assert "support images" in figure.get_supxlabel() and "asks" in figure.get_supylabel()
    order = [0, 1, 4, 2, 6, 3]  # placeholders; the image of class 0; the two of class 1; the unlabelled one
    for axes, (i, head) in zip(panels, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        wanted = maps.weights[i][0, head][order if i == 0 else [0, 1]][:, order]
        np.testing.assert_allclose(axes.images[0].get_array(), np.maximum(wanted, FAINTEST))
        assert axes.images[0].get_clim() == (FAINTEST, 1)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["$\\mu$", "0", "1", "?"]
        np.testing.assert_allclose(axes.get_xticks(), [0.5, 2, 3.5, 5])
        upright = [line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1]]
        assert upright == [1.5, 2.5, 4.5]
        assert len(axes.lines) - len(upright) == (3 if i == 0 else 0)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["$\\mu$", "0", "1", "?"][: 4 if i == 0 else 1]


def test_attention_figure_with_many_classes():
    """Of twenty classes at most eight are named, the first among them; lines still part all of them."""
    weights = np.full((1, 1, 3, 23), 1 / 23)
    axes = draw_attention(AttentionMaps((weights,), 3, np.arange(20)[None], None)).axes[0]
    words = [label.get_text() for label in axes.get_xticklabels()]
    assert len(words) == 21 and words[:2] == ["$\\mu$", "0"] and 4 <= sum(map(bool, words[1:])) <= 8
    assert len(axes.lines) == 20


def test_kernel_figure():
    """A row of kernels for each task on one symmetric scale, then a row with their spread in per cent."""
    weight = np.random.default_rng(0).standard_normal((2, 3, 3, 4, 5))
    figure = draw_kernels(weight)
    panels, bars = figure.axes[:15], figure.axes[15:]
    assert [bar.get_ylabel() for bar in bars] == ["weight", "% of rms"]
    assert [axes.get_ylabel() for axes in panels[::5]] == ["task 0", "task 1", "spread"]
    assert [axes.get_title() for axes in panels[:5]] == [f"channel {channel}" for channel in range(5)]
    limit = np.abs(weight.mean(3)).max()
    for number, axes in enumerate(panels[:10]):
        np.testing.assert_array_equal(axes.images[0].get_array(), weight.mean(3)[number // 5, ..., number % 5])
        np.testing.assert_allclose(axes.images[0].get_clim(), (-limit, limit))
    for channel, axes in enumerate(panels[10:]):
        wanted = 100 * spread(weight)
        np.testing.assert_allclose(axes.images[0].get_array(), wanted.mean(2)[..., channel])
        np.testing.assert_allclose(axes.images[0].get_clim(), (0, wanted.mean(2).max()))


def test_kernel_figure_of_equal_tasks():
    """Kernels that are the same for every task can be drawn, with a spread of 0."""
    weight = np.broadcast_to(np.random.default_rng(0).standard_normal((3, 3, 1, 2)), (3, 3, 3, 1, 2))
    last = draw_kernels(weight).axes[3 * 2]
    assert np.abs(last.images[0].get_array()).max() < 1e-12


def test_plane_figure():
    """Each group's points stand at their principal coordinates; both axes have one scale and show all points."""
    rng = np.random.default_rng(0)
    points, groups = rng.standard_normal((12, 4)), np.arange(12) % 3
    axes = draw_plane(points, groups, ["a", "b", "c"]).axes[0]
    places, shares = principal_plane(points)
    for group, dots in enumerate(axes.collections):
        np.testing.assert_allclose(dots.get_offsets(), places[groups == group])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "c"]
    assert len({tuple(dots.get_facecolor()[0]) for dots in axes.collections}) == 3
    assert axes.get_aspect() == 1
    for (low, high), values in zip((axes.get_xlim(), axes.get_ylim()), places.T, strict=True):
        assert low <= values.min() and values.max() <= high
    assert f"{100 * shares[0]:.0f} %" in axes.get_xlabel() and f"{100 * shares[1]:.0f} %" in axes.get_ylabel()
