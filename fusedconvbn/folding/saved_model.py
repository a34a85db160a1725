"""SavedModel folders, of TensorFlow 1 and 2: read and written as graphs, so that no Python object has to be revived."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf
from google.protobuf import message, text_format
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from fusedconvbn._arguments import refuse
from fusedconvbn.folding.branches import take_branches
from fusedconvbn.folding.inlining import inline_calls
from fusedconvbn.folding.nodes import Nodes, canonical, node_of, port_of, strip
from fusedconvbn.folding.sources import MetaGraphDef, Source, Wishes, settle_ends, size_of
from fusedconvbn.folding.variables import freeze, keys_of, refuse_writes, with_variables
from fusedconvbn.folding.writing import Frozen

_OF_NO_MODEL = ("__saved_model_init_op", "__saved_model_train_op")
_TABLES = ("HashTableV2", "HashTable", "MutableHashTableV2", "LookupTableFindV2", "LookupTableFind")


def open_saved_model(folder: Path, wishes: Wishes, tags: Sequence[str] | None) -> Source:
    """Reads a folder with a saved_model.pb.

    Raises:
        ValueError: It is damaged, has no graph with these tags, or its inference changes variables.
    """
    meta = read_meta_graph(folder, tags)
    signatures = {key: s for key, s in meta.signature_def.items() if key not in _OF_NO_MODEL and s.outputs}
    graph = Nodes(meta.graph_def)
    results = results_of(signatures, wishes, graph, folder)
    inputs, bound = settle_ends(graph, results, _with_signature_inputs(signatures, wishes))
    prefix = str(folder / "variables" / "variables")
    frozen = freeze_meta_graph(graph, results, inputs, prefix)
    _refuse_tables(frozen, folder)
    return Source("saved_model", frozen, lambda: start(meta, prefix), [str(folder)], size_of(folder), bound, meta)


def read_meta_graph(folder: Path, tags: Sequence[str] | None) -> MetaGraphDef:
    """The graph with `tags`, or the only one, or the one that serves."""
    proto = saved_model_pb2.SavedModel()
    binary, text = folder / "saved_model.pb", folder / "saved_model.pbtxt"
    try:
        if binary.exists():
            proto.ParseFromString(binary.read_bytes())
        else:
            text_format.Parse(text.read_text(), proto)
    except (message.DecodeError, text_format.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"`source` must be a whole SavedModel. Received: {str(folder)!r} ({error})") from error
    wanted = set(tags) if tags else {"serve"}
    metas = list(proto.meta_graphs)
    found = [m for m in metas if set(m.meta_info_def.tags) == wanted] or (metas if not tags and len(metas) == 1 else [])
    if not found:
        sets = [sorted(m.meta_info_def.tags) for m in metas]
        refuse(ValueError, "tags", f"those of one of the SavedModel's graphs: {sets}", tags)
    return clean(found[0])


def clean(meta: MetaGraphDef) -> MetaGraphDef:
    """`meta` without notes that today's TensorFlow may refuse, and that it does not need."""
    for nodes in (meta.graph_def.node, *(function.node_def for function in meta.graph_def.library.function)):
        for node in nodes:
            strip(node)
    return meta


def results_of(signatures: dict[str, SignatureDef], wishes: Wishes, graph: Nodes, source: object) -> list[str]:
    """The tensors that the user names, or that the signatures return.

    Raises:
        ValueError: A name is of nothing, or there is nothing.
    """
    if wishes.outputs is not None:
        return list(dict.fromkeys(t for name in wishes.outputs for t in _tensors_of(name, signatures, graph)))
    found = [canonical(info.name) for s in signatures.values() for info in s.outputs.values()]
    if not found:
        refuse(ValueError, "outputs", "given: the source has no signature that returns something", str(source))
    return list(dict.fromkeys(found))


