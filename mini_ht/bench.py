"""How fast a preset trains here, and where the time goes."""

import statistics
import time
from typing import Any

import torch

from mini_ht.config import Config
from mini_ht.datasets.glyphs import glyphs
from mini_ht.training.loop import Trainer

STEPS, WARM_UP = 60, 8


class Stopwatch:
    """Adds up the time between calls under the name of each call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def bench_training(config: Config, workers: int = 0, steps: int = STEPS, impl: str = "auto") -> dict[str, Any]:
    """Train on glyphs of the preset's image size for a few steps.

    Returns:
        episodes_per_second (from the median step), episodes_per_step, workers, and `share`: the fraction of the main
        process's time spent in sample, generate, classify, backward, wait (for other processes) and optimise; on a GPU
        in sample and in step, all the rest, and there is `peak_memory_mb`, that of the step.
    """
    images = glyphs(0, 400, drawings=max(20, config.shot + config.unlabelled + config.queries), size=config.image_size)
    if config.image_channels > 1:
        images = type(images)(images.pixels.repeat(config.image_channels, -1), images.counts, images.names)
    trainer = Trainer(config, images, workers, impl=impl)
    try:
        for _ in range(WARM_UP):
            trainer.step(1e-6)
        watch, times = Stopwatch(), []
        for _ in range(steps):
            start = time.perf_counter()
            trainer.step(1e-6, watch)
            times.append(time.perf_counter() - start)
    finally:
        trainer.close()
    total = sum(watch.seconds.values())
    memory = {"peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1)} if trainer.graph else {}
    return {
        "episodes_per_second": round(config.episodes_per_step / statistics.median(times), 1),
        "episodes_per_step": config.episodes_per_step,
        "workers": 1 + len(trainer.workers.processes) if trainer.workers else 1,
        "share": {name: round(seconds / total, 3) for name, seconds in watch.seconds.items()},
        **memory,
    }
