"""Who decides about training, what is frozen, and in which precision the layer computes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from layer_peers import assert_close, assert_weights_close, gradients, make_peers, random_weights, train, values

from fusedconvbn import FusedConvBN

ALL_WEIGHTS = ["kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"]


@pytest.mark.parametrize("training", [None, False, True, 0, 1, np.True_])
def test_python_training(training):
    peers = make_peers(activation="relu", use_bias=True)
    before = peers.fused.get_weights()
    output = peers.fused.layers[-1](peers.images[0], training=training)
    assert_close(output, peers.stock(peers.images, training=bool(training)), 1e-5)
    assert_weights_close(peers.fused, peers.stock, 1e-6)
    unchanged = [np.array_equal(ours, old) for ours, old in zip(peers.fused.get_weights(), before, strict=True)]
    assert unchanged == [True] * 4 + [not training] * 2


def test_training_none_follows_the_outer_layer():
    peers = make_peers()
    outer = keras.Sequential([keras.Input(peers.images[0].shape[1:]), peers.fused.layers[-1]])
    assert_close(outer(peers.images[0], training=True), peers.stock(peers.images, training=True), 1e-5)
    assert_weights_close(peers.fused, peers.stock, 1e-6)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("switch", ["argument", "variable"])
def test_one_graph_used_both_ways(switch, use_bias):
    peers = make_peers(activation="elu", use_bias=use_bias)
    layer, variable = peers.fused.layers[-1], tf.Variable(False)

    @tf.function(autograph=False)
    def run(images, training):
        with tf.GradientTape() as tape:
            output = layer(images, training=training if switch == "argument" else variable)
        return output, tape.gradient(output, layer.kernel.value)

    for training in (True, False, True):
        variable.assign(training)
        before = values(layer)
        output, gradient = run(tf.constant(peers.images[0]), tf.constant(training))
        expected, theirs = gradients(peers.stock, peers.images, np.ones_like(peers.cotangent), training)
        assert_close(output, expected, 1e-5)
        assert_close(gradient, theirs["kernel"], 3e-5)
        assert_weights_close(layer, peers.stock, 1e-6)
        if not training:
            assert all(np.array_equal(after, before[name]) for name, after in values(layer).items())
    assert run.experimental_get_tracing_count() == 1


def test_training_as_an_input_of_a_functional_model():
    peers = make_peers()
    x, switch = keras.Input(peers.images[0].shape[1:]), keras.Input(batch_shape=(), dtype="bool")
    model = keras.Model([x, switch], peers.fused.layers[-1](x, training=switch))
    for training in (False, True):
        output = model([tf.constant(peers.images[0]), tf.constant(training)])
        assert_close(output, peers.stock(peers.images, training=training), 1e-5)
    assert_weights_close(peers.fused, peers.stock, 1e-6)


def test_unknown_sizes_in_a_graph():
    peers = make_peers(padding="same", strides=2)
    layer = peers.fused.layers[-1]
    run = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, None, None, 6])])
    for size in (5, 8):
        images = np.random.default_rng(size).normal(size=(2, size, size + 1, 6)).astype("float32")
        chain = peers.stock.layers[1:]
        expected = chain[2](chain[1](chain[0](images), training=True))
        assert_close(run(images), expected, 1e-5)


def test_shared_layer_updates_at_every_call():
    convolve, norm = keras.layers.Conv2D(4, 3, padding="same", use_bias=False), keras.layers.BatchNormalization()
    fused_layer = FusedConvBN(4, 3, padding="same", activation="relu")
    x = keras.Input((7, 7, 4))
    fused = keras.Model(x, fused_layer(fused_layer(x)))
    stock = keras.Model(x, keras.ops.relu(norm(convolve(keras.ops.relu(norm(convolve(x)))))))
    rng = np.random.default_rng(3)
    fused.set_weights(random_weights(fused, rng))
    stock.set_weights(fused.get_weights())
    images, target = (rng.normal(size=(3, 7, 7, 4)).astype("float32") for _ in range(2))
    ours = train(fused, images, target, keras.optimizers.SGD(0.1), 3)
    assert_close(ours, train(stock, images, target, keras.optimizers.SGD(0.1), 3), 1e-5)
    assert_weights_close(fused, stock, 3e-5)


@pytest.mark.parametrize("save", ["conv", "bfloat16", "recompute"])
def test_whatever_training_keeps(save):
    """The gradients are Keras's, where z was rounded within the unit of bfloat16."""
    peers = make_peers(shape=(8, 17, 19, 6), activation="relu", use_bias=True, save=save)
    output, ours = gradients(peers.fused, peers.images, peers.cotangent, True)
    expected, theirs = gradients(peers.stock, peers.images, peers.cotangent, True)
    assert_close(output, expected, 1e-5)
    for name in ("inputs", "kernel", "gamma", "beta"):
        assert_close(ours[name], theirs[name], 2**-8 if save == "bfloat16" else 1e-4, name)
    assert_weights_close(peers.fused, peers.stock, 1e-6)


def test_in_a_jitted_function():
    peers = make_peers(activation="silu", residual=True)
    layer = peers.fused.layers[-1]
    output = tf.function(lambda x, r: layer(x, r, training=True), jit_compile=True)(*peers.images)
    assert_close(output, peers.stock(peers.images, training=True), 1e-5)
    assert_weights_close(peers.fused, peers.stock, 1e-6)


