"""Training in several processes that torchrun starts, the ranks: each computes some episodes of every step."""

import dataclasses
import os
import signal
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mini_ht.config import Config
from mini_ht.datasets.images import ImageSet
from mini_ht.errors import InputError
from mini_ht.training.checkpoint import VECTORS, State

PATIENCE = timedelta(hours=12)  # how long the others wait while the first reads data, validates or saves


@dataclass(frozen=True)
class Ranks:
    """The place of this process among the ranks; without torchrun there is no other."""

    number: int = 0
    count: int = 1
    joined: bool = False
    store: Any = None  # what all ranks can read and write
    group: Any = None  # in which gradients are summed, by NCCL on GPUs; ranks meet in the default one, by gloo

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes, logs and validates."""
        return self.number == 0

    def part(self, episodes: int) -> slice:
        """This rank's share of a step's episodes; InputError if some rank would have none."""
        if episodes < self.count:
            raise InputError(f"{episodes} episodes a step do not go round {self.count} ranks; raise episodes_per_step")
        return slice(episodes * self.number // self.count, episodes * (self.number + 1) // self.count)

    def add_up(self, vector: Tensor) -> None:
        """Replace a vector by its sum over all ranks, to the bit the same on each."""
        if self.joined:
            with others_may_end(self.number):
                dist.all_reduce(vector, group=self.group)

    def same(self, number: float) -> float:
        """The first rank's number, which the others wait for, however long, without using their core."""
        figure = torch.tensor([number], dtype=torch.float64)
        self.copy_first(figure)
        return figure.item()

    def copy_first(self, *tensors: Tensor) -> None:
        """Replace each tensor by the first rank's."""
        for tensor in tensors if self.joined else ():
            host = tensor.cpu()
            with others_may_end(self.number):
                dist.broadcast(host, 0)
            tensor.copy_(host)

    def begin(self, config: Config, images: ImageSet, state: State) -> "Ranks":
        """Give every rank the first one's state, and return these ranks with a group to sum gradients in.

        Raises InputError where config or classes are not the first one's.
        """
        if not self.joined:
            return self
        about = f"{config.to_json()} {images.pixels.shape} {images.names} {images.counts.tolist()}"
        mine = float(zlib.crc32(about.encode()))
        figures = torch.tensor([mine, state.step, state.seconds, state.loss, state.accuracy], dtype=torch.float64)
        self.copy_first(figures, *(getattr(state, name) for name in VECTORS))
        first, step, state.seconds, state.loss, state.accuracy = figures.tolist()
        state.step = int(step)
        if first != mine:
            what = f"rank {self.number} has other options or other training images than rank 0"
            raise InputError(f"{what}; give every node the same")
        with others_may_end(self.number):
            # Never waits for long, as ranks meet on the host first: it keeps its own, shorter patience.
            group = dist.new_group(backend="gloo" if state.vector.device.type == "cpu" else "nccl")
        return dataclasses.replace(self, group=group)

    def leave(self) -> None:
        """End the group: from here on nothing waits for another rank."""
        if self.joined:
            dist.destroy_process_group(self.group)


ALONE = Ranks()


@contextmanager
def others_may_end(number: int) -> Iterator[None]:
    """When another rank is gone, the first stops as after Ctrl-C, with a checkpoint; the others end without a word."""
    try:
        yield
    except RuntimeError as error:
        if number:
            raise SystemExit(1) from error
        handle(signal.SIGTERM, signal.SIG_IGN)  # in which torchrun says the same
        why = str(error).partition("] ")[2].partition(". ")[0]  # behind the place in gloo's source, before its guesses
        raise KeyboardInterrupt(f"another rank is gone ({why or error})") from error


def handle(number: signal.Signals, handler: Any) -> None:
    """Set what a signal does, if this is the main thread; no other may."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarted() -> bool:
    """Whether torchrun started all ranks anew, as one had ended (--max-restarts)."""
    return launched() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@cache
def join() -> Ranks:
    """Wait until all ranks are here, and return this one's place; each has its own GPU if there are any.

    From then on SIGTERM stops the first rank as Ctrl-C does, and Ctrl-C ends the others at once. InputError for more
    ranks than GPUs.
    """
    if not launched():
        return Ranks()
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local >= (gpus := torch.cuda.device_count()):
            raise InputError(f"torchrun started more ranks here than there are GPUs ({gpus}); use --nproc-per-node=gpu")
        torch.cuda.set_device(local)
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It outlives a restart, with the addresses of ranks that are gone, for which new ones would wait.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=PATIENCE)
    if number == 0:
        handle(signal.SIGTERM, signal.default_int_handler)
    else:
        handle(signal.SIGINT, signal.SIG_DFL)
    return Ranks(number, count, True, store)


def another_failed() -> bool:
    """Whether another rank has asked this before, which each does when it fails."""
    if not dist.is_initialized():
        return False
    with others_may_end(join().number):
        return join().store.add("failed", 1) > 1
