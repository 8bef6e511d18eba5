"""A full disk, a read-only folder, limits on file size and memory: one sentence, exit code 2, and nothing lost."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from faults import World, world
from PIL import Image
from test_kill import TINY, contents, whole_run, write_tasks

from mini_ht import Config, InputError, load
from mini_ht.classifier_file import load_classifier
from mini_ht.datasets import glyphs
from mini_ht.training import loop
from mini_ht.training.checkpoint import load_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")

DISK, FREE = 2 << 20, 4 << 10  # bytes of the disk that fills, and what is left of it
LARGEST = 40_000  # bytes: shared memory fits, the state of a run does not
KINDS = {"full disk": "No space left", "file size": "File too large", "read-only": "Permission denied"}
SMALL = {"way": 2, "queries": 2, "channels": 2, "blocks": 2, "image_size": 8, "encoding": 8, "layers": 1}
Tight = Callable[[], AbstractContextManager[dict[str, int]]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as found:
        yield found


@pytest.fixture(scope="module")
def trained(here: World) -> Path:
    run = here.folder / "trained"
    assert here.run("train", "quickstart", "--run-dir", run, "--workers", 1, *TINY, "--episodes", 40)[0] == 0
    return run


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("many") / "tasks", 3)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def place(tmp_path: Path, kind: str) -> Iterator[Path]:
    """A folder, on a small disk of its own if that is to fill."""
    (folder := tmp_path / "place").mkdir()
    if kind != "full disk":
        yield folder
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def tight(place: Path, kind: str) -> Tight:
    """with tight() as limits: there is no way to write a file of more than FREE bytes into the place."""

    @contextmanager
    def arrange() -> Iterator[dict[str, int]]:
        folders = [place, *(folder for folder in place.rglob("*") if folder.is_dir())]
        ballast = place / "ballast"
        if kind == "file size":
            yield {"file": LARGEST if (place / "run").exists() else FREE}
        elif kind == "full disk":
            ballast.write_bytes(bytes(shutil.disk_usage(place).free - FREE))
            yield {}
            ballast.unlink()
        else:
            for folder in folders:
                folder.chmod(0o500)
            yield {"modes": 1}
            for folder in folders:
                folder.chmod(0o700)

    return arrange


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, on stderr one line that begins mini-ht: and has these words."""
    code, out, err = result
    assert code == 2 and not out and "Traceback" not in err, result
    said = [line for line in err.replace("\r", "\n").splitlines() if line and not line.startswith("training")]
    assert len(said) == 1 and said[0].startswith("mini-ht: ") and all(word in said[0] for word in words), err


def test_training(here, trained, place, tight, kind):
    """A run that cannot be saved ends, its last checkpoint is good, and it can be resumed when there is room."""
    run = place / "run"
    shutil.copytree(trained, run)
    resume = ("train", "quickstart", "--run-dir", run, "--resume", "--episodes", 80, "--workers", 1)
    with tight() as limits:
        refused(here.run(*resume, **limits), str(run), KINDS[kind])
        whole_run(place)
        assert load_run(run, load(run)[1], torch.device("cpu")).step == 10
        assert {name for name in contents(run) if "tensorboard" not in name} <= contents(trained).keys()
    assert here.run(*resume)[0] == 0
    whole_run(place)
    assert load_run(run, load(run)[1], torch.device("cpu")).step == 20


@pytest.mark.parametrize("limits", [{"out": "/dev/full"}, {"file": 200}])
def test_evaluation(here, trained, limits):
    """Figures that cannot be written to stdout are an error."""
    before = contents(trained)
    code, _, err = here.run("evaluate", trained, "--episodes", 5, "--json", **limits)
    refused((code, "", err))
    assert contents(trained) == before


