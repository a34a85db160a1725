"""Trains a network on scikit-learn's digits in float32, then a second time with quantized weights.

Every weight passes through a fake-quantizer under a `tf.cond` on a variable, so one switch, and no new graph, turns the
float network into the quantized one: for training (gradients pass straight through the rounding) and for inference.
Moving statistics are kept up from their own values, never from quantized ones.

    python examples/quantization_aware.py
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from fusedconvbn import FusedConvBN

KERNEL_BITS, BATCH_NORM_BITS = 3, 8


class FakeQuantizer:
    """Rounds a variable to 2**bits values between its least (or 0) and its greatest, where `switch` is true."""

    def __init__(self, bits: int, switch: tf.Variable) -> None:
        self.bits, self.switch = bits, switch

    def __call__(self, value: tf.Tensor) -> tf.Tensor:
        return tf.cond(self.switch, lambda: self._rounded(value), lambda: tf.identity(value))

    def _rounded(self, value: tf.Tensor) -> tf.Tensor:
        low, high = tf.minimum(tf.reduce_min(value), 0.0), tf.maximum(tf.reduce_max(value), 0.0)
        return tf.quantization.fake_quant_with_min_max_vars(value, low, high, num_bits=self.bits)


def network(switch: tf.Variable) -> keras.Model:
    quantizers = {"kernel": FakeQuantizer(KERNEL_BITS, switch)}
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        quantizers[name] = FakeQuantizer(BATCH_NORM_BITS, switch)

    def block(x: keras.KerasTensor, filters: int, residual: keras.KerasTensor | None = None) -> keras.KerasTensor:
        layer = FusedConvBN(
            filters, 3, padding="same", activation="relu", momentum=0.9, variable_transforms=quantizers
        )  # fmt: skip
        return layer(x, residual)

    inputs = keras.Input((8, 8, 1))
    x = block(inputs, 16)
    x = block(block(x, 16), 16, residual=x)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.GlobalAveragePooling2D()(block(x, 32))
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def main() -> None:
    keras.utils.set_random_seed(0)
    digits = load_digits()
    images, labels = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
    train, test = slice(0, 1400), slice(1400, None)
    quantizing = tf.Variable(False, trainable=False)
    model = network(quantizing)
    model.compile(
        keras.optimizers.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )

    def accuracy(quantized: bool) -> float:
        quantizing.assign(quantized)
        return model.evaluate(images[test], labels[test], batch_size=100, verbose=0)[1]

    model.fit(images[train], labels[train], batch_size=50, epochs=12, verbose=0)
    print(f"float32 training:  accuracy {accuracy(False):.3f} in float32")
    print(f"                            {accuracy(True):.3f} with {KERNEL_BITS}-bit kernels")
    quantizing.assign(True)
    model.optimizer.learning_rate.assign(5e-4)
    model.fit(images[train], labels[train], batch_size=50, epochs=8, verbose=0)
    print(f"second, quantized: accuracy {accuracy(True):.3f} with {KERNEL_BITS}-bit kernels")


if __name__ == "__main__":
    main()
