"""`fold` on sources of every kind: the same outputs by the same names, each batch norm told of, those gone that can."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from fold_files import (
    ModelFile,
    distance,
    read_graph,
    run_checkpoint,
    run_graph,
    run_session_saved_model,
)
from fold_frozen import FOLD_SOURCES

import fusedconvbn
from fusedconvbn.folding.checkpoint import read_meta
from fusedconvbn.folding.saved_model import read_meta_graph

TRAINING = {"Switch", "Merge", "If", "StatelessIf", "RandomUniform", "Identity", "StopGradient", "CheckNumerics"}


def run_folded(file: ModelFile, path: str):
    """The outputs of a folded file, loaded as the source would be; what only training feeds is no input any more."""
    if file.kind == "frozen":
        return run_graph(read_graph(path), file.outputs)(file.images)
    if file.kind == "checkpoint":
        return run_checkpoint(path, file.outputs)(file.images)
    return run_session_saved_model(path, file.tags, file.signature, file.outputs)(file.images)


def graph_of(file: ModelFile, path: str):
    """The folded GraphDef."""
    if file.kind == "frozen":
        return read_graph(path)
    return (
        read_meta(path + ".meta") if file.kind == "checkpoint" else read_meta_graph(Path(path), file.tags)
    ).graph_def


def ends(file: ModelFile) -> dict:
    """What a user has to say of a graph without signatures."""
    return {"tags": file.tags} if file.kind == "saved_model" else {"inputs": file.inputs, "outputs": file.outputs}


@pytest.mark.parametrize("name", FOLD_SOURCES)
def test_source(name, tmp_path):
    file = FOLD_SOURCES[name](tmp_path)
    suffix = ".pbtxt" if str(file.path).endswith(".pbtxt") else ".pb" if file.kind == "frozen" else ""
    path, report = fusedconvbn.fold(file.path, tmp_path / "new" / f"folded{suffix}", **ends(file))
    assert path == str(tmp_path / "new" / f"folded{suffix}")
    for each in (file, *file.others):
        for output, values in run_folded(each, path).items():
            assert distance(values, each.expected[output]) < 1e-4, output
    assert (len(report.folded), len(report.kept)) == (file.foldable, file.batch_norms - file.foldable), str(report)
    assert all(entry.into for entry in report.folded)
    assert all(entry.reason for entry in report.kept)
    assert report.verification.verdict == "ok"
    kinds = Counter(node.op for node in graph_of(file, path).node)
    assert not kinds.keys() & (TRAINING - ({"Identity"} if file.kind != "frozen" else set()))
    json.dumps(report.to_dict())
