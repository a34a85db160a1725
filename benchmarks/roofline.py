"""The least time that a problem can take: its multiplications, or its memory traffic, at the machine's measured limits.

FLOPs are those of a direct convolution, so Winograd may beat the limit. Bytes are those of the tensors that a pass has
to read or write, each once: 100 % is out of reach where batch norm goes over a tensor twice that no cache holds.
"""

from __future__ import annotations

import dataclasses
import math

from benchmarks.hardware import Bandwidth, Limits, size_class
from benchmarks.implementations import TRAIN_STEP
from benchmarks.problem import AnyProblem, NetworkProblem, Problem

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time, in seconds, and what bounds it."""

    seconds: float
    by: str


def traffic(problem: Problem) -> tuple[int, int]:
    """Bytes to read and to write."""
    case, size = problem.case, _BYTES[problem.dtype]
    x, w, y = (
        math.prod(shape) * size
        for shape in (case.input_shape(problem.batch), case.filter_shape, case.output_shape(problem.batch))
    )
    rounded = y // 2 if problem.dtype == "float32" else y
    z = {"conv": y, "bfloat16": rounded, "recompute": 0}[problem.save] if problem.training else 0
    added = y if case.residual else 0
    read, written = x + w + added, y + z
    if problem.mode == TRAIN_STEP:  # forward, then: dy, z, inputs, filters, and what the derivative follows from
        read += y + z + x + w + (added if case.activation else 0)
        written += x + w + added
    return read, written


def _touched(problem: Problem) -> int:
    """The size class of what a call goes over."""
    return size_class(sum(traffic(problem)) * problem.copies)


def sizes(problem: AnyProblem) -> set[int]:
    """The size classes whose bandwidth bound() wants."""
    layers = [problem.layer(case) for case in problem.cases] if isinstance(problem, NetworkProblem) else [problem]
    return {_touched(layer) for layer in layers}


def _move(read: int, written: int, bandwidth: Bandwidth) -> float:
    """Seconds: what is both read and written as a copy, the rest alone."""
    both = min(read, written)
    return 2 * both / bandwidth.copy + (read - both) / bandwidth.read + (written - both) / bandwidth.write


def bound(problem: AnyProblem, limits: Limits) -> Bound:
    """Of a network: the sum of its layers' and its classifier's."""
    if isinstance(problem, NetworkProblem):
        layers = [bound(problem.layer(case), limits) for case in problem.cases]
        classifier = (problem.flops - sum(problem.layer(case).flops for case in problem.cases)) / limits.flops
        return Bound(classifier + sum(layer.seconds for layer in layers), "layers")
    read, written = traffic(problem)
    memory = _move(read, written, limits.bandwidths[_touched(problem)])
    compute = problem.flops / limits.flops
    return Bound(memory, "memory") if memory > compute else Bound(compute, "compute")
