"""A classifier for each of thousands of support folders: in batches, over processes, resumable."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mini_ht.adaptation import Generator, adapt, open_generator
from mini_ht.errors import InputError
from mini_ht.export import export
from mini_ht.support_folder import read_support

BATCH = 8  # tasks that share a pass of the generator
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Outcome:
    """What became of some support folders."""

    written: int = 0
    skipped: int = 0  # their classifiers were there
    failed: list[str] = field(default_factory=list)  # a sentence each
    warnings: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Count another's, too."""
        self.written, self.skipped = self.written + other.written, self.skipped + other.skipped
        self.failed, self.warnings = self.failed + other.failed, self.warnings + other.warnings


@dataclass(frozen=True)
class Order:
    """How classifiers are made of support folders."""

    checkpoint: str
    out: Path
    suffix: str = ".onnx"
    preprocess: str = "ink"
    polarity: str = "auto"
    force: bool = False
    half: bool = False

    def target(self, folder: Path) -> Path:
        """Where a support folder's classifier goes."""
        return self.out / f"{folder.name}{self.suffix}"


def adapt_many(order: Order, root: Path, workers: int = 1) -> Iterator[tuple[int, Outcome]]:
    """Write a classifier for each folder in `root`: yields (folders done or skipped, what became of them), as it goes.

    A folder whose classifier is there is skipped, unless order.force; a bad one is reported and skipped. Stopped at any
    time, it goes on from there when called again. workers: processes, each on one core.

    Raises InputError for a checkpoint or root that cannot be read, and for a root without folders.
    """
    generator = open_generator(order.checkpoint)
    folders = support_folders(root)
    if workers < 1:
        raise InputError(f"workers is {workers}; it must be at least 1")
    todo = [folder for folder in folders if order.force or not order.target(folder).exists()]
    if len(todo) < len(folders):
        skipped = len(folders) - len(todo)
        yield skipped, Outcome(skipped=skipped)
    batches = [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
    if workers == 1 or len(batches) < 2:
        for batch in batches:
            yield len(batch), adapt_batch(order, generator, batch)
        return
    context = multiprocessing.get_context("spawn")
    with _one_thread_each(), context.Pool(min(workers, len(batches)), _open, (order.checkpoint,)) as pool:
        for batch, outcome in zip(batches, pool.imap(partial(_work, order), batches), strict=True):
            yield len(batch), outcome


def support_folders(root: Path) -> list[Path]:
    """The visible folders in `root`, sorted; InputError where there are none."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot list {root} ({error.strerror}); give a folder of support folders") from error
    if not folders:
        raise InputError(f"{root} has no folders; put in one for each task, with a folder a class inside")
    return folders


def adapt_batch(order: Order, generator: Generator, folders: Sequence[Path]) -> Outcome:
    """The classifiers of some folders, in one pass of the generator."""
    outcome, good, tasks = Outcome(), [], []
    for folder in folders:
        try:
            shape, way = generator.image_shape, generator.config.way
            task, warnings = read_support(folder, shape, way, order.preprocess, order.polarity)
        except InputError as error:
            outcome.failed.append(f"{folder.name}: {error}")
            continue
        good.append(folder)
        tasks.append(task)
        outcome.warnings += warnings
    if not tasks:
        return outcome
    classifiers = adapt(generator, tasks, order.preprocess, order.polarity)
    for folder, task, classifier in zip(good, tasks, classifiers, strict=True):
        try:
            export(classifier, order.target(folder), task.images, force=order.force, half=order.half)
            outcome.written += 1
        except InputError as error:
            outcome.failed.append(f"{folder.name}: {error}")
    return outcome


_generator: Generator | None = None  # of a worker process


def _open(checkpoint: str) -> None:
    global _generator
    _generator = open_generator(checkpoint)


def _work(order: Order, folders: Sequence[Path]) -> Outcome:
    assert _generator is not None
    return adapt_batch(order, _generator, folders)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started inside compute on one thread; libraries read these variables when they are imported."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
