"""What every format has in common: what the user says of inputs and outputs, and files written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from fusedconvbn._arguments import refuse
from fusedconvbn.folding.cleaning import bind
from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.nodes import GraphDef, NodeDef, Nodes, attribute, canonical, node_of, output_count, port_of
from fusedconvbn.folding.shapes import Shapes, with_input_shapes
from fusedconvbn.folding.training import inference_value, is_switch
from fusedconvbn.folding.writing import Frozen

MetaGraphDef = tf.compat.v1.MetaGraphDef
Shape = tuple[int | None, ...]

KINDS_OF_SOURCE = (
    "a Keras model's file (.keras, .h5), a frozen graph's (.pb, .pbtxt), a SavedModel's folder, or the prefix of a "
    "checkpoint with its .meta"
)
_OF_NO_RESULT = ("NoOp", "Assert", "Const", "Placeholder", "SaveV2", "Save", "MergeV2Checkpoints")
_TRAINING_IS_ON = {"train", "training", "istraining", "trainable", "phase", "dropout"}
_TRAINING_IS_OFF = {"inference", "infer", "test", "testing", "eval", "evaluation", "predict", "prediction"}
_KEPT_PART = {"keep"}
_DROPPED_PART = {"dropout", "drop"}


@dataclass(frozen=True)
class Wishes:
    """What the user says of the model's ends.

    Attributes:
        inputs: Their shapes by name, None as the source has it; None: the source's own inputs.
        outputs: Their names; None: the source's own.
        values: Values of inputs that are none of the folded model any more.
    """

    inputs: Mapping[str, Shape | None] | None = None
    outputs: Sequence[str] | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Source:
    """A model that was read as a graph.

    Attributes:
        kind: One of `KINDS`.
        frozen: Its graph with constants for variables.
        start: Makes a session that runs the source as TensorFlow itself does.
        files: Its files, or the folder that is all its own.
        bytes: Their size.
        bound: Inputs of the source that have this value in inference.
        meta: What else it holds: signatures, tags, collections.
    """

    kind: str
    frozen: Frozen
    start: Callable[[], tf.compat.v1.Session]
    files: Sequence[str]
    bytes: int
    bound: dict[str, np.ndarray] = field(default_factory=dict)
    meta: MetaGraphDef = field(default_factory=MetaGraphDef)


def settle_ends(graph: Nodes, results: Sequence[str], wishes: Wishes) -> tuple[list[str], dict[str, np.ndarray]]:
    """The inputs of a graph that returns `results`, and the values of those that inference does not need.

    What the user calls an input becomes a Placeholder.

    Raises:
        ValueError: A name is not in the graph, or what an input is in inference cannot be told.
    """
    _refuse_foreign(graph, results, wishes)
    if wishes.inputs is not None:
        _cut(graph, wishes.inputs)
    needed = graph.ancestors(results)
    wanted = [node_of(canonical(name)) for name in wishes.inputs or ()]
    needed = {*needed, *wanted}  # a signature may take what none of its results needs
    placeholders = [n.name for n in graph.nodes.values() if n.op.startswith("Placeholder") and n.name in needed]
    values = {node_of(canonical(name)): value for name, value in wishes.values.items()}
    bound: dict[str, np.ndarray] = {}
    inputs: list[str] = []
    for name in placeholders:
        if name in values:
            bound[name] = np.asarray(values[name], _dtype(graph, name).as_numpy_dtype)
        elif name in wanted:
            inputs.append(name)
        elif (value := _in_inference(graph, name, results)) is not None:
            bound[name] = value
        elif wishes.inputs is None:
            inputs.append(name)
        elif graph[name].op == "Placeholder":
            refuse(
                ValueError, "inputs", f"all that the outputs are computed from, {name!r} among it", list(wishes.inputs)
            )
    bind(graph, bound)
    return inputs, bound


def _refuse_foreign(graph: Nodes, results: Sequence[str], wishes: Wishes) -> None:
    """Raises a `ValueError` for names that are not the graph's."""
    placeholders = [node.name for node in graph.nodes.values() if node.op.startswith("Placeholder")]
    for name in wishes.inputs or ():
        if not _makes(graph, name):
            refuse(ValueError, "inputs", f"names of the graph's tensors{_such_as(placeholders, 'placeholders')}", name)
    for name in wishes.values:
        if node_of(canonical(name)) not in placeholders:
            refuse(ValueError, "values", f"by names of placeholders{_such_as(placeholders, 'placeholders')}", name)
    for name in results:
        if not _makes(graph, name):
            accepted = f"names of the graph's tensors{_such_as(unread(graph), 'results')}"
            refuse(ValueError, "outputs", accepted, name.removesuffix(":0"))


