"""What the ranks of tests/test_distributed.py do: `torchrun ... tests/ranks.py laws | fail FOLDER`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import mini_ht.__main__ as command
from mini_ht import InputError, preset
from mini_ht.datasets import open_dataset
from mini_ht.training import loop, report, workers
from mini_ht.training.device import DeviceStep
from mini_ht.training.distributed import ALONE, Ranks, another_failed, join
from mini_ht.training.flat import Layout
from mini_ht.training.loop import Trainer, adamw, fresh_state, train
from mini_ht.training.tasks import training_episodes
from mini_ht.training.workers import Workers

CPU = torch.device("cpu")
OPTIONS = {
    **{"dataset": "folder", "way": 2, "queries": 2, "channels": 2, "blocks": 2, "image_size": 8, "encoding": 8},
    **{"layers": 1, "shared_features": 4, "local_features": 2, "learning_rate": 3e-3, "shift": 1, "seed": 3},
    **{"episodes": 100, "episodes_per_step": 5, "precision": "float32", "upright": 0.3},
}
CONFIG = dataclasses.replace(preset("quickstart"), **OPTIONS)
KILLED = 7  # the step in which rank 1 is killed
PAUSE = 1.5  # seconds that a slow disk takes to save


def read(folder: Path) -> dict:
    """The parts of the data set."""
    return open_dataset("folder", folder / "data", size=8)


def gradients(ranks: Ranks, folder: Path) -> dict:
    """Two steps in float64: how far the sum is from one process's, which rows this rank drew, and the sum's bits."""
    images, rows, errors = read(folder)["train"], [], []
    workers.storage_dtype = lambda config, device: torch.float64
    vector, part = fresh_state(CONFIG, CPU).vector.double(), ranks.part(CONFIG.episodes_per_step)
    shared, alone = Workers(CONFIG, images, vector, 1, part), Workers(CONFIG, images, vector, 1)
    for step in (0, 5):
        rows.append(training_episodes(CONFIG, images, step, part).support_rows.tolist())
        totals = torch.cat(shared.gradient(step))
        ranks.add_up(totals)
        for found, wanted in zip((totals[:-2], totals[-2:]), alone.gradient(step), strict=True):
            errors.append(float((found - wanted).abs().max() / wanted.abs().max()))
    return {"errors": errors, "rows": rows, "sum": totals.numpy().tobytes().hex()}


def device_steps(ranks: Ranks, folder: Path) -> list:
    """Loss, accuracy and norm of three steps of the trainer for GPUs, of all ranks and of one process."""
    found = []
    for place in (ranks, ALONE):
        state = fresh_state(CONFIG, CPU)
        step = DeviceStep(CONFIG, read(folder)["train"], state, adamw(CONFIG, Layout(CONFIG), state), ranks=place)
        for state.step in range(3):
            found.append(step(1e-3))
    return [found[:3], found[3:]]


def curve(folder: Path, name: str, **changes) -> dict:
    """A training with a slow disk: its losses (of the first rank), its end, and how this rank waited for the first."""
    losses, waits = [], []
    add, same, save = loop.Log.add, Ranks.same, loop.save_run

    def spy(self, loss, *figures):
        losses.append(loss)
        return add(self, loss, *figures)

    def watched(self, number):
        wall, cpu = time.perf_counter(), time.process_time()
        answer = same(self, number)
        waits.append((time.perf_counter() - wall, time.process_time() - cpu))
        return answer

    def slow(run_dir, config, state):
        time.sleep(PAUSE if state.step == 3 else 0)
        save(run_dir, config, state)

    loop.Log.add, Ranks.same, loop.save_run, loop.CHECKPOINT_SECONDS = spy, watched, slow, 0.0
    place = folder / f"{name}{os.environ['RANK']}"
    config = dataclasses.replace(CONFIG, **changes)
    state = train(config, read(folder), place, quiet=True, resume=(place / loop.STATE).exists())
    loop.Log.add, Ranks.same, loop.save_run = add, same, save
    end = {"step": state.step, "seconds": state.seconds, "vector": state.vector.cpu().numpy().tobytes().hex()}
    return end | {"losses": losses, "longest": max(waits)}


def fail(folder: Path) -> int:
    """The command, in which rank 1 finds a broken image or, if there is a restart, is killed at first."""
    attempt, last = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"] == "1"
    begin, take = Trainer.__init__, Trainer.step

    def note(self, *arguments, **options):
        begin(self, *arguments, **options)
        if not last:
            with (folder / "begun").open("a") as stream:
                stream.write(f"{attempt} {self.state.step}\n")

    def step(self, *arguments, **options):
        if last and (attempt, self.state.step) == (0, KILLED):
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, *arguments, **options)

    def refuse(*arguments):
        raise InputError("an image is broken; replace it")

    Trainer.__init__, Trainer.step, report.EPISODES = note, step, 20
    if last and os.environ["TORCHELASTIC_MAX_RESTARTS"] == "0":
        command.cli.open_images = refuse
    return command.main()


def laws(folder: Path) -> int:
    """What two healthy ranks are asked, into a file of this rank."""
    found = {"fresh": curve(folder, "fresh"), "half": curve(folder, "half")}
    found["clock"] = curve(folder, "clock", episodes=0, minutes=0.005)
    ranks = join()
    found["device"] = device_steps(ranks, folder)
    found["gradients"] = gradients(ranks, folder)
    found["complains"] = not another_failed()
    (folder / f"rank{ranks.number}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    law, place, *sys.argv[1:] = sys.argv[1:]
    sys.exit({"laws": laws, "fail": fail}[law](Path(place)))
