"""torch on CUDA: a stack of conv blocks as two custom ops over the Triton kernels, one for each direction.

The ops launch a fixed list of kernels and never wait for the device, so they run under CUDA graphs; registered with
shapes and gradients, they pass through torch.compile. With TRITON_INTERPRET=1 they run on CPU tensors, slowly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mini_ht.errors import InputError
from mini_ht.kernels import triton_launch as launch
from mini_ht.kernels.tiles import LARGEST, read_channels
from mini_ht.kernels.torch_conv import batch_norm, blur_pool, conv2d, conv_max_pool
from mini_ht.kernels.triton_launch_backward import Backward
from mini_ht.kernels.triton_parts import INTERPRETED

# The shared conv, and the block with masked statistics, are torch's.
__all__ = ["batch_norm", "blur_pool", "conv2d", "conv_max_pool", "conv_stack", "supports"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_EPISODES = 2**16 - 1  # CUDA's limit for the second axis of a grid
PRECISIONS = ("tf32", "ieee", "bf16x3")
Statistics = tuple[Tensor, Tensor]


def complaint(x: Tensor, weights: Sequence[Tensor]) -> str:
    """What the kernels cannot compute on, in words; empty if nothing."""
    if not (x.is_cuda or (INTERPRETED.value and x.device.type == "cpu")):
        return f"x is on {x.device}; wanted a CUDA device: take impl='torch'"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; wanted float32, float16 or bfloat16: take impl='torch'"
    if x.ndim != 5 or x.layout != torch.strided or not x.numel():
        return f"x has shape {list(x.shape)} and layout {x.layout}; wanted a dense [E, N, H, W, C] that is not empty"
    episodes, images, height, width, channels = x.shape
    if episodes > MOST_EPISODES:
        return f"x has {episodes} episodes; wanted {MOST_EPISODES} at most: split them, or take impl='torch'"
    for number, weight in enumerate(weights, start=1):
        if weight.shape[:-1] != (episodes, 3, 3, channels) or not 1 <= weight.shape[-1] <= LARGEST >= channels:
            wanted = f"[{episodes}, 3, 3, {channels}, Cout], at most {LARGEST} channels"
            return f"weight {number} has shape {list(weight.shape)}; wanted {wanted}: take impl='torch'"
        if weight.device != x.device or weight.dtype not in DTYPES:
            return f"weight {number} is {weight.dtype} on {weight.device}; wanted half or float32 on {x.device}"
        if min(height, width) < 2:
            return f"block {number} gets images of {height} x {width}; wanted 2 x 2 at least"
        if images * ((height + 1) // 2) * ((width + 1) // 2) > 2**31 - 1024:  # a tile more can be counted
            return f"an episode has {images} images; wanted 2^31 - 1024 pooling windows at most: take fewer images"
        height, width, channels = height // 2, width // 2, weight.shape[-1]
    return ""


def supports(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels compute this stack; what they do not, the torch path does."""
    return not complaint(x, weights)


def default_precision() -> str:
    """How float32 is multiplied: as torch's own convs would, in tf32 unless that is switched off."""
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # was set by torch's newer names
        allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if allowed else "ieee"


