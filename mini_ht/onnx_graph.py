"""A folded CNN as an ONNX graph."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mini_ht.folded import FoldedCNN

OPSET, IR = 17, 8  # of 2022: what runs on devices is rarely newer


def onnx_model(network: FoldedCNN, metadata: Mapping[str, str], half: bool = False) -> bytes:
    """The model as bytes, the same for the same input.

    Input `images` [N, H, W, C] float32 in [0, 1]; outputs `logits` and `probabilities` [N, way]. With `half` the
    numbers are stored in half precision and cast when the model is loaded. Needs onnx.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    stored: list[Any] = []

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(name: str, array: Any) -> str:
        kept = np.ascontiguousarray(array, np.float16 if half else np.float32)
        stored.append(numpy_helper.from_array(kept, f"{name}.half" if half else name))
        return node("Cast", [f"{name}.half"], name, to=TensorProto.FLOAT) if half else name

    x = node("Transpose", ["images"], "pixels", perm=[0, 3, 1, 2])  # ONNX convs are channels-first
    for name in network.blocks:
        weight = network.arrays[f"{name}.weight"].transpose(3, 2, 0, 1)  # [Cout, Cin, 3, 3]
        inputs = [x, constant(f"{name}.weight", weight)]
        if f"{name}.bias" in network.arrays:
            inputs.append(constant(f"{name}.bias", network.arrays[f"{name}.bias"]))
        x = node("Conv", inputs, f"{name}.conv", pads=[1, 1, 1, 1])
        activation, how = ("LeakyRelu", {"alpha": network.slope}) if network.slope else ("Relu", {})
        x = node(activation, [x], f"{name}.active", **how)
        x = node("MaxPool", [x], f"{name}.pool", kernel_shape=[2, 2], strides=[2, 2])
        for kind, part in (("Mul", "scale"), ("Add", "shift")):
            array = network.arrays[f"{name}.{part}"][:, None, None]  # [Cout, 1, 1]
            x = node(kind, [x, constant(f"{name}.{part}", array)], f"{name}.{kind.lower()}")
    x = node("Transpose", [x], "activations", perm=[0, 2, 3, 1])
    x = node("Flatten", [x], "features", axis=1)
    inputs = [x, constant("logits.weight", network.arrays["logits.weight"])]
    node("Gemm", [*inputs, constant("logits.bias", network.arrays["logits.bias"])], "logits", transB=1)
    node("Softmax", ["logits"], "probabilities", axis=-1)

    def described(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])

    outputs = [described(name, network.way) for name in ("logits", "probabilities")]
    graph = helper.make_graph(nodes, "classifier", [described("images", *network.image_shape)], outputs, stored)
    model = helper.make_model(
        graph, producer_name="mini_ht", ir_version=IR, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    helper.set_model_props(model, dict(metadata))
    return model.SerializeToString(deterministic=True)
