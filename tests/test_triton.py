"""The Triton kernels against the NumPy contract: in the interpreter without a GPU, on the device with one."""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import seeds
from tolerances import TRITON_TOLERANCE, as_numpy, relative_error

from mini_ht import InputError
from mini_ht.kernels import NORM_EPS, conv_block, conv_stack, implementation, reference
from mini_ht.kernels.reference_backward import block_forward, stack_backward

if sys.platform != "linux" and importlib.util.find_spec("triton") is None:
    pytest.skip("there is no triton for this system", allow_module_level=True)

import triton
import triton.language as tl

from mini_ht.kernels import tiles, triton_conv, triton_launch, triton_parts
from mini_ht.kernels.tune import in_force

pytestmark = pytest.mark.device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(seed, episodes, images, height, width, channels, biased=False, given_statistics=False):
    """Random float32 arguments: x, weights, gammas, betas, biases, statistics; one gamma is negative, one 0."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    pairs = list(pairwise(channels))
    x = normal(episodes, images, height, width, channels[0])
    weights = [normal(episodes, 3, 3, *pair) / np.float32(np.sqrt(9 * pair[0])) for pair in pairs]
    gammas, betas = ([normal(outputs) for _, outputs in pairs] for _ in range(2))
    for gamma in gammas:
        gamma[0], gamma[-1] = -abs(gamma[0]), 0
    biases = [normal(episodes, outputs) for _, outputs in pairs] if biased else None
    statistics = [(normal(episodes, c), abs(normal(episodes, c)) + np.float32(0.1)) for _, c in pairs]
    return x, weights, gammas, betas, biases, statistics if given_statistics else None


def convert(parts, change):
    """`change` of every array in nested lists and tuples; None passes."""
    if isinstance(parts, list | tuple):
        return type(parts)(convert(part, change) for part in parts)
    return None if parts is None else change(parts)


def flatten(parts):
    """The arrays in nested lists and tuples, without None."""
    if isinstance(parts, list | tuple):
        return [leaf for part in parts for leaf in flatten(part)]
    return [] if parts is None else [parts]


def run_reference(arguments, slope, seed, used=True):
    """Output, statistics and gradients in float64, and the directions of the loss that they belong to."""
    x, weights, gammas, betas, biases, statistics = convert(arguments, lambda a: a.astype(np.float64))
    rng, y, found = np.random.default_rng(seed), x, []
    for k, weight in enumerate(weights):
        bias, own = biases and biases[k], statistics and statistics[k]
        y, both = block_forward(y, weight, gammas[k], betas[k], bias, own, slope, NORM_EPS)
        found.append(both)
    g = rng.standard_normal(y.shape)
    g_statistics = [tuple(rng.standard_normal(part.shape) for part in both) for both in found] if used else None
    blocks = stack_backward(x, weights, gammas, betas, biases, statistics, slope, NORM_EPS, g, g_statistics)
    lists = ([getattr(b, name) for b in blocks] for name in ("weight", "gamma", "beta", "bias", "statistics"))
    return [y, found], flatten([blocks[0].x, *lists]), g, g_statistics


def run_triton(arguments, slope, g, g_statistics, dtype=torch.float32, wants_x=True, **options):
    """The same from the kernels: float64 NumPy arrays."""
    arguments = convert(arguments, lambda a: torch.tensor(a, device=DEVICE, requires_grad=True))
    x = arguments[0].detach().to(dtype).requires_grad_(wants_x)
    y, found = triton_conv.conv_stack(x, *arguments[1:], slope, NORM_EPS, **options)
    outputs, directions = [y], [torch.tensor(g, device=DEVICE).to(dtype)]
    if g_statistics is not None:
        outputs += flatten(found)
        directions += [torch.tensor(d, dtype=torch.float32, device=DEVICE) for d in flatten(g_statistics)]
    leaves = ([x] if wants_x else []) + flatten(arguments[1:])
    gradients = torch.autograd.grad(outputs, leaves, directions)
    back = [convert(parts, lambda t: t.detach().cpu().double().numpy()) for parts in ([y, found], list(gradients))]
    return back[0], back[1]


def beside_weights(gradients, first, blocks):
    """Gradients from which each bias's has joined its conv's weights': a bias is one more tap.

    Where a norm follows and every window fires, its sum cancels but for what the statistics are asked for, so that the
    size of the result does not say how large its terms were.
    """
    at = first + 3 * blocks
    taps = map(np.append, gradients[first:], gradients[at : at + blocks])
    return [*gradients[:first], *taps, *gradients[first + blocks : at], *gradients[at + blocks :]]


def check(arguments, slope=0.0, seed=0, used=True, **options):
    """Everything that comes out of the kernels in float32 is within the table's tolerance of float64."""
    wanted, wanted_gradients, g, g_statistics = run_reference(arguments, slope, seed, used)
    found, gradients = run_triton(arguments, slope, g, g_statistics, precision="ieee", **options)
    if not options.get("wants_x", True):
        wanted_gradients = wanted_gradients[1:]
    if arguments[4]:
        first, blocks = int(options.get("wants_x", True)), len(arguments[1])
        gradients, wanted_gradients = (beside_weights(g, first, blocks) for g in (gradients, wanted_gradients))
    pairs = [*zip(flatten(found), flatten(wanted), strict=True), *zip(gradients, wanted_gradients, strict=True)]
    for number, (mine, other) in enumerate(pairs):
        error = relative_error(mine, other)
        assert error <= TRITON_TOLERANCE["float32"], f"result {number} of {len(pairs)}: {error:.1e}"


