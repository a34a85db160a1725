"""Counts the batch norms in a graph of TensorFlow, OpenVINO or ONNX, whatever they are written as.

A batch norm is an operation of that name, or a multiplication of what depends on the input by a constant vector, or a
root of what depends on the input (of a variance that is computed). Several multiplications with nothing but additions
of constants between them are one. The preprocessing of a model may be counted too: it multiplies by vectors likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_NORMS = {
    "FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3", "_FusedBatchNormEx", "BatchNormWithGlobalNormalization",
    "BatchNormInference", "BatchNormalization",
}  # fmt: skip
_SCALES = {"Mul", "Multiply", "RealDiv", "Divide", "Div"}
_SHIFTS = {"Add", "AddV2", "Sub", "Subtract", "BiasAdd", "Identity", "StopGradient", "CheckNumerics"}
_ROOTS = {"Rsqrt", "Sqrt", "Pow", "Power"}
_SOURCES = {"Placeholder", "PlaceholderWithDefault", "Parameter", "RandomUniform", "VarHandleOp", "VariableV2"}


class Op(NamedTuple):
    """An operation; of a constant, also its rank."""

    kind: str
    inputs: tuple[str, ...]
    rank: int | None = None


Graph = Mapping[str, Op]


class _Ranks:
    """The ranks of constants, computed ones too; None of what depends on an input."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._known: dict[str, int | None] = {}

    def __getitem__(self, name: str) -> int | None:
        pending = [name]
        while pending:
            op = self._graph.get(pending[-1])
            missing = [x for x in op.inputs if x not in self._known] if op else []
            if missing and pending[-1] not in self._known:
                self._known[pending[-1]] = None  # should it be in a loop
                pending += missing
            else:
                last = pending.pop()
                self._known[last] = self._rank(op)
        return self._known[name]

    def _rank(self, op: Op | None) -> int | None:
        if op is None or op.kind in _SOURCES:
            return None
        if op.rank is not None:
            return op.rank
        ranks = [self._known[name] for name in op.inputs]
        return None if not ranks or None in ranks else max(rank for rank in ranks if rank is not None)


def batch_norms(graph: Graph) -> list[str]:
    """The names of the operations that are one each, the first of those that are one together."""
    ranks = _Ranks(graph)
    return [name for name in graph if _is_norm(graph, name, ranks)]


def _is_norm(graph: Graph, name: str, ranks: _Ranks) -> bool:
    op = graph[name]
    if op.kind in _NORMS:
        return True
    if op.kind in _ROOTS:
        return ranks[op.inputs[0]] is None
    return _by_vector(op, ranks) and not any(_by_vector(graph[x], ranks) for x in _chain(graph, name, ranks))


def _by_vector(op: Op, ranks: _Ranks) -> bool:
    """Whether it multiplies data by a constant that is no scalar."""
    if op.kind not in _SCALES:
        return False
    found = [ranks[name] for name in op.inputs]
    return None in found and any(found)


def _chain(graph: Graph, name: str, ranks: _Ranks) -> Iterator[str]:
    """What is before this operation, as long as constants are added to data, or multiply them."""
    while True:
        data = [x for x in graph[name].inputs if ranks[x] is None]
        if len(data) != 1 or data[0] not in graph or graph[data[0]].kind not in _SHIFTS | _SCALES:
            return
        name = data[0]
        yield name


def of_tensorflow(graph_def: Any) -> list[Graph]:
    """The graph, and those of the functions that it calls."""
    functions = {function.signature.name: function.node_def for function in graph_def.library.function}
    bodies, called = [graph_def.node], set()
    for body in bodies:
        for name in sorted({name for node in body for name in _calls(node) if name in functions} - called):
            called.add(name)
            bodies.append(functions[name])
    return [{node.name: _tensorflow_op(node) for node in body} for body in bodies]


def _calls(node: Any) -> Iterator[str]:
    yield node.op
    for value in node.attr.values():
        yield from (value.func.name, *(function.name for function in value.list.func))


def _tensorflow_op(node: Any) -> Op:
    rank = len(node.attr["value"].tensor.tensor_shape.dim) if node.op == "Const" else None
    return Op(node.op, tuple(name.split(":")[0] for name in node.input if not name.startswith("^")), rank)


def of_onnx(model: Any) -> list[Graph]:
    """The graph, and those in its nodes."""
    return list(_onnx_graphs(model.graph))


def _onnx_graphs(graph: Any) -> Iterator[Graph]:
    ops = {tensor.name: Op("Constant", (), len(tensor.dims)) for tensor in graph.initializer}
    for node in graph.node:
        values = [attribute.t for attribute in node.attribute if attribute.HasField("t")]
        rank = len(values[0].dims) if node.op_type == "Constant" and values else None
        ops.update({name: Op(node.op_type, tuple(x for x in node.input if x), rank) for name in node.output[:1]})
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _onnx_graphs(attribute.g)
    yield ops


def of_openvino(model: Any) -> list[Graph]:
    """The graph, and the bodies of its conditionals."""
    ops = {}
    graphs: list[Graph] = [ops]
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        inputs = tuple(node.input_value(i).get_node().get_friendly_name() for i in range(node.get_input_size()))
        rank = len(node.get_output_shape(0)) if kind == "Constant" else None
        ops[node.get_friendly_name()] = Op(kind, inputs, rank)
        for body in ("get_then_body", "get_else_body"):
            if hasattr(node, body):
                graphs += of_openvino(getattr(node, body)())
    return graphs
