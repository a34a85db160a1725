"""Frozen graphs, and all other sources, for the tests of folding; FOLD_SOURCES makes every one by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf
from fold_convolutions import FOLD_CONVOLUTIONS
from fold_files import ModelFile, frozen_graph, write_frozen
from fold_nets import Little, constant, reference_variable, resource_variable, session_of
from fold_norms import FOLD_NORMS
from fold_places import FOLD_PLACES
from fold_saved import FOLD_SAVED_MODELS
from fold_tf1 import FOLD_CHECKPOINTS, FOLD_FROZEN_TRAINING

v1 = tf.compat.v1

Make = Callable[[Path], ModelFile]

FOLD_GRAPHS: dict[str, Little] = {**FOLD_NORMS, **FOLD_CONVOLUTIONS, **FOLD_PLACES}


def frozen(
    little: Little, store: Any = constant, text: bool = False, edit: Callable[[Any], None] | None = None
) -> Make:
    """The little graph's GraphDef in a file, after `edit`, which must not change its outputs."""

    def make(folder: Path) -> ModelFile:
        with session_of(little, store) as (session, facts):
            graph_def = frozen_graph(session, facts.outputs)
        if edit:
            edit(graph_def)
        return write_frozen(folder, graph_def, facts, text)

    return make


def old_names(graph_def: Any) -> None:
    """Add for AddV2 and no versions, as early TensorFlow wrote."""
    for node in graph_def.node:
        node.op = {"AddV2": "Add"}.get(node.op, node.op)
    graph_def.versions.producer = 21


def raw_global_normalization(graph_def: Any) -> None:
    """BatchNormWithGlobalNormalization for FusedBatchNorm, which is the same operation by another name."""
    chosen = [node for node in graph_def.node if node.op == "FusedBatchNorm"]
    assert chosen
    for node in chosen:
        x, gamma, beta, mean, variance = node.input
        epsilon = node.attr["epsilon"].f
        node.op = "BatchNormWithGlobalNormalization"
        node.ClearField("input")
        node.input.extend([x, mean, variance, beta, gamma])
        for name in set(node.attr) - {"T"}:
            del node.attr[name]
        node.attr["variance_epsilon"].f = epsilon
        node.attr["scale_after_normalization"].b = True
    graph_def.versions.producer = 8  # the last one that may have it


def numbered(graph_def: Any) -> None:
    """Nodes named by numbers, but for input and output, and read before they are defined."""
    kept = ("input", "output")
    names = {node.name: node.name if node.name in kept else str(i) for i, node in enumerate(graph_def.node)}
    nodes = [type(node).FromString(node.SerializeToString()) for node in reversed(graph_def.node)]
    for node in nodes:
        node.name = names[node.name]
        inputs = [names[name] for name in node.input]
        node.ClearField("input")
        node.input.extend(inputs)
    graph_def.ClearField("node")
    graph_def.node.extend(nodes)


FOLD_FROZEN: dict[str, Make] = {
    **{name: frozen(little) for name, little in FOLD_GRAPHS.items()},
    "frozen_reference_variables": frozen(FOLD_NORMS["norm_fused"], reference_variable),
    "frozen_resource_variables": frozen(FOLD_NORMS["norm_standard"], resource_variable),
    "frozen_text": frozen(FOLD_NORMS["norm_fused"], text=True),
    "frozen_text_standard": frozen(FOLD_NORMS["norm_standard"], resource_variable, text=True),
    "frozen_text_separable": frozen(FOLD_CONVOLUTIONS["separable"], text=True),
    "frozen_old_names": frozen(FOLD_NORMS["norm_standard"], edit=old_names),
    "frozen_raw_global_normalization": frozen(FOLD_NORMS["norm_fused_v1"], edit=raw_global_normalization),
    "frozen_numbered": frozen(FOLD_NORMS["norm_fused"], edit=numbered),
    **FOLD_FROZEN_TRAINING,
}

FOLD_SOURCES: dict[str, Make] = {
    **FOLD_FROZEN,
    **{f"checkpoint_{name}": make for name, make in FOLD_CHECKPOINTS.items()},
    **FOLD_SAVED_MODELS,
}
