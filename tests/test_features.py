"""Laws of the image features that the transformer sees."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, generic_parameters, permutations, seeds
from tolerances import assert_close

from mini_ht.features import POOLED_SCALE, SHARED_STRIDES, local_features, shared_features
from mini_ht.kernels import NORM_EPS, conv_max_pool
from mini_ht.plan import local_convs, plan


def images_for(size, channels, seed, episodes=2, images=3):
    return np.random.default_rng(seed).standard_normal((episodes, images, size, size, channels))


def conv(x, parameters, name, stride, padding):
    """torch's own conv with bias, channels first: x [B, C, H, W]."""
    weight = torch.from_numpy(parameters[f"{name}.weight"]).permute(3, 2, 0, 1)
    return F.conv2d(x, weight, torch.from_numpy(parameters[f"{name}.bias"]), stride, padding)


def blurred(y):
    """ReLU, max-pool and binomial blur by torch's own calls: y [B, C, H, W] -> [B, C, H // 2, W // 2]."""
    blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=y.dtype)[None, None] / 16
    maps = F.max_pool2d(y.relu(), 2, 1).flatten(0, 1)[:, None]  # [B * C, 1, H - 1, W - 1]
    return F.conv2d(maps, blur, stride=2, padding=1).unflatten(0, y.shape[:2])[:, :, 0]


def channels_first(x):
    return torch.from_numpy(x.reshape(-1, *x.shape[2:])).permute(0, 3, 1, 2)


@given(config=configs(shared_features=4, shared_convs="strided"), seed=seeds)
def test_shared_features_are_four_convs_and_a_mean(library, config, seed):
    """Four 3x3 convs 'same', each with ReLU, of strides 2, 2, 2, 1; then the mean over space."""
    parameters, x = generic_parameters(config, seed), images_for(config.image_size, config.image_channels, seed)
    y = channels_first(x)
    for number, stride in enumerate(SHARED_STRIDES):
        y = conv(y, parameters, f"shared.conv{number}", stride, 1).relu()
    found = shared_features(library.to(parameters), config, library.to(x))
    assert_close(found, y.mean((2, 3)).reshape(2, 3, 4))


@given(seed=seeds, size=st.integers(1, 9), inputs=st.integers(1, 4))
def test_conv_max_pool(library, seed, size, inputs):
    """One weight for all images: conv 'same' and bias, then the largest of each 2x2; a map of one row is not pooled."""
    shapes = (3, size, 5, inputs), (3, 3, inputs, 2), (2,)
    x, weight, bias = (np.random.default_rng(seed).standard_normal(shape) for shape in shapes)
    y = conv(channels_first(x[None]), {"c.weight": weight, "c.bias": bias}, "c", 1, 1)
    wanted = (F.max_pool2d(y, 2) if size > 1 else y).permute(0, 2, 3, 1)
    assert_close(conv_max_pool(*library.to((x, weight, bias))), wanted)


@given(seed=seeds, size=st.integers(1, 9), inputs=st.integers(1, 4), outputs=st.integers(1, 3))
def test_blurred_conv_max_pool(library, seed, size, inputs, outputs):
    """Conv 'same' and bias, ReLU, the largest 2x2 at every pixel, then a 3x3 of 1, 2, 4 sixteenths at every second."""
    shapes = (3, size, 5, inputs), (3, 3, inputs, outputs), (outputs,)
    x, weight, bias = (np.random.default_rng(seed).standard_normal(shape) for shape in shapes)
    y = conv(channels_first(x[None]), {"c.weight": weight, "c.bias": bias}, "c", 1, 1)
    wanted = (blurred(y) if size > 1 else y).permute(0, 2, 3, 1)
    found = conv_max_pool(*library.to((x, weight, bias)), blur=True)
    assert_close(found, wanted)
    assert tuple(found.shape) == tuple(conv_max_pool(*library.to((x, weight, bias))).shape)


