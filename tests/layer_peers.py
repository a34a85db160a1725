"""FusedConvBN beside the Keras layers that it replaces, with equal weights and inputs, for the tests of the layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from fusedconvbn import FusedConvBN

_CONVOLUTION = {
    "strides", "padding", "data_format", "dilation_rate", "groups", "use_bias", "kernel_initializer",
    "kernel_regularizer", "kernel_constraint", "bias_regularizer", "bias_constraint",
}  # fmt: skip

_FUSED_ONLY = {"batch_norm_trainable", "variable_transforms", "save"}

INPUTS = (4, 9, 8, 6)


class Peers(NamedTuple):
    """Two models of the same inputs, the second of stock Keras layers, and arrays to call them with."""

    fused: keras.Model
    stock: keras.Model
    images: list[np.ndarray]  # [inputs] or [inputs, residual]
    cotangent: np.ndarray  # of the output


def stock_chain(
    inputs: Any,
    residual: Any = None,
    *,
    filters: int = 6,
    kernel_size: Any = 3,
    activation: Any = None,
    dtype: str | None = None,
    **arguments: Any,
) -> Any:
    """Conv2D (after a ZeroPadding2D for explicit padding), BatchNormalization, Add and Activation.

    The convolution is channels_last, between permutations where the chain is not: on CPUs where TensorFlow does without
    oneDNN it has no other one.
    """
    convolution = {name: arguments.pop(name) for name in _CONVOLUTION & arguments.keys()}
    first = convolution.pop("data_format", "channels_last") == "channels_first"
    z = keras.layers.Permute((2, 3, 1), dtype=dtype)(inputs) if first else inputs
    if isinstance(convolution.get("padding"), tuple):
        z = keras.layers.ZeroPadding2D(convolution.pop("padding"), dtype=dtype)(z)
    z = keras.layers.Conv2D(filters, kernel_size, dtype=dtype, **{"use_bias": False, **convolution})(z)
    z = keras.layers.Permute((3, 1, 2), dtype=dtype)(z) if first else z
    u = keras.layers.BatchNormalization(axis=1 if first else -1, dtype=dtype, **arguments)(z)
    if residual is not None:
        u = keras.layers.Add(dtype=dtype)([u, residual])
    return keras.layers.Activation(activation, dtype=dtype)(u)


def make_peers(*, residual: bool = False, shape: tuple[int, ...] = INPUTS, seed: int = 0, **arguments: Any) -> Peers:
    """Models of one chain each, from the same random weights, for inputs of `shape`."""
    arguments = {"filters": 6, "kernel_size": 3, **arguments}
    rng = np.random.default_rng(seed)
    x = keras.Input(shape[1:], dtype="float32")
    layer = FusedConvBN(**arguments)
    added = [keras.Input(layer.compute_output_shape(shape)[1:], dtype="float32")] if residual else []
    fused = keras.Model([x, *added], layer(x, *added))
    shared = {name: value for name, value in arguments.items() if name not in _FUSED_ONLY}
    stock = keras.Model([x, *added], stock_chain(x, *added, **shared))
    fused.set_weights(random_weights(stock, rng))
    stock.set_weights(fused.get_weights())
    images = [rng.normal(size=(shape[0], *image.shape[1:])).astype("float32") for image in (x, *added)]
    return Peers(fused, stock, images, rng.normal(size=(shape[0], *fused.output.shape[1:])).astype("float32"))


def values(model: keras.layers.Layer) -> dict[str, np.ndarray]:
    """The weights by name."""
    return {weight.name: weight.numpy() for weight in model.weights}


def random_weights(model: keras.Model, rng: np.random.Generator) -> list[np.ndarray]:
    """For each weight of the model: normal for those of any sign, around one for gamma and the variance."""

    def value(weight: keras.Variable) -> np.ndarray:
        if weight.name in ("gamma", "moving_variance"):
            return rng.uniform(0.5, 1.5, weight.shape)
        return rng.normal(size=weight.shape) * (0.2 if weight.name == "kernel" else 0.5)

    return [value(weight) for weight in model.weights]


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Every element within `tolerance` times the largest expected magnitude; NaN and infinity only where expected."""
    actual, expected = (np.asarray(tf.cast(v, tf.float64)) for v in (actual, expected))
    scale = max(np.abs(expected[np.isfinite(expected)]).max(initial=0.0), 1e-30)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=what)


def assert_weights_close(fused: keras.Model, stock: keras.Model, tolerance: float) -> None:
    """All weights, moving statistics included, in order."""
    for ours, theirs in zip(fused.weights, stock.weights, strict=True):
        assert ours.name == theirs.name
        assert_close(ours.numpy(), theirs.numpy(), tolerance, theirs.path)


def gradients(
    model: keras.Model, images: list[np.ndarray], cotangent: np.ndarray, training: Any
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """The output, and the gradient of sum(cotangent * output) + losses by each image and trainable weight."""
    tensors = [tf.constant(image) for image in images]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = model(tensors, training=training)
        loss = tf.reduce_sum(tf.cast(output, tf.float64) * tf.cast(cotangent, tf.float64))
        loss += tf.cast(tf.add_n(model.losses), tf.float64) if model.losses else 0.0
    weights = model.trainable_weights
    names = ["inputs", "residual"][: len(tensors)] + [weight.name for weight in weights]
    return output, dict(zip(names, tape.gradient(loss, tensors + [w.value for w in weights]), strict=True))


def train(model: keras.Model, images: list[np.ndarray], target: np.ndarray, optimizer: Any, steps: int) -> list[float]:
    """Mean squared error before each of `steps` steps."""
    losses = []
    for _ in range(steps):
        with tf.GradientTape() as tape:
            output = model(images, training=True)
            loss = tf.reduce_mean(tf.square(tf.cast(output, tf.float32) - target))
            total = tf.add_n([loss, *model.losses])
        optimizer.apply(tape.gradient(total, [w.value for w in model.trainable_weights]), model.trainable_weights)
        losses.append(float(loss))
    return losses
