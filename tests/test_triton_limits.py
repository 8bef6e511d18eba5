"""What the Triton path refuses, repeats or asks torch before it launches, and what the benchmark compares it with."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import TRITON_TOLERANCE, relative_error

from mini_ht.kernels import NORM_EPS, conv_stack

if sys.platform != "linux" and importlib.util.find_spec("triton") is None:
    pytest.skip("there is no triton for this system", allow_module_level=True)

from mini_ht.kernels import alternatives, benchmark, triton_conv, triton_launch
from mini_ht.kernels.problems import Problem
from mini_ht.kernels.tiles import LARGEST, choose, reciprocal

pytestmark = pytest.mark.device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = TRITON_TOLERANCE["float32" if DEVICE == "cpu" else "tf32"]


def normal(*shape: int) -> torch.Tensor:
    """Random numbers that are never far from 1, so that they serve as variances, too."""
    return torch.from_numpy(1 + 0.2 * np.random.default_rng(0).standard_normal(shape)).float().to(DEVICE)


@pytest.mark.parametrize("lead", [(1,), ()], ids=["one episode's", "without episodes"])
def test_what_torch_repeats_is_repeated(lead):
    """Statistics for one episode serve all, and a gamma of one channel all channels, with the torch path's results."""
    x, weight = normal(3, 2, 6, 5, 3), normal(3, 3, 3, 3, 8)
    shared = (normal(*lead, 8), normal(*lead, 8) ** 2)
    both = []
    for impl in ("triton", "torch"):
        gamma = normal(1).requires_grad_()
        statistics = [tuple(part.clone().requires_grad_() for part in shared)]
        given_statistics = statistics if impl == "triton" else [tuple(part.expand(3, 8) for part in statistics[0])]
        y, _ = conv_stack(x, [weight], [gamma], [normal(8)], None, given_statistics, impl=impl)
        both.append([y, *torch.autograd.grad(y.square().sum(), [gamma, *statistics[0]])])
    for mine, other in zip(*both, strict=True):
        assert mine.shape == other.shape and relative_error(mine.detach(), other.detach()) <= TOLERANCE


def test_what_does_not_fit_is_not_read():
    """A bias, gamma or statistic of another size is torch's error, and no kernel reads beyond it."""
    x, weight, gamma = normal(2, 2, 6, 5, 3), normal(2, 3, 3, 3, 8), normal(8)
    wrong = {"biases": [normal(3, 8)], "statistics": [(normal(2, 8), normal(2, 4))], "gammas": [normal(7)]}
    for name, parts in wrong.items():
        arguments = {"gammas": [gamma], "betas": [gamma], "biases": None, "statistics": None} | {name: parts}
        with pytest.raises(RuntimeError, match="must match the existing size"):
            conv_stack(x, [weight], **arguments, impl="triton")


@pytest.mark.parametrize("convs", [False, True], ids=["all backends", "cuDNN's convs"])
def test_torch_says_how_float32_is_multiplied(convs):
    """The Triton path follows torch's setting by its newer names, too, also inside what torch.compile traces."""
    if not hasattr(torch.backends.cudnn, "conv") or not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has only the older name")
    place = torch.backends.cudnn.conv if convs else torch.backends
    before = place.fp32_precision
    x, weight, gamma = normal(1, 2, 6, 5, 3), normal(1, 3, 3, 3, 8), normal(8)

    def net(x):
        return triton_conv.conv_stack(x, [weight], [gamma], [gamma], None, None, 0.0, NORM_EPS)[0]

    plain = net(x)
    try:
        for precision in ("ieee", "tf32"):
            place.fp32_precision = precision
            assert triton_conv.default_precision() == precision
            compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
            assert relative_error(compiled(x), plain) <= TRITON_TOLERANCE["tf32"]
    finally:
        place.fp32_precision = before
    assert triton_conv.default_precision() == ("tf32" if torch.backends.cudnn.allow_tf32 else "ieee")


