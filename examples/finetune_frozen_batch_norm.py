"""Fine-tunes a network with frozen batch norm: the usual state where batches are small or data is scarce.

A network learns the digits 0 to 4 of scikit-learn's set. Then it is to learn 5 to 9 from 60 images, one a step: too few
for batch statistics. With `batch_norm_trainable=False` the statistics of the first training keep normalizing and the
kernels go on learning; with plain batch norm every step is normalized by the moments of one image.

    python examples/finetune_frozen_batch_norm.py
"""

from __future__ import annotations

import keras
import numpy as np
from sklearn.datasets import load_digits

from fusedconvbn import FusedConvBN


def network() -> keras.Model:
    def block(filters: int, strides: int = 1) -> FusedConvBN:
        return FusedConvBN(filters, 3, strides, padding="same", activation="relu", momentum=0.9)

    inputs = keras.Input((8, 8, 1))
    x = block(16)(inputs)
    x = block(16)(block(16)(x), residual=x)
    x = keras.layers.GlobalAveragePooling2D()(block(32, strides=2)(x))
    return keras.Model(inputs, keras.layers.Dense(5)(x))


def compile_model(model: keras.Model, learning_rate: float) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])


def batch_norm_layers(model: keras.Model) -> list[FusedConvBN]:
    return [layer for layer in model.layers if isinstance(layer, FusedConvBN)]


def batch_norm_values(model: keras.Model) -> list[np.ndarray]:
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    return [getattr(layer, name).numpy() for layer in batch_norm_layers(model) for name in names]


def main() -> None:
    digits = load_digits()
    images, labels = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
    first, second = labels < 5, labels >= 5
    few = slice(0, 60)
    print(f"{'fine-tuning with':24} {'new digits':>10}   batch norm")
    for frozen in (True, False):
        keras.utils.set_random_seed(0)
        model = network()
        compile_model(model, 2e-3)
        model.fit(images[first], labels[first], batch_size=50, epochs=8, verbose=0)
        before = batch_norm_values(model)
        for layer in batch_norm_layers(model):
            layer.batch_norm_trainable = not frozen
        compile_model(model, 1e-3)  # again, so that Keras sees the change
        x, y = images[second], labels[second] - 5
        model.fit(x[few], y[few], batch_size=1, epochs=20, verbose=0)
        accuracy = model.evaluate(x[60:], y[60:], batch_size=100, verbose=0)[1]
        kept = all(np.array_equal(old, new) for old, new in zip(before, batch_norm_values(model), strict=True))
        name = "frozen batch norm" if frozen else "batch statistics of 1"
        print(f"{name:24} {accuracy:10.3f}   {'unchanged' if kept else 'changed'}")


if __name__ == "__main__":
    main()
