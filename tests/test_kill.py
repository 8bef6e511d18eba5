"""SIGKILL at any moment: files are whole or absent, the next run goes on, and ends where an unkilled one ends."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Operation, World, survive, world
from PIL import Image
from safetensors.numpy import load_file

from mini_ht import load
from mini_ht.classifier_file import load_classifier
from mini_ht.datasets import glyphs
from mini_ht.parameters import read_tensors
from mini_ht.training.checkpoint import STATE

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes in /proc")

TINY = (
    "--episodes 240 --way 2 --queries 2 --channels 2 --blocks 2 --image-size 8 --encoding 8 --layers 1 "
    "--shared-features 4 --local-features 2 --episodes-per-step 4 --precision float32"
).split()
RUN = {"model.safetensors", "metrics.jsonl", "summary.json", "curve.png", "episode.png", "tensorboard", STATE}
TASKS = 16


def visible(folder: Path) -> set[str]:
    """What a folder holds; nothing that is hidden may be left there."""
    names = {file.name for file in folder.iterdir()}
    assert not (hidden := {name for name in names if name.startswith(".")}), hidden
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Training


def rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl that was not cut short."""
    text = file.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def whole_run(folder: Path) -> None:
    for file in (folder / "run").glob("[!.]*"):
        if file.suffix == ".safetensors":
            read_tensors(file, ("",) if file.name.startswith("model") else ("vector/", "average/"))
        elif file.suffix == ".png":
            Image.open(file).load()
        elif file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert file.name in ("metrics.jsonl", "tensorboard"), file


def same_run(folder: Path, reference: Path) -> None:
    """The same bits, the same rows at every 50th step and the last, and no row twice."""
    ours, theirs = folder / "run", reference / "run"
    assert visible(ours) == RUN == visible(theirs)
    for name in ("model.safetensors", STATE):
        mine, others = (load_file(run / name) for run in (ours, theirs))
        assert {key: x.tobytes() for key, x in mine.items()} == {key: x.tobytes() for key, x in others.items()}
    assert load(ours)[1] == load(theirs)[1]
    last = load(ours)[1].episodes // 4
    kept = []
    for run in (ours, theirs):
        found = rows(run / "metrics.jsonl")
        steps = [(row["step"], row["validation_accuracy"] is not None) for row in found]
        assert steps == sorted(set(steps)) and steps[-1] == (last, True), steps
        # Validations on the way come by the clock, and the clock's figures differ.
        names = ("step", "loss", "train_accuracy", "learning_rate", "gradient_norm")
        kept.append({row["step"]: [row[name] for name in names] for row in found if row["step"] in (50, last)})
        kept.append(found[-1]["validation_accuracy"])
    assert kept[:2] == kept[2:]
    assert len(kept[0]) == 2


def training(workers: int) -> Operation:
    def words(folder: Path) -> list[Any]:
        start = ["--resume"] if (folder / "run" / STATE).exists() else TINY
        return ["train", "quickstart", "--run-dir", folder / "run", "--workers", workers, *start]

    return Operation(words, whole_run, same_run)


# Evaluation


def evaluation(trained: Path) -> Operation:
    def whole(folder: Path) -> None:
        assert contents(folder / "run") == contents(trained)

    def finished(folder: Path, reference: Path) -> None:
        ours, theirs = (json.loads((place / "stdout").read_text()) for place in (folder, reference))
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}

    def prepare(folder: Path) -> None:
        shutil.copytree(trained, folder / "run")

    return Operation(lambda folder: ["evaluate", folder / "run", "--episodes", 60, "--json"], whole, finished, prepare)


# Omniglot


def omniglot(archives: Path, download: bool) -> Operation:
    words = ["omniglot"] if download else ["omniglot", "--data-dir", archives]

    def whole(folder: Path) -> None:
        for file in folder.rglob("[!.]*.*"):
            if file.suffix == ".npz":
                with np.load(file) as arrays:
                    assert {name: arrays[name].shape[0] for name in arrays} == {"pixels": 400, "names": 20}
            else:
                assert file.read_bytes() == (archives / file.name).read_bytes()

    def finished(folder: Path, reference: Path) -> None:
        assert len(visible(folder)) == 2 + download
        assert contents(folder) == contents(reference)

    return Operation(lambda folder: words, whole, finished)


# Many classifiers


def write_tasks(folder: Path, count: int = TASKS) -> Path:
    """Support folders of three classes."""
    drawings = 255 - glyphs(seed=78, classes=3 * count, drawings=1, size=40).pixels[..., 0]
    for number, image in enumerate(drawings):
        place = folder / f"task{number // 3:02}" / "abc"[number % 3]
        place.mkdir(parents=True)
        Image.fromarray(image).save(place / "0.png")
    return folder


def many_classifiers(tasks: Path, workers: int) -> Operation:
    def whole(folder: Path) -> None:
        for file in (folder / "out").glob("[!.]*"):
            assert file.suffix == ".onnx" and load_classifier(file).classes_.tolist() == ["a", "b", "c"]

    def finished(folder: Path, reference: Path) -> None:
        assert visible(folder / "out") == {f"task{number:02}.onnx" for number in range(TASKS)}
        assert contents(folder / "out") == contents(reference / "out")

    words = ["adapt-many", "omniglot", tasks, "--workers", workers, "-o"]
    return Operation(lambda folder: [*words, folder / "out"], whole, finished)


# The lanes


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as found:
        yield found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("many") / "tasks")


def operation(name: str, here: World, tasks: Path) -> Operation:
    if name == "evaluate":
        run = here.folder / "trained"
        if not run.exists():
            assert here.run("train", "quickstart", "--run-dir", run, "--workers", 1, *TINY)[0] == 0
        return evaluation(run)
    if name in ("cache", "download"):
        return omniglot(here.archives, name == "download")
    return training(workers=int(name[-1])) if name.startswith("train") else many_classifiers(tasks, int(name[-1]))


def check(name: str, here: World, tasks: Path, whoms: str, seed: int, folder: Path) -> None:
    cache = name in ("cache", "download")
    tally = survive(here, operation(name, here, tasks), whoms.split(), seed, folder, cache)
    print(f"{name}: {tally}")
    assert tally.kills == len(whoms.split()) and tally.finished > 0


@pytest.mark.parametrize(
    "name, whoms",
    [
        ("train 1", "group group"),
        ("train 2", "main worker"),
        ("evaluate", "group"),
        ("cache", "group"),
        ("download", "group"),
        ("adapt-many 2", "group main worker"),
    ],
)
def test_kills(here, tasks, tmp_path, name, whoms):
    """Ten kills in all: nothing is lost that was written, nothing half written is left, and no process either."""
    check(name, here, tasks, whoms, 0, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(
    "name, whoms",
    [
        ("train 1", 25 * "group "),
        ("train 2", 5 * "main worker "),
        ("evaluate", 10 * "group "),
        ("cache", 20 * "group "),
        ("download", 15 * "group "),
        ("adapt-many 2", 7 * "group main worker "),
    ],
)
def test_hundred_kills(here, tasks, tmp_path, name, whoms):
    """101 kills in all."""
    check(name, here, tasks, whoms, 1, tmp_path)
