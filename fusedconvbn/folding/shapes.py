"""The static shapes and types of a graph's tensors, as TensorFlow infers them."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from fusedconvbn.folding.nodes import Nodes, node_of, op_def, port_of


class Shapes:
    """Of a graph as it is now. Where an op type is not registered, nothing is known of what depends on it."""

    def __init__(self, graph: Nodes) -> None:
        self._graph = graph
        known = _runnable(graph)
        with tf.Graph().as_default() as self._made:
            tf.import_graph_def(graph.graph_def(known, with_values=False), name="")
        self._known = known

    def of(self, tensor: str) -> tuple[int | None, ...] | None:
        """The sizes, None where unknown; None for a tensor of unknown rank."""
        found = self._tensor(tensor)
        return None if found is None or found.shape.rank is None else tuple(found.shape.as_list())

    def rank(self, tensor: str) -> int | None:
        """The number of axes."""
        shape = self.of(tensor)
        return None if shape is None else len(shape)

    def size(self, tensor: str, axis: int) -> int | None:
        """Along one axis."""
        shape = self.of(tensor)
        return None if shape is None or not -len(shape) <= axis < len(shape) else shape[axis]

    def dtype(self, tensor: str) -> tf.DType | None:
        """The type of the elements."""
        found = self._tensor(tensor)
        return None if found is None else found.dtype

    def _tensor(self, tensor: str) -> tf.Tensor | None:
        tensor = self._graph.resolve(tensor)
        if node_of(tensor) not in self._known:
            return None
        return self._made.get_operation_by_name(node_of(tensor)).outputs[port_of(tensor)]


def _runnable(graph: Nodes) -> set[str]:
    """The nodes that do not depend on an op type that TensorFlow does not know."""
    foreign = {node.name for node in graph.nodes.values() if op_def(node.op) is None and node.op not in graph.functions}
    known: set[str] = set()
    for node in graph.topological():
        above = (node_of(tensor) for tensor in graph.inputs(node))
        if node.name not in foreign and all(name not in foreign for name in above):
            known.add(node.name)
        else:
            foreign.add(node.name)
    return known


def with_input_shapes(graph: Nodes, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Gives Placeholder nodes the shapes that the user says they have."""
    for tensor, shape in shapes.items():
        node = graph[node_of(tensor)]
        node.attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())
