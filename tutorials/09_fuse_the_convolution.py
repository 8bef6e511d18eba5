r"""
09 Fuse the convolution: count bytes first
==========================================

**What you will do.** Convolve many episodes at once, each with its own weights. Count the bytes that a block moves through
memory, predict from them what a fused kernel gains, and run that kernel in an interpreter.

**What you will learn.** Why a small CNN waits for memory and not for arithmetic; what fusing does, and which two facts
allow it here; how to predict a speed-up before writing a kernel.

**What you need.** NumPy, and to have met convolution, max-pooling and batch norm. torch for the second half.

A HyperTransformer writes one CNN for each task. Training runs dozens of tasks side by side, so the convolution has other
weights for every episode. Libraries are slow at that. Here is why, and what to do.
"""

import os
import statistics
import time
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from mini_ht.kernels import benchmark
from mini_ht.kernels.alternatives import fused, grouped, loop, torch_path
from mini_ht.kernels.block import NORM_EPS, conv2d, conv_block, conv_stack, has_triton, implementation
from mini_ht.kernels.problems import Problem
from mini_ht.kernels.reference import conv_max_pool, neighbourhoods, window_outputs, window_weight
from mini_ht.kernels.reference_backward import stack_backward

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which nothing above does
full = os.environ.get("TUTORIAL_SIZE") == "full"
rng = np.random.default_rng(0)

# %%
# A convolution is a matrix product
# ---------------------------------
# Lay the 3 x 3 neighbourhood of every pixel out as a row of :math:`9 C_{in}` numbers. The convolution is these rows times
# a matrix :math:`[9 C_{in}, C_{out}]`. ``conv2d`` does that, with one weight for all images.
#
# With other weights for every episode, the first idea is a loop.

E, N, H, Cin, Cout = 3, 4, 28, 1, 8
x = rng.random((E, N, H, H, Cin))
weight = rng.standard_normal((E, 3, 3, Cin, Cout)) / 3


