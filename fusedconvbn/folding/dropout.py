"""Removes dropout in all its spellings: `x * scale` where a random number decides to keep it, else 0, scale * keep = 1.

`x / keep * floor(keep + random)`, `x * scale * cast(random >= rate)`, `where(random >= rate, x * scale, 0)`, the scale
before or behind. What is random otherwise, or scaled otherwise, is the model's own and stays.
"""

from __future__ import annotations

from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.nodes import NodeDef, Nodes, node_of

_UNIFORM = ("RandomUniform", "StatelessRandomUniform", "StatelessRandomUniformV2")
_APPLIES = ("Mul", "Select", "SelectV2")


def remove_dropout(graph: Nodes) -> list[str]:
    """Lets what each dropout drops from take its result's place; the names of the nodes that were the results."""
    if not any(node.op in _UNIFORM for node in graph.nodes.values()):
        return []
    search = _Search(graph)
    return [node.name for node in graph.topological() if node.op in _APPLIES and search.remove(node)]


class _Search:
    """Of the dropouts of one graph."""

    def __init__(self, graph: Nodes) -> None:
        self._graph, self._constants = graph, Constants(graph)
        self._readers = graph.readers()

    def remove(self, node: NodeDef) -> bool:
        """Whether `node` applied the mask of a dropout, and does no more."""
        tensors = self._graph.inputs(node)
        if node.op == "Mul":
            pairs = [(tensors[0], tensors[1]), (tensors[1], tensors[0])]
        else:
            pairs = [(tensors[1], tensors[0])] if self._is_zero(tensors[2]) else []
        for data, mask in pairs:
            keep = self._kept_part(mask)
            if keep is not None:
                return self._replace(node, data, keep)
        return False

    def _replace(self, node: NodeDef, data: str, keep: float) -> bool:
        """Finds the scale that makes up for what is dropped; without it there is nothing to be removed."""
        inner, scale = self._scaled(data)
        if abs(scale * keep - 1) < 1e-3:
            self._graph.replace(f"{node.name}:0", inner)
            return True
        if keep == 1:
            self._graph.replace(f"{node.name}:0", data)
            return True
        readers = self._readers[f"{node.name}:0"]
        outer = readers[0][0] if len(readers) == 1 else None
        if outer is not None and abs(self._factor(outer, f"{node.name}:0") * keep - 1) < 1e-3:
            self._graph.replace(f"{outer}:0", data)
            return True
        return False

    def _scaled(self, tensor: str) -> tuple[str, float]:
        """What a tensor is a multiple of, and which."""
        source = self._graph.source(tensor)
        for inner in [] if source is None else self._graph.inputs(source):
            factor = self._factor(source.name, inner)
            if factor:
                return inner, factor
        return tensor, 1.0

    def _factor(self, name: str, tensor: str) -> float:
        """What a node multiplies `tensor` by, if that is one number; else 0."""
        node = self._graph[name]
        inputs = self._graph.inputs(node)
        if node.op not in ("Mul", "RealDiv", "Div") or tensor not in inputs:
            return 0.0
        index = inputs.index(tensor)
        number = self._scalar(inputs[1 - index])
        if number is None or not number or (node.op != "Mul" and index == 1):
            return 0.0
        return number if node.op == "Mul" else 1 / number

    def _kept_part(self, mask: str) -> float | None:
        """How much a mask of 0 and 1 keeps; None if it is none."""
        node = self._graph.source(mask)
        while node is not None and node.op in ("Cast", "Identity"):
            node = self._graph.source(self._graph.inputs(node)[0])
        if node is None or node.op not in ("Floor", "GreaterEqual", "Greater", "Less", "LessEqual"):
            return None
        inputs = self._graph.inputs(node)
        if node.op == "Floor":
            added = self._graph.source(inputs[0])
            if added is None or added.op not in ("Add", "AddV2"):
                return None
            return self._other_than_uniform(self._graph.inputs(added))
        threshold = self._other_than_uniform(inputs)
        if threshold is None:
            return None
        above = node.op.startswith("Greater") == self._is_uniform(inputs[0])
        return 1 - threshold if above else threshold

    def _other_than_uniform(self, tensors: list[str]) -> float | None:
        """Of a random number from 0 to 1 and another one, the latter."""
        others = [tensor for tensor in tensors if not self._is_uniform(tensor)]
        return self._scalar(others[0]) if len(tensors) == 2 and len(others) == 1 else None

    def _is_uniform(self, tensor: str) -> bool:
        """Whether a tensor holds random numbers from 0 to 1, `random * (1 - 0) + 0` too."""
        node = self._graph.source(tensor)
        if node is None or node.op in _UNIFORM:
            return node is not None
        if node.op not in ("Mul", "Add", "AddV2"):
            return False
        inputs = self._graph.inputs(node)
        neutral = 1.0 if node.op == "Mul" else 0.0
        return any(self._is_uniform(a) and self._scalar(b) == neutral for a, b in (inputs, inputs[::-1]))

    def _scalar(self, tensor: str) -> float | None:
        value = self._constants.value(tensor)
        return float(value.reshape(())) if value is not None and value.size == 1 and value.dtype != object else None

    def _is_zero(self, tensor: str) -> bool:
        value = self._constants.value(tensor)
        node = self._graph.nodes[node_of(self._graph.resolve(tensor))]
        return (value is not None and value.dtype != object and not value.any()) or node.op == "ZerosLike"
