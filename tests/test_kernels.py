"""The conv block: against loops, against torch's own autograd, and against finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from tolerances import assert_close

from mini_ht import InputError
from mini_ht.kernels import NORM_EPS, conv2d, conv_block, implementation

channels = st.sampled_from([1, 3, 5, 8])  # an implementation may treat few channels in another way


def draw_block(
    seed, episodes=2, images=3, height=6, width=6, inputs=3, outputs=4, given_statistics=False, masked=False
):
    """Random arguments of conv_block: (x, weight, gamma, beta) and the options."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((episodes, images, height, width, inputs))
    weight = rng.standard_normal((episodes, 3, 3, inputs, outputs))
    gamma, beta = rng.standard_normal((2, outputs))
    mask = rng.random((episodes, images)) < 0.5
    mask[:, -1] = True
    mean = rng.standard_normal((episodes, outputs))
    options = {
        "bias": rng.standard_normal((episodes, outputs)),
        "statistics": (mean, rng.random((episodes, outputs)) + 0.1) if given_statistics else None,
        "mask": mask if masked else None,
    }
    return (x, weight, gamma, beta), options


def block_by_loops(x, weight, gamma, beta, bias, statistics, mask, slope):
    """The conv block, one number at a time where that can be afforded."""
    episodes, images, height, width, _ = x.shape
    outputs = weight.shape[-1]
    y = np.zeros((episodes, images, height // 2, width // 2, outputs))
    for e, n, row, column in np.ndindex(y.shape[:4]):
        window = []
        for i, j in np.ndindex(2, 2):
            total = np.zeros(outputs) if bias is None else bias[e].copy()
            for u, v in np.ndindex(3, 3):
                r, c = 2 * row + i + u - 1, 2 * column + j + v - 1
                if 0 <= r < height and 0 <= c < width:
                    total += x[e, n, r, c] @ weight[e, u, v]
            window.append(np.where(total > 0, total, slope * total))
        y[e, n, row, column] = np.max(window, axis=0)
    used = np.ones((episodes, images), bool) if mask is None else mask
    if statistics is None:
        values = [y[e, used[e]].reshape(-1, outputs) for e in range(episodes)]
        statistics = np.array([v.mean(0) for v in values]), np.array([v.var(0) for v in values])
    mean, variance = (s[:, None, None, None] for s in statistics)
    return gamma * (y - mean) / np.sqrt(variance + NORM_EPS) + beta, statistics


@given(
    seed=seeds,
    height=st.integers(2, 7),
    width=st.integers(2, 7),
    images=st.integers(1, 3),
    inputs=channels,
    outputs=st.sampled_from([1, 4]),
    given_statistics=st.booleans(),
    masked=st.booleans(),
    biased=st.booleans(),
    slope=st.sampled_from([0.0, 0.2]),
)
def test_the_block_equals_loops(
    library, seed, height, width, images, inputs, outputs, given_statistics, masked, biased, slope
):
    """Conv 'same', (leaky) ReLU, 2x2 max-pool that drops an odd edge, norm over the images that count."""
    arguments, options = draw_block(seed, 2, images, height, width, inputs, outputs, given_statistics, masked)
    options["bias"] = options["bias"] if biased else None
    y, statistics = conv_block(*library.to(arguments), **library.to(options), slope=slope)
    wanted, wanted_statistics = block_by_loops(*arguments, **options, slope=slope)
    assert_close(y, wanted)
    for found, expected in zip(statistics, wanted_statistics, strict=True):
        assert tuple(found.shape) == (2, outputs)
        # A channel that never fires has variance 0 only up to the rounding of what is added to it.
        assert_close(library.back(found) + NORM_EPS, expected + NORM_EPS)


@given(
    seed=seeds,
    size=st.integers(1, 9),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    inputs=channels,
)
def test_conv2d_equals_loops(library, seed, size, kernel, stride, padding, inputs):
    """Every output is the sum over its neighbourhood; H' = (H + 2 padding - k) // stride + 1."""
    size = max(size, kernel)
    rng = np.random.default_rng(seed)
    shapes = (2, size, size + 1, inputs), (kernel, kernel, inputs, 2), (2,)
    x, weight, bias = (rng.standard_normal(shape) for shape in shapes)
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    wanted = np.array([
        [[np.tensordot(image[r : r + kernel, c : c + kernel], weight, 3) + bias
          for c in range(0, image.shape[1] - kernel + 1, stride)]
         for r in range(0, image.shape[0] - kernel + 1, stride)]
        for image in padded
    ])  # fmt: skip
    assert_close(conv2d(*library.to((x, weight, bias)), stride, padding), wanted)


def plain_block(x, weight, gamma, beta, bias, statistics, mask, slope):
    """The block from torch's own functions, episode by episode, with the activation before the pool."""
    results = []
    for e in range(len(x)):
        images, filters = x[e].permute(0, 3, 1, 2).contiguous(), weight[e].permute(3, 2, 0, 1).contiguous()
        y = F.conv2d(images, filters, bias[e], padding=1)
        y = F.max_pool2d(F.leaky_relu(y, slope), 2).permute(0, 2, 3, 1)  # [N, h, w, Cout]
        used = y if mask is None else y[mask[e]]
        own = used.mean((0, 1, 2)), used.var((0, 1, 2), correction=0)
        mean, variance = (s[e] for s in statistics) if statistics else own
        results.append((gamma * (y - mean) / (variance + NORM_EPS) ** 0.5 + beta, mean, variance))
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


@given(
    seed=seeds,
    episodes=st.integers(1, 2),
    images=st.integers(1, 3),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    inputs=channels,
    outputs=st.sampled_from([1, 4]),
    given_statistics=st.booleans(),
    masked=st.booleans(),
    slope=st.sampled_from([0.0, 0.2]),
    wants_x=st.booleans(),
)
def test_gradients_equal_torch_autograd(
    seed, episodes, images, height, width, inputs, outputs, given_statistics, masked, slope, wants_x
):
    """The gradient in every argument, through the output and through the returned statistics, is that of torch."""
    arguments, options = draw_block(seed, episodes, images, height, width, inputs, outputs, given_statistics, masked)
    x, weight, gamma, beta = (torch.tensor(a, requires_grad=True) for a in arguments)
    x.requires_grad_(wants_x)
    bias = torch.tensor(options["bias"], requires_grad=True)
    statistics = tuple(torch.tensor(s, requires_grad=True) for s in options["statistics"] or ()) or None
    mask = torch.tensor(options["mask"]) if masked else None
    leaves = [leaf for leaf in (x, weight, gamma, beta, bias, *(statistics or ())) if leaf.requires_grad]
    ours, theirs = [], []
    for results, block in ((ours, conv_block), (theirs, plain_block)):
        y = block(x, weight, gamma, beta, bias=bias, statistics=statistics, mask=mask, slope=slope)
        y, mean, variance = (y[0], *y[1]) if block is conv_block else y
        direction = np.random.default_rng(seed).standard_normal(y.shape)
        loss = (y * torch.tensor(direction)).sum() + (mean * gamma).sum() + (variance * beta**2).sum()
        results.extend(torch.autograd.grad(loss, leaves))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, "float64")


@pytest.mark.parametrize("inputs", [1, 3, 8])
@pytest.mark.parametrize("wants_x", [True, False], ids=["x", "weights"])
@pytest.mark.parametrize("norm", ["own", "given", "masked"])
def test_gradients_equal_finite_differences(inputs, wants_x, norm):
    """Gradients of the output and of the returned statistics, each alone, agree with finite differences."""
    (x, *others), options = draw_block(0, 2, 2, 5, 4, inputs, 2, norm == "given", norm == "masked")
    parts = [torch.tensor(a, requires_grad=True) for a in (*others, options["bias"], *(options["statistics"] or ()))]
    x = torch.tensor(x, requires_grad=wants_x)
    mask = torch.tensor(options["mask"]) if norm == "masked" else None

    def block(x, weight, gamma, beta, bias, *statistics):
        y, (mean, variance) = conv_block(x, weight, gamma, beta, bias=bias, statistics=statistics or None, mask=mask)
        return (y,) if statistics else (y, mean, variance)

    assert torch.autograd.gradcheck(block, (x, *parts))


@pytest.mark.parametrize("part", [0, 1], ids=["mean", "variance"])
def test_statistics_alone_pass_on_gradients(part):
    """A loss of one returned statistic only, whatever else of the block is unused, has its gradient."""
    arguments, _ = draw_block(0)
    leaves = [torch.tensor(a, requires_grad=True) for a in arguments]
    found = torch.autograd.grad(conv_block(*leaves)[1][part].square().sum(), leaves[:2])
    plain = plain_block(*leaves, torch.zeros(2, 4, dtype=torch.float64), None, None, 0.0)[1 + part]
    for mine, other in zip(found, torch.autograd.grad(plain.square().sum(), leaves[:2]), strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize("inputs", [1, 3, 8])
@pytest.mark.parametrize("wants_x", [True, False], ids=["x", "weights"])
@pytest.mark.parametrize("tied", [(0, 1), (0, 2), (1, 2), (2, 3), (1, 3), (0, 1, 2, 3)])
def test_a_tie_in_the_pool_goes_to_the_first_maximum(inputs, wants_x, tied):
    """Of equal maxima in a window, row by row, the first gets the whole gradient: an integer input makes exact ties."""
    x = np.zeros((1, 1, 4, 4, inputs))
    for place in tied:
        x[0, 0, 2 + place // 2, 2 + place % 2] = 5
    # Around the tied maxima nothing is equal, so the weight's gradient shows which of them was taken.
    x[0, 0, :2] = np.arange(8 * inputs).reshape(2, 4, inputs) / 64
    weight = np.zeros((1, 3, 3, inputs, 2))
    weight[0, 1, 1] = 1  # each position sees itself
    x, weight = torch.tensor(x, requires_grad=wants_x), torch.tensor(weight, requires_grad=True)
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    y, _ = conv_block(x, weight, one, one, statistics=(zero, zero + 1 - NORM_EPS))
    y[0, 0, 1, 1, 0].backward()
    row, column = 2 + tied[0] // 2, 2 + tied[0] % 2
    padded = F.pad(x.detach(), (0, 0, 1, 1, 1, 1))
    assert_close(weight.grad[0, ..., 0], padded[0, 0, row : row + 3, column : column + 3])
    if wants_x:
        wanted = torch.zeros_like(x)
        wanted[0, 0, row, column] = 1
        assert_close(x.grad, wanted)


@given(seed=seeds, inputs=channels, masked=st.booleans(), given_statistics=st.booleans())
def test_arguments_are_left_alone(library, seed, inputs, masked, given_statistics):
    """No argument is written to."""
    arguments, options = draw_block(seed, inputs=inputs, masked=masked, given_statistics=given_statistics)
    there, options_there = library.to(arguments), library.to(options)
    conv_block(*there, **options_there)
    for before, after in zip(arguments, there, strict=True):
        np.testing.assert_array_equal(library.back(after), before)
    np.testing.assert_array_equal(library.back(options_there["bias"]), options["bias"])


@given(seed=seeds, inputs=channels, masked=st.booleans(), slope=st.sampled_from([0.0, 0.2]))
def test_strides_do_not_matter(library, seed, inputs, masked, slope):
    """Arrays that lie in memory in another order give the same result."""
    arguments, options = draw_block(seed, inputs=inputs, masked=masked)
    there, options = library.to(arguments), library.to(options)
    x, weight = (np.asfortranarray(a) for a in arguments[:2])
    if library.name == "torch":
        x, weight = torch.from_numpy(x), torch.from_numpy(weight)
    wanted, _ = conv_block(*there, **options, slope=slope)
    assert_close(conv_block(x, weight, *there[2:], **options, slope=slope)[0], wanted)


@given(seed=seeds, inputs=channels, masked=st.booleans(), given_statistics=st.booleans())
def test_float32_in_float32_out(library, seed, inputs, masked, given_statistics):
    """float32 in, float32 out, within float32's tolerance of the float64 result."""
    arguments, options = draw_block(seed, inputs=inputs, masked=masked, given_statistics=given_statistics)
    wanted, wanted_statistics = conv_block(*arguments, **options)

    def narrow(x):
        if isinstance(x, tuple):
            return tuple(narrow(part) for part in x)
        return library.to(x.astype(np.float32) if x is not None and x.dtype == np.float64 else x)

    options = {name: narrow(value) for name, value in options.items()}
    y, statistics = conv_block(*narrow(arguments), **options, slope=0.0)
    for found, expected in zip((y, *statistics), (wanted, *wanted_statistics), strict=True):
        assert library.back(found).dtype == np.float32
        assert_close(found, expected, "float32")
    x, weight, bias = narrow((*arguments[:2], np.ones(4)))
    assert library.back(conv2d(x[0], weight[0], bias)).dtype == np.float32


@given(seed=seeds, inputs=channels, masked=st.booleans(), given_statistics=st.booleans())
def test_bfloat16_activations(seed, inputs, masked, given_statistics):
    """On torch, images in bfloat16 come out in bfloat16, near float32's values; everything else stays in float32."""
    arguments, options = draw_block(seed, inputs=inputs, masked=masked, given_statistics=given_statistics)
    options = {name: single(option) for name, option in options.items()}
    x, *others = (single(a) for a in arguments)
    x = x.bfloat16()
    others[0] = others[0].bfloat16().float().requires_grad_()
    y, statistics = conv_block(x, *others, **options)
    wanted, _ = conv_block(x.float(), *others, **options)
    assert y.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in statistics)
    assert_close(y, wanted, "bfloat16")
    (gradient,) = torch.autograd.grad(y.float().square().sum(), others[0])
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


def single(x):
    """Arrays of float64 as torch tensors of float32; None, booleans and tuples of arrays, too."""
    if isinstance(x, tuple):
        return tuple(single(part) for part in x)
    return x if x is None else torch.from_numpy(x.astype(np.float32) if x.dtype == np.float64 else x)


def test_who_computes():
    """`auto` takes the array's own library; another or an unknown name is an InputError."""
    array, tensor = np.zeros(1), torch.zeros(1)
    assert implementation("auto", array) is implementation("reference", array)
    assert implementation("auto", tensor) is implementation("torch", tensor)
    with pytest.raises(InputError, match=r"impl is 'fast'; choose auto, reference, torch"):
        implementation("fast", array)
    for name, x, kind in (("torch", array, "ndarray"), ("reference", tensor, "Tensor")):
        with pytest.raises(InputError, match=rf"impl '{name}' cannot compute on a {kind}; convert it"):
            implementation(name, x)
    with pytest.raises(InputError, match=r"impl is 'fast'"):
        conv2d(np.zeros((1, 3, 3, 1)), np.zeros((3, 3, 1, 1)), np.zeros(1), impl="fast")
