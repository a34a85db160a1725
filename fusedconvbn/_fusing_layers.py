"""Makes a FusedConvBN of stock layers and stock layers of a FusedConvBN, and moves values between them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras

from fusedconvbn._arguments import refuse
from fusedconvbn._fusing_chains import Chain, activation_in_op, is_elementwise
from fusedconvbn._keras_copies import copy_state
from fusedconvbn._keras_graph import Builder, Call, Substitute, Tensor
from fusedconvbn.layer import FusedConvBN

Layer = keras.layers.Layer

# Attributes that are arguments of both, under one name.
_OF_CONVOLUTION = (
    "kernel_size", "strides", "padding", "data_format", "dilation_rate", "use_bias",
    "bias_initializer", "bias_regularizer", "bias_constraint",
)  # fmt: skip
_OF_CONV2D = ("filters", "groups")
_OF_BATCH_NORM = (
    "momentum", "epsilon", "center", "scale", "synchronized", "beta_initializer", "gamma_initializer",
    "moving_mean_initializer", "moving_variance_initializer", "beta_regularizer", "gamma_regularizer",
    "beta_constraint", "gamma_constraint",
)  # fmt: skip
_ROLES = ("initializer", "regularizer", "constraint")


def _attributes(layer: Layer, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in names}


def fused(chain: Chain) -> FusedConvBN:
    """A layer, not built, of the convolution's name that computes what `chain` does."""
    one = chain.occurrences[0]
    convolution, batch_norm = chain.convolution, chain.batch_norm
    activation = None
    if one.activation is not None:
        activation = activation_in_op(one.activation.layer, batch_norm.compute_dtype)
    layer = FusedConvBN(
        **_attributes(convolution, _OF_CONVOLUTION),
        **_kernel_arguments(convolution),
        **_attributes(batch_norm, _OF_BATCH_NORM),
        activation=activation,
        activity_regularizer=batch_norm.activity_regularizer,
        batch_norm_trainable=batch_norm.trainable or not convolution.trainable,
        trainable=convolution.trainable,
        dtype=convolution.dtype_policy,
        name=convolution.name,
    )
    layer.origin = json.dumps(_origin(chain))
    return layer


def _is_depthwise(layer: Layer) -> bool:
    return isinstance(layer, keras.layers.DepthwiseConv2D)


def _kernel_arguments(convolution: Layer) -> dict[str, Any]:
    if not _is_depthwise(convolution):
        names = (*_OF_CONV2D, *(f"kernel_{role}" for role in _ROLES))
        return _attributes(convolution, names)
    channels = convolution.kernel.shape[2]
    roles = {f"kernel_{role}": getattr(convolution, f"depthwise_{role}") for role in _ROLES}
    return {"filters": channels * convolution.depth_multiplier, "groups": channels, **roles}


def _origin(chain: Chain) -> dict[str, Any]:
    """What the stock layers are and are called, as far as the fused layer's arguments do not say it."""
    one = chain.occurrences[0]
    origin: dict[str, Any] = {
        "depthwise": _is_depthwise(chain.convolution),
        "batch_norm": {"name": chain.batch_norm.name, "axis": chain.batch_norm.axis},
    }
    if one.add is not None:
        origin["add"] = {**_description(one.add.layer), "position": one.position}
    if one.activation is not None:
        origin["activation"] = _description(one.activation.layer)
    return origin


def _description(layer: Layer) -> dict[str, Any]:
    return {"class_name": type(layer).__name__, "config": layer.get_config()}


def _described(description: Mapping[str, Any]) -> Layer:
    return getattr(keras.layers, description["class_name"]).from_config(dict(description["config"]))


def _recorded(layer: FusedConvBN) -> dict[str, Any]:
    """What `_origin` made, empty for a layer made by hand."""
    return {} if layer.origin is None else json.loads(layer.origin)


def origin_names(layer: FusedConvBN) -> list[str]:
    """The names of the layers that `layer` took the place of, that of the convolution apart."""
    origin = _recorded(layer)
    names = [origin[part]["config"]["name"] for part in ("add", "activation") if part in origin]
    return names + ([origin["batch_norm"]["name"]] if origin else [])


