"""FusedConvBN nodes become stock ops: a convolution, the batch norm as a map, the residual, the activation."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from fusedconvbn.folding.affine import AffineMap, Blocked
from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.nodes import NodeDef, Nodes, attribute, node_of
from fusedconvbn.folding.planning import Kept
from fusedconvbn.folding.shapes import Shapes

_OP = "FusedConvBN"


def expand_fused(graph: Nodes) -> tuple[dict[str, str], list[Kept]]:
    """Writes each FusedConvBN node of inference in stock ops, the batch norm as a Mul and an AddV2 of constants.

    Returns: The names of the nodes by that of their Mul, and those that stay.
    """
    nodes = [node for node in graph.nodes.values() if node.op == _OP]
    if not nodes:
        return {}, []
    constants, shapes = Constants(graph), Shapes(graph)
    # Before anything changes: of what stands in a node's place no shape is known.
    depthwise = {node.name: _depthwise_shape(graph, node, shapes) for node in nodes}
    expanded, kept = {}, []
    for node in nodes:
        try:
            m = _map(graph, node, constants)
        except Blocked as reason:
            kept.append(Kept(node.name, str(reason)))
        else:
            expanded[_expand(graph, node, m, depthwise[node.name])] = node.name
    return expanded, kept


def _map(graph: Nodes, node: NodeDef, constants: Constants) -> AffineMap:
    """What the batch norm of a node computes in inference."""
    inputs = graph.inputs(node)
    training = constants.value(inputs[-1])
    if training is None or bool(training):
        raise Blocked("it normalizes, or may normalize, with the statistics of its batch (training)")
    values = [constants.value(tensor) for tensor in inputs[2:6]]
    if any(value is None for value in values):
        raise Blocked("its parameters are not constant")
    return AffineMap.of_batch_norm(*values, attribute(node, "epsilon").f)


def _depthwise_shape(graph: Nodes, node: NodeDef, shapes: Shapes) -> list[int] | None:
    """That of the filters of the DepthwiseConv2dNative that a node's convolution is; None where it is none."""
    nhwc = attribute(node, "data_format").s == b"NHWC"
    data, filters = graph.inputs(node)[:2]
    shape, channels = shapes.of(filters), shapes.size(data, -1 if nhwc else -3)
    steps = [list(attribute(node, key).list.i)[1 if nhwc else 2 :][:2] for key in ("strides", "dilations")]
    square = all(step[0] == step[1] for step in steps) and not (steps[0][0] > 1 < steps[1][0])
    if not shape or shape[2] != 1 or channels in (None, 1) or shape[3] % channels or not square:
        return None
    return [shape[0], shape[1], channels, shape[3] // channels]


def _expand(graph: Nodes, node: NodeDef, m: AffineMap, depthwise: list[int] | None) -> str:
    """Puts stock ops in a node's place; the name of the first that is the batch norm's."""
    data, filters, _, _, mean, variance, *residual, _ = graph.inputs(node)
    builder = _Builder(graph, node)
    z = builder.convolution(data, filters, depthwise)
    scaled = builder.normalization(z, m)
    if residual:
        builder.add("AddV2", "residual", builder.result, residual[0])
    builder.activation(attribute(node, "activation").s.decode())
    del graph.nodes[node.name]
    graph.replace(f"{node.name}:0", builder.result)
    for port, tensor in ((1, mean), (2, variance)):
        graph.replace(f"{node.name}:{port}", tensor)
    return node_of(scaled)


class _Builder:
    """Adds nodes in the scope of one, each of which becomes `result`."""

    def __init__(self, graph: Nodes, node: NodeDef) -> None:
        self._graph, self._node = graph, node
        self._type = attribute(node, "T")
        self._numpy = tf.as_dtype(self._type.type).as_numpy_dtype
        self.result = ""

    def add(self, kind: str, name: str, *inputs: str, **attributes: object) -> str:
        node = self._graph.add(kind, f"{self._node.name}/{name}", inputs, T=self._type, **attributes)
        self.result = f"{node.name}:0"
        return self.result

    def number(self, name: str, value: float) -> str:
        return self._graph.add_constant(f"{self._node.name}/{name}", np.asarray(value, self._numpy))

    def convolution(self, data: str, filters: str, depthwise: list[int] | None) -> str:
        """Conv2D, or DepthwiseConv2dNative with filters of that shape."""
        kept = {key: attribute(self._node, key) for key in ("strides", "padding", "explicit_paddings", "data_format")}
        kept["dilations"] = attribute(self._node, "dilations")
        if depthwise is None:
            return self.add("Conv2D", "Conv2D", data, filters, **kept)
        target = self._graph.add_constant(f"{self._node.name}/shape", np.asarray(depthwise, np.int32))
        self.add("Reshape", "depthwise_filters", filters, target, Tshape=tf.int32)
        return self.add("DepthwiseConv2dNative", "depthwise", data, self.result, **kept)

    def normalization(self, z: str, m: AffineMap) -> str:
        nchw = attribute(self._node, "data_format").s == b"NCHW"
        along = (-1, 1, 1) if nchw else (-1,)
        scale, shift = (v.reshape(along).astype(self._numpy) for v in (m.scale, m.shift))
        names = [self._graph.add_constant(f"{self._node.name}/{n}", v) for n, v in (("scale", scale), ("shift", shift))]
        scaled = self.add("Mul", "scaled", z, names[0])
        self.add("AddV2", "shifted", scaled, names[1])
        return scaled

    def activation(self, name: str) -> None:
        u = self.result
        if name in ("relu", "relu6", "elu"):
            self.add(name.capitalize(), "activation", u)
        elif name == "leaky_relu":
            alpha = tf.compat.v1.AttrValue(f=0.2)
            self.add("LeakyRelu", "activation", u, alpha=alpha)
        elif name == "silu":
            self.add("Mul", "activation", u, self.add("Sigmoid", "sigmoid", u))
        elif name == "hard_swish":
            self.add("AddV2", "shifted_by_3", u, self.number("three", 3))
            self.add("Relu6", "relu6", self.result)
            self.add("Mul", "sixth", self.result, self.number("one_sixth", 1 / 6))
            self.add("Mul", "activation", u, self.result)
        elif name == "gelu":
            self.add("Mul", "over_sqrt_2", u, self.number("sqrt_half", 0.5**0.5))
            self.add("Erf", "erf", self.result)
            self.add("AddV2", "plus_1", self.result, self.number("one", 1))
            half = self._graph.add("Mul", f"{self._node.name}/half", [u, self.number("a_half", 0.5)], T=self._type)
            self.add("Mul", "activation", f"{half.name}:0", self.result)
