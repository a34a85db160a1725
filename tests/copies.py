"""Convolutions that copy their input, so that z is a test's data, and the kernels that can run them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import Case, arrays
from fuzz import runs
from raw_problem import Problem, nhwc

CHANNELS = 24
SHAPE = (2, 37, 41, CHANNELS)  # of the data, [N,H,W,C]: blocks of pixels that are not full
_CASE = Case(batch=2, in_channels=CHANNELS, out_channels=CHANNELS, kernel=(1, 1), padding="VALID", training=True)

# 3x3 filters copy the pixel in their middle; where there are more channels out than in, sources() are copied.
KINDS = {
    "pointwise": _CASE,
    "expanding": replace(_CASE, out_channels=4 * CHANNELS),
    "dense": replace(_CASE, kernel=(3, 3)),
    "depthwise": replace(_CASE, kernel=(3, 3), groups=CHANNELS),
    "multiplied": replace(_CASE, kernel=(1, 1), groups=CHANNELS, out_channels=2 * CHANNELS),
}


def copy_filters(case: Case) -> np.ndarray:
    filters = np.zeros(case.filters_shape)
    middle = filters[case.kernel[0] // 2, case.kernel[1] // 2]
    if case.groups > 1:
        middle[...] = 1
    else:
        middle[...] = np.tile(np.eye(case.in_channels), case.out_channels // case.in_channels)
    return filters.astype(case.numpy_dtype)


def sources(case: Case) -> np.ndarray:
    """The input channel that each output channel is."""
    channels = np.arange(case.out_channels)
    return channels // (case.out_channels // case.groups) if case.groups > 1 else channels % case.in_channels


def case_of(kind: str, shape: tuple[int, ...] = SHAPE, **changes: Any) -> Case:
    """The convolution of a kind that copies images of `shape`, [N,H,W,C]."""
    case, (batch, height, width, channels) = KINDS[kind], shape
    border = case.kernel[0] - 1
    return replace(
        case, batch=batch, height=height + border, width=width + border, in_channels=channels,
        out_channels=case.out_channels // CHANNELS * channels, groups=channels if case.groups > 1 else 1, **changes,
    )  # fmt: skip


def copying(case: Case, z: np.ndarray, algorithm: str, start: str = "conv") -> Problem:
    """The problem of a case whose z is channels of the NHWC array `z`: by direct algorithms to the last bit."""
    border = case.kernel[0] // 2
    image = np.pad(z, [(0, 0), (border, border), (border, border), (0, 0)], mode="edge")
    image = image if case.data_format == "NHWC" else np.moveaxis(image, 3, 1)
    case = replace(case, algorithm=algorithm)
    copied = replace(arrays(case), inputs=image.astype(case.numpy_dtype), filters=copy_filters(case))
    return Problem(case, copied, start)


def inner(case: Case, image: np.ndarray) -> np.ndarray:
    """The pixels of the NHWC input that are copied."""
    border = case.kernel[0] // 2
    return image[:, border : image.shape[1] - border, border : image.shape[2] - border]


def copied(problem: Problem) -> np.ndarray:
    """z, NHWC, but for what transforms round."""
    case = problem.case
    return inner(case, nhwc(case, problem.arguments.inputs))[..., sources(case)]


def copying_runs(direction: str, shape: tuple[int, ...] = SHAPE, **changes: Any) -> list[Any]:
    """(case, run) for each kind and each row that can run it; in bfloat16 for the rows that can run it there only."""
    parameters: list[Any] = []
    met: set[str] = set()
    for dtype in ("f32", "bf16"):
        cases = {kind: case_of(kind, shape, dtype=dtype, **changes) for kind in KINDS}
        pairs = [(kind, run) for kind, case in cases.items() for run in runs(case) if run.direction == direction]
        for kind, run in pairs:
            if not met.issuperset(run.planned):
                case = cases[kind]
                name = f"{kind}-{dtype}-{case.data_format}-{case.activation}-{run.kernel}-{run.save}-{run.saved}"
                parameters.append(pytest.param(case, run, id=name))
        met.update(name for _, run in pairs for name in run.planned)
    return parameters
