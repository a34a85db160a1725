"""TensorFlow 1 checkpoints with their meta graphs: `PREFIX.meta`, `PREFIX.index`, `PREFIX.data-*`."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import tensorflow as tf
from google.protobuf import message

from fusedconvbn._arguments import refuse
from fusedconvbn.folding.frozen import outputs_of
from fusedconvbn.folding.nodes import Nodes, canonical, node_of
from fusedconvbn.folding.saved_model import clean, freeze_meta_graph, results_of, start, what_is_left
from fusedconvbn.folding.sources import MetaGraphDef, Source, Wishes, settle_ends
from fusedconvbn.folding.training import results_of_inference
from fusedconvbn.folding.variables import weights_of, with_variables
from fusedconvbn.folding.writing import Frozen


def prefix_of(path: str) -> str | None:
    """The prefix that a path means: itself, one of its files, or a folder whose `checkpoint` file names it.

    The path in that file may be another machine's: the name counts, in this folder.
    """
    for end in (".meta", ".index"):
        if path.endswith(end) and os.path.exists(path):
            path = path.removesuffix(end)
    if os.path.exists(f"{path}.meta"):
        return path
    state = os.path.join(path, "checkpoint")
    if os.path.isfile(state):
        found = tf.train.get_checkpoint_state(path)
        name = os.path.basename(found.model_checkpoint_path) if found is not None else ""
        inside = os.path.join(path, name)
        return inside if os.path.exists(f"{inside}.meta") else None
    return None


def open_checkpoint(prefix: str, wishes: Wishes) -> Source:
    """Reads the graph of `PREFIX.meta` with the values of the checkpoint.

    Raises:
        ValueError: A file is damaged, a variable lacks, or what the outputs are cannot be told.
    """
    meta = read_meta(f"{prefix}.meta")
    graph = Nodes(meta.graph_def)
    results = _results(meta, graph, wishes, prefix)
    inputs, bound = settle_ends(graph, results, wishes)
    frozen = freeze_meta_graph(graph, results, inputs, prefix)
    files = files_of(prefix)
    size = sum(map(os.path.getsize, files))
    return Source("checkpoint", frozen, lambda: start(meta, prefix), files, size, bound, meta)


def read_meta(path: str) -> MetaGraphDef:
    """A meta graph without what today's TensorFlow refuses."""
    meta = MetaGraphDef()
    try:
        meta.ParseFromString(Path(path).read_bytes())
    except message.DecodeError as error:
        raise ValueError(f"`source` must be a whole meta graph. Received: {path!r} ({error})") from error
    if not meta.graph_def.node:
        raise ValueError(f"`source` must be a meta graph with nodes. Received: {path!r}, which has none")
    return clean(meta)


def _results(meta: MetaGraphDef, graph: Nodes, wishes: Wishes, prefix: str) -> list[str]:
    if wishes.outputs is not None:
        return outputs_of(graph, wishes)
    signatures = {key: s for key, s in meta.signature_def.items() if s.outputs}
    if signatures:
        return results_of(signatures, wishes, graph, prefix)
    found = results_of_inference(graph)
    if len(found) != 1:
        refuse(ValueError, "outputs", f"given, where it is not plain: it may be among {found[:12]}", None)
    return found


def files_of(prefix: str) -> list[str]:
    """All files of a checkpoint, its meta graph among them."""
    escaped = glob.escape(prefix)
    found = [f"{prefix}.meta", f"{prefix}.index", *glob.glob(f"{escaped}.data-*-of-*"), prefix]
    return [path for path in found if os.path.isfile(path)]


def write_checkpoint(frozen: Frozen, prefix: str, meta: MetaGraphDef) -> None:
    """Writes `PREFIX.meta`, `.index` and `.data-*`; each variable's key is the name of its node.

    Signatures and collections of tensors of `meta` that are still there are kept.
    """
    if not frozen.variables:
        frozen.variables = weights_of(frozen)
    with with_variables(frozen) as session, session.graph.as_default() as graph:
        saver = tf.compat.v1.train.Saver(allow_empty=True)
        saver.save(session, prefix, write_state=False, write_meta_graph=False)
        made = tf.compat.v1.train.export_meta_graph(saver_def=saver.as_saver_def(), strip_default_attrs=True)
        _keep_names(meta, made, frozen, {operation.name for operation in graph.get_operations()})
        Path(f"{prefix}.meta").write_bytes(made.SerializeToString())


def _keep_names(meta: MetaGraphDef, made: MetaGraphDef, frozen: Frozen, known: set[str]) -> None:
    for key, signature in meta.signature_def.items():
        left = what_is_left(signature, frozen)
        if left.outputs:
            made.signature_def[key].CopyFrom(left)
    for key, collection in meta.collection_def.items():
        names = collection.node_list.value
        if names and key not in made.collection_def and all(node_of(canonical(name)) in known for name in names):
            made.collection_def[key].CopyFrom(collection)
