"""Checkpoints and .meta files of TensorFlow 1 for the tests of folding; FOLD_CHECKPOINTS makes them by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from fold_files import (
    ModelFile,
    confirm,
    damage_meta,
    frozen_graph,
    run_checkpoint,
    write_checkpoint,
    write_frozen,
)
from fold_nets import Store, partitioned_variable, reference_variable, resource_variable, session_of
from fold_norms import FOLD_NORMS
from fold_training import CHOICES, GRADIENTS, TAGGER, Choice, bad_count, bad_shapes, bad_sizes, damage_nodes, trained

v1 = tf.compat.v1

Make = Callable[[Path], ModelFile]


def variables(store: Store, norm: str = "norm_fused") -> Make:
    """An inference graph with its weights in variables of this kind."""

    def make(folder: Path) -> ModelFile:
        with session_of(FOLD_NORMS[norm], store) as (session, facts):
            return write_checkpoint(session, folder / "model.ckpt", facts)

    return make


def old_format(folder: Path) -> ModelFile:
    """A checkpoint of version 1: one file of tensors, without an index."""
    with session_of(FOLD_NORMS["norm_fused"], reference_variable) as (session, facts):
        file = write_checkpoint(session, folder / "model.ckpt", facts, write_version=v1.train.SaverDef.V1)
    assert (folder / "model.ckpt").exists()
    return file


def training(choice: Choice, damage: Callable[[Any], None] | None = None, **arguments: Any) -> Make:
    """A training graph; after damage, one whose .meta TensorFlow refuses to import."""

    def make(folder: Path) -> ModelFile:
        with trained(choice, **arguments) as (session, facts):
            file = write_checkpoint(session, folder / "model.ckpt-2", facts, damage)
        if damage:
            assert_refused(f"{file.path}.meta")
        return file

    return make


def assert_refused(meta: str) -> None:
    """Today's TensorFlow does not import this file."""
    with tf.Graph().as_default(), pytest.raises(ValueError, match="_output_shapes"):
        v1.train.import_meta_graph(meta)


def elsewhere(folder: Path) -> ModelFile:
    """A folder whose state file names a path of another machine."""
    with session_of(FOLD_NORMS["norm_standard"], reference_variable) as (session, facts):
        file = write_checkpoint(session, folder / "model.ckpt-7", facts)
    write_state(folder, "/nonexistent/elsewhere/model.ckpt-7")
    return dataclasses.replace(file, path=str(folder))


def write_state(folder: Path, path: str) -> None:
    """The file that names the latest checkpoint."""
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\nall_model_checkpoint_paths: "{path}"\n')


def without_name(folder: Path) -> ModelFile:
    """A prefix whose last part is empty: .meta, .index and .data-00000-of-00001 in a folder."""
    with session_of(FOLD_NORMS["norm_fused"], reference_variable) as (session, facts):
        return drop_name(write_checkpoint(session, folder / "saved", facts), folder)


def drop_name(file: ModelFile, folder: Path) -> ModelFile:
    """The same checkpoint with an empty name, and with a state file of another machine."""
    for path in folder.glob("saved.*"):
        path.rename(folder / path.name.removeprefix("saved"))
    write_state(folder, "/nonexistent/experiments/17/")
    prefix = f"{folder}/"
    return confirm(run_checkpoint(prefix, file.outputs), dataclasses.replace(file, path=prefix))


def as_musicnn(folder: Path) -> ModelFile:
    """All that the checkpoints of the package musicnn have: a training graph, bad shapes, no name, another's state."""
    with trained(CHOICES["switch_read_inside"], TAGGER, momentum=False) as (session, facts):
        file = drop_name(write_checkpoint(session, folder / "saved", facts), folder)
    damage_meta(folder / ".meta", damage_nodes(GRADIENTS, bad_shapes))
    assert_refused(f"{file.path}.meta")
    return file


def other_devices(folder: Path) -> ModelFile:
    """A graph whose nodes are on devices that are not here."""
    with session_of(FOLD_NORMS["norm_fused"], reference_variable) as (session, facts):
        file = write_checkpoint(session, folder / "model.ckpt", facts)

    def place(meta: Any) -> None:
        for node in meta.graph_def.node:
            node.device = "/job:worker/replica:0/task:3/device:GPU:5"

    damage_meta(folder / "model.ckpt.meta", place)
    return file


def frozen_training(name: str) -> Make:
    """A training graph's inference with its variables as constants; is_training is still fed."""

    def make(folder: Path) -> ModelFile:
        with trained(CHOICES[name]) as (session, facts):
            return write_frozen(folder, frozen_graph(session, facts.outputs), facts)

    return make


FOLD_CHECKPOINTS: dict[str, Make] = {
    "reference_variables": variables(reference_variable),
    "resource_variables": variables(resource_variable),
    "reference_variables_standard": variables(reference_variable, "norm_standard"),
    "resource_variables_standard": variables(resource_variable, "norm_standard"),
    "partitioned_variables": variables(partitioned_variable),
    "old_format": old_format,
    "elsewhere": elsewhere,
    "without_name": without_name,
    "other_devices": other_devices,
    **{f"training_{name}": training(choice) for name, choice in CHOICES.items()},
    "training_adam": training(CHOICES["switch"], momentum=False),
    "training_tagger": training(CHOICES["switch"], little=TAGGER),
    "refused_count": training(CHOICES["switch"], damage_nodes(GRADIENTS, bad_count)),
    "refused_shapes": training(CHOICES["switch"], damage_nodes(GRADIENTS, bad_shapes)),
    "refused_sizes": training(CHOICES["switch"], damage_nodes(("Conv2D",), bad_sizes)),
    "as_musicnn": as_musicnn,
}

FOLD_FROZEN_TRAINING: dict[str, Make] = {
    f"frozen_training_{name}": frozen_training(name) for name in ("switch", "switch_resource", "stateless_if", "if")
}
