"""Function calls become the functions' bodies, nested ones too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusedconvbn.folding.nodes import NodeDef, Nodes, attribute, op_def, output_counts

_CALLS = ("PartitionedCall", "StatefulPartitionedCall", "TPUPartitionedCall")


@dataclass(frozen=True)
class _Body:
    """A function's nodes, their inputs in a GraphDef's terms, and what each of its results is."""

    arguments: list[str]
    nodes: list[NodeDef]
    inputs: list[list[str]]
    results: list[str]


def inline_calls(graph: Nodes) -> list[str]:
    """Inlines every call in `graph`, whose results then stand for the body's; the names of the nodes that were added.

    A node of the body is called `caller/node`.
    """
    bodies: dict[str, _Body] = {}
    pending = list(graph.nodes)
    added: list[str] = []
    while pending:
        node = graph.nodes.get(pending.pop())
        name = None if node is None else _called(graph, node)
        if name is None:
            continue
        if name not in bodies:
            bodies[name] = _body(graph, name)
        new = _inline(graph, node, name, bodies[name])
        pending += new
        added += new
    return [name for name in added if name in graph.nodes]


def _called(graph: Nodes, node: NodeDef) -> str | None:
    """The function that a node calls, by name or, in TensorFlow 1, by being of a type of that name."""
    name = attribute(node, "f").func.name if node.op in _CALLS else node.op
    return name if name in graph.functions else None


def _inline(graph: Nodes, caller: NodeDef, function: str, body: _Body) -> list[str]:
    given = dict(zip((f"{name}:0" for name in body.arguments), graph.inputs(caller)))

    def outer(tensor: str) -> str:
        return given.get(tensor) or f"{caller.name}/{tensor}"

    del graph.nodes[caller.name]
    for node, inputs in zip(body.nodes, body.inputs):
        copy = NodeDef()
        copy.CopyFrom(node)
        copy.name = f"{caller.name}/{node.name}"
        del copy.input[:]
        copy.input.extend(outer(tensor) for tensor in inputs)
        copy.input.extend(f"^{caller.name}/{name[1:]}" for name in node.input if name.startswith("^"))
        graph.insert(copy)
        graph.origins[copy.name] = function, node.name
    for port, tensor in enumerate(body.results):
        graph.replace(f"{caller.name}:{port}", outer(tensor))
    return [f"{caller.name}/{node.name}" for node in body.nodes]


def _body(graph: Nodes, name: str) -> _Body:
    """In a function "node:argument:index" is a tensor, in a graph "node:index"."""
    function = graph.functions[name]
    flat: dict[str, str] = {}
    for node in function.node_def:
        port = 0
        for argument, count in output_counts(node, _signature(graph, node)):
            for index in range(count):
                flat[f"{node.name}:{argument}:{index}"] = f"{node.name}:{port}"
                port += 1
    arguments = [argument.name for argument in function.signature.input_arg]
    flat.update((argument, f"{argument}:0") for argument in arguments)
    tensor: Callable[[str], str] = lambda written: flat[written]  # noqa: E731
    inputs = [[tensor(i) for i in node.input if not i.startswith("^")] for node in function.node_def]
    results = [tensor(function.ret[output.name]) for output in function.signature.output_arg]
    return _Body(arguments, list(function.node_def), inputs, results)


def _signature(graph: Nodes, node: NodeDef) -> object:
    if node.op in graph.functions:
        return graph.functions[node.op].signature
    found = op_def(node.op)
    if found is None:
        raise ValueError(
            f"the source must be a graph of ops that TensorFlow knows, or whose library has been loaded by "
            f"tf.load_op_library. Received: an op of type {node.op!r}, named {node.name!r}, in a function"
        )
    return found
