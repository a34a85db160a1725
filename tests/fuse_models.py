"""Small models to fuse, and what is to be equal of two models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from layer_peers import assert_close, random_weights

from fusedconvbn._keras_graph import Network

SHAPE = (8, 8, 6)
Body = Callable[[Any], Any]


def model_of(body: Body, shape: tuple[int, ...] = SHAPE, *, seed: int = 0) -> keras.Model:
    """The Functional model of `body`, with random weights."""
    inputs = keras.Input(shape, name="images")
    return randomized(keras.Model(inputs, body(inputs), name="net"), seed)


def randomized(model: keras.Model, seed: int = 0) -> keras.Model:
    """With other weights, but for those that a layer has adapted."""
    for weight, value in zip(model.weights, random_weights(model, np.random.default_rng(seed)), strict=True):
        if weight.name not in ("mean", "variance", "count"):
            weight.assign(value)
    return model


def conv(name: str = "conv", filters: int = 6, **arguments: Any) -> layers.Layer:
    return layers.Conv2D(filters, 3, name=name, **{"padding": "same", "use_bias": False, **arguments})


def norm(name: str = "bn", **arguments: Any) -> layers.Layer:
    return layers.BatchNormalization(name=name, **{"momentum": 0.8, **arguments})


def chain(x: Any, *after: layers.Layer, name: str = "", **arguments: Any) -> Any:
    """A convolution, a batch norm, and the layers `after` them."""
    for layer in (conv(f"conv{name}", **arguments), norm(f"bn{name}"), *after):
        x = layer(x)
    return x


@contextlib.contextmanager
def policy(name: str) -> Iterator[None]:
    """Layers made in it compute in `name`."""
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def images_for(model: keras.Model, batch: int = 4, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]


def outputs(model: keras.Model, images: list[np.ndarray], **arguments: Any) -> list[tf.Tensor]:
    is_list = isinstance(model, keras.Sequential)
    return keras.tree.flatten(
        model(images[0] if is_list else keras.tree.pack_sequence_as(model.input, images), **arguments)
    )


def step(model: keras.Model, images: list[np.ndarray]) -> tuple[list[tf.Tensor], tf.Tensor]:
    """One step of gradient descent on a random cotangent and the losses of the layers: the outputs, the total loss."""
    rng = np.random.default_rng(2)
    cotangents = [rng.normal(size=(len(images[0]), *tensor.shape[1:])) for tensor in model.outputs]
    with tf.GradientTape() as tape:
        results = outputs(model, images, training=True)
        products = [tf.reduce_mean(tf.cast(y, tf.float64) * c) for y, c in zip(results, cotangents, strict=True)]
        total = tf.add_n([*products, *(tf.cast(loss, tf.float64) for loss in model.losses)])
    weights = model.trainable_weights
    keras.optimizers.SGD(1.0).apply(tape.gradient(total, [weight.value for weight in weights]), weights)
    return results, total


def assert_steps_alike(
    before: list[np.ndarray], stock: keras.Model, other: list[np.ndarray], tolerance: float = 1e-4
) -> None:
    """What a step added to each weight, `other` being the other model's values, in the order of `stock`'s weights.

    Where a batch norm follows, the gradient of a bias is rounding alone.
    """
    for weight, old, ours in zip(stock.weights, before, other, strict=True):
        if weight.name == "bias":
            np.testing.assert_allclose(ours, weight.numpy(), atol=1e-4, err_msg=weight.path)
        else:
            assert_close(ours - old, weight.numpy() - old, tolerance, weight.path)


def assert_same_model(actual: keras.Model, expected: keras.Model) -> None:
    """Class, layers, their configurations and order, the calls, and all weights to the bit and in order."""
    assert type(actual) is type(expected)
    assert [layer.name for layer in actual.layers] == [layer.name for layer in expected.layers]
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        if isinstance(theirs, keras.Model):
            assert_same_model(ours, theirs)
        else:
            assert type(ours) is type(theirs)
            assert ours.get_config() == theirs.get_config()
    assert wiring(actual) == wiring(expected)
    for ours, theirs in zip(actual.weights, expected.weights, strict=True):
        assert (ours.path.split("/")[-2:], ours.trainable) == (theirs.path.split("/")[-2:], theirs.trainable)
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=theirs.path)


def wiring(model: keras.Model) -> Any:
    """The calls in their order: of which layer, on which arguments, these in terms of calls."""
    graph = Network(model).graphs[0]
    names = {id(tensor): tensor.name for tensor in graph.inputs}
    calls = []
    for number, call in enumerate(graph.calls):
        calls.append((call.layer.name, named(call.args, names), named(call.kwargs, names)))
        names |= {id(tensor): (number, i) for i, tensor in enumerate(call.results)}
    structures = None if isinstance(model, keras.Sequential) else named((model.input, model.output), {})
    return calls, named(graph.outputs, names), structures, model.name, model.trainable


def named(structure: Any, names: dict[int, Any]) -> Any:
    is_tensor = lambda x: isinstance(x, keras.KerasTensor)  # noqa: E731
    structure = keras.tree.lists_to_tuples(structure)  # as which files give them back
    return keras.tree.map_structure(lambda x: names.get(id(x), "a tensor") if is_tensor(x) else x, structure)
