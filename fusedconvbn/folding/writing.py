"""Writes what folding changed in the intermediate form back into the GraphDef that it was read from."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from fusedconvbn.folding.constants import evaluate
from fusedconvbn.folding.linear_nodes import layout_of
from fusedconvbn.folding.nodes import (
    NodeDef,
    Nodes,
    attribute,
    canonical,
    node_of,
    output_count,
    port_of,
    set_attribute,
)
from fusedconvbn.folding.ops import Affine, Linear, Op, Pad
from fusedconvbn.folding.reading import Reading
from fusedconvbn.folding.shapes import Shapes


@dataclass(frozen=True)
class Variable:
    """What a constant of a frozen graph was before.

    Attributes:
        name: Of its node.
        resource: Whether it is a resource variable; else a reference variable of TensorFlow 1.
    """

    name: str
    resource: bool


@dataclass
class Frozen:
    """A graph whose variables are constants.

    Attributes:
        graph: The nodes.
        results: The names of the tensors that the model returns.
        variables: The constants that were variables, by name of their nodes.
        inputs: The tensors that the model is fed.
    """

    graph: Nodes
    results: list[str]
    variables: dict[str, Variable] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)


def write(frozen: Frozen, reading: Reading) -> None:
    """Applies the changes of `reading.graph` to `frozen`."""
    writer = _Writer(frozen, reading)
    writer.replace_weights([op for op in reading.graph.ops if isinstance(op, Linear) and op.changed])
    for op in reading.graph.ops:
        writer.write(op)


class _Writer:
    def __init__(self, frozen: Frozen, reading: Reading) -> None:
        self._frozen, self._graph, self._chains = frozen, frozen.graph, reading.chains
        self._grouped = {op.name for op in reading.graph.ops if isinstance(op, Linear) and op.weights.groups > 1}
        self._parameters: dict[tuple[Any, ...], str] = {}

    def write(self, op: Op) -> None:
        if isinstance(op, Affine) and op.removed:
            self._graph.replace(op.outputs[0], self._chains[node_of(op.outputs[0])].data)
        elif isinstance(op, Affine) and op.changed:
            self._replace_chain(op)
        elif isinstance(op, Pad) and op.changed:
            self._set_padding(op)

    def replace_weights(self, ops: list[Linear]) -> None:
        """Gives ops their weights, in the constant that they come from where nothing else reads that."""
        readers = self._graph.readers()
        results = {self._graph.resolve(name) for name in self._frozen.results}
        made: dict[str, list[tuple[Linear, np.ndarray]]] = defaultdict(list)
        for op in ops:
            made[self._weights_of(op)].append((op, self._stored(op)))
        for tensor, group in made.items():
            values = group[0][1]
            alone = {name for name, _ in readers[tensor]} == {op.name for op, _ in group} and tensor not in results
            alike = all(np.array_equal(values, other, equal_nan=True) for _, other in group[1:])
            is_variable = self._is_variable(tensor)
            if alone and alike and self._graph.source(tensor).op == "Const":
                self._graph.set_value(node_of(tensor), values)
            else:
                for op, own in group:
                    weights = self._share(f"{op.name}/folded_weights", own, is_variable)
                    self._graph.set_input(self._graph[op.name], layout_of(self._graph[op.name]).weights, weights)
            for op, own in group:
                self._finish_linear(op, own.dtype, is_variable)

    def _weights_of(self, op: Linear) -> str:
        node = self._graph[op.name]
        return self._graph.inputs(node)[layout_of(node).weights]

    def _stored(self, op: Linear) -> np.ndarray:
        """The weights as the node wants them."""
        like = self._constant(self._weights_of(op))
        return layout_of(self._graph[op.name]).stored(op.weights.values, like.shape).astype(like.dtype)

    def _finish_linear(self, op: Linear, dtype: np.dtype, is_variable: bool) -> None:
        if op.weights.bias is not None:
            self._add_bias(op, op.weights.bias.astype(dtype), is_variable)
        if op.pad_value:
            self._pad_explicitly(op, dtype)

    def _share(self, name: str, values: np.ndarray, is_variable: bool) -> str:
        """A new parameter, or the one that is its like: signatures may hold the same layer several times."""
        key = (values.shape, values.dtype.name, hashlib.sha256(values.tobytes()).digest())
        if key not in self._parameters:
            self._parameters[key] = self._add_parameter(name, values, is_variable)
        return self._parameters[key]

    def _constant(self, tensor: str) -> np.ndarray:
        """The type and shape of a constant that has been read."""
        source = self._graph.source(tensor)
        if source.op == "Const":
            return self._graph.value(source.name)
        return evaluate(self._graph, [tensor])[0]

    def _is_variable(self, tensor: str) -> bool:
        return any(name in self._frozen.variables for name in self._graph.ancestors([tensor]))

    def _add_parameter(self, name: str, values: np.ndarray, is_variable: bool) -> str:
        """A new constant, which is a variable where what it comes from is one."""
        tensor = self._graph.add_constant(name, values)
        if is_variable:
            resource = all(variable.resource for variable in self._frozen.variables.values())
            self._frozen.variables[node_of(tensor)] = Variable(node_of(tensor), resource)
        return tensor

    def _add_bias(self, op: Linear, bias: np.ndarray, is_variable: bool) -> None:
        added = self._bias_node(op.name, op.axis, bias, is_variable, self._graph[op.name])
        self._graph.set_input(added, 0, op.outputs[0])
        self._graph.replace(op.outputs[0], f"{added.name}:0")

    def _bias_node(self, name: str, axis: int, bias: np.ndarray, is_variable: bool, source: NodeDef | None) -> NodeDef:
        """A node that adds `bias` to what `source` computes, its first input still to be set.

        BiasAdd is what TensorFlow fuses with the convolution before it; it fuses those of groups too, which its kernel
        then refuses.
        """
        channels_first = source is not None and attribute(source, "data_format").s.startswith(b"NC")
        grouped = source is not None and source.name in self._grouped
        if bias.size > 1 and not grouped and (axis == -1 or channels_first):
            tensor = self._share(f"{name}/folded_bias", bias, is_variable)
            layout = {"data_format": "NCHW" if channels_first and axis < -1 else "NHWC"}
            kind = "BiasAdd"
        else:
            tensor = self._share(f"{name}/folded_bias", self._along(axis, bias), is_variable)
            kind, layout = "AddV2", {}
        dtype = tf.as_dtype(bias.dtype)
        return self._graph.add(kind, f"{name}/BiasAdd", ["", tensor], T=dtype, **layout)

    def _pad_explicitly(self, op: Linear, dtype: np.dtype) -> None:
        """Pads with another value than zero before an op that pads no more."""
        node = self._graph[op.name]
        space = [tuple(pad) for pad in op.pads]
        pads = [(0, 0), *space, (0, 0)] if op.axis == -1 else [(0, 0), (0, 0), *space]
        paddings = self._graph.add_constant(f"{op.name}/paddings", np.asarray(pads, np.int32))
        value = self._graph.add_constant(f"{op.name}/pad_value", np.asarray(op.pad_value, dtype))
        padded = self._graph.add(
            "PadV2", f"{op.name}/PadV2", [node.input[0], paddings, value], T=attribute(node, "T"), Tpaddings=tf.int32
        )
        set_attribute(node, "padding", "VALID")
        node.attr.pop("explicit_paddings", None)
        self._graph.set_input(node, 0, f"{padded.name}:0")

    def _set_padding(self, op: Pad) -> None:
        node = self._graph[op.name]
        dtype = tf.as_dtype(attribute(node, "T").type).as_numpy_dtype
        value = self._graph.add_constant(f"{op.name}/value", np.asarray(op.value, dtype))
        del node.input[2:]
        node.op = "PadV2"
        node.input.append(value)

    def _replace_chain(self, op: Affine) -> None:
        """A bias or a scaling with other numbers; its constants become new ones."""
        chain = self._chains[node_of(op.outputs[0])]
        last = self._graph[chain.last]
        dtype = tf.as_dtype(attribute(last, "T").type).as_numpy_dtype
        is_variable = any(
            self._is_variable(tensor) for step in chain.steps for tensor in self._graph.inputs(step.node)
            if tensor != step.data
        )  # fmt: skip
        tensor = chain.data
        if not op.is_bias:
            scale = self._share(
                f"{op.name}/folded_scale", self._along(op.axis, op.map.scale.astype(dtype)), is_variable
            )
            tensor = f"{self._graph.add('Mul', f'{op.name}/scaled', [tensor, scale], T=attribute(last, 'T')).name}:0"
        source = self._graph.source(chain.data)
        shifted = self._bias_node(op.name, op.axis, op.map.shift.astype(dtype), is_variable, source)
        self._graph.set_input(shifted, 0, tensor)
        self._graph.replace(op.outputs[0], f"{shifted.name}:0")

    def _along(self, axis: int, vector: np.ndarray) -> np.ndarray:
        """`vector` with the axes of size 1 behind it that broadcasting wants."""
        return vector.reshape(-1, *[1] * (-1 - axis))


def finish(frozen: Frozen, told: set[str]) -> None:
    """Drops what is not needed and gives each result the name that it had.

    The node that computes it gets its name, unless it is one of those that are `told` of by their own, or has another
    result's. Then the result is passed on by an Identity of its name; several results of one node by an IdentityN.
    """
    graph = frozen.graph
    graph.prune([*frozen.results, *frozen.inputs])
    names = [canonical(name) for name in frozen.results]
    kept = {*told, *frozen.inputs, *frozen.variables, *(node_of(name) for name in names if graph.resolve(name) == name)}
    several = {node for node, count in Counter(map(node_of, names)).items() if count > 1}
    for name in names:
        now = graph.resolve(name)
        source = node_of(now)
        is_free = node_of(name) not in graph and node_of(name) not in several and port_of(name) == 0
        if now != name and is_free and source not in kept and output_count(graph[source]) == 1:
            graph.rename(source, node_of(name))
            kept.add(node_of(name))
    current = {name: graph.resolve(name) for name in names}
    moved = {name: now for name, now in current.items() if name != now}
    dtypes = Shapes(graph) if moved else None
    for node in dict.fromkeys(map(node_of, moved)):
        _pass_on(graph, node, {name: now for name, now in current.items() if node_of(name) == node}, dtypes)
    frozen.results = names


def _pass_on(graph: Nodes, name: str, wanted: dict[str, str], dtypes: Shapes) -> None:
    count = max(port_of(tensor) for tensor in wanted) + 1
    some = next(iter(wanted.values()))
    tensors = [wanted.get(f"{name}:{port}", some) for port in range(count)]
    types = tf.compat.v1.AttrValue()
    if count == 1:
        types.type = dtypes.dtype(tensors[0]).as_datatype_enum
    else:
        types.list.type.extend(dtypes.dtype(tensor).as_datatype_enum for tensor in tensors)
    graph.define("Identity" if count == 1 else "IdentityN", name, tensors, T=types)
