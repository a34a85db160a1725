"""Batch norms at places where they fold into convolutions, and where they must not; FOLD_PLACES has them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from fold_nets import Little, Net, channels, conv, fused
from fold_norms import standard

v1 = tf.compat.v1

norm = standard()


def between(operation: Callable[[Any], Any], **statistics: bool) -> Callable[[Net, Any], Any]:
    """Conv, `operation`, norm."""
    return lambda net, x: tf.nn.relu(fused(net, operation(conv(net, x, bias=True)), **statistics))


def identities(net: Net, x: Any) -> Any:
    """Operations that only name, check or stop gradients: of values, of weights, of statistics."""
    s = net.statistics(6)
    kernel = tf.identity(tf.stop_gradient(net.kernel(3, 3, 4, 6)))
    z = tf.nn.conv2d(tf.identity(x), kernel, 1, "SAME")
    z = tf.debugging.check_numerics(tf.stop_gradient(tf.identity(z)), "not finite")
    z = tf.raw_ops.PreventGradient(input=z, message="no gradient")
    mean, variance = tf.identity(s.mean), tf.stop_gradient(s.variance)
    return tf.identity(tf.nn.relu(v1.nn.fused_batch_norm(z, s.gamma, s.beta, mean, variance, is_training=False)[0]))


def dropout_tf1(x: Any) -> Any:
    """What tf.nn.dropout of TensorFlow 1.12 wrote: floor(keep_prob + uniform) * (x / keep_prob)."""
    with tf.name_scope("dropout"):
        keep_prob = tf.constant(1.0, name="keep_prob")
        uniform = v1.random_uniform(tf.shape(x), name="random_uniform")
        return tf.math.divide(x, keep_prob, name="div") * tf.floor(keep_prob + uniform)


def dropout_keep(x: Any) -> Any:
    return v1.nn.dropout(x, keep_prob=tf.constant(1.0))


def dropout_rate(x: Any) -> Any:
    return tf.nn.dropout(x, rate=tf.constant(0.0))


def after_concat(net: Net, x: Any) -> Any:
    parts = [conv(net, x, 4), conv(net, x, 3, 1, bias=True)]
    return tf.nn.relu(fused(net, tf.concat(parts, 3)))


def after_concat_of_input(net: Net, x: Any) -> Any:
    """One part is no convolution's."""
    return tf.nn.relu(fused(net, tf.concat([conv(net, x, 4), x], 3)))


def after_split(net: Net, x: Any) -> Any:
    parts = tf.split(conv(net, x, 8, bias=True), 2, axis=3)
    return tf.concat([tf.nn.relu(fused(net, part)) for part in parts], 3)


def after_add(net: Net, x: Any) -> Any:
    """The sum of two convolutions that nothing else reads."""
    return tf.nn.relu(fused(net, conv(net, x) + conv(net, x, 6, 1, bias=True)))


def after_add_of_input(net: Net, x: Any) -> Any:
    return tf.nn.relu(fused(net, conv(net, x, 4) + x))


def residual(net: Net, x: Any) -> Any:
    """A block with an identity, and a block with a projection."""
    x = tf.nn.relu(fused(net, conv(net, x, 4)) + x)
    return tf.nn.relu(fused(net, conv(net, x, 6, strides=2)) + fused(net, conv(net, x, 6, 1, strides=2)))


def twice(net: Net, x: Any) -> Any:
    """Two batch norms after each other."""
    return tf.nn.relu(norm(net, fused(net, conv(net, x))))


def flat(size: int) -> Callable[[Net, Any], Any]:
    """Conv without padding, flatten, norm, dense: foldable where the convolution leaves one pixel."""

    def build(net: Net, x: Any) -> Any:
        z = conv(net, x, 6, size, padding="VALID")
        z = tf.reshape(z, [-1, int(np.prod(z.shape[1:]))])
        return tf.matmul(tf.nn.relu(norm(net, z)), net.kernel(channels(z), 3))

    return build


def channels_first(net: Net, x: Any) -> Any:
    """A transposition, and statistics of shape [channels, 1, 1]."""
    z = tf.transpose(conv(net, x), [0, 3, 1, 2])
    s = [tf.reshape(value, [6, 1, 1]) for value in net.statistics(6)]
    return tf.nn.relu(tf.nn.batch_normalization(z, s[2], s[3], s[1], s[0], 1e-3))


