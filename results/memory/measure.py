"""Memory of a training run over time: samples all its processes, writes NAME.csv and NAME.png beside itself.

    python results/memory/measure.py NAME --minutes 60 --data-dir ../shared/data/omniglot

Resident memory is summed over the processes, so that what they share counts in each. Growth is the mean of the last
tenth of the samples over that of the first tenth, after a warm-up that holds the first checkpoints and validations.
Linux only.
"""

import argparse
import csv
import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

import mini_ht
from mini_ht.datasets import open_dataset
from mini_ht.figures import new_figure, save_figure
from mini_ht.training.loop import train

MEBIBYTE = 1 << 20


def run(preset: str, minutes: float, data_dir: str, folder: str, workers: int) -> None:
    """The training that is watched, without the report after it."""
    config = dataclasses.replace(mini_ht.preset(preset), minutes=minutes)
    images = open_dataset(config.dataset, data_dir, size=config.image_size, split=config.split)
    train(config, images, Path(folder), workers=workers)


def family(process: int) -> Iterator[int]:
    """A process and all that it started, directly or not."""
    yield process
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            for child in Path(f"/proc/{process}/task/{thread}/children").read_text().split():
                yield from family(int(child))


def resident(processes: list[int]) -> float:
    """Their resident memory in MiB; those that have ended count nothing."""
    pages = 0
    for process in processes:
        with suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE


def growth(seconds: np.ndarray, memory: np.ndarray, warm_up: float) -> float:
    """In %: the last tenth of the samples after the warm-up, over the first."""
    warm = memory[seconds >= warm_up]
    tenth = max(1, len(warm) // 10)
    return 100 * (warm[-tenth:].mean() / warm[:tenth].mean() - 1)


def draw(seconds: np.ndarray, memory: np.ndarray, grown: float, file: Path) -> None:
    """Memory against time, from zero."""
    figure, axes = new_figure(7, 3.5)
    axes.plot(seconds / 60, memory, color="#0072B2")
    axes.set(xlabel="training time (minutes)", ylabel="resident memory (MiB)", ylim=(0, 1.15 * memory.max()))
    axes.set_title(f"growth after warm-up: {grown:+.2f} %", fontsize=10)
    axes.grid(alpha=0.3)
    save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the two files that are written")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--data-dir", required=True, help="folder with the two Omniglot archives")
    parser.add_argument("--preset", default="omniglot-20way-1shot-8ch")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--warm-up", type=float, default=120.0, help="seconds")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.preset, options.minutes, options.data_dir, folder, options.workers)
        process = multiprocessing.get_context("spawn").Process(target=run, args=arguments)
        process.start()
        while not (Path(folder) / "training.safetensors").exists() and process.is_alive():
            time.sleep(0.1)  # until the data is read and training begins
        start = time.perf_counter()
        while (seconds := time.perf_counter() - start) < 60 * options.minutes and process.is_alive():
            processes = list(family(process.pid or 0))
            rows.append((round(seconds, 1), len(processes), round(resident(processes), 2)))
            time.sleep(options.every)
        process.join()
        if process.exitcode:
            raise SystemExit(f"the training ended with exit code {process.exitcode}")
    beside = Path(__file__).with_name(options.name)
    with beside.with_suffix(".csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("seconds", "processes", "resident_MiB"), *rows])
    seconds, _, memory = np.array(rows).T  # [samples] each
    grown = growth(seconds, memory, options.warm_up)
    draw(seconds, memory, grown, beside.with_suffix(".png"))
    print(f"{len(rows)} samples, {memory[-1]:.0f} MiB at the end, growth {grown:+.2f} %")


if __name__ == "__main__":
    main()
