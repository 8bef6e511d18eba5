"""The command line, `mini-ht COMMAND`: options come from Config and the classes here and in cli_classifier.py."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from mini_ht.adaptation import open_generator
from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.parameters import generator_size, read_tensors
from mini_ht.plan import cnn_size
from mini_ht.presets import QUICKSTART, preset, presets

try:
    import tyro
    from tyro import MISSING_NONPROP
    from tyro.conf import OmitArgPrefixes, Positional, arg
except ImportError:
    sys.exit("mini-ht: the command line needs more packages; run: pip install 'mini_ht[train]' (or [export])")

USAGE = """mini-ht: a transformer that reads a few labelled images and writes a small CNN for them

  mini-ht train [PRESET]        train a generator, then measure it on unseen classes (default: quickstart)
  mini-ht evaluate CHECKPOINT   accuracy of a trained generator on episodes of unseen classes
  mini-ht bench train [PRESET]  training speed on this machine, and where the time goes
  mini-ht presets               what can be trained, with the sizes of generator and generated CNN

  mini-ht adapt CHECKPOINT FOLDER -o classifier.onnx  write a classifier from a folder of images a class
  mini-ht predict classifier.onnx IMAGE...            the classes of images, with probabilities
  mini-ht show classifier.onnx                        what is in a classifier; a picture of its kernels
  mini-ht adapt-many CHECKPOINT FOLDERS -o OUT        classifiers for thousands of such folders
  mini-ht demo                                        a local page: draw a few symbols, get a classifier

