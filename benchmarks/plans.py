"""What the core plans for a problem, and how much of it training keeps for backward."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from benchmarks.problem import EPSILON, MOMENTUM, NetworkProblem, Problem
from fusedconvbn import raw


def plan(
    problem: Problem, direction: str = "forward", kernel: str | None = None, saved: str = "conv", threads: int = 1
) -> Any:
    """What `raw.plan` says; a ValueError if `kernel` does not support the problem."""
    case = problem.case
    return raw.plan(
        case.input_shape(problem.batch), case.filter_shape, dtype=problem.dtype, strides=case.stride,
        dilations=case.dilation, padding=case.op_padding, activation=case.activation, residual=case.residual,
        training=problem.training, epsilon=EPSILON, momentum=MOMENTUM, algorithm=problem.algorithm,
        save=problem.save, direction=direction, saved=saved, kernel=kernel, threads=threads,
    )  # fmt: skip


def kept_outputs(problems: Iterable[Problem | NetworkProblem]) -> float:
    """The elements that training keeps for backward, the outputs themselves among them, over those of the outputs."""
    outputs = kept = 0
    for problem in problems:
        layers = [problem.layer(case) for case in problem.cases] if isinstance(problem, NetworkProblem) else [problem]
        for layer in layers:
            elements = problem.times * math.prod(layer.case.output_shape(layer.batch))
            outputs += elements
            kept += elements + problem.times * math.prod(plan(layer).conv_out_shape or [0])
    return kept / outputs