@given(
    seed=seeds,
    episodes=st.integers(1, 2),
    images=st.integers(1, 3),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    inputs=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 20]),
    outputs=st.sampled_from([4, 6, 8, 12, 16, 20]),
    slope=st.sampled_from([0.0, 0.1]),
    biased=st.booleans(),
    given_statistics=st.booleans(),
    wants_x=st.booleans(),
)
@example(  # a channel that always fires: its bias's gradient in float32 is as far off on torch
    seed=35051, episodes=1, images=2, height=5, width=7, inputs=20, outputs=8, slope=0.0, biased=True,
    given_statistics=False, wants_x=False,
)  # fmt: skip
def test_a_block_equals_the_contract(
    seed, episodes, images, height, width, inputs, outputs, slope, biased, given_statistics, wants_x
):
    """One block of any small shape: output, statistics and every gradient."""
    arguments = draw(seed, episodes, images, height, width, (inputs, outputs), biased, given_statistics)
    check(arguments, slope, seed, wants_x=wants_x)


@pytest.mark.parametrize(
    ("episodes", "images", "height", "width", "channels", "options"),
    [
        (2, 2, 28, 28, (1, 8, 8, 8, 8), {}),
        (1, 1, 16, 17, (3, 8, 12, 6, 5), {"biased": True}),
        (2, 3, 13, 9, (1, 16, 20), {"given_statistics": True}),
        (1, 2, 9, 12, (3, 32, 33), {"biased": True, "given_statistics": True}),
        (2, 1, 6, 5, (64, 64), {}),
        (1, 2, 5, 6, (48, 4), {}),
        (1, 2, 4, 7, (4, 64), {"biased": True}),
        (1, 3, 9, 8, (16, 64, 12), {}),
    ],
)
def test_a_stack_equals_the_contract(episodes, images, height, width, channels, options):
    """Four blocks, odd sizes, few and many channels, with and without bias and given statistics."""
    check(draw(7, episodes, images, height, width, channels, **options), 0.1)


@pytest.mark.parametrize("inputs", [1, 16, 32])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_ragged_tiles(inputs, extra):
    """One window less than a tile, a tile, and one more; several tiles a program are tested below."""
    windows = tiles.choose("forward", inputs, 16, "float32", "ieee").windows
    check(draw(1, 1, windows + extra, 2, 3, (inputs, 16)))


@pytest.mark.parametrize("inputs", [1, 32])
def test_programs_with_several_tiles(inputs, monkeypatch):
    """A program that walks over tiles, the last one ragged, merges their statistics and sums."""
    for name in ("mini_ht.kernels.triton_launch.PROGRAMS", "mini_ht.kernels.triton_launch_backward.PROGRAMS"):
        monkeypatch.setattr(name, 2)
    monkeypatch.setattr("mini_ht.kernels.triton_launch_backward.weight_programs", lambda *_: 2)
    check(draw(2, 1, 7, 13, 6, (inputs, 20, 8)), 0.1)


