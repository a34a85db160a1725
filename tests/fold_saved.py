"""SavedModels for the tests of folding; FOLD_SAVED_MODELS makes them by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from fold_files import ModelFile, confirm, random_image, run_saved_model, run_session_saved_model
from fold_nets import Net, Store, reference_variable, resource_variable, session_of
from fold_norms import FOLD_NORMS
from fold_training import CHOICES, trained
from tensorflow.core.protobuf import saved_model_pb2

v1 = tf.compat.v1

Make = Callable[[Path], ModelFile]


def as_signature(facts: ModelFile, path: Path, tags: Sequence[str], signature: str) -> ModelFile:
    """The facts by names of a signature: images to scores."""
    return dataclasses.replace(
        facts,
        path=str(path),
        kind="saved_model",
        inputs={"images": facts.inputs["input:0"]},
        outputs=["scores"],
        images={"images": facts.images["input:0"]},
        expected={"scores": facts.expected["output:0"]},
        constants={},
        tags=tuple(tags),
        signature=signature,
    )


def predict_signature(session: Any) -> Any:
    """Of the tensors `input` and `output`."""
    tensor = session.graph.get_tensor_by_name
    build = v1.saved_model.build_signature_def
    info = v1.saved_model.build_tensor_info
    inputs, outputs = {"images": info(tensor("input:0"))}, {"scores": info(tensor("output:0"))}
    return build(inputs, outputs, v1.saved_model.signature_constants.PREDICT_METHOD_NAME)


def confirm_session(file: ModelFile) -> ModelFile:
    return confirm(run_session_saved_model(file.path, file.tags, file.signature, file.outputs), file)


def built(store: Store, tags: Sequence[str] = ("serve",), signature: str = "serving_default") -> Make:
    """What tf.compat.v1.saved_model.Builder writes of an inference graph."""

    def make(folder: Path) -> ModelFile:
        path = folder / "saved"
        with session_of(FOLD_NORMS["norm_fused"], store) as (session, facts):
            builder = v1.saved_model.Builder(str(path))
            builder.add_meta_graph_and_variables(session, list(tags), {signature: predict_signature(session)})
            builder.save()
            return confirm_session(as_signature(facts, path, tags, signature))

    return make


def simple_save(folder: Path) -> ModelFile:
    path = folder / "saved"
    with session_of(FOLD_NORMS["norm_standard"], resource_variable) as (session, facts):
        tensor = session.graph.get_tensor_by_name
        v1.saved_model.simple_save(session, str(path), {"images": tensor("input:0")}, {"scores": tensor("output:0")})
        return confirm_session(as_signature(facts, path, ["serve"], "serving_default"))


def training_graph(choice: str) -> Make:
    """Two graphs of the same variables, for training and for serving; is_training is false where it is not fed."""

    def make(folder: Path) -> ModelFile:
        path = folder / "saved"
        with trained(dataclasses.replace(CHOICES[choice], default=True, keep_prob_default=True)) as (session, facts):
            builder = v1.saved_model.Builder(str(path))
            builder.add_meta_graph_and_variables(session, ["train"])
            builder.add_meta_graph(["serve"], {"serving_default": predict_signature(session)})
            builder.save()
            return confirm_session(as_signature(facts, path, ["serve"], "serving_default"))

    return make


def eager_variable(name: str, value: np.ndarray) -> tf.Variable:
    return tf.Variable(value, name=name)


class TwoSignatures(tf.Module):
    """Functions in functions: both signatures call one stem, which calls one block twice."""

    def __init__(self) -> None:
        super().__init__()
        net = Net(eager_variable)
        self.kernels = [net.kernel(3, 3, 4, 6), net.kernel(3, 3, 6, 6)]
        self.statistics = [tuple(net.statistics(6)), tuple(net.statistics(6))]
        self.dense = net.kernel(6, 5)
        self.last = tuple(net.statistics(5))

    @tf.function
    def block(self, x: Any, kernel: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> Any:
        z = tf.nn.conv2d(x, kernel, 1, "SAME")
        return tf.nn.relu(v1.nn.fused_batch_norm(z, gamma, beta, mean, variance, 1e-3, is_training=False)[0])

    @tf.function
    def stem(self, x: Any) -> Any:
        for kernel, statistics in zip(self.kernels, self.statistics):
            x = self.block(x, kernel, *statistics)
        return x

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 4], tf.float32, "images")])
    def features(self, images: Any) -> dict[str, Any]:
        return {"features": self.stem(images)}

    @tf.function(input_signature=[tf.TensorSpec([None, 9, 8, 4], tf.float32, "images")])
    def classify(self, images: Any) -> dict[str, Any]:
        gamma, beta, mean, variance = self.last
        pooled = tf.reduce_mean(self.stem(images), [1, 2])
        scores = tf.nn.batch_normalization(tf.matmul(pooled, self.dense), mean, variance, beta, gamma, 1e-3)
        return {"scores": scores, "best": tf.reduce_max(scores, 1)}


def two_signatures(folder: Path) -> ModelFile:
    """One file of two signatures: `classify`, and among `others` `features`."""
    module, path = TwoSignatures(), str(folder / "saved")
    tf.saved_model.save(module, path, {"classify": module.classify, "features": module.features})
    features = signature_file(path, module.features, "features", (None, None, None, 4), 2)
    classify = signature_file(path, module.classify, "classify", (None, 9, 8, 4), 3)
    return dataclasses.replace(classify, others=(features,))


def signature_file(path: str, function: Any, signature: str, shape: tuple[int | None, ...], norms: int) -> ModelFile:
    """A signature of one input, `images`, all of whose batch norms fold."""
    image = random_image([2, 9, 8, 4])
    expected = {name: value.numpy() for name, value in function(tf.constant(image)).items()}
    inputs, images = {"images": shape}, {"images": image}
    facts = ModelFile(path, "saved_model", inputs, list(expected), images, expected, norms, norms, signature=signature)
    return confirm(run_saved_model(path, signature), facts)


def keras_export(folder: Path) -> ModelFile:
    """What Model.export writes of a little model of Keras 3."""
    keras.utils.set_random_seed(3)
    x = inputs = keras.Input((9, 8, 4), name="images")
    for filters in (6, 5):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=filters == 5)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    model = keras.Model(inputs, x)
    net = Net(lambda name, value: value)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights(net.statistics(layer.gamma.shape[0]))
    path, image = str(folder / "saved"), random_image([2, 9, 8, 4])
    model.export(path, verbose=False)
    expected = {"output_0": model(image, training=False).numpy()}
    inputs = {"images": (None, 9, 8, 4)}
    file = ModelFile(path, "saved_model", inputs, ["output_0"], {"images": image}, expected, 2, 2)
    return confirm(run_saved_model(path), file)


def refused(folder: Path) -> ModelFile:
    """A SavedModel whose objects today's TensorFlow cannot build: an optimizer with slots, of an older Keras."""
    file = two_signatures(folder)
    path = Path(file.path) / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    add_optimizer(saved.meta_graphs[0].object_graph_def)
    path.write_bytes(saved.SerializeToString())
    with pytest.raises((AttributeError, AssertionError), match=r"add_slot|momentum"):  # the latter with tf_keras
        tf.saved_model.load(file.path)
    for one in (file, *file.others):
        confirm_session(one)
    return file


