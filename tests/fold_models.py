"""Keras models for the tests of folding: applications with statistics of their own, written in every form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from fold_files import ModelFile, confirm, distance, run_in, run_saved_model, write_checkpoint, write_frozen
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

v1 = tf.compat.v1

CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv2DTranspose,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv2D,
    keras.layers.Dense,
)

# The constructor, a small size of input, and how many batch norms there are.
APPLICATIONS: dict[str, tuple[Callable[..., keras.Model], int, int]] = {
    "ResNet50": (keras.applications.ResNet50, 64, 53),
    "MobileNetV2": (keras.applications.MobileNetV2, 96, 52),
    "EfficientNetB0": (keras.applications.EfficientNetB0, 64, 49),
    "DenseNet121": (keras.applications.DenseNet121, 64, 121),
    "Xception": (keras.applications.Xception, 96, 40),
    "InceptionV3": (keras.applications.InceptionV3, 96, 94),
    "NASNetMobile": (keras.applications.NASNetMobile, 96, 192),
}


def application(name: str, seed: int = 0) -> keras.Model:
    """A calibrated model of keras.applications with random weights, without its softmax."""
    build, size, count = APPLICATIONS[name]
    keras.utils.set_random_seed(seed)
    model = build(weights=None, input_shape=(size, size, 3), classes=10)
    assert len(batch_norms(model)) == count
    return pre_softmax(calibrate(model, seed))


def batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Those of the model and of the models in it."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def producers(tensor: Any) -> Iterator[Any]:
    """The tensors whose channels are the tensor's: itself, or those that a concatenation joins."""
    layer = tensor._keras_history.operation
    if isinstance(layer, keras.layers.Concatenate):
        for joined in layer.input:
            yield from producers(joined)
    else:
        yield tensor


def consumers(model: keras.Model) -> dict[int, int]:
    """How many layers read a tensor, by its id, and 1 more for the model's outputs."""
    read = [tensor for layer in model.layers for node in layer._inbound_nodes for tensor in node.input_tensors]
    counts: dict[int, int] = {}
    for tensor in [*read, *model.outputs]:
        counts[id(tensor)] = counts.get(id(tensor), 0) + 1
    return counts


def foldable(model: keras.Model) -> int:
    """How many batch norms stand behind linear convolutions, or concatenations of these, that nothing else reads."""
    read = consumers(model)

    def folds(tensor: Any) -> bool:
        layer = tensor._keras_history.operation
        if read[id(tensor)] != 1 or not isinstance(layer, (*CONVOLUTIONS, keras.layers.Concatenate)):
            return False
        if isinstance(layer, keras.layers.Concatenate):
            return all(folds(joined) for joined in layer.input)
        return layer.activation is keras.activations.linear

    return sum(folds(layer.input) for layer in batch_norms(model))


