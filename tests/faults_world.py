"""The command line in a small world, in processes that may be killed or starved: few glyphs, frequent checkpoints.

A server that has the imports behind it: for each line of JSON on stdin it forks a process, alone in its session, which
builds the world, gives up what `limits` says, touches `ready` and runs mini-ht with `words`. Prints the process's id
when it starts and its exit code when it ends.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import io
import json
import os
import resource
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLASSES = {"images_background.zip": 12, "images_evaluation.zip": 8}
DRAWINGS = 20
OBEY_FILE_MODES = ~(1 << 1 | 1 << 2)  # no CAP_DAC_OVERRIDE, no CAP_DAC_READ_SEARCH


def write_archives(folder: Path) -> Path:
    """Two small archives in Omniglot's format."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, classes in CLASSES.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for number in range(classes * DRAWINGS):
                Image.fromarray(rng.random((105, 105)) < 0.9).save(buffer := io.BytesIO(), "png")
                file = f"{name[:-4]}/A/character{number // DRAWINGS:02}/{number % DRAWINGS:02}.png"
                archive.writestr(file, buffer.getvalue())
    return folder


@dataclass
class Omniglot:
    """Open Omniglot, as every command does that works on it."""

    data_dir: Path | None = None


def open_omniglot(options: Omniglot) -> None:
    """Read, cache, and without a folder download the small archives."""
    from mini_ht.datasets import open_dataset

    open_dataset("omniglot", options.data_dir)


def build(archives: Path, home: str) -> None:
    """Omniglot is what `write_archives` left in a folder; glyphs are a dozen a part; work comes in small pieces."""
    from mini_ht import adapt_many, cli_classifier, datasets
    from mini_ht.training import loop, report

    module = sys.modules["mini_ht.datasets.omniglot"]  # as an attribute of the package, a function hides it
    sums = {name: hashlib.md5((archives / name).read_bytes()).hexdigest() for name in CLASSES}
    module.ARCHIVES = {name: (classes, sums[name]) for name, classes in CLASSES.items()}
    module.HOME = home
    cli_classifier.COMMANDS["omniglot"] = (Omniglot, open_omniglot)
    real = datasets.glyphs
    datasets.glyphs = lambda seed, classes, *, size: real(seed, 12, size=size)
    adapt_many.BATCH = 4
    loop.CHECKPOINT_SECONDS, loop.VALIDATION_EPISODES, report.EPISODES = 0.03, 8, 10


def give_up(limits: dict[str, int]) -> None:
    """Bytes that a file may have, MiB of memory beyond what is mapped now, or root's way past the modes of files."""
    if "file" in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file"], limits["file"]))
    if "memory" in limits:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, 2 * (mapped + (limits["memory"] << 20),))
    if "modes" in limits and os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
        sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their upper halves
        if libc.capget(header, sets) == 0:
            sets[0] &= OBEY_FILE_MODES
            libc.capset(header, sets)


def obey(order: dict[str, Any]) -> int:
    """One command in a fresh process; returns its exit code."""
    from mini_ht import cli

    os.setsid()
    os.environ.update(order["environment"])
    for number, (name, flags) in enumerate(order["streams"]):
        os.dup2(os.open(name, flags, 0o644), number)
    build(Path(order["archives"]), order["home"])
    if order["words"][0].startswith("adapt"):
        importlib.import_module("onnxruntime")  # not before the fork: it starts a thread
    give_up(order["limits"])
    Path(order["ready"]).touch()
    return cli.main(order["words"])


def serve() -> None:
    """Run orders one after the other until stdin ends."""
    import matplotlib.font_manager
    import onnx
    import torch._dynamo  # AdamW imports it
    import torch.utils.tensorboard

    import mini_ht.adapt_many
    import mini_ht.cli_demo
    import mini_ht.training.report

    assert all((matplotlib, mini_ht, onnx))
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if (process := os.fork()) == 0:
            sys.exit(obey(order))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
