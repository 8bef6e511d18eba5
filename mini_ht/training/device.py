"""A training step on a GPU that never waits for the host: one CUDA graph from row numbers to updated parameters."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mini_ht.config import Config
from mini_ht.datasets.images import ImageSet
from mini_ht.training.checkpoint import State
from mini_ht.training.distributed import ALONE, Ranks
from mini_ht.training.flat import Layout
from mini_ht.training.schedule import average_decay
from mini_ht.training.tasks import training_choice
from mini_ht.training.workers import Clock, query_loss, storage_dtype

COPIED = 4096  # images that go to the device at a time
WARM_UP = 3  # runs before the capture, in which kernels are compiled and libraries choose


class DeviceImages:
    """All pixels of an image set on the device, looked up turned and moved in one gather."""

    def __init__(self, images: ImageSet, shift: int, device: torch.device) -> None:
        """shift: the largest move, in pixels."""
        total, height, width, channels = images.pixels.shape
        # What is moved in from outside is the pixel behind the last: a zero.
        padded = torch.zeros((total, height * width + 1, channels), dtype=torch.uint8, device=device)
        for start in range(0, total, COPIED):  # a mapped set may be larger than the host's memory
            some = images.pixels[start : start + COPIED].reshape(-1, height * width, channels)
            padded[start : start + COPIED, :-1] = torch.from_numpy(np.array(some)).to(device)
        self.pixels = padded.reshape(-1, channels)  # [total * (H * W + 1), C]
        self.stride, self.shift = height * width + 1, shift
        self.positions = torch.from_numpy(source_positions(height, shift)).to(device)

    def __call__(self, rows: Tensor, turns: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        """rows [E, N], turns [E, N] in 0 .. 7, offsets [E, N, 2] -> images [E, N, H, W, C] in [0, 1]."""
        down, right = (self.shift - offsets).unbind(-1)
        places = rows[..., None, None] * self.stride + self.positions[turns, down, right]  # [E, N, H, W]
        return (self.pixels[places].float() / 255).to(dtype)


def source_positions(size: int, shift: int) -> NDArray[np.int64]:
    """Where each pixel of a turned and moved square image comes from: [8, 2 * shift + 1, 2 * shift + 1, size, size].

    Indexed by turn and by shift - offset, as `pixels` and `shifted` of mini_ht.episodes do it; size * size is outside.
    """
    image = np.arange(size * size).reshape(size, size)
    turned = [np.rot90(image[:, ::-1] if turn >= 4 else image, turn % 4) for turn in range(8)]
    padded = np.pad(turned, ((0, 0), (shift, shift), (shift, shift)), constant_values=size * size)
    return np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2)).copy()


def set_gradient(optimiser: torch.optim.Optimizer, gradient: Tensor) -> None:
    """Share a gradient [size] out to the leaves of an optimiser, in order."""
    leaves = [leaf for group in optimiser.param_groups for leaf in group["params"]]
    for leaf, part in zip(leaves, gradient.split([len(leaf) for leaf in leaves]), strict=True):
        leaf.grad = part


def record(function: Callable[[], None]) -> Callable[[], None]:
    """Run a function a few times, record what it does on the device as a graph, and return what repeats the record."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class DeviceStep:
    """Training steps whose every tensor stays on the device; on CUDA they are captured once and replayed.

    A step whose loss or gradient is not finite changes nothing, as does one with `hold`.
    """

    def __init__(
        self,
        config: Config,
        images: ImageSet,
        state: State,
        optimiser: torch.optim.Optimizer,
        impl: str = "auto",
        ranks: Ranks = ALONE,
    ) -> None:
        """optimiser: a fused AdamW over leaves that share the state's vector, in order; impl: of the conv blocks."""
        self.config, self.images, self.state, self.optimiser, self.impl = config, images, state, optimiser, impl
        self.ranks, self.part = ranks, ranks.part(config.episodes_per_step)
        device = state.vector.device
        self.parameters = Layout(config).leaves(state.vector)
        self.pictures = DeviceImages(images, config.shift, device)
        self.dtype = storage_dtype(config, device)
        # What a step reads: which images, then learning rate, weight of the average's newest term, and hold.
        self.inputs = [torch.from_numpy(array).to(device) for array in self.draw(state.step)]
        self.scalars = torch.tensor([0.0, 0.0, 1.0], device=device)
        self.totals = state.vector.new_zeros(len(state.vector) + 2)  # gradient, loss and accuracy
        self.figures = torch.zeros(3, device=device)
        self.factors = torch.tensor([group["rate"] for group in optimiser.param_groups], device=device)
        self.rates = torch.zeros_like(self.factors)
        for group, rate in zip(optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate
        self.waiting: tuple[tuple[int, bool], list[NDArray[Any]]] | None = None
        # No graph holds steps of other shapes (`vary`, `introduce`), nor factorisations, which ask the host for errors.
        self.varied = bool(config.vary or config.introduce or config.discriminant)
        self.replay = self.capture() if device.type == "cuda" and not self.varied else self.compute

    def draw(self, step: int, upright: bool = False) -> list[NDArray[Any]]:
        """Labels [E, n], targets [E, m], rows and turns [E, n + m], offsets [E, n + m, 2] of a step's episodes."""
        choice, offsets = training_choice(self.config, self.images, step, upright)
        choice, offsets = choice.of(self.part), offsets[self.part]
        rows = np.concatenate([choice.support_rows, choice.query_rows], axis=1)  # [E, n + m]
        turns = np.concatenate([choice.support_turns, choice.query_turns], axis=1)  # [E, n + m]
        return [choice.labels, choice.query_labels, rows, turns, offsets]

    def compute(self) -> None:
        """The step itself, from inputs and scalars to state and figures."""
        self.differentiate()
        self.ranks.add_up(self.totals)
        self.update()

    def differentiate(self) -> None:
        """From inputs to this rank's part of the totals."""
        labels, targets, rows, turns, offsets = self.inputs
        pictures = self.pictures(rows, turns, offsets, self.dtype)  # [E, n + m, H, W, C]
        support, query = pictures.split([labels.shape[1], targets.shape[1]], dim=1)
        loss, accuracy = query_loss(self.config, self.parameters, (support, query), (labels, targets), impl=self.impl)
        share = len(labels) / self.config.episodes_per_step
        gradients = torch.autograd.grad(loss * share, list(self.parameters.values()))
        self.totals[:-2] = torch.cat([part.flatten() for part in gradients])  # [size]
        self.totals[-2:] = torch.stack([loss.detach(), accuracy]) * share

    def update(self) -> None:
        """From totals and scalars to state and figures."""
        gradient, (loss, accuracy) = self.totals[:-2], self.totals[-2:]
        norm = gradient.norm()
        if self.config.clip:
            gradient = gradient * (self.config.clip / norm).clamp(max=1.0)
        rate, newest, hold = self.scalars
        torch.mul(self.factors, rate, out=self.rates)
        stays = torch.maximum(hold, 1 - (loss.isfinite() & norm.isfinite()).to(hold.dtype))
        set_gradient(self.optimiser, gradient)
        self.optimiser.found_inf = stays  # type: ignore[attr-defined]  # a fused AdamW then leaves everything alone
        self.optimiser.step()
        if self.config.ema:
            self.state.average.lerp_(self.state.vector, newest * (1 - stays))
        self.figures.copy_(torch.stack([loss, accuracy, norm]))

    def capture(self) -> Callable[[], None]:
        """The step as one graph; with several ranks as two, between which they sum: no graph waits for others."""
        if not self.ranks.joined:
            return record(self.compute)
        before, after = record(self.differentiate), record(self.update)

        def replay() -> None:
            before()
            self.ranks.add_up(self.totals)
            after()

        return replay

    def __call__(
        self, rate: float, clock: Clock = lambda name: None, upright: bool = False
    ) -> tuple[float, float, float]:
        """One step with learning rate `rate`; returns loss, accuracy on the queries, and the gradient's norm."""
        which = self.state.step, upright
        ready = self.waiting[1] if self.waiting and self.waiting[0] == which else self.draw(*which)
        with torch.no_grad():
            for number, array in enumerate(ready):
                if self.varied:
                    self.inputs[number] = torch.from_numpy(array).to(self.scalars.device)
                else:
                    self.inputs[number].copy_(torch.from_numpy(array))
            newest = 1 - average_decay(self.config, which[0])
            self.scalars.copy_(torch.tensor([rate, newest, 0.0]))
        self.replay()
        # The host draws the next episodes while the device works.
        after = which[0] + 1, upright
        self.waiting = after, self.draw(*after)
        clock("sample")
        loss, accuracy, norm = self.figures.tolist()
        clock("step")
        return loss, accuracy, norm
