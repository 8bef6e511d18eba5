"""Classifier files: reading what `export` wrote, ONNX or NumPy."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.errors import InputError
from mini_ht.folded import FoldedCNN
from mini_ht.task_classifier import TaskClassifier, class_array

FORMAT = "mini_ht classifier 1"
SUFFIXES = (".onnx", ".npz")
LARGEST_FILE = 1 << 28  # bytes; a classifier has kilobytes
Run = Callable[[NDArray[np.float32]], NDArray[np.floating]]


def load_classifier(path: str | os.PathLike[str]) -> TaskClassifier:
    """A classifier from a file that `export` wrote: .onnx runs in onnxruntime, .npz in NumPy.

    Raises InputError when the file is missing, cut short or from another program.
    """
    file, data = _read(path)
    try:
        if file.suffix == ".onnx":
            run: Any = OnnxNetwork(data)
            found = run.metadata
        else:
            run, found = unpack(data)
        return _classifier(run, found)
    except InputError:
        raise
    except Exception as error:  # zip, JSON, protobuf: damage has many names
        raise InputError(
            f"{file} is cut short or is no classifier of mini_ht ({_line(error)}); write it anew"
        ) from error


def load_network(path: str | os.PathLike[str]) -> TaskClassifier:
    """Like `load_classifier`, with the arrays in NumPy for .onnx, too (needs onnx), to look at them."""
    file, data = _read(path)
    if file.suffix == ".npz":
        return load_classifier(file)
    onnx = installed("onnx")
    from onnx import numpy_helper

    try:
        model = onnx.load_from_string(data)
        found = {entry.key: entry.value for entry in model.metadata_props}
        arrays = {}
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            name = tensor.name.removesuffix(".half")
            if name.startswith("conv"):
                array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.ravel()
            arrays[name] = array
        shape = tuple(json.loads(found["preprocess"])["shape"])
        return _classifier(FoldedCNN(arrays, float(found["slope"]), shape), found)
    except Exception as error:
        raise InputError(
            f"{file} is cut short or is no classifier of mini_ht ({_line(error)}); write it anew"
        ) from error


def _read(path: str | os.PathLike[str]) -> tuple[Path, bytes]:
    """The bytes of a classifier file."""
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file} has suffix {file.suffix!r}; wanted {' or '.join(SUFFIXES)}")
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise InputError(
                f"{file} has {file.stat().st_size:,} bytes; a classifier has kilobytes: it is another file"
            )
        return file, file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); write it with 'mini-ht adapt'") from error


def _classifier(run: Run, found: Mapping[str, str]) -> TaskClassifier:
    """From a network and its file's metadata, after a look at both."""
    if found.get("format") != FORMAT:
        raise ValueError(f"its format is {found.get('format')!r}, not {FORMAT!r}")
    wanted = json.loads(found["preprocess"])
    shape = tuple(wanted["shape"])
    classes = class_array(json.loads(found["classes"]))
    logits = run(np.zeros((1, *shape), np.float32))
    if logits.shape != (1, len(classes)):
        raise ValueError(f"it has {len(classes)} classes and {logits.shape[-1]} logits")
    known = ("program", "generator", "config", "norm", "support")
    provenance = {name: found[name] for name in known if name in found}
    return TaskClassifier(run, classes, shape, wanted["kind"], wanted["polarity"], provenance)


def pack(network: FoldedCNN, about: Mapping[str, str], half: bool) -> bytes:
    """An .npz of the arrays, and the metadata as JSON."""
    arrays: dict[str, Any] = {k: x.astype(np.float16 if half else np.float32) for k, x in network.arrays.items()}
    arrays["metadata"] = np.frombuffer(
        json.dumps(about).encode(), np.uint8
    )  # as text it would take four bytes a letter
    np.savez_compressed(packed := io.BytesIO(), **arrays)
    return packed.getvalue()


def unpack(data: bytes) -> tuple[FoldedCNN, dict[str, str]]:
    """Back from `pack`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    found = json.loads(arrays.pop("metadata").tobytes())
    single = {name: array.astype(np.float32) for name, array in arrays.items()}
    return FoldedCNN(single, float(found["slope"]), tuple(json.loads(found["preprocess"])["shape"])), found


class OnnxNetwork:
    """A session of onnxruntime on one core: images [m, H, W, C] -> logits [m, way]."""

    def __init__(self, data: bytes) -> None:
        ort = installed("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # what fails is raised; it need not be printed, too
        self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.floating]:
        """Logits, as `FoldedCNN` gives them."""
        return self.session.run(["logits"], {"images": images.astype(np.float32, copy=False)})[0]


def installed(name: str) -> Any:
    """onnx or onnxruntime, or what to do to have it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        what = "use a .npz file, or run: pip install 'mini_ht[export]'"
        raise InputError(f"{name} is not installed, which .onnx files need; {what}") from error


def _line(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"[:200]
