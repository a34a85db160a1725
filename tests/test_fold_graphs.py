"""`fold` on graphs: our own op, channels first, inputs that are cut out, constants for variables."""

from __future__ import annotations

from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from fold_files import distance, run_graph, run_saved_model
from fold_frozen import FOLD_SOURCES

import fusedconvbn
from fusedconvbn import fused_conv_bn
from fusedconvbn.folding.saved_model import read_meta_graph

v1 = tf.compat.v1
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "elu", "silu", "hard_swish", "gelu")


def statistics(rng, channels, dtype="float32"):
    gamma, beta, mean = rng.normal(size=(3, channels)).astype(dtype)
    return gamma, beta, mean, rng.uniform(0.3, 3, channels).astype(dtype)


def fused_graph(shape=(3, 3, 4, 6), dtype="float32", residual=False, **arguments):
    """A graph of one FusedConvBN node, and what to feed to it."""
    rng = np.random.default_rng(2)
    filters = rng.normal(size=shape).astype(dtype)
    images = rng.normal(size=(2, 9, 8, 4)).astype(dtype)
    stat = "float64" if dtype == "float64" else "float32"
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(dtype, [None, 9, 8, 4], "input")
        parameters = statistics(rng, shape[3], stat)
        added = tf.nn.relu(tf.pad(x, [[0, 0], [0, 0], [0, 0], [0, 2]])) if residual else None
        y = fused_conv_bn(x, filters, *parameters, added, **arguments)
        tf.identity(y.output, name="output")
    return graph.as_graph_def(), {"input:0": images}


def kinds(graph_def) -> Counter:
    return Counter(node.op for node in graph_def.node)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_op(activation):
    graph_def, feeds = fused_graph(activation=activation, padding="SAME", residual=True)
    folded, report = fusedconvbn.fold(graph_def)
    assert (len(report.folded), len(report.kept)) == (1, 0)
    assert report.folded[0].name == "FusedConvBN"
    expected = run_graph(graph_def, ["output:0"])(feeds)["output:0"]
    assert distance(run_graph(folded, ["output:0"])(feeds)["output:0"], expected) < 1e-5
    assert not {"FusedConvBN", "FusedBatchNormV3"} & kinds(folded).keys()


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"shape": (3, 3, 1, 8), "strides": 2}, "DepthwiseConv2dNative"),
        ({"shape": (3, 3, 1, 4), "strides": (2, 1)}, "Conv2D"),
        ({"shape": (3, 3, 2, 6)}, "Conv2D"),
        ({"padding": [(1, 2), (0, 3)]}, "Conv2D"),
        ({"dilations": 2, "padding": "SAME"}, "Conv2D"),
        ({"dtype": "float64"}, "Conv2D"),
        ({"dtype": "bfloat16"}, "Conv2D"),
    ],
)
def test_fused_op_of_every_convolution(arguments, kind):
    graph_def, feeds = fused_graph(activation="relu", **arguments)
    folded, report = fusedconvbn.fold(graph_def)
    assert len(report.folded) == 1
    assert kinds(folded)[kind] == 1
    expected = run_graph(graph_def, ["output:0"])(feeds)["output:0"].astype("float64")
    limit = 3e-2 if arguments.get("dtype") == "bfloat16" else 1e-5
    assert distance(run_graph(folded, ["output:0"])(feeds)["output:0"].astype("float64"), expected) < limit


def test_fused_op_in_training_is_kept():
    graph_def, _ = fused_graph(training=True)
    folded, report = fusedconvbn.fold(graph_def)
    assert "training" in report.kept[0].reason
    assert kinds(folded)["FusedConvBN"] == 1


def test_fused_layer_in_a_saved_model(tmp_path):
    inputs = keras.Input((9, 8, 4))
    x = fusedconvbn.FusedConvBN(6, 3, activation="relu", use_bias=True)(inputs)
    model = keras.Model(inputs, fusedconvbn.FusedConvBN(6, 3, padding="same", activation="gelu")(x, residual=x))
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.3, 2, w.shape) for w in model.get_weights()])
    model.export(tmp_path / "exported", verbose=False)
    path, report = fusedconvbn.fold(tmp_path / "exported", tmp_path / "folded")
    assert (len(report.folded), len(report.kept)) == (2, 0)
    images = rng.normal(size=(2, 9, 8, 4)).astype("float32")
    (name,) = tf.saved_model.load(path).signatures["serving_default"].structured_input_signature[1]
    (found,) = run_saved_model(path)({name: images}).values()
    assert distance(found, model(images, training=False).numpy()) < 1e-5
    assert not any("Fused" in kind for kind in kinds(read_meta_graph(tmp_path / "folded", None).graph_def))


