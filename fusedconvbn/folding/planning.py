"""Finds for each batch norm the ops that can take it up, and lets them: behind first, then before.

A search follows the ways from one batch norm to what can take it up, and stops at the first op that cannot: short ways,
so that the time is linear in the size of the graphs that people have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fusedconvbn.folding.affine import AffineMap, Blocked
from fusedconvbn.folding.ops import Affine, Answer, Linear, Op


@dataclass(frozen=True)
class Folded:
    """A batch norm that is gone, and the names of the ops that took it up."""

    name: str
    into: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """A batch norm that stays as it was, and why."""

    name: str
    reason: str


def merged(former: Folded | Kept | None, entry: Folded | Kept) -> Folded | Kept:
    """The entry of a batch norm that is computed in several places: it is gone only if it is so from all."""
    if former is None or isinstance(entry, Kept):
        return entry
    return former if isinstance(former, Kept) else Folded(former.name, tuple(dict.fromkeys(former.into + entry.into)))


@dataclass
class Graph:
    """Ops in topological order, and who reads what.

    Attributes:
        ops: In an order in which each comes after those that it reads.
        results: The tensors that the model returns.
        was: For each tensor, the one whose values in the source are its values now; None if there is none.
    """

    ops: list[Op]
    results: set[str]
    was: dict[str, str | None] = field(default_factory=dict)
    producers: dict[str, tuple[Op, int]] = field(default_factory=dict)
    readers: dict[str, list[tuple[Op, int]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for op in self.ops:
            for index, tensor in enumerate(op.outputs):
                self.producers[tensor] = (op, index)
            for index, tensor in enumerate(op.inputs):
                self.readers[tensor].append((op, index))

    def remove(self, op: Affine) -> None:
        """Lets who reads its output read its input."""
        (source,), (output, *_) = op.inputs, op.outputs
        self.readers[source] = [(reader, i) for reader, i in self.readers[source] if reader is not op]
        for reader, index in self.readers.pop(output, []):
            reader.inputs[index] = source
            self.readers[source].append((reader, index))
        if output in self.results:
            self.results.add(source)
        op.removed = True

    def sites(self) -> dict[str, str]:
        """Where to look whether folding was right: tensors of the source, and which ones carry their values now.

        They are the results of the ops that took something up, each as soon as it is a value of the source's.
        """
        found = {}
        for op in self.ops:
            if isinstance(op, (Linear, Affine)) and op.changed:
                now = op.outputs[0]
                if (before := self.was.get(now, now)) is not None:
                    found[before] = now
        return found


@dataclass
class _Search:
    """One way of moving one batch norm: what would be changed, and who would take it up."""

    graph: Graph
    changes: list[Callable[[], None]] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    into: dict[str, Op] = field(default_factory=dict)

    def pull(self, tensor: str, m: AffineMap, axis: int, who: Op) -> None:
        """Makes `tensor`, which `who` alone may read, carry `m` of what it carried."""
        pending = [(tensor, m, axis, who)]
        while pending:
            tensor, m, axis, who = pending.pop()
            if m.is_identity:
                continue
            op, output = self._source(tensor, who)
            answer = op.pull(output, m, axis)
            self._note(op, answer)
            pending += [(op.inputs[index], *channels, op) for index, channels in reversed(answer.maps.items())]

    def _source(self, tensor: str, who: Op) -> tuple[Op, int]:
        """What makes a tensor, which may be changed for `who`."""
        if tensor in self.graph.results:
            raise Blocked(f"the model returns what {who} reads")
        others = [str(reader) for reader, _ in self.graph.readers[tensor] if reader is not who]
        if others or len(self.graph.readers[tensor]) > 1:
            raise Blocked(f"what {who} reads is also read by {', '.join(others[:3]) or 'the same op once more'}")
        self.altered.append(tensor)
        return self.graph.producers[tensor]

    def push(self, tensor: str, m: AffineMap, axis: int) -> None:
        """Lets all readers of `tensor` get along without `m`, which it carried."""
        pending = [(tensor, m, axis)]
        while pending:
            tensor, m, axis = pending.pop()
            if m.is_identity:
                continue
            if tensor in self.graph.results:
                raise Blocked(f"the model returns {tensor!r}")
            self.altered.append(tensor)
            for op, index in self.graph.readers[tensor]:
                answer = op.push(index, m, axis)
                self._note(op, answer)
                pending += [(op.outputs[output], *channels) for output, channels in answer.maps.items()]

    def _note(self, op: Op, answer: Answer) -> None:
        if answer.change is not None:
            self.changes.append(answer.change)
        if answer.absorbs:
            self.into[op.name] = op

    def commit(self, op: Affine) -> Folded:
        for change in self.changes:
            change()
        self.graph.was.update(dict.fromkeys(self.altered))
        self.graph.remove(op)
        return Folded(op.name, tuple(self.into))


def fold_batch_norms(graph: Graph) -> list[Folded | Kept]:
    """Folds what folds exactly, changing `graph`; an entry for each batch norm, in the graph's order."""
    batch_norms = [op for op in graph.ops if isinstance(op, Affine) and op.batch_norm]
    entries: dict[int, Folded | Kept] = {}
    reasons: dict[int, str] = {}
    for op in batch_norms:
        if op.map is None or op.why_not:
            entries[id(op)] = Kept(op.name, op.why_not or "its parameters are not constant")
            continue
        try:
            entries[id(op)] = _backward(graph, op)
        except Blocked as reason:
            reasons[id(op)] = str(reason)
    # The last first: with it gone, the one before it may stand before a convolution.
    for op in reversed([op for op in batch_norms if id(op) in reasons]):
        try:
            entries[id(op)] = _forward(graph, op)
        except Blocked as reason:
            entries[id(op)] = Kept(op.name, f"backward: {reasons[id(op)]}; forward: {reason}")
    _merge_biases(graph.ops, graph)
    return [entries[id(op)] for op in batch_norms]


def _backward(graph: Graph, op: Affine) -> Folded:
    """Into what computes its input."""
    search = _Search(graph)
    result = graph.was.get(op.outputs[0], op.outputs[0])
    search.pull(op.inputs[0], op.map, op.axis, op)
    folded = search.commit(op)
    graph.was[op.inputs[0]] = result
    return folded


def _forward(graph: Graph, op: Affine) -> Folded:
    """Into everything that reads its output."""
    search = _Search(graph)
    if not graph.readers[op.outputs[0]]:
        raise Blocked("nothing reads it")
    search.push(op.outputs[0], op.map, op.axis)
    return search.commit(op)


def _merge_biases(ops: Iterable[Op], graph: Graph) -> None:
    """Adds the bias that a linear op came to have to the one that already follows it."""
    for op in ops:
        if not isinstance(op, Linear) or not op.changed or op.weights.bias is None or op.outputs[0] in graph.results:
            continue
        readers = graph.readers[op.outputs[0]]
        follower = readers[0][0] if len(readers) == 1 else None
        if isinstance(follower, Affine) and follower.is_bias and not follower.removed and not follower.batch_norm:
            if follower.axis != op.axis and follower.map.channels > 1:
                continue
            follower.map = AffineMap(follower.map.scale, follower.map.shift + op.weights.bias)
            follower.changed = True
            follower.axis = op.axis
            op.weights.bias = None
            graph.was[op.outputs[0]] = None
