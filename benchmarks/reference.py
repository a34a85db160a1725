"""The expected result of a problem, computed in float64 by stock ops and the formulas below; imported in workers only.

xhat = (z - mean) / sqrt(variance + epsilon)        u = gamma xhat + beta + residual        y = activation(u)
dz = gamma / sqrt(variance + epsilon) * (du - sum(du) / n - xhat sum(du xhat) / n)          (training)
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from benchmarks.cases import Case
from benchmarks.correctness import bound
from benchmarks.data import Data
from benchmarks.implementations import TRAIN_STEP
from benchmarks.layers import ACTIVATIONS, convolve, stock_shape
from benchmarks.problem import EPSILON, MOMENTUM, Problem

_KINKS: dict[str | None, tuple[float, ...]] = {  # where the derivative jumps
    "relu": (0,),
    "relu6": (0, 6),
    "leaky_relu": (0,),
    "hard_swish": (-3, 3),
}

_AXES = [0, 1, 2]


def _convolve(case: Case, inputs: tf.Tensor, filters: tf.Tensor) -> tf.Tensor:
    """Differentiable everywhere: on CPUs, stock gradients of dilated and of grouped convolutions do not exist."""
    if case.dilation == 1 and (case.groups == 1 or case.depthwise):
        return convolve(case, inputs, tf.reshape(filters, stock_shape(case)))
    top, bottom, left, right = case.pads
    padded = tf.pad(inputs, [(0, 0), (top, bottom), (left, right), (0, 0)])
    grouped = tf.reshape(padded, [*padded.shape[:3], case.groups, -1])
    taps = tf.reshape(filters, [*case.filter_shape[:3], case.groups, -1])

    def window(tap: int, out_size: int) -> slice:
        start = tap * case.dilation
        return slice(start, start + (out_size - 1) * case.stride + 1, case.stride)

    products = [
        tf.einsum("nhwgc,cgk->nhwgk", grouped[:, window(i, case.out_height), window(j, case.out_width)], taps[i, j])
        for i in range(case.filter_height)
        for j in range(case.filter_width)
    ]
    return tf.reshape(tf.add_n(products), case.output_shape(inputs.shape[0]))


def _away_from_kinks(problem: Problem, u: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    """`gradient`, zero where rounding may move u over a kink: there both derivatives are right."""
    scale = bound(problem, "output") * (tf.sqrt(tf.reduce_mean(u * u)) + tf.abs(u))
    for kink in _KINKS.get(problem.case.activation, ()):
        gradient = tf.where(tf.abs(u - kink) <= scale, tf.zeros_like(u), gradient)
    return gradient


def expected(problem: Problem, data: Data) -> dict[str, np.ndarray]:
    """Every result of the problem by name, and the `output_gradient` that a training step begins with."""
    w = data.weights
    x, filters, gamma, beta, old_mean, old_variance = (
        tf.constant(np.asarray(value, np.float64))
        for value in (data.inputs, w.filters, w.gamma, w.beta, w.moving_mean, w.moving_variance)
    )
    with tf.GradientTape() as of_conv:
        of_conv.watch([x, filters])
        z = _convolve(problem.case, x, filters)
    mean, variance = (old_mean, old_variance)
    if problem.training:
        mean = tf.reduce_mean(z, _AXES)
        variance = tf.reduce_mean(tf.square(z - mean), _AXES)
    inv_std = 1 / tf.sqrt(variance + EPSILON)
    xhat = (z - mean) * inv_std
    u = gamma * xhat + beta
    if data.residual is not None:
        u += np.asarray(data.residual, np.float64)
    with tf.GradientTape() as of_activation:
        of_activation.watch(u)
        y = ACTIVATIONS[problem.case.activation](u)
    results = {"conv_output": z, "output": y}
    if problem.training:
        n = problem.pixels
        results["moving_mean"] = MOMENTUM * old_mean + (1 - MOMENTUM) * mean
        results["moving_variance"] = MOMENTUM * old_variance + (1 - MOMENTUM) * variance
        unbiased = variance * (n / max(n - 1, 1))
        results["moving_variance_unbiased"] = MOMENTUM * old_variance + (1 - MOMENTUM) * unbiased
    if problem.mode == TRAIN_STEP:
        dy = _away_from_kinks(problem, u, tf.constant(np.asarray(data.output_gradient, np.float64)))
        du = of_activation.gradient(y, u, dy)
        d_beta, d_gamma = tf.reduce_sum(du, _AXES), tf.reduce_sum(du * xhat, _AXES)
        dz = gamma * inv_std * (du - d_beta / problem.pixels - xhat * d_gamma / problem.pixels)
        d_inputs, d_filters = of_conv.gradient(z, [x, filters], dz)
        results |= {"output_gradient": dy, "d_inputs": d_inputs, "d_filters": d_filters}
        results |= {"d_gamma": d_gamma, "d_beta": d_beta, "d_residual": du}
    return {name: value.numpy() for name, value in results.items()}
