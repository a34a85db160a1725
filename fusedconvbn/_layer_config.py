"""Reads the layer's arguments in Keras's terms: what Keras calls otherwise than the op, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from fusedconvbn import _arguments
from fusedconvbn._arguments import refuse

_OP_DATA_FORMAT = {"channels_last": "NHWC", "channels_first": "NCHW"}

# Arguments of Keras's two layers that the fused layer has no use for, with the values that ask for nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "renorm": (False, None),
    "renorm_clipping": (None,),
    "renorm_momentum": (None, 0.99),
    "lora_rank": (None,),
    "lora_alpha": (None,),
}

# Python functions that compute, called with one argument, exactly what the op fuses.
_FUSED_FUNCTIONS: dict[Callable, str | None] = {
    keras.activations.linear: None,
    keras.activations.relu: "relu",
    keras.activations.relu6: "relu6",
    keras.activations.leaky_relu: "leaky_relu",
    keras.activations.elu: "elu",
    keras.activations.silu: "silu",
    keras.activations.hard_silu: "hard_swish",
    keras.activations.gelu: "gelu",
    tf.nn.relu: "relu",
    tf.nn.relu6: "relu6",
    tf.nn.leaky_relu: "leaky_relu",
    tf.nn.elu: "elu",
    tf.nn.silu: "silu",
    tf.nn.gelu: "gelu",
}
_UNFUSED = "unfused"


def check_backend() -> None:
    """Raises a `RuntimeError` unless Keras computes with TensorFlow."""
    if keras.config.backend() != "tensorflow":
        raise RuntimeError(
            "FusedConvBN is a TensorFlow op: it needs Keras's TensorFlow backend (KERAS_BACKEND=tensorflow, set before "
            f"Keras is imported). Received: backend={keras.config.backend()!r}"
        )


def data_format(value: str | None) -> str:
    """Keras's name of the layout; None is what Keras is configured to use."""
    name = keras.config.image_data_format() if value is None else value
    if not isinstance(name, str) or name.lower() not in _OP_DATA_FORMAT:
        refuse(ValueError, "data_format", '"channels_last", "channels_first" or None', value)
    return name.lower()


def op_data_format(name: str) -> str:
    """The op's name of Keras's layout `name`."""
    return _OP_DATA_FORMAT[name]


def padding(value: Any) -> str | tuple[tuple[int, int], tuple[int, int]]:
    """In Keras's spelling: "valid", "same" or ((top, bottom), (left, right))."""
    kind, (top, bottom, left, right) = _arguments.padding(value)
    return ((top, bottom), (left, right)) if kind == "EXPLICIT" else kind.lower()


def take_unsupported(arguments: dict[str, Any], layout: str) -> None:
    """Removes from `arguments` those of Keras that are accepted without effect, raises a `ValueError` for the rest."""
    for name in _WITHOUT_EFFECT.keys() & arguments.keys():
        value = arguments.pop(name)
        if value not in _WITHOUT_EFFECT[name]:
            refuse(ValueError, name, f"left at {_WITHOUT_EFFECT[name][-1]!r}: the layer does not support it", value)
    channel_axes = (-1, 3) if layout == "channels_last" else (1, -3)
    axis = arguments.pop("axis", None)
    if axis is not None and axis not in channel_axes:
        refuse(ValueError, "axis", f"the channel axis of data_format={layout!r}: one of {channel_axes}", axis)


def fused_activation(activation: Callable, dtype: str) -> tuple[str | None, Callable | None]:
    """What the op applies and what runs after it, one of them None, for a layer that computes in `dtype`."""
    is_layer = isinstance(activation, keras.layers.Layer)
    name = _of_layer(activation, dtype) if is_layer else _of_function(activation)
    return (None, activation) if name == _UNFUSED else (name, None)


def _of_function(activation: Callable) -> str | None:
    try:
        return _FUSED_FUNCTIONS.get(activation, _UNFUSED)
    except TypeError:  # a callable object that cannot be hashed
        return _UNFUSED


def _of_layer(layer: keras.layers.Layer, dtype: str) -> str | None:
    """A layer is fused if it is Keras's own, has a fused form and neither casts nor adds a loss."""
    if layer.compute_dtype != dtype or layer.activity_regularizer is not None:
        return _UNFUSED
    if type(layer) is keras.layers.Activation:
        return _of_function(layer.activation)
    if type(layer) is keras.layers.ReLU and layer.threshold == 0:
        forms = {(None, 0.0): "relu", (6.0, 0.0): "relu6", (None, 0.2): "leaky_relu"}
        return forms.get((layer.max_value, layer.negative_slope), _UNFUSED)
    if type(layer) is keras.layers.LeakyReLU and layer.negative_slope == 0.2:
        return "leaky_relu"
    if type(layer) is keras.layers.ELU and layer.alpha == 1.0:
        return "elu"
    return _UNFUSED


def variable_transforms(value: Mapping[str, Callable] | None, present: list[str]) -> dict[str, Callable]:
    """A checked copy; `present` are the names of this layer's variables."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        refuse(TypeError, "variable_transforms", "a dict from a variable's name to a callable, or None", value)
    for name, transform in value.items():
        if name not in present:
            names = ", ".join(map(repr, present))
            refuse(ValueError, "variable_transforms", f"a dict whose keys are among {names}", name)
        if not callable(transform):
            refuse(TypeError, f"variable_transforms[{name!r}]", "callable", transform)
    return dict(value)


def serialized_transforms(transforms: Mapping[str, Callable]) -> dict[str, Any] | None:
    """The configuration of `transforms`; a `TypeError` names the one that Keras cannot serialize."""
    config = {}
    for name, transform in transforms.items():
        try:
            config[name] = keras.saving.serialize_keras_object(transform)
        except (TypeError, ValueError, AttributeError) as error:
            raise TypeError(
                f"`variable_transforms[{name!r}]` cannot be saved: it must be a named function or an object with "
                "`get_config`, registered by keras.saving.register_keras_serializable. "
                f"Received: {transform!r}"
            ) from error
    return config or None


def deserialized_transforms(config: Mapping[str, Any] | None) -> dict[str, Callable] | None:
    """The inverse of `serialized_transforms`."""
    if config is None:
        return None
    return {name: keras.saving.deserialize_keras_object(transform) for name, transform in config.items()}
