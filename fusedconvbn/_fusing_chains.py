"""Finds in a Keras model the chains of layers that one FusedConvBN computes, or why a batch norm is in none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import keras

from fusedconvbn import _layer_config
from fusedconvbn._keras_graph import Call, Network, Tensor

Layer = keras.layers.Layer
_CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
_ACTIVATIONS = (keras.layers.Activation, keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.ELU)
_CHANNEL_AXES = {"channels_last": (-1, 3), "channels_first": (1, -3)}

# What regularizes or constrains every element by itself does the same to a kernel of another shape.
_ELEMENTWISE = (type(None), keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2,
                keras.constraints.NonNeg)  # fmt: skip


class Occurrence(NamedTuple):
    """The calls of one run of a chain; None where the chain has no such layer."""

    convolution: Call
    batch_norm: Call
    add: Call | None = None
    activation: Call | None = None

    @property
    def calls(self) -> list[Call]:
        """In the order of the chain."""
        return [call for call in self if call is not None]

    @property
    def output(self) -> Tensor:
        """What the chain computes."""
        return self.calls[-1].results[0]

    @property
    def residual(self) -> Tensor | None:
        """What is added to the normalized values."""
        return None if self.add is None else self.add.inputs[1 - self.position]

    @property
    def position(self) -> int:
        """The index of the normalized values among the two inputs of `add`; 0 without one."""
        return 0 if self.add is None or self.add.inputs[0] is self.batch_norm.results[0] else 1


@dataclass(frozen=True)
class Chain:
    """Layers that are only called one after the other, once or (shared) several times."""

    occurrences: list[Occurrence]

    @property
    def calls(self) -> list[Call]:
        """Those of all its runs."""
        return [call for occurrence in self.occurrences for call in occurrence.calls]

    @property
    def convolution(self) -> Layer:
        """A Conv2D or DepthwiseConv2D."""
        return self.occurrences[0].convolution.layer

    @property
    def batch_norm(self) -> keras.layers.BatchNormalization:
        """What normalizes the convolution's channels."""
        return self.occurrences[0].batch_norm.layer


def find(network: Network) -> dict[Layer, Chain | str]:
    """For each batch normalization called in `network`, in the order of the calls: its chain, or why it has none.

    Where an Add has two inputs that chains compute, the chain that Keras runs last takes it.
    """
    layers = [call.layer for graph in network.graphs for call in graph.calls]
    batch_norms = [layer for layer in dict.fromkeys(layers) if isinstance(layer, keras.layers.BatchNormalization)]
    found = {layer: _start(network, layer) for layer in batch_norms}
    taken: set[Call] = set()
    for layer, chain in reversed(found.items()):
        if isinstance(chain, Chain):
            found[layer] = chain = _extended(network, chain, taken)
            taken.update(chain.calls)
    return found


def _start(network: Network, batch_norm: keras.layers.BatchNormalization) -> Chain | str:
    """The convolution and the batch normalization alone."""
    calls = network.calls_of(batch_norm)
    reason = next(_why_not_this_batch_norm(batch_norm, calls), None)
    if reason is not None:
        return reason
    producers = [network.producer(call.inputs[0]) for call in calls]
    reason = next(_why_not_after(network, producers), None)
    if reason is not None:
        return reason
    reason = next(_why_not_together(producers[0].layer, batch_norm), None)
    return reason or Chain([Occurrence(*pair) for pair in zip(producers, calls, strict=True)])


def _why_not_this_batch_norm(layer: keras.layers.BatchNormalization, calls: list[Call]) -> Iterator[str]:
    if type(layer) is not keras.layers.BatchNormalization:
        yield f"is a {type(layer).__name__}, a subclass of BatchNormalization"
    if layer.renorm:
        yield "uses renorm"
    for call in calls:
        explicit = [f"{name}={value}" for name, value in call.arguments().items() if name != "inputs"]
        if explicit:
            yield f"is called with {', '.join(explicit)}"


def _why_not_after(network: Network, producers: list[Call | None]) -> Iterator[str]:
    """`producers` of the batch norm's input, one for each call."""
    if None in producers:
        yield "normalizes an input of the model"
    convolution = producers[0].layer
    if type(convolution) not in _CONVOLUTIONS:
        kind = type(convolution).__name__
        yield f"follows {convolution.name!r}, a {kind}: neither Conv2D nor DepthwiseConv2D"
    others = {call.layer.name for call in producers} - {convolution.name}
    if any(call.layer is not convolution for call in producers):
        yield f"is called after several layers: {', '.join(map(repr, [convolution.name, *sorted(others)]))}"
    if len(network.calls_of(convolution)) != len(set(producers)):
        yield f"{convolution.name!r} is also called elsewhere"
    for call in producers:
        yield from _why_not_the_only_reader(network, call)


