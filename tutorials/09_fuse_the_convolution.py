r"""
09 Fuse the convolution: count bytes first
==========================================

**What you will do.** Convolve many episodes at once, each with its own weights. Count the bytes that a block moves,
predict from them what a fused kernel gains on a GPU, and run that kernel in an interpreter.

**What you will learn.** Why a small CNN waits for memory and not for arithmetic; what fusing is, and which two facts
allow it here; how to predict a speed-up before there is a kernel.

**What you need.** NumPy, and to have met convolution, max-pooling and batch norm. torch for the second half.

A HyperTransformer writes one CNN for each task. Training runs dozens of tasks side by side, so the convolution has
other weights for every episode. Libraries are slow at that. Here is why, and what to do.
"""

import os
import statistics
import time
from functools import partial
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
rng = np.random.default_rng(0)

# %%
# A convolution is a matrix product
# ---------------------------------
# Lay the 3 x 3 neighbourhood of every pixel out as a row of :math:`9 C_{in}` numbers. The convolution is these rows
# times a matrix of shape ``[9 Cin, Cout]``. ``conv2d`` does that, with one weight for all images. With other weights
# for every episode, the first idea is a loop.

E, N, H, Cin, Cout = 3, 4, 28, 1, 8
x = rng.random((E, N, H, H, Cin))
weight = rng.standard_normal((E, 3, 3, Cin, Cout)) / 3


