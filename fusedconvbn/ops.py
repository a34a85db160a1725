"""`fused_conv_bn`: the TensorFlow op behind a function that checks its arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from fusedconvbn import _arguments, _gradients, _load, stock  # noqa: F401  (registers the gradients)
from fusedconvbn.stock import FusedConvBNOutput

__all__ = ["FusedConvBNOutput", "fused_conv_bn"]

_DATA_TYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)


def register() -> None:
    """Registers `FusedConvBN` and `FusedConvBNGrad` with TensorFlow and XLA.

    Their gradients are registered since this module is there.

    Raises:
        ImportError: The library is not built, or built for another TensorFlow.
    """
    _load.ops()
    _load.xla()


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
) -> FusedConvBNOutput:
    """Convolution, batch normalization, residual and activation, as one op.

        z = conv(inputs, filters)
        mean, variance = moments of z over N, H, W if training else moving_mean, moving_variance
        output = activation(gamma * (z - mean) / sqrt(variance + epsilon) + beta + residual)

    Statistics, normalization and activation are computed in float32 (float64 for float64 inputs) whatever the type of
    the inputs; the statistics are those of z rounded to it. The op keeps no state: to update moving statistics, assign
    the returned ones. It has gradients with respect to every tensor argument but `training`, also through the returned
    moving statistics. Arguments may be tensors, variables, or whatever converts to a tensor.

    XLA (`jit_compile=True`) compiles it to calls of the same kernels. Where it cannot (`fusedconvbn info` says why),
    stock ops that compute the same take the op's place in functions that are traced for XLA.

    Args:
        inputs: `[N, H, W, C]`, or `[N, C, H, W]` for "NCHW"; float16, bfloat16, float32 or float64.
        filters: `[kh, kw, C / groups, K]`, the dtype of `inputs`. `C / filters.shape[2]` is the number of groups.
        gamma: `[K]`, float32, or float64 for float64 `inputs`; so are the next three.
        beta: `[K]`.
        moving_mean: `[K]`.
        moving_variance: `[K]`.
        residual: None, or what is added before the activation: shape and dtype of the output.
        strides: Of the window, in pixels: an int or a pair (height, width).
        dilations: Distance between the window's taps, in pixels: an int or a pair (height, width).
        padding: "SAME", "VALID" or [(top, bottom), (left, right)] in pixels.
        data_format: "NHWC" or "NCHW".
        epsilon: Added to the variance.
        momentum: Weight of the old moving statistics: `new = momentum * old + (1 - momentum) * batch`.
        unbiased_moving_variance: The moving variance takes `n / (n - 1)` times the batch's variance, as in
            `tf.compat.v1.nn.fused_batch_norm`; by default the batch's variance itself, as in Keras.
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.2), "elu" (alpha 1), "silu", "hard_swish" or "gelu"
            (the exact one).
        training: A bool, or a scalar bool tensor, which decides when the op runs.
        algorithm: "auto", "direct", or "winograd2" or "winograd4" for 3x3 filters with strides, dilations and groups
            of 1.
        save: What training may keep for the gradient: "conv", the convolution's result (or less, where the gradient is
            as fast with it); "bfloat16", the same rounded to bfloat16 where the inputs are float32: half the memory,
            gradients within 2^-8 of their size; "recompute", nothing as large: the gradient computes the convolution
            again.
        name: Of the op.

    Returns:
        `FusedConvBNOutput(output, moving_mean, moving_variance)`: `[N, OH, OW, K]` or `[N, K, OH, OW]`, and the new
        moving statistics, which in inference, and for an empty batch, are the old ones.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range; in graphs also where shapes do not fit.
        tf.errors.InvalidArgumentError: Shapes do not fit, found when the op runs.
        ImportError: The library is not built, or built for another version of TensorFlow.

    Example:
        >>> import fusedconvbn
        >>> images, filters = tf.random.normal([8, 32, 32, 3]), tf.random.normal([3, 3, 3, 16])
        >>> mean, variance = tf.Variable(tf.zeros(16)), tf.Variable(tf.ones(16))
        >>> result = fusedconvbn.fused_conv_bn(
        ...     images, filters, tf.ones(16), tf.zeros(16), mean, variance,
        ...     padding="SAME", activation="relu", training=True)
        >>> mean.assign(result.moving_mean), variance.assign(result.moving_variance)
        >>> result.output.shape
        TensorShape([8, 32, 32, 16])
    """
    attributes = _attributes(
        strides, dilations, padding, data_format, activation,
        epsilon=_attribute("epsilon", _arguments.epsilon(epsilon)),
        momentum=_attribute("momentum", _arguments.momentum(momentum)),
        unbiased_moving_variance=_arguments.flag("unbiased_moving_variance", unbiased_moving_variance),
        algorithm=_arguments.algorithm(algorithm), save=_arguments.save(save),
    )  # fmt: skip
    inputs = _tensor("inputs", inputs)
    stat = tf.float64 if inputs.dtype == tf.float64 else tf.float32
    tensors = {"inputs": inputs, "filters": _tensor("filters", filters, inputs.dtype)}
    for key, value in (
        ("gamma", gamma), ("beta", beta), ("moving_mean", moving_mean), ("moving_variance", moving_variance),
    ):  # fmt: skip
        tensors[key] = _tensor(key, value, stat)
    residual = None if residual is None else _tensor("residual", residual, inputs.dtype)
    training = _switch(training)
    if _load.xla() is not None and stock.in_xla_context():
        return stock.fused_conv_bn(
            **tensors, residual=residual, strides=strides, dilations=dilations, padding=padding,
            data_format=data_format, epsilon=epsilon, momentum=momentum,
            unbiased_moving_variance=unbiased_moving_variance, activation=activation, training=training, name=name,
        )  # fmt: skip
    results = _load.ops().fused_conv_bn(
        **tensors, residual=[] if residual is None else [residual], training=training, name=name,
        keep_filters=_may_keep(tensors["filters"]), **attributes,
    )  # fmt: skip
    return FusedConvBNOutput(*results[:3])


def _attributes(
    strides: Any, dilations: Any, padding: Any, data_format: Any, activation: Any, **others: Any
) -> dict[str, Any]:
    """The op's attributes, which are laid out as Conv2D's: an entry for each dimension of the inputs."""
    nhwc = _arguments.data_format(data_format) == "NHWC"
    mode, (top, bottom, left, right) = _arguments.padding(padding)
    pads = [0, 0, top, bottom, left, right, 0, 0] if nhwc else [0, 0, 0, 0, top, bottom, left, right]

    def steps(name: str, value: Any) -> list[int]:
        height, width = _arguments.pair(name, value)
        return [1, height, width, 1] if nhwc else [1, 1, height, width]

    return {
        "strides": steps("strides", strides),
        "dilations": steps("dilations", dilations),
        "padding": mode,
        "explicit_paddings": pads if mode == "EXPLICIT" else [],
        "data_format": data_format,
        "activation": _arguments.activation(activation) or "none",
        **others,
    }


def _attribute(name: str, value: float) -> float:
    """`value`, which the op keeps in float32, refused where that turns it into 0, 1 or infinity."""
    rounded = float(np.float32(value)) if value <= float(np.finfo(np.float32).max) else math.inf
    if rounded != value and rounded in (0.0, 1.0, math.inf):
        _arguments.refuse(ValueError, name, f"a number that float32 tells from {rounded:g}", value)
    return value


def _tensor(name: str, value: Any, dtype: tf.DType | None = None) -> tf.Tensor:
    """`value` as a tensor of `dtype`, or of any that the op takes.

    Python's numbers and NumPy's floating-point arrays are converted, tensors are not.
    """
    types = [dtype] if dtype else _DATA_TYPES
    accepted = " or ".join(t.name for t in types)
    is_floating = getattr(getattr(value, "dtype", None), "kind", "f") == "f"
    try:
        tensor = tf.convert_to_tensor(value, dtype_hint=dtype if is_floating else None, name=name)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must convert to a tensor of type {accepted}. Received: {value!r}") from error
    if tensor.dtype not in types:
        raise TypeError(f"`{name}` must be of type {accepted}. Received: a tensor of type {tensor.dtype.name}")
    return tensor


def _may_keep(filters: tf.Tensor) -> bool:
    """Whether inference may keep packed filters for as long as it refers to this tensor.

    So it may if nobody writes to memory that others refer to. All of TensorFlow respects that but TensorFlow 1's
    reference variables, which cannot be told from others by what comes out of them. So the tensor has to be known to
    come from elsewhere: eager execution has none of them, and a graph tells where a tensor comes from.
    """
    if not tf.is_symbolic_tensor(filters):
        return True
    source = filters.op
    while source.type in ("Identity", "Cast"):
        source = source.inputs[0].op
    return source.type in ("ReadVariableOp", "Const")


def _switch(training: Any) -> Any:
    """`training` as the op takes it: a Python bool or a bool tensor; its shape is checked by the op."""
    if not tf.is_tensor(training) and not isinstance(training, tf.Variable):
        return _arguments.flag("training", training)
    tensor = tf.convert_to_tensor(training)
    if tensor.dtype != tf.bool:
        _arguments.refuse(TypeError, "training", "a bool or a scalar bool tensor", training)
    return tensor
