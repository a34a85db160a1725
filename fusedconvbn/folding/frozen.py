"""Frozen GraphDefs: `.pb`, `.pbtxt`, and GraphDef objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf
from google.protobuf import message, text_format

from fusedconvbn._arguments import refuse
from fusedconvbn.folding.nodes import GraphDef, Nodes, canonical
from fusedconvbn.folding.shapes import Shapes
from fusedconvbn.folding.sources import KINDS_OF_SOURCE, Source, Wishes, session_of, settle_ends, size_of, unread
from fusedconvbn.folding.variables import is_variable
from fusedconvbn.folding.writing import Frozen


def open_frozen(path: Path, wishes: Wishes) -> Source:
    """Reads a file with a frozen graph.

    Raises:
        ValueError: It holds no GraphDef, or one with variables, or the user's wishes do not fit.
    """
    return of_graph_def(read_graph_def(path), wishes, size_of(path), [str(path)])


def of_graph_def(graph_def: GraphDef, wishes: Wishes, size: int, files: Sequence[str] = ()) -> Source:
    """The same of a GraphDef."""
    graph = Nodes(graph_def)
    if any(is_variable(node.op) for node in graph.nodes.values()):
        accepted = "a frozen graph: variables' values are in a checkpoint, whose prefix to give"
        refuse(ValueError, "source", accepted, files[0] if files else "a GraphDef with variables")
    results = outputs_of(graph, wishes)
    inputs, bound = settle_ends(graph, results, wishes)
    frozen = Frozen(graph, results, {}, inputs)
    return Source("frozen", frozen, lambda: session_of(graph_def), files, size, bound)


def read_graph_def(path: Path) -> GraphDef:
    """A GraphDef from a file, binary or text."""
    graph_def = GraphDef()
    data = path.read_bytes()
    accepted = "a whole GraphDef" if path.suffix in (".pb", ".pbtxt") else KINDS_OF_SOURCE
    try:
        if path.suffix == ".pbtxt":
            text_format.Parse(data.decode(), graph_def)
        else:
            graph_def.ParseFromString(data)
    except (message.DecodeError, text_format.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"`source` must be {accepted}. Received: {str(path)!r} ({error})") from error
    if not graph_def.node:
        raise ValueError(f"`source` must be {accepted}. Received: {str(path)!r}, which holds no node of a GraphDef")
    return graph_def


def write_frozen(frozen: Frozen, path: Path) -> None:
    """Writes a GraphDef, as text to a `.pbtxt`, with constants for variables."""
    graph_def = frozen.graph.graph_def()
    is_text = path.suffix == ".pbtxt"
    path.write_bytes(text_format.MessageToString(graph_def).encode() if is_text else graph_def.SerializeToString())


def outputs_of(graph: Nodes, wishes: Wishes) -> list[str]:
    """The tensors that the user names as outputs, or the results that nothing reads.

    Raises:
        ValueError: There is nothing.
    """
    if wishes.outputs is not None:
        return [canonical(name) for name in wishes.outputs]
    ends = unread(graph)
    ends = [name for name in ends if not _is_of_flow(graph, name)] or ends
    if len(ends) > 1:
        shapes = Shapes(graph)
        ends = [name for name in ends if shapes.dtype(f"{name}:0") not in (tf.variant, tf.resource)]
    if not ends:
        refuse(ValueError, "outputs", "given: the graph has no result that depends on an input", None)
    return [f"{name}:0" for name in ends]


def _is_of_flow(graph: Nodes, name: str) -> bool:
    """Whether a node only belongs to a loop or condition, such as a loop's counter that nobody asks for."""
    if graph[name].op in ("Merge", "RefMerge"):
        return False
    source = graph.source(graph.inputs(name)[0]) if graph[name].op == "Identity" else None
    return graph.is_flow(name) or (source is not None and source.op in ("While", "StatelessWhile"))