def _makes(graph: Nodes, tensor: str) -> bool:
    node = graph.nodes.get(node_of(canonical(tensor)))
    count = 0 if node is None else output_count(node)
    return count is None or port_of(tensor) < count


def _such_as(names: Sequence[str], what: str) -> str:
    return f" (its {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else ""


def unread(graph: Nodes) -> list[str]:
    """The nodes that are computed from an input and that no other reads: the graph's results, if all is well."""
    read = {node_of(tensor) for node in graph.nodes.values() for tensor in graph.inputs(node)}
    ends = [n.name for n in graph.nodes.values() if n.name not in read and n.op not in _OF_NO_RESULT]
    return [name for name in ends if any(graph[n].op.startswith("Placeholder") for n in graph.ancestors([name]))]


def _cut(graph: Nodes, inputs: Mapping[str, Shape | None]) -> None:
    """Puts Placeholders where the user says that inputs are."""
    inner = [name for name in inputs if graph[node_of(canonical(name))].op != "Placeholder"]
    shapes = Shapes(graph) if inner else None
    for name, given in inputs.items():
        own = shapes.of(name) if name in inner else _declared_shape(graph[node_of(canonical(name))])
        if not tf.TensorShape(own).is_compatible_with(given):
            refuse(ValueError, f"inputs[{name!r}]", f"a shape that fits its own, {own}", given)
    for name in inner:
        node = graph[node_of(canonical(name))]
        if node.op == "PlaceholderWithDefault":
            continue
        if port_of(name):
            refuse(ValueError, "inputs", "placeholders, or first outputs of other nodes", name)
        dtype = shapes.dtype(name)
        shape = tf.TensorShape(shapes.of(name)).as_proto()
        del graph.nodes[node.name]
        graph.add("Placeholder", node.name, [], dtype=dtype, shape=tf.compat.v1.AttrValue(shape=shape))
    with_input_shapes(
        graph, {n: s for n, s in inputs.items() if s is not None and graph[node_of(canonical(n))].op == "Placeholder"}
    )


def _declared_shape(placeholder: NodeDef) -> Shape | None:
    """The sizes that a Placeholder has by itself; None for no known rank, which old graphs write as rank 0."""
    shape = tf.TensorShape(attribute(placeholder, "shape").shape)
    return tuple(shape.as_list()) if shape.rank else None


def _dtype(graph: Nodes, name: str) -> tf.DType:
    return tf.as_dtype(attribute(graph[name], "dtype").type)


def _in_inference(graph: Nodes, name: str, results: Sequence[str]) -> np.ndarray | None:
    """The value of a scalar that tells training from inference, or how much dropout keeps; None of any other input.

    By the words of its name, or, for predicates, by which branch has no training in it.
    """
    node, dtype = graph[name], _dtype(graph, name)
    shape = attribute(node, "shape").shape
    if shape.dim and not shape.unknown_rank:
        return None
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name.rpartition("/")[2])}
    if dtype == tf.bool and is_switch(graph, name):
        by_name = False if words & _TRAINING_IS_ON else True if words & _TRAINING_IS_OFF else None
        value = inference_value(graph, name, results) if by_name is None else by_name
        if value is None and node.op == "PlaceholderWithDefault":
            return Constants(graph).value(node.input[0])
        return None if value is None else np.asarray(value)
    if dtype.is_floating and words & _KEPT_PART:
        return np.asarray(1, dtype.as_numpy_dtype)
    if dtype.is_floating and words & _DROPPED_PART:
        return np.asarray(0, dtype.as_numpy_dtype)
    return None


