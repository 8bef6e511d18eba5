"""A classifier for each of thousands of support folders: in batches, over processes, resumable."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from mini_ht.adaptation import Generator, adapt, open_generator
from mini_ht.errors import InputError
from mini_ht.export import check_bytes, check_target, file_bytes
from mini_ht.files import write_atomically
from mini_ht.memory import keep_freed_memory
from mini_ht.support_folder import read_support

# Tasks that are adapted and written together. Of their files only the first is run before it is put in place: a fault
# in writing would show in every one. If it does, the next one is the first.
BATCH = 16
WRITERS = 2  # files of a batch that wait for the disk at once
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
    precision: str = "float32"
    views: int = 1

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
    folders = own_folders(root)
    if order.out.exists() and not order.out.is_dir():
        raise InputError(f"{order.out} is a file; give a folder, new or not, for the classifiers")
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
    connections = _start(order, min(workers, len(batches)))
    waiting, busy = iter(batches), dict[Any, list[Path]]()
    try:
        for connection in connections:
            busy[connection] = next(waiting)
            connection.send(busy[connection])
        while busy:
            answered: list[Any] = wait(list(busy))
            for connection in answered:
                outcome = connection.recv()
                yield len(busy.pop(connection)), outcome
                if more := next(waiting, None):
                    busy[connection] = more
                    connection.send(more)
    except (EOFError, ConnectionError) as error:
        advice = "the same command goes on with what is missing, if need be with --workers 1"
        raise InputError(f"a worker process ended by itself (out of memory?); {advice}") from error
    finally:
        for connection in connections:
            connection.close()


def rank() -> tuple[int, int]:
    """This process's number and how many there are: those that torchrun started, or one."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)


def own_folders(root: Path) -> list[Path]:
    """This rank's share of the folders in `root`; of one process, all of them."""
    number, count = rank()
    return support_folders(root)[number::count]


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
    """The classifiers of some folders: each whole and checked, or reported."""
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
    classifiers = adapt(generator, tasks, order.preprocess, order.polarity, order.views)
    with ThreadPoolExecutor(WRITERS) as pool:  # the disk confirms a file while the next ones are built
        writings: list[tuple[Path, Future[None]]] = []
        for folder, task, classifier in zip(good, tasks, classifiers, strict=True):
            try:
                file = check_target(order.target(folder), order.force)
                data = file_bytes(classifier, file, order.precision)
                if not writings:
                    check_bytes(data, classifier, file, task.images[:4], order.precision)
                writings.append((folder, pool.submit(write_atomically, file, data)))
            except InputError as error:
                outcome.failed.append(f"{folder.name}: {error}")
        for folder, writing in writings:
            try:
                writing.result()
                outcome.written += 1
            except InputError as error:
                outcome.failed.append(f"{folder.name}: {error}")
    return outcome


def _start(order: Order, count: int) -> list[Any]:
    """Worker processes, each at the end of a pipe of its own, so that the end of one is noticed, and ours by them."""
    context, connections = multiprocessing.get_context("spawn"), []
    with _one_thread_each():
        for _ in range(count):
            here, there = context.Pipe()
            context.Process(target=_serve, args=(there, order), daemon=True).start()
            there.close()
            connections.append(here)
    return connections


def _serve(connection: Any, order: Order) -> None:
    """A worker process: answers batches of folders with their outcomes, until the pipe closes."""
    keep_freed_memory()
    gc.set_threshold(100_000)  # each collection goes through all that the libraries hold
    generator = open_generator(order.checkpoint)
    with suppress(EOFError, ConnectionError):
        while True:
            connection.send(adapt_batch(order, generator, connection.recv()))


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
