"""What a worker process does: sets TensorFlow up, checks and times one implementation. Imported in workers only."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import convert_to_constants, kernels

from benchmarks.data import DTYPES, Data, make_data, normal
from benchmarks.implementations import RUN_TIME_SWITCH, TRAIN_STEP, Implementation
from benchmarks.layers import Layer
from benchmarks.measured import Call, Measured, Naming, file_type
from benchmarks.memory import GpuMemory, HostMemory
from benchmarks.problem import Problem
from benchmarks.reference import expected
from fusedconvbn import _load

Tensors = list[Any]  # the arguments of a function; of layers: inputs, residuals, output gradients, one of each a copy


def _has_gpu_kernel() -> bool:
    _load.ops()
    registered = kernels.get_registered_kernels_for_op("FusedConvBN").kernel
    return any(kernel.device_type == "GPU" for kernel in registered)


def _choose_device(wanted: str) -> str:
    gpus = tf.config.list_physical_devices("GPU")
    if wanted == "gpu" and not gpus:
        raise RuntimeError("--device gpu: TensorFlow finds no GPU here")
    if wanted == "gpu" and not _has_gpu_kernel():
        raise RuntimeError("--device gpu: this build of fusedconvbn has no GPU kernel; use --device cpu")
    if wanted == "cpu" or not gpus or not _has_gpu_kernel():
        tf.config.set_visible_devices([], "GPU")
        return "cpu"
    tf.config.experimental.set_memory_growth(gpus[0], True)
    return "gpu"


class Machine:
    """TensorFlow, set up before it initialises: threads for one op, one op at a time, one device."""

    def __init__(self, threads: int, device: str):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self.device = _choose_device(device)
        self.memory = GpuMemory() if self.device == "gpu" else HostMemory()

    def describe(self) -> dict[str, str]:
        details = {"device": self.device, "tensorflow": tf.__version__}
        if self.device == "gpu":
            gpu = tf.config.list_physical_devices("GPU")[0]
            details["gpu"] = tf.config.experimental.get_device_details(gpu).get("device_name", "unknown")
        return details

    def synchronize(self, outputs: list[tf.Tensor]) -> None:
        """Waits for a GPU by reading one number of the last result; on the CPU a call returns when it is done."""
        if self.device == "gpu":
            tf.reshape(outputs[-1], [-1])[:1].numpy()


class Reference(Machine):
    """Computes what is right, and the peak."""

    def expect(self, problem: Problem, folder: pathlib.Path) -> None:
        """Writes each expected result to folder/NAME.npy."""
        folder.mkdir()
        for name, value in expected(problem, make_data(problem)).items():
            np.save(folder / f"{name}.npy", value.astype(file_type(problem)))

    def peak_flops(self, dtype: str, size: int) -> float:
        """FLOP/s of the fastest of five products of square matrices."""
        a, b = (tf.constant(normal([place], (size, size), dtype)) for place in (0, 1))
        product = tf.function(tf.matmul)
        self.synchronize([product(a, b)])
        return 2 * size**3 / min(self._seconds(lambda: product(a, b)) for _ in range(5))

    def _seconds(self, call: Callable[[], tf.Tensor]) -> float:
        start = time.perf_counter()
        self.synchronize([call()])
        return time.perf_counter() - start


class MeasuredInTensorFlow(Machine, Measured):
    """One implementation, on the machine's device."""

    def __init__(self, threads: int, device: str, implementation: Implementation):
        Measured.__init__(self)
        Machine.__init__(self, threads, device)
        self._implementation = implementation


class MeasuredLayer(MeasuredInTensorFlow):
    """One layer."""

    def build(self, problem: Problem, expected: pathlib.Path) -> tuple[Call, Naming]:
        data = [make_data(problem, copy) for copy in range(problem.copies)]
        if problem.mode == TRAIN_STEP:  # this one is zero at kinks
            gradient = np.load(expected / "output_gradient.npy").astype(DTYPES[problem.dtype])
            data[0] = dataclasses.replace(data[0], output_gradient=gradient)
        switch = tf.Variable(problem.training) if problem.mode == RUN_TIME_SWITCH else None
        layers = self._implementation.load()(problem, dataclasses.replace(data[0].weights, switch=switch))
        tensors = _tensors(data)
        body = _step if problem.mode == TRAIN_STEP else _forward
        call = looped(self._implementation, functools.partial(body, layers), tensors)
        return call, lambda outputs: _name_results(problem, layers[0], outputs)


def _tensors(data: list[Data]) -> Tensors:
    """Copied by TensorFlow: memory of NumPy has huge pages, that of a network's tensors has not."""
    fields = ("inputs", "residual", "output_gradient")
    columns = [[getattr(copy, field) for copy in data] for field in fields]
    return [[tf.raw_ops.DeepCopy(x=value) for value in column if value is not None] for column in columns]


