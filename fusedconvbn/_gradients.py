"""The gradient of the op, by `FusedConvBNGrad`, and the gradient of that, by stock ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fusedconvbn import _load, stock

_SHARED_ATTRIBUTES = (
    "strides", "padding", "explicit_paddings", "data_format", "dilations", "epsilon", "momentum",
    "unbiased_moving_variance", "activation", "algorithm", "save",
)  # fmt: skip

# activation'(u) from y = activation(u), as in csrc/activation.h; what is not here is computed from u.
_DERIVATIVE_OF_OUTPUT: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "relu": lambda y: tf.cast(y > 0, y.dtype),
    "relu6": lambda y: tf.cast((y > 0) & (y < 6), y.dtype),
    "leaky_relu": lambda y: tf.where(y > 0, tf.ones_like(y), 0.2 * tf.ones_like(y)),
    "elu": lambda y: tf.where(y < 0, y + 1, tf.ones_like(y)),
}


def _text(op: Any, name: str) -> str:
    return tf.compat.as_str(op.get_attr(name))


def _number(op: Any, name: str) -> float:
    """The shortest decimal number that the attribute, a float of 32 bits, stands for; so the kernels read it too."""
    return float(str(np.float32(op.get_attr(name))))


def _may_save_moments(op: Any) -> bool:
    """Whether forward may save moments of the inputs (csrc/cpu/second_moments.h): backward then wants the output."""
    filters = op.inputs[1].shape
    return filters.is_fully_defined() and filters[:2] == (1, 1) and filters[3] >= 2 * filters[2]


@tf.RegisterGradient("FusedConvBN")
def _gradient(op: Any, *upstream: tf.Tensor | None) -> list[tf.Tensor | None]:
    """Gradients of inputs, filters, gamma, beta, moving_mean, moving_variance, (residual), training.

    Nothing but this gradient reads the op's last three outputs, so nothing flows back through them.
    """
    primary, residual, training = op.inputs[:6], list(op.inputs[6:-1]), op.inputs[-1]
    output, *_, batch_mean, inv_std, conv_out = op.outputs
    upstream = [tf.zeros_like(y) if dy is None else dy for y, dy in zip(op.outputs[:3], upstream[:3])]
    activation = _text(op, "activation")
    linear, from_output = activation == "none", activation in _DERIVATIVE_OF_OUTPUT
    skipped = getattr(op, "skip_input_indices", None) or ()
    needs_residual = bool(residual) and 6 not in skipped
    *gradients, d_residual = _load.ops().fused_conv_bn_grad(
        *upstream,
        *primary,
        residual=[] if linear or from_output else residual,
        output=[output] if from_output and (residual or _may_save_moments(op)) else [],
        batch_mean=batch_mean,
        inv_std=inv_std,
        conv_out=conv_out,
        training=training,
        num_residual_gradient=int(needs_residual and not linear),
        has_residual=bool(residual),
        needs_inputs=0 not in skipped,
        needs_filters=1 not in skipped,
        **{name: op.get_attr(name) for name in _SHARED_ATTRIBUTES},
    )
    gradients = [None if i in skipped else g for i, g in enumerate(gradients)]
    if residual:
        gradients.append((upstream[0] if linear else d_residual[0]) if needs_residual else None)
    return [*gradients, None]


@tf.RegisterGradient("FusedConvBNGrad")
def _gradient_of_gradient(op: Any, *upstream: tf.Tensor | None) -> list[tf.Tensor | None]:
    """Gradients of every input of `FusedConvBNGrad`; of the statistics and conv_out that the op saved, None.

    Those are functions of inputs and filters, and differentiated as such. `output`, where the op reads it, is not
    recomputed (that would take the residual): it is an input like others, whose gradient flows on into the op.
    """
    residuals, outputs = op.get_attr("num_residual"), op.get_attr("num_output")
    variables = op.inputs[: 9 + residuals + outputs]
    needed = [op.get_attr("needs_inputs"), op.get_attr("needs_filters"), *[True] * (len(op.outputs) - 2)]
    wanted = [i for i, dy in enumerate(upstream) if dy is not None and needed[i]]

    def gradients(*values: tf.Tensor) -> list[tf.Tensor]:
        every = _stock_gradients(op, values)
        return [every[i] for i in wanted]

    result = _vector_jacobian(gradients, variables, [upstream[i] for i in wanted])
    return [*result, *[None] * (len(op.inputs) - len(variables))]


def _stock_gradients(op: Any, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """What `FusedConvBNGrad` returns, by stock ops; `values` are its inputs up to the saved statistics."""
    upstream, primary, rest = list(values[:3]), values[3:9], values[9:]
    activation, residual = _text(op, "activation"), rest[: op.get_attr("num_residual")]
    d_residual = []
    if op.get_attr("num_output"):
        y = tf.cast(rest[-1], primary[2].dtype)
        upstream[0] = tf.cast(tf.cast(upstream[0], y.dtype) * _DERIVATIVE_OF_OUTPUT[activation](y), rest[-1].dtype)
        activation, d_residual = "none", [upstream[0]]

    def forward(*sources: tf.Tensor) -> stock.FusedConvBNOutput:
        return stock.fused_conv_bn(*sources, activation=None if activation == "none" else activation, **_arguments(op))

    return [*_vector_jacobian(forward, [*primary, *residual], upstream), *d_residual]


def _arguments(op: Any) -> dict[str, Any]:
    """Keyword arguments of `fused_conv_bn` for the attributes and `training` of a `FusedConvBNGrad`."""
    data_format, padding = _text(op, "data_format"), _text(op, "padding")
    spatial = slice(1, 3) if data_format == "NHWC" else slice(2, 4)
    if padding == "EXPLICIT":
        pads = op.get_attr("explicit_paddings")
        padding = list(zip(pads[::2], pads[1::2]))[spatial]
    return {
        "strides": tuple(op.get_attr("strides")[spatial]),
        "dilations": tuple(op.get_attr("dilations")[spatial]),
        "padding": padding,
        "data_format": data_format,
        "training": op.inputs[-1],
        "epsilon": _number(op, "epsilon"),
        "momentum": _number(op, "momentum"),
        "unbiased_moving_variance": op.get_attr("unbiased_moving_variance"),
    }


def _vector_jacobian(
    function: Callable[..., Sequence[tf.Tensor]], variables: Sequence[tf.Tensor], upstream: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Gradients of `function(*variables)` for the gradients `upstream` of its results; zeros where it is constant.

    The copies keep out what connects one variable to another outside of the function. Graphs are differentiated by
    tf.gradients, as a tape cannot see through the control flow of TensorFlow 1.
    """
    variables, zero = [tf.identity(variable) for variable in variables], tf.UnconnectedGradients.ZERO
    if not tf.executing_eagerly():
        return tf.gradients(list(function(*variables)), variables, list(upstream), unconnected_gradients=zero)
    with tf.GradientTape() as tape:
        tape.watch(variables)
        results = list(function(*variables))
    return tape.gradient(results, variables, list(upstream), unconnected_gradients=zero)
