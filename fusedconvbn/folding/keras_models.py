"""Keras models: objects and files. The result is a Keras model too, of the same layers without batch norms."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from fusedconvbn._arguments import refuse
from fusedconvbn._keras_graph import Builder, Call, Graph, Network, Substitute, is_graph
from fusedconvbn.folding import writers
from fusedconvbn.folding.keras_layers import changed_layer, pad_with, passes_on, read_call, tensor_name
from fusedconvbn.folding.ops import Affine, Linear, Op
from fusedconvbn.folding.pipeline import fold_graph
from fusedconvbn.folding.planning import Folded, Kept, fold_batch_norms, merged
from fusedconvbn.folding.planning import Graph as Plan
from fusedconvbn.folding.saved_model import open_saved_model
from fusedconvbn.folding.sources import Wishes, size_of, whole
from fusedconvbn.fusing import unfuse
from fusedconvbn.layer import FusedConvBN


@dataclass
class Outcome:
    """What folding a Keras model came to.

    Attributes:
        original: The model as it was.
        model: The folded one.
        entries: One for each batch norm.
        removed: How many layers of which sort are gone.
        network: Of the original, FusedConvBN layers unfused.
        replaced: What computes the results of the calls of `network` that have changed.
        sites: By id, tensors of `network` where something was folded, with their names.
    """

    original: keras.Model
    model: keras.Model
    entries: list[Folded | Kept]
    removed: dict[str, int]
    network: Network
    replaced: dict[Call, Callable[[Any], Any]] = field(default_factory=dict)
    sites: dict[int, str] = field(default_factory=dict)


def load(source: Any) -> keras.Model | None:
    """The Keras model that a source is, or that is in its file; None for what is none.

    Raises:
        ValueError: A file is damaged, or holds weights only.
    """
    if isinstance(source, keras.Model):
        return source
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source).endswith(writers.SUFFIXES["keras"]):
        return None
    name = os.fspath(source)
    if not os.path.isfile(name):
        refuse(FileNotFoundError, "source", "a file that exists", name)
    if name.endswith(".keras") and not zipfile.is_zipfile(name):  # Keras would say that there is no file
        refuse(ValueError, "source", "a whole Keras model; a .keras file is a zip archive", name)
    try:
        return keras.models.load_model(name, compile=False)
    except Exception as error:  # of a zip file, of h5py, of JSON, of a layer's own
        raise ValueError(f"`source` must be a whole Keras model. Received: {name!r} ({error})") from error


def export_legacy(source: Any, folder: str) -> str | None:
    """Where in `folder` the SavedModel of a model of tf_keras (Keras 2) is now; None for what is none."""
    if type(source).__module__.partition(".")[0] != "tf_keras" or not hasattr(source, "export"):
        return None
    path = os.path.join(folder, "exported")
    with contextlib.redirect_stdout(io.StringIO()):
        source.export(path)
    return path


def fold_model(model: keras.Model) -> Outcome:
    """Folds a Functional or Sequential model, those within it too.

    Raises:
        ValueError: It is another one, whose layers cannot be told.
    """
    if not is_graph(model):
        accepted = "a built Functional or Sequential model; export() others, and fold the SavedModel"
        refuse(ValueError, "source", accepted, type(model).__name__)
    return _Folding(model).run()


class _Folding:
    """One fold: what its graphs' calls become."""

    def __init__(self, model: keras.Model) -> None:
        network = Network(model)
        has_fused = any(isinstance(call.layer, FusedConvBN) for graph in network.graphs for call in graph.calls)
        self._network = Network(unfuse(model)) if has_fused else network
        self._substitutes: dict[Call, Substitute] = {}
        self._made: dict[tuple[Any, ...], tuple[keras.layers.Layer, list[np.ndarray]]] = {}
        self._outcome = Outcome(model, model, [], {"dropouts": 0}, self._network)

    def run(self) -> Outcome:
        entries: dict[int, Folded | Kept] = {}
        for graph in self._network.graphs:
            self._fold_graph(graph, entries)
        outcome = self._outcome
        outcome.model = self._network.rebuild(self._substitutes).model
        for new, weights in self._made.values():
            new.set_weights(weights)
        outcome.entries = list(entries.values())
        return outcome

    def _fold_graph(self, graph: Graph, entries: dict[int, Folded | Kept]) -> None:
        is_list = isinstance(graph.model, keras.Sequential)
        ops = {call: read_call(call, f"{graph.path}{call.layer.name}") for call in graph.calls}
        if is_list:
            for op in ops.values():
                if isinstance(op, Linear) and op.pads and any(map(sum, op.pads)):
                    op.pads = None  # what pads with another number is no layer
        inputs = [Op(t.name, "InputLayer", [], [tensor_name(t)]) for t in graph.inputs]
        plan = Plan([*inputs, *ops.values()], {tensor_name(t) for t in graph.outputs})
        calls = {id(op): call for call, op in ops.items()}
        norms = [op for op in plan.ops if isinstance(op, Affine)]
        for op, entry in zip(norms, fold_batch_norms(plan)):
            layer_id = id(calls[id(op)].layer)
            entries[layer_id] = merged(entries.get(layer_id), entry)
        for call in graph.calls:
            for layer in _hidden(call.layer):
                entries.setdefault(id(layer), Kept(f"{graph.path}{layer.name}", _why_hidden(layer, call.layer)))
        gone = [call for call, op in ops.items() if passes_on(call) or (isinstance(op, Affine) and op.removed)]
        if is_list and len(gone) == len(ops):
            gone.pop()  # Keras runs no Sequential model without layers
        for call in gone:
            self._outcome.removed["dropouts"] += passes_on(call)
            self._substitutes[call] = _passing_on(call)
            self._outcome.replaced[call] = lambda value: value
        for call, op in ops.items():
            if isinstance(op, Linear) and op.changed:
                self._replace(call, op)
        self._note_sites(plan, calls)

    def _replace(self, call: Call, op: Linear) -> None:
        new = self._changed(op, call.layer)
        self._outcome.replaced[call] = _with_padding(op, new)
        self._substitutes[call] = Substitute(lambda b: _build(b, op, new, call))

    def _changed(self, op: Linear, layer: keras.layers.Layer) -> keras.layers.Layer:
        """A new layer, one for all calls of a layer that change alike."""
        new, weights = changed_layer(op, layer)
        key = (id(layer), op.pad_value, *(w.tobytes() for w in weights))
        if key not in self._made:
            copies = sum(known[0] == id(layer) for known in self._made)
            if copies or len(self._network.calls_of(layer)) > 1:
                new = type(new).from_config({**new.get_config(), "name": self._free_name(f"{layer.name}_folded")})
            self._made[key] = new, weights
        return self._made[key][0]

    def _free_name(self, name: str) -> str:
        """`name`, or one with a number behind it, that no layer has."""
        taken = {call.layer.name for graph in self._network.graphs for call in graph.calls}
        taken |= {layer.name for layer, _ in self._made.values()}
        numbered = (f"{name}_{i}" if i else name for i in itertools.count())
        return next(each for each in numbered if each not in taken)

    def _note_sites(self, plan: Plan, calls: Mapping[int, Call]) -> None:
        ids = {tensor_name(tensor): id(tensor) for call in calls.values() for tensor in call.results}
        for before in plan.sites():
            self._outcome.sites[ids[before]] = before.partition("@")[0]