def test_many_programs_of_an_episode():
    """Their statistics are read at once, so no episode has more than 32."""
    assert tiles.share_out(3 * 14 * 14, 16, 1, tiles.PROGRAMS) == (19, 2)
    assert tiles.share_out(9 * 14 * 14, 16, 1, tiles.PROGRAMS) == (28, 4)
    check(draw(17, 1, 5, 28, 28, (1, 4, 4)), wants_x=False)


@triton.jit
def merged(part_ptr, out_ptr, programs, windows, total):
    """out [2, 4], mean and variance from part [programs, 2, 4]."""
    c = tl.arange(0, 4)
    mean, variance = triton_parts.merge_statistics(part_ptr, programs, windows, total, c, c < 4, 4)
    tl.store(out_ptr + c, mean)
    tl.store(out_ptr + 4 + c, variance)


@pytest.mark.parametrize(("programs", "windows", "total"), [(1, 7, 5), (3, 2**29, 2**30 + 9), (32, 4, 125)])
def test_statistics_are_merged(programs, windows, total):
    """Few and many programs, of as many windows as 31 bits can count; the last one has fewer."""
    part = torch.rand(programs, 2, 4, generator=torch.Generator().manual_seed(21), dtype=torch.float64)
    count = torch.tensor([min(windows, total - s * windows) for s in range(programs)])[:, None].double()
    part[:, 1] *= count
    mean = (part[:, 0] * count).sum(0) / total
    variance = (part[:, 1] + (part[:, 0] - mean) ** 2 * count).sum(0) / total
    found = torch.empty(2, 4, device=DEVICE)
    merged[(1,)](part.float().to(DEVICE), found, programs, windows, total)
    assert relative_error(found, torch.stack([mean, variance])) <= TRITON_TOLERANCE["float32"]


@triton.jit
def columns(part_ptr, out_ptr, rows, CP: tl.constexpr):
    """out [6], the sums of part [rows, 8] but for its first and last columns."""
    c = tl.arange(0, CP)
    tl.store(out_ptr + c, triton_parts.add_rows(part_ptr + 1, rows, 8, c, c < 6), mask=c < 6)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 70])
def test_rows_are_added(rows):
    """Sums over programs or episodes: as many as there are, in steps of 32."""
    part = torch.randn(rows, 8, generator=torch.Generator().manual_seed(19)).to(DEVICE)
    found = torch.empty(6, device=DEVICE)
    columns[(1,)](part, found, rows, CP=8)
    assert relative_error(found, part[:, 1:7].double().sum(0)) <= TRITON_TOLERANCE["float32"]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes these tiles for half precision alone")
@pytest.mark.parametrize("channels", [(20, 32), (40, 64), (6, 16, 20)])
def test_tiles_of_half_precision_lose_nothing(channels):
    """The forms that only half precision takes, in float32: pixels read once for all places, windows of 32 channels."""
    jobs = [(job, *pair) for job in ("forward", "input", "weight") for pair in pairwise(channels)]
    half = {tiles.job_key(*job, "float32", "ieee"): tiles.choose(*job, "bfloat16", "tf32") for job in jobs}
    assert len(channels) > 2 or any(tile.pixels == 16 and tile.form == "taps" for tile in half.values())
    with in_force(half):
        check(draw(18, 1, 3, 7, 8, channels, biased=True), 0.1)


@pytest.mark.parametrize("inputs", [1, 20])
def test_offsets_of_64_bits(inputs, monkeypatch):
    """Episodes that 32-bit offsets do not reach take the same way with wider ones."""
    for name in ("mini_ht.kernels.triton_launch.WIDEST", "mini_ht.kernels.triton_launch_backward.WIDEST"):
        monkeypatch.setattr(name, 0)
    check(draw(3, 2, 2, 5, 6, (inputs, 20)))


