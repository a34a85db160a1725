"""Puts FusedConvBN in the place of chains of Keras layers in a model, and back; reads weights of the model without."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras

from fusedconvbn import _fusing_layers
from fusedconvbn._arguments import refuse
from fusedconvbn._fusing_chains import Chain, Occurrence, find
from fusedconvbn._fusing_layers import Names, Stock
from fusedconvbn._keras_copies import compile_like, copy_state
from fusedconvbn._keras_graph import (
    Builder,
    Call,
    CallOrderError,
    Graph,
    Network,
    Rebuilt,
    Substitute,
    Tensor,
    is_graph,
)
from fusedconvbn.layer import FusedConvBN

Layer = keras.layers.Layer
_SUFFIXES = (".weights.h5", ".h5", ".hdf5")


@dataclass(frozen=True)
class Entry:
    """What `fuse` did with one batch normalization.

    Attributes:
        name: Of the layer, behind the names of the models that it is in: "encoder/bn1".
        into: The name of the FusedConvBN that took its place; None if it was kept.
        reason: Why it was kept; None if it was fused.
    """

    name: str
    into: str | None
    reason: str | None


def fuse(model: keras.Model, *, report: list[Entry] | None = None) -> keras.Model:
    """A model that computes and trains as `model` does, with a FusedConvBN for every chain that is one op.

    A chain is Conv2D or DepthwiseConv2D, BatchNormalization, and where the op computes them an Add of one other tensor
    and an activation. What cannot be replaced without a change of outputs, gradients or updates beyond rounding stays.

    Args:
        model: A Functional or built Sequential model, models in it included; it is not changed.
        report: Gets one `Entry` appended for each batch normalization, in the order of the model.

    Returns: A model of its own layers and weights, with equal values; a fused layer has the convolution's name. It is
        compiled if `model` is, with a new optimizer of the same configuration.

    Raises:
        TypeError: `model` is no Keras model, `report` no list.
        ValueError: `model` is neither Functional nor Sequential, not built, or has a layer that cannot be copied.
    """
    _check_model("model", model)
    if report is not None and not isinstance(report, list):
        refuse(TypeError, "report", "a list or None", report)
    network = Network(model)
    found = find(network)
    result = _with_fused_layers(network, found)
    compile_like(result, model)
    if report is not None:
        report += _entries(network, found)
    return result


def unfuse(model: keras.Model) -> keras.Model:
    """The model of stock Keras layers in place of each FusedConvBN.

    Of what `fuse` returned it makes the layers, names and weights, in their order, of the model that `fuse` got. A
    layer made by hand becomes a Conv2D (behind a ZeroPadding2D, where its padding is explicit) or DepthwiseConv2D, a
    BatchNormalization and, where needed, an Add and an Activation, named after it.

    Args:
        model: A Functional or built Sequential model, models in it included; it is not changed.

    Returns: A model of its own layers and weights, with equal values; compiled like `model`, as in `fuse`.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: As in `fuse`, or Keras's layers cannot compute what a layer does: it has variable_transforms, both
            strides and dilations, or a tensor that decides about training.
    """
    (result, _), _ = _unfused("model", model)
    compile_like(result, model)
    return result


def load_weights(fused: keras.Model, file: str | Path) -> None:
    """Loads into `fused` what `save_weights` of the model without FusedConvBN wrote, all of it or nothing.

    Args:
        fused: What `fuse` returned, or another model that `unfuse` accepts.
        file: Name of a `.weights.h5` file, or of a legacy `.h5` or `.hdf5` file.

    Raises:
        TypeError: `fused` is no Keras model, `file` no path.
        FileNotFoundError: There is no such file.
        ValueError: As in `unfuse`, or the file is none of the formats, or of another model.
    """
    _check_model("fused", fused)
    if not isinstance(file, (str, Path)):
        refuse(TypeError, "file", "a path", file)
    if not str(file).endswith(_SUFFIXES):
        refuse(ValueError, "file", f"one that ends in {', '.join(_SUFFIXES)}", str(file))
    if not Path(file).is_file():
        refuse(FileNotFoundError, "file", "an existing file", str(file))
    (stock, copies), replaced = _unfused("fused", fused)
    _load(stock, Path(file))
    for layer in replaced:
        layer.assign_back()
    for layer, copy in copies:
        copy_state(copy, layer)


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, keras.Model):
        refuse(TypeError, name, "a Keras model", model)
    if isinstance(model, keras.Sequential) and not hasattr(model, "inputs"):
        refuse(ValueError, name, "built: call it, or start it with keras.Input", model)
    if not is_graph(model):
        refuse(ValueError, name, "a Functional or Sequential model: in a subclassed one, `call` is code", model)


def _with_fused_layers(network: Network, found: dict[Layer, Chain | str]) -> keras.Model:
    """Rebuilds with the chains in `found`; those that would disturb the order of updates become reasons there."""
    while True:
        layers = {layer: _fusing_layers.fused(chain) for layer, chain in found.items() if isinstance(chain, Chain)}
        substitutes: dict[Call, Substitute | None] = {}
        for layer, fused in layers.items():
            for occurrence in found[layer].occurrences:
                substitutes |= dict.fromkeys(occurrence.calls)
                substitutes[occurrence.calls[-1]] = _fused_call(fused, occurrence)
        try:
            model = network.rebuild(substitutes, keep_order=True).model
        except CallOrderError as error:
            _keep(found, error)
            continue
        for layer, fused in layers.items():
            sources = _fusing_layers.variables(found[layer].convolution, layer)
            _fusing_layers.assign(sources, _fusing_layers.variables(fused, fused))
        return model


def _fused_call(fused: FusedConvBN, occurrence: Occurrence) -> Substitute:
    inputs, residual = occurrence.convolution.inputs[0], occurrence.residual

    def build(builder: Builder) -> Tensor:
        added = {} if residual is None else {"residual": builder.value(residual)}
        return builder(fused, builder.value(inputs), **added)

    return Substitute(build, updates=occurrence.batch_norm)


def _keep(found: dict[Layer, Chain | str], error: CallOrderError) -> None:
    """Makes a reason of every chain in the graph whose calls would run in another order."""
    calls = set(error.graph.calls)
    there = [layer for layer, chain in found.items() if isinstance(chain, Chain) and not calls.isdisjoint(chain.calls)]
    if not there:
        raise error
    reason = f"{error.layer.name!r} is called several times, and would be in another order"
    found.update(dict.fromkeys(there, reason))


def _entries(network: Network, found: dict[Layer, Chain | str]) -> Iterator[Entry]:
    """For the batch normalizations that can be seen, those in subclassed models included."""
    seen: set[Layer] = set()
    for graph in network.graphs:
        for layer in dict.fromkeys(call.layer for call in graph.calls):
            if layer in found and layer not in seen:
                seen.add(layer)
                yield _entry(f"{graph.path}{layer.name}", found[layer])
            elif isinstance(layer, keras.Model) and not is_graph(layer):
                yield from _entries_within(layer, f"{graph.path}{layer.name}/")


def _entry(name: str, outcome: Chain | str) -> Entry:
    if isinstance(outcome, str):
        return Entry(name, None, outcome)
    return Entry(name, outcome.convolution.name, None)


def _entries_within(model: keras.Model, path: str) -> Iterator[Entry]:
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            yield Entry(f"{path}{layer.name}", None, f"is in {model.name!r}, a subclassed model")
        elif isinstance(layer, keras.Model):
            yield from _entries_within(layer, f"{path}{layer.name}/")


def _unfused(argument: str, model: keras.Model) -> tuple[Rebuilt, list[Stock]]:
    """The model of stock layers, and what in it took the place of the fused layers."""
    _check_model(argument, model)
    network = Network(model)
    stocks: dict[Layer, Stock] = {}
    substitutes: dict[Call, Substitute | None] = {}
    for graph in network.graphs:
        names = _names(graph)
        for call in graph.calls:
            if isinstance(call.layer, FusedConvBN):
                if call.layer not in stocks:
                    stocks[call.layer] = Stock(call.layer, names)
                substitutes[call] = stocks[call.layer].substitute(call)
    result = network.rebuild(substitutes)
    for stock in stocks.values():
        stock.assign()
    return result, list(stocks.values())


def _names(graph: Graph) -> Names:
    layers = {call.layer.name: call.layer for call in graph.calls} | {layer.name: layer for layer in graph.input_layers}
    fused = [layer for layer in layers.values() if isinstance(layer, FusedConvBN)]
    return Names(layers, [name for layer in fused for name in _fusing_layers.origin_names(layer)])


def _load(stock: keras.Model, file: Path) -> None:
    """Loads `file` into a model of stock layers, which must be the file's: Keras overlooks layers that only it has."""
    try:
        if file.name.endswith(".weights.h5"):
            foreign = _weights_in(file) - _weights_of(stock)
            if foreign:
                raise ValueError(f"it has weights that the model lacks, such as {min(foreign)!r}")
        stock.load_weights(str(file))
    except (KeyError, OSError, ValueError) as error:
        accepted = f"of the model that `unfuse(fused)` returns: {error}"
        raise ValueError(f"`file` must hold the weights {accepted}. Received: file={str(file)!r}") from error


def _weights_of(model: keras.Model) -> set[str]:
    """What `_weights_in` finds in a file of the model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.weights.h5")
        model.save_weights(str(file))
        return _weights_in(file)


def _weights_in(file: Path) -> set[str]:
    """Where in a `.weights.h5` file are arrays of layers; those of an optimizer and of metrics lie elsewhere."""
    found: set[str] = set()

    def note(name: str, member: Any) -> None:
        if isinstance(member, h5py.Dataset):
            found.add(name)

    with h5py.File(file) as store:
        store["layers"].visititems(note)
    return found
