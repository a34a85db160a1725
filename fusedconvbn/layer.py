"""Conv2D, BatchNormalization, a residual and an activation as one Keras layer around one op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from fusedconvbn import _arguments, _layer_config, _load
from fusedconvbn._arguments import refuse
from fusedconvbn._synchronized import conv_bn_over_replicas, spans_replicas
from fusedconvbn.ops import fused_conv_bn

# Which variables take which kind of argument: moving statistics are neither regularized nor constrained.
_LEARNED = ("kernel", "bias", "gamma", "beta")
_STATISTICS = ("moving_mean", "moving_variance")
_ROLES = {
    "initializer": (_LEARNED + _STATISTICS, keras.initializers),
    "regularizer": (_LEARNED, keras.regularizers),
    "constraint": (_LEARNED, keras.constraints),
}
_PLAIN_ARGUMENTS = (
    "filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate", "groups", "use_bias", "momentum",
    "epsilon", "center", "scale", "synchronized", "batch_norm_trainable", "algorithm", "save",
)  # fmt: skip


class _Statistics(NamedTuple):
    """Moving statistics, [K] each, in the order of `_STATISTICS`."""

    mean: tf.Tensor
    variance: tf.Tensor


@keras.saving.register_keras_serializable(package="fusedconvbn")
class FusedConvBN(keras.layers.Layer):
    """`activation(batch_norm(conv2d(inputs)) + residual)` as one op, in training and in inference.

    It takes the arguments of `keras.layers.Conv2D` and `keras.layers.BatchNormalization`, with their defaults
    (`use_bias` apart), and computes what they compute one after the other. Its weights come in the order kernel,
    (bias), gamma, beta, moving_mean, moving_variance.

    Args:
        filters: Number of output channels K.
        kernel_size, strides, dilation_rate: An int or a pair (height, width).
        padding: "valid", "same" or ((top, bottom), (left, right)) in pixels of the input.
        data_format: "channels_last", "channels_first" or None: what Keras is configured to use.
        groups: Divides the input channels and `filters`; their number is the depthwise convolution.
        activation: Any Keras activation. relu, relu6, leaky_relu (slope 0.2), elu, silu, hard_silu and gelu (exact)
            are part of the op, functions and layers alike; others run after it.
        use_bias: Adds a bias to the convolution. It costs nothing, and is of no use where statistics are of the batch.
        momentum: Weight of the old moving statistics.
        epsilon: Is added to the variance.
        center, scale: Whether there is a beta, a gamma.
        synchronized: In training, take the statistics of the batch over all replicas of `tf.distribute`. Runs on
            TensorFlow's own ops wherever there are several replicas.
        kernel_initializer and the like: As in Keras, for kernel, bias, beta, gamma, moving_mean, moving_variance.
        kernel_regularizer, kernel_constraint and the like: As in Keras, for kernel, bias, beta, gamma.
        batch_norm_trainable: False freezes gamma, beta and the statistics (which normalize, in training too) while
            kernel and bias keep training. Settable like `trainable`.
        variable_transforms: A dict from the name of a weight to a function of its value, whose result, of the same
            shape, takes the weight's place in the op; gradients flow through. Moving statistics are updated from
            their own values.
        algorithm, save: As in `fused_conv_bn`.
        **kwargs: As for every Keras layer: name, dtype, trainable, activity_regularizer (of the layer's output).

    Call arguments:
        inputs: [N,H,W,C], or [N,C,H,W] with "channels_first".
        residual: Optional, of the output's shape; is added before the activation.
        training: A bool, a scalar bool tensor that decides at run time, or None: what the calling layer says. With
            `trainable=False` or `batch_norm_trainable=False` the moving statistics normalize whatever it is.

    Returns: [N,OH,OW,K], or [N,K,OH,OW] with "channels_first", of the layer's compute dtype.

    Raises:
        ValueError, TypeError: An argument is out of range or of the wrong kind, or one that Keras has and this layer
            does not support (`renorm`, an `axis` other than that of the channels).
        RuntimeError: Keras runs on another backend than TensorFlow.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str | Sequence[Sequence[int]] = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        groups: int = 1,
        activation: Any = None,
        use_bias: bool = False,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        synchronized: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        batch_norm_trainable: bool = True,
        variable_transforms: Mapping[str, Callable] | None = None,
        algorithm: str = "auto",
        save: str = "conv",
        **kwargs: Any,
    ) -> None:
        _layer_config.check_backend()
        layout = _layer_config.data_format(data_format)
        _layer_config.take_unsupported(kwargs, layout)
        super().__init__(**kwargs)
        self.supports_jit = _load.xla() is None
        self.data_format = layout
        self._read_convolution(filters, kernel_size, strides, padding, dilation_rate, groups, use_bias)
        self.activation = keras.activations.get(activation)
        self._read_batch_norm(momentum, epsilon, center, scale, synchronized, batch_norm_trainable)
        self._read("initializer", kernel_initializer, bias_initializer, gamma_initializer, beta_initializer,
                   moving_mean_initializer, moving_variance_initializer)  # fmt: skip
        self._read("regularizer", kernel_regularizer, bias_regularizer, gamma_regularizer, beta_regularizer)
        self._read("constraint", kernel_constraint, bias_constraint, gamma_constraint, beta_constraint)
        self.variable_transforms = _layer_config.variable_transforms(variable_transforms, self._variable_names())
        self.algorithm = _arguments.algorithm(algorithm)
        self.save = _arguments.save(save)
        self.origin: str | None = None  # what `fuse` replaced by this layer, as JSON: see _fusing_layers.py

    def _read_convolution(
        self, filters: Any, kernel_size: Any, strides: Any, padding: Any, dilations: Any, groups: Any, use_bias: Any
    ) -> None:
        self.filters = _arguments.positive_integer("filters", filters)
        self.kernel_size = _arguments.pair("kernel_size", kernel_size)
        self.strides = _arguments.pair("strides", strides)
        self.padding = _layer_config.padding(padding)
        self.dilation_rate = _arguments.pair("dilation_rate", dilations)
        self.groups = _arguments.positive_integer("groups", groups)
        self.use_bias = _arguments.flag("use_bias", use_bias)
        if self.filters % self.groups:
            refuse(ValueError, "filters", f"divisible by groups={self.groups}", filters)
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.kernel = self.bias = None

    def _read_batch_norm(
        self, momentum: Any, epsilon: Any, center: Any, scale: Any, synchronized: Any, trainable: Any
    ) -> None:
        self.momentum = _arguments.momentum(momentum)
        self.epsilon = _arguments.epsilon(epsilon)
        self.center = _arguments.flag("center", center)
        self.scale = _arguments.flag("scale", scale)
        self.synchronized = _arguments.flag("synchronized", synchronized)
        self._batch_norm_trainable = _arguments.flag("batch_norm_trainable", trainable)
        self.gamma = self.beta = self.moving_mean = self.moving_variance = None

    def _read(self, role: str, *identifiers: Any) -> None:
        """Sets `kernel_initializer` and the like from what identifies them."""
        variables, registry = _ROLES[role]
        for variable, identifier in zip(variables, identifiers, strict=True):
            setattr(self, f"{variable}_{role}", registry.get(identifier))

    def _variable_names(self) -> list[str]:
        """The variables that this layer has, in the order of its weights."""
        absent = {"bias": not self.use_bias, "gamma": not self.scale, "beta": not self.center}
        return [name for name in _LEARNED + _STATISTICS if not absent.get(name, False)]

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the weights for inputs of `input_shape`, whose number of channels must be known."""
        axis = -1 if self.data_format == "channels_last" else 1
        channels = input_shape[axis]
        if channels is None or channels % self.groups:
            accepted = f"of a known size, divisible by groups={self.groups}, along the channel axis {axis}"
            refuse(ValueError, "input_shape", accepted, tuple(input_shape))
        self.compute_output_shape(input_shape)  # raises where there would be no output
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={axis: channels})
        kernel_shape = (*self.kernel_size, channels // self.groups, self.filters)
        for name in self._variable_names():
            setattr(self, name, self._add_variable(name, kernel_shape if name == "kernel" else (self.filters,)))
        self._freeze_batch_norm()

    def _add_variable(self, name: str, shape: tuple[int, ...]) -> keras.Variable:
        """Without autocast: transforms see the variable as it is, and statistics stay in float32."""
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer", None),
            constraint=getattr(self, f"{name}_constraint", None),
            trainable=name in _LEARNED,
            autocast=False,
        )

    @property
    def trainable(self) -> bool:
        """Whether the weights train; False freezes the statistics too, as in Keras's BatchNormalization."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        self._freeze_batch_norm()

    @property
    def batch_norm_trainable(self) -> bool:
        """Whether gamma, beta and the statistics train; kernel and bias do as `trainable` says.

        A model that was compiled before a change must be compiled again.
        """
        return self._batch_norm_trainable

    @batch_norm_trainable.setter
    def batch_norm_trainable(self, value: bool) -> None:
        self._batch_norm_trainable = _arguments.flag("batch_norm_trainable", value)
        self._freeze_batch_norm()

    def _freeze_batch_norm(self) -> None:
        """Lets gamma and beta follow both switches; Keras's own rule knows only `trainable`."""
        for variable in (self.gamma, self.beta):
            if variable is not None:
                variable.trainable = self.trainable and self.batch_norm_trainable

    def call(self, inputs: tf.Tensor, residual: tf.Tensor | None = None, training: Any = None) -> tf.Tensor:
        """See the class."""
        training = self._normalizes_by_batch(training)
        stat = tf.float64 if inputs.dtype == tf.float64 else tf.float32
        own = _Statistics(*(tf.cast(getattr(self, name).value, stat) for name in _STATISTICS))
        fed = self._statistics_for_op(own, training)
        activation, after = _layer_config.fused_activation(self.activation, self.compute_dtype)
        op = conv_bn_over_replicas if training is not False and self._synchronizes() else fused_conv_bn
        result = op(
            inputs,
            self._transformed("kernel", inputs.dtype),
            self._transformed("gamma", stat) if self.scale else tf.ones([self.filters], stat),
            self._transformed("beta", stat) if self.center else tf.zeros([self.filters], stat),
            *fed,
            residual,
            activation=activation,
            training=training,
            **self._op_attributes(),
        )
        if training is not False:
            self._update_statistics(own, fed, _Statistics(*result[1:]))
        return result.output if after is None else after(result.output)

    def _normalizes_by_batch(self, training: Any) -> Any:
        """Whether this call uses and records the statistics of the batch: a bool, or a tensor that says so."""
        if training is None or not (self.trainable and self.batch_norm_trainable):
            return False
        return tf.convert_to_tensor(training) if keras.ops.is_tensor(training) else bool(training)

    def _synchronizes(self) -> bool:
        return self.synchronized and spans_replicas()

    def _transformed(self, name: str, dtype: tf.DType) -> tf.Tensor:
        """The variable as the op sees it."""
        value = tf.convert_to_tensor(getattr(self, name).value)
        transform = self.variable_transforms.get(name)
        if transform is None:
            return tf.cast(value, dtype)
        result = transform(value)
        if result is None or not tf.convert_to_tensor(result).shape.is_compatible_with(value.shape):
            accepted = f"functions that return a tensor of the variable's shape; that of {name!r} is {value.shape}"
            refuse(ValueError, "variable_transforms", accepted, result)
        return tf.cast(result, dtype)

    def _statistics_for_op(self, own: _Statistics, training: Any) -> _Statistics:
        """The moving statistics that the op gets, `own` being the variables' values.

        To normalize with they are transformed; in training, where they are only updated, they are the variables' own.
        A bias moves the mean of the convolution: without it, the mean is that of the op's convolution.
        """
        fed = []
        for name, value in zip(_STATISTICS, own, strict=True):
            if name in self.variable_transforms:
                value = _select(training, value, self._transformed(name, value.dtype))
            fed.append(value)
        mean, variance = fed
        return _Statistics(mean - self._transformed("bias", mean.dtype) if self.use_bias else mean, variance)

    def _update_statistics(self, own: _Statistics, fed: _Statistics, new: _Statistics) -> None:
        """Assigns what the op returned, less what was added to or subtracted from the variables before it.

        Where the op changed nothing (inference decided at run time, an empty batch), `new` is `fed` to the bit and so
        the variables keep their values to the bit.
        """
        for name, before, given, after in zip(_STATISTICS, own, fed, new, strict=True):
            getattr(self, name).assign(after if given is before else before + (after - given))

    def _op_attributes(self) -> dict[str, Any]:
        return {
            "strides": self.strides,
            "dilations": self.dilation_rate,
            "padding": self.padding,
            "data_format": _layer_config.op_data_format(self.data_format),
            "epsilon": self.epsilon,
            "momentum": self.momentum,
            "algorithm": self.algorithm,
            "save": self.save,
        }

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The output's shape by Keras's rule for convolutions; a `ValueError` where it would have no elements."""
        shape, padding = list(input_shape), self.padding
        if not isinstance(padding, str):
            first = 1 if self.data_format == "channels_last" else 2
            for axis, pads in zip((first, first + 1), padding, strict=True):
                shape[axis] = None if shape[axis] is None else shape[axis] + sum(pads)
            padding = "valid"
        channels = shape[-1 if self.data_format == "channels_last" else 1]
        kernel = keras.KerasTensor((*self.kernel_size, channels, self.filters))
        image = keras.KerasTensor(tuple(shape))
        return keras.ops.conv(image, kernel, self.strides, padding, self.data_format, self.dilation_rate).shape

    def compute_output_spec(
        self, inputs: keras.KerasTensor, residual: keras.KerasTensor | None = None, training: Any = None
    ) -> keras.KerasTensor:
        """The output's shape and type; a `ValueError` for a residual that cannot have this shape."""
        shape = self.compute_output_shape(inputs.shape)
        if residual is not None and not tf.TensorShape(residual.shape).is_compatible_with(shape):
            refuse(ValueError, "residual", f"of the output's shape {shape}", tuple(residual.shape))
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Everything that makes an equal layer by `from_config`, as plain Python values."""
        config = {name: getattr(self, name) for name in _PLAIN_ARGUMENTS}
        config["activation"] = keras.activations.serialize(self.activation)
        for role, (variables, registry) in _ROLES.items():
            for variable in variables:
                config[f"{variable}_{role}"] = registry.serialize(getattr(self, f"{variable}_{role}"))
        config["activity_regularizer"] = keras.regularizers.serialize(self.activity_regularizer)
        config["variable_transforms"] = _layer_config.serialized_transforms(self.variable_transforms)
        if self.origin is not None:
            config["origin"] = self.origin
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FusedConvBN:
        """The layer that `get_config` describes."""
        transforms = _layer_config.deserialized_transforms(config.get("variable_transforms"))
        arguments = {name: value for name, value in config.items() if name != "origin"}
        layer = super().from_config({**arguments, "variable_transforms": transforms})
        layer.origin = config.get("origin")
        return layer


def _select(condition: Any, if_true: tf.Tensor, if_false: tf.Tensor) -> tf.Tensor:
    if tf.is_tensor(condition):
        return tf.where(condition, if_true, if_false)
    return if_true if condition else if_false
