"""Batch statistics over all replicas of `tf.distribute`, on stock ops."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from fusedconvbn import stock
from fusedconvbn.stock import Moments


def spans_replicas() -> bool:
    """Whether the code runs once per replica, on more than one."""
    context = tf.distribute.get_replica_context()
    return context is not None and context.num_replicas_in_sync > 1


def replica_moments(z: tf.Tensor) -> Moments:
    """Mean and biased variance of `z` over N,H,W and all replicas, which may hold batches of different sizes.

    Two all-reduces, one after the other: sum and count give a first mean, then the sums of the deviations from it and
    of their squares give what it lacks and the variance. Nothing large is subtracted from anything large. The result
    does not depend on the first mean, so no gradient flows through it; all others are all-reduced like the sums.
    """
    context = tf.distribute.get_replica_context()
    axes, channels = [0, 1, 2], z.shape[-1]
    local_count = tf.cast(tf.reduce_prod(tf.shape(z, tf.int64)[:-1]), z.dtype)
    sums = tf.concat([tf.reduce_sum(tf.stop_gradient(z), axes), local_count[tf.newaxis]], 0)
    sums = context.all_reduce(tf.distribute.ReduceOp.SUM, sums)
    count = sums[channels]
    divisor = tf.maximum(count, 1)
    first_mean = sums[:channels] / divisor
    deviation = z - first_mean
    sums = tf.concat([tf.reduce_sum(deviation, axes), tf.reduce_sum(tf.square(deviation), axes)], 0)
    mean, square = tf.split(context.all_reduce(tf.distribute.ReduceOp.SUM, sums) / divisor, 2)
    return Moments(first_mean + mean, square - tf.square(mean), count)


def conv_bn_over_replicas(
    inputs: tf.Tensor,
    filters: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    moving_mean: tf.Tensor,
    moving_variance: tf.Tensor,
    residual: tf.Tensor | None,
    *,
    training: bool | tf.Tensor,
    **attributes: Any,
) -> stock.FusedConvBNOutput:
    """`fused_conv_bn` whose batch is that of all replicas.

    The all-reduces run even where a tensor `training` turns out false: `tf.distribute` allows none under a `tf.cond`.
    """

    def moments(z: tf.Tensor) -> Moments:
        mean, variance, count = replica_moments(z)
        return Moments(tf.where(training, mean, moving_mean), tf.where(training, variance, moving_variance), count)

    result = stock.fused_conv_bn(
        inputs, filters, gamma, beta, moving_mean, moving_variance, residual,
        training=True, moments=moments, **attributes,
    )  # fmt: skip
    return stock.FusedConvBNOutput(
        result.output,
        tf.where(training, result.moving_mean, moving_mean),
        tf.where(training, result.moving_variance, moving_variance),
    )
