"""Training: it learns, goes on exactly where it stopped, and leaves whole files behind whatever happens."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from multiprocessing import resource_tracker, spawn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, seeds
from tolerances import assert_close

from mini_ht import Config, InputError, draw_parameters, load, save
from mini_ht import bench as bench_module
from mini_ht.bench import bench_training
from mini_ht.datasets.glyphs import glyphs
from mini_ht.datasets.images import ImageSet
from mini_ht.figures import read_metrics
from mini_ht.parameters import parameter_table
from mini_ht.training import loop, workers
from mini_ht.training.checkpoint import STATE, VECTORS, load_run, save_run
from mini_ht.training.device import set_gradient
from mini_ht.training.flat import Layout, kind
from mini_ht.training.loop import METRICS, Trainer, adamw, fresh_state, train, truncate_metrics
from mini_ht.training.schedule import average_decay, learning_rate, progress
from mini_ht.training.workers import Workers, gradient, smoothed_cross_entropy, storage_dtype

CPU = torch.device("cpu")
CONFIG = Config(
    **{"way": 2, "queries": 2, "channels": 2, "blocks": 2, "image_size": 8, "encoding": 8, "layers": 1, "seed": 3},
    **{"shared_features": 4, "local_features": 2, "episodes": 48, "episodes_per_step": 4, "learning_rate": 3e-3},
    precision="float32",
)


def easy(classes: int = 12, count: int = 5) -> ImageSet:
    """Classes that differ in where their bright half is and how bright it is, with little noise."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 20, (classes, count, 8, 8, 1))
    for label in range(classes):
        side = pixels[label].swapaxes(1, 2) if label % 2 else pixels[label]
        side[:, :4] += 60 + 15 * label
    return ImageSet(pixels.reshape(-1, 8, 8, 1).astype(np.uint8), np.full(classes, count), tuple("abcdefghijkl"))


IMAGES = {"train": easy(), "validation": easy()}


def run(config, run_dir, **options):
    return train(config, IMAGES, run_dir, **({"workers": 1, "quiet": True} | options))


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step, error) makes Trainer.step raise instead of doing that step; stop_at(None) takes it back."""
    real = Trainer.step

    def arrange(step, error=KeyboardInterrupt):
        def wrapped(self, *arguments, **options):
            if self.state.step == step:
                raise error
            return real(self, *arguments, **options)

        monkeypatch.setattr(Trainer, "step", wrapped)

    return arrange


@given(warmup=st.floats(0.01, 0.5), decay=st.floats(0.05, 1.0), peak=st.floats(1e-4, 1.0))
def test_learning_rate(warmup, decay, peak):
    """The rate rises to its peak during the warm-up (from 0.1 % of it on), stays there, and at the end falls to 0."""
    config = dataclasses.replace(CONFIG, warmup=warmup, decay=decay, learning_rate=peak)
    begin = max(warmup, 1 - decay)
    rising = [learning_rate(config, done) for done in np.linspace(1e-3, warmup, 20, endpoint=False)]
    staying = [learning_rate(config, done) for done in np.linspace(warmup, begin, 10)]
    falling = [learning_rate(config, done) for done in np.linspace(begin, 1, 50)]
    assert 0 < learning_rate(config, 0) == rising[0] and np.all(np.diff(rising) > 0) and rising[-1] < peak
    assert staying == pytest.approx([peak] * 10)
    assert falling[0] == pytest.approx(peak) and np.all(np.diff(falling) < 0)
    assert falling[-1] == pytest.approx(0, abs=1e-12)
    assert learning_rate(config, (1 + begin) / 2) == pytest.approx(peak / 2)
    assert learning_rate(dataclasses.replace(config, decay=0.0), 1.0) == peak


def test_progress_and_average():
    """Progress is by episodes where the config sets them, else by time, up to 1; the average's decay only rises."""
    assert [progress(CONFIG, n, 1e9) for n in (0, 12, 48, 50)] == [0, 0.25, 1, 1]
    timed = dataclasses.replace(CONFIG, episodes=0, minutes=2.0)
    assert [progress(timed, 10**9, seconds) for seconds in (0, 30, 120, 121)] == [0, 0.25, 1, 1]
    assert learning_rate(dataclasses.replace(CONFIG, warmup=0.0), 0.0) == CONFIG.learning_rate
    decays = [average_decay(CONFIG, step) for step in range(10000)]
    assert decays[0] == 0.1 and decays[-1] == CONFIG.ema and np.all(np.diff(decays) >= 0)


