"""Reads the calls of a Keras model into the intermediate form, and says what layers the changed ones become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from fusedconvbn._keras_graph import Call
from fusedconvbn.folding.affine import AffineMap, Blocked, Weights
from fusedconvbn.folding.linear_nodes import same_padding
from fusedconvbn.folding.ops import Affine, Commuting, Concat, Linear, Op, Pad, Reshape, Sum

layers = keras.layers

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_LINEAR = (*_CONVOLUTIONS, *_DEPTHWISE, *_TRANSPOSED, *_SEPARABLE, layers.Dense)

# These pass their input on in inference.
_DROPOUTS = (
    layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D, layers.GaussianDropout,
    layers.GaussianNoise, layers.AlphaDropout, layers.ActivityRegularization, layers.Identity,
)  # fmt: skip

_MAXIMA = (layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D)
_AVERAGES = (
    layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D, layers.UpSampling1D,
    layers.UpSampling2D, layers.UpSampling3D, layers.Cropping1D, layers.Cropping2D, layers.Cropping3D,
)  # fmt: skip
_GLOBAL_MAXIMA = (layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D)
_GLOBAL_AVERAGES = (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)
_PADDINGS = (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D)


def read_call(call: Call, name: str) -> Op:
    """The op of a call, whose tensors are named by `tensor_name`."""
    kind = type(call.layer)
    inputs, outputs = [tensor_name(t) for t in call.inputs], [tensor_name(t) for t in call.results]
    read = next((rule for kinds, rule in _RULES if kind in kinds), None)
    plain = len(outputs) == 1 and not _is_special(call.layer)
    found = read(call, name, inputs, outputs) if read is not None and plain else None
    return found or Op(name, kind.__name__, inputs, outputs)


def tensor_name(tensor: keras.KerasTensor) -> str:
    """What tells it from others."""
    return f"{tensor.name}@{id(tensor)}"


def passes_on(call: Call) -> bool:
    """Whether a call of a dropout or the like returns what it reads: not in training, nor with another type."""
    training = call.arguments().get("training")
    return type(call.layer) in _DROPOUTS and not training and not _casts(call)


def _casts(call: Call) -> bool:
    return call.inputs[0].dtype != call.results[0].dtype


def _is_special(layer: keras.layers.Layer) -> bool:
    """Whether a layer computes otherwise than its class says: with quantized or adapted weights."""
    return bool(getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False))


def _axis(layer: keras.layers.Layer, rank: int) -> int:
    return -1 if getattr(layer, "data_format", "channels_last") == "channels_last" else 1 - rank


def _linear(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    layer, shape = call.layer, call.inputs[0].shape
    weights = Weights(*_common(layer))
    product = type(layer) is layers.Dense
    activation = None if layer.activation is keras.activations.linear else keras.activations.serialize(layer.activation)
    padding = [] if product else _padding(layer, shape)
    uniform = type(layer) not in (*_TRANSPOSED, *_SEPARABLE)
    return Linear(
        name, type(layer).__name__, inputs[:1], outputs, weights, -1 if product else _axis(layer, len(shape)), padding,
        uniform, None if activation is None else str(activation),
    )  # fmt: skip


def _common(layer: keras.layers.Layer) -> tuple[np.ndarray, np.ndarray | None, int]:
    """(weights, bias, groups) in the common form; of a separable convolution those of its second half."""
    kind = type(layer)
    kernel = layer.pointwise_kernel if kind in _SEPARABLE else layer.kernel
    values = np.asarray(kernel.numpy(), np.float64)
    groups = getattr(layer, "groups", 1)
    if kind in _DEPTHWISE:
        groups, values = values.shape[-2], values.reshape(*values.shape[:-2], 1, -1)
    elif kind in _TRANSPOSED:
        values = np.swapaxes(values, -1, -2)
    bias = None if layer.bias is None else np.asarray(layer.bias.numpy(), np.float64)
    return values, bias, groups


def _padding(layer: keras.layers.Layer, shape: Sequence[int | None]) -> list[tuple[int, int]] | None:
    space = shape[1:-1] if _axis(layer, len(shape)) == -1 else shape[2:]
    if layer.padding == "valid":
        return [(0, 0)] * len(space)
    steps = zip(layer.kernel_size, layer.strides, layer.dilation_rate, space)
    if layer.padding == "causal":
        return [((taps - 1) * dilation, 0) for taps, _, dilation, _ in steps]
    pads = [same_padding(*step) for step in steps]
    return None if None in pads else pads


def changed_layer(op: Linear, layer: keras.layers.Layer) -> tuple[keras.layers.Layer, list[np.ndarray]]:
    """A layer that computes what `op` does, and its weights."""
    kind, config = type(layer), layer.get_config()
    config["use_bias"] = op.weights.bias is not None
    if op.pad_value:
        config["padding"] = "valid"
    values = op.weights.values
    if kind in _DEPTHWISE:
        values = values.reshape(layer.kernel.shape)
    elif kind in _TRANSPOSED:
        values = np.swapaxes(values, -1, -2)
    first = [layer.depthwise_kernel.numpy()] if kind in _SEPARABLE else []
    bias = [] if op.weights.bias is None else [op.weights.bias]
    return kind.from_config(config), [*first, values, *bias]


def _batch_norm(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    layer, rank = call.layer, len(call.inputs[0].shape)
    op = Affine(name, "BatchNormalization", inputs[:1], outputs, None, layer.axis % rank - rank, batch_norm=True)
    training = call.arguments().get("training")
    if training is not None and training is not False:
        op.why_not = f"it is called with training={training!r}"
        return op
    if _casts(call):
        op.why_not = f"it makes {call.results[0].dtype} of {call.inputs[0].dtype}"
        return op
    gamma, beta = (None if v is None else v.numpy() for v in (layer.gamma, layer.beta))
    try:
        op.map = AffineMap.of_batch_norm(
            gamma, beta, layer.moving_mean.numpy(), layer.moving_variance.numpy(), layer.epsilon
        )
    except Blocked as reason:
        op.why_not = str(reason)
    return op


def _same(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    if not passes_on(call):
        return None
    return Commuting(name, type(call.layer).__name__, inputs[:1], outputs)


def _activation(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    if call.layer.activation is not keras.activations.linear or _casts(call):
        return None
    return Commuting(name, "Activation", inputs[:1], outputs)


def _pooling(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    axis = _axis(call.layer, len(call.inputs[0].shape))
    return Commuting(name, type(call.layer).__name__, inputs, outputs, {axis: axis}, type(call.layer) in _MAXIMA)


def _global_pooling(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    if len(inputs) > 1:  # a mask
        return None
    axis = _axis(call.layer, len(call.inputs[0].shape))
    after = axis if call.layer.keepdims else -1
    return Commuting(
        name, type(call.layer).__name__, inputs, outputs, {axis: after}, type(call.layer) in _GLOBAL_MAXIMA
    )


def _permutation(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    rank = len(call.layer.dims) + 1
    axes = {old - rank: new - rank for new, old in enumerate(call.layer.dims, 1)}
    return Commuting(name, "Permute", inputs, outputs, axes)


def _reshape(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    before, after = call.inputs[0].shape[1:], call.results[0].shape[1:]
    if getattr(call.layer, "data_format", "channels_last") != "channels_last":
        return None  # Flatten moves the channels to the end first
    return Reshape(name, type(call.layer).__name__, inputs, outputs, before or None, after or None)


def _pad(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    rank = len(call.inputs[0].shape)
    channels = _axis(call.layer, rank)
    axes = frozenset(axis for axis in range(1 - rank, 0) if axis != channels)
    return Pad(name, type(call.layer).__name__, inputs, outputs, axes, fixed=True)


def _concat(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    rank = len(call.results[0].shape)
    axis = call.layer.axis % rank - rank
    return Concat(name, "Concatenate", inputs, outputs, axis, [tensor.shape[axis] for tensor in call.inputs])


def _sum(call: Call, name: str, inputs: list[str], outputs: list[str]) -> Op | None:
    shapes = {tensor.shape[1:] for tensor in call.inputs}
    return Sum(name, "Add", inputs, outputs) if len(shapes) == 1 and None not in shapes.pop() else None


_RULES: list[tuple[tuple[type, ...], Callable[[Call, str, list[str], list[str]], Op | None]]] = [
    (_LINEAR, _linear),
    ((layers.BatchNormalization,), _batch_norm),
    (_DROPOUTS, _same),
    ((layers.Activation,), _activation),
    (_MAXIMA + _AVERAGES, _pooling),
    (_GLOBAL_MAXIMA + _GLOBAL_AVERAGES, _global_pooling),
    ((layers.Permute,), _permutation),
    ((layers.Reshape, layers.Flatten), _reshape),
    (_PADDINGS, _pad),
    ((layers.Concatenate,), _concat),
    ((layers.Add,), _sum),
]


def pad_with(op: Linear, value: Any) -> Any:
    """`value` padded as `op` pads, with its number."""
    pads = [(0, 0), *op.pads, (0, 0)] if op.axis == -1 else [(0, 0), (0, 0), *op.pads]
    return keras.ops.pad(value, pads, mode="constant", constant_values=op.pad_value)