@given(seed=seeds, corner=st.tuples(st.integers(2, 6), st.integers(2, 6)))
def test_blur_forgets_where_a_pixel_is_dropped(library, seed, corner):
    """The sum over a blurred map is that of a drawing moved by a pixel: the max-pool's alone is not."""
    drawing = np.random.default_rng(seed).random((5, 5))
    weight, bias, sums = np.random.default_rng([seed, 1]).standard_normal((3, 3, 1, 2)), np.zeros(2), {}
    for blur in (True, False):
        x = np.zeros((4, 18, 18, 1))
        for image, (row, column) in zip(x, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
            image[row + corner[0] :, column + corner[1] :][:5, :5, 0] = drawing
        pooled = library.back(conv_max_pool(*library.to((x, weight, bias)), blur=blur)).clip(0)
        sums[blur] = pooled.sum((1, 2))  # [4, 2]
    assert_close(sums[True], np.broadcast_to(sums[True][:1], (4, 2)))
    assert np.ptp(sums[False], axis=0).max() > 1e-3


@given(kind=st.sampled_from(("pooled", "blurred")), data=st.data(), seed=seeds)
def test_pooled_features_are_four_normed_convs_and_a_mean(library, kind, data, seed):
    """Four 3x3 convs 'same', each with a max-pool where there is room, ReLU, and mean 0 and variance 1 for an image."""
    config = data.draw(configs(shared_features=4, shared_convs=kind))
    parameters, x = generic_parameters(config, seed), images_for(config.image_size, config.image_channels, seed)
    y = channels_first(x)
    for number in range(4):
        y = conv(y, parameters, f"shared.conv{number}", 1, 1)
        if y.shape[-1] > 1:
            y = F.max_pool2d(y, 2) if kind == "pooled" else blurred(y)
        y = F.layer_norm(y.relu(), y.shape[1:], eps=NORM_EPS)
    found = shared_features(library.to(parameters), config, library.to(x))
    assert_close(found, POOLED_SCALE * y.mean((2, 3)).reshape(2, 3, 4))


@given(config=configs(local_features=3, generate="all", discriminant=0), seed=seeds, data=st.data())
def test_local_features_are_the_convs_before_their_relu(library, config, seed, data):
    """Each 'valid' conv's output before its ReLU, averaged over space; the next conv sees it after."""
    layer = data.draw(st.sampled_from(plan(config)))
    inputs = config.image_channels if layer.name == "conv1" else config.channels
    parameters, x = generic_parameters(config, seed), images_for(layer.size, inputs, seed)
    y, wanted = channels_first(x), []
    for number, local in enumerate(layer.local):
        y = conv(y, parameters, f"{layer.name}.local{number}", local.stride, 0)
        wanted.append(y.mean((2, 3)))
        y = y.relu()
    found = local_features(library.to(parameters), layer, library.to(x))
    assert_close(found, torch.cat(wanted, -1).reshape(2, 3, -1))


@given(size=st.integers(1, 40), width=st.integers(1, 4), depth=st.integers(1, 2))
def test_local_convs_fit_their_input(size, width, depth):
    """Any map has at least one local conv; every kernel fits; the first has stride 2 if it can move."""
    convs = local_convs(size, 5, width, depth)
    assert 1 <= len(convs) <= depth and local_convs(size, 5, 0, depth) == ()
    assert [conv.inputs for conv in convs] == [5, width][: len(convs)]
    for number, conv in enumerate(convs):
        assert conv.kernel == min(3, size) and conv.stride == (2 if number == 0 and size > 3 else 1)
        size = (size - conv.kernel) // conv.stride + 1
        assert size >= 1 and conv.outputs == width
    assert len(convs) == depth or size < 3


@given(config=configs(shared_features=4, local_features=3, generate="all", discriminant=0), seed=seeds, data=st.data())
def test_features_belong_to_one_image(library, config, seed, data):
    """Images in another order have their features in that order: no image sees another."""
    parameters, layer = library.to(generic_parameters(config, seed)), plan(config)[0]
    x = images_for(config.image_size, config.image_channels, seed, images=4)
    order = data.draw(permutations(4))
    for features in (
        lambda x: library.back(shared_features(parameters, config, library.to(x))),
        lambda x: library.back(local_features(parameters, layer, library.to(x))),
    ):
        together = features(x)
        assert_close(features(x[:, order]), together[:, order])
        assert_close(features(x[1:, 2:3]), together[1:, 2:3])


@given(config=configs(shared_features=0, local_features=0), seed=seeds)
def test_no_features_have_width_0(library, config, seed):
    """Without features both extractors give arrays of width 0, so that nothing else has to ask."""
    x = library.to(images_for(config.image_size, config.image_channels, seed).astype(np.float32))
    parameters = library.to(generic_parameters(config, seed, np.float32))
    assert not any("shared" in name or "local" in name for name in parameters)
    for found in (shared_features(parameters, config, x), local_features(parameters, plan(config)[0], x)):
        assert tuple(found.shape) == (2, 3, 0) and library.back(found).dtype == np.float32


@given(config=configs(shared_features=4, local_features=3, generate="all", discriminant=0), seed=seeds)
def test_float32_stays_float32(library, config, seed):
    """float32 in, float32 out."""
    x = library.to(images_for(config.image_size, config.image_channels, seed).astype(np.float32))
    parameters = library.to(generic_parameters(config, seed, np.float32))
    assert library.back(shared_features(parameters, config, x)).dtype == np.float32
    assert library.back(local_features(parameters, plan(config)[0], x)).dtype == np.float32
