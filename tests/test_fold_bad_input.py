"""`fold` on what it cannot take: a clear error or an honest report, no half-written result, the source as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from fold_frozen import FOLD_SOURCES

import fusedconvbn
from fusedconvbn.folding.affine import AffineMap

v1 = tf.compat.v1


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def graph_def(build) -> v1.GraphDef:
    with tf.Graph().as_default() as graph:
        build(v1.placeholder(tf.float32, [None, 6, 5, 4], "input"))
    return graph.as_graph_def()


def conv_and_norm(x, variance=None, gamma=None):
    rng = np.random.default_rng(0)
    z = tf.nn.conv2d(x, tf.constant(rng.normal(size=(3, 3, 4, 2)), tf.float32), 1, "SAME")
    variance = np.ones(2) if variance is None else variance
    gamma = np.ones(2) if gamma is None else gamma
    arrays = [np.asarray(v, "float32") for v in (gamma, rng.normal(size=2), rng.normal(size=2), variance)]
    y = v1.nn.fused_batch_norm(z, *arrays, is_training=False)[0]
    return tf.nn.relu(y, name="output")


@pytest.mark.parametrize("name", ["missing.pb", "missing.keras", "missing", "missing/"])
def test_missing(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source.*Received"):
        fusedconvbn.fold(str(tmp_path / name), tmp_path / "new")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["a.pb", "a.pbtxt", "a.keras", "a.h5", "saved_model.pb", "a.meta"])
def test_foreign(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x93NUMPY, and nothing of what it should be: \xff\xfe\x00")
    source = tmp_path if name == "saved_model.pb" else tmp_path / name
    with pytest.raises(ValueError, match=r"`source` must.*Received"):
        fusedconvbn.fold(source, tmp_path / "new")
    assert list(tree(tmp_path)) == [name]


@pytest.mark.parametrize("name", ["frozen_text", "norm_fused", "checkpoint_reference_variables", "saved_simple"])
def test_truncated(name, tmp_path):
    file = FOLD_SOURCES[name](tmp_path)
    for path in [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 300]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"`source` must.*Received"):
        fusedconvbn.fold(file.path, tmp_path / "new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoint_reference_variables", "saved_simple"])
def test_truncated_values(name, tmp_path):
    file = FOLD_SOURCES[name](tmp_path)
    for path in tmp_path.rglob("*.data-*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"`source` must be a whole checkpoint.*Received"):
        fusedconvbn.fold(file.path, tmp_path / "new")


def test_truncated_keras_file(tmp_path):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).save(tmp_path / "a.keras")
    whole = (tmp_path / "a.keras").read_bytes()
    (tmp_path / "a.keras").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="`source` must be a whole Keras model"):
        fusedconvbn.fold(tmp_path / "a.keras", tmp_path / "b.keras")


def test_a_checkpoint_lacks_a_variable(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "input")
        kernel = v1.get_variable("kernel", [4, 3], use_resource=True)
        v1.get_variable("other", [2], use_resource=True)
        tf.nn.relu(tf.matmul(x, kernel), name="output")
        session.run(v1.global_variables_initializer())
        meta = v1.train.export_meta_graph(str(tmp_path / "model.meta"))
        assert meta.graph_def.node
        v1.train.Saver([v for v in v1.global_variables() if v.op.name == "other"]).save(
            session, str(tmp_path / "model"), write_meta_graph=False
        )
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="lacks 'kernel'"):
        fusedconvbn.fold(tmp_path / "model", tmp_path / "new")
    assert tree(tmp_path) == before


def test_no_batch_norm():
    graph = graph_def(lambda x: tf.nn.relu(tf.nn.conv2d(x, tf.ones([1, 1, 4, 2]), 1, "SAME"), name="output"))
    _, report = fusedconvbn.fold(graph)
    assert report.folded == report.kept == []
    assert "no batch norm" in str(report)


@pytest.mark.parametrize("variance", [[1.0, -1.0], [1.0, np.nan]])
def test_no_variance(variance):
    result, report = fusedconvbn.fold(graph_def(lambda x: conv_and_norm(x, variance)))
    assert len(report.kept) == 1
    assert "variance" in report.kept[0].reason
    assert any(node.op == "FusedBatchNormV3" for node in result.node)


def test_parameters_that_are_not_finite():
    _, report = fusedconvbn.fold(graph_def(lambda x: conv_and_norm(x, gamma=[1.0, np.inf])))
    assert [entry.reason for entry in report.kept] == ["its parameters are not all finite"]


def test_unknown_ops_are_left_as_they_are():
    graph = graph_def(conv_and_norm)
    graph.node.add(name="strange", op="NoSuchOp", input=["output"])
    with pytest.raises(ValueError, match=r"verify.*NoSuchOp"):
        fusedconvbn.fold(graph)
    result, report = fusedconvbn.fold(graph, verify=False)
    assert len(report.folded) == 1
    assert [(node.op, list(node.input)) for node in result.node if node.name == "strange"] == [("NoSuchOp", ["output"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": ["nowhere"]}, "`outputs` must be.*its results: output.*nowhere"),
        ({"outputs": ["output:1"]}, "`outputs` must be.*its results: output"),
        ({"outputs": ["output:x"]}, "`outputs` must be names of tensors"),
        ({"outputs": "output"}, "lists of names"),
        ({"inputs": ["nowhere"]}, "`inputs` must be.*its placeholders: input.*nowhere"),
        ({"inputs": {"input:1,a,3": None}}, "`inputs` must be names of tensors"),
        ({"inputs": {"input": (1, 6, 5)}}, r"inputs\['input'\].*\(None, 6, 5, 4\).*\(1, 6, 5\)"),
        ({"inputs": {"input": (1, 6, 5, 3)}}, r"inputs\['input'\].*\(None, 6, 5, 4\).*\(1, 6, 5, 3\)"),
        ({"inputs": {"Conv2D": (1, 6, 5, 3)}}, r"inputs\['Conv2D'\].*\(None, 6, 5, 2\).*\(1, 6, 5, 3\)"),
        ({"values": {"nowhere": 1}}, "`values` must be.*its placeholders: input.*nowhere"),
        ({"values": {"Conv2D": 1}}, "`values` must be.*Conv2D"),
        ({"tags": ["serve"]}, "`tags` must be left out"),
        ({"to": "onnx"}, "`to` must be.*onnx"),
        ({"to": "keras", "destination": "never"}, r"`to` must be.*keras"),
        ({"to": "saved_model"}, "destination"),
        ({"outputs": []}, "outputs"),
        ({"inputs": {"input": "1,6,5,4"}}, "inputs"),
        ({"verify": {"other": [1.0]}}, r"verify.*input:0"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"verify": "yes"}, "verify"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fusedconvbn.fold(graph_def(conv_and_norm), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"inputs": ["x"]}, {"outputs": ["y"]}, {"values": {"z": 1}}, {"tags": ["serve"]}, {"freeze": True}],
    ids=str,
)
def test_arguments_without_effect_on_a_keras_model(arguments, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        fusedconvbn.fold(model, tmp_path / "new.keras", **arguments)
    if name != "freeze":
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            fusedconvbn.inspect(model, **arguments)
    assert tree(tmp_path) == {}


def test_a_source_of_no_kind():
    with pytest.raises(TypeError, match=r"source.*Received"):
        fusedconvbn.fold(3.5)


def test_a_subclassed_model():
    class Model(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="export"):
        fusedconvbn.fold(Model())


def test_the_destination_exists(tmp_path):
    (tmp_path / "new.pb").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        fusedconvbn.fold(graph_def(conv_and_norm), tmp_path / "new.pb")
    assert (tmp_path / "new.pb").read_text() == "mine"
    fusedconvbn.fold(graph_def(conv_and_norm), tmp_path / "new.pb", overwrite=True)
    assert list(tree(tmp_path)) == ["new.pb"]
    v1.GraphDef.FromString((tmp_path / "new.pb").read_bytes())


def test_a_graph_that_writes_to_its_variables(tmp_path):
    class Counting(tf.Module):
        def __init__(self):
            super().__init__()
            self.count = tf.Variable(1.0)

        @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, "x")])
        def __call__(self, x):
            self.count.assign_add(1.0)
            return {"y": x * self.count}

    module = Counting()
    tf.saved_model.save(module, str(tmp_path / "saved"), {"serving_default": module.__call__})
    with pytest.raises(ValueError, match="changes none of its variables"):
        fusedconvbn.fold(tmp_path / "saved")


class TestVerification:
    @pytest.fixture
    def wrong_gamma(self, monkeypatch):
        """One gamma of each batch norm is 1 % larger for `fold` than it is."""
        right = AffineMap.of_batch_norm

        def wrong(gamma, *others):
            gamma = np.array(gamma)
            gamma[0] *= 1.01
            return right(gamma, *others)

        monkeypatch.setattr(AffineMap, "of_batch_norm", staticmethod(wrong))

    def test_one_gamma_is_wrong(self, tmp_path, wrong_gamma):
        with pytest.raises(fusedconvbn.VerificationError, match="differs"):
            fusedconvbn.fold(graph_def(conv_and_norm), tmp_path / "new.pb")
        assert tree(tmp_path) == {}

    def test_one_gamma_of_a_large_model_is_wrong(self, tmp_path, wrong_gamma):
        from fold_models import application

        with pytest.raises(fusedconvbn.VerificationError, match="differs"):
            fusedconvbn.fold(application("MobileNetV2"), tmp_path / "new.keras")
        assert tree(tmp_path) == {}

    def test_an_output_that_does_not_depend_on_its_input(self):
        def blind(x):
            return tf.add(0.0 * tf.reduce_sum(conv_and_norm(x), [1, 2]), 3.0, name="blind")

        _, report = fusedconvbn.fold(graph_def(blind), outputs=["blind"])
        assert report.verification.verdict == "inconclusive"
        assert "blind" in str(report)

    def test_given_inputs(self):
        images = np.random.default_rng(0).normal(size=(3, 6, 5, 4)).astype("float32")
        _, report = fusedconvbn.fold(graph_def(conv_and_norm), verify={"input": images})
        assert report.verification.verdict == "ok"

    def test_inputs_that_cannot_be_made_up(self):
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.string, [None], "input")
            tf.reshape(tf.io.decode_raw(x, tf.float32), [-1, 6, 5, 4])
        _, report = fusedconvbn.fold(graph.as_graph_def())
        assert report.verification.verdict == "inconclusive"


class TestCommand:
    def run(self, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "fusedconvbn", *map(str, arguments)], capture_output=True, text=True, check=False
        )

    def test_fold_and_inspect(self, tmp_path):
        (tmp_path / "a.pb").write_bytes(graph_def(conv_and_norm).SerializeToString())
        done = self.run(
            "fold", tmp_path / "a.pb", tmp_path / "deep" / "b.pbtxt", "--inputs", "input:1,6,5,4",
            "--outputs", "output", "--report", tmp_path / "report.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "1 of 1 batch norms folded" in done.stdout
        assert '"into"' in (tmp_path / "report.json").read_text()
        text = (tmp_path / "deep" / "b.pbtxt").read_text()
        assert "FusedBatchNorm" not in text
        looked = self.run("inspect", tmp_path / "a.pb")
        assert looked.returncode == 0
        assert "into Conv2D" in looked.stdout

    def test_errors(self, tmp_path):
        done = self.run("fold", tmp_path / "nothing.pb", tmp_path / "b.pb")
        assert done.returncode == 1
        assert "nothing.pb" in done.stderr
        assert "Traceback" not in done.stderr
        assert self.run("fold").returncode == 2

    def test_info(self):
        done = self.run("info")
        assert done.returncode == 0
        assert "tensorflow 2.21" in done.stdout
        assert "instruction sets" in done.stdout
