"""Functional and Sequential models as lists of calls, and new models in which some calls are replaced by others.

    network = Network(model)
    for graph in network.graphs:  # the model's own, then those of the models called in it
        for call in graph.calls: ...
    replaced = lambda build: build(layer, build.value(call.inputs[0]))
    new = network.rebuild({call: Substitute(replaced)}).model

Keras has no public access to the nodes of a model, but `keras.models.clone_model` shows every call to a function of the
caller's: here it clones into operations without weights that stand for the layers. So nothing private is touched, and
the model does not learn that it was read.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras

from fusedconvbn._keras_copies import copy_layer, copy_state
from fusedconvbn.layer import FusedConvBN

Tensor = keras.KerasTensor


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer in a model.

    Attributes:
        layer: The model's own layer (or operation, such as `keras.ops.add`).
        args, kwargs: What it is called with: structures of tensors and of Python values.
        outputs: A structure of tensors.
    """

    layer: keras.Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among the arguments, in their order."""
        return _tensors((self.args, self.kwargs))

    @property
    def results(self) -> list[Tensor]:
        """The outputs as a flat list."""
        return _tensors(self.outputs)

    def arguments(self) -> dict[str, Any]:
        """The arguments by the names of the parameters of `layer.call`, without those that are None."""
        bound = inspect.signature(self.layer.call).bind(*self.args, **self.kwargs)
        return {name: value for name, value in bound.arguments.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Graph:
    """The calls of one model, in the order in which Keras runs them.

    Attributes:
        model: A Functional or Sequential model.
        path: Names of the models around the calls, each with a slash behind it; the outermost one is not named.
        input_layers: One for each of `inputs`; they are not among the calls.
        inputs, outputs: Flat lists of tensors. These and those of the calls stand for the model's own: what is the same
            tensor there is the same object here.
        calls: A layer that is called several times is in several of them.
    """

    model: keras.Model
    path: str
    input_layers: list[keras.layers.InputLayer]
    inputs: list[Tensor]
    outputs: list[Tensor]
    calls: list[Call] = field(repr=False)


class CallOrderError(ValueError):
    """In the new model Keras would run the calls that update one variable in another order.

    Attributes:
        graph: Where these calls are.
        layer: A layer that is called by several of them.
    """

    def __init__(self, graph: Graph, layer: keras.Operation) -> None:
        super().__init__(f"`{graph.path}{layer.name}` would be called in another order")
        self.graph, self.layer = graph, layer


def is_graph(model: Any) -> bool:
    """Whether `model` is a built Functional or Sequential model that runs its graph, not a `call` of its author's."""
    if not isinstance(model, keras.Model):
        return False
    runs = next(cls for cls in type(model).__mro__ if "call" in vars(cls))
    is_made_of_calls = isinstance(model, (keras.Function, keras.Sequential)) and hasattr(model, "inputs")
    return is_made_of_calls and _is_of_keras(runs)


class Rebuilt(NamedTuple):
    """What `Network.rebuild` made.

    Attributes:
        model: The new model.
        copies: The layers of the network's model that have a copy in the new one, with this copy.
    """

    model: keras.Model
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]]


class Network:
    """All graphs of a model: its own, and those of the models that are called in it, at any depth.

    Args:
        model: A model for which `is_graph` is true. Models among its layers for which it is not stay single layers.

    Attributes:
        graphs: One for each model, the outermost first, however often it is called.
    """

    def __init__(self, model: keras.Model) -> None:
        self.graphs: list[Graph] = []
        self._add(model, "")
        self._producers = {id(tensor): call for call in self._calls() for tensor in call.results}
        self._consumers: dict[int, list[Call]] = {}
        self._calls_of: dict[int, list[Call]] = {}
        for call in self._calls():
            self._calls_of.setdefault(id(call.layer), []).append(call)
            for tensor_id in dict.fromkeys(map(id, call.inputs)):
                self._consumers.setdefault(tensor_id, []).append(call)
        self._outputs = {id(tensor) for graph in self.graphs for tensor in graph.outputs}

    def _add(self, model: keras.Model, path: str) -> None:
        graph = trace(model, path)
        self.graphs.append(graph)
        for call in graph.calls:
            if is_graph(call.layer) and all(known.model is not call.layer for known in self.graphs):
                self._add(call.layer, f"{path}{call.layer.name}/")

    def _calls(self) -> list[Call]:
        return [call for graph in self.graphs for call in graph.calls]

    def producer(self, tensor: Tensor) -> Call | None:
        """The call that `tensor` is an output of; None for an input of a model."""
        return self._producers.get(id(tensor))

    def consumers(self, tensor: Tensor) -> list[Call]:
        """The calls that read `tensor`, each once."""
        return self._consumers.get(id(tensor), [])

    def is_output(self, tensor: Tensor) -> bool:
        """Whether `tensor` is an output of its model."""
        return id(tensor) in self._outputs

    def calls_of(self, layer: keras.Operation) -> list[Call]:
        """All calls of `layer`, in all graphs."""
        return self._calls_of.get(id(layer), [])

    def rebuild(self, substitutes: Mapping[Call, Substitute | None], *, keep_order: bool = False) -> Rebuilt:
        """A model of new layers, with their own weights of equal values; this one stays as it is.

        Args:
            substitutes: For each call to replace what replaces it; None leaves the call out, for which nothing but
                calls with substitutes may read its outputs.
            keep_order: Insists on the order in which the calls update variables that several of them share, such as
                the moving statistics of a batch normalization in a model that is called twice.

        Returns: A model of the same class where this takes the arguments of `keras.Model` or `keras.Sequential`, with
            the names, inputs, outputs and `trainable` of the model; and its layers that are copies. It is not compiled.

        Raises:
            ValueError: A layer's class cannot make it anew from its configuration.
            CallOrderError: The order of updates would change, with `keep_order`.
        """
        return _Rebuilding(self.graphs, substitutes, keep_order).run()


