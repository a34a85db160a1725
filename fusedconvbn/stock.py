"""`fused_conv_bn` of stock TensorFlow ops: the same function, gradients of every order, no kernel of this package.

Runs wherever TensorFlow runs, so it stands in where the op cannot go (programs that XLA compiles, statistics over the
replicas of `tf.distribute`), is differentiated for the gradient of the op's gradient, and is what tests compare with.
Speed is not its purpose: convolutions that not every back end of TensorFlow can differentiate are sums over the taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.ops import control_flow_util  # the one private import: nothing public tells an XLA context

from fusedconvbn import _arguments


class FusedConvBNOutput(NamedTuple):
    """What `fused_conv_bn` returns.

    Attributes:
        output: Activations, `[N, OH, OW, K]` or `[N, K, OH, OW]`, dtype of the inputs.
        moving_mean: Updated moving mean in training, the argument unchanged in inference; `[K]`.
        moving_variance: The same of the moving variance; `[K]`.
    """

    output: tf.Tensor
    moving_mean: tf.Tensor
    moving_variance: tf.Tensor


class Moments(NamedTuple):
    """Statistics of `z` over all axes but the last; `variance` is the biased one, `count` elements a channel."""

    mean: tf.Tensor
    variance: tf.Tensor
    count: tf.Tensor


@tf.autograph.experimental.do_not_convert
def fused_conv_bn(
    inputs: Any,
    filters: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    residual: Any = None,
    *,
    strides: int | tuple[int, int] = 1,
    dilations: int | tuple[int, int] = 1,
    padding: Any = "VALID",
    data_format: str = "NHWC",
    epsilon: float = 1e-3,
    momentum: float = 0.99,
    unbiased_moving_variance: bool = False,
    activation: str | None = None,
    training: Any = False,
    algorithm: str = "auto",
    save: str = "conv",
    name: str | None = None,
    moments: Callable[[tf.Tensor], Moments] | None = None,
) -> FusedConvBNOutput:
    """The function that `fusedconvbn.fused_conv_bn` documents.

    Args:
        inputs, filters, gamma, beta, moving_mean, moving_variance, residual: As there.
        strides, dilations, padding, data_format, epsilon, momentum, unbiased_moving_variance, activation: As there.
        training: As there.
        algorithm, save: Checked, and without effect.
        name: Of the scope that the ops are in.
        moments: Computes the statistics of training from `z`, `[N, OH, OW, K]`, float32 or float64; by default
            `batch_moments`. One that sums over replicas makes the batch norm synchronized.

    Returns:
        `FusedConvBNOutput(output, moving_mean, moving_variance)`.
    """
    convolve = _convolution(strides, dilations, padding)
    nchw = _arguments.data_format(data_format) == "NCHW"
    _arguments.algorithm(algorithm), _arguments.save(save)
    with tf.name_scope(name or "fused_conv_bn"):
        inputs = tf.ensure_shape(inputs, [None] * 4)
        filters = tf.ensure_shape(tf.convert_to_tensor(filters, inputs.dtype), [None] * 4)
        stat = tf.float64 if inputs.dtype == tf.float64 else tf.float32
        vectors = {"gamma": gamma, "beta": beta, "moving_mean": moving_mean, "moving_variance": moving_variance}
        gamma, beta, *moving = (
            _of_shape(name, tf.convert_to_tensor(v, stat), filters.shape[3:]) for name, v in vectors.items()
        )
        if tf.is_tensor(training):
            training = _of_shape("training", training, [])
        z = tf.cast(convolve(_nhwc(inputs, nchw), filters), stat)
        statistics, updated = _statistics(
            z, moving, training, moments or batch_moments, _arguments.momentum(momentum), unbiased_moving_variance
        )
        u = _normalize(z, gamma, beta, statistics, _arguments.epsilon(epsilon))
        if residual is not None:
            residual = _nhwc(tf.convert_to_tensor(residual, inputs.dtype), nchw)
            u += tf.cast(_of_shape("residual", residual, u.shape), stat)
        output = tf.cast(_ACTIVATIONS[_arguments.activation(activation)](u), inputs.dtype)
        return FusedConvBNOutput(tf.transpose(output, [0, 3, 1, 2]) if nchw else output, *updated)


def _of_shape(name: str, tensor: tf.Tensor, shape: Any) -> tf.Tensor:
    """`tensor`, which stock ops would else broadcast: an error where its shape is known to be another one."""
    if not tensor.shape.is_compatible_with(shape):
        _arguments.refuse(ValueError, name, f"of shape {tf.TensorShape(shape)}", tensor.shape)
    return tensor if tensor.shape.is_fully_defined() else tf.ensure_shape(tensor, shape)


def in_xla_context() -> bool:
    """Whether ops created now become part of a program that XLA compiles, as far as TensorFlow lets one see it."""
    if tf.executing_eagerly():
        return False
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def batch_moments(z: tf.Tensor) -> Moments:
    """Two passes, so that a large mean costs no accuracy; of an empty batch, zeros.

    The mean is not held constant in the variance, as `tf.nn.moments` does: right for gradients of the first order only.
    """
    count = tf.cast(tf.reduce_prod(tf.shape(z, tf.int64)[:-1]), z.dtype)
    divisor = tf.maximum(count, 1)
    mean = tf.reduce_sum(z, axis=[0, 1, 2]) / divisor
    return Moments(mean, tf.reduce_sum(tf.square(z - mean), axis=[0, 1, 2]) / divisor, count)


def _statistics(
    z: tf.Tensor, moving: list[tf.Tensor], training: Any, moments: Callable, momentum: float, unbiased: bool
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """The (mean, variance) to normalize with, and the new moving (mean, variance).

    A `training` known only at run time selects, in place of a tf.cond: replicas must all reduce or none, and TensorFlow
    1 cannot differentiate a tf.cond twice. The zeros keep values that are not finite out of the gradients of inference.
    """
    static = _static(training)
    if static is not None and not static:
        return moving, [tf.identity(m) for m in moving]
    batch = moments(z if static else tf.where(training, z, tf.zeros_like(z)))
    in_use = batch.count > 0 if static else tf.logical_and(training, batch.count > 0)
    sample = batch.variance * (batch.count / tf.maximum(batch.count - 1, 1)) if unbiased else batch.variance
    new = [momentum * m + (1 - momentum) * b for b, m in zip((batch.mean, sample), moving)]
    return tuple([tf.where(in_use, v, m) for v, m in zip(values, moving)] for values in (batch[:2], new))


def _normalize(
    z: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, statistics: list[tf.Tensor], epsilon: float
) -> tf.Tensor:
    """gamma * (z - mean) / sqrt(variance + epsilon) + beta; the mean first, which keeps a large one harmless."""
    mean, variance = statistics
    return (z - mean) * (gamma * tf.math.rsqrt(variance + epsilon)) + beta


# Spelled out where TensorFlow's own has a tf.custom_gradient, which a SavedModel cannot keep (silu), or a constant of
# float32 precision whatever the type (leaky_relu, gelu).
_ACTIVATIONS: dict[str | None, Callable[[tf.Tensor], tf.Tensor]] = {
    None: lambda u: u,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "leaky_relu": lambda u: tf.where(u > 0, u, 0.2 * u),
    "elu": tf.nn.elu,
    "silu": lambda u: u * tf.sigmoid(u),
    "hard_swish": lambda u: u * tf.nn.relu6(u + 3) / 6,
    "gelu": lambda u: 0.5 * u * (1 + tf.math.erf(u * math.sqrt(0.5))),
}


def _static(value: Any) -> Any:
    """The value of a tensor if it is known while the graph is built, else None; of anything else, itself."""
    return tf.get_static_value(value) if tf.is_tensor(value) else value


def _nhwc(images: tf.Tensor, nchw: bool) -> tf.Tensor:
    return tf.transpose(images, [0, 2, 3, 1]) if nchw else images


def _sizes(tensor: tf.Tensor) -> list[Any]:
    """The shape of an image: Python ints where they are known, scalar tensors elsewhere."""
    dynamic = tf.shape(tensor)
    return [dynamic[i] if size is None else size for i, size in enumerate(tensor.shape.as_list())]


def _at_least(minimum: int, value: Any) -> Any:
    return tf.maximum(value, minimum) if tf.is_tensor(value) else max(value, minimum)


def _positions(size: Any, window: Any, stride: int) -> Any:
    """Positions of a window in a padded line; an error where the core has one: it rounds towards 0."""
    room = size - window + stride
    if not tf.is_tensor(room) and room <= -stride:
        _arguments.refuse(ValueError, "filters", f"no larger than the padded inputs, here {size} pixels", window)
    return _at_least(0, room // stride)


def _convolution(strides: Any, dilations: Any, padding: Any) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The convolution of `[N, H, W, C]` with `[kh, kw, C/groups, K]` that the arguments describe."""
    strides, dilations = _arguments.pair("strides", strides), _arguments.pair("dilations", dilations)
    mode, (top, bottom, left, right) = _arguments.padding(padding)

    def pads(sizes: list[Any], windows: list[int]) -> list[Any]:
        if mode != "SAME":
            return [[top, bottom], [left, right]]
        totals = [
            _at_least(0, ((size + stride - 1) // stride - 1) * stride + window - size)
            for size, stride, window in zip(sizes, strides, windows)
        ]
        return [[total // 2, total - total // 2] for total in totals]

    def convolve(inputs: tf.Tensor, filters: tf.Tensor) -> tf.Tensor:
        windows = [(taps - 1) * step + 1 for taps, step in zip(_sizes(filters)[:2], dilations)]
        inputs = tf.pad(inputs, [[0, 0], *pads(_sizes(inputs)[1:3], windows), [0, 0]])
        batch, height, width, _ = _sizes(inputs)
        out = [_positions(*sizes) for sizes in zip((height, width), windows, strides)]
        if not _native(inputs, filters, dilations):
            return _sum_of_taps(inputs, filters, strides, dilations, out)
        return _conv2d(inputs, filters, strides, dilations, [batch, *out, _sizes(filters)[3]])

    return convolve


def _native(inputs: tf.Tensor, filters: tf.Tensor, dilations: tuple[int, int]) -> bool:
    """Whether to use tf.nn.conv2d: with dilations or groups, its gradients have kernels for XLA and GPUs only."""
    channels, depth = inputs.shape.as_list()[3], filters.shape.as_list()[2]
    plain = dilations == (1, 1) and channels == depth
    known = filters.shape.is_fully_defined() and channels is not None
    return plain or in_xla_context() or not known


def _conv2d(
    inputs: tf.Tensor, filters: tf.Tensor, strides: tuple[int, int], dilations: tuple[int, int], shape: list[Any]
) -> tf.Tensor:
    """tf.nn.conv2d; where the result, of the given shape, has no elements, some of its CPU kernels return another."""

    def convolve() -> tf.Tensor:
        return tf.nn.conv2d(inputs, filters, strides, "VALID", dilations=dilations)

    def empty() -> tf.Tensor:
        return tf.zeros(shape, inputs.dtype) + 0 * (tf.reduce_sum(inputs) + tf.reduce_sum(filters))

    pixels = shape[0] * shape[1] * shape[2]
    if _static(pixels) is None:
        return tf.cond(tf.equal(pixels, 0), empty, convolve)
    return convolve() if _static(pixels) else empty()


def _sum_of_taps(
    inputs: tf.Tensor, filters: tf.Tensor, strides: tuple[int, int], dilations: tuple[int, int], out: list[Any]
) -> tf.Tensor:
    """sum over (i, j) of window(i, j) @ filters[i, j] for each group, accumulated in float32 (float64)."""
    batch = _sizes(inputs)[0]
    taps_height, taps_width, depth, out_channels = filters.shape.as_list()
    groups = inputs.shape.as_list()[3] // depth
    accumulator = tf.float64 if inputs.dtype == tf.float64 else tf.float32
    shape = [taps_height, taps_width, depth, groups, out_channels // groups]
    weights = tf.reshape(tf.cast(filters, accumulator), shape)
    total = tf.zeros([batch, *out, *shape[3:]], accumulator)
    for i in range(taps_height):
        for j in range(taps_width):
            rows, columns = i * dilations[0], j * dilations[1]
            window = inputs[
                :, rows : rows + out[0] * strides[0] : strides[0], columns : columns + out[1] * strides[1] : strides[1]
            ]
            window = tf.reshape(tf.cast(window, accumulator), [batch, *out, groups, depth])
            total += tf.einsum("nhwgc,cgk->nhwgk", window, weights[i, j])
    return tf.cast(tf.reshape(total, [batch, *out, out_channels]), inputs.dtype)
