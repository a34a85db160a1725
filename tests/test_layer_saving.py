"""The layer in models of every kind, trained by fit, saved, reloaded and trained on."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from layer_peers import assert_close, assert_weights_close, gradients, make_peers, random_weights, stock_chain
from processes import run_python

from fusedconvbn import FusedConvBN

SHAPE = (8, 8, 3)


@keras.saving.register_keras_serializable(package="fusedconvbn_tests")
def halve(value):
    return value / 2


@keras.saving.register_keras_serializable(package="fusedconvbn_tests")
class Times(keras.layers.Layer):
    """A transform with a configuration and a weight."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, shape):
        self.scale = self.add_weight(name="scale", shape=(), initializer=keras.initializers.Constant(self.factor))

    def call(self, value):
        return value * self.scale

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


@keras.saving.register_keras_serializable(package="fusedconvbn_tests")
class Block(keras.Model):
    """A residual block, subclassed."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = FusedConvBN(3, 3, padding="same", activation="relu", use_bias=True)
        self.second = FusedConvBN(3, 3, padding="same", activation="silu")

    def call(self, inputs, training=None):
        return self.second(self.first(inputs), residual=inputs, training=training)


def sequential():
    transforms = {"kernel": halve, "gamma": Times(1.5)}
    return keras.Sequential([
        keras.Input(SHAPE),
        FusedConvBN(4, 3, activation=keras.layers.ReLU(max_value=6.0), variable_transforms=transforms),
        FusedConvBN(5, 3, padding=((1, 0), (0, 1)), activation="softplus", groups=1, strides=(2, 1)),
        keras.layers.Flatten(),
    ])  # fmt: skip


def functional():
    x = keras.Input(SHAPE)
    y = FusedConvBN(3, 3, padding="same", activation="gelu", scale=False)(x)
    y = FusedConvBN(3, 3, padding="same", activation="relu", kernel_regularizer="l2")(y, residual=x)
    return keras.Model(x, FusedConvBN(2, 1, batch_norm_trainable=False)(y))


def subclassed():
    return Block()


@pytest.fixture(params=[sequential, functional, subclassed])
def model(request):
    model = request.param()
    model(images())  # builds the subclassed model, and the layers among the transforms
    rng = np.random.default_rng(5)
    model.set_weights(random_weights(model, rng))
    return model


def images(seed=0, batch=4):
    return np.random.default_rng(seed).normal(size=(batch, *SHAPE)).astype("float32")


@pytest.mark.parametrize("path", ["model.keras", "weights"])
def test_keras_file(model, tmp_path, path):
    if path == "model.keras":
        model.save(tmp_path / path)
        loaded = keras.models.load_model(tmp_path / path)
    else:
        model.save_weights(tmp_path / "w.weights.h5")
        loaded = model.__class__.from_config(model.get_config())
        loaded(images())
        loaded.load_weights(tmp_path / "w.weights.h5")
    assert [w.trainable for w in loaded.weights] == [w.trainable for w in model.weights]
    assert_weights_close(loaded, model, 0)
    for training in (False, True):
        results = []
        for each in (model, loaded):
            with tf.GradientTape() as tape:
                output = each(images(), training=training)
                loss = tf.reduce_sum(output**3)
            results.append([output, *tape.gradient(loss, [w.value for w in each.trainable_weights])])
        for ours, original in zip(*results, strict=True):
            np.testing.assert_array_equal(ours, original)
    assert_weights_close(loaded, model, 0)  # the moving statistics moved alike


@pytest.mark.parametrize("imports", ["keras, fusedconvbn", "fusedconvbn, keras"])
def test_keras_file_in_a_process_that_only_imports_the_package(tmp_path, imports):
    path = tmp_path / "m.keras"
    keras.Sequential([keras.Input(SHAPE), FusedConvBN(2, 3)]).save(path)
    script = f"import {imports}; print(keras.models.load_model({str(path)!r}).output_shape)"
    assert run_python(script) == "(None, 6, 6, 2)"


def test_export(model, tmp_path):
    model.export(tmp_path / "m", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "m"))
    np.testing.assert_allclose(loaded.serve(images()), model(images(), training=False), rtol=1e-6)
    np.testing.assert_allclose(loaded.serve(images(1, 1)), model(images(1, 1), training=False), rtol=1e-6)


def test_tf_saved_model(model, tmp_path):
    tf.saved_model.save(model, str(tmp_path / "m"))
    loaded = tf.saved_model.load(str(tmp_path / "m"))
    (served,) = loaded.signatures["serving_default"](tf.constant(images())).values()
    np.testing.assert_allclose(served, model(images(), training=False), rtol=1e-6)


def test_gradient_and_update_after_reload_from_a_saved_model(tmp_path):
    peers = make_peers(activation="relu", use_bias=True)

    class Module(tf.Module):
        def __init__(self, layer):
            super().__init__()
            self.kernel, self.moving_mean, self.layer = layer.kernel.value, layer.moving_mean.value, layer

        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 6]), tf.TensorSpec([], tf.bool)])
        def __call__(self, x, training):
            return self.layer(x, training=training)

    tf.saved_model.save(Module(peers.fused.layers[-1]), str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for training in (True, False):
        with tf.GradientTape() as tape:
            output = loaded(tf.constant(peers.images[0]), tf.constant(training))
        expected, theirs = gradients(peers.stock, peers.images, np.ones_like(peers.cotangent), training)
        assert_close(output, expected, 1e-5)
        assert_close(tape.gradient(output, loaded.kernel), theirs["kernel"], 3e-5)
        assert_close(loaded.moving_mean, peers.stock.layers[2].moving_mean, 1e-6)


def test_fit_on_a_tf_data_set():
    rng = np.random.default_rng(1)
    x, labels = images(2, 24), rng.integers(0, 5, 24)
    data = tf.data.Dataset.from_tensor_slices((x, labels)).batch(10)  # the last one is smaller

    def classifier(block):
        keras.utils.set_random_seed(2)
        inputs = keras.Input(SHAPE)
        pooled = keras.layers.GlobalAveragePooling2D()(block(inputs, filters=8, strides=2, activation="relu"))
        model = keras.Model(inputs, keras.layers.Dense(5)(pooled))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.02), loss, metrics=["accuracy"], jit_compile=False)
        return model

    fused = classifier(lambda inputs, **arguments: FusedConvBN(kernel_size=3, **arguments)(inputs))
    stock = classifier(stock_chain)
    assert_weights_close(fused, stock, 0)  # the same seed draws the same kernel
    settings = {"epochs": 4, "validation_data": data, "shuffle": False, "verbose": 0}
    ours, theirs = (model.fit(data, **settings).history for model in (fused, stock))
    assert ours["loss"][-1] < ours["loss"][0]
    for name in ("loss", "val_loss", "accuracy", "val_accuracy"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)
    assert_weights_close(fused, stock, 1e-3)
    assert_close(fused.predict(x, verbose=0), stock.predict(x, verbose=0), 1e-3)


ARGUMENTS = {
    "filters": 6, "kernel_size": (3, 2), "strides": (2, 1), "padding": ((1, 0), (2, 1)),
    "data_format": "channels_first", "dilation_rate": (1, 1), "groups": 2, "activation": "leaky_relu",
    "use_bias": True, "momentum": 0.9, "epsilon": 1e-4, "center": True, "scale": True, "synchronized": True,
    "kernel_initializer": "he_normal", "bias_initializer": "ones", "beta_initializer": "ones",
    "gamma_initializer": "zeros", "moving_mean_initializer": "ones", "moving_variance_initializer": "zeros",
    "kernel_regularizer": "l2", "bias_regularizer": "l1", "beta_regularizer": "l2", "gamma_regularizer": "l1",
    "kernel_constraint": "unit_norm", "bias_constraint": "non_neg", "beta_constraint": "non_neg",
    "gamma_constraint": "non_neg", "activity_regularizer": "l2", "batch_norm_trainable": False,
    "variable_transforms": {"gamma": halve, "bias": Times(2.0)}, "algorithm": "direct", "save": "bfloat16",
    "name": "block", "dtype": "mixed_bfloat16", "trainable": False,
}  # fmt: skip


def test_config_round_trip_keeps_every_argument():
    layer, default = FusedConvBN(**ARGUMENTS), FusedConvBN(1, 1)
    config = layer.get_config()
    unchanged = {name for name, value in default.get_config().items() if config[name] == value}
    assert unchanged == {"dilation_rate", "center", "scale"}
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert copy.get_config() == config
    assert copy.padding == ((1, 0), (2, 1))
    assert copy.variable_transforms["gamma"] is halve
    assert copy.variable_transforms["bias"].factor == 2.0


def test_arguments_are_those_of_keras_with_their_defaults():
    ours = FusedConvBN(4, 3).get_config()
    theirs = keras.layers.Conv2D(4, 3).get_config() | keras.layers.BatchNormalization().get_config()
    refused = {"axis", "renorm", "renorm_clipping", "renorm_momentum"}
    different = {name for name in theirs.keys() - refused if ours[name] != theirs[name]}
    assert different == {"name", "use_bias"}
    assert ours.keys() - theirs.keys() == {"batch_norm_trainable", "variable_transforms", "algorithm", "save"}


def test_configurations_of_keras_layers_make_a_layer():
    convolution = keras.layers.Conv2D(4, 3, use_bias=False, padding="same").get_config()
    layer = FusedConvBN.from_config(convolution | keras.layers.BatchNormalization(momentum=0.9).get_config())
    assert (layer.padding, layer.momentum, layer.use_bias) == ("same", 0.9, False)


def test_lambda_transform_needs_unsafe_loading(tmp_path):
    x = keras.Input(SHAPE)
    model = keras.Model(x, FusedConvBN(2, 3, variable_transforms={"beta": lambda v: v + 1.0})(x))
    with pytest.warns(UserWarning, match="lambda"):
        model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="lambda"):
        keras.models.load_model(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", safe_mode=False)
    np.testing.assert_array_equal(loaded(images()), model(images()))


def test_transform_that_cannot_be_serialized():
    layer = FusedConvBN(2, 3, variable_transforms={"beta": functools.partial(tf.add, 1.0)})
    with pytest.raises(TypeError, match=r"variable_transforms\['beta'\].*register_keras_serializable"):
        layer.get_config()


def test_clone_model():
    model = functional()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(images()), model(images()))
