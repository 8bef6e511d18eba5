"""Two ranks of torchrun: the gradient and the training of one process, one writer, and no rank that fails unnoticed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import ranks as asked
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ranks import CONFIG, KILLED, OPTIONS, PAUSE
from test_training import CONFIG as TINY
from test_training import IMAGES
from tolerances import TOLERANCE, assert_close

from mini_ht import InputError, load
from mini_ht.training import loop
from mini_ht.training.distributed import Ranks, others_may_end
from mini_ht.training.flat import Layout
from mini_ht.training.loop import Trainer, fresh_state, interrupts_wait, train
from mini_ht.training.workers import Workers, gradient

STEPS = CONFIG.episodes // CONFIG.episodes_per_step
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAIN = ["train", "quickstart", *(f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items())]


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    """Two ranks, to their end; what they print comes together."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(command, text=True, timeout=600, env=environment, stdout=-1, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set of 14 classes of 8 x 8 images that differ in brightness."""
    place, rng = tmp_path_factory.mktemp("ranks"), np.random.default_rng(0)
    for label in range(14):
        part = ("train", "validation", "test")[min(label // 4, 2)]
        (classes := place / "data" / part / f"class{label}").mkdir(parents=True)
        for number in range(7):
            pixels = rng.integers(0, 20, (8, 8))
            pixels[:, :4] += 40 + 15 * label
            Image.fromarray(pixels.astype(np.uint8)).save(classes / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def alone(folder) -> list[float]:
    """The losses of one process; half of its way is left in `half0`, for two ranks to go on from."""
    losses: list[float] = []
    take = Trainer.step

    def step(self, rate, **options):
        if self.state.step == STEPS // 2 and len(losses) < STEPS:
            raise KeyboardInterrupt
        figures = take(self, rate, **options)
        losses.append(figures[0])
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt, match="a checkpoint is saved"):
            train(CONFIG, asked.read(folder), folder / "half0", workers=1, quiet=True)
        losses += [0.0] * STEPS  # no more stops
        train(CONFIG, asked.read(folder), folder / "alone", workers=1, quiet=True)
    return losses[-STEPS:]


@pytest.fixture(scope="module")
def found(folder, alone) -> list[dict]:
    """What each of two healthy ranks found."""
    done = torchrun(asked.__file__, "laws", folder)
    assert done.returncode == 0, done.stdout
    return [json.loads((folder / f"rank{number}.json").read_text()) for number in range(2)]


@pytest.fixture(scope="module")
def restarted(folder) -> subprocess.CompletedProcess:
    """A run in a used folder, in which a rank is killed; torchrun starts both again."""
    (folder / "restarted").mkdir()
    (folder / "restarted" / loop.STATE).write_text("of an earlier run")
    return torchrun("--max-restarts=1", *fail(folder, "restarted"), "--overwrite")


def fail(folder: Path, name: str) -> list[object]:
    """The command in ranks that do as `fail` in ranks.py says, in a run folder of that name."""
    return [asked.__file__, "fail", folder, *TRAIN, f"--data-dir={folder / 'data'}", f"--run-dir={folder / name}"]


@given(count=st.integers(1, 9), more=st.integers(0, 20))
def test_every_episode_has_one_rank(count, more):
    """However many ranks there are, their parts are the step's episodes in order, none empty, and none much larger.

    So that another number of ranks sees the same episodes. Too few episodes for the ranks are refused.
    """
    episodes = count + more
    parts = [list(range(episodes)[Ranks(number, count).part(episodes)]) for number in range(count)]
    assert list(chain(*parts)) == list(range(episodes))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and min(map(len, parts)) >= 1
    with pytest.raises(InputError, match=f"{count - 1} episodes a step do not go round {count} ranks"):
        Ranks(0, count).part(count - 1)


def test_the_gradient_is_that_of_one_process(found):
    """Two ranks, of 2 and 3 episodes, sum to the gradient, loss and accuracy of one process, in the same bits."""
    for rank in found:
        assert max(rank["gradients"]["errors"]) <= TOLERANCE["float64"], rank["gradients"]["errors"]
    assert found[0]["gradients"]["sum"] == found[1]["gradients"]["sum"]


def test_ranks_draw_different_episodes(found, folder):
    """The rows of the two ranks differ, and together are those that one process draws."""
    images = asked.read(folder)["train"]
    for number, step in enumerate((0, 5)):
        first, second = (rank["gradients"]["rows"][number] for rank in found)
        whole = asked.training_episodes(CONFIG, images, step).support_rows.tolist()
        assert (len(first), len(second)) == (2, 3) and first + second == whole
        assert not any(row in second for row in first)


def test_the_step_for_gpus_sums_over_ranks(found):
    """The trainer for GPUs, run here on CPUs, has with two ranks the loss, accuracy and norm of one process."""
    for rank in found:
        assert_close(*map(np.array, rank["device"]), "float32")


@pytest.mark.parametrize("name", ["fresh", "half"])
def test_the_training_is_that_of_one_process(found, alone, name):
    """Two ranks have the losses of one process, also when they go on from its checkpoint; both end in the same bits."""
    losses = found[0][name]["losses"]
    assert len(losses) == (STEPS if name == "fresh" else STEPS // 2)
    assert_close(np.array(losses), np.array(alone[-len(losses) :]), "float32")
    assert found[0][name]["vector"] == found[1][name]["vector"]


def test_only_the_first_rank_writes(found, folder):
    """The other rank logs nothing, and its run folder is never made."""
    assert not any(found[1][name]["losses"] for name in ("fresh", "half", "clock"))
    for name in ("fresh", "half", "clock"):
        assert (folder / f"{name}0" / "model.safetensors").exists() and not (folder / f"{name}1").exists()


def test_the_others_wait_without_work(found):
    """While the first rank saves for a second and a half, the other one waits, and uses next to no time of its core."""
    wall, cpu = found[1]["fresh"]["longest"]
    assert wall >= 0.9 * PAUSE and cpu < 0.1 * PAUSE, (wall, cpu)


def test_ranks_agree_on_the_time(found):
    """A training by time ends after the same step on both ranks, by the clock of the first."""
    first, second = (rank["clock"] for rank in found)
    assert first["step"] == second["step"] > 0 and first["seconds"] == second["seconds"] >= 0.005 * 60
    assert first["vector"] == second["vector"]


def test_a_restart_goes_on(restarted, found, folder):
    """When a rank is killed the first one saves; started again, they go on from there and end in the same bits."""
    assert restarted.returncode == 0 and "Traceback" not in restarted.stdout, restarted.stdout
    assert re.search("mini-ht: stopped;.* a checkpoint is saved; .*--resume goes on", restarted.stdout)
    assert (folder / "begun").read_text().splitlines() == ["0 0", f"1 {KILLED}"]
    ends = [load(folder / name)[0] for name in ("restarted", "fresh0")]
    assert ends[0].keys() == ends[1].keys() and all((ends[0][name] == ends[1][name]).all() for name in ends[0])
    assert (folder / "restarted" / "summary.json").exists() and load(folder / "restarted")[1] == CONFIG


def test_a_rank_that_fails_ends_all(folder):
    """A rank's own error is printed once and ends both ranks, and torchrun's exit code is not 0."""
    done = torchrun(*fail(folder, "failed"))
    assert done.returncode != 0 and done.stdout.count("an image is broken") == 1, done.stdout
    assert "mini-ht: an image is broken; replace it\n" in done.stdout and not (folder / "failed").exists()


def test_one_rank_complains(found):
    """Of ranks that fail at the same time, one is the first, and prints its error."""
    assert sorted(rank["complains"] for rank in found) == [False, True]


def test_processes_within_a_rank():
    """Two processes that share a rank's part give the gradient of that part."""
    config, images = dataclasses.replace(TINY, episodes_per_step=7), IMAGES["train"]
    vector = fresh_state(config, asked.CPU).vector.share_memory_()
    both = Workers(config, images, vector, 2, part := slice(2, 5))
    try:
        wanted = gradient(config, Layout(config).leaves(vector), images, 3, part)
        for mine, whole in zip(both.gradient(3), wanted, strict=True):
            assert_close(mine, whole, "float32")
    finally:
        both.close()
    assert both.own == slice(2, 3) and len(both.processes) == 1


def test_ranks_with_other_options_or_images(folder, monkeypatch):
    """A rank whose config or classes are not the first one's is told so, before any step."""
    images = asked.read(folder)["train"]
    first: list = []
    monkeypatch.setattr(Ranks, "copy_first", lambda self, figures, *vectors: first.append(figures.clone()))
    monkeypatch.setattr(dist, "new_group", lambda backend: backend)
    state = fresh_state(CONFIG, asked.CPU)
    assert Ranks(0, 2, True).begin(CONFIG, images, state).group == "gloo"
    monkeypatch.setattr(Ranks, "copy_first", lambda self, figures, *vectors: figures.copy_(first[0]))
    assert Ranks(1, 2, True).begin(CONFIG, images, state).group == "gloo"
    other = dataclasses.replace(images, names=(*images.names[:-1], "another"))
    for config, some in ((dataclasses.replace(CONFIG, seed=4), images), (CONFIG, other)):
        with pytest.raises(InputError, match="rank 1 has other options or other training images than rank 0"):
            Ranks(1, 2, True).begin(config, some, state)


def test_other_ranks_gone():
    """When the others are gone the first rank stops as after Ctrl-C, and any other ends without a word."""
    gone = "[/a/pair.cc:5] Connection closed by peer [::1]:9. This is typically caused by something"
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt, match=r"another rank is gone \(Connection closed by peer \[::1\]:9\)$"):
            with others_may_end(0):
                raise RuntimeError(gone)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        with pytest.raises(SystemExit, match="1"), others_may_end(1):
            raise RuntimeError(gone)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_waits_for_the_end_of_a_step():
    """SIGTERM, which the first rank takes as Ctrl-C, waits like that until an update is whole."""
    done = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_wait():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("update")
        assert done == ["update"] and signal.getsignal(signal.SIGTERM) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_torchrun_there_is_one_rank():
    """One rank sums, copies and waits for nobody."""
    assert dataclasses.astuple(loop.join()) == (0, 1, False, None, None) and Ranks().same(1.5) == 1.5 and Ranks().first
