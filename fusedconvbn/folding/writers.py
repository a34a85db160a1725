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


def check_kind(to: str | None, kinds: tuple[str, ...] = KINDS) -> None:
    """Raises a `ValueError` for what is no kind."""
    if to is not None and to not in kinds:
        refuse(ValueError, "to", f"one of {', '.join(kinds)} for this source", to)


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
