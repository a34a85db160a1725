"""Removes what inference does not need: dropout in all its spellings, nodes that pass on what they read, arithmetic of
constants."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.nodes import NodeDef, Nodes, canonical, node_of, port_of

_PASS_ON = ("Identity", "StopGradient", "CheckNumerics", "CheckNumericsV2", "PreventGradient", "Snapshot",
            "DebugGradientIdentity", "IdentityN", "ReadVariableOp")  # fmt: skip
_UNIFORM = ("RandomUniform", "StatelessRandomUniform", "StatelessRandomUniformV2")
_DECISIONS = ("Floor", "GreaterEqual", "Greater", "Less", "LessEqual")  # which make a mask of random numbers
_ARITHMETIC = ("Mul", "AddV2", "Add", "Sub", "Cast", "Identity")
_LARGEST_FOLDED = 1 << 20  # elements: a computed constant that is larger would make the file larger


def remove_dropout(graph: Nodes) -> list[str]:
    """Lets what each dropout drops from take its result's place; the names of the nodes that were the results.

    It is written as `x / keep * floor(keep + random)`, as `x * scale * cast(random >= rate)` or as
    `where(random >= rate, x * scale, 0)`.
    """
    readers = graph.readers()
    found = []
    for node in [node for node in graph.nodes.values() if node.op in _UNIFORM]:
        for name in _masked(graph, readers, node.name):
            data = _dropped_from(graph, graph.nodes[name])
            if data is not None:
                graph.replace(f"{name}:0", data)
                found.append(name)
    return found


def _masked(graph: Nodes, readers: dict[str, list[tuple[str, int]]], random: str) -> list[str]:
    """The nodes that apply the mask that is made from `random`: by a decision, and arithmetic with scalars."""
    pending, found = [(random, False)], []
    made = {random}
    while pending:
        current, decided = pending.pop()
        for name, _ in readers[f"{current}:0"]:
            node = graph.nodes[name]
            apart = [t for t in graph.inputs(node) if node_of(t) not in made and not _is_scalar(graph, t)]
            if decided and node.op in ("Mul", "Select", "SelectV2") and apart:
                found.append(name)
            elif node.op in _DECISIONS + _ARITHMETIC and name not in made and not apart:
                made.add(name)
                pending.append((name, decided or node.op in _DECISIONS))
    return found


def _is_scalar(graph: Nodes, tensor: str) -> bool:
    """Whether a tensor is a constant with one element, or computed from some."""
    names = graph.ancestors([tensor])
    if len(names) > 16:
        return False
    leaves = [graph.nodes[name] for name in names if not graph.inputs(name)]
    return all(leaf.op == "Const" and graph.value(leaf.name).size == 1 for leaf in leaves)


def _dropped_from(graph: Nodes, node: NodeDef) -> str | None:
    """What the dropout whose result `node` is drops from; None if it is no dropout."""
    tensors = graph.inputs(node)
    if node.op == "Mul":
        data = next((t for t in tensors if not _has_random(graph, t)), None)
    else:
        data = tensors[1] if _is_zero(graph, tensors[2]) else None
    if data is None or sum(_has_random(graph, tensor) for tensor in tensors) != 1:
        return None
    scaled = graph.source(data)
    if scaled is not None and scaled.op in ("Mul", "RealDiv", "Div"):
        parts = graph.inputs(scaled)
        whole = [t for t in parts if not _is_scalar(graph, t)]
        if len(whole) == 1:
            return whole[0]
    return data


def _has_random(graph: Nodes, tensor: str) -> bool:
    """Whether a tensor is a mask: made of few ops, a random one among them, of nothing but constants and shapes."""
    pending, seen = [node_of(graph.resolve(tensor))], set()
    found = False
    while pending and len(seen) < 24:
        name = pending.pop()
        if name in seen or name not in graph.nodes:
            continue
        seen.add(name)
        kind = graph.nodes[name].op
        if kind in _UNIFORM:
            found = True
        elif kind != "Shape":
            pending += [node_of(t) for t in graph.inputs(name)]
    return found and not pending


def _is_zero(graph: Nodes, tensor: str) -> bool:
    value = Constants(graph).value(tensor)
    node = graph.source(tensor)
    return (value is not None and not value.any()) or (node is not None and node.op == "ZerosLike")


def remove_identities(graph: Nodes) -> int:
    """Lets the inputs of nodes that pass them on take their place; how many there were."""
    count = 0
    for node in graph.nodes.values():
        if node.op in _PASS_ON:
            for port, tensor in enumerate(graph.inputs(node)):
                graph.replace(f"{node.name}:{port}", tensor)
            count += 1
    return count


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
