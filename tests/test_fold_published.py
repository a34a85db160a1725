"""`fold` on models that others have published, and those of Keras 2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from fold_files import distance, run_checkpoint

import fusedconvbn
from fusedconvbn.folding.checkpoint import read_meta
from fusedconvbn.folding.nodes import strip

v1 = tf.compat.v1

# How many of the batch norms fold: that of the input into the convolutions that read it, by padding them with what it
# maps to zero; those before dense layers. The others stand between a ReLU and a maximum, their gammas of both signs, or
# before a residual sum: nothing linear is next to them. In MTT_vgg the last one's gammas are all positive.
MUSICNN = {"MTT_musicnn": (3, 8), "MSD_musicnn": (3, 8), "MTT_vgg": (2, 4), "MSD_vgg": (1, 5)}
TRAINING = {"Switch", "Merge", "RandomUniform", "ApplyAdam", "FusedBatchNormGrad", "AssignSub", "ScalarSummary"}


@pytest.fixture
def musicnn() -> Path:
    found = importlib.util.find_spec("musicnn")
    if found is None:
        pytest.skip("musicnn is not installed: pip install --no-deps -r tests/models.txt")
    return Path(found.submodule_search_locations[0])


def original(prefix: str, patches: np.ndarray) -> np.ndarray:
    """What TensorFlow computes, with the shapes that its importer refuses taken out."""
    meta = read_meta(f"{prefix}.meta")
    for node in meta.graph_def.node:
        strip(node)
    with tf.Graph().as_default(), v1.Session() as session:
        v1.train.import_meta_graph(meta).restore(session, prefix)
        return session.run("model/Sigmoid:0", {"model/Placeholder:0": patches, "model/Placeholder_2:0": False})


@pytest.mark.parametrize("name", MUSICNN)
def test_musicnn(name, musicnn, tmp_path):
    prefix = f"{musicnn / name}/"
    path, report = fusedconvbn.fold(prefix, tmp_path / name)
    assert (len(report.folded), len(report.kept)) == MUSICNN[name], str(report)
    patches = np.random.default_rng(0).normal(size=(2, 187, 96)).astype("float32")
    found = run_checkpoint(path, ["model/Sigmoid:0"])({"model/Placeholder:0": patches})["model/Sigmoid:0"]
    assert distance(found, original(prefix, patches)) < 1e-4
    kinds = {node.op for node in read_meta(f"{path}.meta").graph_def.node}
    assert not kinds & TRAINING
    assert set(v1.train.NewCheckpointReader(path).get_variable_to_shape_map()) <= {
        node.name for node in read_meta(f"{path}.meta").graph_def.node
    }


@pytest.mark.parametrize("form", ["object", "h5", "saved_model"])
def test_keras_2(form, tmp_path):
    tf_keras = pytest.importorskip("tf_keras", reason="pip install --no-deps -r tests/models.txt")
    layers = tf_keras.layers
    model = tf_keras.Sequential([
        layers.Input((8, 9, 3)), layers.Conv2D(5, 3), layers.BatchNormalization(), layers.ReLU(), layers.Flatten(),
        layers.Dense(4), layers.BatchNormalization(scale=False),
    ])  # fmt: skip
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 2, w.shape) for w in model.get_weights()])
    images = rng.normal(size=(2, 8, 9, 3)).astype("float32")
    expected = model(images, training=False).numpy()
    source = model
    if form == "h5":
        source = tmp_path / "model.h5"
        model.save(source)
    elif form == "saved_model":
        source = tmp_path / "saved"
        model.save(source, save_format="tf")
    path, report = fusedconvbn.fold(source, tmp_path / ("new.keras" if form == "h5" else "new"))
    assert len(report.folded) == 2
    if form == "h5":
        import keras

        found = keras.models.load_model(path)(images).numpy()
    else:
        signature = tf.saved_model.load(path).signatures["serving_default"]
        (name,) = signature.structured_input_signature[1]
        (found,) = (value.numpy() for value in signature(**{name: tf.constant(images)}).values())
    assert distance(found, expected) < 1e-5
