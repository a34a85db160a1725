"""What `fuse` leaves as it is, and the reasons that its report gives."""

import keras
import numpy as np
import pytest
from fuse_models import SHAPE, assert_same_model, chain, conv, images_for, model_of, norm, outputs, randomized
from keras import layers
from layer_peers import assert_close

from fusedconvbn.fusing import Entry, fuse


class OwnConvolution(layers.Conv2D):
    """May do anything in its `call`."""


class OwnNormalization(layers.BatchNormalization):
    """May do anything in its `call`."""


def lora(x):
    convolution = conv()
    y = norm()(convolution(x))
    convolution.enable_lora(2)
    return y


def frozen_kernel(x):
    convolution = conv(use_bias=True)
    y = norm()(convolution(x))
    convolution.bias.trainable = False
    return y


def frozen_convolution(x):
    return norm()(conv(trainable=False)(x))


def shared_convolution(x):
    convolution = conv()
    return layers.Add()([norm("bn")(convolution(x)), norm("other", trainable=False)(convolution(layers.ReLU()(x)))])


def shared_batch_norm(x):
    shared = norm()
    return layers.Add()([shared(conv("c1")(x)), shared(conv("c2")(x))])


def used_in_another_model(x):
    convolution = conv()
    y = keras.Input(SHAPE)
    other = keras.Model(y, convolution(y), name="other")
    return layers.Add()([norm()(convolution(x)), other(x)])


def reordered(x):
    """The activation runs in another order than the batch norm, whose statistics a fused layer would update with it."""
    shared = [conv(), norm(), layers.ReLU()]
    branches = [x, layers.Rescaling(3.0, 1.0)(x)]
    for layer in shared:
        branches = [layer(branch) for branch in branches]
    return layers.Concatenate()(branches)


def masked(x):
    mask = keras.ops.cast(x[..., 0] > 0, "bool")
    return norm()(conv()(x), mask=mask)


REASONS = {
    "activation": (lambda x: norm()(conv(activation="relu")(x)), "'conv' applies an activation before it"),
    "activity_regularizer": (lambda x: norm()(conv(activity_regularizer="l2")(x)), "has an activity_regularizer"),
    "read_by_two": (lambda x: layers.Add()([y := conv()(x), norm()(y)]), "output of 'conv' is read by 'bn', 'add"),
    "output": (lambda x: [y := conv()(x), norm()(y)], "the output of 'conv' is an output of the model"),
    "no_convolution": (lambda x: norm()(layers.ReLU(name="act")(x)), "follows 'act', a ReLU: neither Conv2D nor"),
    "input": (lambda x: norm()(x), "normalizes an input of the model"),
    "transpose": (lambda x: norm()(layers.Conv2DTranspose(4, 3, name="up")(x)), "follows 'up', a Conv2DTranspose"),
    "separable": (lambda x: norm()(layers.SeparableConv2D(4, 3, name="sep")(x)), "follows 'sep', a SeparableConv2D"),
    "subclass": (lambda x: norm()(OwnConvolution(4, 3, name="own")(x)), "follows 'own', a OwnConvolution"),
    "own_norm": (lambda x: OwnNormalization(name="bn")(conv()(x)), "is a OwnNormalization, a subclass of Batch"),
    "axis": (lambda x: norm(axis=1)(conv()(x)), "normalizes axis 1, where 'conv' is channels_last"),
    "renorm": (lambda x: norm(renorm=True)(conv()(x)), "uses renorm"),
    "training_given": (lambda x: norm()(conv()(x), training=False), "is called with training=False"),
    "mask_given": (masked, "is called with mask="),
    "policies": (lambda x: norm(dtype="float32")(conv(dtype="mixed_bfloat16")(x)),
                 "'conv' computes in mixed_bfloat16, this in float32"),
    "frozen_convolution": (frozen_convolution, "trains, while 'conv' is frozen"),
    "frozen_variable": (frozen_kernel, "'conv' has variables that are frozen apart from the layer"),
    "quantized": (lambda x: norm()(conv(dtype=keras.dtype_policies.QuantizedDTypePolicy("int8", "float32"))(x)),
                  "'conv' is quantized"),
    "lora": (lora, "'conv' is adapted by LoRA"),
    "depthwise_constraint": (
        lambda x: norm()(layers.DepthwiseConv2D(3, depthwise_constraint="max_norm", name="dw")(x)),
        "the depthwise_constraint of 'dw' may depend on the shape of the kernel",
    ),
    "depthwise_regularizer": (
        lambda x: norm()(layers.DepthwiseConv2D(3, depthwise_regularizer="orthogonal_regularizer", name="dw")(x)),
        "the depthwise_regularizer of 'dw' may depend",
    ),
    "shared_convolution": (shared_convolution, "'conv' is also called elsewhere"),
    "shared_batch_norm": (shared_batch_norm, "is called after several layers: 'c1', 'c2'"),
    "used_in_another_model": (used_in_another_model, "'conv' is also called elsewhere"),
    "reordered": (reordered, "'conv' is called several times, and would be in another order"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_kept_with_the_reason(name):
    body, reason = REASONS[name]
    inputs = keras.Input(SHAPE)
    stock = keras.Model(inputs, body(inputs))
    if name not in ("lora", "policies"):
        randomized(stock)
    report = []
    fused = fuse(stock, report=report)
    assert {(entry.name, entry.into) for entry in report} >= {("bn", None)}
    assert reason in next(entry.reason for entry in report if entry.name == "bn")
    assert_same_model(fused, stock)
    if name == "quantized":  # Keras makes such a Conv2D, and cannot call it yet
        return
    images = images_for(stock)
    for ours, theirs in zip(outputs(fused, images), outputs(stock, images), strict=True):
        assert_close(ours, theirs, 1e-6)


def test_report_names_the_models_around_a_layer():
    class Opaque(keras.Model):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.norm = layers.BatchNormalization(name="hidden")

        def call(self, x, training=None):
            return self.norm(x, training=training)

        def get_config(self):
            return {"name": self.name}

    y = keras.Input(SHAPE)
    sub = keras.Model(y, norm("b2")(chain(y, layers.ReLU(), name="1")), name="sub")
    z = keras.Input(SHAPE)
    outer = keras.Model(z, sub(z), name="outer")
    stock = model_of(lambda x: Opaque(name="opaque")(chain(outer(x), name="0")))
    report = ["there before"]
    fused = fuse(stock, report=report)
    assert report[0] == "there before"
    assert {(e.name, e.into, e.reason and e.reason.split("'")[0]) for e in report[1:]} == {
        ("outer/sub/bn1", "conv1", None),
        ("outer/sub/b2", None, "follows "),
        ("bn0", "conv0", None),
        ("opaque/hidden", None, "is in "),
    }
    images = images_for(stock)
    assert_close(outputs(fused, images), outputs(stock, images), 1e-5)


def test_entries_are_plain_values():
    report = []
    fuse(model_of(chain), report=report)
    assert report == [Entry("bn", "conv", None)]
    assert hash(report[0]) == hash(Entry("bn", "conv", None))


def test_training_false_for_a_model_in_the_model_stays():
    y = keras.Input(SHAPE)
    sub = keras.Model(y, chain(y, layers.ReLU()), name="sub")
    stock = model_of(lambda x: layers.Dense(2)(sub(x, training=False)))
    fused = fuse(stock)
    for training in (True, False):
        ours, theirs = (model(images_for(stock)[0], training=training) for model in (fused, stock))
        assert_close(ours, theirs, 1e-5)
    for ours, theirs in zip(fused.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
