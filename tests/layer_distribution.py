"""The layer and its Keras peers on two logical CPUs; `test_layer_distribution` runs this in a process of its own."""

import json

import keras
import numpy as np
import tensorflow as tf
from layer_peers import random_weights, stock_chain

from fusedconvbn import FusedConvBN

SHAPE = (6, 6, 3)
OFFSET = 300.0  # of the images: a one-pass variance in float32 keeps two of its digits
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(10, *SHAPE)).astype("float32")
TARGET = RNG.normal(size=(10, 6, 6, 5)).astype("float32")


def block(fused: bool):
    if fused:
        return lambda x, **arguments: FusedConvBN(kernel_size=3, **arguments)(x)
    return stock_chain


def fitted(strategy, fused: bool, synchronized: bool, batch: int):
    """Weights and losses after three epochs of fit; with an odd batch, replicas get unequal shares."""
    with strategy.scope():
        x = keras.Input(SHAPE)
        model = keras.Model(x, block(fused)(x, filters=5, padding="same", activation="elu", synchronized=synchronized))
        model.set_weights(random_weights(model, np.random.default_rng(1)))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=False)
    history = model.fit(IMAGES, TARGET, batch_size=batch, epochs=3, shuffle=False, verbose=0).history
    return {"losses": history["loss"], "weights": [weight.tolist() for weight in model.get_weights()]}


def one_call(strategy, training: str, offset: float):
    """Output, statistics and kernel gradient of a synchronized layer whose replicas get 7 and 3 images."""
    with strategy.scope():
        layer = FusedConvBN(5, 3, activation="elu", synchronized=True, use_bias=True)
        layer.build((None, *SHAPE))
        layer.set_weights(random_weights(layer, np.random.default_rng(1)))
    images = IMAGES + np.float32(offset)
    replicas = strategy.num_replicas_in_sync
    parts = [images[:7], images[7:]] if replicas == 2 else [images]
    values = iter(parts)
    distributed = strategy.experimental_distribute_values_from_function(lambda _: next(values))

    @tf.function(autograph=False)
    def run(images, switch):
        def step(images):
            decided = switch if training.startswith("tensor") else training == "True"
            with tf.GradientTape() as tape:
                output = layer(images, training=decided)
                loss = tf.reduce_sum(tf.sin(output))
            gradient = tape.gradient(loss, layer.kernel.value)
            return output, tf.distribute.get_replica_context().all_reduce("sum", gradient)

        return strategy.run(step, args=(images,))

    outputs, gradient = run(distributed, tf.constant(training.endswith("True")))
    output = np.concatenate([part.numpy() for part in strategy.experimental_local_results(outputs)])
    return {
        "output": output.tolist(),
        "gradient": strategy.experimental_local_results(gradient)[0].numpy().tolist(),
        "moving_mean": layer.moving_mean.numpy().tolist(),
        "moving_variance": layer.moving_variance.numpy().tolist(),
    }


def main(path: str) -> None:
    """Writes all results to a JSON file."""
    one = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], one)
    mirrored, single = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.get_strategy()
    fits = {
        f"{synchronized}": [fitted(mirrored, fused, synchronized, batch=4) for fused in (True, False)]
        for synchronized in (False, True)
    }
    cases = {name: (name, 0.0) for name in ("True", "False", "tensor True", "tensor False")}
    cases["True large mean"] = ("True", OFFSET)
    calls = {name: [one_call(strategy, *case) for strategy in (mirrored, single)] for name, case in cases.items()}
    with open(path, "w") as file:
        json.dump({"fits": fits, "calls": calls}, file)
