"""Classifier files: reading what `export` wrote, ONNX or NumPy."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.errors import InputError
from mini_ht.files import read_regular
from mini_ht.folded import FoldedCNN, restored
from mini_ht.onnx_graph import from_channels_first, written_here
from mini_ht.task_classifier import TaskClassifier, class_array

FORMAT = "mini_ht classifier 1"
SUFFIXES = (".onnx", ".npz")
LARGEST_FILE, LARGEST_SIDE = 1 << 28, 4096  # bytes, a classifier has kilobytes; pixels
Run = Callable[[NDArray[np.float32]], NDArray[np.floating]]


def load_classifier(path: str | os.PathLike[str]) -> TaskClassifier:
    """A classifier from a file that `export` wrote: .onnx runs in onnxruntime, .npz in NumPy.

    Raises InputError when the file is missing, cut short or from another program.
    """
    file, data = _read(path)
    with _damage_named(file):
        if file.suffix == ".onnx":
            read_model(data)
            run: Any = OnnxNetwork(data)
            found = run.metadata
        else:
            run, found = unpack(data)
        return _classifier(run, found)


def load_network(path: str | os.PathLike[str]) -> TaskClassifier:
    """Like `load_classifier`, with the arrays in NumPy for .onnx, too (needs onnx), to look at them."""
    file, data = _read(path)
    if file.suffix == ".npz":
        return load_classifier(file)
    with _damage_named(file):
        model = read_model(data)
        from onnx import numpy_helper

        found = {entry.key: entry.value for entry in model.metadata_props}
        stored = {}
        for tensor in model.graph.initializer:
            stored[tensor.name] = from_channels_first(tensor.name, numpy_helper.to_array(tensor))
        shape = tuple(json.loads(found["preprocess"])["shape"])
        return _classifier(FoldedCNN(restored(stored), float(found["slope"]), shape), found)


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """What goes wrong inside is the fault of the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # zip, JSON, protobuf: damage has many names
        why = f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"[:200]
        raise InputError(f"{file} is cut short or is no classifier of mini_ht ({why}); write it anew") from error


def read_model(data: bytes) -> Any:
    """The onnx.ModelProto of a classifier; ValueError for a graph of another kind, which nothing should run."""
    model = installed("onnx").load_from_string(data)
    if not written_here(model):
        raise ValueError("its graph is not one that mini_ht writes")
    return model


def _read(path: str | os.PathLike[str]) -> tuple[Path, bytes]:
    """The bytes of a classifier file."""
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file} has suffix {file.suffix!r}; wanted {' or '.join(SUFFIXES)}")
    try:
        return file, read_regular(file, LARGEST_FILE)
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); write it with 'mini-ht adapt'") from error


def _classifier(run: Run, found: Mapping[str, str]) -> TaskClassifier:
    """From a network and its file's metadata, after a look at both."""
    if found.get("format") != FORMAT:
        raise ValueError(f"its format is {found.get('format')!r}, not {FORMAT!r}")
    wanted = json.loads(found["preprocess"])
    shape = tuple(wanted["shape"])
    whole = all(type(side) is int and 0 < side <= LARGEST_SIDE for side in shape)
    if not whole or len(shape) != 3 or shape[0] != shape[1]:
        raise ValueError(f"its images have shape {shape}")
    classes = class_array(json.loads(found["classes"]))
    logits = run(np.zeros((1, *shape), np.float32))
    if not np.isfinite(logits).all():
        raise ValueError("its numbers are not finite")
    if logits.shape != (1, len(classes)):
        raise ValueError(f"it has {len(classes)} classes and {logits.shape[-1]} logits")
    known = ("program", "generator", "config", "weights", "norm", "views", "support")
    provenance = {name: found[name] for name in known if name in found}
    return TaskClassifier(run, classes, shape, wanted["kind"], wanted["polarity"], provenance)


def pack(network: FoldedCNN, about: Mapping[str, str], precision: str) -> bytes:
    """An .npz of the arrays, in the precision that `FoldedCNN.stored` knows, and the metadata as JSON."""
    arrays: dict[str, Any] = network.stored(precision)
    # As text it would take four bytes a letter.
    arrays["metadata"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(packed := io.BytesIO(), **arrays)
    return packed.getvalue()


def unpack(data: bytes) -> tuple[FoldedCNN, dict[str, str]]:
    """Back from `pack`."""
    if not data.startswith(b"PK"):
        raise ValueError("it is no .npz file")
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        if sum(file.file_size for file in stored.zip.infolist()) > LARGEST_FILE:
            raise ValueError("it unpacks to gigabytes")
        arrays = {name: stored[name] for name in stored.files}
    found = json.loads(arrays.pop("metadata").tobytes())
    shape = tuple(json.loads(found["preprocess"])["shape"])
    return FoldedCNN(restored(arrays), float(found["slope"]), shape), found


class OnnxNetwork:
    """A session of onnxruntime on one core: images [m, H, W, C] -> logits [m, way].

    Without `optimise` it starts twice as fast and runs the graph node by node, as the file has it.
    """

    def __init__(self, data: bytes, optimise: bool = True) -> None:
        ort = installed("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # what fails is raised; it need not be printed, too
        self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
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
