"""The command line of the classifier: `mini-ht adapt | predict | show | adapt-many`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from mini_ht.classifier_file import load_classifier, load_network
from mini_ht.errors import InputError
from mini_ht.export import check_target

BEST = 3  # classes of an image that the table shows

Checkpoint = Annotated[Positional[str], arg(help="omniglot, omniglot-1shot, omniglot-any, a run folder or a file.")]
Force = Annotated[bool, arg(help="Replace what is there.")]
Precision = Annotated[
    Literal["float32", "float16", "int8"], arg(help="Of the numbers in the file: fewer bits, a smaller file.")
]
Preprocess = Annotated[Literal["ink", "none"], arg(help="ink: from photos and drawings; none: images as they are.")]
Views = Annotated[Literal[1, 5, 9], arg(help="Places at which images are seen: more are better and take longer.")]
Polarity = Annotated[Literal["auto", "dark", "light"], arg(help="Of ink: dark on light, or light on dark.")]


@dataclass
class Adapt:
    """Write a classifier from a handful of images: a folder a class, and if wanted `_unlabelled/`."""

    checkpoint: Checkpoint
    support: Annotated[Positional[Path], arg(metavar="FOLDER", help="Holds a folder of images for each class.")]
    out: Annotated[Path, arg(aliases=["-o"], help="The classifier: a .onnx or .npz file.")]
    force: Force = False
    precision: Precision = "float32"
    preprocess: Preprocess = "ink"
    polarity: Polarity = "auto"
    views: Views = 1


@dataclass
class Predict:
    """The class of each image: a table of the three most probable ones, or all as JSON."""

    classifier: Annotated[Positional[Path], arg(help="A file that 'mini-ht adapt' wrote.")]
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...", help="Image files.")]
    views: Views = 1
    json: Annotated[bool, arg(name="json", help="Print one line of JSON instead of a table.")] = False


@dataclass
class Show:
    """What is in a classifier: its classes, its size, who wrote it, and a picture of its kernels."""

    classifier: Annotated[Positional[Path], arg(help="A file that 'mini-ht adapt' wrote.")]
    picture: Annotated[Path | None, arg(help="Draw the kernels into this .png file.")] = None
    force: Force = False
    json: Annotated[bool, arg(name="json", help="Print one line of JSON instead of text.")] = False


@dataclass
class AdaptMany:
    """A classifier for each of many support folders. Run again it goes on where it was stopped.

    A bad folder is reported and skipped; the exit code is then 1. Every file is written whole or not at all; one of 16
    is run and compared with NumPy first.
    """

    checkpoint: Checkpoint
    folders: Annotated[Positional[Path], arg(metavar="FOLDERS", help="Holds a support folder for each task.")]
    out: Annotated[Path, arg(aliases=["-o"], help="A folder; the classifier of FOLDERS/a goes into OUT/a.onnx.")]
    format: Annotated[Literal["onnx", "npz"], arg(help="What is written.")] = "onnx"
    workers: Annotated[int, arg(help="Processes, each on one core; 0 takes one a core.")] = 0
    force: Force = False
    precision: Precision = "float32"
    preprocess: Preprocess = "ink"
    polarity: Polarity = "auto"
    views: Views = 1


def adapt(options: Adapt) -> None:
    """Read the support folder, write the classifier, and say what came out."""
    from mini_ht.adaptation import adapt, open_generator
    from mini_ht.export import export
    from mini_ht.support_folder import read_support

    check_target(options.out, options.force)
    generator = open_generator(options.checkpoint)
    choice = (options.preprocess, options.polarity)
    task, warnings = read_support(options.support, generator.image_shape, generator.config.way, *choice)
    for warning in warnings:
        print(f"mini-ht: warning: {warning}", file=sys.stderr)
    (classifier,) = adapt(generator, [task], *choice, options.views)
    report = export(classifier, options.out, task.images, force=options.force, precision=options.precision)
    print(
        f"{report.path}: {len(task.classes)} classes from {len(task.labels)} images, {report.size:,} bytes; "
        f"largest difference from NumPy {report.difference:.0e}"
    )


def predict(options: Predict) -> None:
    """Print the classes of images."""
    if not options.images:
        raise InputError("no image was given; name at least one")
    classifier = load_classifier(options.classifier)
    names = [str(name) for name in classifier.classes_]
    rows = classifier.predict_proba(options.images, options.views)
    if options.json:
        found = [
            {
                "image": str(image),
                "class": names[row.argmax()],
                "probabilities": {name: round(float(p), 6) for name, p in zip(names, row, strict=True)},
            }
            for image, row in zip(options.images, rows, strict=True)
        ]
        print(json.dumps({"classifier": str(options.classifier), "images": found}))
        return
    first = max(len(str(image)) for image in options.images)
    wide = max(len(name) for name in names)
    for image, row in zip(options.images, rows, strict=True):
        best = row.argsort()[::-1][:BEST]
        print(f"{image!s:{first}s}  " + "  ".join(f"{names[k]:{wide}s} {100 * row[k]:5.1f} %" for k in best))


def show(options: Show) -> None:
    """Print what a classifier file holds, and draw its kernels if asked."""
    if options.picture is not None:
        check_target(options.picture, options.force, (".png",))
    classifier = load_network(options.classifier)
    network: Any = classifier.network
    blocks = {name: list(network.arrays[f"{name}.weight"].shape) for name in network.blocks}
    figures = {
        "classifier": str(options.classifier),
        "bytes": options.classifier.stat().st_size,
        "classes": [str(name) for name in classifier.classes_],
        "numbers": network.size,
        "image_shape": list(classifier.image_shape),
        "preprocess": classifier.preprocess,
        "polarity": classifier.polarity,
        **classifier.provenance,
        **blocks,
        "logits": list(network.arrays["logits.weight"].shape),
    }
    if options.picture is not None:
        from mini_ht.kernel_picture import draw_network

        draw_network(network, options.picture)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        text = " x ".join(map(str, value)) if name != "classes" and isinstance(value, list) else value
        print(f"{name:12s} {', '.join(value) if name == 'classes' else text}")


def adapt_many(options: AdaptMany) -> int:
    """Write the classifiers with a progress bar; 1 if some folder failed."""
    from tqdm import tqdm

    from mini_ht.adapt_many import Order, Outcome, adapt_many, own_folders, rank

    order = Order(
        options.checkpoint, options.out, f".{options.format}", options.preprocess, options.polarity, options.force,
        options.precision, options.views,
    )  # fmt: skip
    total = Outcome()
    number, count = rank()
    workers = options.workers or (1 if count > 1 else os.cpu_count() or 1)
    with tqdm(total=len(own_folders(options.folders)), unit="task", disable=True if number else None) as bar:
        for done, outcome in adapt_many(order, options.folders, workers):
            bar.update(done)
            for line in (*(f"warning: {line}" for line in outcome.warnings), *outcome.failed):
                bar.write(f"mini-ht: {line}", file=sys.stderr)
            total.add(outcome)
    print(f"{options.out}: {total.written} written, {total.skipped} were there, {len(total.failed)} failed")
    return 1 if total.failed and count == 1 else 0  # torchrun ends all ranks when one exits with 1


COMMANDS: dict[str, tuple[Any, Callable[[Any], int | None]]] = {
    "adapt": (Adapt, adapt),
    "predict": (Predict, predict),
    "show": (Show, show),
    "adapt-many": (AdaptMany, adapt_many),
}
