"""What a run was worth: accuracy on unseen classes beside two yardsticks, a summary and two figures."""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mini_ht.config import Config, Norm
from mini_ht.datasets.images import ImageSet
from mini_ht.episodes import Episodes
from mini_ht.evaluation import QUERIES, affordable_queries, evaluate, evaluation_episodes, pixel_nearest_mean
from mini_ht.figures import draw_curve, draw_episode, read_metrics
from mini_ht.files import write_atomically
from mini_ht.parameters import CHECKPOINT, load, to_torch
from mini_ht.training.checkpoint import STATE, State
from mini_ht.training.log import METRICS

SUMMARY, CURVE, EPISODE = "summary.json", "curve.png", "episode.png"
EPISODES = 1000


def measure(
    parameters: Mapping[str, NDArray[np.floating]],
    config: Config,
    images: ImageSet,
    task: Mapping[str, Any],
    episodes: int,
    norm: Norm,
    seed: int = 0,
    views: int = 1,
    query_views: int = 1,
) -> dict[str, Any]:
    """Accuracy on episodes drawn from `images`, its interval, the yardsticks, and all that defines the number."""
    start = time.perf_counter()

    def batches() -> Iterator[Episodes]:
        return evaluation_episodes(images, episodes, seed=seed, **task)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        score = evaluate(to_torch(parameters, device), config, batches(), norm, views, query_views)
    yardsticks = {"chance": 1 / task["way"], "pixel_nearest_mean": pixel_nearest_mean(batches()).accuracy}
    seconds = round(time.perf_counter() - start, 2)
    how: dict[str, Any] = {"norm": norm, "views": views, "query_views": query_views, "seed": seed, "seconds": seconds}
    how |= {"split": config.split if config.dataset == "omniglot" else None, "part": "test"}
    return dataclasses.asdict(score) | yardsticks | dict(task) | how


def describe(figures: Mapping[str, Any]) -> str:
    """The figures of `measure` as text."""
    least = {"unlabelled": 0, "views": 1, "query_views": 1}
    more = [f"norm {figures['norm']}"] + [f"split {figures['split']}"] * bool(figures["split"])
    more += [f"{figures[name]} {name.replace('_', ' ')}" for name, few in least.items() if figures[name] > few]
    classes = "unseen" if figures["part"] == "test" else figures["part"]
    return (
        f"{figures['way']}-way {figures['shot']}-shot, {figures['episodes']:,} episodes of {classes} classes, "
        f"{figures['queries']} queries a class, protocol {figures['protocol']}, {', '.join(more)}\n"
        f"  accuracy                {100 * figures['accuracy']:6.2f} +- {100 * figures['interval']:.2f} %\n"
        f"  nearest mean of pixels  {100 * figures['pixel_nearest_mean']:6.2f} %\n"
        f"  chance                  {100 * figures['chance']:6.2f} %"
    )


def report(config: Config, images: ImageSet, run_dir: Path, state: State) -> str:
    """Measure the run's model on `images`, write summary.json, curve.png and episode.png; returns the text to print."""
    parameters, _ = load(run_dir)
    task = config.task | {"queries": affordable_queries(images, config, QUERIES)}
    figures = measure(parameters, config, images, task, EPISODES, config.norm)
    episodes = state.step * config.episodes_per_step
    summary = {
        **{name: figures[name] for name in ("accuracy", "interval", "chance", "pixel_nearest_mean")},
        "episodes": episodes,
        "episodes_per_second": round(episodes / max(state.seconds, 1e-9), 1),
        "seconds": round(state.seconds, 1),
        "evaluation": figures,
        "config": dataclasses.asdict(config),
    }
    write_atomically(run_dir / SUMMARY, json.dumps(summary, indent=2).encode())
    yardsticks = {"nearest pixel mean": figures["pixel_nearest_mean"], "chance": figures["chance"]}
    draw_curve(read_metrics(run_dir / METRICS), yardsticks, run_dir / CURVE)
    episode = next(evaluation_episodes(images, 1, seed=1, **task))
    draw_episode(parameters, config, episode, run_dir / EPISODE)
    trained = f"{episodes:,} training episodes in {state.seconds:.0f} s"
    return f"\n{describe(figures)}\n{trained}. Look at {run_dir / CURVE} and {run_dir / EPISODE}"


def clear_run(run_dir: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    for name in (STATE, CHECKPOINT, METRICS, SUMMARY, CURVE, EPISODE):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
