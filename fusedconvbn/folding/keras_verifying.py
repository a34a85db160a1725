"""Runs a Keras model and its folded one on the same inputs, down to every place where something was folded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fusedconvbn._keras_graph import Call, Graph
from fusedconvbn.folding.keras_models import Outcome
from fusedconvbn.folding.verifying import disturbed, random_values


class KerasModels:
    """What `verifying.compare` compares; inputs are called as the model's tensors are.

    Attributes:
        inputs, outputs: Names.
    """

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._functions = [_function(model) for model in (outcome.original, outcome.model)]
        self.inputs = [tensor.name for tensor in outcome.original.inputs]
        self.outputs = [f"output {i}" for i in range(len(outcome.original.outputs))]

    def types(self) -> set[str]:
        """Names of the types that the original's layers compute in."""
        return {layer.compute_dtype for layer in self._outcome.original._flatten_layers()}

    def feeds(self, rng: np.random.Generator, batch: int, size: int) -> dict[str, np.ndarray] | None:
        """Random inputs, unknown sizes being `batch` along the first axis and `size` elsewhere."""
        made = {}
        for tensor in self._outcome.original.inputs:
            sizes = [batch if i == 0 else size for i in range(len(tensor.shape))]
            shape = [s if known is None else known for s, known in zip(sizes, tensor.shape)]
            value = random_values(shape, tf.as_dtype(tensor.dtype), rng)
            if value is None:
                return None
            made[tensor.name] = value
        return made

    def original(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The original's outputs."""
        return self._functions[0](self._flat(feeds))

    def folded(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The folded model's outputs."""
        return self._functions[1](self._flat(feeds))

    def before(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values at the sites in the original, and its outputs."""
        return {**self._at_sites(feeds, folded=False), **dict(zip(self.outputs, self.original(feeds)))}

    def disturbed(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values at the sites in the original, its weights rounded once more, and its outputs."""
        variables = self._outcome.original.variables + self._outcome.network.graphs[0].model.variables
        values = disturbed({id(v): v.numpy() for v in variables})
        with keras.StatelessScope([(v, values[id(v)]) for v in variables if id(v) in values]):
            run = _Run(self._outcome, folded=False)
            outputs = run.graph(self._outcome.network.graphs[0], self._flat(feeds))
        return {**self._named(run), **dict(zip(self.outputs, map(np.asarray, outputs)))}

    def after(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values at the sites in the folded model, and its outputs."""
        return {**self._at_sites(feeds, folded=True), **dict(zip(self.outputs, self.folded(feeds)))}

    def _flat(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [feeds[tensor.name] for tensor in self._outcome.original.inputs]

    def _at_sites(self, feeds: Mapping[str, np.ndarray], *, folded: bool) -> dict[str, np.ndarray]:
        run = _Run(self._outcome, folded)
        with keras.StatelessScope():  # what a layer assigns is lost
            run.graph(self._outcome.network.graphs[0], self._flat(feeds))
        return self._named(run)

    def _named(self, run: _Run) -> dict[str, np.ndarray]:
        return {f"{self._outcome.sites[key]} {i}": value for i, (key, value) in enumerate(run.found.items())}


class _Run:
    """One run of a model call by call, those that folding changed as they were or as they became."""

    def __init__(self, outcome: Outcome, folded: bool) -> None:
        self._graphs = {id(graph.model): graph for graph in outcome.network.graphs}
        self._replaced = outcome.replaced if folded else {}
        self._sites = outcome.sites
        self.found: dict[int, np.ndarray] = {}

    def graph(self, graph: Graph, inputs: Sequence[Any]) -> list[Any]:
        values = dict(zip(map(id, graph.inputs), inputs))

        def fill(structure: Any) -> Any:
            is_tensor = lambda x: isinstance(x, keras.KerasTensor)  # noqa: E731
            return keras.tree.map_structure(lambda x: values[id(x)] if is_tensor(x) else x, structure)

        for call in graph.calls:
            if call in self._replaced:
                results = [self._replaced[call](fill(call.inputs[0]))]
            elif id(call.layer) in self._graphs:
                results = self.graph(self._graphs[id(call.layer)], fill(call.inputs))
            else:
                results = keras.tree.flatten(_infer(call, fill(call.args), fill(call.kwargs)))
            for tensor, value in zip(call.results, results):
                values[id(tensor)] = value
                if id(tensor) in self._sites:
                    self.found[id(tensor)] = np.asarray(value)
        return [values[id(tensor)] for tensor in graph.outputs]


def _infer(call: Call, args: Any, kwargs: Any) -> Any:
    """As in a model that is called for inference, which overrides what a call says of training."""
    takes_training = "training" in inspect.signature(call.layer.call).parameters
    return call.layer(*args, **{**kwargs, "training": False} if takes_training else kwargs)


def _function(model: keras.Model) -> Any:
    """From a flat list of inputs to a flat list of outputs."""

    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input

    @tf.function(reduce_retracing=True)
    def run(flat: list[tf.Tensor]) -> list[tf.Tensor]:
        return keras.tree.flatten(model(keras.tree.pack_sequence_as(structure, flat), training=False))

    return lambda flat: [np.asarray(output) for output in run([tf.convert_to_tensor(value) for value in flat])]