@pytest.mark.parametrize("generate", ["all", "logits", "2"])
def test_kinds_of_parameters_learn_at_their_rate(generate):
    """A first step moves each parameter by the learning rate times its kind's rate; all matrices decay alike."""
    config = dataclasses.replace(CONFIG, generate=generate, conv_rate=8.0, weight_decay=0.5)
    for decay in (0.0, 0.5):
        state = fresh_state(config, CPU)
        before, optimiser = (
            state.vector.clone(),
            adamw(dataclasses.replace(config, weight_decay=decay), Layout(config), state),
        )
        set_gradient(optimiser, torch.ones_like(before))
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * group["rate"]
        optimiser.step()
        views, moved = (Layout(config).views(vector) for vector in (before, before - state.vector))
        for name, x in views.items():
            rate = 8.0 if kind(name, tuple(x.shape)) == "convs" else 1.0
            assert_close(moved[name], 1e-3 * (rate + decay * x * (x.ndim > 1)), "float32", name)
            own = name in (f"conv{k}.weight" for k in range(1, config.blocks + 1))
            assert (kind(name, tuple(x.shape)) == "convs") == own, name


@settings(max_examples=15)
@given(config=configs(), seed=seeds)
def test_layout_round_trip(config, seed):
    """Parameters -> vector -> parameters is exact, kind by kind; views and leaves share the vector's memory."""
    layout, parameters = Layout(config), draw_parameters(config, seed)
    vector = layout.join(parameters)
    views = layout.views(vector)
    assert views.keys() == parameters.keys() and len(vector) == layout.size
    for name, x in parameters.items():
        np.testing.assert_array_equal(views[name].numpy(), x)
        at = (views[name].data_ptr() - vector.data_ptr()) // 4
        part = layout.parts[kind(name, x.shape)]
        assert part.start <= at < part.stop, name
    vector.zero_()
    assert not any(view.any() for view in views.values())
    leaves = layout.leaves(vector)
    vector += 1
    total = sum(number * leaf.sum() for number, leaf in enumerate(leaves.values()))
    parts = torch.autograd.grad(total, list(leaves.values()))
    for number, (name, part) in enumerate(zip(leaves, parts, strict=True)):
        assert (part == number).all() and (leaves[name] == 1).all() and leaves[name].shape == views[name].shape


@pytest.mark.parametrize("fast", [True, False])
def test_storage_dtype(fast, monkeypatch):
    """`precision` names what images and activations are kept in; "auto" is bfloat16 only where that is fast."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.bfloat16 if fast else torch.float32}
    for precision, dtype in wanted.items():
        assert storage_dtype(dataclasses.replace(CONFIG, precision=precision), CPU) == dtype


def test_gradients_in_bfloat16():
    """Images in bfloat16 change the gradient a little, and not its dtype."""
    first, second = (
        gradient(config, Layout(config).leaves(fresh_state(config, CPU).vector), IMAGES["train"], 0)
        for config in (dataclasses.replace(CONFIG, precision=name) for name in ("float32", "bfloat16"))
    )
    assert second[0].dtype == torch.float32 and not torch.equal(first[0], second[0])
    assert torch.cosine_similarity(first[0], second[0], dim=0) > 0.97
    assert_close(second[1], first[1], "bfloat16")


@given(seed=seeds, way=st.integers(3, 6), absent=st.integers(0, 1), smoothing=st.sampled_from((0.0, 0.1, 0.9)))
def test_label_smoothing_leaves_out_absent_classes(seed, way, absent, smoothing):
    """The smoothed loss, and its gradient, is torch's on the logits of those classes that are there."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(3 * rng.standard_normal((4, way))).requires_grad_()
    targets = torch.from_numpy(rng.integers(0, way - absent, 4))
    there = torch.arange(way) < way - absent
    loss = smoothed_cross_entropy(torch.where(there, logits, -math.inf), targets, smoothing)
    wanted = torch.nn.functional.cross_entropy(logits[:, there], targets, label_smoothing=smoothing)
    assert_close(loss, wanted)
    assert_close(*(torch.autograd.grad(one, logits)[0] for one in (loss, wanted)))