def trace(model: keras.Model, path: str = "") -> Graph:
    """The calls of `model`, not of those within it."""
    view = keras.Model(model.inputs, model.outputs, name=model.name)  # neither Sequential nor compiled
    by_output = {id(layer.output): layer for layer in view.operations if isinstance(layer, keras.layers.InputLayer)}
    input_layers = [by_output[id(tensor)] for tensor in view.inputs]
    inputs = [copy_layer(layer).output for layer in input_layers]
    calls: list[Call] = []

    def record(stand_in: _StandIn, *args: Any, **kwargs: Any) -> Any:
        outputs = stand_in(*args, **kwargs)
        calls.append(Call(stand_in.layer, args, kwargs, outputs))
        return outputs

    traced = keras.models.clone_model(view, input_tensors=inputs, clone_function=_StandIn, call_function=record)
    return Graph(model, path, input_layers, inputs, traced.outputs, calls)


class _StandIn(keras.Operation):
    """What is called in place of `layer`, to the same outputs."""

    def __init__(self, layer: keras.Operation) -> None:
        super().__init__(name=layer.name)
        self.layer = layer

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Layers of others may rely on what their `__call__` sets up, such as the casts of a dtype policy."""
        if _is_of_keras(type(self.layer)) or isinstance(self.layer, FusedConvBN) or is_graph(self.layer):
            return self.layer.compute_output_spec(*args, **kwargs)
        return copy_layer(self.layer)(*args, **kwargs)


def _is_of_keras(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "keras"


class Builder:
    """What a substitute makes calls with; `builder(layer, *args, **kwargs)` calls a new layer.

    In a Sequential model, where layers are only listed, the call is not made: each layer gets the output of the one
    before it.

    Attributes:
        copy: A function from a layer of the model to the new model's layer in its place.
        made: The calls, each behind the position among the graph's calls of the one whose updates it makes.
        position: That of the next calls.
    """

    def __init__(self, copy: Callable[[keras.Operation], keras.Operation], layers: list | None) -> None:
        self.copy = copy
        self._layers = layers
        self._values: dict[int, Any] = {}
        self.made: list[tuple[int, Call]] = []
        self.position = 0

    def __call__(self, layer: keras.Operation, *args: Any, **kwargs: Any) -> Any:
        if self._layers is not None:
            self._layers.append(layer)
            return args[0]
        outputs = layer(*args, **kwargs)
        self.made.append((self.position, Call(layer, args, kwargs, outputs)))
        return outputs

    def value(self, structure: Any) -> Any:
        """The structure with the new model's tensors in place of those of the graph."""
        return keras.tree.map_structure(lambda x: self._values[id(x)] if isinstance(x, Tensor) else x, structure)

    def replace(self, tensors: list[Tensor], values: Any) -> None:
        """Lets `value` return the tensors in the structure `values` for `tensors`."""
        self._values.update(zip(map(id, tensors), _tensors(values)))


@dataclass(frozen=True, eq=False)
class Substitute:
    """What takes the place of a call.

    Attributes:
        build: Calls layers of its own by the builder and returns what the call's outputs are replaced by, in their
            structure.
        updates: The call whose updates of variables these layers make, where it is another one.
    """

    build: Callable[[Builder], Any]
    updates: Call | None = None


