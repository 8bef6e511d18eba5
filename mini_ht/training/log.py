"""The figures of a training: on a progress bar, in metrics.jsonl, and for TensorBoard."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.figures import read_metrics
from mini_ht.files import write_atomically
from mini_ht.training.checkpoint import State
from mini_ht.training.schedule import progress

METRICS = "metrics.jsonl"
SMOOTHING = 0.95


class Log:
    """Smoothed figures to the progress bar, and rows of them to metrics.jsonl and TensorBoard."""

    def __init__(self, file: Path, board: Any, config: Config, state: State, quiet: bool) -> None:
        self.file, self.board, self.config, self.state = file, board, config, state
        self.norm = self.rate = 0.0
        self.validation: float | None = None
        self.fresh = False  # not yet in a row
        self.written, self.shown = state.step, 0.0  # step of the last row, second of the bar's last refresh
        self.steps, self.busy, self.speed = 0, 0.0, 0.0  # since the last row
        unit = "episode" if config.episodes else "s"
        self.total = config.episodes or round(60 * config.minutes)
        bar = "{desc}{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {unit} {postfix}"
        self.bar = tqdm(total=self.total, unit=unit, disable=quiet, bar_format=bar, desc="training", dynamic_ncols=True)

    def add(self, loss: float, accuracy: float, norm: float, rate: float, seconds: float) -> float:
        """Take in the figures of a step and how long it took; returns the smoothed loss. 50 steps make a row."""
        old = SMOOTHING if self.state.step > 1 else 0.0
        self.state.loss = old * self.state.loss + (1 - old) * loss
        self.state.accuracy = old * self.state.accuracy + (1 - old) * accuracy
        self.norm, self.rate = norm, rate
        self.steps, self.busy = self.steps + 1, self.busy + seconds
        self.speed = self.steps * self.config.episodes_per_step / self.busy
        if self.state.step % 50 == 0:
            self.write()
        elif time.perf_counter() - self.shown > (0.2 if sys.stderr.isatty() else 30):
            self.show()
        return self.state.loss

    def validated(self, accuracy: float) -> None:
        """Take in an accuracy on validation classes, and write a row."""
        self.validation, self.fresh = accuracy, True
        self.write()

    def show(self) -> None:
        """Refresh the bar."""
        self.shown = time.perf_counter()
        unseen = "" if self.validation is None else f", unseen classes {100 * self.validation:.1f} %"
        self.bar.set_postfix_str(f"{self.speed:.0f} episodes/s, loss {self.state.loss:.3f}{unseen}", refresh=False)
        episodes = self.state.step * self.config.episodes_per_step
        done = progress(self.config, episodes, self.state.seconds)
        self.bar.n = round(done * self.total)
        self.bar.refresh()

    def write(self) -> None:
        """Append a row, unless no step was made, with the validation accuracy if it is new."""
        if self.written == self.state.step and not self.fresh:
            return
        row = {
            "step": self.state.step,
            "episodes": self.state.step * self.config.episodes_per_step,
            "seconds": round(self.state.seconds, 2),
            "loss": self.state.loss,
            "train_accuracy": self.state.accuracy,
            "validation_accuracy": self.validation if self.fresh else None,
            "learning_rate": self.rate,
            "gradient_norm": self.norm,
            "episodes_per_second": round(self.speed, 1),
        }
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, self.state.step)
        self.written, self.fresh, self.steps, self.busy = self.state.step, False, 0, 0.0

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()


@contextmanager
def open_board(run_dir: Path, step: int) -> Iterator[Any]:
    """A TensorBoard log in a run folder, from `step` on. A disk that fills while it is open raises InputError."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        with SummaryWriter(str(run_dir / "tensorboard"), purge_step=step) as board:
            yield board
    except OSError as error:
        why = error.strerror or error
        advice = "the last good checkpoint is kept: free some space, and go on with --resume"
        raise InputError(f"cannot write into {run_dir}: {why}; {advice}") from error


def truncate_metrics(file: Path, step: int) -> None:
    """Drop the rows after `step`, which a resumed run writes again."""
    if file.exists():
        kept = [json.dumps(row) for row in read_metrics(file) if row.get("step", 0) <= step]
        write_atomically(file, "".join(f"{row}\n" for row in kept).encode())
