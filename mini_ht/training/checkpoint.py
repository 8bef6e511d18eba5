"""What a run begins with, and needs to go on exactly where it stopped: one safetensors file beside the model."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mini_ht.adaptation import open_generator
from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.parameters import CHECKPOINT, draw_parameters, read_tensors, save, to_numpy, write_tensors
from mini_ht.training.flat import Layout

STATE = "training.safetensors"
FIGURES = ("step", "seconds", "loss", "accuracy")
VECTORS = ("vector", "average", "first_moment", "second_moment")
# What parameters mean, where their shapes do not tell.
KINDS = "slope generator heads attention encoder activation shared_convs allocation readout".split()


@dataclass
class State:
    """The training after `step` steps; every Tensor is a vector [size] in the order of `Layout`."""

    vector: Tensor
    average: Tensor
    first_moment: Tensor
    second_moment: Tensor
    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # smoothed over steps, like the accuracy on queries of training episodes
    accuracy: float = 0.0

    def evaluated(self, config: Config) -> Tensor:
        """The parameters that are evaluated and saved: the running average if there is one."""
        return self.average if config.ema else self.vector


def fresh_state(config: Config, device: torch.device) -> State:
    """The start of a training: moments at zero, parameters from the config's seed, or of the generator `config.start`.

    Raises InputError where that generator cannot be read, has other sizes or kinds of parts (but pooled to blurred), or
    was trained on another split.
    """
    layout, parameters = Layout(config), draw_parameters(config, config.seed)
    if config.start:
        generator = open_generator(config.start)
        parameters = dict(generator.parameters)
        omniglot = generator.config.dataset == config.dataset == "omniglot"
        for kind in KINDS + ["split"] * omniglot:  # one split's test classes are another's training classes
            theirs, ours = getattr(generator.config, kind), getattr(config, kind)
            if theirs != ours and (theirs, ours) != ("pooled", "blurred"):  # those are near enough to go on
                why = f"{kind} is {theirs!r} in {config.start} and {ours!r} in this config"
                raise InputError(f"cannot start there: {why}; set {kind} to {theirs!r}, or start elsewhere")
        for name, shape in layout.shapes.items():
            if name not in parameters or parameters[name].shape != shape:
                has = f"has {list(parameters[name].shape)}" if name in parameters else "is missing"
                why = f"{name} {has} in {config.start} and {list(shape)} in this config"
                raise InputError(f"cannot start there: {why}; start from a generator of the same sizes")
    vector = layout.join(parameters).to(device)
    return State(vector, vector.clone(), torch.zeros_like(vector), torch.zeros_like(vector))


def save_run(run_dir: Path, config: Config, state: State) -> None:
    """Write the training state, then the model; each file is replaced in one step."""
    layout = Layout(config)
    views = {name: to_numpy(layout.views(getattr(state, name))) for name in VECTORS}
    tensors = {f"{name}/{key}": array for name, arrays in views.items() for key, array in arrays.items()}
    write_tensors(run_dir / STATE, tensors, config, {name: repr(getattr(state, name)) for name in FIGURES})
    save(run_dir / CHECKPOINT, to_numpy(layout.views(state.evaluated(config))), config)


def load_run(run_dir: Path, config: Config, device: torch.device) -> State:
    """The state that `save_run` wrote.

    Raises InputError without one, with a broken one, or with one of another config; how long to train may differ.
    """
    tensors, saved, metadata = read_tensors(run_dir / STATE, tuple(f"{name}/" for name in VECTORS))
    same = dataclasses.replace(saved, minutes=config.minutes, episodes=config.episodes)
    if same != config:
        ours, theirs = dataclasses.asdict(config), dataclasses.asdict(saved)
        differs = ", ".join(f"{name} {theirs[name]!r} -> {ours[name]!r}" for name in ours if ours[name] != theirs[name])
        came = f"the run in {run_dir} has another config ({differs})"
        raise InputError(f"{came}; resume with its own, or use another folder")
    layout = Layout(config)
    vectors: dict[str, Any] = {
        name: layout.join({key: tensors[f"{name}/{key}"] for key in layout.shapes}).to(device, torch.float32)
        for name in VECTORS
    }
    try:
        figures: dict[str, Any] = {name: float(metadata[name]) for name in FIGURES}
        figures["step"] = int(metadata["step"])
        if not all(math.isfinite(figure) for figure in figures.values()) or not 0 <= figures["step"] < 1 << 53:
            raise ValueError(f"they are {figures}")
    except (KeyError, ValueError, OverflowError) as error:
        raise InputError(f"{run_dir / STATE} has no good figures ({error}); train again with --overwrite") from error
    return State(**vectors, **figures)
