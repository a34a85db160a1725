"""What the tests of folding read: files of models, with images to feed and the outputs that TensorFlow computes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import text_format

v1 = tf.compat.v1

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]  # outputs by name, of images by name


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A source to fold.

    The names in `inputs`, `outputs`, `images` and `expected` are those of tensors ("input:0") in graphs, those of the
    signature in a SavedModel, and "input" and "output" of a Keras model.
    """

    path: Any  # text, since a checkpoint's prefix may end in a slash; or the Keras model itself
    kind: str  # "saved_model", "frozen", "checkpoint" or "keras"
    inputs: dict[str, tuple[int | None, ...]]
    outputs: list[str]
    images: Arrays
    expected: Arrays
    batch_norms: int  # in the graph of inference
    foldable: int  # of these, how many must go
    constants: Arrays = dataclasses.field(default_factory=dict)  # what else inference feeds: is_training, keep_prob
    tags: tuple[str, ...] = ("serve",)
    signature: str = "serving_default"
    others: tuple[ModelFile, ...] = ()  # further signatures of the same file

    @property
    def feeds(self) -> Arrays:
        """All that inference feeds."""
        return {**self.images, **self.constants}


def random_image(shape: Sequence[int | None], seed: int = 0) -> np.ndarray:
    """Normal values with a mean and a scale of each example's own; two examples for a batch of any size."""
    rng = np.random.default_rng([seed, 7])
    sizes = [2 if size is None else size for size in shape]
    aside = [sizes[0]] + [1] * (len(sizes) - 1)
    return (rng.normal(size=aside) + rng.uniform(0.5, 2, aside) * rng.normal(size=sizes)).astype("float32")


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference over the largest value of y."""
    return float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30))


def confirm(run: Run, file: ModelFile, tolerance: float = 1e-4) -> ModelFile:
    """`file`, once `run`, which runs what was written, returns what is expected, and other values of other images."""
    computed = run(file.feeds)
    others = run({**file.constants, **{name: random_image(x.shape, seed=99) for name, x in file.images.items()}})
    for name, expected in file.expected.items():
        assert np.isfinite(expected).all(), name
        assert distance(computed[name], expected) < tolerance, (name, distance(computed[name], expected))
        assert distance(others[name], expected) > 0.05, (name, distance(others[name], expected))
    return file


def run_in(session: Any, outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> Arrays:
    """The tensors of these names."""
    return dict(zip(outputs, session.run(list(outputs), dict(feeds))))


def run_graph(graph_def: Any, outputs: Sequence[str]) -> Run:
    """What runs a GraphDef without variables."""

    def run(feeds: Arrays) -> Arrays:
        with tf.Graph().as_default(), v1.Session() as session:
            tf.graph_util.import_graph_def(graph_def, name="")
            return run_in(session, outputs, feeds)

    return run


def run_checkpoint(prefix: str, outputs: Sequence[str], meta: str | None = None) -> Run:
    """What imports a .meta file and restores the checkpoint beside it."""

    def run(feeds: Arrays) -> Arrays:
        with tf.Graph().as_default(), v1.Session() as session:
            v1.train.import_meta_graph(meta or prefix + ".meta").restore(session, prefix)
            return run_in(session, outputs, feeds)

    return run


def run_session_saved_model(path: str, tags: Sequence[str], signature: str, outputs: Sequence[str]) -> Run:
    """What loads a SavedModel into a session, as TensorFlow 1 does, objects or not."""

    def run(feeds: Arrays) -> Arrays:
        with tf.Graph().as_default(), v1.Session() as session:
            found = v1.saved_model.load(session, list(tags), path).signature_def[signature]
            named = {found.inputs[name].name: value for name, value in feeds.items()}
            tensors = [found.outputs[name].name for name in outputs]
            return dict(zip(outputs, session.run(tensors, named)))

    return run


def run_saved_model(path: str, signature: str = "serving_default", tags: Sequence[str] | None = None) -> Run:
    """What loads a SavedModel's objects and calls a signature."""

    def run(feeds: Arrays) -> Arrays:
        loaded = tf.saved_model.load(path, list(tags) if tags else None)
        results = loaded.signatures[signature](**{name: tf.constant(value) for name, value in feeds.items()})
        return {name: value.numpy() for name, value in results.items()}

    return run


def read_graph(path: str) -> Any:
    """The GraphDef in a .pb or a .pbtxt."""
    graph_def = v1.GraphDef()
    if path.endswith(".pbtxt"):
        text_format.Parse(Path(path).read_text(), graph_def)
    else:
        graph_def.ParseFromString(Path(path).read_bytes())
    return graph_def


def write_frozen(folder: Path, graph_def: Any, facts: ModelFile, text: bool = False) -> ModelFile:
    """A .pb or a .pbtxt of a graph without variables, read back and run."""
    path = folder / ("frozen.pbtxt" if text else "frozen.pb")
    tf.io.write_graph(graph_def, str(folder), path.name, as_text=text)
    file = dataclasses.replace(facts, path=str(path), kind="frozen")
    return confirm(run_graph(read_graph(file.path), file.outputs), file)


def write_checkpoint(
    session: Any, prefix: Path, facts: ModelFile, damage: Callable[[Any], None] | None = None, **saver: Any
) -> ModelFile:
    """Checkpoint and .meta of the session's graph, read back and run, and then its MetaGraphDef damaged."""
    v1.train.Saver(**saver).save(session, str(prefix))
    file = dataclasses.replace(facts, path=str(prefix), kind="checkpoint")
    confirm(run_checkpoint(file.path, file.outputs), file)
    if damage:
        damage_meta(Path(f"{prefix}.meta"), damage)
    return file


def damage_meta(path: Path, damage: Callable[[Any], None]) -> None:
    """Rewrite a .meta file with `damage` done to its MetaGraphDef."""
    meta = v1.MetaGraphDef.FromString(path.read_bytes())
    damage(meta)
    path.write_bytes(meta.SerializeToString())


def frozen_graph(session: Any, outputs: Sequence[str]) -> Any:
    """The GraphDef of what these tensors need, with the session's variables as constants."""
    nodes = [name.split(":")[0] for name in outputs]
    return v1.graph_util.convert_variables_to_constants(session, session.graph.as_graph_def(), nodes)


@contextlib.contextmanager
def control_flow(version_2: bool) -> Iterator[None]:
    """Conditionals as If operations or as Switch and Merge."""
    before = v1.control_flow_v2_enabled()
    (v1.enable_control_flow_v2 if version_2 else v1.disable_control_flow_v2)()
    try:
        yield
    finally:
        (v1.enable_control_flow_v2 if before else v1.disable_control_flow_v2)()
