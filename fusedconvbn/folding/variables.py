"""Variables become constants with the values that a checkpoint has for them, and constants become variables again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from fusedconvbn.folding.captures import Kind, kind_of, take_values
from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.nodes import Nodes, attribute, is_float, node_of, op_def, set_attribute
from fusedconvbn.folding.writing import Frozen, Variable

_REFERENCES = ("Variable", "VariableV2", "TemporaryVariable")
_RESTORES = ("RestoreV2", "Restore", "RestoreSlice")
_ASSIGNMENTS = ("AssignVariableOp", "Assign")
_REFERENCE_READS = {"RefSwitch", "RefIdentity", "RefEnter", "IsVariableInitialized"}
_PASS_ON = {"Identity", "Enter", "Switch"}
_READS = {"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "VarIsInitializedOp", *_PASS_ON}
_CALLS = {"If", "StatelessIf", "While", "StatelessWhile", "Case", "StatelessCase", "PartitionedCall",
          "StatefulPartitionedCall"}  # fmt: skip


def is_variable(kind: str) -> bool:
    """Whether an op of that type is a variable."""
    return kind == "VarHandleOp" or kind in _REFERENCES


def keys_of(graph: Nodes) -> dict[str, tuple[str, str]]:
    """For each variable that the graph's own saver restores, its key in a checkpoint and which slice of it.

    A saver reads RestoreV2's outputs into variables by Assign or AssignVariableOp; function calls have been inlined.
    """
    constants = Constants(graph)
    restores = [node for node in graph.nodes.values() if node.op in _RESTORES]
    constants.load(tensor for node in restores for tensor in graph.inputs(node)[1:])
    found: dict[str, tuple[str, str]] = {}
    for node in graph.nodes.values():
        if node.op not in _ASSIGNMENTS:
            continue
        variable, value = graph.inputs(node)[:2]
        source = _through_identities(graph, value)
        restore = graph.nodes.get(node_of(source))
        if restore is None or restore.op not in _RESTORES:
            continue
        keys, *slices = (constants.value(tensor) for tensor in graph.inputs(restore)[1:])
        port = int(source.rpartition(":")[2])
        if keys is not None:
            part = slices[0].ravel()[port] if slices and slices[0] is not None else b""
            found[node_of(variable)] = keys.ravel()[port].decode(), part.decode()
    return found


def _through_identities(graph: Nodes, tensor: str) -> str:
    while (source := graph.source(tensor)) is not None and source.op in ("Identity", "Reshape"):
        tensor = graph.inputs(source)[0]
    return graph.resolve(tensor)


def refuse_writes(graph: Nodes, results: Iterable[str]) -> None:
    """Raises a `ValueError` if inference changes a variable that it also reads: it would be no constant."""
    read = graph.ancestors(results)
    for name in graph.ancestors(results, control=True):
        for index, tensor in enumerate(graph.inputs(name)):
            variable = node_of(tensor)
            if variable in read and is_variable(graph[variable].op) and _writes(graph, name, index):
                raise ValueError(
                    "`source` must be a model whose inference changes none of its variables, or they are no constants. "
                    f"Received: one in which {name!r} writes to {variable!r}"
                )


def _writes(graph: Nodes, name: str, index: int) -> bool:
    """Whether a node may write to the variable that is its input of that index."""
    node = graph[name]
    signature = op_def(node.op)
    if node.op in _READS | _CALLS or signature is None:
        return False
    if any(graph[node_of(tensor)].op == "VarHandleOp" for tensor in graph.inputs(node)[index : index + 1]):
        return True
    return index < len(signature.input_arg) and signature.input_arg[index].is_ref and node.op not in _REFERENCE_READS


def freeze(graph: Nodes, results: Sequence[str], prefix: str, keys: dict[str, tuple[str, str]]) -> dict[str, Variable]:
    """Puts constants in the place of the variables that `results` need.

    Args:
        graph: Its calls inlined; changed.
        results: What the model returns.
        prefix: Of the checkpoint with the values.
        keys: Of `keys_of`; a variable that is not among them is looked for by its name.

    Returns: The variables by the name of their constants.

    Raises:
        ValueError: The checkpoint is damaged, or lacks a variable.
    """
    needed = graph.ancestors(results)
    names = [name for name in needed if is_variable(graph[name].op)]
    if not names:
        return {}
    values = _Values(prefix, keys)
    found: dict[str, Variable] = {}
    for name in names:
        node = graph[name]
        resource = node.op == "VarHandleOp"
        shared = attribute(node, "shared_name").s.decode()
        graph.set_value(name, values.of(name, shared))
        found[name] = Variable(name, resource)
    kinds = {name: kind_of(graph.value(name)) for name, variable in found.items() if variable.resource}
    for node in graph.topological():
        if node.op in _PASS_ON and node_of(graph.inputs(node)[0]) in kinds:
            kinds[node.name] = kinds[node_of(graph.inputs(node)[0])]
            set_attribute(node, "T", tf.as_dtype(kinds[node.name][0]))
    readers = [n for n in needed if n not in kinds and any(node_of(t) in kinds for t in graph.inputs(n))]
    for name in readers:
        _read_constant(graph, name, kinds)
    return found


def _read_constant(graph: Nodes, name: str, kinds: Mapping[str, Kind]) -> None:
    """Lets a node that reads a resource read a value; `kinds`: what nodes that were resources are now."""
    node = graph[name]
    inputs = graph.inputs(node)
    if node.op == "ReadVariableOp":
        graph.replace(f"{name}:0", inputs[0])
    elif node.op == "ResourceGather" and not attribute(node, "batch_dims").i:
        gathered = graph.add("GatherV2", f"{name}/gather", [*inputs, graph.add_constant(f"{name}/axis", np.int32(0))])
        types = {"Tparams": attribute(node, "dtype"), "Tindices": attribute(node, "Tindices"), "Taxis": tf.int32}
        for key, value in types.items():
            set_attribute(gathered, key, value)
        graph.replace(f"{name}:0", f"{gathered.name}:0")
    else:
        given = {i: kinds[node_of(t)] for i, t in enumerate(inputs) if node_of(t) in kinds}
        take_values(graph, node, given)


class _Values:
    """The tensors of a checkpoint."""

    def __init__(self, prefix: str, keys: dict[str, tuple[str, str]]) -> None:
        self._prefix, self._keys = prefix, keys
        try:
            self._reader = tf.compat.v1.train.NewCheckpointReader(prefix)
        except (ValueError, tf.errors.OpError, RuntimeError) as error:
            raise ValueError(f"`source` must come with its checkpoint. Received: {prefix!r} ({error})") from error
        self._present = self._reader.get_variable_to_shape_map()

    def of(self, name: str, shared: str) -> np.ndarray:
        key, part = self._keys.get(name, ("", ""))
        key = next((k for k in (key, name, shared) if k in self._present), None)
        if key is None:
            wanted = self._keys.get(name, (name, ""))[0]
            raise ValueError(
                f"`source` must have a value for each variable that inference reads. Received: {self._prefix!r}, which "
                f"lacks {wanted!r}"
            )
        try:
            value = self._reader.get_tensor(key)
        except (ValueError, IndexError, tf.errors.OpError, RuntimeError) as error:
            raise ValueError(f"`source` must be a whole checkpoint. Received: {self._prefix!r} ({error})") from error
        return value[_slice(part)] if part else value


def _slice(written: str) -> tuple[slice, ...]:
    """Of a partition, "full shape, then start,length for each axis": `"10 4 0,5:0,4"`; "-" is a whole axis."""
    axes = written.split()[-1].split(":")
    return tuple(slice(None) if a == "-" else slice(int(a.split(",")[0]), sum(map(int, a.split(",")))) for a in axes)


def weights_of(frozen: Frozen) -> dict[str, Variable]:
    """The constants of a graph without variables that would be some: numbers with axes."""
    nodes = [node for node in frozen.graph.nodes.values() if node.op == "Const"]
    is_weight = lambda value: is_float(value.dtype) and value.ndim > 0  # noqa: E731
    return {node.name: Variable(node.name, True) for node in nodes if is_weight(frozen.graph.value(node.name))}


def with_variables(frozen: Frozen) -> tf.compat.v1.Session:
    """A session that has, in a graph where constants that were variables are variables again, their values.

    Each variable is called as its constant is. They are made in a graph of their own, which the nodes join as protos:
    to import nodes beside them would rename those whose names begin as a variable's does.
    """
    values = {name: frozen.graph.value(name) for name in frozen.variables if name in frozen.graph}
    with tf.Graph().as_default() as apart:
        variables = {name: _variable(name, value, frozen.variables[name].resource) for name, value in values.items()}
        free = frozen.graph.unique  # a read that were called as a node is, such as "Identity", would take its place
        reads = {name: tf.identity(v, free(f"{name}/value")).name for name, v in variables.items()}
        meta = tf.compat.v1.train.export_meta_graph(graph=apart)
    graph = frozen.graph.copy()
    _make_room(graph, {node.name for node in meta.graph_def.node}, values.keys())
    for name, read in reads.items():
        graph.replace(f"{name}:0", read)
    meta.graph_def.MergeFrom(graph.graph_def(graph.nodes.keys() - values.keys()))
    with tf.Graph().as_default() as made:
        tf.compat.v1.train.import_meta_graph(meta)
        session = tf.compat.v1.Session(graph=made)
        initial = {variable.initializer.inputs[1].name: values[name] for name, variable in variables.items()}
        session.run([variable.initializer.name for variable in variables.values()], initial)
    return session


def _variable(name: str, value: np.ndarray, resource: bool) -> tf.Variable:
    initial = tf.compat.v1.zeros(value.shape, tf.as_dtype(value.dtype))
    return tf.compat.v1.Variable(initial, name=name, use_resource=resource)


def _make_room(graph: Nodes, taken: set[str], apart: Iterable[str]) -> None:
    """Gives other names to the nodes of `graph` whose names are taken, of which none is a result's."""
    for name in (taken & graph.nodes.keys()) - set(apart):
        new = f"{name}_inner"
        while new in taken or new in graph:
            new += "_inner"
        graph.rename(name, new)
