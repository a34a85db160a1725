"""A convolution of every kind before a batch norm, for the tests of folding; FOLD_CONVOLUTIONS has them by name."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from fold_nets import Little, Net, conv, fused
from fold_norms import standard

v1 = tf.compat.v1

norm = standard()


def conv1d(net: Net, x: Any) -> Any:
    """ExpandDims, Conv2D, Squeeze; and another one with a stride and a bias."""
    x = tf.nn.relu(norm(net, tf.nn.conv1d(x, net.kernel(3, 4, 6), stride=1, padding="SAME")))
    z = tf.nn.conv1d(x, net.kernel(3, 6, 5), stride=2, padding="VALID")
    return norm(net, tf.nn.bias_add(z, net.bias(5)))


def conv2d(**arguments: Any) -> Any:
    return lambda net, x: fused(net, conv(net, x, **arguments))


def dilated_old(net: Net, x: Any) -> Any:
    """SpaceToBatchND, Conv2D without padding, BatchToSpaceND, as TensorFlow 1 writes dilations."""
    kernel = net.kernel(3, 3, 4, 6)

    def apply(batches: Any, rates: Any, padding: Any) -> Any:
        return tf.nn.conv2d(batches, kernel, 1, padding)

    z = v1.nn.with_space_to_batch(x, [2, 2], "SAME", apply, filter_shape=tf.constant([3, 3]))
    z.set_shape([None, 9, 8, 6])
    return fused(net, tf.nn.bias_add(z, net.bias(6)))


def depthwise(**arguments: Any) -> Any:
    """Two filters a channel."""
    arguments = {"strides": [1, 1, 1, 1], "padding": "SAME", **arguments}

    def build(net: Net, x: Any) -> Any:
        return fused(net, tf.nn.depthwise_conv2d(x, net.kernel(3, 3, 4, 2), **arguments))

    return build


def depthwise_bias(net: Net, x: Any) -> Any:
    z = tf.nn.depthwise_conv2d(x, net.kernel(3, 3, 4, 1), [1, 2, 2, 1], "VALID")
    return fused(net, tf.nn.bias_add(z, net.bias(4)))


def separable(net: Net, x: Any) -> Any:
    """Depthwise and pointwise in one layer, and the two with a batch norm each."""
    z = tf.nn.separable_conv2d(x, net.kernel(3, 3, 4, 2), net.kernel(1, 1, 8, 6), [1, 1, 1, 1], "SAME")
    x = tf.nn.relu(fused(net, z))
    x = tf.nn.relu6(fused(net, tf.nn.depthwise_conv2d(x, net.kernel(3, 3, 6, 1), [1, 1, 1, 1], "SAME")))
    return fused(net, conv(net, x, 7, 1))


def transposed(net: Net, x: Any) -> Any:
    """Conv2DBackpropInput to a size known from the input."""
    z = tf.nn.conv2d_transpose(x, net.kernel(3, 3, 6, 4), tf.stack([tf.shape(x)[0], 18, 16, 6]), 2, "SAME")
    return fused(net, z)


def transposed_bias(net: Net, x: Any) -> Any:
    z = tf.nn.conv2d_transpose(x, net.kernel(2, 2, 5, 4), tf.stack([tf.shape(x)[0], 18, 16, 5]), 2, "VALID")
    return fused(net, tf.nn.bias_add(z, net.bias(5)))


def grouped(net: Net, x: Any) -> Any:
    """Two groups: a kernel of half of the input's channels. (TensorFlow itself fails to merge it with a fused norm.)"""
    return norm(net, tf.nn.conv2d(x, net.kernel(3, 3, 2, 6), 1, "SAME"))


def conv3d(net: Net, x: Any) -> Any:
    x = tf.nn.relu(norm(net, tf.nn.conv3d(x, net.kernel(3, 3, 3, 2, 4), [1, 1, 1, 1, 1], "SAME")))
    z = tf.nn.conv3d(x, net.kernel(2, 2, 2, 4, 5), [1, 2, 2, 2, 1], "VALID")
    return norm(net, tf.nn.bias_add(z, net.bias(5)))


def dense(net: Net, x: Any) -> Any:
    """MatMul without a bias, MatMul and BiasAdd, MatMul of transposed weights and Add."""
    x = tf.nn.relu(norm(net, tf.matmul(x, net.kernel(7, 6))))
    x = tf.nn.relu(norm(net, tf.nn.bias_add(tf.matmul(x, net.kernel(6, 5)), net.bias(5))))
    return norm(net, tf.matmul(x, net.kernel(4, 5), transpose_b=True) + net.bias(4))


def dense_fused_norm(net: Net, x: Any) -> Any:
    """A fused batch norm between reshapes to images of a pixel and back."""
    z = tf.reshape(tf.matmul(x, net.kernel(7, 6)), [-1, 1, 1, 6])
    return tf.reshape(fused(net, z), [-1, 6])


def dense_sequence(net: Net, x: Any) -> Any:
    """tf.tensordot: Reshape, MatMul, Reshape."""
    return norm(net, tf.tensordot(x, net.kernel(4, 6), [[2], [0]]) + net.bias(6))


def bias_as_add(net: Net, x: Any) -> Any:
    """Biases that AddV2 and Sub add, of rank 1 and 4."""
    x = tf.nn.relu(fused(net, conv(net, x, 6) + net.bias(6)))
    x = tf.nn.relu(fused(net, tf.reshape(net.bias(5), [1, 1, 1, 5]) + conv(net, x, 5)))
    return fused(net, conv(net, x, 4) - net.bias(4))


IMAGE_3D = (None, 5, 6, 4, 2)

FOLD_CONVOLUTIONS: dict[str, Little] = {
    "conv1d": Little(conv1d, 2, 2, (None, 11, 4)),
    "conv2d_same": Little(conv2d()),
    "conv2d_valid_bias": Little(conv2d(padding="VALID", bias=True)),
    "conv2d_strides": Little(conv2d(strides=[1, 2, 1, 1])),
    "conv2d_explicit_padding": Little(conv2d(padding=[[0, 0], [2, 1], [0, 3], [0, 0]], bias=True)),
    "conv2d_dilated": Little(conv2d(dilations=2, bias=True)),
    "conv2d_dilated_old": Little(dilated_old),
    "conv2d_grouped": Little(grouped),
    "conv2d_pointwise": Little(conv2d(size=1)),
    "conv2d_free_sizes": Little(conv2d(bias=True), shape=(None, None, None, 4)),
    "depthwise": Little(depthwise()),
    "depthwise_strides": Little(depthwise(strides=[1, 2, 2, 1], padding="VALID")),
    "depthwise_dilated": Little(depthwise(dilations=[2, 2])),
    "depthwise_bias": Little(depthwise_bias),
    "separable": Little(separable, 3, 3),
    "transposed": Little(transposed),
    "transposed_bias": Little(transposed_bias),
    "conv3d": Little(conv3d, 2, 2, IMAGE_3D),
    "dense": Little(dense, 3, 3, (None, 7)),
    "dense_fused_norm": Little(dense_fused_norm, 1, 1, (None, 7)),
    "dense_sequence": Little(dense_sequence, 1, 1, (None, 5, 4)),
    "bias_as_add": Little(bias_as_add, 3, 3),
}
