"""What the benchmark measures: nets, their data, and how much each must at least move and multiply."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One net: E episodes of N images, `size` x `size` x `inputs`, four blocks of `channels`."""

    name: str
    episodes: int
    images: int
    size: int
    inputs: int
    channels: int

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """(size, Cin, Cout) of each block."""
        sizes = [self.size // 2**k for k in range(4)]
        return [(size, self.channels if k else self.inputs, self.channels) for k, size in enumerate(sizes)]

    def bytes(self, width: int) -> dict[str, float]:
        """Bytes that the kernels' design must move, with `width` bytes a value.

        Forward: each block reads its input and writes p and its code; the last norm reads p and writes y. Backward: the
        first kernel reads g and p, the weight's g, p, code and the input; but for images it writes d, and the input's
        reads d, code and the input, and writes dx. Weights and partial sums are left out.
        """
        count = self.episodes * self.images
        forward = backward = 0.0
        for k, (size, inputs, outputs) in enumerate(self.blocks):
            x, p = count * size**2 * inputs, count * (size // 2) ** 2 * outputs
            forward += x * width + p * (width + 1)
            backward += p * (2 * width + 1) + x * width
            backward += p * (2 * width + 1) + 2 * x * width if k else 0
        last = count * (self.size // 16) ** 2 * self.channels * width
        return {"forward": forward + 2 * last, "backward": backward + 2 * last, "both": forward + backward + 4 * last}

    def flops(self) -> dict[str, float]:
        """2 * 9 * Cin * Cout for each conv output that is pooled; backward the same for dW and, but for images, dx."""
        forward = backward = 0.0
        for k, (size, inputs, outputs) in enumerate(self.blocks):
            once = 2.0 * 9 * inputs * outputs * self.episodes * self.images * (size // 2 * 2) ** 2
            forward, backward = forward + once, backward + once * (2 if k else 1)
        return {"forward": forward, "backward": backward, "both": forward + backward}

    def draw(self, device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Images, weights, gammas and betas; images want no gradient."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.episodes, self.images, self.size, self.size, self.inputs)
        x = torch.rand(shape, generator=generator).to(device, dtype)
        weights, gammas, betas = [], [], []
        for _, inputs, outputs in self.blocks:
            weight = torch.randn(self.episodes, 3, 3, inputs, outputs, generator=generator) / (9 * inputs) ** 0.5
            weights.append(weight.to(device).requires_grad_())
            gammas.append(torch.ones(outputs, device=device, requires_grad=True))
            betas.append(torch.zeros(outputs, device=device, requires_grad=True))
        return x, weights, gammas, betas


def problems(cuda: bool) -> list[Problem]:
    """The two data sets of the paper at training size; a small net on a CPU."""
    if not cuda:
        return [Problem("omniglot", 4, 100, 28, 1, 8)]
    small = [Problem("omniglot", 64, 80, 28, 1, channels) for channels in (8, 16, 32, 64)]
    return small + [Problem("imagenet", 16, 80, 84, 3, channels) for channels in (8, 32, 64)]