def add_optimizer(objects: Any) -> None:
    """An optimizer with a momentum of the first variable among the root's objects."""
    variable = next(i for i, node in enumerate(objects.nodes) if node.WhichOneof("kind") == "variable")
    slot, optimizer = len(objects.nodes), len(objects.nodes) + 1
    objects.nodes.add().CopyFrom(objects.nodes[variable])
    added = objects.nodes.add()
    added.user_object.identifier = "optimizer"
    added.user_object.version.producer = added.user_object.version.min_consumer = 1
    slots = {"original_variable_node_id": variable, "slot_name": "momentum", "slot_variable_node_id": slot}
    added.slot_variables.add(**slots)
    objects.nodes[0].children.add(node_id=optimizer, local_name="optimizer")


FOLD_SAVED_MODELS: dict[str, Make] = {
    "saved_reference_variables": built(reference_variable),
    "saved_resource_variables": built(resource_variable),
    "saved_tags": built(reference_variable, ["serve", "tpu"], "predict"),
    "saved_own_tag": built(resource_variable, ["mine"], "images_to_scores"),
    "saved_simple": simple_save,
    "saved_training_switch": training_graph("switch"),
    "saved_training_if": training_graph("if"),
    "saved_two_signatures": two_signatures,
    "saved_keras_export": keras_export,
    "saved_refused": refused,
}
