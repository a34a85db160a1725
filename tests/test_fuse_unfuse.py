"""`unfuse` of layers that were made by hand, and what it refuses."""

import keras
import numpy as np
import pytest
from fuse_models import SHAPE, assert_steps_alike, images_for, model_of, outputs, step
from keras import layers
from layer_peers import assert_close

from fusedconvbn import FusedConvBN
from fusedconvbn.fusing import fuse, unfuse


def layer(filters=6, kernel_size=3, **arguments):
    return FusedConvBN(filters, kernel_size, name="f", **{"padding": "same", "momentum": 0.8, **arguments})


def shared(x):
    """With a residual, and without."""
    twice = layer(activation="relu", activity_regularizer=keras.regularizers.L2(1e-3))
    return twice(twice(x), residual=x)


HAND_MADE = {
    "plain": (lambda x: layer()(x), ["f", "f_bn"]),
    "bias": (lambda x: layer(use_bias=True, center=False)(x), ["f", "f_bn"]),
    "residual": (lambda x: layer()(x, x), ["f", "f_bn", "f_add"]),
    "activation": (lambda x: layer(activation="tanh")(x, residual=x), ["f", "f_bn", "f_add", "f_activation"]),
    "activation_layer": (lambda x: layer(activation=layers.LeakyReLU(0.3, name="leaky"))(x), ["f", "f_bn", "f_leaky"]),
    "explicit_padding": (lambda x: layer(padding=((1, 2), (0, 3)), strides=2)(x), ["f_pad", "f", "f_bn"]),
    "depthwise": (lambda x: layer(12, groups=6)(x), ["f", "f_bn"]),
    "depthwise_with_a_constraint": (
        lambda x: layer(groups=6, kernel_constraint=keras.constraints.MaxNorm(0.5))(x), ["f", "f_bn"]),
    "groups": (lambda x: layer(groups=2)(x), ["f", "f_bn"]),
    "name_in_use": (lambda x: layers.ReLU(name="f_bn")(layer()(x)), ["f", "f_bn_1", "f_bn"]),
    "frozen_batch_norm": (lambda x: layer(batch_norm_trainable=False)(x), ["f", "f_bn"]),
    "training_given": (lambda x: layer()(x, training=False), ["f", "f_bn"]),
    "activity_regularizer": (lambda x: layer(activity_regularizer="l2")(x, x), ["f", "f_bn", "f_add", "f_activation"]),
    "shared": (shared, ["f", "f_bn", "f_activation", "f_add"]),
    "dropped": (lambda x: layer(save="recompute", algorithm="direct")(x), ["f", "f_bn"]),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_MADE)
def test_stock_layers(name):
    body, names = HAND_MADE[name]
    fused = model_of(body)
    stock = unfuse(fused)
    assert sorted(layer.name for layer in stock.layers) == sorted(["images", *names])
    assert not any(isinstance(layer, FusedConvBN) for layer in stock.layers)
    is_depthwise = isinstance(stock.get_layer("f"), layers.DepthwiseConv2D)
    assert is_depthwise == (name == "depthwise")
    images, before = images_for(fused), stock.get_weights()
    assert_close(outputs(stock, images), outputs(fused, images), 1e-5, "inference")
    (ours, our_loss), (theirs, their_loss) = step(fused, images), step(stock, images)
    assert_close(ours, theirs, 1e-5, "training")
    assert_close(our_loss, their_loss, 1e-5, "loss")
    assert_steps_alike(before, stock, unfuse(fused).get_weights())


@pytest.mark.parametrize("name", ["depthwise", "residual", "activation", "explicit_padding"])
def test_fused_again(name):
    fused = model_of(HAND_MADE[name][0])
    again = fuse(unfuse(fused))
    for ours, theirs in zip(again.get_weights(), fused.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    images = images_for(fused)
    assert_close(outputs(again, images), outputs(fused, images), 1e-6)


def test_channels_first_normalizes_axis_1():
    inputs = keras.Input((6, 8, 8))
    stock = unfuse(keras.Model(inputs, layer(data_format="channels_first", padding=((1, 1), (1, 1)))(inputs)))
    assert stock.get_layer("f_bn").axis == 1
    assert stock.get_layer("f").data_format == stock.get_layer("f_pad").data_format == "channels_first"
    assert fuse(stock).get_layer("f").data_format == "channels_first"


def test_frozen_after_fusing():
    stock = model_of(lambda x: layers.BatchNormalization()(layers.Conv2D(4, 3, name="conv")(x)))
    fused = fuse(stock)
    fused.get_layer("conv").batch_norm_trainable = False
    conv, norm = unfuse(fused).layers[1:]
    assert (conv.trainable, norm.trainable) == (True, False)


def halved(value):
    return 0.5 * value


@pytest.mark.parametrize(("body", "message"), [
    (lambda x: layer(variable_transforms={"kernel": halved})(x), "without variable_transforms"),
    (lambda x: layer(strides=2, dilation_rate=2)(x), "without convolutions with both strides"),
    (lambda x: layer()(x, training=keras.ops.any(x > 0)), "one that calls 'f' with training=True, False or None"),
])  # fmt: skip
def test_what_keras_cannot_compute(body, message):
    inputs = keras.Input(SHAPE)
    with pytest.raises(ValueError, match=f"(?s)`model` must be {message}.*Received: "):
        unfuse(keras.Model(inputs, body(inputs)))


class Subclassed(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize("function", [fuse, unfuse])
@pytest.mark.parametrize(("model", "error", "message"), [
    ("resnet", TypeError, "a Keras model"),
    (layers.Dense(1), TypeError, "a Keras model"),
    (Subclassed(), ValueError, "a Functional or Sequential.*subclassed"),
    (keras.Sequential([layers.Conv2D(4, 3)]), ValueError, "built: call it"),
])  # fmt: skip
def test_bad_models(function, model, error, message):
    with pytest.raises(error, match=f"`model` must be {message}.*Received: model="):
        function(model)


def test_a_functional_model_with_a_call_of_its_own_is_refused():
    inputs = keras.Input(SHAPE)
    with pytest.raises(ValueError, match="subclassed"):
        fuse(Subclassed(inputs, layer()(inputs)))


def test_report_must_be_a_list():
    with pytest.raises(TypeError, match=r"`report` must be a list or None\. Received: report="):
        fuse(model_of(lambda x: layer()(x)), report={})


def test_layers_that_cannot_be_copied_are_named():
    class WithoutConfiguration(layers.Layer):
        def __init__(self, factor):
            super().__init__(name="mine")
            self.factor = factor

        def call(self, x):
            return self.factor * x

        def get_config(self):
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"`model` must consist of .*Received: a layer 'mine' of WithoutConfiguration"):
        fuse(model_of(lambda x: WithoutConfiguration(2.0)(x)))
