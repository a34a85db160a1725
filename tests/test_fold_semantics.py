"""What `fold` must not take for training, for dropout or for a constant, and what it must leave alone."""

from __future__ import annotations

from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from fold_files import control_flow, distance, run_graph

import fusedconvbn
from fusedconvbn.folding.verifying import difference

v1 = tf.compat.v1
RNG = np.random.default_rng(11)
SHAPE = [None, 6, 5, 4]


def normed(x, channels=3):
    """A convolution and its batch norm."""
    gamma, beta, mean = RNG.normal(size=(3, channels)).astype("float32")
    variance = RNG.uniform(0.5, 2, channels).astype("float32")
    kernel = RNG.normal(size=(3, 3, int(x.shape[-1]), channels)).astype("float32")
    z = tf.nn.conv2d(x, kernel, 1, "SAME")
    return v1.nn.fused_batch_norm(z, gamma, beta, mean, variance, is_training=False)[0]


def graph_def(build):
    with tf.Graph().as_default() as graph:
        tf.identity(build(v1.placeholder(tf.float32, SHAPE, "input")), name="output")
    return graph.as_graph_def()


def images(scale=1.0):
    return (scale * RNG.normal(size=(2, 6, 5, 4))).astype("float32")


@pytest.mark.parametrize("name", ["sample_rate", "constrained", "generated", "latest", "backdrop"])
def test_an_input_whose_name_holds_a_word_of_training(name):
    graph = graph_def(lambda x: normed(x) + 2 * v1.placeholder(tf.float32, [], name))
    folded, report = fusedconvbn.fold(graph)
    assert report.bound == {}
    assert name in {node.name for node in folded.node if node.op == "Placeholder"}


def test_a_predicate_that_is_data():
    graph = graph_def(lambda x: normed(x) * tf.cast(v1.placeholder(tf.bool, [], "training"), tf.float32))
    folded, report = fusedconvbn.fold(graph)
    assert report.bound == {}
    assert "training" in {node.name for node in folded.node}


def test_what_is_set_is_told():
    def build(x):
        keep = v1.placeholder(tf.float32, [], "keep_prob")
        return v1.nn.dropout(normed(x), keep_prob=keep)

    _, report = fusedconvbn.fold(graph_def(build))
    assert report.bound == {"keep_prob": 1.0}
    assert "keep_prob=1.0" in str(report)


def uniform(x):
    return v1.random_uniform(tf.shape(x))


# What is random and no dropout: what is scaled otherwise, a random sign, noise.
RANDOM = {
    "unscaled": lambda x: x * tf.cast(uniform(x) < 0.25, tf.float32),
    "other_scale": lambda x: (0.1 * x) * tf.cast(uniform(x) < 0.9, tf.float32),
    "sign": lambda x: x * (tf.cast(uniform(x) < 0.5, tf.float32) * 2 - 1),
    "noise": lambda x: x * v1.random_normal(tf.shape(x), 1.0, 0.1),
    "added": lambda x: x + uniform(x),
    "wide": lambda x: (x / 0.5) * tf.floor(0.5 + 2 * uniform(x)),
}
DROPOUT = {
    "floor": lambda x: (x / 0.4) * tf.floor(0.4 + uniform(x)),
    "less": lambda x: x * tf.cast(uniform(x) < 0.25, tf.float32) / 0.25,
    "greater": lambda x: (4 * x) * tf.cast(uniform(x) >= 0.75, tf.float32),
    "where": lambda x: tf.where(uniform(x) >= 0.5, x * 2, tf.zeros_like(x)),
    "keras": lambda x: tf.nn.dropout(x, rate=0.3),
    "stateless": lambda x: tf.nn.experimental.stateless_dropout(x, rate=0.3, seed=[1, 2]),
}


@pytest.mark.parametrize("name", RANDOM)
def test_no_dropout(name):
    folded, report = fusedconvbn.fold(graph_def(lambda x: tf.nn.relu(RANDOM[name](normed(x)))))
    assert report.removed["dropouts"] == 0
    assert any("Random" in node.op for node in folded.node)
    assert report.verification.verdict == "inconclusive"


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout(name):
    state = RNG.bit_generator.state
    graph = graph_def(lambda x: tf.nn.relu(DROPOUT[name](normed(x))))
    RNG.bit_generator.state = state
    without = graph_def(lambda x: tf.nn.relu(normed(x)))
    folded, report = fusedconvbn.fold(graph)
    assert report.removed["dropouts"] == 1
    assert not any("Random" in node.op for node in folded.node)
    feeds = {"input:0": images()}
    expected = run_graph(without, ["output:0"])(feeds)["output:0"]
    assert distance(run_graph(folded, ["output:0"])(feeds)["output:0"], expected) < 1e-5


def same_after(graph, *feeds):
    folded, report = fusedconvbn.fold(graph)
    assert report.verification.verdict == "ok", str(report)
    for feed in feeds:
        expected = run_graph(graph, ["output:0"])({"input:0": feed})["output:0"]
        assert distance(run_graph(folded, ["output:0"])({"input:0": feed})["output:0"], expected) < 1e-5
    return folded, report


def test_a_condition_on_data_with_a_constant_branch():
    """The constant is only alive in its branch."""

    def build(x):
        z = normed(x)
        return tf.cond(tf.reduce_mean(x) > 0, lambda: tf.constant(5.0), lambda: tf.reduce_mean(z)) + tf.reduce_max(z)

    with control_flow(False):
        graph = graph_def(build)
    feed = images()
    same_after(graph, np.abs(feed), -np.abs(feed))


