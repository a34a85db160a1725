"""What users have in Keras models besides plain layers: precision policies, wrapped batch norms, several outputs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from fold_models import calibrate

import fusedconvbn

layers = keras.layers
SIZE = (16, 16, 3)


class Renamed(layers.BatchNormalization):
    pass


def chain(x, filters=8):
    return layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(x)))


def images(batch=2):
    return np.random.default_rng(3).normal(size=(batch, *SIZE)).astype("float32")


def mixed(policy):
    """As Keras's guide has it: all but the last layer in 16 bits."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input(SIZE)
        x = layers.Flatten()(layers.AveragePooling2D(4)(chain(chain(inputs))))
        return calibrate(keras.Model(inputs, layers.Dense(4, dtype="float32")(x)), seed=1)
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("form", ["model", "saved_model"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_float32_head_on_16_bits(policy, form, tmp_path):
    model = mixed(policy)
    if form == "model":
        folded, report = fusedconvbn.fold(model)
        found = folded(images()).numpy()
    else:
        model.export(str(tmp_path / "saved"), verbose=False)
        path, report = fusedconvbn.fold(str(tmp_path / "saved"), str(tmp_path / "folded"))
        (found,) = tf.saved_model.load(path).signatures["serving_default"](tf.constant(images())).values()
    assert (len(report.folded), report.kept) == (2, [])
    assert report.verification.verdict != "failed"
    expected = model(images()).numpy()
    assert expected.dtype == np.float32
    assert (
        np.abs(found - expected).max()
        < {"mixed_float16": 1e-2, "mixed_bfloat16": 5e-2}[policy] * np.abs(expected).max()
    )


def test_batch_norms_that_no_layer_of_the_graph_is_are_in_the_report():
    inputs = keras.Input((5, *SIZE))
    x = layers.TimeDistributed(layers.BatchNormalization(name="wrapped"))(
        layers.TimeDistributed(layers.Conv2D(4, 3))(inputs)
    )
    x = Renamed(name="renamed")(layers.Conv2D(4, 3)(layers.Reshape((14 * 5, 14, 4))(x)))
    report = fusedconvbn.inspect(keras.Model(inputs, chain(x)))
    assert len(report.folded) == 1
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert set(reasons) == {"wrapped", "renamed"}
    assert "inside TimeDistributed" in reasons["wrapped"]
    assert "a class of its own" in reasons["renamed"]


def test_depthwise_layers_of_ours_stay_depthwise(tmp_path):
    """Two in a row: of what stands in the first one's place no shape is known."""
    keras.utils.set_random_seed(2)
    inputs = x = keras.Input(SIZE)
    for _ in range(2):
        x = layers.ReLU()(layers.BatchNormalization()(layers.DepthwiseConv2D(3)(x)))
    model = fusedconvbn.fuse(keras.Model(inputs, x))
    model.export(str(tmp_path / "saved"), verbose=False)
    path, report = fusedconvbn.fold(str(tmp_path / "saved"), str(tmp_path / "folded"))
    assert len(report.folded) == 2
    signature = tf.saved_model.load(path).signatures["serving_default"]
    kinds = [operation.type for operation in signature.graph.get_operations()]
    assert (kinds.count("DepthwiseConv2dNative"), kinds.count("Conv2D")) == (2, 0)


@pytest.fixture(scope="module")
def two_outputs(tmp_path_factory):
    inputs = keras.Input(SIZE)
    x = chain(inputs)
    outputs = {
        "mean": layers.GlobalAveragePooling2D(name="mean")(x),
        "scores": layers.Dense(3, name="scores")(layers.Flatten()(x)),
    }
    path = str(tmp_path_factory.mktemp("two") / "saved")
    keras.Model(inputs, outputs).export(path, verbose=False)
    return path


@pytest.mark.parametrize(
    ("wanted", "left"), [("serving_default", ["mean", "scores"]), ("mean", ["mean"]), ("scores", ["scores"])]
)
def test_outputs_by_the_names_of_signatures(wanted, left, two_outputs, tmp_path):
    path, report = fusedconvbn.fold(two_outputs, str(tmp_path / "folded"), outputs=[wanted])
    assert len(report.folded) == 1
    signature = tf.saved_model.load(path).signatures["serving_default"]
    assert sorted(signature.structured_outputs) == left
    expected = tf.saved_model.load(two_outputs).signatures["serving_default"](tf.constant(images()))
    for name, found in signature(tf.constant(images())).items():
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-5)


def test_unknown_outputs_are_refused_with_what_there_is(two_outputs):
    with pytest.raises(ValueError, match=r"`outputs` must be .*serving_default \(mean, scores\).*Received: .*nothing"):
        fusedconvbn.inspect(two_outputs, outputs=["nothing"])
