"""One function for each implementation: problem and weights -> the layers of one graph. Imported in workers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.cases import Case
from benchmarks.folding import fold
from benchmarks.networks import Weights
from benchmarks.problem import EPSILON, MOMENTUM, Problem

ACTIVATIONS: dict[str | None, Callable[[tf.Tensor], tf.Tensor]] = {
    None: lambda u: u,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "leaky_relu": tf.nn.leaky_relu,
    "elu": tf.nn.elu,
    "silu": tf.nn.silu,
    "hard_swish": lambda u: u * tf.nn.relu6(u + 3) / 6,
    "gelu": tf.nn.gelu,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer ready to be called in a graph."""

    forward: Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor]  # assigns the moving statistics in training
    trainable: Sequence[tf.Variable]  # filters, gamma, beta
    moving: Sequence[tf.Variable] = ()  # mean, variance
    unbiased: bool = False  # the moving variance follows the n/(n-1) rule
    result: str = "output"  # what forward returns, by its name in the reference


class _Variables:
    """The variables of one copy; the copies share their filters."""

    def __init__(self, filters: tf.Variable, weights: Weights):
        self.filters = filters
        self.gamma, self.beta = tf.Variable(weights.gamma), tf.Variable(weights.beta)
        self.mean = tf.Variable(weights.moving_mean, trainable=False)
        self.variance = tf.Variable(weights.moving_variance, trainable=False)
        self._switch = weights.switch

    def training(self, problem: Problem) -> bool | tf.Tensor:
        return problem.training if self._switch is None else self._switch.read_value()

    def assign(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        self.mean.assign(mean)
        self.variance.assign(variance)


def stock_shape(case: Case) -> tuple[int, ...]:
    """Of the filters as TensorFlow wants them: [kh,kw,C,multiplier] for a depthwise convolution, the same order."""
    if not case.depthwise:
        return case.filter_shape
    return (case.filter_height, case.filter_width, case.channels, case.out_channels // case.channels)


def convolve(case: Case, inputs: tf.Tensor, filters: tf.Tensor) -> tf.Tensor:
    """Stock TensorFlow's convolution; filters of stock_shape."""
    pads = case.op_padding if isinstance(case.padding, str) else [(0, 0), *case.op_padding, (0, 0)]
    if case.depthwise:
        strides, dilations = [1, case.stride, case.stride, 1], [case.dilation, case.dilation]
        return tf.nn.depthwise_conv2d(inputs, filters, strides, pads, dilations=dilations)
    return tf.nn.conv2d(inputs, filters, case.stride, pads, dilations=case.dilation)


def _finish(case: Case, normalized: tf.Tensor, residual: tf.Tensor | None) -> tf.Tensor:
    return ACTIVATIONS[case.activation](normalized if residual is None else normalized + residual)


def _filters(array: np.ndarray) -> tf.Variable:
    """In memory of TensorFlow's own, as trained or restored: of an array that it takes over, no packed copy is kept."""
    return tf.Variable(tf.convert_to_tensor(array) * 1)


Forward = Callable[[tf.Tensor, "tf.Tensor | None", _Variables], tf.Tensor]


def _stock_layers(problem: Problem, weights: Weights, forward: Forward, **properties: Any) -> list[Layer]:
    filters = _filters(weights.filters.reshape(stock_shape(problem.case)))
    return _copies(problem, weights, filters, forward, **properties)


def _copies(
    problem: Problem, weights: Weights, filters: tf.Variable, forward: Forward, **properties: Any
) -> list[Layer]:
    def layer(v: _Variables) -> Layer:
        trainable, moving = (v.filters, v.gamma, v.beta), (v.mean, v.variance)
        return Layer(lambda inputs, residual: forward(inputs, residual, v), trainable, moving, **properties)

    return [layer(_Variables(filters, weights)) for _ in range(problem.copies)]


def ours(problem: Problem, weights: Weights) -> list[Layer]:
    """`fusedconvbn.fused_conv_bn`."""
    from fusedconvbn import fused_conv_bn

    case = problem.case

    def forward(inputs: tf.Tensor, residual: tf.Tensor | None, v: _Variables) -> tf.Tensor:
        training = v.training(problem)
        result = fused_conv_bn(
            inputs, v.filters, v.gamma, v.beta, v.mean, v.variance, residual,
            strides=case.stride, dilations=case.dilation, padding=case.op_padding, epsilon=EPSILON, momentum=MOMENTUM,
            activation=case.activation, training=training, algorithm=problem.algorithm, save=problem.save,
        )  # fmt: skip
        if training is not False:
            v.assign(result.moving_mean, result.moving_variance)
        return result.output

    return _copies(problem, weights, _filters(weights.filters), forward)


def _fused_batch_norm(z: tf.Tensor, v: _Variables, training: bool) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(output, new moving mean, new moving variance): the op itself does the exponential average."""
    factor = 1 - MOMENTUM if training else 1.0
    return tf.compat.v1.nn.fused_batch_norm(
        z, v.gamma, v.beta, v.mean, v.variance, EPSILON, is_training=training, exponential_avg_factor=factor
    )


def raw(problem: Problem, weights: Weights) -> list[Layer]:
    """`tf.nn.conv2d`, `fused_batch_norm`, addition, activation."""

    def forward(inputs: tf.Tensor, residual: tf.Tensor | None, v: _Variables) -> tf.Tensor:
        z = convolve(problem.case, inputs, v.filters)
        normalized, *moving = _fused_batch_norm(z, v, problem.training)
        if problem.training:
            v.assign(*moving)
        return _finish(problem.case, normalized, residual)

    return _stock_layers(problem, weights, forward, unbiased=True)


def cond(problem: Problem, weights: Weights) -> list[Layer]:
    """`fused_batch_norm` takes its mode when the graph is built: one subgraph for each, chosen by `tf.cond`."""

    def forward(inputs: tf.Tensor, residual: tf.Tensor | None, v: _Variables) -> tf.Tensor:
        z = convolve(problem.case, inputs, v.filters)
        normalized, *moving = tf.cond(
            v.training(problem), lambda: _fused_batch_norm(z, v, True), lambda: _fused_batch_norm(z, v, False)
        )
        v.assign(*moving)
        return _finish(problem.case, normalized, residual)

    return _stock_layers(problem, weights, forward, unbiased=True)


def moments(problem: Problem, weights: Weights) -> list[Layer]:
    """Batch norm as one writes it by hand, statistics in float32 at least; a switch chooses the statistics."""

    def of_batch(z: tf.Tensor, v: _Variables) -> list[tf.Tensor]:
        batch = tf.nn.moments(z, [0, 1, 2])
        moving = [MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip((v.mean, v.variance), batch, strict=True)]
        return [*batch, *moving]

    def of_past(v: _Variables) -> list[tf.Tensor]:
        return [v.mean.read_value(), v.variance.read_value()] * 2

    def forward(inputs: tf.Tensor, residual: tf.Tensor | None, v: _Variables) -> tf.Tensor:
        z = tf.cast(convolve(problem.case, inputs, v.filters), v.gamma.dtype)
        training = v.training(problem)
        if isinstance(training, bool):
            mean, variance, *moving = of_batch(z, v) if training else of_past(v)
        else:
            mean, variance, *moving = tf.cond(training, lambda: of_batch(z, v), lambda: of_past(v))
        if training is not False:
            v.assign(*moving)
        normalized = tf.nn.batch_normalization(z, mean, variance, v.beta, v.gamma, EPSILON)
        return _finish(problem.case, tf.cast(normalized, inputs.dtype), residual)

    return _stock_layers(problem, weights, forward)


def bare_conv(problem: Problem, weights: Weights) -> list[Layer]:
    """The convolution alone."""
    filters = _filters(weights.filters.reshape(stock_shape(problem.case)))
    layer = Layer(lambda inputs, residual: convolve(problem.case, inputs, filters), [filters], result="conv_output")
    return [layer] * problem.copies


def folded(problem: Problem, weights: Weights) -> list[Layer]:
    """What one gets who folds batch norm by hand."""
    kernel, offset = fold(weights)
    filters, bias = tf.Variable(kernel.reshape(stock_shape(problem.case))), tf.Variable(offset)

    def forward(inputs: tf.Tensor, residual: tf.Tensor | None) -> tf.Tensor:
        return _finish(problem.case, tf.nn.bias_add(convolve(problem.case, inputs, filters), bias), residual)

    return [Layer(forward, [filters, bias])] * problem.copies


def keras_layers(problem: Problem, weights: Weights) -> list[Layer]:
    """Keras 3's own layers; 16-bit types by the mixed policy, as its users have them."""
    import keras

    case = problem.case
    policy = f"mixed_{problem.dtype}" if "16" in problem.dtype else problem.dtype
    convolution = _keras_convolution(case, policy)
    convolution.build(case.input_shape(problem.batch))
    convolution.kernel.assign(weights.filters.reshape(stock_shape(case)))
    pads = case.op_padding if isinstance(case.padding, tuple) else 0
    pad = keras.layers.ZeroPadding2D(pads, dtype=policy) if pads else None
    add, activate = keras.layers.Add(dtype=policy), keras.layers.Activation(case.activation, dtype=policy)

    def layer() -> Layer:
        norm = keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, dtype=policy)
        norm.build(case.output_shape(problem.batch))
        norm.set_weights([weights.gamma, weights.beta, weights.moving_mean, weights.moving_variance])

        def forward(inputs: tf.Tensor, residual: tf.Tensor | None) -> tf.Tensor:
            y = norm(convolution(pad(inputs) if pad else inputs), training=problem.training)
            return activate(y if residual is None else add([y, residual]))

        variables = [convolution.kernel, *norm.weights]
        values = [variable.value for variable in variables]
        return Layer(forward, values[:3], values[3:])

    return [layer() for _ in range(problem.copies)]


def _keras_convolution(case: Case, policy: str) -> Any:
    import keras

    common = {
        "kernel_size": (case.filter_height, case.filter_width),
        "strides": case.stride,
        "padding": case.padding.lower() if isinstance(case.padding, str) else "valid",  # a layer of its own pads
        "dilation_rate": case.dilation,
        "use_bias": False,
        "dtype": policy,
    }
    if case.depthwise:
        return keras.layers.DepthwiseConv2D(depth_multiplier=case.out_channels // case.channels, **common)
    return keras.layers.Conv2D(case.out_channels, groups=case.groups, **common)