def test_trainable_false_freezes_everything():
    peers = make_peers(activation="relu")
    before = peers.fused.get_weights()
    peers.fused.trainable = peers.stock.trainable = False
    assert not peers.fused.trainable_weights
    assert_close(peers.fused(peers.images, training=True), peers.stock(peers.images, training=True), 1e-5)
    assert all(np.array_equal(ours, old) for ours, old in zip(peers.fused.get_weights(), before, strict=True))


@pytest.mark.parametrize("how", ["constructor", "property", "property_while_frozen"])
def test_batch_norm_trainable_false_trains_kernel_and_bias_alone(how):
    peers = make_peers(activation="relu", use_bias=True, batch_norm_trainable=how != "constructor")
    layer = peers.fused.layers[-1]
    if how != "constructor":
        layer.trainable = how != "property_while_frozen"
        layer.batch_norm_trainable = False
        layer.trainable = True  # does not thaw the batch norm
    peers.stock.layers[2].trainable = False
    assert [weight.name for weight in layer.trainable_weights] == ["kernel", "bias"]
    assert [weight.name for weight in layer.weights] == ALL_WEIGHTS
    losses = [
        train(model, peers.images, peers.cotangent, keras.optimizers.SGD(0.05, momentum=0.9), 5)
        for model in (peers.fused, peers.stock)
    ]
    assert_close(*losses, 1e-5)
    assert_weights_close(peers.fused, peers.stock, 3e-5)


def test_batch_norm_trainable_can_be_switched_on_again():
    peers = make_peers(batch_norm_trainable=False)
    layer = peers.fused.layers[-1]
    layer.trainable, layer.batch_norm_trainable = False, True
    assert not layer.gamma.trainable
    layer.trainable = True
    assert [weight.name for weight in layer.trainable_weights] == ["kernel", "gamma", "beta"]
    assert_close(layer(peers.images[0], training=True), peers.stock(peers.images, training=True), 1e-5)
    assert_weights_close(peers.fused, peers.stock, 1e-6)


SPACING = {"bfloat16": 2**-7, "float16": 2**-10}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_half_precision_policy(policy, training):
    """Nowhere further from float64 than Keras's layers under the same policy, by more than a rounding."""
    peers = make_peers(activation="silu", residual=True, use_bias=True, dtype=policy)
    exact = make_peers(activation="silu", residual=True, use_bias=True, dtype="float64").stock
    exact.set_weights(peers.fused.get_weights())
    dtype = policy.removeprefix("mixed_")
    assert {weight.dtype for weight in peers.fused.weights} == {"float32" if policy.startswith("mixed") else dtype}
    results = [computed(model, peers, training) for model in (peers.fused, peers.stock, exact)]
    assert results[0]["output"].dtype == dtype
    for name, (ours, theirs, truth) in {name: [result[name] for result in results] for name in results[0]}.items():
        ours, theirs, truth = (np.asarray(tf.cast(v, tf.float64)) for v in (ours, theirs, truth))
        allowed = np.abs(theirs - truth).max() + SPACING[dtype] * np.abs(truth).max()
        assert np.abs(ours - truth).max() <= allowed, name


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_fit_under_a_half_precision_policy(policy):
    """As Keras's layers: the same losses but for the roundings of a few steps; mixed_float16 with its loss scaling."""
    peers = make_peers(activation="relu", shape=(12, 9, 8, 6), dtype=policy)
    target = peers.stock(peers.images, training=False).numpy().astype("float32") + 0.5
    losses = []
    for model in (peers.fused, peers.stock):
        optimizer = keras.optimizers.SGD(0.05, momentum=0.5)
        scaled = keras.optimizers.LossScaleOptimizer(optimizer) if policy == "mixed_float16" else optimizer
        model.compile(scaled, "mse", jit_compile=False)
        settings = {"batch_size": 4, "epochs": 5, "shuffle": False, "verbose": 0}
        losses.append(model.fit(peers.images[0], target, **settings).history["loss"])
    ours, theirs = losses
    assert theirs[-1] < 0.9 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=4 * SPACING[policy.removeprefix("mixed_")])
    assert all(np.isfinite(weight.astype("float64")).all() for weight in peers.fused.get_weights())


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_float64_policy(training):
    peers = make_peers(activation="silu", residual=True, use_bias=True, dtype="float64")
    assert {weight.dtype for weight in peers.fused.weights} == {"float64"}
    ours, theirs = (computed(model, peers, training) for model in (peers.fused, peers.stock))
    assert ours["output"].dtype == "float64"
    for name, value in ours.items():
        assert_close(value, theirs[name], 1e-14, name)


def computed(model, peers, training):
    """Output, gradients and statistics by name; without the bias's gradient in training, all rounding errors."""
    output, by_name = gradients(model, peers.images, peers.cotangent, training)
    if training:
        del by_name["bias"]
    statistics = {name: value for name, value in values(model).items() if name.startswith("moving")}
    return {"output": output, **by_name, **statistics}


def test_a_gradient_of_a_bias_in_training_is_zero():
    peers = make_peers(use_bias=True)
    _, ours = gradients(peers.fused, peers.images, peers.cotangent, True)
    np.testing.assert_array_equal(ours["bias"], np.zeros(6))


def test_empty_batch_changes_nothing():
    peers = make_peers(use_bias=True)
    before = values(peers.fused)
    output = peers.fused.layers[-1](np.zeros((0, 9, 8, 6), "float32"), training=True)
    assert output.shape == (0, 7, 6, 6)
    assert all(np.array_equal(after, before[name]) for name, after in values(peers.fused).items())
