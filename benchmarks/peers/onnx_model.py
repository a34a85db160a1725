"""Builds ONNX models, written with the helpers of the package onnx, of what TensorFlow users have."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.cases import Case
from benchmarks.networks import Weights
from benchmarks.peers.engine import dense_nchw, to_oihw
from benchmarks.problem import EPSILON

_OPSET = 17
_ACTIVATIONS: dict[str | None, tuple[str, dict[str, float]] | None] = {
    None: None,
    "relu": ("Relu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.2}),
    "elu": ("Elu", {}),
    "hard_swish": ("HardSwish", {}),
}


class OnnxBuilder:
    """A Builder whose tensors are names."""

    def __init__(self, dtype: np.dtype):
        self._dtype = np.dtype(dtype)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def _node(self, kind: str, *inputs: str, **attributes: object) -> str:
        output = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _constant(self, array: np.ndarray) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(array, self._dtype), name))
        return name

    def _value(self, name: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self._dtype), shape)

    def input(self, shape: tuple[int, ...]) -> str:
        n, h, w, c = shape
        name = f"x{len(self.inputs)}"
        self.inputs.append(self._value(name, (n, c, h, w)))
        return name

    def conv_bn(self, x: str, case: Case, weights: Weights, residual: str | None) -> str:
        top, bottom, left, right = case.pads
        y = self._node(
            "Conv", x, self._constant(to_oihw(weights.filters)), strides=[case.stride] * 2,
            dilations=[case.dilation] * 2, pads=[top, left, bottom, right], group=case.groups,
        )  # fmt: skip
        vectors = (weights.gamma, weights.beta, weights.moving_mean, weights.moving_variance)
        y = self._node("BatchNormalization", y, *map(self._constant, vectors), epsilon=EPSILON)
        if residual is not None:
            y = self._node("Add", y, residual)
        return self._activate(y, case.activation)

    def _activate(self, x: str, activation: str | None) -> str:
        if activation == "relu6":
            return self._node("Clip", x, *(self._constant(np.array(limit)) for limit in (0, 6)))
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation} is not among those that the ONNX models here have")
        found = _ACTIVATIONS[activation]
        return x if found is None else self._node(found[0], x, **found[1])

    def max_pool(self, x: str, window: Case) -> str:
        top, bottom, left, right = window.pads
        size = [window.filter_height, window.filter_width]
        return self._node("MaxPool", x, kernel_shape=size, strides=[window.stride] * 2, pads=[top, left, bottom, right])

    def mean(self, x: str) -> str:
        return self._node("Flatten", self._node("GlobalAveragePool", x))

    def dense(self, x: str, weights: np.ndarray, bias: np.ndarray, relu: bool) -> str:
        flat = self._node("Flatten", x)
        y = self._node("Gemm", flat, self._constant(dense_nchw(weights)), self._constant(bias))
        return self._activate(y, "relu" if relu else None)

    def image(self, output: str) -> bool:
        """Whether the model's output is one, not logits."""
        return self._nodes[-1].op_type != "Gemm"

    def model(self, output: str) -> bytes:
        """The finished model, checked."""
        sizes = ("n", "c", "h", "w") if self.image(output) else ("n", "units")
        graph = helper.make_graph(self._nodes, "model", self.inputs, [self._value(output, sizes)], self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
        onnx.checker.check_model(model)
        return model.SerializeToString()
