"""A classifier as one small file, ONNX or NumPy, checked before it is put in place."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.classifier_file import FORMAT, SUFFIXES, OnnxNetwork, installed, pack, unpack
from mini_ht.errors import InputError
from mini_ht.files import write_atomically
from mini_ht.folded import PRECISIONS, FoldedCNN
from mini_ht.onnx_graph import onnx_model
from mini_ht.task_classifier import TaskClassifier

LARGEST_DIFFERENCE = 1e-4  # of logits up to 100, between the file as it runs and NumPy; of larger ones in proportion
PREPARING = {
    "ink": "ink is 1 on paper 0, in the middle, its longer side 18/28 of the picture's, as mini_ht.ink.to_ink does it",
    "none": "pixels as those of the support images",
}


@dataclass(frozen=True)
class Report:
    """What was written, and how far its logits were from NumPy's, at most, on the images that it was checked with."""

    path: Path
    size: int  # bytes
    difference: float


def export(
    classifier: TaskClassifier,
    path: str | os.PathLike[str],
    images: NDArray[np.float32],
    *,
    force: bool = False,
    precision: str = "float32",
) -> Report:
    """Write a classifier as .onnx or .npz, after comparing what the file computes with NumPy.

    Resizing and preparing images is not in the file; its metadata say what images it wants. The norms are folded into a
    scale and a shift. The same classifier gives the same bytes.

    Args:
        classifier: from `adapt` or a fitted HyperTransformerClassifier's `task_`.
        path: where to, ending in .onnx (needs onnx and onnxruntime) or .npz.
        images: [m, H, W, C] prepared ones to compare on.
        force: replace a file that is there.
        precision: of the numbers in the file: "float32", "float16" or "int8"; NumPy is compared with these.

    Raises:
        InputError: a file that is there, another suffix or precision, class names that are not text or numbers,
            packages that are not installed, a folder that cannot be written, or logits that differ by more than 1e-4
            (or 1e-6 of the largest). Then nothing is written.
    """
    file = check_target(path, force)
    data = file_bytes(classifier, file, precision)
    difference = check_bytes(data, classifier, file, images, precision)
    write_atomically(file, data)
    return Report(file, len(data), difference)


def file_bytes(classifier: TaskClassifier, file: Path, precision: str) -> bytes:
    """What `export` writes; arguments and errors are the same."""
    network = classifier.network
    if not isinstance(network, FoldedCNN):
        raise InputError("this classifier was read from an ONNX file; copy that file, or adapt anew")
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    about = metadata(classifier, network)
    if file.suffix == ".npz":
        return pack(network, about, precision)
    installed("onnx")
    return onnx_model(network, about, precision)


def check_bytes(
    data: bytes, classifier: TaskClassifier, file: Path, images: NDArray[np.float32], precision: str
) -> float:
    """How far the logits of what `file_bytes` gave are from NumPy's, at most, on images; InputError if too far."""
    network = classifier.network
    assert isinstance(network, FoldedCNN)
    written: Any = OnnxNetwork(data, optimise=False) if file.suffix == ".onnx" else unpack(data)[0]
    wanted = network.rounded(precision)(images)
    difference = float(np.abs(written(images) - wanted).max())
    most = LARGEST_DIFFERENCE * max(1.0, float(np.abs(wanted).max()) / 100)
    if not difference <= most:  # NaN, too
        raise InputError(f"{file} would differ from NumPy by {difference:.1e} ({most:.1e} at most); it was not written")
    return difference


def check_target(path: str | os.PathLike[str], force: bool, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """The path, if a file may be written there; InputError for one that is there, and for another suffix."""
    file = Path(path)
    if file.suffix not in suffixes:
        raise InputError(f"{file} has suffix {file.suffix!r}; wanted {' or '.join(suffixes)}")
    if file.is_dir() or (file.exists() and not force):
        raise InputError(f"{file} is there already; choose another name, or replace it with --force (force=True)")
    return file


def metadata(classifier: TaskClassifier, network: FoldedCNN) -> dict[str, str]:
    """What a file says about itself, as text by name."""
    classes = classifier.classes_.tolist()
    if not all(isinstance(name, str | int | float) for name in classes):
        raise InputError("a class is neither text nor number, and a file cannot hold its name; rename the classes")
    shape = list(network.image_shape)
    return {
        "classes": json.dumps(classes),
        "images": f"[N, H, W, C] float32 in [0, 1], resized and prepared before: {PREPARING[classifier.preprocess]}",
        "preprocess": json.dumps({"kind": classifier.preprocess, "polarity": classifier.polarity, "shape": shape}),
        "slope": repr(float(network.slope)),
        **classifier.provenance,
        "format": FORMAT,  # last, so that a file that was cut short lacks it
    }
