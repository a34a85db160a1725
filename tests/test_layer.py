"""The layer against Conv2D -> BatchNormalization -> Activation: outputs, statistics, gradients, ten optimizer steps."""

import keras
import numpy as np
import pytest
from layer_peers import INPUTS, assert_close, assert_weights_close, gradients, make_peers, train, values

from fusedconvbn import FusedConvBN

NCHW = (INPUTS[0], INPUTS[3], INPUTS[1], INPUTS[2])
CONFIGURATIONS = {
    "plain": {},
    "same": {"padding": "same"},
    "strides_same": {"padding": "same", "strides": 2},
    "strides_valid": {"strides": (2, 1), "kernel_size": (3, 2)},
    "explicit_padding": {"padding": ((1, 2), (0, 3)), "strides": 2},
    "dilation": {"dilation_rate": (2, 1)},
    "pointwise": {"kernel_size": 1, "filters": 10},
    "groups": {"groups": 3, "filters": 9},
    "depthwise": {"groups": 6, "filters": 12, "padding": "same"},
    "winograd": {"filters": 40, "shape": (3, 13, 12, 32), "padding": "same", "activation": "relu"},
    "channels_first": {"data_format": "channels_first", "shape": NCHW, "padding": "same"},
    "bias": {"use_bias": True},
    "no_center": {"center": False},
    "no_scale": {"scale": False, "use_bias": True},
    "neither": {"center": False, "scale": False},
    "momentum_epsilon": {"momentum": 0.6, "epsilon": 0.05},
    "residual": {"residual": True, "activation": "relu"},
    "residual_not_fused": {"residual": True, "activation": "tanh"},
    "residual_channels_first": {
        "residual": True, "activation": "silu", "data_format": "channels_first", "shape": NCHW,
    },
    "regularizers": {
        "use_bias": True, "kernel_regularizer": "l2", "bias_regularizer": "l2", "gamma_regularizer": "l1",
        "beta_regularizer": keras.regularizers.L2(0.1),
    },
    "constraints": {
        "kernel_constraint": keras.constraints.MaxNorm(0.5), "gamma_constraint": "non_neg",
        "beta_constraint": keras.constraints.MaxNorm(0.1, axis=0),
    },
}  # fmt: skip
ACTIVATIONS = {
    name: name
    for name in (
        "linear", "relu", "relu6", "leaky_relu", "elu", "silu", "swish", "hard_swish", "gelu",
        "tanh", "sigmoid", "softmax", "selu", "mish",
    )
} | {
    "relu6_layer": keras.layers.ReLU(max_value=6.0),
    "relu_layer_with_threshold": keras.layers.ReLU(threshold=0.5),
    "leaky_relu_layer": keras.layers.LeakyReLU(negative_slope=0.3),
    "function": lambda x: keras.activations.gelu(x, approximate=True),
}  # fmt: skip


def check_against_stock(training: bool, **configuration):
    peers = make_peers(**configuration)
    output, ours = gradients(peers.fused, peers.images, peers.cotangent, training)
    expected, theirs = gradients(peers.stock, peers.images, peers.cotangent, training)
    assert_close(output, expected, 1e-5, "output")
    assert ours.keys() == theirs.keys()
    if training and "bias" in ours:  # the batch mean takes it out again: what is left is rounding and a regularizer
        np.testing.assert_allclose(ours.pop("bias"), theirs.pop("bias"), atol=1e-4)
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], 3e-5, f"gradient of {name}")
    assert_weights_close(peers.fused, peers.stock, 1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(name, training):
    check_against_stock(training, **CONFIGURATIONS[name])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    check_against_stock(True, activation=ACTIVATIONS[name], residual=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fused_activations_are_part_of_the_op(name):
    from fusedconvbn._layer_config import fused_activation

    fused = {"linear": None, "swish": "silu", "relu6_layer": "relu6"}
    fused |= {name: name for name in ("relu", "relu6", "leaky_relu", "elu", "silu", "hard_swish", "gelu")}
    activation = keras.activations.get(ACTIVATIONS[name])
    assert fused_activation(activation, "float32") == ((fused[name], None) if name in fused else (None, activation))


def test_initializers_reach_their_variables():
    names = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
    initializers = {f"{name}_initializer": keras.initializers.Constant(1.0 + i) for i, name in enumerate(names)}
    layer = FusedConvBN(4, 3, use_bias=True, **initializers)
    layer.build((None, 5, 5, 2))
    assert {name: set(value.ravel()) for name, value in values(layer).items()} == {
        name: {1.0 + i} for i, name in enumerate(names)
    }


def test_activity_regularizer_sees_the_output():
    penalty = keras.regularizers.L1L2(0.1, 0.2)
    layer = FusedConvBN(4, 3, activation="relu", activity_regularizer=penalty)
    after = keras.layers.Activation("linear", activity_regularizer=penalty)
    after(layer(np.random.default_rng(0).normal(size=INPUTS).astype("float32"), training=True))
    assert float(layer.losses[0]) > 0
    assert_close(layer.losses, after.losses, 1e-6)


def optimizers():
    return {"sgd": keras.optimizers.SGD(0.1, momentum=0.9), "adam": keras.optimizers.Adam(0.01)}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "name", ["plain", "groups", "winograd", "no_center", "residual", "regularizers", "constraints"]
)
def test_ten_optimizer_steps(name, optimizer):
    peers = make_peers(**CONFIGURATIONS[name])
    ours = train(peers.fused, peers.images, peers.cotangent, optimizers()[optimizer], 10)
    theirs = train(peers.stock, peers.images, peers.cotangent, optimizers()[optimizer], 10)
    assert theirs[-1] < theirs[0]
    assert_close(ours, theirs, 1e-5, "losses")
    assert_weights_close(peers.fused, peers.stock, 1e-4)
