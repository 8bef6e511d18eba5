"""The gradient of one step, shared out over processes: each computes some of the step's episodes on one core."""

import math
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mini_ht.config import Config
from mini_ht.datasets.images import ImageSet
from mini_ht.datasets.mapped import MappedSet
from mini_ht.errors import InputError
from mini_ht.generator import generate
from mini_ht.memory import keep_freed_memory
from mini_ht.training.flat import Layout
from mini_ht.training.tasks import training_episodes

Clock = Callable[[str], None]
Shared = ImageSet | tuple[Tensor, NDArray[np.integer]]  # pixels, and how many images each class has


def storage_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What images and activations are kept in: by `precision`, or with "auto" by what the device multiplies fastest."""
    if config.precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy with `smoothing` of each target's probability spread evenly over the classes that are there.

    logits [B, way], -inf for absent classes; targets [B].
    """
    if not smoothing:
        return F.cross_entropy(logits, targets)
    log_p = logits.log_softmax(-1)  # [B, way]
    there = log_p > -math.inf
    even = -log_p.where(there, 0).sum(-1) / there.sum(-1)  # [B]
    return (1 - smoothing) * F.nll_loss(log_p, targets) + smoothing * even.mean()


def query_loss(
    config: Config,
    parameters: Mapping[str, Tensor],
    images: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor],
    clock: Clock = lambda name: None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean loss of the generated CNNs on their queries, and their accuracy (no gradient); nothing waits for a device.

    images and labels are those of the support set and of the query set: [E, n, ...] and [E, m, ...].
    """
    cnn = generate(parameters, config, images[0], labels[0], impl=impl, check=False)
    clock("generate")
    logits, targets = cnn(images[1]).flatten(0, 1), labels[1].flatten()  # [E * m, way] and [E * m]
    loss = smoothed_cross_entropy(logits, targets, config.label_smoothing)
    clock("classify")
    return loss, (logits.detach().argmax(-1) == targets).to(loss.dtype).mean()


def gradient(
    config: Config,
    parameters: Mapping[str, Tensor],
    images: ImageSet,
    step: int,
    part: slice = slice(None),
    clock: Clock = lambda name: None,
    upright: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient [size] of the step's mean loss through the episodes of `part`, and their share of (loss, accuracy) [2].

    parameters are the leaves of a Layout, in whose order the gradient comes; clock(name) is called as each part of the
    work ends.
    """
    device = parameters["logits.xi"].device
    batch = training_episodes(config, images, step, part, upright)
    support, labels, query, targets = (
        torch.from_numpy(array).to(device) for array in (batch.support, batch.labels, batch.query, batch.query_labels)
    )
    clock("sample")
    dtype = storage_dtype(config, device)
    loss, accuracy = query_loss(config, parameters, (support.to(dtype), query.to(dtype)), (labels, targets), clock)
    share = len(batch.support) / config.episodes_per_step
    gradients = torch.autograd.grad(loss * share, list(parameters.values()))
    result = torch.cat([part.flatten() for part in gradients])  # [size]
    clock("backward")
    return result, torch.stack([loss.detach(), accuracy]) * share


def shareable(images: ImageSet) -> Shared:
    """What another process gets: pixels in shared memory, or where a mapped set lies.

    Pixels in the pipe of a process that starts would be a copy; if it dies, we would write for ever.
    """
    return images if isinstance(images, MappedSet) else (torch.from_numpy(images.pixels).share_memory_(), images.counts)


class Workers:
    """Computes gradients with `count` processes, this one among them."""

    def __init__(self, config: Config, images: ImageSet, vector: Tensor, count: int, part: slice | None = None) -> None:
        """vector [size] holds the parameters; with several processes it must lie in shared memory.

        part: which of a step's episodes they share; all of them if not given.
        """
        self.config, self.images, self.parameters = config, images, Layout(config).leaves(vector)
        part = part or slice(0, config.episodes_per_step)
        bounds = [part.start + (part.stop - part.start) * i // count for i in range(count + 1)]
        self.own = slice(bounds[0], bounds[1])
        self.connections: list[Connection] = []
        self.results = [torch.zeros_like(vector).share_memory_() for _ in range(count - 1)]
        keep_freed_memory()
        if vector.device.type == "cpu":
            torch.set_num_threads(1)
        context = torch.multiprocessing.get_context("spawn")
        self.processes = []
        shared = shareable(images) if count > 1 else images
        for result, start, stop in zip(self.results, bounds[1:], bounds[2:], strict=False):
            here, there = context.Pipe()
            arguments = (there, config, shared, vector, result, slice(start, stop))
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def gradient(self, step: int, clock: Clock = lambda name: None, upright: bool = False) -> tuple[Tensor, Tensor]:
        """The gradient [size] and (loss, accuracy) [2] of `gradient`; sums are always in the same order."""
        try:
            for connection in self.connections:
                connection.send((step, upright))
            total, figures = gradient(self.config, self.parameters, self.images, step, self.own, clock, upright)
            answers: list[Any] = [connection.recv() for connection in self.connections]
        except (EOFError, ConnectionError) as error:
            raise InputError("a worker process ended by itself (out of memory?); try --workers 1") from error
        for answer, result in zip(answers, self.results, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            total += result
            figures += torch.tensor(answer)
        clock("wait")
        return total, figures

    def close(self) -> None:
        """End the other processes."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()
            process.join(timeout=10)


def serve(connection: Connection, config: Config, shared: Shared, vector: Tensor, result: Tensor, part: slice) -> None:
    """A worker process: for each step that comes, leave the gradient in `result`; ends when the pipe closes."""
    images = shared if isinstance(shared, ImageSet) else ImageSet(shared[0].numpy(), shared[1], ())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which closes the pipe
    torch.set_num_threads(1)
    keep_freed_memory()
    parameters = Layout(config).leaves(vector)
    with suppress(EOFError, ConnectionError):
        while True:
            step, upright = connection.recv()
            try:
                mine, figures = gradient(config, parameters, images, step, part, upright=upright)
                result.copy_(mine)
                answer: Any = figures.tolist()
            except Exception as error:
                answer = error
            connection.send(answer)
