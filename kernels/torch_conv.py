"""torch on any device: the same convs, with gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """x [B, H, W, Cin], weight [k, k, Cin, Cout], bias [Cout] -> [B, H', W', Cout]."""
    filters = weight.to(x.dtype).permute(3, 2, 0, 1)  # [Cout, Cin, k, k]
    images, filters = torch_layout(x.permute(0, 3, 1, 2), filters)
    y = F.conv2d(images, filters, bias.to(x.dtype), stride=stride, padding=padding)  # [B, Cout, H', W']
    return y.permute(0, 2, 3, 1)  # [B, H', W', Cout]


def conv_max_pool(x: Tensor, weight: Tensor) -> Tensor:
    """conv 3x3 'same', then 2x2 max-pool (valid).

    x [E, N, H, W, Cin], weight [E, 3, 3, Cin, Cout] -> [E, N, h, w, Cout] with h = H // 2, w = W // 2.

    One convolution with a group per episode. A tie in the pool goes to the first maximum.
    """
    episodes, outputs = weight.shape[0], weight.shape[-1]
    filters = weight.to(x.dtype).permute(0, 4, 3, 1, 2).reshape(episodes * outputs, -1, 3, 3)  # [E * Cout, Cin, 3, 3]
    images, filters = torch_layout(episodes_as_channels(x), filters)  # images [N, E * Cin, H, W]
    y = F.conv2d(images, filters, padding=1, groups=episodes)  # [N, E * Cout, H, W]
    return channels_as_episodes(F.max_pool2d(y, 2), episodes)  # [E, N, h, w, Cout]


def blur_pool(x: Tensor) -> Tensor:
    """ReLU, the largest of each 2x2, then 1 2 1 along both axes, a quarter of it, at every second place.

    x [B, H, W, C] -> [B, H // 2, W // 2, C]; beyond the edge there are zeros.
    """
    largest = F.relu(F.max_pool2d(x.permute(0, 3, 1, 2), 2, 1))  # [B, C, H - 1, W - 1]
    line = (2 - torch.arange(-1, 2, dtype=x.dtype, device=x.device).abs()) / 4  # [3], made there: graphs may hold it
    blur = (line[:, None] * line).expand(x.shape[-1], 1, 3, 3)  # [C, 1, 3, 3]
    y = F.conv2d(largest, blur, stride=2, padding=1, groups=x.shape[-1])  # [B, C, H // 2, W // 2]
    return y.permute(0, 2, 3, 1)  # [B, H // 2, W // 2, C]


def torch_layout(images: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """As they are, channels last; but torch fails on the gradient of a lone filter unless both are channels first."""
    return (images.contiguous(), filters.contiguous()) if len(filters) == 1 else (images, filters)


def episodes_as_channels(x: Tensor) -> Tensor:
    """[E, N, H, W, C] -> [N, E * C, H, W], channels last in memory: what oneDNN and cuDNN are fast on.

    Activations keep this order in memory from one block to the next, so that only images are moved. They must be: with
    one channel a mere view would do for torch, but the pool after it is then ten times slower.
    """
    return x.permute(1, 2, 3, 0, 4).contiguous().flatten(3).permute(0, 3, 1, 2)


def channels_as_episodes(x: Tensor, episodes: int) -> Tensor:
    """The inverse: [N, E * C, H, W] -> [E, N, H, W, C]."""
    return x.permute(0, 2, 3, 1).unflatten(-1, (episodes, -1)).permute(3, 0, 1, 2, 4)


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Each channel of each episode to mean 0 and variance 1, then scaled and shifted.

    x [E, N, h, w, C], gamma and beta [C] -> (like x, (mean, variance), each [E, C]).
    """
    y, mean, variance = BatchNorm.apply(x, gamma, beta, eps)
    return y, (mean, variance)


class BatchNorm(torch.autograd.Function):
    """Batch norm per episode and channel with the library's fused kernels, whose statistics pass on gradients, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        episodes, channels = x.shape[0], x.shape[-1]
        images = episodes_as_channels(x)  # [N, E * C, h, w]
        weights = gamma.repeat(episodes)  # [E * C]
        y, mean, rstd = torch.native_batch_norm(images, weights, beta.repeat(episodes), None, None, True, 0.0, eps)
        ctx.save_for_backward(images, weights, mean, rstd)
        ctx.eps, ctx.shape = eps, x.shape
        ctx.set_materialize_grads(False)
        y = channels_as_episodes(y, episodes)  # [E, N, h, w, C]
        return y, mean.view(episodes, channels), (rstd**-2 - eps).view(episodes, channels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, weights, mean, rstd = ctx.saved_tensors
        episodes, channels = ctx.shape[0], ctx.shape[-1]
        g, g_mean, g_variance = gradients  # None where nobody used the output
        g = images.new_zeros(()).expand_as(images) if g is None else episodes_as_channels(g)  # [N, E * C, h, w]
        dx, d_gamma, d_beta = torch.ops.aten.native_batch_norm_backward(
            g, images, weights, None, None, mean, rstd, True, ctx.eps, [True, True, True]
        )
        count = images.numel() / images.shape[1]
        if g_mean is not None:
            dx = dx + g_mean.reshape(-1, 1, 1) / count
        if g_variance is not None:
            dx = dx + (images - mean[:, None, None]) * (g_variance.reshape(-1, 1, 1) * (2 / count))
        dx = channels_as_episodes(dx, episodes)  # [E, N, h, w, C]
        return dx, d_gamma.view(episodes, channels).sum(0), d_beta.view(episodes, channels).sum(0), None
