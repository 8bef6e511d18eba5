"""Training a baseline on the HyperTransformer's episodes, with its schedule, optimiser and log, in one process."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mini_ht.baselines.maml import adapt, maml_loss
from mini_ht.baselines.method import BaselineLayout, Method, draw, table
from mini_ht.baselines.prototypes import prototype_logits
from mini_ht.config import Config
from mini_ht.datasets.images import ImageSet
from mini_ht.episodes import Episodes
from mini_ht.errors import InputError
from mini_ht.evaluation import evaluation_episodes, score
from mini_ht.memory import keep_freed_memory
from mini_ht.parameters import CHECKPOINT, checkpoint_path, read_tensors, to_numpy, write_tensors
from mini_ht.training.checkpoint import FIGURES, STATE, VECTORS, State
from mini_ht.training.loop import VALIDATION_EPISODES, Trainer, adamw, check_data, part_task, run_logged
from mini_ht.training.schedule import progress
from mini_ht.training.tasks import training_episodes
from mini_ht.training.workers import Clock, Workers, smoothed_cross_entropy, storage_dtype

Parameters = Mapping[str, Tensor]


def to_device(parameters: Parameters, *arrays: NDArray[Any]) -> list[Tensor]:
    """NumPy arrays as tensors where the parameters are."""
    return [torch.from_numpy(array).to(parameters["conv1.weight"].device) for array in arrays]


def episode_loss(
    config: Config, method: Method, parameters: Parameters, batch: Episodes, done: float
) -> tuple[Tensor, Tensor]:
    """Mean loss on the queries of a batch of episodes, and their accuracy, when `done` of the training is over."""
    support, labels, query, targets = to_device(
        parameters, batch.support, batch.labels, batch.query, batch.query_labels.flatten()
    )
    if method.name != "prototypes":
        return maml_loss(parameters, config, method, (support, query), (labels, targets), done)
    dtype = storage_dtype(config, support.device)
    logits = prototype_logits(parameters, config, support.to(dtype), labels, query.to(dtype), config.norm)
    flat = logits.flatten(0, 1)  # [E * m, way]
    loss = smoothed_cross_entropy(flat, targets, config.label_smoothing)
    return loss, (flat.detach().argmax(-1) == targets).to(loss.dtype).mean()


def classifier(
    config: Config, method: Method, parameters: Parameters, norm: str
) -> Callable[[Episodes], NDArray[np.integer]]:
    """For `mini_ht.evaluation.score`: from a batch of episodes to the classes [E, m] of its queries."""

    def classify(batch: Episodes) -> NDArray[np.integer]:
        support, labels, query = to_device(parameters, batch.support, batch.labels, batch.query)
        with torch.no_grad():
            if method.name == "prototypes":
                logits = prototype_logits(parameters, config, support, labels, query, norm)
            else:
                logits = adapt(parameters, config, method, support, labels, norm)(query)
        return logits.argmax(-1).cpu().numpy()

    return classify


class OneProcess(Workers):
    """The gradient of a step, computed in this process alone."""

    def __init__(self, trainer: "BaselineTrainer", images: ImageSet) -> None:
        self.trainer, self.images, self.connections, self.processes = trainer, images, [], []
        self.parameters = trainer.layout.leaves(trainer.state.vector)
        keep_freed_memory()

    def gradient(self, step: int, clock: Clock = lambda name: None, upright: bool = False) -> tuple[Tensor, Tensor]:
        """Gradient [size] of the step's mean loss, and (loss, accuracy) [2]."""
        trainer, config = self.trainer, self.trainer.config
        done = progress(config, step * config.episodes_per_step, trainer.state.seconds)
        batch = training_episodes(config, self.images, step, upright=upright)
        loss, accuracy = episode_loss(config, trainer.method, self.parameters, batch, done)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in gradients]), torch.stack([loss.detach(), accuracy])


