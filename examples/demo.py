"""Trains one residual network twice on scikit-learn's digits: of FusedConvBN layers and of Keras layers.

Both start from the same seed and see the same batches, so they must do the same: the script checks the losses, the
accuracies and what is served after saving, and exits with 1 where one of them is off. `make demo` runs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fusedconvbn import FusedConvBN

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ARTIFACTS = Path("artifacts")
SEED = 7
EPOCHS = 12
BATCH = 64
COMPARED_LOSSES = 20
ACTIVATION = "silu"  # smooth: with ReLU, rounding flips units whose argument is nearly 0, and the two runs part by 1e-2
MOMENTUM = 0.9  # of the moving statistics: a few hundred steps are too few for the default of 0.99

# One unit of a network: (x, filters, kernel size, strides, residual, activation) -> activation(bn(conv(x)) + residual)
Unit = Callable[..., keras.KerasTensor]


def fused_unit(x, filters, kernel_size, strides=1, residual=None, activation=None):
    """One layer, one op."""
    layer = FusedConvBN(filters, kernel_size, strides=strides, padding="same", momentum=MOMENTUM, activation=activation)
    return layer(x, residual=residual)


def keras_unit(x, filters, kernel_size, strides=1, residual=None, activation=None):
    """The same of two to four Keras layers."""
    x = keras.layers.Conv2D(filters, kernel_size, strides=strides, padding="same", use_bias=False)(x)
    x = keras.layers.BatchNormalization(momentum=MOMENTUM)(x)
    if residual is not None:
        x = keras.layers.Add()([x, residual])
    return x if activation is None else keras.layers.Activation(activation)(x)


def residual_network(unit: Unit) -> keras.Model:
    """[N,8,8,1] images -> [N,10] logits: a stem, then two stages of two residual blocks each."""
    keras.utils.set_random_seed(SEED)
    inputs = keras.Input((8, 8, 1))
    x = unit(inputs, 32, 3, activation=ACTIVATION)
    for filters, strides in [(32, 1), (32, 1), (64, 2), (64, 1)]:
        shortcut = x if strides == 1 else unit(x, filters, 1, strides)
        x = unit(x, filters, 3, strides, activation=ACTIVATION)
        x = unit(x, filters, 3, residual=shortcut, activation=ACTIVATION)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


class Run:
    """A network in training, with the loss and the seconds of each step."""

    def __init__(self, unit: Unit, steps: int) -> None:
        self.model = residual_network(unit)
        self.optimizer = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.05, steps), momentum=0.9)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._step = tf.function(self._train, reduce_retracing=True)

    def _train(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        start = time.perf_counter()
        self.losses.append(float(self._step(images, labels)))
        self.seconds.append(time.perf_counter() - start)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """In percent."""
        logits = self.model(images, training=False).numpy()
        return 100 * float(np.mean(np.argmax(logits, axis=-1) == labels))

    def milliseconds(self) -> float:
        """A step, the median of those after the compared ones: the first traces the function."""
        return 1e3 * float(np.median(self.seconds[COMPARED_LOSSES:]))


def train(runs: list[Run], images: np.ndarray, labels: np.ndarray) -> None:
    """The same batches for each run, step by step in turns, so that both meet the same machine."""
    order = np.random.default_rng(SEED)
    for _ in range(EPOCHS):
        shuffled = order.permutation(len(images))
        for first in range(0, len(images) - BATCH + 1, BATCH):
            batch = shuffled[first : first + BATCH]
            for run in runs:
                run.step(images[batch], labels[batch])


SERVE = """
import sys
import numpy as np, tensorflow as tf
import fusedconvbn  # registers the op
folder, images, result = sys.argv[1:]
serve = tf.saved_model.load(folder).signatures["serving_default"]
np.save(result, *[logits.numpy() for logits in serve(tf.constant(np.load(images))).values()])
"""


def served(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Logits of a SavedModel of `model`, served by a process of its own."""
    folder, batch, result = ARTIFACTS / "saved_model", ARTIFACTS / "batch.npy", ARTIFACTS / "logits.npy"
    shutil.rmtree(folder, ignore_errors=True)
    model.export(str(folder), verbose=False)
    np.save(batch, images)
    subprocess.run([sys.executable, "-c", SERVE, str(folder), str(batch), str(result)], check=True)
    return np.load(result)


def reloaded(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Logits of `model` after a round trip through a .keras file."""
    path = ARTIFACTS / "digits.keras"
    model.save(path)
    return keras.models.load_model(path)(images, training=False).numpy()


def plot(fused: Run, stock: Run) -> Path:
    """Losses of both over the steps, and the time of a step of each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[2, 1], layout="constrained")
    left.semilogy(stock.losses, color="tab:orange", linewidth=3, label="Keras layers")
    left.semilogy(fused.losses, color="tab:blue", linewidth=1, label="FusedConvBN")
    left.set(xlabel="step", ylabel="training loss", title="The same training")
    left.legend()
    bars = right.bar(["Keras layers", "FusedConvBN"], [stock.milliseconds(), fused.milliseconds()])
    bars[0].set_color("tab:orange")
    right.bar_label(bars, fmt="%.1f")
    right.set(ylabel="ms", title=f"One training step, batch {BATCH}")
    path = ARTIFACTS / "demo.png"
    figure.savefig(path, dpi=120)
    return path


def check(text: str, value: float, limit: float) -> bool:
    ok = value <= limit
    print(f"  {'ok  ' if ok else 'FAIL'}  {text}: {value:.3g} (at most {limit:.3g})")
    return ok


def main() -> int:
    ARTIFACTS.mkdir(exist_ok=True)
    digits = load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype(np.float32)
    images, test_images, labels, test_labels = train_test_split(
        images, digits.target.astype(np.int32), test_size=360, stratify=digits.target, random_state=SEED
    )
    steps = EPOCHS * (len(images) // BATCH)
    print(f"Digits: {len(images)} images to train on, {len(test_images)} to test; {steps} steps of {BATCH}")
    fused, stock = runs = [Run(fused_unit, steps), Run(keras_unit, steps)]
    train(runs, images, labels)
    accuracies = [run.accuracy(test_images, test_labels) for run in runs]

    print(f"{'':14}{'layers':>8}{'first loss':>12}{'last loss':>12}{'accuracy':>11}{'ms a step':>11}")
    for name, run, accuracy in zip(["FusedConvBN", "Keras layers"], runs, accuracies, strict=True):
        numbers = f"{run.losses[0]:>12.6f}{run.losses[-1]:>12.6f}{accuracy:>10.2f}%{run.milliseconds():>11.2f}"
        print(f"{name:14}{len(run.model.layers):>8}{numbers}")
    print("(both without XLA, steps in turns; python -m benchmarks.run measures properly)")

    expected = fused.model(test_images, training=False).numpy()
    first, reference = (np.array(run.losses[:COMPARED_LOSSES]) for run in runs)
    checks = [
        check(f"first {COMPARED_LOSSES} losses, relative difference", np.max(np.abs(first / reference - 1)), 1e-4),
        check("accuracies, difference in points", abs(accuracies[0] - accuracies[1]), 1),
        check("100% - accuracy: the network has learned", 100 - min(accuracies), 5),
        check("logits after a .keras file", np.max(np.abs(reloaded(fused.model, test_images) - expected)), 1e-4),
        check("logits of the served SavedModel", np.max(np.abs(served(fused.model, test_images) - expected)), 1e-4),
    ]
    print(f"Plot: {plot(fused, stock)}")
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