class Names:
    """The names in one model, where layers take the place of a fused one.

    Args:
        staying: The layers that stay, by their names.
        wanted: Names that layers will have again, and no other one gets.
    """

    def __init__(self, staying: Mapping[str, keras.Operation], wanted: Iterable[str]) -> None:
        self._staying = staying
        self._used = set(staying)
        self._wanted = set(wanted)
        self._stateless: dict[str, Layer] = {}

    def restored(self, name: str) -> str:
        """`name`, wanted before, unless it is in use."""
        return self.invented(name) if name in self._used else self._use(name)

    def invented(self, name: str) -> str:
        """`name`, or with a number behind it one that is free."""
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        return self._use(next(free for free in candidates if free not in self._used | self._wanted))

    def _use(self, name: str) -> str:
        self._used.add(name)
        return name

    def stateless(self, description: Mapping[str, Any], copy: Callable[[Layer], Layer]) -> Layer:
        """The layer without weights that is described; one for all calls of it, those that stay included."""
        layer = _described(description)
        known = self._stateless.get(layer.name)
        if known is None and layer.name in self._staying:
            known = copy(self._staying[layer.name])
        if known is not None and _description(known) == _description(layer):
            return known
        name = self.restored(layer.name)
        self._stateless[name] = type(layer).from_config({**layer.get_config(), "name": name})
        return self._stateless[name]