def _hidden(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The batch norms in a layer that is no graph of layers; itself, if it is a kind of its own."""
    if is_graph(layer) or type(layer) is keras.layers.BatchNormalization:
        return []
    return [
        each for each in layer._flatten_layers() if isinstance(each, (keras.layers.BatchNormalization, FusedConvBN))
    ]


def _why_hidden(layer: keras.layers.Layer, outer: keras.layers.Layer) -> str:
    where = "a class of its own" if layer is outer else f"inside {type(outer).__name__} {outer.name!r}"
    return f"it is {where}, and only a graph tells what that computes: export() the model and fold the SavedModel"


def _passing_on(call: Call) -> Substitute:
    return Substitute(lambda b: b.value(call.inputs[0]))


def _build(builder: Builder, op: Linear, new: keras.layers.Layer, call: Call) -> Any:
    value = builder.value(call.inputs[0])
    return builder(new, pad_with(op, value) if op.pad_value else value)


def _with_padding(op: Linear, new: keras.layers.Layer) -> Callable[[Any], Any]:
    return lambda value: new(pad_with(op, value) if op.pad_value else value)


def write(outcome: Outcome, path: str, kind: str, *, freeze: bool, overwrite: bool) -> int:
    """Writes the folded model as a Keras file or as a graph; the bytes of its files."""
    if kind != "keras":
        return _write_graph(outcome.model, path, kind, freeze=freeze, overwrite=overwrite)
    with whole(path, overwrite=overwrite) as made:
        outcome.model.save(made)
        return size_of(Path(made))


def _write_graph(model: keras.Model, path: str, kind: str, *, freeze: bool, overwrite: bool) -> int:
    """By way of a SavedModel, in which there is nothing left to fold."""
    with tempfile.TemporaryDirectory() as folder:
        exported = os.path.join(folder, "exported")
        model.export(exported, verbose=False)
        opened = open_saved_model(Path(exported), Wishes(), None)
        frozen = fold_graph(opened.frozen).frozen
    return writers.write_graph(frozen, path, kind, opened.meta, freeze=freeze, overwrite=overwrite)