def test_channels_first():
    """What TensorFlow's CPU kernels do not all run: the weights must be those of the same graph with channels last."""
    rng = np.random.default_rng(3)
    kernel, parameters = rng.normal(size=(3, 3, 4, 6)).astype("float32"), statistics(rng, 6)
    found = {}
    for layout in ("NHWC", "NCHW"):
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.float32, [None, 9, 8, 4] if layout == "NHWC" else [None, 4, 9, 8], "input")
            z = tf.nn.conv2d(x, kernel, 1, "SAME", data_format=layout)
            y = v1.nn.fused_batch_norm(z, *parameters, data_format=layout, is_training=False)[0]
            tf.nn.relu(y, name="output")
        folded, report = fusedconvbn.fold(graph.as_graph_def(), verify=False)
        assert len(report.folded) == 1
        found[layout] = sorted(
            (tf.make_ndarray(node.attr["value"].tensor) for node in folded.node if node.op == "Const"), key=np.ndim
        )
        assert [n.attr["data_format"].s.decode() for n in folded.node if n.op == "BiasAdd"] == [layout]
    for last, first in zip(found["NHWC"], found["NCHW"], strict=True):
        np.testing.assert_array_equal(last, first)


def test_an_inner_tensor_becomes_the_input():
    with tf.Graph().as_default() as graph:
        raw = v1.placeholder(tf.string, [], "file")
        decoded = tf.io.decode_jpeg(raw, channels=3)
        images = tf.expand_dims(tf.cast(decoded, tf.float32), 0, name="Mul")
        rng = np.random.default_rng(0)
        z = tf.nn.conv2d(images, rng.normal(size=(3, 3, 3, 5)).astype("float32"), 2, "VALID")
        z = tf.debugging.check_numerics(tf.identity(z), "bad")
        y = v1.nn.fused_batch_norm(z, *statistics(rng, 5), is_training=False)[0]
        tf.nn.softmax(tf.reduce_mean(y, [1, 2]), name="softmax")
        tf.reduce_sum(y, name="unused")
    folded, report = fusedconvbn.fold(graph.as_graph_def(), inputs={"Mul": (1, 19, 19, 3)}, outputs=["softmax"])
    assert len(report.folded) == 1
    assert report.verification.verdict == "ok"
    assert set(kinds(folded)) == {"Placeholder", "Const", "Conv2D", "BiasAdd", "Mean", "Softmax"}
    (placeholder,) = (node for node in folded.node if node.op == "Placeholder")
    assert (placeholder.name, [d.size for d in placeholder.attr["shape"].shape.dim]) == ("Mul", [1, 19, 19, 3])


def test_freeze(tmp_path):
    file = FOLD_SOURCES["saved_resource_variables"](tmp_path)
    path, _ = fusedconvbn.fold(file.path, tmp_path / "folded", freeze=True)
    assert not {"VarHandleOp", "VariableV2"} & kinds(read_meta_graph(tmp_path / "folded", None).graph_def).keys()
    name = next(iter(file.expected))
    assert distance(run_saved_model(path)(file.images)[name], file.expected[name]) < 1e-4


@pytest.mark.parametrize("to", ["saved_model", "frozen", "checkpoint"])
@pytest.mark.parametrize("source", ["norm_standard", "checkpoint_reference_variables", "saved_two_signatures"])
def test_to_another_kind(source, to, tmp_path):
    file = FOLD_SOURCES[source](tmp_path)
    path, report = fusedconvbn.fold(file.path, tmp_path / ("folded.pb" if to == "frozen" else "folded"), to=to)
    assert len(report.folded) == file.foldable
    again = fusedconvbn.inspect(path)
    assert (len(again.folded), len(again.kept)) == (0, 0)


@pytest.mark.parametrize("name", ["saved_two_signatures", "saved_keras_export"])
def test_signatures_of_objects(name, tmp_path):
    file = FOLD_SOURCES[name](tmp_path)
    path, _ = fusedconvbn.fold(file.path, tmp_path / "folded")
    for each in (file, *file.others):
        found = run_saved_model(path, each.signature)(each.images)
        for output, expected in each.expected.items():
            assert distance(found[output], expected) < 1e-4


def test_the_source_graph_stays(tmp_path):
    graph_def, _ = fused_graph()
    before = graph_def.SerializeToString(deterministic=True)
    fusedconvbn.fold(graph_def)
    assert graph_def.SerializeToString(deterministic=True) == before


def test_the_destination_is_the_source(tmp_path):
    graph_def, _ = fused_graph()
    (tmp_path / "a.pb").write_bytes(graph_def.SerializeToString())
    with pytest.raises(ValueError, match="another path than the source"):
        fusedconvbn.fold(tmp_path / "a.pb", tmp_path / "x" / ".." / "a.pb", overwrite=True)


def test_a_padding_with_a_value_is_saved_with_a_keras_model(tmp_path):
    inputs = keras.Input((6, 5, 1))
    x = keras.layers.BatchNormalization()(inputs)
    model = keras.Model(inputs, keras.layers.Conv2D(5, 3, padding="same")(x))
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.3, 2, w.shape) for w in model.get_weights()])
    path, report = fusedconvbn.fold(model, tmp_path / "folded.keras")
    assert len(report.folded) == 1
    images = rng.normal(size=(2, 6, 5, 1)).astype("float32")
    loaded = keras.models.load_model(path)
    assert distance(loaded(images).numpy(), model(images, training=False).numpy()) < 1e-5