def keras_images(model: keras.Model, batch: int, seed: int = 0) -> np.ndarray:
    """Coarse patterns of other colours in each image, with noise on them: averages over pixels differ much.

    Their values are from -1 to 1, or from 0 to 256 where the model scales them itself.
    """
    shape = (batch, *model.input_shape[1:])
    rng = np.random.default_rng([seed, 11])
    _, height, width, colours = shape
    coarse = rng.normal(size=(batch, 4, 4, colours)) + rng.uniform(-2, 2, (batch, 1, 1, colours))
    rows, columns = (np.arange(size) * 4 // size for size in (height, width))
    patterns = np.tanh(coarse[:, rows][:, :, columns] + 0.5 * rng.normal(size=shape))
    scales = any(isinstance(layer, keras.layers.Rescaling) for layer in model.layers)
    return (128 * (1 + patterns) if scales else patterns).astype("float32")


def calibrate(model: keras.Model, seed: int, batch: int = 16) -> keras.Model:
    """The model with random weights of its batch norms, and statistics about those of random images.

    Each one reads what those before it return with theirs, so that values keep their scale however deep the model is.
    Two different images must differ by more than 5 % at the output before the softmax.
    """
    rng = np.random.default_rng([seed, 13])
    norms = batch_norms(model)
    for norm in norms:
        norm.call = measuring(norm, rng)
    model(keras_images(model, batch, seed), training=False)
    for norm in norms:
        del norm.call
    first, second = (pre_softmax(model)(keras_images(model, 1, i)).numpy() for i in (101, 102))
    assert np.isfinite(first).all()
    assert distance(first, second) > 0.05, distance(first, second)
    return model


def measuring(norm: keras.layers.BatchNormalization, rng: np.random.Generator) -> Callable[..., Any]:
    """The call of a batch norm at inference, which first takes the statistics of its inputs, and moves all weights."""
    call = norm.call

    def measure(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        x = np.asarray(inputs)
        axes = tuple(range(x.ndim - 1))
        move(norm, x.mean(axes, dtype="float64"), x.var(axes, dtype="float64"), rng)
        return call(inputs, training=False)

    return measure


def move(
    norm: keras.layers.BatchNormalization, mean: np.ndarray, variance: np.ndarray, rng: np.random.Generator
) -> None:
    """Statistics about these, and other weights: by factors of 0.8 to 1.2 and shifts of a few tenths of a deviation."""
    size = mean.shape
    variance = np.maximum(variance, 0.05 * variance.mean()) * rng.uniform(0.8, 1.2, size)
    norm.moving_variance.assign(variance)
    norm.moving_mean.assign(mean + 0.2 * np.sqrt(variance) * rng.normal(size=size))
    if norm.center:
        norm.beta.assign(norm.beta.numpy() + 0.2 * rng.normal(size=size))
    if norm.scale:
        norm.gamma.assign(norm.gamma.numpy() * rng.uniform(0.8, 1.2, size))


def pre_softmax(model: keras.Model) -> keras.Model:
    """The model of the same layers that returns what its last softmax reads; itself where it ends in none."""
    last = model.layers[-1]
    if getattr(last, "activation", None) is not keras.activations.softmax:
        return model
    if isinstance(last, keras.layers.Activation):
        return keras.Model(model.input, last.input, name=model.name)
    config = {**last.get_config(), "activation": "linear", "name": "logits"}
    logits = type(last).from_config(config)
    bare = keras.Model(model.input, logits(last.input), name=model.name)
    logits.set_weights(last.get_weights())
    return bare


def facts_of_model(model: keras.Model, images: np.ndarray, count: int | None = None) -> ModelFile:
    """What a file of this model of one input and one output is to hold."""
    return ModelFile(
        path=model,
        kind="keras",
        inputs={"input": tuple(model.input_shape)},
        outputs=["output"],
        images={"input": images},
        expected={"output": model(images, training=False).numpy()},
        batch_norms=len(batch_norms(model)),
        foldable=foldable(model) if count is None else count,
    )


def run_keras(model: keras.Model) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda feeds: {"output": model(feeds["input"], training=False).numpy()}


def renamed(facts: ModelFile, source: str, result: str) -> ModelFile:
    """The same facts with other names of the input and of the output."""
    return dataclasses.replace(
        facts,
        inputs={source: facts.inputs["input"]},
        outputs=[result],
        images={source: facts.images["input"]},
        expected={result: facts.expected["output"]},
    )


def write_keras(model: keras.Model, facts: ModelFile, path: Path) -> ModelFile:
    """A .keras or a .h5 of the model, read back and run."""
    model.save(path)
    loaded = keras.models.load_model(path, compile=False)
    return confirm(run_keras(loaded), dataclasses.replace(facts, path=str(path)))


def write_export(model: keras.Model, facts: ModelFile, path: Path) -> ModelFile:
    """What Model.export writes."""
    model.export(path, verbose=False)
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    (source,), (result,) = signature.structured_input_signature[1], signature.structured_outputs
    file = dataclasses.replace(renamed(facts, source, result), path=str(path), kind="saved_model")
    return confirm(run_saved_model(file.path), file)


def frozen_model(model: keras.Model) -> Any:
    """The GraphDef of the model's inference, from `input` to `output`, with its weights as constants."""
    spec = tf.TensorSpec(model.input_shape, tf.float32, name="input")
    traced = tf.function(lambda x: tf.identity(model(x, training=False), name="output")).get_concrete_function(spec)
    graph_def = convert_variables_to_constants_v2(traced).graph.as_graph_def()
    (placeholder,) = (node for node in graph_def.node if node.op == "Placeholder")
    assert placeholder.name == "input"
    return name_output(graph_def)


def name_output(graph_def: Any) -> Any:
    """The graph with the last Identity under the name `output`."""
    if not any(node.name == "output" for node in graph_def.node):
        (last,) = (node for node in graph_def.node if node.name == "Identity")
        last.name = "output"
    return graph_def


def weights_as_variables(graph_def: Any) -> None:
    """Import a frozen graph into the default one, with variables for its arrays of float constants."""
    arrays = {}
    for node in list(graph_def.node):
        value = tf.make_ndarray(node.attr["value"].tensor) if node.op == "Const" else np.zeros(0, "int32")
        if value.dtype == np.float32 and value.size > 1:
            arrays[node.name] = value
            graph_def.node.remove(node)
    made = {name: v1.get_variable(name, initializer=value, use_resource=False) for name, value in arrays.items()}
    variables = {f"{name}:0": tf.convert_to_tensor(variable) for name, variable in made.items()}
    tf.graph_util.import_graph_def(graph_def, input_map=variables, name="")


def write_pb(model: keras.Model, facts: ModelFile, folder: Path) -> ModelFile:
    return write_frozen(folder, frozen_model(model), renamed(facts, "input:0", "output:0"))


def write_pbtxt(model: keras.Model, facts: ModelFile, folder: Path) -> ModelFile:
    return write_frozen(folder, frozen_model(model), renamed(facts, "input:0", "output:0"), text=True)


def write_model_checkpoint(model: keras.Model, facts: ModelFile, folder: Path) -> ModelFile:
    """A checkpoint and .meta of the frozen graph with its weights in variables of TensorFlow 1."""
    facts = renamed(facts, "input:0", "output:0")
    graph_def = frozen_model(model)
    with tf.Graph().as_default(), v1.Session() as session:
        weights_as_variables(graph_def)
        session.run(v1.global_variables_initializer())
        computed = run_in(session, facts.outputs, facts.feeds)
        assert distance(computed["output:0"], facts.expected["output:0"]) < 1e-4
        return write_checkpoint(session, folder / "model.ckpt", dataclasses.replace(facts, expected=computed))


# Writers of every form, of the model, what is known of it and a folder.
FORMS: dict[str, Callable[[keras.Model, ModelFile, Path], ModelFile]] = {
    "model": lambda model, facts, folder: confirm(run_keras(model), facts),
    "keras": lambda model, facts, folder: write_keras(model, facts, folder / "model.keras"),
    "h5": lambda model, facts, folder: write_keras(model, facts, folder / "model.h5"),
    "saved_model": lambda model, facts, folder: write_export(model, facts, folder / "exported"),
    "pb": write_pb,
    "pbtxt": write_pbtxt,
    "checkpoint": write_model_checkpoint,
}


def write_forms(
    model: keras.Model, folder: Path, images: np.ndarray | None = None, forms: Iterable[str] = tuple(FORMS)
) -> dict[str, ModelFile]:
    """Files of these forms of a model of one input and one output, by form."""
    if images is None:
        images = keras_images(model, 2, seed=5)
    facts = facts_of_model(model, images)
    return {form: FORMS[form](model, facts, folder) for form in forms}