class BaselineTrainer(Trainer):
    """The state of a baseline's training, and one step of it."""

    def __init__(self, config: Config, method: Method, images: ImageSet, run_dir: Path | None = None) -> None:
        """run_dir: of a run to go on with; InputError if it is none, or another one. How long to train may differ."""
        self.config, self.method, self.layout, self.graph = config, method, BaselineLayout(config, method), None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vector = self.layout.join(draw(config, method)).to(self.device)
        self.state = state = State(vector, vector.clone(), torch.zeros_like(vector), torch.zeros_like(vector))
        if run_dir is not None:
            self.resume(run_dir / STATE)
        self.optimiser = adamw(config, self.layout, state)
        self.workers = OneProcess(self, images)

    def validate(self, images: ImageSet) -> float:
        """Accuracy on episodes of classes that are not trained on, the same episodes each time."""
        batches = evaluation_episodes(images, VALIDATION_EPISODES, **part_task(self.config, images))
        return score(classifier(self.config, self.method, self.parameters, self.config.norm), batches).accuracy

    def save(self, run_dir: Path) -> None:
        """Write the training state, then the model; each file is replaced in one step."""
        vectors = to_numpy({name: getattr(self.state, name) for name in VECTORS})
        method, figures = {"method": self.method.to_json()}, {name: repr(getattr(self.state, name)) for name in FIGURES}
        write_tensors(run_dir / STATE, vectors, self.config, method | figures)
        write_tensors(run_dir / CHECKPOINT, to_numpy(self.parameters), self.config, method)

    def resume(self, file: Path) -> None:
        """Take in the state that `save` wrote."""
        tensors, config, method, metadata = read(file)
        config = dataclasses.replace(config, minutes=self.config.minutes, episodes=self.config.episodes)
        fits = all(name in tensors and tensors[name].shape == (self.layout.size,) for name in VECTORS)
        if (config, method) != (self.config, self.method) or not fits or not metadata.keys() >= set(FIGURES):
            raise InputError(f"{file} is of another run; give that run's options again, or use another folder")
        for name in VECTORS:
            getattr(self.state, name).copy_(torch.from_numpy(tensors[name]))
        for name in FIGURES:
            setattr(self.state, name, type(getattr(self.state, name))(metadata[name]))


def read(file: Path) -> tuple[dict[str, NDArray[Any]], Config, Method, dict[str, str]]:
    """Tensors, config, method and metadata of a baseline's file; InputError if it is none."""
    tensors, config, metadata = read_tensors(file, ())
    if "method" not in metadata:
        raise InputError(f"{file} holds no baseline; train one with 'python -m mini_ht.baselines train'")
    return tensors, config, Method.from_json(metadata["method"]), metadata


def load(path: Path) -> tuple[dict[str, NDArray[Any]], Config, Method]:
    """Parameters (NumPy), config and method of a run folder or model file; InputError for one that does not fit."""
    tensors, config, method, _ = read(checkpoint_path(path))
    if {name: x.shape for name, x in tensors.items()} != {name: row[0] for name, row in table(config, method).items()}:
        raise InputError(f"{path} does not fit its config: names or shapes differ; use another copy, or train again")
    return tensors, config, method


def train(
    config: Config,
    method: Method,
    images: Mapping[str, ImageSet],
    run_dir: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> State:
    """Train on images["train"], and leave in `run_dir` what `mini_ht.training.loop.train` leaves there.

    By episodes, a resumed run ends as an uninterrupted one. Raises InputError for a folder in use, a checkpoint that
    does not fit, too few classes or images, divergence; KeyboardInterrupt after Ctrl-C, once the checkpoint is written.
    """
    check_data(config, images)
    if config.start:
        raise InputError(f"start is {config.start!r}; a baseline begins with its seed: leave start out")
    if not resume and ((run_dir / STATE).exists() or (run_dir / CHECKPOINT).exists()):
        raise InputError(f"{run_dir} holds a run already; use --resume to go on, or another --run-dir")
    torch.set_num_threads(1)  # small operations do not gain from more
    trainer = BaselineTrainer(config, method, images["train"], run_dir if resume else None)
    run_logged(trainer, images, run_dir, quiet)
    return trainer.state
