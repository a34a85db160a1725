"""Removes nodes that pass on what they read, and arithmetic of constants."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.nodes import Nodes, canonical, node_of, port_of

_PASS_ON = ("Identity", "StopGradient", "CheckNumerics", "CheckNumericsV2", "PreventGradient", "Snapshot",
            "DebugGradientIdentity", "IdentityN")  # fmt: skip
_LARGEST_FOLDED = 1 << 20  # elements: a computed constant that is larger would make the file larger


def remove_identities(graph: Nodes) -> None:
    """Lets the inputs of nodes that pass them on take their place."""
    pivots = graph.pivots()
    for node in graph.nodes.values():
        if node.op in _PASS_ON and node.name not in pivots:
            for port, tensor in enumerate(graph.inputs(node)):
                graph.replace(f"{node.name}:{port}", tensor)


def fold_constants(graph: Nodes, results: Iterable[str], *, apart: set[str]) -> int:
    """Makes constants of what is computed from constants, but for nodes in `apart`; how many nodes that saves.

    A name of a result stays.
    """
    constants = Constants(graph)
    kept = {node_of(graph.resolve(t)) for t in results}
    before = len(graph.nodes)
    frontier = {
        tensor
        for node in graph.nodes.values()
        if node.name in apart or not constants.is_constant(node.name)
        for tensor in graph.inputs(node)
        if _is_computed(graph, constants, tensor) and node_of(tensor) not in apart | kept
    }
    constants.load(frontier)
    for tensor in sorted(frontier):
        value = constants.value(tensor)
        if value.size <= _LARGEST_FOLDED and value.dtype != object:
            graph.replace(tensor, graph.add_constant(f"{node_of(tensor)}/folded", value))
    graph.prune([*results, *(f"{name}:0" for name in apart & graph.nodes.keys())])
    return before - len(graph.nodes)


def _is_computed(graph: Nodes, constants: Constants, tensor: str) -> bool:
    return graph.nodes[node_of(tensor)].op != "Const" and constants.is_constant(tensor)


def bind(graph: Nodes, values: dict[str, np.ndarray]) -> None:
    """Puts constants in the place of tensors."""
    for tensor, value in values.items():
        name = node_of(canonical(tensor))
        graph.replace(f"{name}:{port_of(tensor)}", graph.add_constant(f"{name}/bound", value))
