"""The training loop: AdamW on the query loss of the generated CNNs; resumable, logged, ended by time or count."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mini_ht.config import Config
from mini_ht.datasets.images import ImageSet
from mini_ht.errors import InputError
from mini_ht.evaluation import affordable_queries, evaluate, evaluation_episodes
from mini_ht.parameters import CHECKPOINT, save, to_numpy
from mini_ht.training.checkpoint import STATE, State, fresh_state, load_run, save_run
from mini_ht.training.device import DeviceStep, set_gradient
from mini_ht.training.distributed import ALONE, Ranks, join, restarted
from mini_ht.training.flat import Layout
from mini_ht.training.log import METRICS, Log, open_board, truncate_metrics
from mini_ht.training.report import clear_run
from mini_ht.training.schedule import average_decay, is_upright, learning_rate, progress
from mini_ht.training.statistics import learn_statistics
from mini_ht.training.workers import Clock, Workers

CHECKPOINT_SECONDS = 60.0
VALIDATION_EPISODES = 64
DIVERGED = 10.0  # times the loss of guessing, or of the first step, which wide features can put far off
KEPT = "the last good checkpoint is kept. Train on with a lower learning_rate or a smaller clip"


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end of the block, so that a checkpoint never holds half a step."""
    seen: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # other threads get no signals
    waiting = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in waiting}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for first in seen[:1]:
        signal.raise_signal(first)


def adamw(config: Config, layout: Layout, state: State) -> torch.optim.AdamW:
    """AdamW on the state's vector and moments: decay shrinks matrices, not biases and gains.

    Each group has a `rate`: how much faster than the others its parameters learn. They decay no faster.
    """
    on_gpu = state.vector.device.type == "cuda"
    groups, moments = [], {}
    for which, part in layout.parts.items():
        if part.start == part.stop:
            continue
        leaf, rate = state.vector[part], config.conv_rate if which == "convs" else 1.0  # shares the vector's memory
        decay = 0.0 if which == "vectors" else config.weight_decay / rate
        groups.append({"params": [leaf], "weight_decay": decay, "rate": rate})
        moments[leaf] = {
            "step": torch.tensor(float(state.step), device=leaf.device),
            "exp_avg": state.first_moment[part],
            "exp_avg_sq": state.second_moment[part],
        }
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True, capturable=on_gpu)
    optimiser.state.update(moments)
    return optimiser


