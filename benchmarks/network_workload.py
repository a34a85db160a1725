"""Whole networks in TensorFlow: one builder over the layers of every implementation. Imported in workers only."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

from benchmarks.cases import Case
from benchmarks.implementations import BASELINES, TRAIN_STEP, Implementation
from benchmarks.layers import Layer, moments
from benchmarks.measured import Call, Naming, file_type, repeated
from benchmarks.network_data import NetworkDraw, network_images, network_labels
from benchmarks.networks import Program, Weights, assemble
from benchmarks.problem import NetworkProblem, Problem
from benchmarks.workload import MeasuredInTensorFlow, Reference, compiled

[_MOMENTS] = (each for each in BASELINES if each.name == "moments")  # its op takes float64, the fused one does not

MakeLayers = Callable[[Problem, Weights], list[Layer]]


class NetworkBuilder(Program):
    """Layers of one implementation; pooling and classifier are stock ops for all."""

    def __init__(self, problem: NetworkProblem, make: MakeLayers, draw: NetworkDraw | None = None):
        super().__init__()
        self._problem, self._make = problem, make
        self.trainable: dict[str, list[tf.Variable]] = {}  # by the name of their gradient
        images = self.input(None)
        assemble(problem.name, self, draw or NetworkDraw(problem.dtype), images, problem.image, problem.width)

    def conv_bn(self, x: int, case: Case, weights: Weights, residual: int | None) -> int:
        [layer] = self._make(self._problem.layer(case), weights)
        filters, *affine = layer.trainable
        self.trainable |= {f"d_{case.name}_filters": [filters], f"d_{case.name}_affine": affine}
        if residual is None:
            return self.add(lambda inputs: layer.forward(inputs, None), x)
        return self.add(layer.forward, x, residual)

    def max_pool(self, x: int, window: Case) -> int:
        return self.add(lambda image: tf.nn.max_pool2d(image, window.filter_height, window.stride, window.padding), x)

    def mean(self, x: int) -> int:
        return self.add(lambda image: tf.reduce_mean(image, [1, 2]), x)

    def dense(self, x: int, weights: np.ndarray, bias: np.ndarray, relu: bool) -> int:
        w, b = tf.Variable(weights.reshape(-1, weights.shape[-1])), tf.Variable(bias)
        self.trainable |= {f"d_dense{len(self.trainable)}": [w], f"d_bias{len(self.trainable)}": [b]}

        def forward(inputs: tf.Tensor) -> tf.Tensor:
            y = tf.nn.bias_add(tf.matmul(tf.reshape(inputs, [inputs.shape[0], -1]), w), b)
            return tf.nn.relu(y) if relu else y

        return self.add(forward, x)

    def forward(self, images: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        """The logits."""
        return [self.run(images)]

    def step(self, images: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        """Logits, and gradients of the mean cross-entropy by all that is trained; nothing but statistics is updated."""
        sources = [variable for group in self.trainable.values() for variable in group]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            logits = self.run(images)
            wide = tf.cast(logits, tf.float64 if logits.dtype == tf.float64 else tf.float32)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, wide))
        return [logits, *tape.gradient(loss, sources)]

    def call(self, implementation: Implementation, images: np.ndarray) -> tuple[Call, Naming]:
        """What the problem's mode says, as one function, and the names of its results."""
        step = self._problem.mode == TRAIN_STEP
        tensors = [tf.raw_ops.DeepCopy(x=value) for value in (images, network_labels(self._problem))]
        once = compiled(implementation, self.step if step else self.forward, tensors)
        return repeated(once), self._name

    def _name(self, outputs: list[tf.Tensor]) -> Mapping[str, np.ndarray]:
        """The gradients of gamma and beta together: where only a batch norm follows, that of beta alone is rounding."""
        logits, *gradients = (output.numpy() for output in outputs)
        results, left = {"logits": logits}, iter(gradients)
        for name, group in self.trainable.items() if gradients else ():
            results[name] = np.concatenate([next(left).ravel() for _ in group])
        return results


class MeasuredNetwork(MeasuredInTensorFlow):
    """A whole network."""

    def build(self, problem: NetworkProblem, expected: pathlib.Path) -> tuple[Call, Naming]:
        builder = NetworkBuilder(problem, self._implementation.load())
        return builder.call(self._implementation, network_images(problem))


class NetworkReference(Reference):
    """Computes what is right: in float64, by stock ops, from data rounded to the problem's type."""

    def expect(self, problem: NetworkProblem, folder: pathlib.Path) -> None:
        """Writes each expected result to folder/NAME.npy."""
        folder.mkdir()
        wide = dataclasses.replace(problem, dtype="float64")
        builder = NetworkBuilder(wide, moments, NetworkDraw(problem.dtype, wide=True))
        call, name = builder.call(_MOMENTS, network_images(problem).astype(np.float64))
        for what, value in name(call(1)).items():
            np.save(folder / f"{what}.npy", value.astype(file_type(problem)))
