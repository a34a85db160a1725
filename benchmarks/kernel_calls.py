"""Bare calls of the core's kernels: plans made and arrays allocated before, so that a call is the kernels alone."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import plans
from benchmarks.data import make_data
from benchmarks.implementations import TRAIN_STEP, Implementation
from benchmarks.measured import Call as MeasuredCall
from benchmarks.measured import Measured, Naming, repeated
from benchmarks.problem import Problem
from fusedconvbn import _load, raw

_LINE = 64  # bytes: where TensorFlow's tensors begin

Call = Callable[[], None]


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def _aligned(array: np.ndarray | None) -> np.ndarray | None:
    if array is None:
        return None
    copy = _empty(array.shape, array.dtype)
    copy[...] = array
    return copy


class Workspace:
    """Memory for calls one after the other, as ops of one thread take the same in turn: it stays in the caches."""

    def __init__(self) -> None:
        self._memory = _empty((1,), np.dtype(np.uint8))

    def of(self, plan: Any) -> np.ndarray:
        if self._memory.size < plan.workspace_bytes:
            self._memory = _empty((plan.workspace_bytes,), np.dtype(np.uint8))
        return self._memory


class KernelCalls:
    """The arrays of one copy of a problem, in training with what forward saves; calls fill them again and again."""

    def __init__(
        self,
        problem: Problem,
        copy: int = 0,
        output_gradient: np.ndarray | None = None,
        workspace: Workspace | None = None,
    ):
        self._problem = problem
        data = make_data(problem, copy)
        weights = data.weights
        self._images = [_aligned(array) for array in (data.inputs, weights.filters)]
        self._vectors = [weights.gamma, weights.beta, weights.moving_mean, weights.moving_variance]
        gradient = data.output_gradient if output_gradient is None else output_gradient.astype(data.inputs.dtype)
        self._residual, self._gradient = _aligned(data.residual), _aligned(gradient)
        shape = problem.case.output_shape(problem.batch)
        self.output = _empty(shape, data.inputs.dtype)
        self._kept: dict[str, np.ndarray | None] = {"nothing": None}  # what forward leaves for backward, by its kind
        self._workspace = workspace or Workspace()
        self.moments = [np.empty_like(weights.gamma) for _ in range(4)]  # new moving mean and variance, mean, 1 / std

    def plan(self, direction: str, kernel: str | None = None, saved: str = "conv", threads: int = 1) -> Any:
        return plans.plan(self._problem, direction, kernel, saved, threads)

    def packed(self, plan: Any) -> np.ndarray | None:
        """The filters as ops keep them between calls of inference; None where they do not."""
        if self._problem.training or not plan.packed_bytes:
            return None
        return raw.pack_filters(plan, self._images[1]).memory

    def forward(self, plan: Any, packed: np.ndarray | None = None) -> Call:
        """Writes `output`, and in training what backward reads. Packs filters at each call if they are not given."""
        if plan.saved not in self._kept:
            self._kept[plan.saved] = _empty(tuple(plan.conv_out_shape), self.output.dtype)
        given = (*self._images, *self._vectors, self._residual, packed)
        arrays = (*given, self.output, *self.moments, self._kept[plan.saved])
        workspace = self._workspace.of(plan)
        return lambda: _load.core().forward(plan, *arrays, workspace)

    @functools.cached_property
    def gradients(self) -> list[np.ndarray | None]:
        """Of inputs, filters, gamma, beta, the moving statistics, the residual: where backward() writes."""
        images = [_empty(array.shape, array.dtype) for array in self._images]
        residual = None if self._residual is None else _empty(self.output.shape, self.output.dtype)
        return [*images, *(np.empty_like(vector) for vector in self._vectors), residual]

    def backward(self, plan: Any, saved: str, needs_inputs: bool = True, needs_filters: bool = True) -> Call:
        """For a plan made for `saved`, which a call of forward() has left; the moving statistics have no gradients."""
        no_gradient = np.zeros_like(self._vectors[0])
        left = (self._residual, self.output, *self.moments[2:], self._kept[saved])
        d_inputs, d_filters, *others = self.gradients
        results = (d_inputs if needs_inputs else None, d_filters if needs_filters else None, *others)
        arrays = (self._gradient, no_gradient, no_gradient, *self._images, *self._vectors, *left, *results)
        workspace = self._workspace.of(plan)
        return lambda: _load.core().backward(plan, *arrays, workspace)


class MeasuredKernels(Measured):
    """The layer without TensorFlow: what its op adds is the difference."""

    def __init__(self, threads: int, device: str, implementation: Implementation):
        super().__init__()
        self._threads = threads

    def build(self, problem: Problem, expected: pathlib.Path) -> tuple[MeasuredCall, Naming]:
        gradient = np.load(expected / "output_gradient.npy") if problem.mode == TRAIN_STEP else None
        workspace = Workspace()
        copies = [KernelCalls(problem, copy, None if copy else gradient, workspace) for copy in range(problem.copies)]
        plan = copies[0].plan("forward", threads=self._threads)
        packed = copies[0].packed(plan)  # of all: they have the same filters
        runs = [copy.forward(plan, packed) for copy in copies]
        if problem.mode == TRAIN_STEP:
            saved = plan.saved
            plan = copies[0].plan("backward", saved=saved, threads=self._threads)
            runs = [run for pair in zip(runs, (copy.backward(plan, saved) for copy in copies)) for run in pair]
        return repeated(lambda: [run() for run in runs]), lambda outputs: _named(problem, copies[0])


def _named(problem: Problem, copy: KernelCalls) -> dict[str, np.ndarray]:
    results = {"output": copy.output}
    if problem.training:
        results |= dict(zip(("moving_mean", "moving_variance"), copy.moments, strict=False))
    if problem.mode == TRAIN_STEP:
        names = ("d_inputs", "d_filters", "d_gamma", "d_beta", "", "", "d_residual")
        results |= {n: value for n, value in zip(names, copy.gradients, strict=True) if n and value is not None}
    return results