def _tensors_of(name: str, signatures: dict[str, SignatureDef], graph: Nodes) -> list[str]:
    """Of the name of a tensor, of a signature, or of an output that signatures have."""
    if node_of(canonical(name)) in graph:
        return [canonical(name)]
    if name in signatures:
        return [canonical(info.name) for info in signatures[name].outputs.values()]
    found = [canonical(s.outputs[name].name) for s in signatures.values() if name in s.outputs]
    if not found and signatures:
        known = ", ".join(f"{key} ({', '.join(sorted(s.outputs))})" for key, s in sorted(signatures.items()))
        refuse(
            ValueError, "outputs", f"names of signatures, of their outputs, or of the graph's tensors: {known}", name
        )
    return found or [canonical(name)]  # settle_ends() refuses it


def _with_signature_inputs(signatures: dict[str, SignatureDef], wishes: Wishes) -> Wishes:
    """What the signatures take is an input, whatever it is called."""
    if wishes.inputs is not None or wishes.outputs is not None:
        return wishes
    names = [info.name for signature in signatures.values() for info in signature.inputs.values()]
    return Wishes(dict.fromkeys(names), wishes.outputs, wishes.values)


def freeze_meta_graph(graph: Nodes, results: list[str], inputs: list[str], prefix: str) -> Frozen:
    """The graph with the values of the checkpoint `prefix`."""
    inline_calls(graph)
    keys = keys_of(graph)
    graph.prune([*results, *inputs], control=True)
    take_branches(graph)
    refuse_writes(graph, results)
    return Frozen(graph, results, freeze(graph, results, prefix, keys), inputs)


def _refuse_tables(frozen: Frozen, folder: Path) -> None:
    for name in frozen.graph.ancestors(frozen.results):
        if frozen.graph[name].op in _TABLES:
            refuse(ValueError, "outputs", f"computed without lookup tables, such as {name!r}, in", str(folder))


def start(meta: MetaGraphDef, prefix: str) -> tf.compat.v1.Session:
    """A session that runs the graph as TensorFlow restores it."""
    with tf.Graph().as_default() as graph:
        saver = tf.compat.v1.train.import_meta_graph(meta)
        session = tf.compat.v1.Session(graph=graph, config=tf.compat.v1.ConfigProto(allow_soft_placement=True))
        if saver is not None and (os.path.exists(f"{prefix}.index") or os.path.isfile(prefix)):
            saver.restore(session, prefix)
    return session


def write_saved_model(frozen: Frozen, path: Path, meta: MetaGraphDef) -> None:
    """Writes a folder with the tags and signatures of `meta`, or one for all inputs and outputs where it has none."""
    with with_variables(frozen) as session, session.graph.as_default() as graph:
        builder = tf.compat.v1.saved_model.Builder(str(path))
        left = {key: what_is_left(s, frozen) for key, s in meta.signature_def.items()}
        signatures = {key: s for key, s in left.items() if s.outputs}
        builder.add_meta_graph_and_variables(
            session, list(meta.meta_info_def.tags) or [tf.saved_model.SERVING],
            signature_def_map=signatures or {"serving_default": _signature(frozen, graph)}, strip_default_attrs=True,
        )  # fmt: skip
        builder.save()


def _signature(frozen: Frozen, graph: tf.Graph) -> SignatureDef:
    """Of all inputs and outputs, by the names of their nodes."""
    inputs, outputs = (
        {_plain(name): graph.get_tensor_by_name(canonical(name)) for name in names}
        for names in (frozen.inputs, frozen.results)
    )
    return tf.compat.v1.saved_model.predict_signature_def(inputs, outputs)


def _plain(tensor: str) -> str:
    """A tensor's name without a colon: "split", "split_1"."""
    return f"{node_of(canonical(tensor))}_{port_of(tensor)}" if port_of(tensor) else node_of(canonical(tensor))


def what_is_left(signature: SignatureDef, frozen: Frozen) -> SignatureDef:
    """A signature with those of its inputs and outputs that the model still has."""
    found = SignatureDef()
    found.CopyFrom(signature)
    for ends, names in ((found.inputs, frozen.inputs), (found.outputs, frozen.results)):
        known = set(map(canonical, names))
        for key in [key for key, info in ends.items() if canonical(info.name) not in known]:
            del ends[key]
    return found