class Trainer:
    """The state of a training, and one step of it."""

    ranks = ALONE

    def __init__(
        self,
        config: Config,
        images: ImageSet,
        workers: int = 0,
        state: State | None = None,
        impl: str = "auto",
        ranks: Ranks = ALONE,
    ) -> None:
        """workers: processes that share each step (each rank's part of it); 0 takes one a core, or one a rank.

        With a GPU there is one, and impl is heard.
        """
        self.config, self.layout, self.ranks = config, Layout(config), ranks
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.state = state or fresh_state(config, self.device)
        if self.device.type == "cpu":
            self.state.vector.share_memory_()
        self.optimiser = adamw(config, self.layout, self.state)
        if workers < 0:
            raise InputError(f"workers is {workers}; wanted 0 (one a core) or more")
        # A GPU takes whole steps; cores share the gradient of each.
        on_gpu = self.device.type == "cuda"
        self.graph = DeviceStep(config, images, self.state, self.optimiser, impl, ranks) if on_gpu else None
        part = ranks.part(config.episodes_per_step)
        count = min(workers or (1 if ranks.joined else os.cpu_count() or 1), part.stop - part.start)
        self.workers = None if on_gpu else Workers(config, images, self.state.vector, count, part)

    def step(self, rate: float, clock: Clock = lambda name: None, upright: bool = False) -> tuple[float, float, float]:
        """One update with learning rate `rate`; returns loss, accuracy on the queries, and the gradient's norm.

        upright turns no class. Raises InputError, with the parameters unchanged, when loss or gradient is not a number.
        """
        if self.graph:
            with interrupts_wait():
                loss, accuracy, norm = self.graph(rate, clock, upright)
                self.check(loss, norm)
                self.state.step += 1
            return loss, accuracy, norm
        assert self.workers
        totals = torch.cat(self.workers.gradient(self.state.step, clock, upright))  # [size + 2]
        self.ranks.add_up(totals)
        clock("wait")
        gradient, (loss, accuracy) = totals[:-2], totals[-2:].tolist()
        norm = float(gradient.norm())
        self.check(loss, norm)
        if self.config.clip and norm > self.config.clip:
            gradient *= self.config.clip / norm
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
        set_gradient(self.optimiser, gradient)
        with interrupts_wait():
            self.optimiser.step()
            if self.config.ema:
                self.state.average.lerp_(self.state.vector, 1 - average_decay(self.config, self.state.step))
            self.state.step += 1
        clock("optimise")
        return loss, accuracy, norm

    def check(self, loss: float, norm: float) -> None:
        """Stop a training whose numbers broke down."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            came = f"training broke down at step {self.state.step}: loss {loss}, gradient norm {norm}"
            raise InputError(f"{came}; {KEPT}")

    def save(self, run_dir: Path) -> None:
        """Write the training state, then the model; each file is replaced in one step."""
        save_run(run_dir, self.config, self.state)

    def close(self) -> None:
        """End the other processes."""
        if self.workers:
            self.workers.close()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters to evaluate, as views."""
        return self.layout.views(self.state.evaluated(self.config))

    def validate(self, images: ImageSet) -> float:
        """Accuracy on episodes of classes that are not trained on, the same episodes each time."""
        batches = evaluation_episodes(images, VALIDATION_EPISODES, **part_task(self.config, images))
        with torch.no_grad():
            return evaluate(self.parameters, self.config, batches).accuracy


def part_task(config: Config, images: ImageSet) -> dict[str, Any]:
    """The config's task, with as many classes and queries as the validation classes have."""
    queries = affordable_queries(images, config, config.queries)
    return config.task | {"way": min(config.way, max(2, images.classes)), "queries": queries}


def check_data(config: Config, images: Mapping[str, ImageSet]) -> None:
    """Draw an episode of each part, so that too few classes or images are noticed before anything is written."""
    for part, some in images.items():
        task = config.task | {"shot": max(config.shot, config.vary)} if part == "train" else part_task(config, some)
        if part == "test":
            task["way"] = config.way
        try:
            next(evaluation_episodes(some, 1, **task))
        except InputError as error:
            raise InputError(f"{part} images: {error}") from error


def train(
    config: Config,
    images: Mapping[str, ImageSet],
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    quiet: bool = False,
) -> State:
    """Train and leave in `run_dir`: model.safetensors, training.safetensors, metrics.jsonl and a TensorBoard log.

    Args:
        config: what to train, and for how long.
        images: "train" and, for the figures on the way, "validation".
        run_dir: where results go; must be new, or hold a run to resume.
        resume: go on from the last checkpoint. By episodes, the result is that of an uninterrupted run.
        overwrite: of a run that is there, begin anew; it stays until this one can begin.
        workers: see Trainer. More than one are started anew, so that a script which calls this needs the usual
            `if __name__ == "__main__"`.
        quiet: no progress bar.

    Of several ranks that torchrun started, each calls this: all share the steps and have the state in the end, and
    the first alone touches `run_dir`. Started again after one ended, they go on from the checkpoint.

    Raises:
        InputError: a folder in use, a checkpoint that does not fit, too few classes or images, divergence.
        KeyboardInterrupt: after Ctrl-C, or when another rank has ended, once the checkpoint is written.
    """
    check_data(config, images)
    ranks = join()
    resume = ranks.first and (resume or (restarted() and (run_dir / STATE).exists()))
    if ranks.first and not (resume or overwrite) and ((run_dir / STATE).exists() or (run_dir / CHECKPOINT).exists()):
        raise InputError(f"{run_dir} holds a run already; use --resume to go on, --overwrite, or another --run-dir")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = load_run(run_dir, config, device) if resume else fresh_state(config, device)
    ranks = ranks.begin(config, images["train"], state)
    trainer = Trainer(config, images["train"], workers, state, ranks=ranks)
    try:
        if ranks.first:
            if overwrite and not resume:
                clear_run(run_dir)
            lead(trainer, images, run_dir, quiet)
        else:
            follow(trainer)
    finally:
        trainer.close()
    return state


