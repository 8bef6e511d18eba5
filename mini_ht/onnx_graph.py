"""A folded CNN as an ONNX graph."""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.folded import FoldedCNN

OPSET, IR = 17, 8  # of 2022: what runs on devices is rarely newer


def onnx_model(network: FoldedCNN, metadata: Mapping[str, str], precision: str = "float32") -> bytes:
    """The model as bytes, the same for the same input.

    Input `images` [N, H, W, C] float32 in [0, 1]; outputs `logits` and `probabilities` [N, way]. precision is that of
    the numbers in the file, see `FoldedCNN.stored`; it computes in float32. Needs onnx.
    """
    from onnx import ModelProto, helper

    tensors = {name: _channels_first(name, array) for name, array in network.stored(precision).items()}
    kinds = tuple((name, array.dtype.str, array.shape) for name, array in tensors.items())
    model = ModelProto()
    model.CopyFrom(_template(kinds, tuple(network.blocks), network.slope, network.image_shape, network.way))
    for tensor in model.graph.initializer:
        tensor.raw_data = tensors[tensor.name].tobytes()
    helper.set_model_props(model, dict(metadata))
    return model.SerializeToString(deterministic=True)


def written_here(model: Any) -> bool:
    """Whether an onnx.ModelProto is, but for its numbers, one that `onnx_model` writes: others could do anything."""
    from onnx import helper

    tensors, found = model.graph.initializer, {entry.key: entry.value for entry in model.metadata_props}
    dtypes = [np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).newbyteorder("<") for tensor in tensors]
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        if tensor.external_data or len(tensor.raw_data) != dtype.itemsize * math.prod(tensor.dims):
            return False
    sizes = {tensor.name: tuple(tensor.dims) for tensor in tensors}
    kinds = tuple((name, dtype.str, size) for (name, size), dtype in zip(sizes.items(), dtypes, strict=True))
    blocks = tuple(f"conv{k}" for k in range(1, len(sizes)) if f"conv{k}.weight" in sizes)
    shape = tuple(json.loads(found["preprocess"])["shape"])
    ours = _template(kinds, blocks, float(found["slope"]), shape, sizes["logits.bias"][0])
    parts = ("node", "input", "output", "value_info", "sparse_initializer")
    same = all(list(getattr(ours.graph, part)) == list(getattr(model.graph, part)) for part in parts)
    return same and not model.functions


def from_channels_first(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Back from the layout that arrays have in the file to that of `FoldedCNN.stored`."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)  # [3, 3, Cin, Cout]
    if name == "logits.weight.step":
        return array[:, None]  # [way, 1]
    return array.ravel()[None, None, None] if name.endswith(".step") else array.ravel() if array.ndim == 3 else array


def _channels_first(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """An array as ONNX wants it, whose convs are channels-first, in little-endian order."""
    if array.ndim == 4 and not name.endswith(".step"):
        array = array.transpose(3, 2, 0, 1)  # [Cout, Cin, 3, 3]
    elif name.endswith((".scale", ".shift")):
        array = array[:, None, None]  # [Cout, 1, 1]
    elif name.endswith(".step"):
        array = array.ravel()  # [Cout] or [way]
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


@functools.cache
def _template(
    kinds: tuple[tuple[str, str, tuple[int, ...]], ...],
    blocks: tuple[str, ...],
    slope: float,
    image_shape: tuple[int, ...],
    way: int,
) -> Any:
    """The model of a network with such arrays, all 0: built once, as that takes longer than to fill it."""
    from onnx import TensorProto, helper, numpy_helper

    stored = [numpy_helper.from_array(np.zeros(shape, dtype), name) for name, dtype, shape in kinds]
    dtypes = {name: np.dtype(dtype) for name, dtype, _ in kinds}
    nodes: list[Any] = []

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(name: str) -> str:
        if f"{name}.step" in dtypes:
            return node("DequantizeLinear", [name, f"{name}.step"], f"{name}.single", axis=0)
        if dtypes[name] == np.float16:
            return node("Cast", [name], f"{name}.single", to=TensorProto.FLOAT)
        return name

    x = node("Transpose", ["images"], "pixels", perm=[0, 3, 1, 2])  # [N, C, H, W]
    for name in blocks:
        parts = [part for part in ("weight", "bias") if f"{name}.{part}" in dtypes]
        x = node("Conv", [x, *(constant(f"{name}.{part}") for part in parts)], f"{name}.conv", pads=[1, 1, 1, 1])
        activation, how = ("LeakyRelu", {"alpha": slope}) if slope else ("Relu", {})
        x = node(activation, [x], f"{name}.active", **how)
        x = node("MaxPool", [x], f"{name}.pool", kernel_shape=[2, 2], strides=[2, 2])
        x = node("Mul", [x, constant(f"{name}.scale")], f"{name}.mul")
        x = node("Add", [x, constant(f"{name}.shift")], f"{name}.add")
    x = node("Transpose", [x], "activations", perm=[0, 2, 3, 1])  # [N, h, w, C]
    x = node("Flatten", [x], "features", axis=1)  # [N, F]
    node("Gemm", [x, constant("logits.weight"), constant("logits.bias")], "logits", transB=1)  # [N, way]
    node("Softmax", ["logits"], "probabilities", axis=-1)

    def described(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])

    outputs = [described(name, way) for name in ("logits", "probabilities")]
    graph = helper.make_graph(nodes, "classifier", [described("images", *image_shape)], outputs, stored)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, producer_name="mini_ht", ir_version=IR, opset_imports=[opset])