def session_of(graph_def: GraphDef, *, as_written: bool = False) -> tf.compat.v1.Session:
    """A session that runs a graph without variables; `as_written`, without TensorFlow's own rewriting."""
    config = tf.compat.v1.ConfigProto(allow_soft_placement=True)
    if as_written:
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        config.graph_options.optimizer_options.opt_level = tf.compat.v1.OptimizerOptions.L0
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
    return tf.compat.v1.Session(graph=graph, config=config)


def size_of(*paths: Path) -> int:
    """Bytes of files, and of all that is in folders."""
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()]
    return sum(file.stat().st_size for file in files)


@contextmanager
def whole(destination: str, *, overwrite: bool, is_prefix: bool = False) -> Iterator[str]:
    """A path to write to, beside `destination`; its files become the latter's at the end, or go if something fails, and
    so do folders that were made for them.

    What is written is a file or a folder or, if `is_prefix`, files whose names begin as `destination` does.

    Raises:
        FileExistsError: There is something, and it is not to be overwritten.
    """
    parent, name = _split(destination)
    existing = _named(parent, name, is_prefix)
    if existing and not overwrite:
        refuse_existing(destination, overwrite)
    missing = [folder for folder in (Path(parent), *Path(parent).parents) if not folder.exists()]
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".fold-", dir=parent)
    try:
        made = os.path.join(folder, "made")
        os.mkdir(made)
        yield os.path.join(made, name)
        for old in existing:
            os.rename(old, os.path.join(folder, os.path.basename(old)))
        for new in os.listdir(made):
            os.rename(os.path.join(made, new), os.path.join(parent, new))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent_made in missing:
            with suppress(OSError):  # not empty: all went well, or it is used by others too
                parent_made.rmdir()


def refuse_existing(destination: str, overwrite: bool) -> None:
    """Raises a `FileExistsError` if there is something, unless it may be overwritten."""
    parent, name = _split(destination)
    if not overwrite and (_named(parent, name, False) or _named(parent, name, True)):
        raise FileExistsError(f"`destination` must not exist, or overwrite=True be given. Received: {destination!r}")


def refuse_source(destination: str, source: str, files: Iterable[str]) -> None:
    """Raises a `ValueError` if writing would touch the source, which consists of `files` and is called `source`."""
    target = os.path.realpath(destination)
    replaced = {target, *map(os.path.realpath, _named(*_split(destination), True))}
    held = {os.path.realpath(file) for file in files}
    inside = target.startswith(os.path.realpath(source) + os.sep) and os.path.realpath(source) in held
    if inside or replaced & held or any(file.startswith(target + os.sep) for file in held):
        refuse(ValueError, "destination", "another path than the source's, which is never changed", destination)


def refuse_blocked(name: str, path: str) -> None:
    """Raises an `OSError` if the folder of `path`, an argument called `name`, is not there and cannot be made."""
    above = next(folder for folder in Path(os.path.abspath(path)).parents if folder.exists())
    if not above.is_dir():
        refuse(NotADirectoryError, name, f"in a folder, and {str(above)!r} is a file", path)
    if not os.access(above, os.W_OK):
        refuse(PermissionError, name, f"where files may be written, and {str(above)!r} is a folder where not", path)


def is_part(path: str, model: str) -> bool:
    """Whether `path` is that of a model, lies in its folder, or is a file of the checkpoint with that prefix."""
    path, model = os.path.realpath(path), os.path.realpath(model)
    return path == model or path.startswith(model + os.sep) or bool(_checkpoint_files(model).fullmatch(path))


def _checkpoint_files(prefix: str) -> re.Pattern[str]:
    return re.compile(re.escape(prefix) + r"(\.meta|\.index|\.data-\d+-of-\d+)")


def _split(destination: str) -> tuple[str, str]:
    """Folder and name; a checkpoint's prefix may end with a slash, its name then being empty."""
    parent, name = os.path.split(destination.rstrip("/") if os.path.isdir(destination) else destination)
    return parent or ".", name


def _named(parent: str, name: str, is_prefix: bool) -> list[str]:
    """What a result of that name consists of: itself, or the files of a checkpoint."""
    if not is_prefix:
        path = os.path.join(parent, name)
        return [path] if name and os.path.exists(path) else []
    files = _checkpoint_files(name)
    present = os.listdir(parent) if os.path.isdir(parent) else []
    return [os.path.join(parent, found) for found in present if files.fullmatch(found)]