def one_kernel(net: Net, x: Any) -> Any:
    """Three convolutions of one kernel: two with a batch norm each, one with none."""
    kernel = net.kernel(3, 3, 4, 6)
    first, second, bare = (tf.nn.conv2d(v, kernel, 1, "SAME") for v in (x, -x, x * x))
    return tf.nn.relu(fused(net, first)) + tf.nn.relu(fused(net, second)) + tf.nn.relu(bare)


def before(*, shift: bool = True, **arguments: Any) -> Callable[[Net, Any], Any]:
    """Norm of the input, then a convolution with these arguments."""
    return lambda net, x: tf.nn.relu(conv(net, fused(net, x, shift=shift), bias=True, **arguments))


def before_several(net: Net, x: Any) -> Any:
    """Three convolutions read the batch norm, none of which pads."""
    x = fused(net, tf.nn.relu(x))
    first, second = conv(net, x, padding="VALID"), conv(net, x, padding="VALID", bias=True)
    return tf.nn.relu(first + second) + tf.nn.relu(conv(net, x, 1, 1))[:, 1:-1, 1:-1]


def before_several_and_more(net: Net, x: Any) -> Any:
    """A convolution and a sum read the batch norm."""
    x = fused(net, tf.nn.relu(x))
    return tf.nn.relu(conv(net, x, 4, 1) + x)


def before_dense(net: Net, x: Any) -> Any:
    """Relu, norm, flatten, dense."""
    x = fused(net, tf.nn.relu(x))
    return tf.nn.bias_add(tf.matmul(tf.reshape(x, [-1, 9 * 8 * 4]), net.kernel(9 * 8 * 4, 5)), net.bias(5))


def before_pool_and_dense(**statistics: bool) -> Callable[[Net, Any], Any]:
    """Relu, norm, maximum, flatten, dense, as in the last block of a VGG of TensorFlow 1."""

    def build(net: Net, x: Any) -> Any:
        x = tf.nn.max_pool2d(fused(net, tf.nn.relu(x), **statistics), 4, 4, "VALID")
        return tf.nn.bias_add(tf.matmul(tf.reshape(x, [-1, 16]), net.kernel(16, 5)), net.bias(5))

    return build


def before_pad(net: Net, x: Any, **statistics: bool) -> Any:
    """Norm, Pad with zeros, convolution without padding."""
    x = tf.pad(fused(net, x, **statistics), [[0, 0], [1, 1], [2, 0], [0, 0]])
    return tf.nn.relu(conv(net, x, padding="VALID", bias=True))


def before_depthwise(net: Net, x: Any) -> Any:
    return tf.nn.relu(tf.nn.depthwise_conv2d(fused(net, x), net.kernel(3, 3, 4, 2), [1, 1, 1, 1], "VALID"))


def before_transposed(**statistics: bool) -> Callable[[Net, Any], Any]:
    def build(net: Net, x: Any) -> Any:
        size = tf.stack([tf.shape(x)[0], 18, 16, 6])
        return tf.nn.relu(tf.nn.conv2d_transpose(fused(net, x, **statistics), net.kernel(3, 3, 6, 4), size, 2, "SAME"))

    return build


def read_twice(net: Net, x: Any) -> Any:
    """An activation of another kind reads the convolution too."""
    z = conv(net, x)
    return [tf.nn.relu(fused(net, z)), tf.nn.tanh(z)]


def read_as_output(net: Net, x: Any) -> Any:
    """The convolution's output is also an output of the graph."""
    z = conv(net, x)
    return [tf.nn.relu(fused(net, z)), z]


def read_by_sum(net: Net, x: Any) -> Any:
    """The batch norm and the sum after it read the convolution."""
    z = conv(net, x)
    return tf.nn.relu(fused(net, z) + z)


def batch_statistics(net: Net, x: Any) -> Any:
    """is_training=True at inference."""
    s = net.statistics(6)
    return tf.nn.relu(v1.nn.fused_batch_norm(conv(net, x), s.gamma, s.beta, is_training=True)[0])