def test_more_episodes_or_windows_than_a_launch_can_count():
    """65,536 episodes, or nearly 2^31 windows of an odd image rounded up, are left to torch with a reason."""
    weight = torch.zeros(1, 3, 3, 1, 4, device=DEVICE)
    many = torch.zeros(1, 1, 2, 2, 1, device=DEVICE).expand(2**16, 1, 2, 2, 1)
    assert "has 65536 episodes" in triton_conv.complaint(many, [weight])
    assert triton_conv.supports(many[:-1], [weight.expand(2**16 - 1, 3, 3, 1, 4)])
    large = torch.zeros(1, 1, 3, 3, 1, device=DEVICE).expand(1, 2**29, 3, 3, 1)
    assert "wanted 2^31 - 1024 pooling windows" in triton_conv.complaint(large[:, 255:], [weight])
    assert triton_conv.supports(large[:, 256:], [weight])


@given(divisor=st.integers(1, 2**20), n=st.integers(0, 2**31 - 1), power=st.integers(0, 30))
@example(divisor=1, n=2**31 - 1, power=30)
def test_a_division_is_one_product(divisor, n, power):
    """n // d == n * f >> s for every n below 2^31, in 64 bits; so next to multiples of d, and for powers of two."""
    for d in (divisor, 2**power, max(1, 2**power - 1)):
        same, factor, shift = reciprocal(d)
        assert same == d and factor < 2**32
        for m in (n, n // d * d, max(0, n // d * d - 1), 2**31 - 1):
            assert m * factor < 2**63 and m * factor >> shift == m // d


of_any_channels = given(
    inputs=st.integers(1, LARGEST),
    outputs=st.integers(1, LARGEST),
    kind=st.sampled_from([("float32", "ieee"), ("float32", "tf32"), ("float32", "bf16x3"), ("bfloat16", "tf32")]),
    hopper=st.booleans(),
)


@of_any_channels
def test_weights_that_are_kept_fit_beside_each_other(inputs, outputs, kind, hopper):
    """What forward and input gradient hold in shared memory over all tiles is 64 KiB at most, of any channels."""
    for job in ("forward", "input"):
        tile = choose(job, inputs, outputs, *kind, hopper)
        count = 64 if tile.form == "window" else 9 if tile.pixels == 16 else 1
        size = 4 if kind[0] == "float32" else 2
        assert count * tile.inputs * tile.outputs * size <= 2**16, (job, tile)


@of_any_channels
def test_products_are_long_enough(inputs, outputs, kind, hopper):
    """Every product sums over 16 values at least, as triton 3.6 wants it."""
    for job in ("forward", "input", "weight"):
        tile = choose(job, inputs, outputs, *kind, hopper)
        channels = tile.outputs if job == "input" else tile.inputs
        length = tile.windows if job == "weight" else channels * (tile.pixels if tile.form == "window" else 1)
        assert length >= 16, (job, tile)


def test_options_of_a_launch():
    """No default of triton decides what a kernel is compiled with."""
    launched: dict[str, object] = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.update(options)

    triton_launch.run(Kernel(), (1,), torch.zeros(1), warps=8)
    assert launched == triton_launch.compiler_options(8, 1) and launched["enable_fp_fusion"] is True


def test_alternatives_are_compiled_for_every_problem(monkeypatch):
    """torch.compile gets every net of every problem, for its shapes alone, and the backward pass can be repeated."""
    compiled, compiler = [], torch.compile

    def backend(graph, inputs):
        compiled.append(all(isinstance(size, int) for part in inputs for size in part.shape))
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda net, mode=None: compiler(net, backend=backend))
    for channels in (4, 5, 6, 7, 8, 9):
        net = alternatives.alternatives(True)["compile"]
        passes = benchmark.steps(net, Problem("small", 2, 2, 16, 1, channels).draw("cpu", torch.float32))
        assert len(passes["backward"]()) == len(passes["backward"]()) == len(passes["both"]()) == 12
        before = len(compiled)
        passes["forward"]()
        assert len(compiled) == before + 1  # without gradients it is another graph
    assert len(compiled) == 12 and all(compiled)


def test_vmap_multiplies_what_is_stored():
    """Under vmap, too, bfloat16 images stay bfloat16 from block to block."""
    arguments = Problem("small", 2, 2, 16, 1, 4).draw("cpu", torch.bfloat16)
    assert alternatives.vmapped(*arguments).dtype == torch.bfloat16