@pytest.mark.parametrize("version_2", [False, True])
def test_a_loop_stays(version_2):
    def build(x):
        x = tf.map_fn(lambda image: image * 2 - 1, x)
        return tf.nn.relu(normed(x))

    with control_flow(version_2):
        graph = graph_def(build)
    _, report = same_after(graph, images())
    assert len(report.folded) == 1


def test_a_loop_in_the_branch_of_training_goes():
    def build(x):
        train = v1.placeholder(tf.bool, [], "is_training")
        z = normed(x)
        looped = lambda: tf.while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, v * 1.1), [0, z])[1]  # noqa: E731
        return tf.cond(train, looped, lambda: tf.nn.relu(z))

    with control_flow(False):
        graph = graph_def(build)
    folded, report = fusedconvbn.fold(graph)
    assert len(report.folded) == 1
    assert not {"Switch", "Merge", "Enter", "Exit"} & {node.op for node in folded.node}


def test_a_way_of_a_thousand_ops():
    def build(x):
        z = tf.nn.conv2d(x, RNG.normal(size=(3, 3, x.shape[-1], 3)).astype("float32"), 1, "VALID")
        shape = z.shape.as_list()
        for _ in range(500):
            z = tf.reshape(tf.reshape(z, [-1, shape[1] * shape[2], shape[3]]), [-1, *shape[1:]])
        return tf.nn.batch_normalization(z, *np.full([4, 1], 2, "float32"), 1e-3)

    _, report = fusedconvbn.fold(graph_def(build), verify=False)
    assert (len(report.folded), report.kept) == (1, [])


def test_a_counter_is_no_constant(tmp_path):
    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.count = tf.Variable([0.0])

        @tf.function(input_signature=[tf.TensorSpec(SHAPE, tf.float32, "x")])
        def __call__(self, x):
            tf.raw_ops.ResourceScatterAdd(resource=self.count.handle, indices=[0], updates=[1.0])
            return {"y": x + self.count[0]}

    module = Model()
    tf.saved_model.save(module, str(tmp_path / "saved"), {"serving_default": module.__call__})
    with pytest.raises(ValueError, match="changes none of its variables"):
        fusedconvbn.fold(tmp_path / "saved")


def test_an_input_that_no_result_needs_stays_in_its_signature(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x, unused = v1.placeholder(tf.float32, SHAPE, "x"), v1.placeholder(tf.float32, [None], "unused")
        v1.saved_model.simple_save(session, str(tmp_path / "saved"), {"x": x, "unused": unused}, {"y": normed(x)})
    path, _ = fusedconvbn.fold(tmp_path / "saved", tmp_path / "folded")
    signature = tf.saved_model.load(path).signatures["serving_default"]
    assert set(signature.structured_input_signature[1]) == {"x", "unused"}


def test_outputs_of_one_node_have_names_of_their_own(tmp_path):
    with tf.Graph().as_default() as graph:
        tf.split(normed(v1.placeholder(tf.float32, SHAPE, "input"), 4), 2, axis=3, name="split")
    path, _ = fusedconvbn.fold(
        graph.as_graph_def(), tmp_path / "saved", outputs=["split:0", "split:1"], to="saved_model"
    )
    assert set(tf.saved_model.load(path).signatures["serving_default"].structured_outputs) == {"split", "split_1"}


@pytest.mark.parametrize(
    ("source", "destination", "to"),
    [
        ("ck/model", "ck/model", None),
        ("ck/model.meta", "ck/model", None),
        ("ck", "ck/model", None),
        ("ck/model", "ck", "saved_model"),
    ],
)
def test_the_source_is_not_overwritten(source, destination, to, tmp_path):
    (tmp_path / "ck").mkdir()
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "input")
        tf.nn.relu(tf.matmul(x, v1.get_variable("kernel", [4, 3])), name="output")
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(tmp_path / "ck" / "model"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir()}
    with pytest.raises(ValueError, match="another path than the source"):
        fusedconvbn.fold(tmp_path / source, tmp_path / destination, to=to, overwrite=True, outputs=["output"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir()} == before


def test_a_checkpoint_beside_a_graph_is_another_matter(tmp_path):
    (tmp_path / "model.meta").write_text("mine")
    with pytest.raises(FileExistsError):
        fusedconvbn.fold(graph_def(normed), tmp_path / "model", to="saved_model")
    fusedconvbn.fold(graph_def(normed), tmp_path / "model", to="saved_model", overwrite=True)
    assert (tmp_path / "model.meta").read_text() == "mine"


def test_layers_that_assign_do_not_while_they_are_compared():
    inputs = keras.Input((6, 5, 4))
    z = keras.layers.BatchNormalization()(keras.layers.Conv2D(3, 3)(inputs))
    model = keras.Model(inputs, keras.layers.BatchNormalization()(keras.layers.ReLU()(z), training=True))
    before = [weight.numpy() for weight in model.weights]
    fusedconvbn.fold(model)
    for old, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, weight.numpy())


def test_difference():
    x = RNG.normal(size=(3, 4)).astype("float32")
    assert difference(x, x) == 0
    assert difference(x, x + 0.01 * np.abs(x).max()) == pytest.approx(0.01, rel=1e-3)
    assert difference(x, x.astype("float64")) == np.inf
    assert difference(x, x[:2]) == np.inf
    assert difference(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == np.inf
    assert difference(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == 0.25


def test_kinds_of_a_folded_graph():
    folded, _ = fusedconvbn.fold(graph_def(lambda x: tf.nn.relu(normed(x))))
    assert Counter(node.op for node in folded.node) == Counter(Placeholder=1, Const=2, Conv2D=1, BiasAdd=1, Relu=1)
