"""Writes a folded graph as whatever is asked for."""

from __future__ import annotations

import os
from pathlib import Path

from fusedconvbn._arguments import refuse
from fusedconvbn.folding.checkpoint import write_checkpoint
from fusedconvbn.folding.frozen import write_frozen
from fusedconvbn.folding.saved_model import write_saved_model
from fusedconvbn.folding.sources import MetaGraphDef, size_of, whole
from fusedconvbn.folding.writing import Frozen

GRAPHS = ("saved_model", "frozen", "checkpoint")
KINDS = (*GRAPHS, "keras")
_NAMES = {"saved_model": "SavedModel", "frozen": "frozen graph", "checkpoint": "checkpoint", "keras": "Keras model"}
SUFFIXES = {"frozen": (".pb", ".pbtxt"), "keras": (".keras", ".h5", ".hdf5")}
"""Of files; folders and the prefixes of checkpoints end as they like, but with none of these."""


def kind_to_write(destination: str, to: str | None, source_kind: str, *, freeze: bool = False) -> str:
    """Of which kind the result is: `to`, or what the suffix of `destination` says, or the source's.

    Raises:
        ValueError: The source cannot become that, the suffix is another kind's, or `freeze` has no effect on it.
    """
    possible = KINDS if source_kind == "keras" else GRAPHS
    if to is not None and to not in possible:
        refuse(ValueError, "to", f"one of {', '.join(possible)} for this source", to)
    meant = next((kind for kind, suffixes in SUFFIXES.items() if destination.endswith(suffixes)), None)
    kind = to or (meant if meant in possible else source_kind)
    if meant is None and kind in SUFFIXES:
        accepted = f"a path that ends with {' or '.join(SUFFIXES[kind])} for a {_NAMES[kind]}, or `to` another kind"
        refuse(ValueError, "destination", accepted, destination)
    if meant not in (None, kind):
        accepted = f"a path without the suffix of a {_NAMES[meant]}, as the result is a {_NAMES[kind]}"
        refuse(ValueError, "destination", accepted, destination)
    if freeze and kind in ("keras", "checkpoint"):
        refuse(ValueError, "freeze", f"left out for a {_NAMES[kind]}, which always has variables", freeze)
    return kind


def write_graph(
    frozen: Frozen, destination: str, kind: str, meta: MetaGraphDef, *, freeze: bool, overwrite: bool
) -> int:
    """Writes a graph to where nothing is, or to what may be overwritten; the bytes of its files.

    Args:
        kind: One of `GRAPHS`.
        meta: Signatures, tags and collections of the source.
        freeze: Whether variables stay constants.
    """
    if freeze:
        frozen.variables = {}
    with whole(destination, overwrite=overwrite, is_prefix=kind == "checkpoint") as made:
        if kind == "frozen":
            write_frozen(frozen, Path(made))
        elif kind == "saved_model":
            write_saved_model(frozen, Path(made), meta)
        else:
            write_checkpoint(frozen, made, meta)
        return size_of(Path(os.path.dirname(made)))