@pytest.mark.parametrize("channels", [(1, 8), (8, 8), (32, 32), (40, 64)])
def test_float16_block(channels):
    """Half precision: each block within the table's tolerance, on inputs and directions that float16 holds exactly."""
    arguments = draw(4, 2, 2, 6, 7, channels)
    arguments = convert(arguments, lambda a: a.astype(np.float16).astype(np.float32))
    wanted, gradients, g, _ = run_reference(arguments, 0.0, 4, used=False)
    found, mine = run_triton(arguments, 0.0, g, None, torch.float16)
    for a, b in zip([found[0], *mine], [wanted[0], *gradients], strict=True):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        assert error <= TRITON_TOLERANCE["float16"], f"{error:.1e}"


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("channels", [8, 32, 64])
@pytest.mark.parametrize("kind", ["float16", *(["bfloat16"] if DEVICE == "cuda" else [])])
def test_a_norm_goes_into_rounded_weights(kind, channels, offset):
    """In half precision the second block, of what the first one stored, is as near as one block, whatever the mean.

    offset: of the first block's conv, so that its means are up to ten deviations from zero.
    """
    x, weights, gammas, betas, *_ = draw(20, 2, 3, 9, 8, (1, channels, channels))
    arguments = convert([x, weights, gammas, betas], lambda a: torch.tensor(a, device=DEVICE))
    biases = [torch.full((2, channels), value, device=DEVICE) for value in (offset, 0.0)]
    x, *arguments = arguments[0].to(getattr(torch, kind)), *arguments[1:]
    _, (first, second) = triton_launch.forward(x, *arguments, biases, [], 0.0, NORM_EPS, "tf32")
    p, mean, variance, found = (as_numpy(part) for part in (first.p, first.mean, first.variance, second.p))
    scale = gammas[0] / np.sqrt(variance + NORM_EPS)
    z = (p - mean[:, None, None, None, :]) * scale[:, None, None, None, :] + betas[0]
    wanted = np.maximum(reference.conv_max_pool(z, weights[1].astype(np.float64)), 0)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error <= TRITON_TOLERANCE[kind], f"{error:.1e}"


@pytest.mark.parametrize("channels", [(1, 8), (20, 20)])
def test_a_tie_in_the_pool_goes_to_the_first_maximum(channels):
    """Images and weights of -1, 0 and 1 make many windows with equal maxima, and maxima that are exactly zero."""
    x, weights, *others = draw(16, 1, 2, 6, 8, channels)
    check((np.sign(np.round(x)), [np.sign(np.round(2 * w)) for w in weights], *others), 0.1)


