"""What a good engineer would try before writing kernels: the same stack of blocks in plain torch, seven ways.

Every function: x [E, N, H, W, Cin], weights [E, 3, 3, Cin, Cout] and gammas, betas [Cout] of each block
-> y [E, N, h, w, Cout], the norm with its own statistics.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_ht.kernels.block import NORM_EPS, conv_stack

Net = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]


def fused(x: Tensor, weights: Sequence[Tensor], gammas: Sequence[Tensor], betas: Sequence[Tensor]) -> Tensor:
    """The Triton kernels."""
    return conv_stack(x, weights, gammas, betas, impl="triton")[0]


def torch_path(x: Tensor, weights: Sequence[Tensor], gammas: Sequence[Tensor], betas: Sequence[Tensor]) -> Tensor:
    """What this package runs where there is no Triton."""
    return conv_stack(x, weights, gammas, betas, impl="torch")[0]


def grouped(layout: torch.memory_format) -> Net:
    """One convolution with a group for each episode, in a given memory layout."""

    def net(x: Tensor, weights: Sequence[Tensor], gammas: Sequence[Tensor], betas: Sequence[Tensor]) -> Tensor:
        episodes = len(x)
        images = x.permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous(memory_format=layout)  # [N, E * C, H, W]
        for weight, gamma, beta in zip(weights, gammas, betas, strict=True):
            filters = weight.permute(0, 4, 3, 1, 2).flatten(0, 1).contiguous(memory_format=layout)
            images = F.max_pool2d(F.relu(F.conv2d(images, filters.to(images.dtype), padding=1, groups=episodes)), 2)
            scale, shift = gamma.repeat(episodes), beta.repeat(episodes)
            images = F.batch_norm(images, None, None, scale, shift, training=True, eps=NORM_EPS)
        return images.unflatten(1, (episodes, -1)).permute(1, 0, 3, 4, 2)

    return net


def one_episode(x: Tensor, weights: Sequence[Tensor], gammas: Sequence[Tensor], betas: Sequence[Tensor]) -> Tensor:
    """An ordinary CNN: x [N, H, W, C], weights [3, 3, Cin, Cout] -> [N, h, w, Cout]."""
    images = x.permute(0, 3, 1, 2)  # [N, C, H, W]
    for weight, gamma, beta in zip(weights, gammas, betas, strict=True):
        filters = weight.permute(3, 2, 0, 1).to(images.dtype)
        images = F.max_pool2d(F.relu(F.conv2d(images, filters, padding=1)), 2)
        normal = F.batch_norm(images, None, None, gamma, beta, training=True, eps=NORM_EPS)
        images = normal.to(images.dtype)  # under vmap it is float32
    return images.permute(0, 2, 3, 1)


def loop(x: Tensor, weights: Sequence[Tensor], gammas: Sequence[Tensor], betas: Sequence[Tensor]) -> Tensor:
    """Episode by episode."""
    return torch.stack([one_episode(x[e], [w[e] for w in weights], gammas, betas) for e in range(len(x))])


def vmapped(x: Tensor, weights: Sequence[Tensor], gammas: Sequence[Tensor], betas: Sequence[Tensor]) -> Tensor:
    """torch.func.vmap over episodes."""
    net = torch.func.vmap(one_episode, in_dims=(0, 0, None, None))
    return net(x, list(weights), list(gammas), list(betas))


def by_products(block: Callable[[Tensor, Tensor], Tensor]) -> Net:
    """A net from block(x, weight) -> pooled conv outputs; activation and norm in torch."""

    def net(x: Tensor, weights: Sequence[Tensor], gammas: Sequence[Tensor], betas: Sequence[Tensor]) -> Tensor:
        for weight, gamma, beta in zip(weights, gammas, betas, strict=True):
            active = block(x, weight.to(x.dtype)).relu()  # [E, N, h, w, Cout]
            variance, mean = torch.var_mean(active.float(), (1, 2, 3), correction=0, keepdim=True)
            scale = gamma * (variance + NORM_EPS) ** -0.5
            x = (active * scale + (beta - mean * scale)).to(x.dtype)
        return x

    return net


def unfold_pool(x: Tensor, weight: Tensor) -> Tensor:
    """im2col by F.unfold, then a batched product, then the pool."""
    episodes, images, height, width, channels = x.shape
    columns = F.unfold(x.flatten(0, 1).permute(0, 3, 1, 2), 3, padding=1)  # [E * N, C * 9, H * W]
    columns = columns.unflatten(0, (episodes, images)).permute(0, 1, 3, 2).flatten(1, 2)  # [E, N * H * W, C * 9]
    y = torch.bmm(columns, weight.permute(0, 3, 1, 2, 4).reshape(episodes, channels * 9, -1))
    y = y.view(episodes * images, height, width, -1).permute(0, 3, 1, 2)  # [E * N, Cout, H, W]
    return F.max_pool2d(y, 2).permute(0, 2, 3, 1).unflatten(0, (episodes, images))


def window_pool(x: Tensor, weight: Tensor) -> Tensor:
    """The window product of the kernels with torch.bmm: a row is the 4 x 4 pixels of a pooling window."""
    episodes, images, height, width, channels = x.shape
    h, w, outputs = height // 2, width // 2, weight.shape[-1]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)[:, :, :h, :w]  # [E, N, h, w, C, 4, 4]
    rows = padded.permute(0, 1, 2, 3, 5, 6, 4).reshape(episodes, images * h * w, 16 * channels)
    places = [F.pad(weight, (0, 0, 0, 0, k % 2, 1 - k % 2, k // 2, 1 - k // 2)) for k in range(4)]  # [E, 4, 4, C, Cout]
    matrix = torch.stack(places, -2).reshape(episodes, 16 * channels, 4 * outputs)
    return torch.bmm(rows, matrix).view(episodes, images, h, w, 4, outputs).amax(-2)


def alternatives(cuda: bool) -> dict[str, Net]:
    """Name -> net; compiled ones only where there is a GPU."""
    first, last = torch.contiguous_format, torch.channels_last
    nets = {
        "grouped channels-first": grouped(first),
        "grouped channels-last": grouped(last),
        "vmap": vmapped,
        "unfold + bmm": by_products(unfold_pool),
        "window + bmm": by_products(window_pool),
        "loop": loop,
    }
    if cuda:
        torch._dynamo.reset()  # else, after a few problems, they would run as they are
        torch._functorch.config.donated_buffer = False  # so that backward alone can run again and again
        nets["compile"] = torch.compile(grouped(last))
        nets["compile max-autotune"] = torch.compile(grouped(last), mode="max-autotune-no-cudagraphs")
    return nets
