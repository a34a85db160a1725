"""Random normal inputs, the same in every process: each array has a generator of its own, seeded by its place."""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

from benchmarks.implementations import TRAIN_STEP
from benchmarks.networks import Weights
from benchmarks.problem import Problem

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


@dataclasses.dataclass(frozen=True)
class Data:
    """One copy's tensors in the problem's type, [K] vectors in the type of its statistics."""

    inputs: np.ndarray
    weights: Weights  # filters scaled so that the convolution's output has variance 1
    residual: np.ndarray | None
    output_gradient: np.ndarray | None


def normal(seed: list[int], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Drawn in float32 at least, then rounded to `dtype`."""
    draw = np.float64 if dtype == "float64" else np.float32
    return np.random.default_rng(seed).standard_normal(shape, dtype=draw).astype(DTYPES[dtype], copy=False)


def make_data(problem: Problem, copy: int = 0) -> Data:
    """The data of one copy; the copies share filters and vectors."""
    dtype = problem.dtype
    wide = "float64" if dtype == "float64" else "float32"
    case, shape = problem.case, problem.case.output_shape(problem.batch)

    def vector(place: int) -> np.ndarray:
        return normal([place], (case.out_channels,), wide)

    fan_in = math.prod(case.filter_shape[:3])
    filters = normal([1], case.filter_shape, wide) / math.sqrt(fan_in)
    return Data(
        inputs=normal([0, copy], case.input_shape(problem.batch), dtype),
        weights=Weights(
            filters=filters.astype(DTYPES[dtype]),
            gamma=1 + 0.1 * vector(2),
            beta=0.1 * vector(3),
            moving_mean=0.1 * vector(4),
            moving_variance=0.5 + np.abs(vector(5)),
        ),
        residual=normal([6, copy], shape, dtype) if case.residual else None,
        output_gradient=normal([7, copy], shape, dtype) if problem.mode == TRAIN_STEP else None,
    )
