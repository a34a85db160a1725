"""What is timed: a call that has been built, run once for its results and its memory, then repeated."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.memory import GpuMemory, HostMemory
from benchmarks.problem import AnyProblem

Call = Callable[[int], Sequence[Any]]  # computes what the problem's mode says so many times: the last results
Naming = Callable[[Sequence[Any]], Mapping[str, Any]]  # of a call's outputs, by the names of the reference

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def repeated(once: Callable[[], Sequence[Any]]) -> Call:
    """That which calls `once` so many times."""

    def call(count: int) -> Sequence[Any]:
        outputs: Sequence[Any] = ()
        for _ in range(count):
            del outputs  # a network would not hold them twice
            outputs = once()
        return outputs

    return call


class Measured:
    """One implementation of one problem; a subclass knows how to build it."""

    def __init__(self) -> None:
        self.memory: HostMemory | GpuMemory = HostMemory()
        self._call: Call = repeated(list)
        self._copies = 1
        self._memory: dict[str, int] = {}

    def build(self, problem: AnyProblem, expected: pathlib.Path) -> tuple[Call, Naming]:
        """A call, and the names of what it returns; `expected` holds what the reference wrote."""
        raise NotImplementedError

    def synchronize(self, outputs: Sequence[Any]) -> None:
        """Waits until they are there: on the CPU, a call returns when it is done."""

    def prepare(self, problem: AnyProblem, expected: pathlib.Path, results: pathlib.Path) -> list[str]:
        """Builds the call, runs it once and writes the first copy's results to results/NAME.npy: their names."""
        self._call, name = self.build(problem, expected)
        self._copies = problem.copies
        named = name(self._measure_memory())
        results.mkdir()
        for what, value in named.items():
            np.save(results / f"{what}.npy", np.asarray(value).astype(file_type(problem), copy=False))
        if self.memory.steady:
            self._measure_memory()
        return list(named)

    def _measure_memory(self) -> Sequence[Any]:
        """The results of a call; keeps what it needed on top of inputs, variables and the traced graph."""
        self.memory.reset()
        before = self.memory.used()
        outputs = self._call(1)
        self.synchronize(outputs)
        peak = self.memory.peak()
        self._memory = {"peak_bytes": peak, "working_bytes": max(0, peak - before)}
        return outputs

    def sample(self, repeats: int, clock: str) -> float:
        """Seconds a layer, the mean of so many calls."""
        now = CLOCKS[clock]
        start = now()
        self.synchronize(self._call(repeats))
        return (now() - start) / (repeats * self._copies)

    def memory_of_a_call(self) -> dict[str, int]:
        """Bytes: the peak, and how far it is above what there was before."""
        return self._memory


def file_type(problem: AnyProblem) -> type:
    """Of the arrays in files."""
    return np.float64 if problem.dtype == "float64" else np.float32
