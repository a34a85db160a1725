"""Finds the batch norms of a graph: in one node, or spread over the multiplications and additions that it consists of.

An elementwise op with a constant is an affine map; a chain of those, each read by the next alone, is one too, however
it was written: `x * inv + (beta - mean * inv)`, `(x - mean) / sqrt(var + eps) * gamma + beta`, a normalization and a
scale in two layers. A chain is a batch norm if one of its constants is computed through a square root of a vector, or
if it multiplies and adds vectors, which is what is left of one whose constants have been folded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fusedconvbn.folding.affine import AffineMap, Blocked
from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.nodes import NodeDef, Nodes, attribute, is_float, node_of
from fusedconvbn.folding.shapes import Shapes

_ELEMENTWISE = {"Mul", "Add", "AddV2", "Sub", "RealDiv", "Div", "BiasAdd", "BiasAddV1"}
_FUSED = {"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3", "BatchNormWithGlobalNormalization"}
_ROOTS = {"Rsqrt", "Sqrt", "Pow"}


@dataclass
class Step:
    """One node of a chain: what it makes of which tensor.

    Attributes:
        node: Its name.
        data: The tensor that it maps.
        map: What it makes of it; None if that is not constant.
        axis: Of the channels.
        roots: The nodes that take the square roots which its constant is computed from.
        fused: The name of the batch norm that it is by itself, or the first step of; None if it is none.
        why_not: Why it cannot fold.
        only_adds: Whether it is an addition, such as of a bias.
    """

    node: str
    data: str
    map: AffineMap | None
    axis: int = -1
    roots: frozenset[str] = frozenset()
    fused: str | None = None
    why_not: str | None = None
    only_adds: bool = False


@dataclass
class Chain:
    """Steps, each of which is read by the next one alone.

    Attributes:
        is_half: Whether it only shifts what another chain scales, for one batch norm.
    """

    steps: list[Step] = field(default_factory=list)
    is_half: bool = False

    @property
    def data(self) -> str:
        """The tensor that it maps."""
        return self.steps[0].data

    @property
    def last(self) -> str:
        """The node whose output is its result."""
        return self.steps[-1].node

    @property
    def axis(self) -> int:
        """Of the channels."""
        return next((step.axis for step in self.steps if step.map is not None and step.map.channels > 1), -1)

    @property
    def map(self) -> AffineMap | None:
        """What the whole computes."""
        whole = AffineMap.of()
        for step in self.steps:
            if step.map is None:
                return None
            whole = step.map.after(whole)
        return whole

    @property
    def roots(self) -> frozenset[str]:
        """Of all its steps."""
        return frozenset().union(*(step.roots for step in self.steps))

    @property
    def is_batch_norm(self) -> bool:
        """See the module."""
        if self.is_half:
            return False
        if any(step.fused or step.roots for step in self.steps):
            return True
        vectors = [step for step in self.steps if step.map is not None and step.map.channels > 1]
        multiplies = any(not (step.map.scale == 1).all() for step in vectors)
        return multiplies and any(step.only_adds for step in vectors)

    @property
    def why_not(self) -> str | None:
        """Why it cannot fold."""
        told = next((step.why_not for step in self.steps if step.why_not), None)
        if told is None and self.map is not None and not self.map.is_finite:
            return "its parameters are not all finite"
        return told

    @property
    def fused(self) -> str | None:
        """The node that is a batch norm by itself, if there is one."""
        return next((step.fused for step in self.steps if step.fused), None)

    def identity(self, origins: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
        """What tells it from others: a function, and the name of a node there."""
        name = self.fused or self.last
        return origins.get(name, ("", name))

    def name(self, origins: Mapping[str, tuple[str, str]]) -> str:
        """Of the node that is a batch norm by itself, or of the scope that the others share.

        Nodes that come from functions are called as they are there.
        """
        if self.fused:
            return self.identity(origins)[1]
        names = [step.node for step in self.steps if step.roots] or [step.node for step in self.steps]
        return scope_of([origins.get(name, ("", name))[1] for name in names])


def scope_of(names: list[str]) -> str:
    """The scope that nodes share, without the one that `tf.nn.batch_normalization` opens in it."""
    shared = os.path.commonprefix([name.split("/")[:-1] for name in names])
    outer = [*shared]
    while outer and outer[-1].startswith("batchnorm"):
        outer.pop()
    return "/".join(outer or shared) or names[-1]


class AffineNodes:
    """The chains of a graph, whose nodes that pass their input on have been removed."""

    def __init__(
        self, graph: Nodes, constants: Constants, shapes: Shapes, results: set[str], known: Mapping[str, str]
    ) -> None:
        """`known` names batch norms by the node that is their first step."""
        self._graph, self._constants, self._shapes, self._results = graph, constants, shapes, results
        self._known = known
        self._readers = graph.readers()

    def chains(self) -> list[Chain]:
        """In topological order."""
        nodes = [node for node in self._graph.topological() if node.op in _ELEMENTWISE | _FUSED]
        self._constants.load(tensor for node in nodes for tensor in self._graph.inputs(node))
        ends: dict[str, Chain] = {}
        found: list[Chain] = []
        for node in nodes:
            step = self._step(node)
            if step is None:
                continue
            chain = ends.pop(step.data, None) if self._is_read_once(step.data) else None
            if chain is None or not self._continues(chain, step):
                chain = Chain()
                found.append(chain)
            chain.steps.append(step)
            ends[f"{node.name}:0"] = chain
        self._join_halves(found)
        return found

    def _join_halves(self, chains: list[Chain]) -> None:
        """Finds batch norms whose statistics are not constant: of `x * inv + (beta - mean * inv)` both halves vary."""
        by_result = {f"{chain.last}:0": chain for chain in chains if chain.roots}
        for tensor, chain in by_result.items():
            for name, index in self._readers[tensor]:
                inputs = self._graph.inputs(name)
                other = by_result.get(inputs[1 - index]) if len(inputs) == 2 else None
                if other is not None and other is not chain and self._are_halves(chain, other):
                    chain.steps[0].why_not = "its statistics are not constant"
                    other.is_half = True

    def _are_halves(self, scales: Chain, shifts: Chain) -> bool:
        """Whether the first, of one square root with the second, only multiplies: the shift is the second's result."""
        only_multiplies = scales.map is not None and not scales.map.shift.any()
        return bool(scales.roots & shifts.roots) and only_multiplies and shifts.why_not is None

    def _is_read_once(self, tensor: str) -> bool:
        return len(self._readers[tensor]) == 1 and tensor not in self._results

    def _continues(self, chain: Chain, step: Step) -> bool:
        """Whether a step belongs to the batch norm before it, and not to one of its own."""
        if step.map is None or chain.map is None or chain.why_not or step.why_not:
            return False
        axes = {s.axis for s in (*chain.steps, step) if s.map.channels > 1}
        if len(axes) > 1:
            return False
        normalized = chain.roots or any(s.fused for s in chain.steps)
        if normalized and (step.fused or step.roots - chain.roots):
            return False
        # A bias is the convolution's.
        return not (len(chain.steps) == 1 and self._is_bias(chain.steps[0]))

    def _is_bias(self, step: Step) -> bool:
        if not step.only_adds or step.roots or self._graph[step.node].op == "Sub":
            return False
        source = self._graph.source(step.data)
        return source is not None and (source.op.startswith(("Conv", "DepthwiseConv")) or "MatMul" in source.op)

    def _step(self, node: NodeDef) -> Step | None:
        if node.op in _FUSED:
            return self._fused(node)
        first, second = self._graph.inputs(node)
        if self._constants.is_constant(first) == self._constants.is_constant(second):
            return None
        data, operand = (second, first) if self._constants.is_constant(first) else (first, second)
        vector = self._vector(node, data, self._constants.value(operand))
        if vector is None:
            return None
        value, axis = vector
        made = _elementwise(node.op, value, constant_first=operand == first)
        if made is None:
            return None
        adds = node.op not in ("Mul", "RealDiv", "Div") and not (node.op == "Sub" and operand == first)
        return Step(node.name, data, made, axis, self._roots(operand), self._known.get(node.name), only_adds=adds)

    def _vector(self, node: NodeDef, data: str, value: np.ndarray) -> tuple[np.ndarray, int] | None:
        """A constant as a vector along one axis of `data`; None if it is none, or makes `data` larger."""
        shape = self._shapes.of(data)
        if not is_float(value.dtype):
            return None
        if node.op.startswith("BiasAdd"):
            channels_first = attribute(node, "data_format").s == b"NCHW"
            if channels_first and shape is None:
                return None
            axis = 1 - len(shape) if channels_first else -1
            return value.astype(np.float64), axis
        long = [axis for axis, size in enumerate(value.shape, -value.ndim) if size != 1]
        if len(long) > 1 or (shape is not None and len(shape) < value.ndim):
            return None
        if not long:
            return value.astype(np.float64).reshape(1), -1
        if shape is None or shape[long[0]] != value.size:
            return None
        return value.astype(np.float64).reshape(-1), long[0]

    def _roots(self, operand: str) -> frozenset[str]:
        """The square roots in a constant, but for those of scalars and of Keras's Normalization: no batch norms."""
        if self._constants.value(operand).ndim == 0:
            return frozenset()
        names = self._graph.ancestors([operand])
        roots = {name for name in names if self._graph[name].op in _ROOTS}
        limited = {
            node_of(tensor)
            for name in names
            if self._graph[name].op == "Maximum"
            for tensor in self._graph.inputs(name)
        }
        return frozenset(roots - limited)

    def _fused(self, node: NodeDef) -> Step:
        """The step that is a batch norm by itself."""
        inputs = self._graph.inputs(node)
        step = Step(node.name, inputs[0], None, fused=node.name)
        if node.op == "BatchNormWithGlobalNormalization":
            mean, variance, beta, gamma = (self._constants.value(tensor) for tensor in inputs[1:])
            epsilon = attribute(node, "variance_epsilon").f
            gamma = gamma if attribute(node, "scale_after_normalization").b else np.ones_like(mean)
        else:
            gamma, beta, mean, variance = (self._constants.value(tensor) for tensor in inputs[1:5])
            epsilon = attribute(node, "epsilon").f
            if attribute(node, "data_format").s.startswith(b"NC"):
                rank = len(attribute(node, "data_format").s)
                step.axis = 1 - rank
            if attribute(node, "is_training").b:
                step.why_not = "it normalizes with the statistics of its batch (is_training=True)"
                return step
        if any(self._readers[f"{node.name}:{port}"] for port in range(1, 6)):
            step.why_not = "its statistics are read too"
        elif any(value is None for value in (gamma, beta, mean, variance)):
            step.why_not = "its parameters are not constant"
        else:
            try:
                step.map = AffineMap.of_batch_norm(gamma, beta, mean, variance, epsilon)
            except Blocked as reason:
                step.why_not = str(reason)
        return step


def _elementwise(kind: str, value: np.ndarray, *, constant_first: bool) -> AffineMap | None:
    """What an op of that type makes of its other operand."""
    if kind == "Mul":
        return AffineMap.of(value, 0.0)
    if kind in ("RealDiv", "Div"):
        if constant_first:
            return None
        with np.errstate(divide="ignore"):
            return AffineMap.of(1 / value, 0.0)
    if kind == "Sub":
        return AffineMap.of(-1.0, value) if constant_first else AffineMap.of(1.0, -value)
    return AffineMap.of(1.0, value)
