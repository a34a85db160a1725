"""A convolution and a batch norm of every spelling, for the tests of folding; FOLD_NORMS has them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from fold_nets import Little, Net, channels, conv, fused

v1 = tf.compat.v1

Norm = Callable[[Net, Any], Any]


def raw_fused(version: str) -> Norm:
    """An operation of FusedBatchNorm by its own name."""

    def norm(net: Net, z: Any) -> Any:
        s = net.statistics(channels(z))
        operation = getattr(tf.raw_ops, f"FusedBatchNorm{version}")
        arguments = {"scale": s.gamma, "offset": s.beta, "mean": s.mean, "variance": s.variance}
        return operation(x=z, **arguments, epsilon=1e-3, is_training=False)[0]

    return norm


def fused_epsilon(epsilon: float) -> Norm:
    return lambda net, z: fused(net, z, epsilon=epsilon)


def fused_v1_epsilon_0(net: Net, z: Any) -> Any:
    """With the epsilon of zero that tf.compat.v1.nn.fused_batch_norm raises."""
    s = net.statistics(channels(z))
    return tf.raw_ops.FusedBatchNorm(
        x=z, scale=s.gamma, offset=s.beta, mean=s.mean, variance=s.variance, epsilon=0.0, is_training=False
    )[0]


def standard(epsilon: float = 1e-3, gamma: bool = True, beta: bool = True) -> Norm:
    """tf.nn.batch_normalization: batchnorm/add, Rsqrt, mul, mul_1, mul_2, sub, add_1."""

    def norm(net: Net, z: Any) -> Any:
        s = net.statistics(channels(z))
        return tf.nn.batch_normalization(
            z, s.mean, s.variance, s.beta if beta else None, s.gamma if gamma else None, epsilon
        )

    return norm


def spread(net: Net, z: Any) -> Any:
    """(x * inv - mean * inv) + beta."""
    s = net.statistics(channels(z))
    inv = s.gamma * tf.math.rsqrt(s.variance + 1e-5)
    return (z * inv - s.mean * inv) + s.beta


def swapped(net: Net, z: Any) -> Any:
    """beta + inv * (x - mean): constants at the left."""
    s = net.statistics(channels(z))
    return s.beta + (tf.math.rsqrt(1e-3 + s.variance) * s.gamma) * (z - s.mean)


def division(net: Net, z: Any) -> Any:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta."""
    s = net.statistics(channels(z))
    return s.gamma * (z - s.mean) / tf.sqrt(s.variance + 1e-5) + s.beta


def power(net: Net, z: Any) -> Any:
    """gamma * ((x - mean) * (variance + epsilon) ** -0.5) + beta, with tf.pow and tf.multiply."""
    s = net.statistics(channels(z))
    return tf.add(tf.multiply(s.gamma, tf.multiply(z - s.mean, tf.pow(s.variance + 1e-3, -0.5))), s.beta)


def caffe(net: Net, z: Any) -> Any:
    """A layer "batch norm" without weights, and a layer "scale"."""
    s = net.statistics(channels(z))
    with tf.name_scope("bn"):
        normal = (z - s.mean) * tf.math.rsqrt(s.variance + 1e-5)
    with tf.name_scope("scale"):
        return tf.nn.bias_add(tf.multiply(normal, s.gamma), s.beta)


def caffe_fused(net: Net, z: Any) -> Any:
    """The same with a fused batch norm of gamma 1 and beta 0 before the scale."""
    s = net.statistics(channels(z))
    ones = tf.ones_like(s.mean)
    normal = v1.nn.fused_batch_norm(z, ones, tf.zeros_like(ones), s.mean, s.variance, 1e-3, is_training=False)[0]
    return normal * s.gamma + s.beta


def division_only(net: Net, z: Any) -> Any:
    """(x - mean) / sqrt(variance): no epsilon, no weights."""
    s = net.statistics(channels(z))
    return tf.math.divide(z - s.mean, tf.sqrt(s.variance))


def global_normalization(after: bool) -> Norm:
    """tf.compat.v1.nn.batch_norm_with_global_normalization."""

    def norm(net: Net, z: Any) -> Any:
        s = net.statistics(channels(z))
        return v1.nn.batch_norm_with_global_normalization(
            t=z,
            m=s.mean,
            v=s.variance,
            beta=s.beta,
            gamma=s.gamma,
            variance_epsilon=1e-3,
            scale_after_normalization=after,
        )

    return norm


def broadcast_statistics(net: Net, z: Any) -> Any:
    """Statistics of shape [1, 1, 1, channels]."""
    s = [tf.reshape(x, [1, 1, 1, -1]) for x in net.statistics(channels(z))]
    return tf.nn.batch_normalization(z, s[2], s[3], s[1], s[0], 1e-3)


NORMS: dict[str, Norm] = {
    "fused": fused,
    "fused_v1": raw_fused(""),
    "fused_v2": raw_fused("V2"),
    "fused_v3": raw_fused("V3"),
    "fused_epsilon_1e-5": fused_epsilon(1.001e-5),
    "fused_epsilon_0": fused_v1_epsilon_0,
    "standard": standard(),
    "standard_epsilon_1e-5": standard(1e-5),
    "standard_epsilon_0": standard(0.0),
    "standard_no_gamma": standard(gamma=False),
    "standard_no_beta": standard(beta=False),
    "standard_neither": standard(gamma=False, beta=False),
    "spread": spread,
    "swapped": swapped,
    "division": division,
    "division_only": division_only,
    "power": power,
    "caffe": caffe,
    "caffe_fused": caffe_fused,
    "global_normalization": global_normalization(True),
    "global_normalization_no_scale": global_normalization(False),
    "broadcast_statistics": broadcast_statistics,
}


def tower(norm: Norm) -> Little:
    """Conv, norm, relu; conv with a bias, norm, relu."""

    def build(net: Net, x: Any) -> Any:
        x = tf.nn.relu(norm(net, conv(net, x)))
        return tf.nn.relu(norm(net, conv(net, x, 5, bias=True, strides=2, padding="VALID")))

    return Little(build, 2, 2)


FOLD_NORMS: dict[str, Little] = {f"norm_{name}": tower(norm) for name, norm in NORMS.items()}