def conv_stack(
    x: Tensor, weights: Sequence[Tensor], gammas: Sequence[Tensor], betas: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None, statistics: Sequence[Statistics] | None, slope: float, eps: float,
    precision: str = "",
) -> tuple[Tensor, list[Statistics]]:  # fmt: skip
    """Blocks one after the other, the norm of each in the weights of the next; see `mini_ht.kernels.conv_stack`.

    precision: of float32 products, "tf32", "ieee" or "bf16x3" (three bfloat16 products, near float32); "" asks torch.
    Raises InputError for what the kernels cannot compute on, and when the gradient is to be differentiated.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    problem = complaint(x, weights)
    if problem:
        raise InputError(problem)
    if precision and precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; choose {', '.join(PRECISIONS)}")
    if more := read_channels(x.shape[-1]) - x.shape[-1]:
        x, weights = pad(x, (0, more)), [pad(weights[0], (0, 0, 0, more)), *weights[1:]]
    count = len(weights)
    given = [part for pair in zip(*statistics, strict=True) for part in pair] if statistics else []
    shapes = [(len(weight), weight.shape[-1]) for weight in weights]  # (E, Cout)
    added: list[Tensor] = []
    if biases and any(bias is not None for bias in biases):
        both = zip(biases, weights, shapes, strict=True)
        added = [w.new_zeros(shape) if b is None else b.expand(shape).contiguous() for b, w, shape in both]
    # Kernels do not broadcast: what torch would repeat is repeated here, what does not fit is torch's error.
    small = [[p.float().expand(s[1:]).contiguous() for p, s in zip(ps, shapes, strict=True)] for ps in (gammas, betas)]
    given = [p.float().expand(s).contiguous() for p, s in zip(given, shapes * 2, strict=False)]
    arguments = (x.contiguous(), [weight.contiguous() for weight in weights], *small, added, given)
    results = torch.ops.mini_ht.conv_stack(*arguments, slope, eps, precision)
    if statistics:
        return results[0], list(statistics)
    return results[0], list(zip(results[1 : 1 + count], results[1 + count : 1 + 2 * count], strict=True))


STACK = "Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] biases, Tensor[] statistics"
OPTIONS = "float slope, float eps, str precision"


@torch.library.custom_op("mini_ht::conv_stack", mutates_args=(), schema=f"({STACK}, {OPTIONS}) -> Tensor[]")
def stack_op(x, weights, gammas, betas, biases, statistics, slope, eps, precision):
    """y, then for each block: means and variances unless given, pooled values, codes."""
    options = slope, eps, precision or default_precision()  # asked here, where torch.compile does not trace
    y, blocks = launch.forward(x, weights, gammas, betas, biases, statistics, *options)
    names = ("p", "code") if statistics else ("mean", "variance", "p", "code")
    return [y, *(getattr(block, name) for name in names for block in blocks)]


@stack_op.register_fake
def _(x, weights, gammas, betas, biases, statistics, slope, eps, precision):
    episodes, images, height, width, _ = x.shape
    pooled = []
    for weight in weights:
        height, width = height // 2, width // 2
        pooled.append(x.new_empty(episodes, images, height, width, weight.shape[-1]))
    vectors = 0 if statistics else 2
    small = [x.new_empty(episodes, p.shape[-1], dtype=torch.float32) for _ in range(vectors) for p in pooled]
    codes = [torch.empty_like(p, dtype=torch.int8) for p in pooled]
    return [torch.empty_like(pooled[-1]), *small, *pooled, *codes]


BACK = "Tensor g, Tensor[] g_statistics, Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] biases"
SAVED = "Tensor[] means, Tensor[] variances, Tensor[] pooled, Tensor[] codes, bool own, bool wants_x"


@torch.library.custom_op(
    "mini_ht::conv_stack_backward", mutates_args=(), schema=f"({BACK}, {SAVED}, {OPTIONS}) -> Tensor[]"
)
def stack_backward_op(
    g, g_statistics, x, weights, gammas, betas, biases, means, variances, pooled, codes, own, wants_x, *options
):
    """Sums for gammas and betas [blocks, 2, C], dw, db if biased, d_statistics [E, 2, C] if given, dx if wanted."""
    blocks = [launch.Block(*parts) for parts in zip(means, variances, pooled, codes, strict=True)]
    options = *options[:2], options[2] or default_precision()
    return Backward(g, g_statistics, x, weights, gammas, betas, biases, blocks, own, options)(wants_x)


@stack_backward_op.register_fake
def _(g, g_statistics, x, weights, gammas, betas, biases, means, variances, pooled, codes, own, wants_x, *options):
    widest = max(weight.shape[-1] for weight in weights)
    results = [x.new_empty(len(weights), 2, widest, dtype=torch.float32), *(torch.empty_like(w) for w in weights)]
    results += [torch.empty_like(bias) for bias in biases]
    if not own:
        results += [mean.new_empty(mean.shape[0], 2, mean.shape[1]) for mean in means]
    return [*results, torch.empty_like(x)] if wants_x else results


def remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep what the backward pass reads: arguments, pooled values, codes, and the small vectors."""
    x, weights, gammas, betas, biases, statistics, *ctx.options = inputs
    count = len(weights)
    ctx.set_materialize_grads(False)
    ctx.count, ctx.own, ctx.biased = count, not statistics, bool(biases)
    ctx.save_for_backward(x, *weights, *gammas, *betas, *biases, *statistics, *output[1:])


def gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """From the gradients of all outputs to those of all arguments."""
    count, own = ctx.count, ctx.own
    x, *rest = ctx.saved_tensors
    weights, gammas, betas, *parts = [rest[at : at + count] for at in range(0, len(rest), count)]
    biases = parts.pop(0) if ctx.biased else []
    means, variances, pooled, codes = parts
    g = torch.zeros_like(pooled[-1]) if grads[0] is None else grads[0]
    used = grads[1 : 1 + 2 * count] if own else []
    g_statistics: list[Tensor] = []
    if any(part is not None for part in used):
        vectors = [*means, *variances]
        g_statistics = [torch.zeros_like(v) if part is None else part for part, v in zip(used, vectors, strict=True)]
    wants_x = ctx.needs_input_grad[0]
    sums, *results = torch.ops.mini_ht.conv_stack_backward(
        g.contiguous(), [part.contiguous() for part in g_statistics], x, weights, gammas, betas, biases, means,
        variances, pooled, codes, own, wants_x, *ctx.options,
    )  # fmt: skip
    d_weights, results = results[:count], results[count:]
    d_biases, results = (results[:count], results[count:]) if biases else ([], results)
    d_given, results = ([], results) if own else (results[:count], results[count:])
    d_statistics = [d[:, part] for part in range(2) for d in d_given]
    d_gammas, d_betas = ([sums[k, part, : len(gammas[k])] for k in range(count)] for part in range(2))
    return results[0] if wants_x else None, d_weights, d_gammas, d_betas, d_biases, d_statistics, None, None, None


def refuse(ctx: Any, *grads: Any) -> None:
    """There are no kernels for a second derivative."""
    raise InputError("the Triton conv has no second derivative; take impl='torch' for gradients of gradients")


stack_op.register_autograd(gradients, setup_context=remember)
stack_backward_op.register_autograd(refuse)