def test_adapt(here, tasks, place, tight, kind):
    """A classifier that cannot be written leaves the one that is there."""
    for name in ("c.npz", "c.onnx"):
        words = ("adapt", "omniglot", tasks / "task00", "--force", "-o", place / name)
        assert here.run(*words)[0] == 0
        before = contents(place)
        with tight() as limits:
            refused(here.run(*words, **limits), name, KINDS[kind])
        assert contents(place) == before


def test_adapt_many(here, tasks, place, tight, kind):
    """Classifiers that cannot be written are reported, each; the next call writes them."""
    (out := place / "out").mkdir()
    words = ("adapt-many", "omniglot", tasks, "--workers", 1, "-o", out)
    with tight() as limits:
        code, said, err = here.run(*words, **limits)
    assert code == 1 and "0 written, 0 were there, 3 failed" in said and "Traceback" not in err
    assert err.count(KINDS[kind]) == 3 and not contents(out)
    assert here.run(*words)[0] == 0
    assert sorted(contents(out)) == [f"task{number:02}.onnx" for number in range(3)]
    assert all(len(load_classifier(file).classes_) == 3 for file in out.iterdir())


def test_cache(here, place, tight, kind):
    """A cache that cannot be written is done without."""
    words = ("omniglot", "--data-dir", here.archives)
    with tight() as limits:
        assert here.run(*words, cache=place, **limits) == (0, "", "")
    assert not contents(place)
    assert here.run(*words, cache=place)[0] == 0
    assert len(contents(place)) == 1


def test_download(here, place, tight, kind):
    """Archives that cannot be written are an error, and the next call fetches them."""
    with tight() as limits:
        refused(here.run("omniglot", cache=place, **limits), "omniglot", KINDS[kind])
    assert not contents(place)
    assert here.run("omniglot", cache=place)[0] == 0
    assert len(contents(place)) == 3


def test_memory_of_a_training(here, tmp_path):
    """A step that does not fit into memory ends the run; with more memory it goes on from its checkpoint."""
    big = ("--episodes", 300, "--episodes-per-step", 300, "--image-size", 64, "--blocks", 4)
    words = ("train", "quickstart", "--run-dir", tmp_path / "run", "--workers", 1)
    refused(here.run(*words, *TINY, *big, memory=48), "out of memory")
    whole_run(tmp_path)
    assert load_run(tmp_path / "run", load(tmp_path / "run")[1], torch.device("cpu")).step == 0
    assert here.run(*words, "--resume")[0] == 0
    assert load_run(tmp_path / "run", load(tmp_path / "run")[1], torch.device("cpu")).step == 1


def test_memory_of_an_adaptation(here, tasks, tmp_path):
    """A photo too large for the memory is refused, and named; the classifier that is there stays."""
    support = shutil.copytree(tasks / "task00", tmp_path / "support")
    words = ("adapt", "omniglot", support, "--force", "-o", tmp_path / "c.npz")
    assert here.run(*words)[0] == 0
    before = contents(tmp_path)
    with Image.open(support / "a" / "0.png") as image:
        image.resize((7000, 7000)).save(support / "a" / "0.png")
    refused(here.run(*words, memory=40), "0.png", "memory")
    assert (tmp_path / "c.npz").read_bytes() == before["c.npz"] and len(contents(tmp_path)) == len(before)


def test_disk_that_fills_while_training(tmp_path, monkeypatch):
    """When the figures cannot be written any more, the run ends with the last good checkpoint."""

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.Log, "write", full)
    config = Config(**SMALL, episodes=8, episodes_per_step=4)
    images = {"train": glyphs(0, 4, drawings=4, size=8)}
    with pytest.raises(InputError, match=r"No space left on device; the last good checkpoint is kept.*--resume"):
        loop.train(config, images, tmp_path, workers=1, quiet=True)
    assert load_run(tmp_path, config, torch.device("cpu")).step == 0
    monkeypatch.undo()
    assert loop.train(config, images, tmp_path, workers=1, quiet=True, resume=True).step == 2