def test_the_loss_falls(tmp_path):
    """An easy 2-way task is learned in some dozens of steps: the loss falls well below that of guessing."""
    config = dataclasses.replace(CONFIG, channels=4, episodes=480, learning_rate=5e-3)
    state = run(config, tmp_path)
    rows = read_metrics(tmp_path / METRICS)
    assert state.step == 120 and rows[-1]["episodes"] == 480
    assert rows[-1]["loss"] < 0.6 * math.log(2) and rows[-1]["loss"] < rows[0]["loss"], rows
    assert any((tmp_path / "tensorboard").iterdir())
    assert rows[-1]["validation_accuracy"] > 0.75
    assert all(0 <= row["train_accuracy"] <= 1 and row["episodes_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("ema", [0.998, 0.0])
def test_what_is_saved(tmp_path, ema):
    """model.safetensors holds the running average, or the parameters themselves if there is no average."""
    config = dataclasses.replace(CONFIG, ema=ema)
    state = run(config, tmp_path)
    parameters, saved = load(tmp_path)
    assert saved == config
    assert torch.equal(Layout(config).join(parameters), state.average if ema else state.vector)
    assert not torch.equal(state.average, state.vector)


@pytest.mark.parametrize("vary", [0, 3])
def test_resume_is_exact(tmp_path, stop_at, monkeypatch, vary):
    """A run that Ctrl-C stopped half way and that was resumed ends in the same bits, by the same losses.

    Once it is finished, norm statistics are in the model.
    """
    config = dataclasses.replace(CONFIG, vary=vary, way=3, upright=0.3)
    seen: dict[str, list] = {}
    real = loop.Log.add

    def spy(self, loss, accuracy, norm, rate, seconds):
        seen.setdefault(self.file.parent.name, []).append((self.state.step, loss, accuracy, norm, rate))
        return real(self, loss, accuracy, norm, rate, seconds)

    monkeypatch.setattr(loop.Log, "add", spy)
    whole = run(config, tmp_path / "whole")
    stop_at(6)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "halves")
    half = load_run(tmp_path / "halves", config, CPU)
    parameters, saved = load(tmp_path / "halves")
    assert half.step == 6 and saved == config and "conv1.mean" not in parameters
    stop_at(None)
    resumed = run(config, tmp_path / "halves", resume=True)
    assert resumed.step == whole.step == 12 and resumed.seconds > half.seconds
    for name in VECTORS:
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name
        assert not torch.equal(getattr(whole, name), getattr(half, name)), name
    ends = [load(tmp_path / name)[0] for name in ("whole", "halves")]
    assert "conv1.mean" in ends[0] and ends[0].keys() == ends[1].keys()
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])
    assert seen["whole"] == seen["halves"] and len(seen["whole"]) == 12
    assert (whole.loss, whole.accuracy) == (resumed.loss, resumed.accuracy)  # the smoothed figures go on, too


def test_resuming_a_finished_run_adds_nothing(tmp_path):
    """A finished run that is resumed keeps its last row: no row says that the loss is 0."""
    run(CONFIG, tmp_path)
    run(CONFIG, tmp_path, resume=True)
    assert all(row["loss"] > 0 for row in read_metrics(tmp_path / METRICS))


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    """Rows after the checkpoint's step, which the resumed run writes again, are dropped; the others stay."""
    truncate_metrics(tmp_path / METRICS, 5)
    rows = [json.dumps({"step": step, "loss": step / 7}) + "\n" for step in (50, 100, 150, 200)]
    (tmp_path / METRICS).write_text("".join(rows))
    truncate_metrics(tmp_path / METRICS, 150)
    assert (tmp_path / METRICS).read_text() == "".join(rows[:3])


def test_resume_after_a_torn_metrics_line(tmp_path):
    """A last row that a full disk or a power cut left half written does not stop a run from going on."""
    run(CONFIG, tmp_path)
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 12, "lo')
    run(CONFIG, tmp_path, resume=True)


