"""Loops and conditions that read variables: they stay, what stands around them folds."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from fold_files import control_flow
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import fusedconvbn

layers = keras.layers


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def positive(shape, seed=0):
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype("float32")


class Looping(tf.Module):
    """A convolution and a batch norm, then what a subclass does."""

    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(0.3 * normal([3, 3, 4, 4]))
        self.vector, self.other = tf.Variable(positive([4], 1)), tf.Variable(positive([4], 2))

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 4]), tf.TensorSpec([], tf.int32)])
    def __call__(self, x, n):
        y = tf.nn.conv2d(x, self.kernel, 1, "SAME")
        args = self.vector, self.other, self.other, self.vector
        return self.then(tf.compat.v1.nn.fused_batch_norm(y, *args, is_training=False)[0], n)


class Nested(Looping):
    def then(self, y, n):
        for i in tf.range(n):
            if i > 1:
                y = tf.tanh(y * self.vector)
            else:
                y = y + self.other
                while tf.reduce_mean(y) < 1.0:
                    y = y + self.vector * 0.1
        return y


class Chosen(Looping):
    def then(self, y, n):
        last = tf.switch_case(n, [lambda: y * self.vector, lambda: y + self.other, lambda: y - self.vector])
        return last + tf.cond(n > 1, lambda: self.vector * 1.0, lambda: self.other * 1.0)


class Called(Looping):
    """A function inside a loop, and one body for two loops."""

    @tf.function
    def inner(self, y):
        return y * self.vector

    def then(self, y, n):
        for size in (n, n + 1):
            step = lambda i, z: (i + 1, self.inner(z) - self.other)  # noqa: E731
            _, y = tf.while_loop(lambda i, z, size=size: i < size, step, [0, y])
        return y


class Writing(Looping):
    def then(self, y, n):
        for _ in tf.range(n):
            self.vector.assign_add(self.other)
            y = y * self.vector
        return y


class Gathering(Looping):
    def then(self, y, n):
        for i in tf.range(n):
            y = y + tf.gather(self.vector, i)
        return y


def signature(path):
    return tf.saved_model.load(str(path)).signatures["serving_default"]


@pytest.mark.parametrize("made", [Nested, Chosen, Called])
def test_variables_of_loops_and_conditions(made, tmp_path):
    tf.saved_model.save(made(), str(tmp_path / "saved"))
    _, report = fusedconvbn.fold(str(tmp_path / "saved"), str(tmp_path / "folded"))
    assert (len(report.folded), report.kept) == (1, [])
    original, folded = signature(tmp_path / "saved"), signature(tmp_path / "folded")
    results = []
    for n in range(4):
        feeds = {"x": tf.constant(normal([2, 8, 8, 4], 5)), "n": tf.constant(n)}
        ((expected, found),) = zip(original(**feeds).values(), folded(**feeds).values(), strict=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        results.append(float(np.sum(expected)))
    assert len(set(results)) > 2  # so all ways were taken


def test_recurrent_layers(tmp_path):
    keras.utils.set_random_seed(0)
    recurrent = [layers.LSTM(5, return_sequences=True), layers.GRU(4), layers.Dense(3)]
    model = keras.Sequential(
        [keras.Input((10, 8, 3)), layers.Conv2D(6, 3), layers.BatchNormalization(), layers.Reshape((8, 36)), *recurrent]
    )
    norm = model.layers[1]
    norm.set_weights([positive([6], seed) for seed in range(4)])
    model.export(str(tmp_path / "saved"), verbose=False)
    _, report = fusedconvbn.fold(str(tmp_path / "saved"), str(tmp_path / "folded"))
    assert (len(report.folded), report.kept) == (1, [])
    x = normal([3, 10, 8, 3])
    expected = model.predict(x, verbose=0)
    (found,) = signature(tmp_path / "folded")(tf.constant(x)).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 1e-2


@pytest.mark.parametrize(
    ("made", "message"), [(Writing, "one with AssignAddVariableOp"), (Gathering, "one with ResourceGather")]
)
def test_what_else_is_done_with_them_is_refused(made, message, tmp_path):
    tf.saved_model.save(made(), str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=message):
        fusedconvbn.fold(str(tmp_path / "saved"), str(tmp_path / "folded"))
    assert not (tmp_path / "folded").exists()


def gru_behind_a_convolution():
    keras.utils.set_random_seed(1)
    chain = [layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization(), layers.Reshape((10, 32)), layers.GRU(4)]
    model = keras.Sequential([keras.Input((10, 8, 3)), *chain])
    model.layers[1].set_weights([positive([4], seed) for seed in range(4)])
    return model


@pytest.mark.parametrize("lowered", [False, True], ids=["functional", "lowered"])
def test_frozen_loops(lowered, tmp_path):
    """Lowered, as by default: constants of the body name its frame by way of a NoOp."""
    model = gru_behind_a_convolution()
    call = tf.function(lambda images: model(images, training=False))
    spec = tf.TensorSpec([None, 10, 8, 3])
    frozen = convert_variables_to_constants_v2(call.get_concrete_function(spec), lower_control_flow=lowered)
    graph = frozen.graph.as_graph_def()
    assert any(node.op == "Enter" for node in graph.node) == lowered
    x = normal([2, 10, 8, 3])
    folded, report = fusedconvbn.fold(graph)
    assert (len(report.folded), report.kept, report.verification.verdict) == (1, [], "ok")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(folded, name="")
        found = session.run(frozen.outputs[0].name, {frozen.inputs[0].name: x})
    np.testing.assert_allclose(found, model.predict(x, verbose=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_resource", [False, True], ids=["reference", "resource"])
def test_variables_of_loops_of_tensorflow_1(use_resource, tmp_path):
    x = normal([2, 8, 6, 3])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session, control_flow(version_2=False):
        images = tf.compat.v1.placeholder(tf.float32, [None, 8, 6, 3], "images")
        args = (tf.constant(positive([4], seed)) for seed in range(4))
        z = tf.nn.conv2d(images, normal([3, 3, 3, 4]), 1, "SAME")
        z = tf.compat.v1.nn.fused_batch_norm(z, *args, is_training=False)[0]
        matrix = tf.compat.v1.get_variable("matrix", initializer=0.3 * normal([4, 4]), use_resource=use_resource)
        body = lambda i, h: (i + 1, tf.tanh(tf.matmul(h, matrix)))  # noqa: E731
        _, h = tf.compat.v1.while_loop(lambda i, _: i < 5, body, (0, tf.reduce_mean(z, [1, 2])))
        output = tf.identity(h, name="output")
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "model"))
        expected = session.run(output, {images: x})
    prefix, report = fusedconvbn.fold(str(tmp_path / "model"), str(tmp_path / "folded"), outputs=["output"])
    assert (len(report.folded), report.kept, report.verification.verdict) == (1, [], "ok")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.train.import_meta_graph(f"{prefix}.meta").restore(session, prefix)
        found = session.run("output:0", {"images:0": x})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