def conv_in_a_loop(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x [E, N, H, W, Cin], weight [E, 3, 3, Cin, Cout] -> [E, N, H, W, Cout]."""
    return np.stack([conv2d(x[e], weight[e], np.zeros(weight.shape[-1]), padding=1) for e in range(len(x))])


y = conv_in_a_loop(x, weight)

# %%
# But a stack of matrix products is one call: ``[E, rows, 9 Cin] @ [E, 9 Cin, Cout]``.

rows = neighbourhoods(x.reshape(E * N, H, H, Cin), 3, stride=1, padding=1)  # [E * N, H, W, 9 Cin]
at_once = rows.reshape(E, -1, 9 * Cin) @ weight.reshape(E, 9 * Cin, Cout)  # [E, N * H * W, Cout]
assert np.allclose(at_once.reshape(y.shape), y)

# %%
# torch knows this as a *grouped* convolution. Put the channels of all episodes side by side; with ``groups=E``, those
# of group e only meet the filters of group e.

images = torch.from_numpy(x).permute(1, 0, 4, 2, 3).flatten(1, 2)  # [N, E * Cin, H, W]
filters = torch.from_numpy(weight).permute(0, 4, 3, 1, 2).flatten(0, 1)  # [E * Cout, Cin, 3, 3]
in_groups = F.conv2d(images, filters, padding=1, groups=E)  # [N, E * Cout, H, W]
assert np.allclose(in_groups.unflatten(1, (E, Cout)).permute(1, 0, 3, 4, 2).numpy(), y)

# %%
# The block, one operation after the other
# ----------------------------------------
# A block of the generated CNN is conv, ReLU, 2 x 2 max-pool and batch norm over the images of the episode. Written like
# this, every line reads an array from memory and writes one.


def spread(vector: np.ndarray) -> np.ndarray:
    """[E, C] -> [E, 1, 1, 1, C]."""
    return vector[:, None, None, None]


active = np.maximum(y, 0)  # [E, N, H, W, Cout]
pooled = active.reshape(E, N, H // 2, 2, H // 2, 2, Cout).max((3, 5))  # [E, N, H / 2, W / 2, Cout]
mean, variance = pooled.mean((1, 2, 3)), pooled.var((1, 2, 3))  # [E, Cout]
gamma, beta = np.ones(Cout), np.zeros(Cout)
scale = gamma / np.sqrt(variance + NORM_EPS)  # [E, Cout]
shift = beta - mean * scale  # [E, Cout]
z = pooled * spread(scale) + spread(shift)  # [E, N, H / 2, W / 2, Cout]
assert np.allclose(conv_block(x, weight, gamma, beta)[0], z)

# %%
# Count the bytes
# ---------------
# Let :math:`x, y, p` be how many numbers the input, the conv's output and the pooled output hold, with :math:`s` bytes
# each (2 in bfloat16). Forward, conv reads :math:`x` and writes :math:`y`. ReLU reads and writes :math:`y`. The pool
# reads :math:`y`, writes :math:`p`, and remembers in 8 bytes which pixel won. The norm reads :math:`p` twice, for its
# statistics and to apply them, and writes :math:`z`.
#
# Backward, the norm reads the gradient and :math:`p` twice and writes. The pool writes a gradient as large as
# :math:`y`; ReLU reads that and its own output and writes another. The conv reads it, and :math:`x`, for the gradient
# of its weights. It reads it once more to write the gradient of its input, which nobody needs of the first images.
#
# The project's kernels read :math:`x` and write :math:`p` and one byte for the winner. That is all of forward. The
# gradient of the weights reads the arriving one, :math:`p`, that byte and :math:`x`, and writes what is left of it
# behind the norm, as large as :math:`p`. That of the input reads this, the byte and :math:`x`, and is written.


def block_bytes(net: Problem, s: int) -> list[dict[str, float]]:
    """Bytes that a step moves, forward and backward, for each block: by operation, and fused."""
    blocks = []
    count = net.episodes * net.images
    for k, (size, inputs, outputs) in enumerate(net.blocks):
        x, y, p = count * size**2 * inputs, count * size**2 * outputs, count * (size // 2) ** 2 * outputs
        gradient = p * (2 * s + 1) + x * s
        block = {
            "conv": (x + y) * s + (x + y) * s + (k > 0) * (y + x) * s,
            "ReLU": 2 * y * s + 3 * y * s,
            "pool": (y + p) * s + 8 * p + (p + y) * s + 8 * p,
            "norm": 3 * p * s + 5 * p * s,
            "fused": x * s + p * (s + 1) + gradient + (k > 0) * (gradient + x * s),
        }
        blocks.append(block)
    return blocks


omniglot = Problem("omniglot", episodes=64, images=80, size=28, inputs=1, channels=8)
counted = block_bytes(omniglot, s=2)
before = sum(sum(block.values()) - block["fused"] for block in counted)
after = omniglot.bytes(2)["both"]  # the project's own count: ours, and the norm behind the last block
assert 1 < after / sum(block["fused"] for block in counted) < 1.05
print(f"64 episodes: {before / 1e6:.0f} MB unfused, {after / 1e6:.0f} MB fused, ratio {before / after:.1f}")
assert before / after > 5


# %%
def draw_bytes(net: Problem, counted: list[dict[str, float]]) -> plt.Figure:
    """For each block two bars: the operations of the unfused step stacked, and the fused step."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    place, below = np.arange(len(counted)), np.zeros(len(counted))
    colours = {"conv": "#0072B2", "ReLU": "#E69F00", "pool": "#009E73", "norm": "#CC79A7", "fused": "#D55E00"}
    for name, colour in colours.items():
        height = np.array([block[name] for block in counted]) / 1e6
        at, start, label = (place + 0.2, 0, "all four, fused") if name == "fused" else (place - 0.2, below, name)
        bars = axes.bar(at, height, 0.36, start, color=colour, label=label)
        below = below + height
        if name in ("norm", "fused"):
            tops = height if name == "fused" else below
            axes.bar_label(bars, [f"{top:.0f}" for top in tops], padding=2, fontsize=9)
    names = [f"block {k}\n{size} x {size}, {cin} to {cout}" for k, (size, cin, cout) in enumerate(net.blocks, 1)]
    axes.set(xticks=place, xticklabels=names, ylabel="MB moved in a step")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


draw_bytes(omniglot, counted)

# %%
# Most of it is the first block: one channel becomes eight at full resolution, and nine times an array of that size
# passes through memory. In the fused kernel it never does. The four values of a pooling window stay in registers.
#
# Bytes or FLOPs?
# ---------------
# Fewer bytes only help a program that waits for them. A device with bandwidth :math:`B` and arithmetic speed :math:`F`
# needs
#
# .. math::
#
#    \mathrm{time} \geq \max\left(\frac{\mathrm{bytes}}{B}, \frac{\mathrm{FLOPs}}{F}\right)
#
# This is the *roofline*. The two numbers of each GPU stand in its data sheet; nobody has measured them here.

flops = omniglot.flops()["both"]
for device, bandwidth, speed in (("H100 SXM", 3.35e12, 989e12), ("H200", 4.8e12, 989e12)):  # bytes/s, bfloat16 FLOP/s
    memory, kept, arithmetic = (1e6 * part for part in (before / bandwidth, after / bandwidth, flops / speed))
    print(f"{device}: memory {memory:.0f} us unfused, {kept:.0f} us fused; arithmetic {arithmetic:.0f} us")
    assert kept > 2 * arithmetic

# %%
# The net waits for memory, even fused. So the prediction for a GPU is the ratio of bytes. A surprise would have a
# meaning. Less: the kernels do not reach the bandwidth, or their 14 launches of some microseconds each show. More: the
# grouped convolution itself is slow, as those with eight channels are known to be. And a compiler that joins ReLU and
# pool moves less than our plain count: against it the gain is smaller.
#
# Two facts that allow fusing
# ---------------------------
# **ReLU never decreases**, so it may wait until after the maximum. Then conv and pool share a kernel, and ReLU works on
# a quarter of the numbers. The result is equal to the bit.

four = window_outputs(x, weight)  # [E, N, H / 2, W / 2, 4, Cout]: the four conv outputs of each pooling window
assert (np.maximum(four, 0).max(-2) == np.maximum(four.max(-2), 0)).all()
assert np.allclose(np.maximum(conv_max_pool(x, weight), 0), pooled)

# %%
# **The norm is two numbers a channel**, ``scale`` and ``shift``. The next block applies them while it reads, so ``z``
# is never written. There is one trap. The next conv pads with zeros, and these are zeros of :math:`z`, not of
# :math:`p`. Which outputs are wrong if we forget? Those whose neighbourhood leaves the image: of 14 x 14 pixels all but
# the inner 12 x 12, a share of 52 / 196.

next_weight = rng.standard_normal((E, 3, 3, Cout, Cout))
right = conv_in_a_loop(z, next_weight)  # pads z
careless = np.pad(pooled, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))  # pads p, and then applies the norm
careless = careless * spread(scale) + spread(shift)
wrong = np.stack([conv2d(careless[e], next_weight[e], np.zeros(Cout)) for e in range(E)])
share = (np.abs(wrong - right).max(-1) > 1e-9).mean()
print(f"wrong outputs: {share:.3f}, predicted {52 / 196:.3f}")
assert share == 52 / 196