class _Rebuilding:
    """One run of `Network.rebuild`: the layers made so far, which the graphs share."""

    def __init__(self, graphs: list[Graph], substitutes: Mapping[Call, Substitute | None], keep_order: bool) -> None:
        self._graphs = {id(graph.model): graph for graph in graphs}
        self._outermost = graphs[0]
        self._substitutes = substitutes
        self._keep_order = keep_order
        self._copies: dict[int, tuple[keras.Operation, keras.Operation]] = {}

    def run(self) -> Rebuilt:
        model = self._copy(self._outermost.model)
        made = [pair for pair in self._copies.values() if isinstance(pair[0], keras.layers.Layer)]
        copies = [pair for pair in made if id(pair[0]) not in self._graphs]
        for original, copy in copies:
            copy_state(original, copy)
        return Rebuilt(model, copies)

    def _copy(self, layer: keras.Operation) -> keras.Operation:
        if id(layer) not in self._copies:
            graph = self._graphs.get(id(layer))
            self._copies[id(layer)] = (layer, copy_layer(layer) if graph is None else self._model(graph))
        return self._copies[id(layer)][1]

    def _model(self, graph: Graph) -> keras.Model:
        input_layers = [copy_layer(layer) for layer in graph.input_layers]
        is_list = isinstance(graph.model, keras.Sequential)
        builder = Builder(self._copy, input_layers if is_list else None)
        inputs = [layer.output for layer in input_layers]
        self._make_calls(graph, builder, inputs)
        if is_list:
            return _construct(graph.model, keras.Sequential, input_layers)
        outputs = [builder.value(tensor) for tensor in graph.outputs]
        structures = ((graph.model.input, inputs), (graph.model.output, outputs))
        packed = [keras.tree.pack_sequence_as(structure, flat) for structure, flat in structures]
        model = _construct(graph.model, keras.Model, *packed)
        if self._keep_order:
            _check_order(graph, model, builder.made)
        return model

    def _make_calls(self, graph: Graph, builder: Builder, inputs: list[Tensor]) -> None:
        builder.replace(graph.inputs, inputs)
        positions = {call: position for position, call in enumerate(graph.calls)}
        for call in graph.calls:
            substitute = self._substitutes.get(call, _copying(call))
            if substitute is not None:
                builder.position = positions[substitute.updates or call]
                builder.replace(call.results, substitute.build(builder))


def _copying(call: Call) -> Substitute:
    """The same call of the copied layer."""
    return Substitute(lambda b: b(b.copy(call.layer), *b.value(call.args), **b.value(call.kwargs)))


_PARAMETERS = {keras.Model: ["inputs", "outputs", "name"], keras.Sequential: ["layers", "trainable", "name"]}


def _construct(original: keras.Model, base: type[keras.Model], *structures: Any) -> keras.Model:
    """Of the original's class if this takes the arguments of `base`, as one that overrides `train_step` does."""
    spec = inspect.getfullargspec(type(original).__init__)
    alike = spec.args[1:] == _PARAMETERS[base] or (spec.varargs and spec.varkw)
    trainable = {} if original.trainable else {"trainable": False}
    return (type(original) if alike else base)(*structures, name=original.name, **trainable)


def _check_order(graph: Graph, model: keras.Model, made: list[tuple[int, Call]]) -> None:
    """Raises a `CallOrderError` unless Keras makes the updates of each variable in the order of their positions."""
    updates = Counter(variable for _, call in made for variable in _updated(call.layer))
    if max(updates.values(), default=0) < 2:
        return
    new = trace(model)
    own = dict(zip(map(id, new.inputs), model.inputs))
    pending: dict[tuple[int, ...], list[tuple[int, Call]]] = {}
    for position, call in made:
        pending.setdefault((id(call.layer), *map(id, call.inputs)), []).append((position, call))
    latest: dict[int, int] = {}
    for call in new.calls:
        position, same = pending[(id(call.layer), *(id(own[id(tensor)]) for tensor in call.inputs))].pop(0)
        own.update(zip(map(id, call.results), same.results))
        for variable in _updated(call.layer):
            if latest.get(variable, -1) > position:
                raise CallOrderError(graph, call.layer)
            latest[variable] = position


def _updated(layer: keras.Operation) -> list[int]:
    """The variables that a call may update, by their ids."""
    return [id(variable) for variable in getattr(layer, "non_trainable_variables", ())]


def _tensors(structure: Any) -> list[Tensor]:
    return [leaf for leaf in keras.tree.flatten(structure) if isinstance(leaf, Tensor)]
