"""Which tensors of a graph are constant, and their values, which TensorFlow itself computes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from fusedconvbn.folding.nodes import Nodes, canonical, node_of, op_def

# Not stateful by their definition, yet no functions of their inputs alone.
_NOT_FUNCTIONS = {
    "Placeholder", "PlaceholderV2", "PlaceholderWithDefault", "Switch", "Merge", "RefSwitch", "RefMerge", "Enter",
    "Exit", "NextIteration", "RefEnter", "RefExit", "RefNextIteration", "LoopCond", "NoOp", "ControlTrigger",
    "Variable", "VariableV2",
}  # fmt: skip

_NO_ARRAYS = (tf.variant.as_datatype_enum, tf.resource.as_datatype_enum)


class Constants:
    """Of one graph, which may change as long as no constant does."""

    def __init__(self, graph: Nodes) -> None:
        self._graph = graph
        self._known: dict[str, bool] = {}
        self._values: dict[str, np.ndarray] = {}

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is computed from constants alone."""
        pending = [node_of(self._graph.resolve(tensor))]
        while pending:
            name = pending[-1]
            if name in self._known:
                pending.pop()
                continue
            node = self._graph.nodes.get(name)
            if node is None or not _is_function(node.op) or self._graph.control(node):
                self._known[name] = False
                continue
            below = [node_of(t) for t in self._graph.inputs(node)]
            unknown = [n for n in below if n not in self._known]
            if unknown:
                pending += unknown
            else:
                self._known[name] = all(self._known[n] for n in below) and (bool(below) or node.op == "Const")
        return self._known[node_of(self._graph.resolve(tensor))]

    def load(self, tensors: Iterable[str]) -> None:
        """Computes the constants among `tensors`, in one run."""
        wanted = {self._graph.resolve(tensor) for tensor in tensors}
        wanted = [t for t in wanted if t not in self._values and self.is_constant(t)]
        direct = [t for t in wanted if self._graph.nodes[node_of(t)].op == "Const"]
        for tensor in direct:
            self._values[tensor] = self._graph.value(node_of(tensor))
        computed = sorted(set(wanted) - set(direct))
        if computed:
            self._values.update(zip(computed, evaluate(self._graph, computed)))

    def value(self, tensor: str) -> np.ndarray | None:
        """Of a constant; None of anything else."""
        tensor = self._graph.resolve(tensor)
        if tensor not in self._values:
            if not self.is_constant(tensor):
                return None
            self.load([tensor])
        return self._values[tensor]


def evaluate(graph: Nodes, tensors: Iterable[str]) -> list[np.ndarray]:
    """The values of constant tensors."""
    tensors = [canonical(tensor) for tensor in tensors]
    needed = graph.ancestors(tensors)
    with tf.Graph().as_default() as made:
        tf.import_graph_def(graph.graph_def(needed, with_values=False), name="")
        with tf.compat.v1.Session(graph=made) as session:
            return session.run(tensors, graph.feeds(needed))


def _is_function(kind: str) -> bool:
    """Whether an op of that type is a function of its inputs, which returns arrays."""
    signature = op_def(kind)
    if signature is None or signature.is_stateful or kind in _NOT_FUNCTIONS:
        return False
    return all(output.type not in _NO_ARRAYS for output in signature.output_arg)
