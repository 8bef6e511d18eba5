"""Memory of a command over time: samples all its processes, writes NAME.csv and NAME.png beside itself.

    python results/memory/measure.py --minutes 60 NAME mini-ht train PRESET --minutes 60 --data-dir DIR

Resident memory is summed over the processes, so that what they share counts in each. Growth is the mean of the last
tenth of the samples over that of the first tenth, after a warm-up that holds the first checkpoints and validations.
What the command does after those minutes is not watched. Linux only.
"""

import argparse
import csv
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from mini_ht.figures import new_figure, save_figure

MEBIBYTE = 1 << 20


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
    parser.add_argument("--minutes", type=float, default=60.0, help="how long to watch")
    parser.add_argument("--warm-up", type=float, default=120.0, help="seconds")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to watch")
    options = parser.parse_args()
    rows = []
    process, start = subprocess.Popen(options.command), time.perf_counter()
    while (seconds := time.perf_counter() - start) < 60 * options.minutes and process.poll() is None:
        processes = list(family(process.pid))
        rows.append((round(seconds, 1), len(processes), round(resident(processes), 2)))
        time.sleep(options.every)
    if process.wait():
        raise SystemExit(f"the command ended with exit code {process.returncode}")
    if seconds < options.warm_up:
        raise SystemExit(f"the command took {seconds:.1f} s, less than the warm-up of {options.warm_up:g} s: no growth")
    beside = Path(__file__).with_name(options.name)
    with beside.with_suffix(".csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("seconds", "processes", "resident_MiB"), *rows])
    seconds, _, memory = np.array(rows).T  # [samples] each
    grown = growth(seconds, memory, options.warm_up)
    draw(seconds, memory, grown, beside.with_suffix(".png"))
    print(f"{len(rows)} samples, {memory[-1]:.0f} MiB at the end, growth {grown:+.2f} %")


if __name__ == "__main__":
    main()
