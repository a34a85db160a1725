"""What an engine offers, and the worker that measures one."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from benchmarks.data import make_data
from benchmarks.implementations import Implementation
from benchmarks.measured import Call, Measured, Naming, repeated
from benchmarks.network_data import NetworkDraw, network_images
from benchmarks.networks import Builder, assemble
from benchmarks.problem import AnyProblem, NetworkProblem, Problem

T = TypeVar("T")


class Engine(Builder[T], Protocol[T]):
    """Builds a model of layers, then runs it. Arrays are NHWC on both sides; an engine reorders them in advance."""

    def __init__(self, threads: int, dtype: str): ...

    def input(self, shape: tuple[int, ...]) -> T:
        """One of the model's inputs, NHWC."""

    def compile(self, output: T) -> None:
        """Ends the model: everything that the engine does before the first call."""

    def bind(self, arrays: Sequence[np.ndarray]) -> Callable[[], Any]:
        """A call of the model with these inputs."""

    def result(self, output: Any) -> np.ndarray:
        """What a call returned, NHWC."""


def to_nchw(array: np.ndarray) -> np.ndarray:
    """Of an image; other arrays as they are."""
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if array.ndim == 4 else array


def to_nhwc(array: np.ndarray) -> np.ndarray:
    """The way back."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array


def to_oihw(filters: np.ndarray) -> np.ndarray:
    """[kh,kw,C/groups,K] as [K,C/groups,kh,kw]."""
    return np.ascontiguousarray(filters.transpose(3, 2, 0, 1))


def dense_nchw(weights: np.ndarray) -> np.ndarray:
    """[h,w,c,units] as the matrix that multiplies a flattened NCHW image; a matrix as it is."""
    if weights.ndim == 4:
        weights = weights.transpose(2, 0, 1, 3)
    return np.ascontiguousarray(weights.reshape(-1, weights.shape[-1]))


class MeasuredPeer(Measured):
    """An engine on a layer or a network, inference."""

    def __init__(self, threads: int, device: str, implementation: Implementation):
        super().__init__()
        self._threads, self._make = threads, implementation.load()

    def build(self, problem: AnyProblem, expected: pathlib.Path) -> tuple[Call, Naming]:
        engine = self._make(self._threads, problem.dtype)
        if isinstance(problem, NetworkProblem):
            arrays, name = _build_network(engine, problem), "logits"
        else:
            arrays, name = _build_layer(engine, problem), "output"
        calls = [engine.bind(each) for each in arrays]
        return repeated(lambda: [call() for call in calls]), lambda outputs: {name: engine.result(outputs[0])}


def _build_network(engine: Engine[Any], problem: NetworkProblem) -> list[list[np.ndarray]]:
    """Compiles the model; the inputs of its call."""
    images = network_images(problem)
    x, draw = engine.input(images.shape), NetworkDraw(problem.dtype)
    engine.compile(assemble(problem.name, engine, draw, x, problem.image, problem.width))
    return [[images]]


def _build_layer(engine: Engine[Any], problem: Problem) -> list[list[np.ndarray]]:
    """The same; the inputs of a call for each copy."""
    case = problem.case
    data = [make_data(problem, copy) for copy in range(problem.copies)]
    x = engine.input(case.input_shape(problem.batch))
    residual = engine.input(case.output_shape(problem.batch)) if case.residual else None
    engine.compile(engine.conv_bn(x, case, data[0].weights, residual))
    return [[array for array in (copy.inputs, copy.residual) if array is not None] for copy in data]
