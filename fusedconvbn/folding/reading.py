"""Reads a GraphDef into the intermediate form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fusedconvbn.folding.affine_nodes import AffineNodes, Chain, scope_of
from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.linear_nodes import layout_of, read_linear
from fusedconvbn.folding.nodes import NodeDef, Nodes, attribute, node_of, output_count
from fusedconvbn.folding.ops import Affine, Commuting, Concat, Op, Pad, Reshape, Split, Sum
from fusedconvbn.folding.planning import Graph, Kept
from fusedconvbn.folding.shapes import Shapes

_AS_THEY_ARE = {"Cast", "Identity", "Snapshot", "StopGradient", "CheckNumerics"}
_AVERAGES = {"AvgPool", "AvgPool3D", "ResizeBilinear", "ResizeNearestNeighbor"}
_OF_SHAPES = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"}  # what they read may have other values
_MAXIMA = {"MaxPool", "MaxPool3D"}


@dataclass
class Reading:
    """What was read.

    Attributes:
        graph: In the intermediate form.
        chains: For each affine op, by name of the node whose output is its result, the nodes that it consists of.
        kept: Batch norms that are no affine maps.
    """

    graph: Graph
    chains: dict[str, Chain] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)


def read(graph: Nodes, results: Iterable[str], known: Mapping[str, str]) -> Reading:
    """Reads `graph`, which returns `results`; its nodes that pass their input on have been removed.

    `known` names batch norms by the node that is their first step.
    """
    return _Reader(graph, results, known).read()


class _Reader:
    def __init__(self, graph: Nodes, results: Iterable[str], known: Mapping[str, str]) -> None:
        self._graph, self._results, self._known = graph, {graph.resolve(tensor) for tensor in results}, known
        self._constants, self._shapes = Constants(graph), Shapes(graph)
        self._rules: dict[str, Callable[[NodeDef, list[str]], Op | None]] = {
            **dict.fromkeys(_AS_THEY_ARE, self._as_it_is),
            **dict.fromkeys(_AVERAGES | _MAXIMA, self._pooling),
            **dict.fromkeys(("Mean", "Max"), self._reduction),
            **dict.fromkeys(("Reshape", "Squeeze", "ExpandDims"), self._reshape),
            **dict.fromkeys(("Pad", "PadV2"), self._pad),
            **dict.fromkeys(("Concat", "ConcatV2"), self._concat),
            **dict.fromkeys(("Split", "SplitV"), self._split),
            **dict.fromkeys(("Add", "AddV2", "AddN"), self._sum),
            "MirrorPad": self._mirror,
            "SpaceToBatchND": self._space_to_batch,
            "BatchToSpaceND": self._batch_to_space,
            "StridedSlice": self._crop,
            "Transpose": self._transpose,
        }

    def read(self) -> Reading:
        chains = AffineNodes(self._graph, self._constants, self._shapes, self._results, self._known).chains()
        inner = {step.node for chain in chains for step in chain.steps[:-1]}
        ends = {chain.last: chain for chain in chains}
        nodes = [n for n in self._graph.topological() if not self._constants.is_constant(n.name)]
        self._constants.load(tensor for node in nodes for tensor in self._graph.inputs(node))
        ops = [self._affine(ends[n.name]) if n.name in ends else self._op(n) for n in nodes if n.name not in inner]
        graph = Graph(ops, set(self._results))
        return Reading(graph, ends, batch_statistics(self._graph, self._constants))

    def _affine(self, chain: Chain) -> Affine:
        kind = self._graph[chain.last].op
        name = chain.name(self._graph.origins) if chain.is_batch_norm else chain.last
        return Affine(
            name, kind, [chain.data], [f"{chain.last}:0"], chain.map, chain.axis, chain.is_batch_norm, chain.why_not
        )

    def _op(self, node: NodeDef) -> Op:
        inputs = self._graph.inputs(node)
        layout = layout_of(node)
        found = None
        if layout is not None and not self._constants.is_constant(inputs[layout.data]):
            values = self._constants.value(inputs[layout.weights])
            found = None if values is None else read_linear(node, inputs, values, self._shapes)
        elif node.op in self._rules:
            found = self._rules[node.op](node, inputs)
        if found is not None:
            return found
        read = [] if node.op in _OF_SHAPES else inputs
        variable = [tensor for tensor in read if not self._constants.is_constant(tensor)]
        return Op(node.name, node.op, variable, self._outputs(node, output_count(node) or 1))

    def _outputs(self, node: NodeDef, count: int = 1) -> list[str]:
        return [f"{node.name}:{port}" for port in range(count)]

    def _value(self, tensor: str) -> np.ndarray | None:
        return self._constants.value(tensor)

    def _axis(self, tensor: str, axis: int) -> int | None:
        """Counted from the end."""
        if axis < 0:
            return axis
        rank = self._shapes.rank(tensor)
        return None if rank is None else axis - rank

    def _as_it_is(self, node: NodeDef, inputs: list[str]) -> Op | None:
        if node.op == "Cast":
            types = [self._shapes.dtype(tensor) for tensor in (inputs[0], f"{node.name}:0")]
            if not all(dtype is not None and dtype.is_floating for dtype in types):
                return None
        return Commuting(node.name, node.op, inputs[:1], self._outputs(node))

    def _pooling(self, node: NodeDef, inputs: list[str]) -> Op | None:
        """Averages over the elements that are there, TensorFlow's SAME included, and maxima."""
        rank = 5 if node.op.endswith("3D") else 4
        axis = 1 - rank if attribute(node, "data_format").s.startswith(b"NC") else -1
        sizes = attribute(node, "ksize").list.i
        if sizes and sizes[axis] != 1:
            return None
        return Commuting(node.name, node.op, inputs[:1], self._outputs(node), {axis: axis}, node.op in _MAXIMA)

    def _reduction(self, node: NodeDef, inputs: list[str]) -> Op | None:
        rank, over = self._shapes.rank(inputs[0]), self._value(inputs[1])
        if rank is None or over is None:
            return None
        reduced = {int(axis) % rank - rank for axis in over.ravel()}
        kept = [axis for axis in range(-rank, 0) if axis not in reduced]
        after = {axis: axis if attribute(node, "keep_dims").b else i - len(kept) for i, axis in enumerate(kept)}
        return Commuting(node.name, node.op, inputs[:1], self._outputs(node), after, node.op == "Max")

    def _reshape(self, node: NodeDef, inputs: list[str]) -> Op | None:
        before, after = (self._shapes.of(tensor) for tensor in (inputs[0], f"{node.name}:0"))
        sizes = [None if not shape or len(shape) < 2 else shape[1:] for shape in (before, after)]
        if sizes[1] == (None,) and sizes[0] and None not in sizes[0]:
            # Flattened to a size that TensorFlow does not infer. If it is another one, what follows has as many
            # channels as that, and takes up no map of these.
            sizes[1] = (int(np.prod(sizes[0])),)
        whole = [None if s is None or None in s else int(np.prod(s)) for s in sizes]
        if None not in whole and whole[0] != whole[1]:  # elements of one example became another's
            sizes = [(None, s[-1]) for s in sizes]
        return Reshape(node.name, node.op, inputs[:1], self._outputs(node), *sizes)

    def _pad(self, node: NodeDef, inputs: list[str]) -> Op | None:
        pads, value = self._value(inputs[1]), 0.0
        if node.op == "PadV2":
            constant = self._value(inputs[2])
            if constant is None:
                return None
            value = float(constant)
        if pads is None:
            return None
        axes = frozenset(int(axis) - len(pads) for axis in np.flatnonzero(pads.any(axis=1)))
        return Pad(node.name, node.op, inputs[:1], self._outputs(node), axes, value)

    def _mirror(self, node: NodeDef, inputs: list[str]) -> Op | None:
        pads = self._value(inputs[1])
        if pads is None:
            return None
        axes = {axis - len(pads): axis - len(pads) for axis in range(len(pads)) if not pads[axis].any()}
        return Commuting(node.name, node.op, inputs[:1], self._outputs(node), axes)

    def _space_to_batch(self, node: NodeDef, inputs: list[str]) -> Op | None:
        """Of axes from the second on; those behind them stay as they are."""
        blocks, pads, rank = self._value(inputs[1]), self._value(inputs[2]), self._shapes.rank(inputs[0])
        if blocks is None or pads is None or rank is None:
            return None
        axes = frozenset(1 + i - rank for i in range(len(blocks)))
        return Pad(node.name, node.op, inputs[:1], self._outputs(node), axes, fixed=True, pads=bool(pads.any()))

    def _batch_to_space(self, node: NodeDef, inputs: list[str]) -> Op | None:
        blocks, rank = self._value(inputs[1]), self._shapes.rank(inputs[0])
        if blocks is None or rank is None:
            return None
        axes = {axis: axis for axis in range(1 + len(blocks) - rank, 0)}
        return Commuting(node.name, node.op, inputs[:1], self._outputs(node), axes)

    def _crop(self, node: NodeDef, inputs: list[str]) -> Op | None:
        """Slices whose last axes are whole, of a rank that stays."""
        before, after = (self._shapes.of(tensor) for tensor in (inputs[0], f"{node.name}:0"))
        bounds = [self._value(tensor) for tensor in inputs[1:]]
        if before is None or after is None or any(b is None for b in bounds) or len(before) != len(after):
            return None
        masks = [attribute(node, key).i for key in ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask")]
        if any(masks):
            return None
        whole = [a for a, (x, y) in enumerate(zip(before, after), -len(before)) if x == y and x is not None]
        forward = [a for a in whole if a + len(before) >= len(bounds[2]) or bounds[2][a + len(before)] == 1]
        return Commuting(node.name, node.op, inputs[:1], self._outputs(node), {a: a for a in forward})

    def _transpose(self, node: NodeDef, inputs: list[str]) -> Op | None:
        order = self._value(inputs[1])
        if order is None:
            return None
        rank = len(order)
        axes = {int(old) % rank - rank: new - rank for new, old in enumerate(order)}
        return Commuting(node.name, node.op, inputs[:1], self._outputs(node), axes)

    def _concat(self, node: NodeDef, inputs: list[str]) -> Op | None:
        tensors, along = (inputs[1:], inputs[0]) if node.op == "Concat" else (inputs[:-1], inputs[-1])
        axis = self._value(along)
        axis = None if axis is None else self._axis(f"{node.name}:0", int(axis))
        if axis is None or any(self._constants.is_constant(tensor) for tensor in tensors):
            return None
        sizes = [self._shapes.size(tensor, axis) for tensor in tensors]
        return Concat(node.name, node.op, tensors, self._outputs(node), axis, sizes)

    def _split(self, node: NodeDef, inputs: list[str]) -> Op | None:
        data, along = (inputs[1], inputs[0]) if node.op == "Split" else (inputs[0], inputs[2])
        axis = self._value(along)
        axis = None if axis is None else self._axis(data, int(axis))
        if axis is None:
            return None
        outputs = self._outputs(node, attribute(node, "num_split").i)
        sizes = [self._shapes.size(tensor, axis) for tensor in outputs]
        return Split(node.name, node.op, [data], outputs, axis, sizes)

    def _sum(self, node: NodeDef, inputs: list[str]) -> Op | None:
        shapes = [self._shapes.of(tensor) for tensor in inputs]
        if any(self._constants.is_constant(tensor) for tensor in inputs) or None in shapes:
            return None
        same = all(shape[1:] == shapes[0][1:] and None not in shape[1:] for shape in shapes)
        return Sum(node.name, node.op, inputs, self._outputs(node)) if same else None


def batch_statistics(graph: Nodes, constants: Constants) -> list[Kept]:
    """Batch norms that compute their statistics: a square root of what is averaged over the first axis."""
    found = []
    for node in graph.nodes.values():
        if node.op not in ("Rsqrt", "Sqrt") or constants.is_constant(node.name):
            continue
        if _averages_over_batch(graph, constants, node.name):
            scope = scope_of([node.name])
            found.append(Kept(scope, "it normalizes with the statistics of its batch, not with moving statistics"))
    return found


def _averages_over_batch(graph: Nodes, constants: Constants, name: str) -> bool:
    pending, seen = [name], set()
    while pending and len(seen) < 12:
        current = pending.pop(0)
        if current in seen or current not in graph:
            continue
        seen.add(current)
        inputs = graph.inputs(current)
        if graph[current].op == "Mean":
            axes = constants.value(inputs[1])
            return axes is not None and 0 in axes.ravel()
        pending += [node_of(tensor) for tensor in inputs if not constants.is_constant(tensor)]
    return False