def test_a_training_begins_with_another_generator(tmp_path):
    """`start` takes over the parameters, and nothing else; a generator of other sizes, or none, is refused."""
    run(CONFIG, tmp_path / "first")
    first, _ = load(tmp_path / "first")
    later = dataclasses.replace(CONFIG, start=str(tmp_path / "first"), shot=2, seed=8)
    state = fresh_state(later, CPU)
    assert torch.equal(state.vector, Layout(CONFIG).join(first)) and torch.equal(state.vector, state.average)
    assert not state.first_moment.any() and not state.second_moment.any() and state.step == 0
    run(dataclasses.replace(later, learning_rate=0.0, ema=0.0), tmp_path / "second")
    second, config = load(tmp_path / "second")
    assert config.start == str(tmp_path / "first")
    assert all(np.array_equal(second[name], first[name]) for name in parameter_table(CONFIG))
    with pytest.raises(InputError, match=r"cannot start there: slope is 0.0 in .* and 0.5 in .*; set slope to 0.0"):
        fresh_state(dataclasses.replace(later, slope=0.5), CPU)
    kinds = {kind: dataclasses.replace(later, shared_convs=kind) for kind in ("strided", "pooled", "blurred")}
    save(tmp_path / "pooled.safetensors", first, dataclasses.replace(CONFIG, shared_convs="pooled"))
    pooled = {"start": str(tmp_path / "pooled.safetensors")}
    fresh_state(dataclasses.replace(kinds["blurred"], **pooled), CPU)
    for config in (kinds["blurred"], kinds["pooled"], dataclasses.replace(kinds["strided"], **pooled)):
        with pytest.raises(InputError, match=r"cannot start there: shared_convs is '.*' in .*; set shared_convs to"):
            fresh_state(config, CPU)
    with pytest.raises(InputError, match=r"cannot start there: .* has \[.* start from a generator of the same"):
        fresh_state(dataclasses.replace(later, channels=3), CPU)
    with pytest.raises(InputError, match=r"conv1\.weight is missing in"):
        fresh_state(dataclasses.replace(later, generate="logits"), CPU)
    here = {"dataset": "omniglot", "split": "alphabet"}
    save(tmp_path / "omniglot.safetensors", first, dataclasses.replace(CONFIG, dataset="omniglot"))
    split = dataclasses.replace(later, start=str(tmp_path / "omniglot.safetensors"), **here)
    with pytest.raises(InputError, match=r"split is 'random' in .* and 'alphabet' in this config; set split to"):
        fresh_state(split, CPU)
    fresh_state(dataclasses.replace(split, dataset="glyphs"), CPU)
    with pytest.raises(InputError, match=r"no checkpoint .*, and no pretrained generator of that name"):
        run(dataclasses.replace(later, start=str(tmp_path / "nothing")), tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_resume_wants_the_same_config(tmp_path):
    """Another config is refused with the field's name and both values; only how long to train may differ."""
    save_run(tmp_path, CONFIG, fresh_state(CONFIG, CPU))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"learning_rate 0\.003 -> 0\.5"):
        run(dataclasses.replace(CONFIG, learning_rate=0.5), tmp_path, resume=True)
    assert contents(tmp_path) == before
    assert load_run(tmp_path, dataclasses.replace(CONFIG, episodes=99, minutes=7.0), CPU).step == 0


def test_a_folder_with_a_run_is_left_alone(tmp_path):
    """Without resume a folder that holds a run is refused, and not a byte of it changes."""
    save_run(tmp_path, CONFIG, fresh_state(CONFIG, CPU))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="holds a run already; use --resume"):
        run(CONFIG, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_cut_short_state(tmp_path, share):
    """A training.safetensors that is cut short raises InputError that names it, and stays as it is."""
    save_run(tmp_path, CONFIG, fresh_state(CONFIG, CPU))
    file = tmp_path / STATE
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"training.safetensors is cut short"):
        run(CONFIG, tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_not_a_number_stops_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    """Parameters that are no numbers any more stop the training, and the checkpoint on disk is a good one."""
    real = Trainer.step

    def poisoned(self, *arguments, **options):
        self.state.vector[0] += math.nan if self.state.step == 5 else 0
        return real(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "step", poisoned)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)  # after every step
    with pytest.raises(InputError, match=r"broke down at step 5: .*last good checkpoint is kept"):
        run(CONFIG, tmp_path)
    state = load_run(tmp_path, CONFIG, CPU)
    assert state.step == 5 and all(torch.isfinite(getattr(state, name)).all() for name in VECTORS)
    assert all(np.isfinite(x).all() for x in load(tmp_path)[0].values())


def test_a_bad_gradient_changes_nothing():
    """A step whose loss is not a number raises InputError and leaves every vector as it was."""
    trainer = Trainer(CONFIG, IMAGES["train"], 1)
    trainer.step(1e-3)
    before = {name: getattr(trainer.state, name).clone() for name in VECTORS}
    nan = torch.full_like(trainer.state.vector, math.nan)
    trainer.workers.gradient = lambda *which: (nan, torch.tensor([1.0, 0.5]))
    with pytest.raises(InputError, match="gradient norm nan"):
        trainer.step(1e-3)
    assert trainer.state.step == 1
    assert all(torch.equal(before[name], getattr(trainer.state, name)) for name in VECTORS)


