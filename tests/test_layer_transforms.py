"""`variable_transforms`: what the op sees of the variables, the gradients through it, and what it leaves alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from layer_peers import assert_close, gradients, make_peers, values

from fusedconvbn import FusedConvBN

WEIGHTS = ["kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"]


def double(value):
    return 2 * value


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_transform_is_seen_by_the_op_and_its_gradient_by_the_variable(name, training):
    peers = make_peers(activation="elu", use_bias=True, variable_transforms={name: double})
    own = values(peers.fused)
    seen = [2 * value if weight == name else value for weight, value in own.items()]
    peers.stock.set_weights(seen)
    output, ours = gradients(peers.fused, peers.images, peers.cotangent, training)
    expected, theirs = gradients(peers.stock, peers.images, peers.cotangent, training)
    assert_close(output, expected, 1e-5)
    for weight in ours.keys() - ({"bias"} if training else set()):
        assert_close(ours[weight], theirs[weight] * (2 if weight == name else 1), 3e-5, weight)


@pytest.mark.parametrize("decided", ["python", "tensor"])
@pytest.mark.parametrize("names", [["moving_mean"], ["moving_variance"], ["bias"], WEIGHTS], ids="-".join)
def test_moving_statistics_are_updated_from_their_own_values(names, decided):
    peers = make_peers(use_bias=True, variable_transforms=dict.fromkeys(names, double))
    own = values(peers.fused)
    seen = [2 * value if weight in names and "moving" not in weight else value for weight, value in own.items()]
    peers.stock.set_weights(seen)
    call = tf.function(peers.fused.layers[-1]) if decided == "tensor" else peers.fused.layers[-1]
    training = tf.constant(True) if decided == "tensor" else True
    call(tf.constant(peers.images[0]), training=training)
    peers.stock(peers.images, training=True)
    for name in ("moving_mean", "moving_variance"):
        assert_close(values(peers.fused)[name], values(peers.stock)[name], 1e-6, name)


@pytest.mark.parametrize("name", ["moving_mean", "moving_variance", "bias"])
def test_inference_decided_at_run_time_changes_nothing(name):
    peers = make_peers(use_bias=True, variable_transforms={name: double})
    before = values(peers.fused)
    output = tf.function(peers.fused.layers[-1])(tf.constant(peers.images[0]), training=tf.constant(False))
    assert_close(output, peers.fused(peers.images, training=False), 1e-6)
    assert all(np.array_equal(after, before[weight]) for weight, after in values(peers.fused).items())


QUANTIZING = tf.Variable(False, trainable=False)


def quantize(value):
    """A 4-bit grid where the variable says so."""

    def on_grid():
        return tf.quantization.fake_quant_with_min_max_args(value, -2.0, 2.0, num_bits=4)

    return tf.cond(QUANTIZING, on_grid, lambda: tf.identity(value))


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_fake_quantizer_under_a_cond(training, on):
    """Values lie on its grid, gradients pass through, statistics never notice; switched in a graph traced while off."""
    names = ("kernel", "gamma", "beta", "moving_mean", "moving_variance")
    peers = make_peers(activation="relu6", variable_transforms=dict.fromkeys(names, quantize))
    layer, own = peers.fused.layers[-1], values(peers.fused)

    @tf.function(autograph=False)
    def step(images, cotangent, training):
        with tf.GradientTape() as tape:
            output = layer(images, training=training)
        return output, tape.gradient(output, [w.value for w in layer.trainable_weights], cotangent)

    QUANTIZING.assign(False)
    step(peers.images[0], peers.cotangent, tf.constant(False))
    QUANTIZING.assign(on)
    of_training = () if not training else ("moving_mean", "moving_variance")
    peers.stock.set_weights([own[name] if name in of_training else quantize(own[name]).numpy() for name in own])
    output, ours = step(peers.images[0], peers.cotangent, tf.constant(training))
    expected, theirs = gradients(peers.stock, peers.images, peers.cotangent, training)
    assert on != np.allclose(expected, make_peers(activation="relu6").stock(peers.images, training=training), atol=1e-3)
    assert_close(output, expected, 1e-5)
    for weight, gradient in zip(layer.trainable_weights, ours, strict=True):
        assert_close(gradient, theirs[weight.name], 3e-5, weight.name)
    for name in ("moving_mean", "moving_variance"):
        assert_close(values(layer)[name], values(peers.stock)[name] if training else own[name], 1e-6, name)


def test_transforms_see_variables_in_float32_under_a_mixed_policy():
    seen = {}

    def watch(name):
        return lambda value: seen.setdefault(name, value)

    layer = FusedConvBN(4, 3, use_bias=True, dtype="mixed_bfloat16", variable_transforms={n: watch(n) for n in WEIGHTS})
    output = layer(np.ones((1, 5, 5, 3), "float32"), training=True)
    assert output.dtype == "bfloat16"
    assert {name: value.dtype.name for name, value in seen.items()} == dict.fromkeys(WEIGHTS, "float32")


class Scale(keras.layers.Layer):
    """A transform with a weight of its own."""

    def build(self, shape):
        self.factor = self.add_weight(name="factor", shape=(), initializer=keras.initializers.Constant(3.0))

    def call(self, value):
        return value * self.factor


def test_a_layer_as_transform_trains_with_the_layer():
    layer = FusedConvBN(4, 3, variable_transforms={"gamma": Scale()})
    images = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype("float32")
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(images, training=True) ** 3)
    by_name = {weight.name: weight for weight in layer.trainable_weights}
    assert list(by_name) == ["kernel", "gamma", "beta", "factor"]
    d_gamma, d_factor = tape.gradient(loss, [by_name["gamma"].value, by_name["factor"].value])
    assert_close(d_factor, tf.reduce_sum(d_gamma) / 3.0, 1e-5)  # gamma is one, the factor 3


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("kernel", lambda k: k[:1]),
        ("kernel", lambda k: k[:, :, :2]),
        ("bias", lambda b: 0.0),
        ("gamma", lambda g: None),
    ],
    ids=["window", "depth", "scalar", "nothing"],
)
def test_a_transform_that_changes_the_shape(name, transform):
    layer = FusedConvBN(6, 3, use_bias=True, variable_transforms={name: transform})
    with pytest.raises(ValueError, match=f"`variable_transforms` must be .*{name}"):
        layer(tf.ones([2, 8, 8, 4]))