def lead(trainer: Trainer, images: Mapping[str, ImageSet], run_dir: Path, quiet: bool) -> None:
    """The steps of the first rank, which writes all files."""
    run_logged(trainer, images, run_dir, quiet)
    with torch.no_grad():
        learned = learn_statistics(trainer.parameters, trainer.config, images["train"])
    save(run_dir / CHECKPOINT, to_numpy(trainer.parameters | learned), trainer.config)


def run_logged(trainer: Trainer, images: Mapping[str, ImageSet], run_dir: Path, quiet: bool) -> None:
    """`run`, with its log; the run folder is a run from the first step on."""
    trainer.save(run_dir)
    truncate_metrics(run_dir / METRICS, trainer.state.step)
    with open_board(run_dir, trainer.state.step) as board:
        log = Log(run_dir / METRICS, board, trainer.config, trainer.state, quiet)
        run(trainer, images.get("validation"), run_dir, log)


def follow(trainer: Trainer) -> None:
    """The steps of a rank that is not the first: by the first one's clock, and waiting while that one does more."""
    config, state = trainer.config, trainer.state
    state.seconds = trainer.ranks.same(0.0)
    while (done := progress(config, state.step * config.episodes_per_step, state.seconds)) < 1:
        trainer.step(learning_rate(config, done), upright=is_upright(config, done))
        state.seconds = trainer.ranks.same(0.0)
    trainer.ranks.leave()


def run(trainer: Trainer, validation: ImageSet | None, run_dir: Path, log: Log) -> None:
    """Steps until the config's time or count is over; checkpoints on the way, at the end, and on Ctrl-C."""
    config, state = trainer.config, trainer.state
    started = time.perf_counter() - state.seconds
    saved = time.perf_counter()
    pause = max(5.0, 60 * config.minutes / 80) if not config.episodes else 20.0  # seconds between validations
    next_validation, first, most = state.seconds + pause, state.step, 0.0
    try:
        while (done := progress(config, state.step * config.episodes_per_step, state.seconds)) < 1:
            if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                trainer.save(run_dir)
                saved = time.perf_counter()
            trainer.ranks.same(state.seconds)
            rate = learning_rate(config, done)
            begun = time.perf_counter()
            loss, accuracy, norm = trainer.step(rate, upright=is_upright(config, done))
            now = time.perf_counter()
            state.seconds = now - started
            smooth = log.add(loss, accuracy, norm, rate, now - begun)
            most = most or DIVERGED * max(smooth, math.log(config.way))
            if smooth > most:
                came = f"training diverged at step {state.step}: the loss is {smooth:.1f}, over {most:.1f}"
                raise InputError(f"{came}; {KEPT}")
            if validation is not None and state.seconds >= next_validation:
                log.validated(trainer.validate(validation))
                next_validation = state.seconds + pause
        trainer.ranks.same(state.seconds)
        trainer.ranks.leave()
        if validation is not None and state.step > first:
            log.validated(trainer.validate(validation))
        log.write()
        trainer.save(run_dir)
    except KeyboardInterrupt as stop:
        with suppress(KeyboardInterrupt), interrupts_wait():
            trainer.save(run_dir)
        kept = "a checkpoint is saved; the same command with --resume goes on"
        raise KeyboardInterrupt("; ".join([*map(str, stop.args), kept])) from None
    finally:
        log.close()
