"""`fold` and `inspect`: the functions that users call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from fusedconvbn._arguments import refuse
from fusedconvbn.folding import keras_models, verifying, writers
from fusedconvbn.folding.checkpoint import open_checkpoint, prefix_of
from fusedconvbn.folding.frozen import of_graph_def, open_frozen
from fusedconvbn.folding.keras_verifying import KerasModels
from fusedconvbn.folding.nodes import GraphDef, canonical
from fusedconvbn.folding.pipeline import Outcome, fold_graph
from fusedconvbn.folding.planning import Folded, Kept
from fusedconvbn.folding.report import Report
from fusedconvbn.folding.saved_model import open_saved_model
from fusedconvbn.folding.sources import Source, Wishes, refuse_existing, session_of
from fusedconvbn.folding.verifying import Comparison, Runnable, VerificationError


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
        destination: Where to write the result, of the source's kind: a path, for checkpoints a prefix; missing folders
            are made. None: it is returned only.
        inputs: For graphs, names of the tensors that are fed, with their shapes or None; tensors that are not
            placeholders become some. None: the signatures' or all placeholders.
        outputs: For graphs, names of the tensors to compute. None: the signatures', or what nothing reads.
        values: For graphs, values of placeholders that the folded model has no more. Those that by their names tell
            training from inference, or what dropout keeps, need none.
        tags: Of the SavedModel's graph; None: those of serving, or of the only one.
        to: "saved_model", "frozen", "checkpoint" or "keras" (for Keras sources), to write another kind than the
            source's.
        freeze: Writes constants for variables.
        verify: Whether to run the original and the result on the same random inputs, or on these (by name of the
            tensor, or of the Keras model's input), and to compare all outputs and every place where something was
            folded.
        tolerance: Of the differences, relative to each tensor's maximum; None: 1e-4, for 16-bit types 1e-2 (float16)
            and 8e-2 (bfloat16). Where rounding of the inputs alone makes larger differences, three times those.
        overwrite: Whether the destination may exist.

    Returns: (result, report). The result is the destination's path; without a destination, a Keras model for Keras
        sources and a GraphDef for all others.

    Raises:
        FileNotFoundError, FileExistsError: There is no source, or already a destination.
        TypeError, ValueError: An argument is of the wrong kind, the source damaged, or what to fold cannot be told.
        VerificationError: The result does not compute what the original computes; nothing has been written.

    Example:
        >>> result, report = fusedconvbn.fold("saved_model", "folded")
        >>> print(report)
    """
    path = None if destination is None else os.fspath(destination)
    if path is not None:
        refuse_existing(path, overwrite)
    wishes = _wishes(inputs, outputs, values)
    model = keras_models.load(source)
    if model is not None:
        return _fold_keras(source, model, path, wishes, to, freeze, verify, tolerance, overwrite)
    opened = open_source(source, wishes, tags)
    writers.check_kind(to, writers.GRAPHS)
    outcome = fold_graph(opened.frozen)
    report = _report(source, path, opened, outcome)
    if verify is not False:
        _verify(opened, outcome, report, None if verify is True else verify, tolerance)
    if path is None:
        return outcome.frozen.graph.graph_def(), report
    size = writers.write_graph(outcome.frozen, path, to or opened.kind, opened.meta, freeze=freeze, overwrite=overwrite)
    report.bytes = (opened.bytes, size)
    return path, report


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
        return _keras_report(source, None, keras_models.fold_model(model))
    opened = open_source(source, wishes, tags)
    return _report(source, None, opened, fold_graph(opened.frozen))


def open_source(source: Any, wishes: Wishes, tags: Sequence[str] | None = None) -> Source:
    """Reads a graph, whatever it was saved as."""
    if isinstance(source, GraphDef):
        return of_graph_def(source, wishes, source.ByteSize(), "a GraphDef")
    if not isinstance(source, (str, os.PathLike)):
        refuse(TypeError, "source", "a path, a Keras model or a GraphDef", source)
    name = os.fspath(source)
    path = Path(name)
    if any((path / file).exists() for file in ("saved_model.pb", "saved_model.pbtxt")):
        return open_saved_model(path, wishes, tags)
    if (prefix := prefix_of(name)) is not None:
        return open_checkpoint(prefix, wishes)
    if not path.is_file():
        accepted = "a model's file, a SavedModel's folder, or the prefix of a checkpoint with its .meta"
        refuse(FileNotFoundError, "source", accepted, name)
    return open_frozen(path, wishes)


def _wishes(inputs: Any, outputs: Any, values: Any) -> Wishes:
    if isinstance(inputs, str) or isinstance(outputs, str):
        refuse(TypeError, "inputs and outputs", "lists of names", inputs if isinstance(inputs, str) else outputs)
    if inputs is not None and not isinstance(inputs, Mapping):
        inputs = dict.fromkeys(inputs)
    shapes = None if inputs is None else {n: None if s is None else tuple(s) for n, s in inputs.items()}
    return Wishes(shapes, outputs, dict(values or {}))


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
    )


def _verify(
    opened: Source, outcome: Outcome, report: Report, given: Mapping[str, np.ndarray] | None, tolerance: float | None
) -> None:
    frozen, before = outcome.frozen, outcome.before
    models = verifying.Models(
        Runnable(opened.start(), {f"{name}:0": value for name, value in opened.bound.items()}),
        Runnable(session_of(before.graph_def(with_values=False), as_written=True), before.feeds(set(before.nodes))),
        Runnable(session_of(frozen.graph.graph_def())),
        [canonical(name) for name in frozen.inputs], frozen.results, outcome.sites,
    )  # fmt: skip
    if given is not None:
        given = {canonical(name): np.asarray(value) for name, value in given.items()}
    try:
        _judge(report, verifying.compare(models, tolerance=tolerance, given=given))
        report.milliseconds = verifying.milliseconds(models)
    finally:
        models.close()


def _judge(report: Report, comparison: Comparison) -> None:
    report.verification = comparison
    if comparison.verdict == "failed":
        raise VerificationError(f"the folded model differs from the original, so nothing was written.\n{report}")


def _fold_keras(
    source: Any, model: keras.Model, path: str | None, wishes: Wishes, to: str | None, freeze: bool,
    verify: bool | Mapping[str, np.ndarray], tolerance: float | None, overwrite: bool,
) -> tuple[Any, Report]:  # fmt: skip
    writers.check_kind(to)
    if wishes != Wishes():
        refuse(ValueError, "inputs, outputs and values", "left out for a Keras model, which says them itself", wishes)
    outcome = keras_models.fold_model(model)
    report = _keras_report(source, path, outcome)
    if verify is not False:
        given = None if verify is True else verify
        models = KerasModels(outcome)
        _judge(report, verifying.compare(models, tolerance=tolerance, given=given))
        report.milliseconds = verifying.milliseconds(models)
    if path is None:
        return outcome.model, report
    size = keras_models.write(outcome, path, to, freeze=freeze, overwrite=overwrite)
    report.bytes = (os.path.getsize(source) if _name(source) else 4 * model.count_params(), size)
    return path, report


def _keras_report(source: Any, destination: str | None, outcome: keras_models.Outcome) -> Report:
    return Report(
        _name(source),
        destination,
        "keras",
        [entry for entry in outcome.entries if isinstance(entry, Folded)],
        [entry for entry in outcome.entries if isinstance(entry, Kept)],
        outcome.removed,
    )
