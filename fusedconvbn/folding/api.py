"""`fold` and `inspect`: the functions that users call."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from fusedconvbn._arguments import refuse
from fusedconvbn.folding import keras_models, verifying, writers
from fusedconvbn.folding.checkpoint import open_checkpoint, prefix_of
from fusedconvbn.folding.frozen import of_graph_def, open_frozen
from fusedconvbn.folding.keras_verifying import KerasModels
from fusedconvbn.folding.nodes import GraphDef, canonical, op_def
from fusedconvbn.folding.pipeline import Outcome, fold_graph
from fusedconvbn.folding.planning import Folded, Kept
from fusedconvbn.folding.report import Report
from fusedconvbn.folding.saved_model import open_saved_model
from fusedconvbn.folding.sources import (
    KINDS_OF_SOURCE,
    Source,
    Wishes,
    refuse_blocked,
    refuse_existing,
    refuse_source,
    session_of,
)
from fusedconvbn.folding.verifying import Comparison, Runnable, VerificationError

_LOG = logging.getLogger("fusedconvbn")  # tells at level INFO what long work is at


def fold(
    source: Any,
    destination: str | os.PathLike[str] | None = None,
    *,
    inputs: Mapping[str, Sequence[int | None] | None] | Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    values: Mapping[str, Any] | None = None,
    tags: Sequence[str] | None = None,
    to: str | None = None,
    freeze: bool = False,
    verify: bool | Mapping[str, np.ndarray] = True,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> tuple[Any, Report]:
    """Merges the batch norms of a model into its convolutions, for inference, and removes what only training needs.

        W' = W * gamma / sqrt(variance + epsilon)
        b' = beta + (b - mean) * gamma / sqrt(variance + epsilon)

    The result is made of TensorFlow's (Keras's) own ops alone, FusedConvBN ones included. What cannot be folded exactly
    stays as it is, and the report says why. The source is never changed.

    Args:
        source: A Keras model, `.keras` or `.h5` file; a SavedModel's folder; a frozen graph's `.pb` or `.pbtxt` or a
            GraphDef; the prefix of a TensorFlow 1 checkpoint with a `.meta`, or the folder with its `checkpoint` file.
        destination: Where to write the result: a path, for checkpoints a prefix; missing folders are made. Its suffix
            says of which kind, where the source can become that (.pb, .pbtxt, of Keras models .keras, .h5); else the
            result is of the source's kind. None: it is returned only.
        inputs: For graphs, names of the tensors that are fed, with their shapes or None; tensors that are not
            placeholders become some. None: the signatures' or all placeholders.
        outputs: For graphs, names of the tensors to compute. None: the signatures', or what nothing reads.
        values: For graphs, values of placeholders that the folded model has no more. Those that by their names tell
            training from inference, or what dropout keeps, need none.
        tags: Of the SavedModel's graph; None: those of serving, or of the only one.
        to: "saved_model", "frozen", "checkpoint" or "keras" (for Keras sources): the kind to write, which the suffix of
            `destination` must not contradict.
        freeze: Writes constants for variables, into a SavedModel; a frozen graph has no others.
        verify: Whether to run the original and the result on the same random inputs, or on these (by name of the
            tensor, or of the Keras model's input), and to compare all outputs and every place where something was
            folded.
        tolerance: Of the differences, relative to each tensor's maximum; None: 1e-4, for 16-bit types 1e-2 (float16)
            and 8e-2 (bfloat16). Where rounding weights and inputs once more makes larger differences, four times those.
        overwrite: Whether the destination may exist.

    Returns: (result, report). The result is the destination's path; without a destination, a Keras model for Keras
        sources and a GraphDef for all others, models of tf_keras among them. `report.result` says which.

    Raises:
        FileNotFoundError, FileExistsError: There is no source, or already a destination.
        TypeError, ValueError: An argument is of the wrong kind, the source damaged, or what to fold cannot be told.
        VerificationError: The result does not compute what the original computes; nothing has been written.

    Example:
        >>> result, report = fusedconvbn.fold("saved_model", "folded")
        >>> print(report)
    """
    options = _Options(destination, to, freeze, verify, tolerance, overwrite)
    wishes = _wishes(inputs, outputs, values)
    _LOG.info("reading %s", _name(source) or type(source).__name__)
    model = keras_models.load(source)
    if model is not None:
        _refuse_ends(wishes, tags)
        return _fold_keras(source, model, options)
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_source(keras_models.export_legacy(source, scratch) or source, wishes, tags)
        return _fold_graph(source, opened, options)


@dataclass(frozen=True)
class _Options:
    """Arguments of `fold`."""

    destination: str | os.PathLike[str] | None
    to: str | None
    freeze: bool
    verify: bool | Mapping[str, np.ndarray]
    tolerance: float | None
    overwrite: bool

    def __post_init__(self) -> None:
        if not isinstance(self.verify, (bool, Mapping)):
            refuse(TypeError, "verify", "True, False or a dict of arrays by the names of inputs", self.verify)
        if self.tolerance is not None and not (isinstance(self.tolerance, (int, float)) and self.tolerance > 0):
            refuse(ValueError, "tolerance", "a positive number or None", self.tolerance)
        if self.to not in (None, *writers.KINDS):
            refuse(ValueError, "to", f"one of {', '.join(writers.KINDS)}", self.to)
        if self.path is None and (self.to is not None or self.freeze):
            refuse(ValueError, "destination", "given where `to` or `freeze` says what to write", None)
        if self.path is not None:
            refuse_existing(self.path, self.overwrite)
            refuse_blocked("destination", self.path)

    @property
    def path(self) -> str | None:
        """Where to write."""
        return None if self.destination is None else os.fspath(self.destination)

    def kind_to_write(self, source_kind: str) -> str | None:
        """Of the result; None where nothing is written."""
        return self.path and writers.kind_to_write(self.path, self.to, source_kind, freeze=self.freeze)

    @property
    def given(self) -> Mapping[str, np.ndarray] | None:
        """What to run the models on, if it is not to be made up."""
        return self.verify if isinstance(self.verify, Mapping) else None


def inspect(
    source: Any,
    *,
    inputs: Mapping[str, Sequence[int | None] | None] | Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    values: Mapping[str, Any] | None = None,
    tags: Sequence[str] | None = None,
) -> Report:
    """The report of what `fold` would do with the same arguments; nothing is run, nothing written."""
    wishes = _wishes(inputs, outputs, values)
    model = keras_models.load(source)
    if model is not None:
        _refuse_ends(wishes, tags)
        return _keras_report(source, None, keras_models.fold_model(model))
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_source(keras_models.export_legacy(source, scratch) or source, wishes, tags)
        return _report(source, None, opened, fold_graph(opened.frozen))


def open_source(source: Any, wishes: Wishes, tags: Sequence[str] | None = None) -> Source:
    """Reads a graph, whatever it was saved as."""
    if not isinstance(source, (GraphDef, str, os.PathLike)):
        refuse(TypeError, "source", "a path, a Keras model or a GraphDef", source)
    name = _name(source)
    if name is not None and any(os.path.exists(os.path.join(name, f"saved_model.{end}")) for end in ("pb", "pbtxt")):
        return open_saved_model(Path(name), wishes, tags)
    prefix = None if name is None else prefix_of(name)
    if name is not None and prefix is None and not os.path.isfile(name):
        refuse(FileNotFoundError, "source", f"one that exists: {KINDS_OF_SOURCE}", name)
    if tags is not None:
        refuse(ValueError, "tags", "left out for a source that is no SavedModel", tags)
    if name is None:
        return of_graph_def(source, wishes, source.ByteSize())
    return open_frozen(Path(name), wishes) if prefix is None else open_checkpoint(prefix, wishes)


def _wishes(inputs: Any, outputs: Any, values: Any) -> Wishes:
    """Checked, inputs as a dict from names to shapes."""
    for argument, names in {"inputs": inputs, "outputs": outputs, "values": values}.items():
        if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
            refuse(TypeError, argument, "a dict by name" if argument == "values" else "lists of names", names)
        for name in names or ():
            if not re.fullmatch(r"[^:]+(:\d+)?", name):
                refuse(ValueError, argument, "names of tensors, such as 'x' or 'x:0'", name)
    if outputs is not None and not outputs:
        refuse(ValueError, "outputs", "at least one name, or None", outputs)
    if inputs is not None and not isinstance(inputs, Mapping):
        inputs = dict.fromkeys(inputs)
    if inputs is not None:
        inputs = {name: None if shape is None else _shape(name, shape) for name, shape in inputs.items()}
    return Wishes(inputs, outputs, dict(values or {}))


def _shape(name: str, shape: Any) -> tuple[int | None, ...]:
    if isinstance(shape, str) or not all(size is None or isinstance(size, (int, np.integer)) for size in shape):
        refuse(TypeError, f"inputs[{name!r}]", "None or a sequence of sizes, None where they may vary", shape)
    return tuple(shape)


def _refuse_ends(wishes: Wishes, tags: Sequence[str] | None) -> None:
    """Raises a `ValueError` for what only graphs have to be told."""
    given = {"inputs": wishes.inputs, "outputs": wishes.outputs, "values": wishes.values or None, "tags": tags}
    for name, value in given.items():
        if value is not None:
            refuse(
                ValueError, name, "left out for a Keras model, which says itself what its inputs and outputs are", value
            )


def _name(source: Any) -> str | None:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else None


def _report(source: Any, destination: str | None, opened: Source, outcome: Outcome) -> Report:
    return Report(
        _name(source),
        destination,
        opened.kind,
        [entry for entry in outcome.entries if isinstance(entry, Folded)],
        [entry for entry in outcome.entries if isinstance(entry, Kept)],
        outcome.removed,
        (len(outcome.before.nodes), len(outcome.frozen.graph.nodes)),
        bound={name: value.tolist() for name, value in opened.bound.items()},
    )


def _fold_graph(source: Any, opened: Source, options: _Options) -> tuple[Any, Report]:
    kind = options.kind_to_write(opened.kind)
    if options.path is not None and _name(source):
        refuse_source(options.path, _name(source), opened.files)
    _LOG.info("folding %d nodes", len(opened.frozen.graph.nodes))
    outcome = fold_graph(opened.frozen)
    report = _report(source, options.path, opened, outcome)
    if options.verify is not False:
        _LOG.info("running the original and the folded model")
        _verify(opened, outcome, report, options)
    if options.path is None:
        report.result = "GraphDef"
        return outcome.frozen.graph.graph_def(), report
    _LOG.info("writing %s", options.path)
    size = writers.write_graph(
        outcome.frozen, options.path, kind, opened.meta,
        freeze=options.freeze, overwrite=options.overwrite,
    )  # fmt: skip
    report.bytes, report.result = (opened.bytes, size), kind
    return options.path, report


def _verify(opened: Source, outcome: Outcome, report: Report, options: _Options) -> None:
    frozen, before = outcome.frozen, outcome.before
    foreign = sorted({node.op for node in before.nodes.values() if op_def(node.op) is None})
    if foreign:
        accepted = "False for a model with ops that TensorFlow does not know, or their library be loaded first"
        refuse(ValueError, "verify", accepted, f"{options.verify!r}, and ops {', '.join(foreign)}")
    models = verifying.Models(
        Runnable(opened.start(), {f"{name}:0": value for name, value in opened.bound.items()}),
        Runnable(session_of(before.graph_def(with_values=False), as_written=True), before.feeds(set(before.nodes))),
        Runnable(session_of(frozen.graph.graph_def())),
        [canonical(name) for name in frozen.inputs], outcome.results, outcome.sites,
    )  # fmt: skip
    given = options.given and {canonical(name): np.asarray(value) for name, value in options.given.items()}
    try:
        dropped = bool(outcome.removed["dropouts"])
        _judge(report, verifying.compare(models, tolerance=options.tolerance, given=given, dropped=dropped))
        report.milliseconds = verifying.milliseconds(models)
    finally:
        models.close()


def _judge(report: Report, comparison: Comparison) -> None:
    report.verification = comparison
    if comparison.verdict == "failed":
        raise VerificationError(f"the folded model differs from the original, so nothing was written.\n{report}")


def _fold_keras(source: Any, model: keras.Model, options: _Options) -> tuple[Any, Report]:
    kind = options.kind_to_write("keras")
    if options.path is not None and _name(source):
        refuse_source(options.path, _name(source), [_name(source)])
    _LOG.info("folding %s", model.name)
    outcome = keras_models.fold_model(model)
    report = _keras_report(source, options.path, outcome)
    if options.verify is not False:
        _LOG.info("running the original and the folded model")
        models = KerasModels(outcome)
        _judge(report, verifying.compare(models, tolerance=options.tolerance, given=options.given))
        report.milliseconds = verifying.milliseconds(models)
    if options.path is None:
        report.result = "Keras model"
        return outcome.model, report
    _LOG.info("writing %s", options.path)
    size = keras_models.write(outcome, options.path, kind, freeze=options.freeze, overwrite=options.overwrite)
    report.result = kind
    report.bytes = (os.path.getsize(source) if _name(source) else 4 * model.count_params(), size)
    return options.path, report


def _keras_report(source: Any, destination: str | None, outcome: keras_models.Outcome) -> Report:
    return Report(
        _name(source),
        destination,
        "keras",
        [entry for entry in outcome.entries if isinstance(entry, Folded)],
        [entry for entry in outcome.entries if isinstance(entry, Kept)],
        outcome.removed,
    )