class Stock:
    """The layers of Keras that compute what a FusedConvBN does; its `save` and `algorithm` have no equal there.

    Args:
        layer: A built layer.
        names: Of the model that gets the stock layers.

    Raises:
        ValueError: Keras's layers cannot compute it.
    """

    def __init__(self, layer: FusedConvBN, names: Names) -> None:
        if type(layer) is not FusedConvBN:
            refuse(ValueError, "model", f"without subclasses of FusedConvBN, as {layer.name!r} is one", layer)
        if layer.variable_transforms:
            refuse(ValueError, "model", f"without variable_transforms, which {layer.name!r} has", layer)
        if max(layer.strides) > 1 and max(layer.dilation_rate) > 1:
            accepted = f"without convolutions with both strides and dilations, as {layer.name!r} is one"
            refuse(ValueError, "model", accepted, layer)
        self.layer = layer
        self._names = names
        self._origin = _recorded(layer)
        self._convolution = self._make_convolution()
        self._batch_norm = self._make_batch_norm()
        self._padding = self._make_padding()
        self._add: Layer | None = None
        self._activations: list[Layer] | None = None

    def _make_convolution(self) -> Layer:
        layer = self.layer
        arguments = {
            **_attributes(layer, _OF_CONVOLUTION),
            "name": layer.name,
            "trainable": layer.trainable,
            "dtype": layer.dtype_policy,
        }
        if not isinstance(layer.padding, str):
            arguments["padding"] = "valid"
        roles = {role: getattr(layer, f"kernel_{role}") for role in _ROLES}
        if self._origin.get("depthwise", self._suits_depthwise()):
            roles = {f"depthwise_{role}": value for role, value in roles.items()}
            depth_multiplier = layer.filters // layer.groups
            return keras.layers.DepthwiseConv2D(depth_multiplier=depth_multiplier, **arguments, **roles)
        roles = {f"kernel_{role}": value for role, value in roles.items()}
        return keras.layers.Conv2D(**_attributes(layer, _OF_CONV2D), **arguments, **roles)

    def _suits_depthwise(self) -> bool:
        """Whether a DepthwiseConv2D is the same: TensorFlow's has equal strides, its kernel has another shape."""
        layer = self.layer
        elementwise = is_elementwise(layer.kernel_regularizer) and is_elementwise(layer.kernel_constraint)
        is_depthwise = layer.groups > 1 and layer.kernel.shape[2] == 1
        return is_depthwise and layer.strides[0] == layer.strides[1] and elementwise

    def _make_batch_norm(self) -> keras.layers.BatchNormalization:
        layer, origin = self.layer, self._origin.get("batch_norm")
        return keras.layers.BatchNormalization(
            axis=origin["axis"] if origin else -1 if layer.data_format == "channels_last" else 1,
            name=self._names.restored(origin["name"]) if origin else self._names.invented(f"{layer.name}_bn"),
            trainable=layer.trainable and layer.batch_norm_trainable,
            dtype=layer.dtype_policy,
            activity_regularizer=layer.activity_regularizer if origin else None,
            **_attributes(layer, _OF_BATCH_NORM),
        )

    def _make_padding(self) -> keras.layers.ZeroPadding2D | None:
        layer = self.layer
        if isinstance(layer.padding, str):
            return None
        name = self._names.invented(f"{layer.name}_pad")
        return keras.layers.ZeroPadding2D(layer.padding, layer.data_format, name=name, dtype=layer.dtype_policy)

    def substitute(self, call: Call) -> Substitute:
        """What takes the place of `call`, one of the layer's.

        Raises:
            ValueError: A tensor decides about training.
        """
        given = call.arguments()
        training = {name: value for name, value in given.items() if name == "training"}
        if keras.ops.is_tensor(given.get("training")) or isinstance(given.get("training"), Tensor):
            accepted = f"one that calls {self.layer.name!r} with training=True, False or None"
            refuse(ValueError, "model", accepted, given["training"])

        def build(builder: Builder) -> Tensor:
            x = builder.value(given["inputs"])
            x = x if self._padding is None else builder(self._padding, x)
            x = builder(self._batch_norm, builder(self._convolution, x), **training)
            if "residual" in given:
                x = self._sum(builder, x, builder.value(given["residual"]))
            for activation in self._activation_layers(builder):
                x = builder(activation, x)
            return x

        return Substitute(build)

    def _sum(self, builder: Builder, normalized: Tensor, residual: Tensor) -> Tensor:
        origin = self._origin.get("add")
        if self._add is None and origin:
            self._add = self._names.stateless(origin, builder.copy)
        elif self._add is None:
            name = self._names.invented(f"{self.layer.name}_add")
            self._add = keras.layers.Add(name=name, dtype=self.layer.dtype_policy)
        is_second = origin is not None and origin["position"] == 1
        return builder(self._add, [residual, normalized] if is_second else [normalized, residual])

    def _activation_layers(self, builder: Builder) -> list[Layer]:
        if self._activations is None:
            origin = self._origin.get("activation")
            made = [self._names.stateless(origin, builder.copy)] if origin else self._make_activations()
            self._activations = made
        return self._activations

    def _make_activations(self) -> list[Layer]:
        """At most a layer that the fused one has as its activation, and one with its function and regularizer."""
        layer, made = self.layer, []
        function = layer.activation
        regularizer = None if self._origin else layer.activity_regularizer
        if isinstance(function, Layer):
            config = {**function.get_config(), "name": self._names.invented(f"{layer.name}_{function.name}")}
            made.append(type(function).from_config(config))
            function = keras.activations.linear
        if function is not keras.activations.linear or regularizer is not None:
            name = self._names.invented(f"{layer.name}_activation")
            arguments = {"activity_regularizer": regularizer, "name": name, "dtype": layer.dtype_policy}
            made.append(keras.layers.Activation(function, **arguments))
        return made

    def assign(self) -> None:
        """Gives the stock layers, built by now, the values of the fused layer."""
        assign(variables(self.layer, self.layer), variables(self._convolution, self._batch_norm))
        if isinstance(self.layer.activation, Layer) and not self._origin:
            copy_state(self.layer.activation, self._activations[0])

    def assign_back(self) -> None:
        """Gives the fused layer the values of the stock layers."""
        assign(variables(self._convolution, self._batch_norm), variables(self.layer, self.layer))


def variables(convolution: Layer, batch_norm: Layer) -> dict[str, keras.Variable]:
    """The variables by name; of a fused layer, which is both arguments, too."""
    named = {name: getattr(convolution, name) for name in ("kernel", "bias")}
    named |= {name: getattr(batch_norm, name) for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    return {name: variable for name, variable in named.items() if variable is not None}


def assign(sources: Mapping[str, keras.Variable], targets: Mapping[str, keras.Variable]) -> None:
    """Bit for bit; a depthwise kernel [kh, kw, C, multiplier] is [kh, kw, 1, C * multiplier] in the fused layer."""
    for name, target in targets.items():
        target.assign(keras.ops.reshape(sources[name], target.shape))