def _why_not_the_only_reader(network: Network, call: Call) -> Iterator[str]:
    output = call.results[0]
    readers = [reader.layer.name for reader in network.consumers(output)]
    if network.is_output(output):
        yield f"the output of {call.layer.name!r} is an output of the model"
    if len(readers) != 1:
        yield f"the output of {call.layer.name!r} is read by {', '.join(map(repr, readers))}"


def _why_not_together(convolution: Layer, batch_norm: keras.layers.BatchNormalization) -> Iterator[str]:
    name = repr(convolution.name)
    if convolution.activation is not keras.activations.linear:
        yield f"{name} applies an activation before it"
    if convolution.activity_regularizer is not None:
        yield f"{name} has an activity_regularizer, which sees the output of the convolution"
    if getattr(convolution, "lora_enabled", False):
        yield f"{name} is adapted by LoRA"
    if convolution.dtype_policy.quantization_mode is not None:
        yield f"{name} is quantized"
    if convolution.dtype_policy != batch_norm.dtype_policy:
        yield f"{name} computes in {convolution.dtype_policy.name}, this in {batch_norm.dtype_policy.name}"
    if batch_norm.axis not in _CHANNEL_AXES[convolution.data_format]:
        yield f"normalizes axis {batch_norm.axis}, where {name} is {convolution.data_format}"
    yield from _why_not_trained_together(convolution, batch_norm)
    yield from _why_not_reshaped(convolution)


def _why_not_trained_together(convolution: Layer, batch_norm: Layer) -> Iterator[str]:
    if batch_norm.trainable and not convolution.trainable:
        yield f"trains, while {convolution.name!r} is frozen"
    learned = (convolution.kernel, convolution.bias, batch_norm.gamma, batch_norm.beta)
    for layer, variables in ((convolution, learned[:2]), (batch_norm, learned[2:])):
        if any(variable is not None and variable.trainable != layer.trainable for variable in variables):
            yield f"{layer.name!r} has variables that are frozen apart from the layer"


def _why_not_reshaped(convolution: Layer) -> Iterator[str]:
    if type(convolution) is keras.layers.DepthwiseConv2D:
        for role in ("regularizer", "constraint"):
            if not is_elementwise(getattr(convolution, f"depthwise_{role}")):
                yield f"the depthwise_{role} of {convolution.name!r} may depend on the shape of the kernel"


def is_elementwise(role: Callable | None) -> bool:
    """Whether a regularizer or constraint does the same to a kernel of another shape."""
    return type(role) in _ELEMENTWISE


def _extended(network: Network, chain: Chain, taken: set[Call]) -> Chain:
    """With the Add and the activation behind it, where the op computes them; `taken` are calls of other chains."""
    if chain.batch_norm.activity_regularizer is not None:  # sees what the batch norm computes
        return chain
    return _with_activation(network, _with_add(network, chain, taken), taken)


def _with_add(network: Network, chain: Chain, taken: set[Call]) -> Chain:
    calls = _followers(network, chain, taken)
    extended = Chain([one._replace(add=call) for one, call in zip(chain.occurrences, calls)])
    are_residuals = calls and all(_adds_residual(one.add, chain.batch_norm) for one in extended.occurrences)
    alike = len({one.position for one in extended.occurrences}) == 1 if are_residuals else False
    return extended if alike else chain


def _adds_residual(call: Call, batch_norm: Layer) -> bool:
    """Whether the call adds two different tensors of one shape, as the op does, and nothing else."""
    add = call.layer
    if type(add) is not keras.layers.Add or add.activity_regularizer is not None:
        return False
    if add.compute_dtype != batch_norm.compute_dtype or len(call.inputs) != 2:
        return False
    first, second = call.inputs
    are_floats = all(keras.backend.is_float_dtype(tensor.dtype) for tensor in call.inputs)
    return first is not second and first.shape == second.shape and are_floats


def _with_activation(network: Network, chain: Chain, taken: set[Call]) -> Chain:
    calls = _followers(network, chain, taken)
    if calls and activation_in_op(calls[0].layer, chain.batch_norm.compute_dtype) is not None:
        return Chain([one._replace(activation=call) for one, call in zip(chain.occurrences, calls)])
    return chain


def activation_in_op(layer: Layer, dtype: str) -> str | None:
    """The name of what an activation layer applies, if the op computes it; None for other layers."""
    if type(layer) not in _ACTIVATIONS:
        return None
    name, after = _layer_config.fused_activation(layer, dtype)
    return None if after is not None else name or "linear"


def _followers(network: Network, chain: Chain, taken: set[Call]) -> list[Call]:
    """For each run of the chain the one call that reads its output; nothing where they are not all of one layer."""
    followers = []
    for occurrence in chain.occurrences:
        readers = network.consumers(occurrence.output)
        if len(readers) != 1 or network.is_output(occurrence.output) or readers[0] in taken:
            return []
        followers.append(readers[0])
    of_one_layer = len({id(call.layer) for call in followers}) == 1
    return followers if of_one_layer and len(set(followers)) == len(followers) else []
