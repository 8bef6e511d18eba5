"""The training step that never waits for the host: here run as it is on a CPU, on a GPU also as a CUDA graph."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from test_training import CONFIG, IMAGES, VECTORS
from tolerances import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from mini_ht.config import Config
from mini_ht.datasets.glyphs import glyphs
from mini_ht.training import device
from mini_ht.training.device import DeviceImages, DeviceStep
from mini_ht.training.flat import Layout
from mini_ht.training.loop import Trainer, adamw, fresh_state
from mini_ht.training.tasks import training_episodes

pytestmark = pytest.mark.device

CPU = torch.device("cpu")
SQUARES = glyphs(5, 12, drawings=6, size=11)


def device_step(config: Config, images=IMAGES["train"], device: torch.device = CPU) -> DeviceStep:
    """A step on fresh parameters."""
    state = fresh_state(config, device)
    return DeviceStep(config, images, state, adamw(config, Layout(config), state))


@given(
    seed=seeds,
    shift=st.integers(0, 3),
    rotate=st.booleans(),
    mirror=st.booleans(),
    unlabelled=st.integers(0, 1),
    vary=st.sampled_from([0, 3]),
)
def test_one_gather_gives_the_images_of_the_sampler(seed, shift, rotate, mirror, unlabelled, vary):
    """Looked up by row, turn and offset on the device, a step's images are those that the host samples, to the bit."""
    config = Config(
        way=4, queries=2, image_size=11, blocks=3, seed=seed, shift=shift, rotate=rotate, mirror=mirror,
        unlabelled=unlabelled, vary=vary, episodes_per_step=3, minutes=1,
    )  # fmt: skip
    step = device_step(config, SQUARES)
    labels, targets, *places = (torch.from_numpy(array) for array in step.draw(7))
    wanted = training_episodes(config, SQUARES, 7)
    images = DeviceImages(SQUARES, shift, CPU)(*places, torch.float32)
    support, query = images.split([labels.shape[1], targets.shape[1]], dim=1)
    for found, array in zip(
        (support, query, labels, targets),
        (wanted.support, wanted.query, wanted.labels, wanted.query_labels),
        strict=True,
    ):
        assert torch.equal(found, torch.from_numpy(array))


def test_images_go_to_the_device_in_parts(monkeypatch):
    """Copied a few at a time, the pixels are the same, with a zero behind each image."""
    whole = DeviceImages(SQUARES, 1, CPU).pixels
    monkeypatch.setattr(device, "COPIED", 7)  # does not divide their number
    assert torch.equal(DeviceImages(SQUARES, 1, CPU).pixels, whole)
    images = whole.reshape(len(SQUARES.pixels), -1)  # [total, H * W + 1]
    assert torch.equal(images[:, :-1], torch.from_numpy(SQUARES.pixels).flatten(1)) and not images[:, -1].any()


def vectors(state) -> list[torch.Tensor]:
    """Copies of all that training changes, on the CPU."""
    return [getattr(state, name).detach().cpu().clone() for name in VECTORS]


def take(step: DeviceStep, rate: float, upright: bool = False) -> tuple[float, float, float]:
    """One step, counted."""
    figures = step(rate, upright=upright)
    step.state.step += 1
    return figures


def trainer_of_workers(config: Config) -> Trainer:
    """The trainer that shares steps between cores, also where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return Trainer(config, IMAGES["train"], 1)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_step_is_that_of_the_workers(clip):
    """Each of six steps leaves the parameters, moments and average of the trainer that shares steps between cores.

    The last three are upright. Both start each step from the same state, and parameters without a gradient to speak
    of are left out: Adam makes whole steps of the rounding of zeros.
    """
    config = dataclasses.replace(CONFIG, clip=clip, shift=1, mirror=True)
    trainer, step = trainer_of_workers(config), device_step(config)
    assert trainer.graph is None
    for number in range(6):
        rate, upright = 1e-3 * (1 + number), number > 2
        assert take(step, rate, upright) == pytest.approx(trainer.step(rate, upright=upright), rel=1e-5)
        size = trainer.state.second_moment.sqrt()
        felt = size > 1e-3 * size.max()
        assert felt.float().mean() > 0.3
        for name in VECTORS:
            mine, other = getattr(step.state, name), getattr(trainer.state, name)
            assert relative_error(mine[felt], other[felt]) <= 1e-5
            mine.copy_(other)
    assert relative_error(step.state.vector, fresh_state(config, CPU).vector) > 1e-3


def shapes_of_equal_steps(config: Config, count: int, which: int) -> set[tuple[int, ...]]:
    """Shapes of one input over steps whose loss and accuracy are those of the trainer that shares steps."""
    trainer, step = trainer_of_workers(config), device_step(config)
    shapes = set()
    for _ in range(count):
        assert take(step, 1e-3)[:2] == pytest.approx(trainer.step(1e-3)[:2], rel=1e-5)
        shapes.add(tuple(step.inputs[which].shape))
        for name in VECTORS:
            getattr(step.state, name).copy_(getattr(trainer.state, name))
    return shapes


def test_steps_of_different_shapes():
    """With `vary` steps have different shapes, and are the trainer's."""
    assert len(shapes_of_equal_steps(dataclasses.replace(CONFIG, way=4, vary=3), 6, 2)) > 2


