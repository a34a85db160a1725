"""Functions of loops and conditions take the values of the variables that they were given."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import TopologicalSorter

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.function_pb2 import FunctionDef

from fusedconvbn.folding.nodes import NodeDef, Nodes, unique

_LOOPS = ("While", "StatelessWhile")
_CONDITIONS = ("If", "StatelessIf", "Case", "StatelessCase")
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_BRANCHES = {"then_branch", "else_branch", "branches", "f"}

Kind = tuple[int, tuple[int, ...]]  # the type of a variable's value, as attributes have it, and its shape


def kind_of(value: np.ndarray) -> Kind:
    """That of a variable with this value."""
    return tf.as_dtype(value.dtype).as_datatype_enum, value.shape


def take_values(graph: Nodes, node: NodeDef, given: Mapping[int, Kind]) -> None:
    """Lets a loop, condition or call that was given variables take their values, in copies of its functions.

    Args:
        graph: The copies join its functions.
        node: Changed; its inputs are left to the caller.
        given: Which of its inputs were variables.

    Raises:
        ValueError: A function does something else with one than read it.
    """
    _Captures(graph).take(node, given)


class _Captures:
    def __init__(self, graph: Nodes) -> None:
        self._graph = graph
        self._copies: dict[tuple, tuple[str, dict[int, Kind]]] = {}

    def take(self, node: NodeDef, given: Mapping[int, Kind]) -> dict[str, Kind]:
        """Changes a node; its outputs that are values now, as functions name them: "output:0" is the first one."""
        if node.op in ("ReadVariableOp", "Identity"):
            is_read, kind = node.op == "ReadVariableOp", given[0]
            node.op = "Identity"
            node.attr.pop("dtype", None)
            node.attr["T"].type = kind[0]
            return {} if is_read else {"output:0": kind}
        if node.op in _LOOPS:
            return self._take_loop(node, given)
        if node.op in _CONDITIONS:
            return self._take_call(node, {index - 1: kind for index, kind in given.items()})
        if node.op in _CALLS:
            return self._take_call(node, given)
        raise ValueError(
            "`source` must read its variables by ReadVariableOp or ResourceGather, in loops and conditions by "
            f"ReadVariableOp. Received: one with {node.op} {node.name!r}"
        )

    def _take_loop(self, node: NodeDef, given: Mapping[int, Kind]) -> dict[str, Kind]:
        shapes = node.attr["output_shapes"].list.shape
        for index, (dtype, shape) in given.items():
            node.attr["T"].list.type[index] = dtype
            if shapes:
                shapes[index].CopyFrom(tf.TensorShape(shape).as_proto())
        self._specialize(node, "cond", given, {})
        self._specialize(node, "body", given, given)
        return {f"output:{index}": kind for index, kind in given.items()}

    def _take_call(self, node: NodeDef, given: Mapping[int, Kind]) -> dict[str, Kind]:
        for index, (dtype, _) in given.items():
            node.attr["Tin"].list.type[index] = dtype
        for key in _BRANCHES & node.attr.keys():
            self._specialize(node, key, given, {})
        return {}

    def _specialize(self, node: NodeDef, key: str, given: Mapping[int, Kind], returned: Mapping[int, Kind]) -> None:
        """Puts copies in the place of an attribute's functions, which return values in the place of these variables."""
        value = node.attr[key]
        for function in value.list.func or [value.func]:
            used = (function.name, *sorted(given.items()))
            if used not in self._copies:
                self._copies[used] = self._copy(function.name, given)
            function.name, found = self._copies[used]
            if found != returned:
                raise ValueError(
                    "`source` must have no loops and conditions that choose between variables. Received: one with "
                    f"{node.op} {node.name!r}"
                )

    def _copy(self, name: str, given: Mapping[int, Kind]) -> tuple[str, dict[int, Kind]]:
        """A copy of a function that takes values, and which of its results are such."""
        function = FunctionDef()
        function.CopyFrom(self._graph.functions[name])
        signature = function.signature
        signature.name = unique(f"{name}_of_values", self._graph.functions)
        self._graph.functions[signature.name] = function
        values = {signature.input_arg[index].name: kind for index, kind in given.items()}
        shapes = function.attr["_input_shapes"].list.shape if "_input_shapes" in function.attr else []
        for index, (dtype, shape) in given.items():
            signature.input_arg[index].type = dtype
            signature.input_arg[index].ClearField("handle_data")
            function.arg_attr.pop(index, None)
            function.resource_arg_unique_id.pop(index, None)
            if shapes:
                shapes[index].CopyFrom(tf.TensorShape(shape).as_proto())
        self._take_in(function, values)
        results = {}
        for index, result in enumerate(signature.output_arg):
            if (kind := values.get(function.ret[result.name])) is not None:
                result.type = kind[0]
                result.ClearField("handle_data")
                results[index] = kind
        return signature.name, results

    def _take_in(self, function: FunctionDef, values: dict[str, Kind]) -> None:
        """Changes the nodes of a function that read `values`, which get what such nodes make of them."""
        nodes = {node.name: node for node in function.node_def}
        before = {name: {_node_of(tensor) for tensor in node.input} for name, node in nodes.items()}
        read = {}
        for name in TopologicalSorter(before).static_order():
            node = nodes.get(name)
            given = {} if node is None else {i: values[t] for i, t in enumerate(node.input) if t in values}
            if given:
                if node.op == "ReadVariableOp":
                    read[f"{name}:value:0"] = f"{name}:output:0"
                values |= {f"{name}:{output}": kind for output, kind in self.take(node, given).items()}
        for node in function.node_def:
            node.input[:] = [read.get(tensor, tensor) for tensor in node.input]
        for name, tensor in function.ret.items():
            function.ret[name] = read.get(tensor, tensor)


def _node_of(tensor: str) -> str:
    """The node or argument that a function's input names: "node:argument:index", "argument" or "^node"."""
    return tensor.removeprefix("^").partition(":")[0]