# %%
# One more idea fits the product to the hardware. The four conv outputs of a pooling window see 4 x 4 pixels between
# them. Take these as a row, and all four places as columns, with zeros where a place does not look. A pixel is then
# loaded 4 times instead of 9, and the maximum is one over neighbours. The price: 9 of 16 weights are used, the others
# are zeros, so there are 16 / 9 as many products. Where arithmetic is idle, that is cheap.

matrix = window_weight(weight)  # [E, 16 * Cin, 4 * Cout]
windows = neighbourhoods(x.reshape(E * N, H, H, Cin), 4, stride=2, padding=1)  # [E * N, H / 2, W / 2, 16 * Cin]
assert np.allclose((windows.reshape(E, -1, 16 * Cin) @ matrix).reshape(four.shape), four)
assert (matrix != 0).mean() == 9 / 16

# %%
# Who computes
# ------------
# ``conv_block`` is one block, ``conv_stack`` several, with one signature for all libraries. ``implementation`` says who
# computes on an array. NumPy is the *reference*, short enough to be checked by eye. torch takes grouped convolutions,
# channels last. CUDA tensors go to Triton kernels. All must agree; we take two blocks.

net = Problem("two blocks", episodes=4, images=2, size=16, inputs=1, channels=4)
images, *parameters = net.draw("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
parameters = [part[:2] for part in parameters]  # weights, gammas, betas
exact = [[array.detach().double().cpu().numpy() for array in part] for part in ([images], *parameters)]
reference, _ = conv_stack(exact[0][0], *exact[1:])  # float64
print([implementation("auto", array).__name__ for array in (exact[0][0], images)])


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    """Largest difference, relative to the largest number."""
    return float(np.abs(found.detach().double().cpu().numpy() - wanted).max() / np.abs(wanted).max())


benchmark.set_products("fp32")  # on a GPU, do not round products
for way in (loop, grouped(torch.contiguous_format), torch_path):
    assert error(way(images, *parameters), reference) < 1e-5

# %%
# A prediction for this CPU
# -------------------------
# What does grouping gain *here*? A loop moves the same bytes and does the same FLOPs. It only makes more calls.

calls = []
for way in (loop, torch_path):
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as conv:
        way(images, *parameters)
    calls.append(conv.call_count)
assert calls == [2 * 4, 2]  # blocks times episodes, and blocks

# %%
# So cut 64 images into more and more episodes. Grouped time should hardly change, and the loop's should be a straight
# line: work plus calls. We fit the line on up to 8 episodes and predict 32. Time is the CPU's own, as other programs
# may run beside; the two take turns; we take medians. Start Python with ``OMP_NUM_THREADS=1`` for this: on arrays so
# small, several threads mostly wait for each other, and you would measure that.


def medians(episodes: int, turns: int = 30 if os.environ.get("TUTORIAL_SIZE") == "full" else 9) -> list[float]:
    """Milliseconds of CPU for one forward pass of 64 images, in a loop over episodes and in groups."""
    arguments = Problem("four blocks", episodes, 64 // episodes, 28, 1, 8).draw("cpu", torch.float32)
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for turn in range(2 * turns):
            start = time.process_time()
            (loop, torch_path)[turn % 2](*arguments)
            times[turn % 2].append(1e3 * (time.process_time() - start))
    return [statistics.median(part) for part in times]


few = (2, 4, 8)
slope, start = np.polyfit(few, [medians(episodes)[0] for episodes in few], 1)
in_loop, together = medians(32)
print(f"32 episodes: loop {in_loop:.1f} ms (predicted {start + 32 * slope:.1f}), groups {together:.1f} ms")

# %%
# The line holds roughly; on a busy machine it may miss by a third, so we print it and assert only what we counted.
# Grouping gains fewer calls here, and that fades when each episode brings more images. Bytes hardly matter, as 64
# images fit into a cache. So a CPU says nothing about the speed of the fused kernel. It can say whether the kernel is
# *right*.
#
# The fused kernel, in an interpreter
# -----------------------------------
# Triton kernels are Python functions that a compiler turns into GPU code. With ``TRITON_INTERPRET=1`` in the
# environment, before triton is imported, they run as Python on a CPU: slowly, one program after the other. We hold the
# output and all gradients against NumPy's, which are derived by hand and computed in float64.

if has_triton():
    y, _ = conv_stack(images, *parameters, impl="triton")
    arriving = rng.standard_normal(y.shape)  # the loss's gradient in y
    leaves = [leaf for part in parameters for leaf in part]
    gradients = torch.autograd.grad(y, leaves, torch.tensor(arriving).to(y))
    blocks = stack_backward(exact[0][0], *exact[1:], None, None, 0.0, NORM_EPS, arriving)
    wanted = [getattr(block, name) for name in ("weight", "gamma", "beta") for block in blocks]
    worst = max(error(*pair) for pair in zip(gradients, wanted, strict=True))
    print(f"relative error: forward {error(y, reference):.1e}, worst of {len(leaves)} gradients {worst:.1e}")
    assert max(error(y, reference), worst) < 1e-5
else:
    print("triton is not installed: pip install 'mini_ht[gpu]'")

# %%
# On a GPU
# --------
# The kernels have not been measured on a GPU yet: the times above are arithmetic. On a machine with one, this cell
# tests the prediction with the project's benchmark functions, each pass as a CUDA graph. ``make gpu`` measures
# everything.

if torch.cuda.is_available() and has_triton():
    benchmark.set_products("bf16")
    many = omniglot.draw("cuda", torch.bfloat16)
    ways = (grouped(torch.channels_last), fused)
    plain, ours = (benchmark.cuda_seconds(partial(benchmark.steps, way, many), "both") for way in ways)
    share = after / benchmark.ceilings("bf16")[0] / ours  # of the speed of a large copy
    print(f"{plain / ours:.1f} times faster, bytes predict {before / after:.1f}; {share:.0%} of the bandwidth")
else:
    print(f"not measured: no CUDA device here. Predicted: {before / after:.1f} times; `make gpu` measures it.")

# %%
# Exercises
# ---------
# Write them into ``tutorials/exercises/exercise_09.py``; ``pytest -m exercise tutorials/exercises/exercise_09.py``
# checks them.
#
# **1. No groups.** Somebody wants one ordinary convolution from all :math:`E C_{in}` channels to all :math:`E C_{out}`.
# Build its weight, in which no episode meets another. What share of its products is useful?
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
# **2. Norm without z.** Compute the next block's pooled conv from ``pooled``, ``scale`` and ``shift`` alone: put the
# scale into the weights. What does the shift add to each output, and what at the border?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def next_conv_max_pool(pooled, scale, shift, weight):
#           # The shift is a conv, too: of a map of ones, which 'same' padding surrounds with zeros.
#           scaled = window_outputs(pooled, weight * scale[:, None, None, :, None])
#           ones = np.ones((len(pooled), 1, *pooled.shape[2:4], 1))
#           moved = (weight * shift[:, None, None, :, None]).sum(3, keepdims=True)  # [E, 3, 3, 1, Cout]
#           return (scaled + window_outputs(ones, moved)).max(-2)
#
# **3. Where arithmetic takes over.** From which number of channels on, of those offered, does the fused Omniglot net
# wait for arithmetic on a given device?
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
