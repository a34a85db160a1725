"""Where `fold` writes: of which kind, with which names, and nothing where it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from fold_files import run_checkpoint

import fusedconvbn
from fusedconvbn.folding import writers

v1 = tf.compat.v1


def looping_graph():
    """A convolution, batch norm and a While that reads a weight; its result is called Identity."""
    rng = np.random.default_rng(3)
    kernel, weight = (tf.constant(rng.normal(size=size), tf.float32) for size in ([3, 3, 2, 4], [4, 4]))
    parameters = [tf.constant(rng.uniform(0.5, 1.5, 4), tf.float32) for _ in range(4)]

    @tf.function(input_signature=[tf.TensorSpec([None, 6, 6, 2], name="images")], autograph=False)
    def run(images):
        y = v1.nn.fused_batch_norm(tf.nn.conv2d(images, kernel, 1, "SAME"), *parameters, is_training=False)[0]
        start = (0, tf.reduce_mean(y, [1, 2]))
        return tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, tf.tanh(tf.matmul(x, weight))), start)[1]

    return run.get_concrete_function().graph.as_graph_def()


def test_a_loop_in_a_checkpoint_and_a_result_called_identity(tmp_path):
    graph = looping_graph()
    assert any(node.name == "Identity" for node in graph.node)
    images = np.random.default_rng(0).normal(size=(2, 6, 6, 2)).astype("float32")
    with tf.Graph().as_default(), v1.Session() as session:
        tf.import_graph_def(graph, name="")
        expected = session.run("Identity:0", {"images:0": images})
    prefix, report = fusedconvbn.fold(graph, tmp_path / "folded", outputs=["Identity"], to="checkpoint")
    assert len(report.folded) == 1
    found = run_checkpoint(prefix, ["Identity:0"])({"images:0": images})
    np.testing.assert_allclose(found["Identity:0"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "name", "to", "kind"),
    [
        ("saved_model", "new", None, "saved_model"),
        ("saved_model", "new.pb", None, "frozen"),
        ("checkpoint", "new.pbtxt", None, "frozen"),
        ("frozen", "new.1", "saved_model", "saved_model"),
        ("keras", "new.h5", None, "keras"),
        ("keras", "new.pb", None, "frozen"),
        ("keras", "new.ckpt", "checkpoint", "checkpoint"),
    ],
)
def test_kind_to_write(source, name, to, kind):
    assert writers.kind_to_write(name, to, source) == kind


@pytest.mark.parametrize(
    ("source", "name", "to", "argument"),
    [
        ("frozen", "new.keras", None, "destination"),
        ("frozen", "new", None, "destination"),
        ("frozen", "new", "keras", "to"),
        ("saved_model", "new", "frozen", "destination"),
        ("saved_model", "new.pb", "saved_model", "destination"),
        ("saved_model", "new.h5", None, "destination"),
        ("keras", "new", None, "destination"),
        ("keras", "new.keras", "checkpoint", "destination"),
        ("keras", "new.pb", "keras", "destination"),
    ],
)
def test_suffix_of_another_kind(source, name, to, argument):
    received = to if argument == "to" else name
    with pytest.raises(ValueError, match=rf"`{argument}` must be.*Received: {argument}='{received}'"):
        writers.kind_to_write(name, to, source)


@pytest.mark.parametrize("kind", ["keras", "checkpoint"])
def test_freeze_where_variables_stay(kind):
    with pytest.raises(ValueError, match="`freeze` must be left out"):
        writers.kind_to_write("new.keras" if kind == "keras" else "new", kind, "keras", freeze=True)


def test_the_suffix_says_the_kind(tmp_path):
    path, _ = fusedconvbn.fold(looping_graph(), tmp_path / "new.pbtxt", outputs=["Identity"])
    assert "node {" in Path(path).read_text()
    with pytest.raises(ValueError, match="suffix of a Keras model"):
        fusedconvbn.fold(path, tmp_path / "new.keras", outputs=["Identity"])


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def fail(frozen, prefix, meta):
        Path(f"{prefix}.meta").write_bytes(b"half")
        raise ValueError("no space")

    monkeypatch.setattr(writers, "write_checkpoint", fail)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="no space"):
        fusedconvbn.fold(looping_graph(), tmp_path / "there" / "new" / "deep" / "folded", to="checkpoint", verify=False)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