def batch_moments(net: Net, x: Any) -> Any:
    """tf.nn.moments and tf.nn.batch_normalization."""
    s, z = net.statistics(6), conv(net, x)
    return tf.nn.relu(tf.nn.batch_normalization(z, *tf.nn.moments(z, [0, 1, 2]), s.beta, s.gamma, 1e-3))


def computed_kernel(net: Net, x: Any) -> Any:
    """Weights that depend on the input."""
    weights = tf.matmul(tf.reduce_mean(x, [0, 1], keepdims=True)[0, 0], net.kernel(4, 3 * 3 * 4 * 6))
    kernel = tf.reshape(weights[0], [3, 3, 4, 6])
    return tf.nn.relu(fused(net, tf.nn.conv2d(x, kernel, 1, "SAME")))


def fed_statistics(net: Net, x: Any) -> Any:
    """A mean that depends on the input."""
    s, z = net.statistics(6), conv(net, x)
    mean = s.mean + tf.reduce_mean(x)
    return tf.nn.relu(tf.nn.batch_normalization(z, mean, s.variance, s.beta, s.gamma, 1e-3))


def maximum(x: Any) -> Any:
    return tf.nn.max_pool2d(x, 2, 2, "VALID")


def average(padding: str) -> Callable[[Any], Any]:
    return lambda x: tf.nn.avg_pool2d(x, 3, 2, padding)


def pad(x: Any) -> Any:
    return tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])


FOLD_PLACES: dict[str, Little] = {
    "identities": Little(identities),
    "dropout_tf1": Little(between(dropout_tf1)),
    "dropout_keep_prob": Little(between(dropout_keep)),
    "dropout_rate": Little(between(dropout_rate)),
    "after_concat": Little(after_concat),
    "after_concat_of_input": Little(after_concat_of_input, 1, 0),
    "after_split": Little(after_split, 2, 2),
    "after_add": Little(after_add),
    "after_add_of_input": Little(after_add_of_input, 1, 0),
    "after_average": Little(between(average("VALID"))),
    "after_average_same": Little(between(average("SAME"))),
    "after_maximum": Little(between(maximum, positive=True)),
    "after_maximum_negative": Little(between(maximum), 1, 0),
    "after_reshape": Little(between(lambda x: tf.reshape(x, [-1, 8, 9, 6]))),
    "after_flatten_of_pixel": Little(flat(5), shape=(None, 5, 5, 4)),
    "after_flatten": Little(flat(3), 1, 0, (None, 5, 5, 4)),
    "after_transpose": Little(channels_first),
    "after_pad": Little(between(pad), 1, 0),
    "after_relu": Little(between(tf.nn.relu), 1, 0),
    "residual": Little(residual, 3, 3),
    "twice": Little(twice, 2, 2),
    "one_kernel": Little(one_kernel, 2, 2),
    "before_valid": Little(before(padding="VALID")),
    "before_pointwise_same": Little(before(size=1)),
    "before_same": Little(before(), 1, 0),
    "before_same_no_shift": Little(before(shift=False)),
    "before_valid_strides": Little(before(padding="VALID", strides=2)),
    "before_several": Little(before_several),
    "before_several_and_more": Little(before_several_and_more, 1, 0),
    "before_dense": Little(before_dense),
    "before_maximum_and_dense": Little(before_pool_and_dense(positive=True)),
    "before_maximum_and_dense_negative": Little(before_pool_and_dense(), 1, 0),
    "before_pad": Little(before_pad, 1, 0),
    "before_pad_no_shift": Little(lambda net, x: before_pad(net, x, shift=False)),
    "before_pad_one_channel": Little(before_pad, shape=(None, 9, 8, 1)),
    "before_same_one_channel": Little(before(), shape=(None, 9, 8, 1)),
    "before_depthwise": Little(before_depthwise),
    "before_transposed": Little(before_transposed(), 1, 0),
    "before_transposed_no_shift": Little(before_transposed(shift=False)),
    "read_twice": Little(read_twice, 1, 0),
    "read_as_output": Little(read_as_output, 1, 0),
    "read_by_sum": Little(read_by_sum, 1, 0),
    "batch_statistics": Little(batch_statistics, 1, 0),
    "batch_moments": Little(batch_moments, 1, 0),
    "computed_kernel": Little(computed_kernel, 1, 0),
    "fed_statistics": Little(fed_statistics, 1, 0),
}