def _forward(
    layers: list[Layer], inputs: list[tf.Tensor], residuals: list[tf.Tensor], gradients: list[tf.Tensor]
) -> list[tf.Tensor]:
    residuals = residuals or [None] * len(layers)
    return [layer.forward(x, r) for layer, x, r in zip(layers, inputs, residuals, strict=True)]


def _step(
    layers: list[Layer], inputs: list[tf.Tensor], residuals: list[tf.Tensor], gradients: list[tf.Tensor]
) -> list[tf.Tensor]:
    results = []
    for i, layer in enumerate(layers):
        sources = [inputs[i], *layer.trainable, *residuals[i : i + 1]]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            y = layer.forward(inputs[i], residuals[i] if residuals else None)
        found = tape.gradient(y, sources, gradients[i])
        results += [y, *(gradient for gradient in found if gradient is not None)]  # a bare conv has fewer
    return results


def compiled(
    implementation: Implementation, body: Callable[..., list[tf.Tensor]], tensors: Tensors
) -> Callable[[], list[tf.Tensor]]:
    """`body` of `tensors` as one tf.function: a flat list of everything that the mode computes.

    The function captures the tensors: as arguments each would cost a call 10 us, in Python.
    """
    chosen, _ = _traced(implementation, body, tensors)
    arguments = tensors if becomes_constant(tensors) else []
    call = tf.function(lambda *given: chosen(*(given or tensors)), autograph=False)
    call.get_concrete_function(*arguments)
    return lambda: call(*arguments)


def looped(implementation: Implementation, body: Callable[..., list[tf.Tensor]], tensors: Tensors) -> Call:
    """The same with a loop in the graph: a call from Python costs 0.1-0.5 ms, as much as some layers."""
    chosen, dtypes = _traced(implementation, body, tensors)
    arguments = tensors if becomes_constant(tensors) else []

    def loop(count: tf.Tensor, *given: tf.Tensor) -> list[tf.Tensor]:
        nothing = [tf.zeros([0], dtype) for dtype in dtypes]  # each turn forgets what the one before has left
        shapes = (tf.TensorShape([]), *(tf.TensorShape(None) for _ in nothing))
        _, *outputs = tf.while_loop(
            lambda turn, *before: turn < count, lambda turn, *before: (turn + 1, *chosen(*(given or tensors))),
            (0, *nothing), shapes, parallel_iterations=1,
        )  # fmt: skip
        return outputs

    call = tf.function(loop, autograph=False)
    call.get_concrete_function(tf.constant(1), *arguments)
    return lambda count: call(tf.constant(count), *arguments)


def _traced(
    implementation: Implementation, body: Callable[..., list[tf.Tensor]], tensors: Tensors
) -> tuple[Callable[..., list[tf.Tensor]], list[tf.DType]]:
    """To be called inside another tf.function; and the types of its results."""
    function = tf.function(body, jit_compile=implementation.jit or None, autograph=False)
    dtypes = [output.dtype for output in tf.nest.flatten(function.get_concrete_function(*tensors).structured_outputs)]
    return _freeze(function, tensors) if implementation.frozen else function, dtypes


def becomes_constant(tensors: Tensors) -> bool:
    """Whether a function that captures them takes some for constants, of which TensorFlow computes the results once."""
    most_elements = 128
    return any(tensor.shape.num_elements() <= most_elements for tensor in tf.nest.flatten(tensors))


def _freeze(function: Any, tensors: Tensors) -> Callable[..., list[tf.Tensor]]:
    """To be called inside another tf.function: a frozen ConcreteFunction called by itself costs 0.85 ms more."""
    frozen = convert_to_constants.convert_variables_to_constants_v2(function.get_concrete_function(*tensors))
    return lambda *arguments: frozen(*tf.nest.flatten(arguments))


def _name_results(problem: Problem, layer: Layer, outputs: list[tf.Tensor]) -> dict[str, tf.Tensor]:
    """The first copy's results by the names of the reference; of a bare convolution, its output."""
    results = {layer.result: outputs[0]}
    if layer.result != "output":
        return results
    if problem.mode == TRAIN_STEP:
        names = ["d_inputs", "d_filters", "d_gamma", "d_beta"] + ["d_residual"] * problem.case.residual
        results |= dict(zip(names, outputs[1:], strict=False))  # behind these come the other copies' results
    if problem.training:
        variance = "moving_variance_unbiased" if layer.unbiased else "moving_variance"
        results |= {"moving_mean": layer.moving[0], variance: layer.moving[1]}
    return results
