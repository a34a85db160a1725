"""Fuses a network of stock Keras layers, trains both for some steps, and goes back to stock layers.

Both networks start from the same weights and see the same batches, so their losses must be the same; what is timed is
`train_on_batch`, the two taking turns.

    python examples/fuse_model.py
"""

from __future__ import annotations

import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

from fusedconvbn import fuse, unfuse

STEPS = 30
BATCH = 32


def block(x: keras.KerasTensor, filters: int, strides: int = 1) -> keras.KerasTensor:
    """A residual block as one writes it in Keras: eight layers, or ten with a convolution on the shortcut."""
    y = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
    y = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(y))
    y = layers.Conv2D(filters, 3, padding="same", use_bias=False)(y)
    y = layers.BatchNormalization(momentum=0.9)(y)
    if strides > 1:
        x = layers.BatchNormalization(momentum=0.9)(layers.Conv2D(filters, 1, strides, use_bias=False)(x))
    return layers.ReLU()(layers.Add()([x, y]))


def network() -> keras.Model:
    """Images are enlarged, so that there is something to compute."""
    inputs = keras.Input((8, 8, 1))
    x = layers.UpSampling2D(4)(inputs)
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    x = layers.BatchNormalization(momentum=0.9, name="behind_an_activation")(x)
    for filters, strides in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        x = block(x, filters, strides)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def train(models: dict[str, keras.Model]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Losses and seconds of each model's steps."""
    digits = load_digits()
    images, labels = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
    losses, seconds = ({name: [] for name in models} for _ in range(2))
    for step in range(STEPS):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        for name, model in models.items():
            start = time.perf_counter()
            losses[name].append(float(model.train_on_batch(images[batch], labels[batch])))
            seconds[name].append(time.perf_counter() - start)
    return losses, seconds


def main() -> None:
    keras.utils.set_random_seed(0)
    stock = network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    stock.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss)
    report = []
    fused = fuse(stock, report=report)  # compiled like stock
    print(f"layers: {len(stock.layers)} -> {len(fused.layers)}")
    for entry in report:
        print(f"  {entry.name}: {f'into {entry.into}' if entry.into else f'kept, {entry.reason}'}")
    losses, seconds = train({"stock": stock, "fused": fused})
    for name in losses:
        milliseconds = 1e3 * statistics.median(seconds[name][3:])
        print(f"{name}: loss {losses[name][0]:.3f} -> {losses[name][-1]:.3f}, {milliseconds:.0f} ms a step")
    restored = unfuse(fused)
    same = [layer.name for layer in restored.layers] == [layer.name for layer in stock.layers]
    print(f"unfused: {'the layers are those of the start' if same else 'the layers differ'}")


if __name__ == "__main__":
    main()