def test_divergence(tmp_path, monkeypatch):
    """A loss far over that of guessing stops the training with advice."""
    real = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, rate, upright: (100.0 * self.state.step, *real(self, rate)[1:]))
    with pytest.raises(InputError, match=r"diverged at step \d+: .*lower learning_rate"):
        run(CONFIG, tmp_path)
    assert load_run(tmp_path, CONFIG, CPU).step == 0


def test_a_start_that_is_far_off_may_learn(tmp_path):
    """Wide features may begin at more than 10 times the loss of guessing: that is no divergence."""
    config = dataclasses.replace(CONFIG, channels=64, blocks=1, image_size=16, episodes=40, learning_rate=1e-5)
    images = {part: glyphs(number, 12, size=16) for number, part in enumerate(IMAGES)}
    assert Trainer(config, images["train"], 1).step(0.0)[0] > loop.DIVERGED * math.log(config.way)
    assert train(config, images, tmp_path, workers=1, quiet=True).step == 10


def test_too_few_images_for_the_statistics_are_noticed_first(tmp_path):
    """Norm statistics want `shot` images a class, also where `vary` trains with fewer."""
    with pytest.raises(InputError, match=r"train images: .*wanted"):
        run(dataclasses.replace(CONFIG, vary=1, shot=int(IMAGES["train"].counts.min())), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_worker_whose_main_process_has_ended_says_nothing(monkeypatch):
    """The pipe closes while a worker computes: it ends without an error of its own."""
    here, there = multiprocessing.Pipe()
    vector = fresh_state(CONFIG, CPU).vector

    def closing(*arguments, **options):
        here.close()
        return vector, torch.zeros(2)

    monkeypatch.setattr(workers, "gradient", closing)
    here.send((0, False))
    before, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    try:
        assert workers.serve(there, CONFIG, IMAGES["train"], vector, vector.clone(), slice(0, 2)) is None
    finally:
        signal.signal(signal.SIGINT, before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk(tmp_path, monkeypatch, function):
    """On a full disk saving raises InputError; the old files stay whole and nothing half written remains."""
    save_run(tmp_path, CONFIG, fresh_state(CONFIG, CPU))
    before = contents(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        save_run(tmp_path, CONFIG, fresh_state(dataclasses.replace(CONFIG, seed=9), CPU))
    assert contents(tmp_path) == before


def test_two_processes_give_the_same_gradient_and_pass_errors_on():
    """Two processes give the gradient of one up to rounding; what goes wrong in the other one reaches the caller."""
    config = dataclasses.replace(CONFIG, episodes_per_step=3)
    vector = fresh_state(config, CPU).vector.share_memory_()
    one, two = (Workers(config, IMAGES["train"], vector, count) for count in (1, 2))
    try:
        assert two.own == slice(0, 1) and len(two.processes) == 1 and not one.processes
        for step, upright in ((0, False), (5, False), (5, True)):
            (alone, figures), (shared, same) = (each.gradient(step, upright=upright) for each in (one, two))
            assert_close(shared, alone, "float32")
            assert_close(same, figures, "float32")
        two.connections[0].send(("no step", False))  # the answer to it, an error, comes first
        with pytest.raises(ValueError, match="seed"):
            two.gradient(6)
    finally:
        two.close()
    assert not two.processes[0].is_alive()


def test_a_worker_that_ends_at_its_start():
    """A process that ends before it reads anything is reported however many images there are: nobody waits for it."""
    many = ImageSet(np.zeros((1000, 32, 32, 3), np.uint8), np.full(50, 20), tuple(map(str, range(50))))
    resource_tracker.ensure_running()
    spawn.set_executable(shutil.which("false"))
    try:
        workers = Workers(CONFIG, many, fresh_state(CONFIG, CPU).vector.share_memory_(), 2)
    finally:
        spawn.set_executable(sys.executable)
    workers.processes[0].join()
    with pytest.raises(InputError, match="a worker process ended by itself"):
        workers.gradient(0)
    workers.close()


def test_bench(monkeypatch):
    """The bench reports a positive speed, and shares of all parts of a step that sum to 1."""
    monkeypatch.setattr(bench_module, "glyphs", lambda *which, drawings, size: IMAGES["train"])
    found = bench_training(CONFIG, workers=1, steps=4)
    assert found["episodes_per_second"] > 0 and found["workers"] == 1 and found["episodes_per_step"] == 4
    assert list(found["share"]) == ["sample", "generate", "classify", "backward", "wait", "optimise"]
    assert sum(found["share"].values()) == pytest.approx(1, abs=0.01)
