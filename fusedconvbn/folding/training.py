"""Tells in a TensorFlow 1 training graph what inference returns, and which value of a switch means inference."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from fusedconvbn.folding.branches import take_branches
from fusedconvbn.folding.cleaning import bind
from fusedconvbn.folding.nodes import Nodes, attribute, node_of
from fusedconvbn.folding.shapes import Shapes

_OF_TRAINING = re.compile(
    r"Apply|Assign|Scatter|Save|Restore|Summary|CrossEntropy|Grad$|BackpropFilter|Initialized|InTopK|Queue|Iterator|"
    r"L2Loss|NoOp|Assert|Print|MergeV2|ShardedFilename|ReadFile|WriteFile"
)
_SCOPES = re.compile(
    r"(^|/)(gradients?|save|train|loss(es)?|metrics?|summar(y|ies)|init|AssignMovingAvg|ExponentialMovingAverage)(_[^/]*)?/",
    re.IGNORECASE,
)


_BY_PRODUCTS = re.compile(r"(^|/)moments(_[^/]*)?/")  # a variance, where only the mean is of use
_CHOOSES = {"Switch", "RefSwitch", "If", "StatelessIf", "Select", "SelectV2"}
_RANDOM = re.compile(r"^(Stateless)?Random|^Multinomial")


def results_of_inference(graph: Nodes) -> list[str]:
    """The tensors that depend on an input and that nothing but training reads.

    A guess by op types, shapes and scopes, good where it finds one.
    """
    training = _training_nodes(graph)
    shapes = Shapes(graph)
    fed = _depending_on_inputs(graph)
    read = {node_of(t) for n in graph.nodes.values() if n.name not in training for t in graph.inputs(n)}
    return [
        f"{name}:0" for name in fed
        if name not in training and name not in read and _has_examples(shapes.of(f"{name}:0"))
        and not graph[name].op.startswith("Placeholder") and not _BY_PRODUCTS.search(name)
    ]  # fmt: skip


def _has_examples(shape: tuple[int | None, ...] | None) -> bool:
    """Whether a tensor may have a value for each example: no scalars, and no vectors of channels."""
    return shape is None or len(shape) > 1 or (len(shape) == 1 and shape[0] is None)


def _training_nodes(graph: Nodes) -> set[str]:
    """Those of training by type or scope, what is computed from them, and scalars that only those read."""
    found: set[str] = set()
    for node in graph.topological():
        by_itself = _OF_TRAINING.search(node.op) or _SCOPES.search(f"{node.name}")
        if by_itself or any(node_of(tensor) in found for tensor in graph.inputs(node)):
            found.add(node.name)
    return found


def _depending_on_inputs(graph: Nodes) -> list[str]:
    """Nodes that are computed from numbers that are fed, by other than predicates."""
    found: dict[str, None] = {}
    for node in graph.topological():
        is_fed = node.op.startswith("Placeholder") and tf.as_dtype(attribute(node, "dtype").type).is_floating
        if is_fed or any(node_of(tensor) in found for tensor in graph.inputs(node)):
            found[node.name] = None
    return list(found)


def inference_value(graph: Nodes, switch: str, results: Sequence[str]) -> bool | None:
    """The value of a predicate that leads to fewer batch norms in training and random numbers; None if neither does.

    Args:
        graph: Stays as it is.
        switch: Name of a Placeholder of type bool.
        results: What the model returns.
    """
    signs = {value: _training_signs(graph, switch, value, results) for value in (False, True)}
    return None if signs[False] == signs[True] else signs[True] < signs[False]


def _training_signs(graph: Nodes, switch: str, value: bool, results: Sequence[str]) -> int:
    copy = graph.copy()
    copy.prune(results)
    bind(copy, {switch: np.asarray(value)})
    take_branches(copy)
    copy.prune(results)
    return sum(
        bool(_RANDOM.search(n.op)) or (n.op.startswith("FusedBatchNorm") and attribute(n, "is_training").b)
        for n in copy.nodes.values()
    )


def is_switch(graph: Nodes, name: str) -> bool:
    """Whether all that reads a predicate chooses by it: conditions and selections, and logic before them."""
    readers = graph.readers()
    pending, seen = [name], set()
    while pending:
        current = pending.pop()
        for reader, index in readers[f"{current}:0"]:
            kind = graph[reader].op
            if kind in ("Identity", "LogicalNot", "LogicalAnd", "LogicalOr", "Squeeze", "Reshape"):
                pending += [reader] if reader not in seen else []
                seen.add(reader)
            elif kind not in _CHOOSES and not (kind == "FusedConvBN" and index > 5):
                return False
    return True