def conv_in_a_loop(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x [E, N, H, W, Cin], weight [E, 3, 3, Cin, Cout] -> [E, N, H, W, Cout]."""
    return np.stack([conv2d(x[e], weight[e], np.zeros(weight.shape[-1]), padding=1) for e in range(len(x))])


y = conv_in_a_loop(x, weight)
print(x.shape, "->", y.shape)

# %%
# A stack of matrix products is one call, to NumPy as to every library: ``[E, rows, 9 Cin] @ [E, 9 Cin, Cout]``.

rows = neighbourhoods(x.reshape(E * N, H, H, Cin), 3, stride=1, padding=1)  # [E * N, H, W, 9 Cin]
at_once = rows.reshape(E, -1, 9 * Cin) @ weight.reshape(E, 9 * Cin, Cout)  # [E, N * H * W, Cout]
assert np.allclose(at_once.reshape(y.shape), y)

# %%
# Groups
# ------
# torch knows this as a *grouped* convolution. Put all episodes' channels side by side; with ``groups=E`` the channels of
# group e only meet the filters of group e.

images = torch.from_numpy(x).permute(1, 0, 4, 2, 3).flatten(1, 2)  # [N, E * Cin, H, W]
filters = torch.from_numpy(weight).permute(0, 4, 3, 1, 2).flatten(0, 1)  # [E * Cout, Cin, 3, 3]
in_groups = F.conv2d(images, filters, padding=1, groups=E)  # [N, E * Cout, H, W]
assert np.allclose(in_groups.unflatten(1, (E, Cout)).permute(1, 0, 3, 4, 2).numpy(), y)

# %%
# The block, one operation after the other
# ----------------------------------------
# A block of the generated CNN is conv, ReLU, 2 x 2 max-pool, batch norm over the images of its own episode. Written like
# this, every line reads an array from memory and writes one.

active = np.maximum(y, 0)  # [E, N, H, W, Cout]
pooled = active.reshape(E, N, H // 2, 2, H // 2, 2, Cout).max((3, 5))  # [E, N, H / 2, W / 2, Cout]
mean, variance = pooled.mean((1, 2, 3)), pooled.var((1, 2, 3))  # [E, Cout]
gamma, beta = np.ones(Cout), np.zeros(Cout)
scale = gamma / np.sqrt(variance + NORM_EPS)  # [E, Cout]
shift = beta - mean * scale  # [E, Cout]


def spread(vector: np.ndarray) -> np.ndarray:
    """[E, C] -> [E, 1, 1, 1, C]."""
    return vector[:, None, None, None]


z = pooled * spread(scale) + spread(shift)  # [E, N, H / 2, W / 2, Cout]
assert np.allclose(conv_block(x, weight, gamma, beta)[0], z)

# %%
# Count the bytes
# ---------------
# Say a number takes :math:`s` bytes; 2 in bfloat16. Let :math:`x, y, p` be how many numbers the input, the conv's output
# and the pooled output hold. Read each line above again:
#
# - conv reads :math:`x`, writes :math:`y`; ReLU reads and writes :math:`y`;
# - pool reads :math:`y`, writes :math:`p` and, for the way back, which of four pixels won: 8 bytes in torch;
# - norm reads :math:`p` for its statistics, reads it again, and writes :math:`z`.
#
# The way back mirrors it: the norm reads gradient and :math:`p` twice and writes; pool and ReLU write a gradient of the
# size of :math:`y` each; the conv's gradient reads it twice, once for the weights and once for the input.


def unfused_bytes(problem: Problem, s: int) -> list[dict[str, float]]:
    """Bytes that each operation of each block moves, forward and backward, with s bytes a number."""
    blocks = []
    for k, (size, inputs, outputs) in enumerate(problem.blocks):
        count = problem.episodes * problem.images
        x, y, p = count * size**2 * inputs, count * size**2 * outputs, count * (size // 2) ** 2 * outputs
        to_input = (y + x) * s if k else 0  # nobody wants the gradient of the first images
        blocks.append(
            {
                "conv": (x + y) * s + (x + y) * s + to_input,
                "ReLU": 2 * y * s + 3 * y * s,
                "pool": (y + p) * s + 8 * p + (p + y) * s + 8 * p,
                "norm": 3 * p * s + 5 * p * s,
            }
        )
    return blocks


def fused_bytes(problem: Problem, s: int) -> list[float]:
    """The same for the project's kernels: they read x and write p and a one-byte code; see kernels/README.md."""
    blocks = []
    for k, (size, inputs, outputs) in enumerate(problem.blocks):
        count = problem.episodes * problem.images
        x, p = count * size**2 * inputs, count * (size // 2) ** 2 * outputs
        forward, gradient = x * s + p * (s + 1), p * (2 * s + 1) + x * s  # a gradient reads g, p, the code and x
        blocks.append(forward + gradient + (gradient + x * s if k else 0))  # of weights, and of the input
    return blocks


omniglot = Problem("omniglot", episodes=64, images=80, size=28, inputs=1, channels=8)
unfused, kept = unfused_bytes(omniglot, s=2), fused_bytes(omniglot, s=2)
before = sum(sum(block.values()) for block in unfused)
after = omniglot.bytes(2)["both"]  # the project's own count: ours, and the last block's norm
assert 1 < after / sum(kept) < 1.05
print(f"one step of 64 episodes: {before / 1e6:.0f} MB unfused, {after / 1e6:.0f} MB fused, ratio {before / after:.1f}")
assert before / after > 5

# %%
# Most of it is the first block: 28 x 28 pixels of one channel become 28 x 28 pixels of eight, and arrays of that size pass
# through memory nine times. In the fused kernel they never do: the four values of a pooling window stay in registers.


def draw_bytes(unfused: list[dict[str, float]], kept: list[float]) -> plt.Figure:
    """For each block two bars: the operations of the unfused step stacked, and the fused step."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    place, below = np.arange(len(unfused)), np.zeros(len(unfused))
    colours = {"conv": "#0072B2", "ReLU": "#E69F00", "pool": "#009E73", "norm": "#CC79A7"}
    for name, colour in colours.items():
        height = np.array([block[name] for block in unfused]) / 1e6
        axes.bar(place - 0.2, height, 0.36, below, color=colour, label=f"unfused: {name}")
        below += height
    axes.bar(place + 0.2, np.array(kept) / 1e6, 0.36, color="#D55E00", label="fused: all four")
    for at, (high, low) in enumerate(zip(below, np.array(kept) / 1e6, strict=True)):
        axes.text(at - 0.2, high + 8, f"{high:.0f}", ha="center", fontsize=9)
        axes.text(at + 0.2, low + 8, f"{low:.0f}", ha="center", fontsize=9)
    names = [f"block {k}\n{size} x {size}, {cin} to {cout}" for k, (size, cin, cout) in enumerate(omniglot.blocks, 1)]
    axes.set(xticks=place, xticklabels=names, ylabel="MB, forward and backward")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


draw_bytes(unfused, kept)

# %%
# Bytes or FLOPs?
# ---------------
# Fewer bytes only help a kernel that waits for them. A device with bandwidth :math:`B` and arithmetic speed :math:`F` needs
#
# .. math::
#
#    \mathrm{time} \geq \max\left(\frac{\mathrm{bytes}}{B}, \frac{\mathrm{FLOPs}}{F}\right)
#
# This is the *roofline*. The numbers below stand in NVIDIA's data sheets; nobody has measured them here.

DEVICES = {"H100 SXM": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}  # bytes/s; bfloat16 FLOP/s, dense
flops = omniglot.flops()["both"]
for device, (bandwidth, speed) in DEVICES.items():
    times = [1e6 * part for part in (before / bandwidth, after / bandwidth, flops / speed)]
    print(f"{device}: unfused {times[0]:.0f} us, fused {times[1]:.0f} us of memory; {times[2]:.0f} us of arithmetic")
    assert times[1] > 2 * times[2]

# %%
# So the net waits for memory, fused as well as unfused, and the prediction for a GPU is the ratio of bytes. Surprise
# in either direction has a meaning. A smaller ratio: the kernel does not reach the bandwidth, or the launch of 23 kernels,
# some microseconds each, shows. A larger one: the unfused convolution itself is slow, as grouped ones with eight channels are.
# And our "unfused" is the plainest program: a compiler that joins ReLU and pool has less to move.
#
# More channels mean more FLOPs for each byte. Doubling them doubles the bytes, but the FLOPs of all blocks except the first
# grow fourfold.


def draw_roofline(bandwidth: float, speed: float) -> plt.Figure:
    """FLOP/s that the roofline allows, over FLOPs for each byte; a point for each number of channels."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    span = np.geomspace(0.7, 2000, 200)  # FLOP per byte
    axes.plot(span, np.minimum(span * bandwidth, speed) / 1e12, color="#57606a", linewidth=1)
    for channels in (8, 16, 32, 64):
        net = Problem("omniglot", 64, 80, 28, 1, channels)
        both = sum(sum(block.values()) for block in unfused_bytes(net, 2)), net.bytes(2)["both"]
        marks = ((both[0], "#0072B2", "o", "unfused"), (both[1], "#D55E00", "s", "fused"))
        for moved, colour, marker, name in marks:
            height = min(net.flops()["both"] / moved * bandwidth, speed) / 1e12
            label = name if channels == 8 else None
            axes.plot(net.flops()["both"] / moved, height, marker, color=colour, label=label)
            axes.annotate(channels, (net.flops()["both"] / moved, height), (5, -12), textcoords="offset points")
    axes.axvline(speed / bandwidth, color="#57606a", linestyle=":", linewidth=1)
    axes.text(speed / bandwidth * 1.08, 4, f"{speed / bandwidth:.0f} FLOP per byte:\narithmetic takes over", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="at most, TFLOP/s (data sheet)")
    axes.legend(frameon=False, title="channels at each point")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


draw_roofline(*DEVICES["H200"])

# %%
# Two facts that allow fusing
# ---------------------------
# **ReLU never decreases**, so it may wait until after the maximum. Then conv and pool can share a kernel, and the ReLU works
# on a quarter of the numbers. The result is equal to the bit.

four = window_outputs(x, weight)  # [E, N, H / 2, W / 2, 4, Cout]: the four conv outputs of each pooling window
assert (np.maximum(four, 0).max(-2) == np.maximum(four.max(-2), 0)).all()
assert np.allclose(np.maximum(conv_max_pool(x, weight), 0), pooled)

# %%
# **The norm is two numbers a channel**, ``scale`` and ``shift``. The next block can apply them while it reads, so ``z`` need
# not be written. There is one trap. The next conv pads its input with zeros, and these are zeros of :math:`z`, not of
# :math:`p`. Which outputs are wrong if we forget? Those whose neighbourhood leaves the image: of 14 x 14 pixels all but
# the inner 12 x 12, a share of 52 / 196.

next_weight = rng.standard_normal((E, 3, 3, Cout, Cout))
right = conv_in_a_loop(z, next_weight)  # pads z
padded = np.pad(pooled, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))  # pads p, and then applies the norm
padded = padded * spread(scale) + spread(shift)
careless = np.stack([conv2d(padded[e], next_weight[e], np.zeros(Cout)) for e in range(E)])
share = (np.abs(careless - right).max(-1) > 1e-9).mean()
print(f"wrong outputs: {share:.3f}, predicted {52 / 196:.3f}")
assert share == 52 / 196

# %%
# A pooling window as a row
# -------------------------
# One more idea makes the product fit the hardware. The four conv outputs of a pooling window see 4 x 4 pixels between them.
# So take these 16 pixels as a row, and all four places as columns, with zeros where a place does not look. A pixel is loaded
# 4 times instead of 9, and the maximum is one over neighbours in a row. The price: of each product's numbers only 9 of 16
# are used.

matrix = window_weight(weight)  # [E, 16 * Cin, 4 * Cout]
windows = neighbourhoods(x.reshape(E * N, H, H, Cin), 4, stride=2, padding=1)  # [E * N, H / 2, W / 2, 16 * Cin]
values = windows.reshape(E, -1, 16 * Cin) @ matrix  # [E, windows, 4 * Cout]
assert (matrix != 0).mean() == 9 / 16
assert np.allclose(values.reshape(four.shape).max(-2), conv_max_pool(x, weight))

# %%
# Who computes
# ------------
# ``conv_block`` is one block, ``conv_stack`` all of them, with one signature for every library. ``implementation`` says who
# computes on an array: NumPy has a *reference*, short enough to be checked by eye; torch runs grouped convolutions, channels
# last; CUDA tensors go to Triton kernels, if it is installed.

net = Problem("a small net", episodes=4, images=3, size=32, inputs=1, channels=4)
arguments = net.draw("cpu", torch.float32)  # images, weights, gammas, betas
exact = [[part.detach().double().numpy() for part in parts] for parts in ([arguments[0]], *arguments[1:])]
reference, _ = conv_stack(exact[0][0], *exact[1:])
for name, array in (("NumPy array", exact[0][0]), ("torch tensor on the CPU", arguments[0])):
    print(f"{name}: {implementation('auto', array).__name__}")
assert implementation("auto", arguments[0]).__name__.endswith("torch_conv")


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    """Largest difference, relative to the largest number."""
    return float(np.abs(found.detach().double().cpu().numpy() - wanted).max() / np.abs(wanted).max())


for way in (loop, grouped(torch.contiguous_format), torch_path):
    assert error(way(*arguments), reference) < 1e-5

# %%
# A prediction for this CPU
# -------------------------
# What will grouping gain *here*? A loop moves the same bytes and does the same FLOPs. It only makes more calls: four convs
# for every episode instead of four in all.


def convs(way: benchmark.alternatives.Net, arguments: tuple) -> int:
    """How often the net calls a convolution."""
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as counted:
        way(*arguments)
    return counted.call_count


assert (convs(loop, arguments), convs(torch_path, arguments)) == (4 * 4, 4)

# %%
# So with 64 images in all, cut into more and more episodes, grouped time should stay where it is, and that of the loop should
# be a straight line: work plus calls. We fit the line on up to 8 episodes and predict 32. Time is the CPU's, as other programs
# may run on this machine; both ways take turns; we take medians.


def medians(episodes: int, turns: int = 9) -> dict[str, float]:
    """Seconds of CPU for one forward pass of 64 images, in a loop over episodes and in groups."""
    arguments = Problem("", episodes, 64 // episodes, 28, 1, 8).draw("cpu", torch.float32)
    seconds: dict[str, list[float]] = {"loop": [], "groups": []}
    with torch.no_grad():
        for _ in range(turns):
            for name, way in (("loop", loop), ("groups", torch_path)):
                start = time.process_time()
                way(*arguments)
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


found = {episodes: medians(episodes, 30 if full else 9) for episodes in (1, 2, 4, 8, 32)}
slope, start = np.polyfit([1, 2, 4, 8], [found[episodes]["loop"] for episodes in (1, 2, 4, 8)], 1)
print(f"loop, 32 episodes: predicted {1e3 * (start + 32 * slope):.1f} ms, found {1e3 * found[32]['loop']:.1f} ms")
for episodes, both in found.items():
    print(f"{episodes:2} episodes: the loop takes {both['loop'] / both['groups']:.1f} times as long as groups")

# %%
# The gain here is fewer calls, and it fades when each episode brings much work of its own. Bytes hardly matter: 64 images of
# a small CNN fit into a CPU's cache. This is why a CPU says nothing about the fused kernel's speed. It can say whether the
# kernel is *right*.
#
# The fused kernel, in an interpreter
# -----------------------------------
# Triton kernels are Python functions that a compiler turns into GPU code. With ``TRITON_INTERPRET=1`` in the environment, set
# before triton is imported, they run as Python on a CPU: slowly, one program after the other. We compare output and all
# gradients with NumPy's, which are derived by hand and computed in float64.

images, *parameters = arguments if not torch.cuda.is_available() else net.draw("cuda", torch.float32)
if has_triton():
    benchmark.set_products("fp32")  # on a GPU, no rounding of products
    y, _ = conv_stack(images, *parameters, impl="triton")
    direction = rng.standard_normal(y.shape)  # the gradient that arrives from the loss
    leaves = [leaf for part in parameters for leaf in part]
    gradients = torch.autograd.grad(y, leaves, torch.tensor(direction).to(y))
    blocks = stack_backward(exact[0][0], *exact[1:], None, None, 0.0, NORM_EPS, direction)
    wanted = [getattr(block, name) for name in ("weight", "gamma", "beta") for block in blocks]
    worst = max(error(*pair) for pair in zip(gradients, wanted, strict=True))
    print(f"relative error: forward {error(y, reference):.1e}, worst of {len(leaves)} gradients {worst:.1e}")
    assert error(y, reference) < 1e-5 and worst < 1e-5
else:
    print("triton is not installed here: pip install 'mini_ht[gpu]'")

# %%
# On a GPU
# --------
# Nobody has measured the kernels on a GPU yet: every GPU time above is arithmetic. On a machine with one, this cell measures
# the prediction with the project's benchmark functions, each pass as a CUDA graph, and ``make gpu`` measures everything.

if torch.cuda.is_available() and has_triton():
    benchmark.set_products("bf16")
    many = omniglot.draw("cuda", torch.bfloat16)
    ways = {"fused": fused, "groups": grouped(torch.channels_last)}
    took = {
        name: benchmark.cuda_seconds(lambda way=way: benchmark.steps(way, many), "both") for name, way in ways.items()
    }
    floor = after / benchmark.ceilings("bf16")[0]
    print(f"groups / fused: {took['groups'] / took['fused']:.1f}, bytes predict {before / after:.1f}")
    print(
        f"fused: {1e6 * took['fused']:.0f} us; its bytes alone need {1e6 * floor:.0f} us at the bandwidth of a copy here"
    )
else:
    print(f"not measured: no CUDA device here. Predicted: {before / after:.1f} times; `make gpu` measures it.")

# %%
# Exercises
# ---------
# Write them into ``tutorials/exercises/exercise_09.py``; ``pytest -m exercise tutorials/exercises/exercise_09.py`` checks them.
#
# **1. No groups.** Somebody wants one ordinary convolution from all :math:`E C_{in}` channels to all :math:`E C_{out}`. Build
# its weight, in which no episode meets another. What share of its products is useful?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def one_for_all(weight):
#           # Blocks on a diagonal, zeros elsewhere: one product in E is useful.
#           episodes, _, _, inputs, outputs = weight.shape
#           whole = np.zeros((3, 3, episodes, inputs, episodes, outputs))
#           for e in range(episodes):
#               whole[:, :, e, :, e] = weight[e]
#           return whole.reshape(3, 3, episodes * inputs, episodes * outputs), 1 / episodes
#
# **2. Norm while reading.** Compute the next block's pooled conv from ``pooled``, ``scale`` and ``shift``, without
# ``z``. Mind the border. One way: scale goes into the weights, and what shift adds to each pixel is a convolution of its own.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def next_conv_max_pool(pooled, scale, shift, weight):
#           # A map of ones is padded with zeros: its conv with the shifts knows where the border is.
#           scaled = window_outputs(pooled, weight * scale[:, None, None, :, None])
#           ones = np.ones((len(pooled), 1, *pooled.shape[2:4], 1))
#           moved = (weight * shift[:, None, None, :, None]).sum(3, keepdims=True)
#           return (scaled + window_outputs(ones, moved)).max(-2)
#
# **3. Where arithmetic takes over.** From which number of channels on, of those offered, does the fused Omniglot net wait for
# arithmetic on a given device?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def first_bound_by_arithmetic(channels, bandwidth, speed):
#           for number in sorted(channels):
#               net = Problem("omniglot", 64, 80, 28, 1, number)
#               if net.flops()["both"] / speed > net.bytes(2)["both"] / bandwidth:
#                   return number
#           return None
