"""Models of each kind before and after `fuse`: outputs, a training step, what `unfuse` makes of it, files."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from fuse_models import (
    SHAPE,
    assert_same_model,
    assert_steps_alike,
    chain,
    conv,
    images_for,
    model_of,
    norm,
    outputs,
    policy,
    randomized,
    step,
)  # fmt: skip
from keras import layers
from layer_peers import assert_close

from fusedconvbn import FusedConvBN
from fusedconvbn.fusing import fuse, unfuse

RELU = keras.activations.relu


def residual(x, *, first=False, activation=True, shared_relu=None):
    z = chain(x)
    y = layers.Add(name="add")([x, z] if first else [z, x])
    return (shared_relu or layers.ReLU(name="relu"))(y) if activation else y


def both_are_chains(x):
    return layers.ReLU()(layers.Add()([chain(x, name="1"), chain(x, layers.ReLU(), name="2")]))


def two_chains_to_one_add(x):
    return layers.ReLU()(layers.Add()([chain(x, name="1"), chain(x, name="2")]))


def shared_relu(x):
    relu = layers.ReLU(name="relu")
    x = chain(x, relu, name="1")
    return residual(layers.MaxPooling2D()(relu(x)), shared_relu=relu)


def shared_chain(x):
    stack = [conv(), norm(), layers.ReLU(name="relu")]
    for _ in range(2):
        for layer in stack:
            x = layer(x)
    return x


def siamese(x):
    """The moving statistics are updated by one call after the other."""
    shared = [conv(), norm()]
    branches = [x, layers.Rescaling(3.0, 1.0)(x)]
    for layer in shared:
        branches = [layer(branch) for branch in branches]
    return layers.Concatenate()([layers.ReLU()(branch) for branch in branches])


def nested(x):
    inner = keras.Sequential([keras.Input((8, 8, 6)), conv("c1"), norm("b1"), layers.ReLU(name="r1")], name="inner")
    y = keras.Input((8, 8, 6))
    middle = keras.Model(y, chain(inner(y), layers.ReLU(name="relu")), name="middle")
    return chain(middle(x), layers.ELU(), name="_after")


def shared_model(x):
    y = keras.Input((8, 8, 6))
    sub = keras.Model(y, residual(chain(y, name="0")), name="sub")
    return layers.Concatenate()([sub(x), sub(layers.Rescaling(2.0, 1.0)(x))])


def frozen(x, *, whole):
    first, second = conv(), norm()
    first.trainable, second.trainable = not whole, False
    return layers.Dense(3)(layers.ReLU()(second(first(x))))


def unusual_layers(x):
    """Copied as they are: an adapted one, one with a state for random numbers, operations that are no layers."""
    normalize = layers.Normalization()
    normalize.adapt(np.random.default_rng(0).normal(2.0, 3.0, (16, *SHAPE)))
    y = chain(normalize(x), layers.ReLU(), layers.GaussianNoise(0.1, seed=3))
    return keras.ops.tanh(y * 2.0)[:, 1:]


def regularized(x):
    return chain(
        x, layers.ReLU(), use_bias=True, kernel_regularizer="l2", bias_regularizer=keras.regularizers.L1(0.2),
        kernel_constraint=keras.constraints.MaxNorm(0.7), kernel_initializer="he_normal", bias_initializer="ones",
    )  # fmt: skip


def regularized_batch_norm(x):
    arguments = {"gamma_regularizer": "l2", "beta_regularizer": "l1", "gamma_constraint": "non_neg"}
    arguments |= {"activity_regularizer": keras.regularizers.L2(1e-3), "gamma_initializer": "zeros"}
    return layers.ReLU()(norm(**arguments)(conv()(x)))


def depthwise(x, **arguments):
    y = layers.DepthwiseConv2D(3, name="conv", **{"padding": "same", "depthwise_regularizer": "l2", **arguments})(x)
    return layers.ReLU(max_value=6.0)(norm()(y))


def dictionary(x):
    return {"features": chain(x, layers.ReLU()), "pooled": layers.GlobalAveragePooling2D()(x)}


# name: (body, names of fused layers, number of layers of the fused model, input included)
MODELS = {
    "plain": (chain, 1, 2),
    "relu": (lambda x: chain(x, layers.ReLU()), 1, 2),
    "bias": (lambda x: chain(x, layers.ReLU(), use_bias=True), 1, 2),
    "relu6": (lambda x: chain(x, layers.ReLU(6.0)), 1, 2),
    "leaky_relu": (lambda x: chain(x, layers.LeakyReLU(0.2)), 1, 2),
    "leaky_relu_of_another_slope": (lambda x: chain(x, layers.LeakyReLU(0.3)), 1, 3),
    "elu": (lambda x: chain(x, layers.ELU()), 1, 2),
    "swish": (lambda x: chain(x, layers.Activation("swish")), 1, 2),
    "hard_silu": (lambda x: chain(x, layers.Activation("hard_silu")), 1, 2),
    "gelu": (lambda x: chain(x, layers.Activation("gelu")), 1, 2),
    "linear": (lambda x: chain(x, layers.Activation("linear")), 1, 2),
    "tanh_is_not_in_the_op": (lambda x: chain(x, layers.Activation("tanh")), 1, 3),
    "prelu_has_weights": (lambda x: chain(x, layers.PReLU()), 1, 3),
    "strides": (lambda x: chain(x, strides=(2, 2)), 1, 2),
    "dilation": (lambda x: chain(x, dilation_rate=(2, 1), padding="valid"), 1, 2),
    "groups": (lambda x: chain(x, groups=3, filters=9), 1, 2),
    "depthwise": (depthwise, 1, 2),
    "depthwise_multiplier": (lambda x: depthwise(x, depth_multiplier=3, strides=2, use_bias=False), 1, 2),
    "zero_padding_stays": (lambda x: chain(layers.ZeroPadding2D()(x), strides=2, padding="valid"), 1, 3),
    "no_center": (lambda x: norm(center=False, epsilon=0.1)(conv()(x)), 1, 2),
    "no_scale": (lambda x: norm(scale=False, axis=3, synchronized=True)(conv()(x)), 1, 2),
    "regularized": (regularized, 1, 2),
    "regularized_batch_norm": (regularized_batch_norm, 1, 3),
    "residual": (residual, 1, 2),
    "residual_first": (lambda x: residual(x, first=True), 1, 2),
    "residual_without_activation": (lambda x: residual(x, activation=False), 1, 2),
    "residual_of_a_chain": (both_are_chains, 2, 3),
    "two_chains_to_one_add": (two_chains_to_one_add, 2, 3),
    "added_to_itself": (lambda x: layers.Add()([y := chain(x), y]), 1, 3),
    "three_addends": (lambda x: layers.Add()([chain(x, name="1"), chain(x, name="2"), x]), 2, 4),
    "broadcast": (lambda x: layers.Add()([chain(x), layers.AveragePooling2D(8)(x)]), 1, 4),
    "read_twice": (lambda x: layers.Concatenate()([y := chain(x), layers.ReLU()(y)]), 1, 4),
    "shared_relu": (shared_relu, 2, 5),
    "shared_chain": (shared_chain, 1, 2),
    "siamese": (siamese, 1, 6),
    "nested": (nested, 3, 3),
    "shared_model": (shared_model, 2, 4),
    "frozen_batch_norm": (lambda x: frozen(x, whole=False), 1, 3),
    "frozen": (lambda x: frozen(x, whole=True), 1, 3),
    "unusual_layers": (unusual_layers, 1, 4),
    "dictionary": (dictionary, 1, 3),
    "one_output_twice": (lambda x: [y := chain(x), y, x], 1, 2),
    "function_of_tensorflow": (lambda x: chain(x, layers.Activation(tf.nn.relu)), 1, 2),
}  # fmt: skip


def made(name: str) -> keras.Model:
    return model_of(MODELS[name][0])


def fused_layers(model: keras.Model) -> list[str]:
    """Names, those in models of the model included, of each once."""
    found = {layer.name: None for layer in model.layers if isinstance(layer, FusedConvBN)}
    inner = {layer: None for layer in model.layers if isinstance(layer, keras.Model)}
    return [*found, *(name for layer in inner for name in fused_layers(layer))]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_a_training_step(name):
    stock = made(name)
    before = stock.get_weights()
    fused = fuse(stock)
    assert (len(fused_layers(fused)), len(fused.layers)) == MODELS[name][1:]
    images = images_for(stock)
    for ours, theirs in zip(outputs(fused, images), outputs(stock, images), strict=True):
        assert_close(ours, theirs, 1e-5, "inference")
    (ours, our_loss), (theirs, their_loss) = step(fused, images), step(stock, images)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, 1e-5, "training")
    assert_close(our_loss, their_loss, 1e-5, "loss")
    assert_steps_alike(before, stock, unfuse(fused).get_weights())


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_a_file(name, tmp_path):
    stock = made(name)
    description, weights = stock.get_config(), stock.get_weights()
    fused = fuse(stock)
    images = images_for(stock)
    expected = outputs(fused, images)
    assert_same_model(unfuse(fused), stock)
    fused.save(tmp_path / "fused.keras")
    loaded = keras.models.load_model(tmp_path / "fused.keras", safe_mode=False)
    for ours, theirs in zip(outputs(loaded, images), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_same_model(loaded, fused)
    assert_same_model(unfuse(loaded), stock)
    assert stock.get_config() == description  # and nothing has changed the model
    for weight, value in zip(stock.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_precision_follows_the_policy():
    with policy("mixed_bfloat16"):
        stock = made("residual")
    fused = fuse(stock)
    assert fused.get_layer("conv").compute_dtype == fused.outputs[0].dtype == "bfloat16"
    images = images_for(stock)
    assert_close(outputs(fused, images), outputs(stock, images), 2e-2)
    assert_same_model(unfuse(fused), stock)


class Projection(layers.Layer):
    """As one writes it for TensorFlow: it computes with what Keras casts the weight to."""

    def build(self, shape):
        self.matrix = self.add_weight(shape=(shape[-1], 4), name="kernel")

    def call(self, x):
        return tf.tensordot(x, tf.convert_to_tensor(self.matrix), 1)


def test_layers_that_rely_on_casts():
    with policy("mixed_bfloat16"):
        stock = model_of(lambda x: chain(Projection()(chain(x, name="0")), layers.ReLU()))
    fused = fuse(stock)
    assert fused_layers(fused) == ["conv0", "conv"]
    images = images_for(stock)
    assert_close(outputs(fused, images), outputs(stock, images), 2e-2)


def test_sizes_known_at_run_time():
    stock = model_of(residual, (None, None, 6))
    fused = fuse(stock)
    assert len(fused.layers) == 2
    for size in (5, 9):
        images = np.random.default_rng(0).normal(size=(2, size, size + 1, 6)).astype("float32")
        assert_close(fused(images), stock(images), 1e-5)


def test_model_between_two_layers():
    whole = model_of(lambda x: chain(layers.ReLU(name="start")(x), layers.ReLU()))
    stock = keras.Model(whole.get_layer("start").output, whole.output)
    fused = fuse(stock)
    assert fused_layers(fused) == ["conv"]
    images = images_for(stock)
    assert_close(outputs(fused, images), outputs(stock, images), 1e-5)
    assert_same_model(unfuse(fused), stock)


def test_sequential_built_by_a_call():
    stock = keras.Sequential([conv(), norm(), layers.ReLU(), layers.Dense(3)])
    images = images_for(model_of(chain))
    stock(images[0])
    fused = fuse(randomized(stock))
    assert fused.layers[0].name == "conv"
    assert_close(outputs(fused, images), outputs(stock, images), 1e-5)
    assert_same_model(unfuse(fused), stock)


def test_a_lambda_keeps_what_it_refers_to():
    factor = np.float32(3.0)
    inputs = keras.Input(SHAPE)
    stock = keras.Model(inputs, layers.Lambda(lambda x: keras.ops.multiply(x, factor * SHAPE[0]))(chain(inputs)))
    images = images_for(stock)
    assert_close(outputs(fuse(stock), images), outputs(stock, images), 1e-5)


class Doubling(keras.Model):
    """A Functional model of its own class."""

    def train_step(self, data):
        return {"doubled": 2.0 * super().train_step(data)["loss"]}


@pytest.mark.parametrize("constructor", ["functional", "sequential"])
def test_class_name_and_trainable_are_kept(constructor):
    if constructor == "functional":
        inputs = keras.Input(SHAPE)
        stock = Doubling(inputs, chain(inputs, layers.ReLU()), name="mine")
    else:
        stock = keras.Sequential([keras.Input(SHAPE), conv(), norm(), layers.ReLU()], name="mine")
    stock.trainable = False
    fused = fuse(randomized(stock))
    assert (type(fused), fused.name, fused.trainable) == (type(stock), "mine", False)
    assert [layer.name for layer in fused.layers if isinstance(layer, FusedConvBN)] == ["conv"]
    assert fused.trainable_weights == []
    assert_same_model(unfuse(fused), stock)
    fused.trainable = stock.trainable = True
    assert [w.name for w in fused.trainable_weights] == [w.name for w in stock.trainable_weights]


def test_compiled_like_the_original():
    stock = made("relu")
    stock.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
    fused = fuse(stock)
    (images,) = images_for(stock, 8)
    for model in (stock, fused):
        model.fit(images, images, epochs=2, batch_size=4, shuffle=False, verbose=0)
    assert_close(fused.evaluate(images, images, verbose=0), stock.evaluate(images, images, verbose=0), 1e-4)
    restored = unfuse(fused)
    assert restored.compiled
    assert restored.optimizer.momentum == 0.9
    for ours, theirs in zip(restored.weights, stock.weights, strict=True):
        assert_close(ours.numpy(), theirs.numpy(), 1e-4, theirs.path)


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_what_cannot_be_compiled_anew_is_a_warning():
    stock = made("relu")
    stock.compile("sgd", lambda target, output: keras.ops.mean(target - output))
    with pytest.warns(UserWarning, match="not compiled: call `compile`"):
        fused = fuse(stock)
    assert not fused.compiled


def test_train_step_of_the_class_runs():
    inputs = keras.Input(SHAPE)
    stock = randomized(Doubling(inputs, chain(inputs)))
    stock.compile("sgd", "mse")
    fused = fuse(stock)
    (images,) = images_for(stock)
    history = [model.fit(images, images, verbose=0).history["doubled"] for model in (fused, stock)]
    assert_close(*history, 1e-5)


def test_the_original_is_not_changed():
    """Nothing is added to it either: a layer that was called once has one output."""
    stock = made("nested")
    before = [layer.output for layer in stock.layers]
    unfuse(fuse(stock))
    assert all(layer.output is output for layer, output in zip(stock.layers, before, strict=True))
