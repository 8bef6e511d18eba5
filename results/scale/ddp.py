"""One flat all-reduce against DistributedDataParallel: median milliseconds of a step, taken in turn.

torchrun --standalone --nproc-per-node=2 results/scale/ddp.py
"""

import dataclasses
import statistics
import time

import torch
from torch import Tensor, nn

import mini_ht
from mini_ht.datasets import open_dataset
from mini_ht.training.distributed import join
from mini_ht.training.flat import Layout
from mini_ht.training.loop import Trainer, fresh_state
from mini_ht.training.tasks import training_episodes
from mini_ht.training.workers import query_loss, storage_dtype

STEPS = 12
CPU = torch.device("cpu")
CONFIG = dataclasses.replace(mini_ht.preset("omniglot-20way-1shot-8ch"), episodes_per_step=32)


class Loss(nn.Module):
    """The query loss as a module, as DistributedDataParallel wants one."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(parameters)
        self.values = nn.ParameterList([nn.Parameter(x.clone()) for x in parameters.values()])

    def forward(self, *images_and_labels: Tensor) -> Tensor:
        tensors = (x.view(x.shape) for x in self.values)
        parameters = dict(zip(self.names, tensors, strict=True))
        return query_loss(CONFIG, parameters, images_and_labels[:2], images_and_labels[2:])[0]


def main() -> None:
    images, state = open_dataset("glyphs")["train"], fresh_state(CONFIG, CPU)
    ranks = join().begin(CONFIG, images, state)
    part, dtype = ranks.part(CONFIG.episodes_per_step), storage_dtype(CONFIG, CPU)
    trainer = Trainer(CONFIG, images, 1, state, ranks=ranks)
    module = nn.parallel.DistributedDataParallel(Loss(Layout(CONFIG).views(state.vector)), gradient_as_bucket_view=True)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)

    def wrapped(step: int) -> None:
        batch = training_episodes(CONFIG, images, step, part)
        pixels = (torch.from_numpy(x).to(dtype) for x in (batch.support, batch.query))
        optimiser.zero_grad()
        module(*pixels, torch.from_numpy(batch.labels), torch.from_numpy(batch.query_labels)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CONFIG.clip)
        optimiser.step()

    times: dict[str, list[float]] = {"one flat all-reduce": [], "DistributedDataParallel": []}
    for step in range(3 + STEPS):
        for name, take in zip(times, (lambda step: trainer.step(1e-6), wrapped), strict=True):
            begun = time.perf_counter()
            take(step)
            times[name].append(time.perf_counter() - begun)
    if ranks.first:
        print({name: round(1000 * statistics.median(seconds[3:]), 1) for name, seconds in times.items()})


if __name__ == "__main__":
    main()