'mini-ht COMMAND --help' explains the options. First time? 'mini-ht train' takes two minutes and needs no data.
"""
NO_MEMORY = "allocate memory|out of memory|start new thread|create a primitive|unable to resize file"
DataDir = Annotated[Path | None, arg(help="Omniglot's two archives (downloaded if not given), class folders, pickles.")]
Json = Annotated[bool, arg(name="json", help="Print one line of JSON instead of text.")]
Name = Annotated[Positional[str], arg(metavar="PRESET", help="What to train; 'mini-ht presets' lists them.")]


@dataclass
class Train:
    """Train a HyperTransformer, then measure it on episodes of classes that it has never seen.

    Leaves in the run folder: model.safetensors (the generator), training.safetensors (to resume from), metrics.jsonl,
    tensorboard/, summary.json, curve.png and episode.png. Ctrl-C stops with a checkpoint; --resume goes on from it.
    """

    preset: Name = QUICKSTART
    data_dir: DataDir = None
    run_dir: Annotated[Path | None, arg(help="Where results go; runs/PRESET if not given.")] = None
    resume: Annotated[bool, arg(help="Go on from the run folder's last checkpoint, with its config.")] = False
    overwrite: Annotated[bool, arg(help="Start again in a folder that holds a run.")] = False
    workers: Annotated[int, arg(help="Processes that share a step; 0 takes one a core (one with a GPU).")] = 0
    config: OmitArgPrefixes[Config] = field(default_factory=Config)


@dataclass
class Evaluate:
    """Accuracy of a trained generator on episodes of unseen classes, with its 95 % interval and two yardsticks.

    Way, shot, unlabelled images, norm and split are as in training where they are not given.
    """

    checkpoint: Annotated[Positional[Path], arg(help="A run, a file, or omniglot, omniglot-1shot, omniglot-any.")]
    data_dir: DataDir = None
    episodes: Annotated[int, arg(help="Episodes; quote nothing below 1,000.")] = 1000
    norm: Annotated[Literal["batch", "support"] | None, arg(help="Norm statistics of the query pass.")] = None
    views: Annotated[Literal[1, 5, 9], arg(help="Places at which support images are seen.")] = 1
    query_views: Annotated[Literal[1, 5, 9], arg(help="Places at which query images are seen.")] = 1
    protocol: Annotated[Literal["disjoint", "released"], arg(help="released: support images may be queries.")] = (
        "disjoint"
    )
    split: Annotated[Literal["random", "alphabet"] | None, arg(help="Omniglot only: how characters are split.")] = None
    part: Annotated[Literal["test", "validation", "train"], arg(help="Which part of the classes.")] = "test"
    way: Annotated[int | None, arg(help="Classes of an episode, up to those trained for.")] = None
    shot: Annotated[int | None, arg(help="Labelled images a class.")] = None
    unlabelled: Annotated[int | None, arg(help="Unlabelled images a class.")] = None
    queries: Annotated[int, arg(help="Query images a class; with norm 'batch' they are normalised together.")] = 5
    seed: Annotated[int, arg(help="Seed of the episodes.")] = 0
    json: Json = False


@dataclass
class Bench:
    """Training speed of a preset on this machine, on built-in images, and the share of each part of a step."""

    what: Annotated[Positional[Literal["train"]], arg(help="What to time.")]
    preset: Name = QUICKSTART
    workers: Annotated[int, arg(help="Processes that share a step; 0 takes one a core.")] = 0
    episodes_per_step: Annotated[int | None, arg(help="Default: the preset's.")] = None
    impl: Annotated[Literal["auto", "torch", "triton"], arg(help="Who computes the conv blocks on a GPU.")] = "auto"
    json: Json = False


@dataclass
class Presets:
    """List the presets with the sizes of the generator and of the CNN that it writes."""


def train(options: Train) -> None:
    """Train, measure, and write summary and figures."""
    from mini_ht.training.loop import train as run_training
    from mini_ht.training.report import report

    config = options.config
    run_dir = options.run_dir or Path("runs") / options.preset
    images = open_images(config, options.data_dir)
    how = {name: getattr(options, name) for name in ("resume", "overwrite", "workers")}
    state = run_training(config, images, run_dir, **how)
    print(report(config, images["test"], run_dir, state))


def evaluate(options: Evaluate) -> None:
    """Measure a checkpoint and print the figures."""
    from mini_ht.training.report import describe, measure

    generator = open_generator(str(options.checkpoint))
    parameters, config = generator.parameters, generator.config
    split = options.split or config.split
    if options.split and config.dataset != "omniglot":
        raise InputError(f"--split is for omniglot, and this generator was trained on {config.dataset}; leave it out")
    if split != config.split:
        note = f"note: trained on split {config.split!r}, so some of these classes were seen in training"
        print(note, file=sys.stderr)
    images = open_images(replace(config, split=split), options.data_dir)
    if options.part not in images:
        raise InputError(f"this data has no part {options.part!r}; choose one of {', '.join(images)}")
    way = config.way if options.way is None else options.way
    if not 2 <= way <= config.way:
        raise InputError(f"way is {way}; this generator serves 2 .. {config.way} classes")
    given = {name: getattr(options, name) for name in ("shot", "unlabelled", "queries", "protocol")}
    task = config.task | {"way": way} | {name: value for name, value in given.items() if value is not None}
    how = (options.episodes, options.norm or config.norm, options.seed, options.views, options.query_views)
    figures = measure(parameters, replace(config, split=split), images[options.part], task, *how)
    figures |= {"part": options.part}
    print(json.dumps(figures) if options.json else describe(figures))


def bench(options: Bench) -> None:
    """Time training steps and print the figures."""
    from mini_ht.bench import bench_training

    config = preset(options.preset)
    if options.episodes_per_step is not None:
        config = replace(config, episodes_per_step=options.episodes_per_step)
    figures = {"preset": options.preset, **bench_training(config, options.workers, impl=options.impl)}
    share = ", ".join(f"{name} {part:.0%}" for name, part in figures["share"].items())
    speed = f"{figures['episodes_per_second']} episodes/s, {figures['episodes_per_step']} a step"
    text = f"{options.preset}: {speed}, {figures['workers']} processes\ntime of the main process: {share}"
    print(json.dumps(figures) if options.json else text)


def list_presets(options: Presets) -> None:
    """Print the table of presets."""
    print(f"{'preset':42s} {'generator':>11s} {'generated CNN':>24s}")
    for name, config in presets().items():
        cnn = cnn_size(config)
        print(f"{name:42s} {generator_size(config):11,} {cnn:11,} ({4 * cnn / 1000:7.1f} kB)")


def open_images(config: Config, data_dir: Path | None) -> Any:
    """The data set that a config asks for."""
    from mini_ht.datasets import open_dataset

    return open_dataset(config.dataset, data_dir, **config.data)


def train_defaults(arguments: Sequence[str]) -> Train:
    """The options of `train` before the flags: a preset's config, or with --resume the one that the run began with."""
    name, run_dir, resume, skip = QUICKSTART, None, False, ""
    switches = {option.name for option in fields(Config) if option.type == "bool"} | {"resume", "overwrite"}
    for argument in arguments:
        if not argument.startswith("-"):
            if skip == "run_dir":
                run_dir = Path(argument)
            elif not skip:
                name = argument
            skip = ""
            continue
        flag, equals, value = argument.lstrip("-").partition("=")
        flag = flag.replace("-", "_")
        resume = resume or flag == "resume"
        skip = "" if equals or flag.removeprefix("no_") in switches else flag
        if equals and flag == "run_dir":
            run_dir = Path(value)
    # From the file that is written first: the other may be missing if a run was killed as it began.
    state = (run_dir or Path("runs") / name) / "training.safetensors"
    config = read_tensors(state, ())[1] if resume else preset(name)
    return Train(preset=name, config=config)


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one command; on --help or a mistake in its options tyro prints it and exits with 0 or 2."""
    from mini_ht import cli_classifier, cli_demo

    commands: dict[str, tuple[Any, Callable[[Any], int | None]]] = {
        "train": (Train, train), "evaluate": (Evaluate, evaluate),
        "bench": (Bench, bench), "presets": (Presets, list_presets), **cli_classifier.COMMANDS, **cli_demo.COMMANDS,
    }  # fmt: skip
    if name not in commands:
        raise InputError(f"there is no command {name!r}; choose {', '.join(commands)}")
    kind, action = commands[name]
    default = train_defaults(arguments) if kind is Train else MISSING_NONPROP
    return action(tyro.cli(kind, prog=f"mini-ht {name}", args=list(arguments), default=default)) or 0


def flush() -> None:
    """Write out what was printed: a full disk is an error like others, not one that comes as the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            sys.stdout.close()  # or it would be tried again
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0, 1 if some of many tasks failed, 2 for input that can be corrected, 130 after Ctrl-C, 141 where the reader of
    what is printed, such as `head`, has seen enough.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
            code = 0
        else:
            code = run(arguments[0], arguments[1:])
        flush()
        return code
    except InputError as error:
        print(f"mini-ht: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"mini-ht: {error.name} is not installed; run: pip install 'mini_ht[train]'", file=sys.stderr)
        return 2
    except BrokenPipeError:  # those of workers and requests never come here
        with suppress(OSError):
            sys.stdout.close()  # what it still holds would be tried again
        return 141
    except OSError as error:
        print(f"mini-ht: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # NumPy raises the one; torch the other, in several words.
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        advice = "end other programs, or do less at a time (--workers, --episodes-per-step)"
        print(f"mini-ht: out of memory; {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nmini-ht: stopped; {stop}".rstrip("; "), file=sys.stderr)
        return 130
