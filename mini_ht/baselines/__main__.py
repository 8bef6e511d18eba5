"""The command line of the baselines, `python -m mini_ht.baselines train | evaluate`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro import MISSING_NONPROP
from tyro.conf import OmitArgPrefixes, Positional, arg

from mini_ht.baselines.method import RECIPES, Method, Name
from mini_ht.baselines.training import classifier, load, train
from mini_ht.config import Config
from mini_ht.datasets import open_dataset
from mini_ht.errors import InputError
from mini_ht.evaluation import QUERIES, evaluation_episodes, score
from mini_ht.parameters import to_torch
from mini_ht.presets import QUICKSTART, preset

PROGRAM = "python -m mini_ht.baselines "
DataDir = Annotated[Path | None, arg(help="Omniglot's two archives (downloaded if not given), or the class folders.")]
Json = Annotated[bool, arg(name="json", help="Print one line of JSON instead of several.")]


@dataclass
class Train:
    """Train a baseline on the task of a preset; METHOD and PRESET come first."""

    method: Annotated[Positional[Name], arg(help="Which baseline.")]
    preset: Annotated[Positional[str], arg(help="A preset; 'mini-ht presets' lists them.")] = QUICKSTART
    data_dir: DataDir = None
    run_dir: Annotated[Path | None, arg(help="Where results go; runs/METHOD-PRESET if not given.")] = None
    resume: Annotated[bool, arg(help="Go on from the last checkpoint; give the same options again.")] = False
    steps: int = Method.steps  # Gradient steps of MAML's inner loop
    inner_rate: float = Method.inner_rate  # Learning rate of the inner loop; MAML++ learns factors to it
    multi_step: float = Method.multi_step  # MAML++: share of the training in which every inner step has a loss
    first_order: float = Method.first_order  # MAML++: share of the training, at its start, without second derivatives
    config: OmitArgPrefixes[Config] = field(default_factory=Config)


@dataclass
class Evaluate:
    """Accuracy of a trained baseline on episodes of unseen classes, with its 95 % interval."""

    checkpoint: Annotated[Positional[Path], arg(help="A run folder or a model.safetensors.")]
    data_dir: DataDir = None
    episodes: Annotated[int, arg(help="Episodes; quote nothing below 1,000.")] = 1000
    norm: Annotated[Literal["batch", "support"] | None, arg(help="Norm statistics; default: as in training.")] = None
    protocol: Annotated[Literal["disjoint", "released"], arg(help="released: support images may be queries.")] = (
        "disjoint"
    )
    part: Annotated[Literal["test", "validation", "train"], arg(help="Which part of the classes.")] = "test"
    queries: Annotated[int, arg(help="Query images a class.")] = QUERIES
    seed: Annotated[int, arg(help="Seed of the episodes.")] = 0
    json: Json = False


def run_train(arguments: Sequence[str]) -> None:
    """Train, and say where the results are."""
    name, task = [*(x for x in arguments[:2] if not x.startswith("-")), "", ""][:2]
    config = dataclasses.replace(preset(task or QUICKSTART), **RECIPES.get(name, {}))
    options = tyro.cli(Train, prog=PROGRAM + "train", args=arguments, default=Train(MISSING_NONPROP, config=config))
    inner = {part: getattr(options, part) for part in ("steps", "inner_rate", "multi_step", "first_order")}
    config, method = options.config, Method(options.method, **inner)
    run_dir = options.run_dir or Path("runs") / f"{options.method}-{options.preset}"
    images = open_dataset(config.dataset, options.data_dir, **config.data)
    state = train(config, method, images, run_dir, resume=options.resume)
    print(f"{state.step * config.episodes_per_step:,} episodes in {state.seconds:.0f} s; results in {run_dir}")


def run_evaluate(arguments: Sequence[str]) -> None:
    """Measure a checkpoint and print the figures."""
    options = tyro.cli(Evaluate, prog=PROGRAM + "evaluate", args=arguments)
    start = time.perf_counter()
    parameters, config, method = load(options.checkpoint)
    images = open_dataset(config.dataset, options.data_dir, **config.data)[options.part]
    norm, given = options.norm or config.norm, {"queries": options.queries, "protocol": options.protocol}
    task = config.task | given
    classify = classifier(config, method, to_torch(parameters, "cuda" if torch.cuda.is_available() else "cpu"), norm)
    found = score(classify, evaluation_episodes(images, options.episodes, seed=options.seed, **task))
    figures = {"method": method.name, **dataclasses.asdict(found), "chance": 1 / config.way, **task, "norm": norm}
    figures |= {"part": options.part, "seed": options.seed, "seconds": round(time.perf_counter() - start, 2)}
    print(json.dumps(figures, indent=None if options.json else 2))


COMMANDS = {"train": run_train, "evaluate": run_evaluate}


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 0, 2 for input that can be corrected, 130 after Ctrl-C."""
    try:
        if not arguments or arguments[0] not in COMMANDS:
            raise InputError(f"no such command; choose one of {', '.join(COMMANDS)}, and see its --help")
        COMMANDS[arguments[0]](arguments[1:])
        return 0
    except InputError as error:
        print(f"mini_ht.baselines: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nmini_ht.baselines: stopped; {stop}".rstrip("; "), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