def test_nothing_is_left_unwritten(monkeypatch):
    """Every buffer starts as NaN, so a value that no program wrote would show."""
    arguments = draw(5, 2, 3, 7, 9, (3, 6, 20), biased=True)
    empty, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poisoned(make):
        def call(*args, **options):
            made = make(*args, **options)
            return made.fill_(float("nan") if made.is_floating_point() else 127)

        return call

    monkeypatch.setattr(torch, "empty_like", poisoned(empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    check(arguments, 0.1)


def test_two_runs_are_bit_identical():
    """Sums are in one order: the same call gives the same bits."""
    arguments = draw(6, 2, 3, 9, 8, (3, 8, 20), biased=True)
    _, _, g, g_statistics = run_reference(arguments, 0.1, 6)
    first, second = (flatten(run_triton(arguments, 0.1, g, g_statistics)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("width", [8, 64])
def test_launches(width, monkeypatch):
    """Forward and backward of the four-block net launch 14 kernels; the bar is 24."""
    launches = []
    run = triton_launch.run

    def counted(kernel, *arguments, **options):
        launches.append(kernel)
        return run(kernel, *arguments, **options)

    for name in ("mini_ht.kernels.triton_launch.run", "mini_ht.kernels.triton_launch_backward.run"):
        monkeypatch.setattr(name, counted)
    check(draw(8, 1, 1, 16, 16, (1, *[width] * 4)), used=False, wants_x=False)
    assert len(launches) == 14, launches


def test_strides_do_not_matter():
    """Tensors that lie in memory in another order give the same output."""
    x, weights, gammas, betas, _, _ = convert(draw(9, 2, 2, 6, 5, (3, 8)), lambda a: torch.tensor(a, device=DEVICE))
    wanted, _ = conv_block(x, weights[0], gammas[0], betas[0], impl="triton")
    x, weight = x.transpose(1, 3).contiguous().transpose(1, 3), weights[0].mT.contiguous().mT
    found, _ = conv_block(x, weight, gammas[0], betas[0], impl="triton")
    assert torch.equal(found, wanted)


def test_masked_statistics_are_left_to_torch():
    """A mask without given statistics takes the torch path; with given ones it changes nothing."""
    x, weights, gammas, betas, _, statistics = convert(
        draw(10, 2, 3, 6, 5, (3, 8), given_statistics=True), lambda a: torch.tensor(a, device=DEVICE)
    )
    mask = torch.tensor([[True, True, False], [True, False, True]], device=DEVICE)
    for given_statistics in (None, statistics):
        both = [
            conv_stack(x, weights, gammas, betas, None, given_statistics, mask, impl=i)[0] for i in ("triton", "torch")
        ]
        assert relative_error(*both) <= TRITON_TOLERANCE["float32" if DEVICE == "cpu" else "tf32"]


def test_clear_errors():
    """A second derivative, a wrong dtype, shape, device or precision say what is wanted."""
    tensors = convert(draw(11, 1, 2, 6, 5, (3, 8)), lambda a: torch.tensor(a, device=DEVICE, requires_grad=True))
    x, (weight,), (gamma,), (beta,), _, _ = tensors
    y, _ = conv_block(x, weight, gamma, beta, impl="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(InputError, match="no second derivative"):
        torch.autograd.grad(dx.sum(), x)
    cases = [
        ((x.double(), weight), "x is torch.float64; wanted float32"),
        ((x[0], weight), "wanted a dense"),
        ((x[:, :, :1], weight), "images of 1 x 5"),
        ((x, weight[:, :2]), "weight 1 has shape"),
        ((x, weight.int()), "weight 1 is torch.int32"),
    ]
    for (images, filters), message in cases:
        with pytest.raises(InputError, match=message):
            conv_block(images, filters, gamma, beta, impl="triton")
    with pytest.raises(InputError, match="precision is 'exact'"):
        triton_conv.conv_stack(x, [weight], [gamma], [beta], None, None, 0.0, NORM_EPS, "exact")
    with pytest.raises(InputError, match="cannot compute on a ndarray"):
        implementation("triton", np.zeros(1))


def test_torch_compile_takes_the_ops():
    """torch.compile traces through forward and backward without a graph break, and the numbers stay."""
    tensors = convert(draw(12, 1, 2, 6, 5, (3, 8)), lambda a: torch.tensor(a, device=DEVICE, requires_grad=True))
    x, weights, gammas, betas, _, _ = tensors

    def loss(x, weight):
        y, statistics = triton_conv.conv_stack(x, [weight], gammas, betas, None, None, 0.0, NORM_EPS, "ieee")
        return y.square().sum() + statistics[0][0].sum()

    plain = torch.autograd.grad(loss(x, *weights), [x, *weights])
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for mine, other in zip(torch.autograd.grad(compiled(x, *weights), [x, *weights]), plain, strict=True):
        assert relative_error(mine, other) <= TRITON_TOLERANCE["float32"]


def test_autocast_stores_half_values():
    """Under autocast float32 images become its dtype; statistics and gradients of weights stay float32."""
    tensors = convert(draw(13, 1, 2, 6, 5, (3, 8)), lambda a: torch.tensor(a, device=DEVICE, requires_grad=True))
    x, weights, gammas, betas, _, _ = tensors
    with torch.autocast(DEVICE, torch.bfloat16):
        y, statistics = conv_stack(x, weights, gammas, betas, impl="triton")
    assert y.dtype == torch.bfloat16 and statistics[0][0].dtype == torch.float32
    gradients = torch.autograd.grad(y.float().sum(), [x, *weights])
    assert [g.dtype for g in gradients] == [torch.float32] * 2


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["tf32", "bf16x3", "ieee", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("channels", "size"),
    [((1, 8), 28), ((8, 8), 14), ((16, 16), 14), ((3, 32), 84), ((32, 32), 42), ((1, 64), 28), ((64, 64), 14)],
)
def test_full_size_blocks_on_a_gpu(channels, size, kind):
    """Blocks of training size in every precision, by the norm of the error.

    Images and weights are multiples of 1/8, so that every product is exact and no maximum depends on rounding.
    """
    x, (weight,), *others = draw(14, 2, 80, size, size, channels)
    arguments = np.round(x * 8) / 8, [np.round(weight * 8) / 8], *others
    wanted, wanted_gradients, g, _ = run_reference(arguments, 0.0, 14, used=False)
    dtype, precision = (getattr(torch, kind), "tf32") if kind in ("float16", "bfloat16") else (torch.float32, kind)
    found, gradients = run_triton(arguments, 0.0, g, None, dtype, precision=precision)
    for mine, other in zip([found[0], *gradients], [wanted[0], *wanted_gradients], strict=True):
        error = np.linalg.norm(mine - other) / max(np.linalg.norm(other), 1e-30)
        assert error <= TRITON_TOLERANCE[kind], f"{error:.1e}"