def test_a_step_on_hold_or_without_a_number_changes_nothing():
    """With hold, or when loss or gradient is no number, state and optimiser stay; the next good step is as ever."""
    step, undisturbed = device_step(CONFIG), device_step(CONFIG)
    take(step, 1e-3), take(undisturbed, 1e-3)
    before = vectors(step.state)
    step.scalars[2] = 1.0
    step.compute()
    assert all(torch.equal(a, b) for a, b in zip(before, vectors(step.state), strict=True))
    step.scalars[2] = 0.0
    kept = step.pictures.pixels
    step.pictures.pixels = torch.full_like(kept, math.nan, dtype=torch.float32)
    step.compute()
    assert not math.isfinite(step.figures[0]) and not math.isfinite(step.figures[2])
    assert all(torch.equal(a, b) for a, b in zip(before, vectors(step.state), strict=True))
    step.pictures.pixels = kept
    assert take(step, 1e-3) == take(undisturbed, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(vectors(step.state), vectors(undisturbed.state), strict=True))


class Asked(TorchDispatchMode):
    """Notes operations whose result or shape the host must know before it goes on."""

    HOST = "_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "linalg_", "cholesky"

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("aten::")
        by_mask = name.startswith("index") and any(part.dtype == torch.bool for part in tensors(arguments[1]))
        if by_mask or (name.startswith(self.HOST) and name != "linalg_vector_norm"):
            self.names.add(name)
        return function(*arguments, **(options or {}))


def tensors(parts: Any) -> list[torch.Tensor]:
    """The tensors of a list or tuple."""
    return [part for part in parts if isinstance(part, torch.Tensor)] if isinstance(parts, list | tuple) else []


@pytest.mark.parametrize(
    "fields",
    [
        {"clip": 1.0, "ema": 0.99, "unlabelled": 1, "norm": "support", "label_smoothing": 0.1},
        {"generate": "last2", "generate_bias": True, "attention": "sigmoid", "encoder": "post-norm"},
        {"shared_convs": "blurred", "generator": "separate", "precision": "bfloat16", "shift": 2, "mirror": True},
        {"shared_convs": "pooled", "allocation": "spatial", "readout": "slice", "generate": "logits", "slope": 0.1},
    ],
)
def test_a_step_asks_the_host_for_nothing(fields):
    """No operation of a step makes the host wait, whatever the config, so that a CUDA graph can hold it."""
    step = device_step(dataclasses.replace(CONFIG, **fields))
    assert not step.varied
    with Asked() as asked:
        step.compute()
        assert not asked.names
        images = step.pictures.pixels.float()
        images[images > 0].sum().item()
    assert asked.names == {"index.Tensor", "_local_scalar_dense"}


def test_drawing_ahead_changes_no_episode():
    """What is drawn while the device works is the next step's; after a gap, or turning upright, it draws its own."""
    step = device_step(CONFIG)
    take(step, 1e-3)
    assert step.waiting is not None and step.waiting[0] == (1, False)
    for ahead, own in zip(step.waiting[1], step.draw(1), strict=True):
        assert (ahead == own).all()
    step.state.step = 5
    take(step, 1e-3)
    assert step.waiting[0] == (6, False) and (step.inputs[2].numpy() == step.draw(5)[2]).all()
    take(step, 1e-3, upright=True)
    assert step.waiting[0] == (7, True)
    assert not step.inputs[3].any() and (step.inputs[2].numpy() == step.draw(6, upright=True)[2]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_graph_is_the_step():
    """Replayed as a CUDA graph, six steps leave the state of the same steps taken one operation at a time."""
    config = dataclasses.replace(CONFIG, shift=1, mirror=True)
    graph, plain = device_step(config, device=torch.device("cuda")), device_step(config, device=torch.device("cuda"))
    plain.replay = plain.compute
    for _ in range(6):
        assert take(graph, 1e-3) == pytest.approx(take(plain, 1e-3), rel=1e-3)
    for mine, other in zip(vectors(graph.state), vectors(plain.state), strict=True):
        assert relative_error(mine, other) <= 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu_takes_graphs():
    """The trainer takes the graph by itself, learns, and refuses a broken step without a change."""
    trainer = Trainer(CONFIG, IMAGES["train"])
    assert trainer.graph is not None and trainer.workers is None
    losses = [trainer.step(3e-3)[0] for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
