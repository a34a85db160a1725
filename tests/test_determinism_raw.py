"""The same bits for any number of threads, any alignment of the arrays, and at every repetition."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cases import Arrays, Case
from fuzz import draw, runs
from raw_problem import Problem

from fusedconvbn import raw

FAST, SLOW = 50, 70  # problems drawn by a seed
WORK = 6_000_000  # multiply-adds of one
LARGE = Case(
    batch=3, height=29, width=23, in_channels=17, out_channels=40, training=True, residual=True, activation="gelu"
)
CASES = [
    LARGE,
    replace(LARGE, data_format="NCHW", strides=(2, 2), activation="relu"),
    replace(LARGE, groups=17, out_channels=34, residual=False),
    replace(LARGE, batch=1, height=67, width=101, in_channels=40, groups=40),
    replace(LARGE, batch=1, height=67, width=31, in_channels=40, groups=40, strides=(2, 2), training=False),
    replace(LARGE, training=False, dtype="bf16", kernel=(1, 1)),
    replace(LARGE, training=False, dtype="bf16", kernel=(1, 1), in_channels=64, out_channels=288, activation="relu"),
    replace(LARGE, training=False, dtype="bf16", in_channels=64, out_channels=96, activation="relu", residual=False),
    replace(LARGE, dtype="bf16", kernel=(1, 1), inputs_mean=300.0),
    replace(LARGE, dtype="bf16", padding="VALID", inputs_mean=300.0),
    replace(LARGE, height=67, width=61, kernel=(1, 1), in_channels=40, out_channels=24),
    replace(LARGE, dtype="f64", padding="VALID", dilations=(2, 1)),
    replace(LARGE, dtype="f16", kernel=(7, 7), in_channels=3, strides=(2, 2)),
    replace(LARGE, in_channels=33, out_channels=70, algorithm="winograd2"),
    replace(LARGE, batch=3, height=29, width=30, in_channels=40, algorithm="winograd4"),
    replace(LARGE, batch=1, data_format="NCHW", out_channels=130, dtype="bf16", algorithm="winograd2"),
]


def bits(results) -> list[bytes | None]:
    return [None if array is None else array.tobytes() for array in results]


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads(case, threads, kernel):
    if kernel:
        case = replace(case, batch=1, height=9, width=8)
    problem = Problem(case)
    forced = [kernel and f"{direction}_{kernel}" for direction in ("forward", "backward")]
    assert bits(problem.run_forward(threads=threads, kernel=forced[0])) == bits(problem.run_forward(kernel=forced[0]))
    assert bits(problem.run_backward(threads=threads, kernel=forced[1])) == bits(problem.run_backward(kernel=forced[1]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repetition(case):
    problem = Problem(case)
    forward, backward = bits(problem.run_forward(threads=2)), bits(problem.run_backward(threads=2))
    for _ in range(5):
        assert bits(problem.run_forward(threads=2)) == forward
        assert bits(problem.run_backward(threads=2)) == backward


def large_draws(count: int) -> list[int]:
    """Seeds of problems of several tasks: many blocks of pixels."""
    seeds = (seed for seed in itertools.count() if _pixels(draw(seed, WORK).case) >= 400)
    return list(itertools.islice(seeds, count))


def _pixels(case: Case) -> int:
    return math.prod(case.output_shape) // case.out_channels


LARGE_DRAWS = large_draws(FAST + SLOW)


def by_own_forward(case: Case) -> Problem:
    """A problem whose backward pass starts from what `raw.forward` saves, z in training: no oracle is needed."""
    problem = Problem(case)
    forward = problem.run_forward(algorithm="direct")
    problem.saved = {name: getattr(forward, name) for name in ("output", "conv_out", "batch_mean", "inv_std")}
    vectors = problem.case.random("upstream").standard_normal((2, case.out_channels)).astype(case.stat_dtype)
    problem.upstream = (forward.output, *vectors)
    return problem


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[pytest.mark.slow] if i >= FAST else []) for i, s in enumerate(LARGE_DRAWS)]
)
def test_threads_on_drawn_problems(seed):
    """Every kernel that supports the problem."""
    case = draw(seed, WORK).case
    problem = by_own_forward(case)
    for run in runs(case):
        call = problem.run_forward if run.direction == "forward" else partial(problem.run_backward, run.saved)
        alone = bits(call(**run.forced))
        for threads in (2, 3, 8):
            assert bits(call(**run.forced, threads=threads)) == alone, (
                f"{threads} threads: {run} on seed {seed}, {case}"
            )


def test_every_kernel_is_met_by_drawn_problems():
    met = {name for seed in LARGE_DRAWS[:FAST] for run in runs(draw(seed, WORK).case) for name in run.planned}
    assert {row.name for row in raw.kernels() if row.available} <= met


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_strided_arrays(case):
    problem = Problem(case)
    every_other = (a if a is None else np.repeat(a, 2, axis=-1)[..., ::2] for a in problem.arguments)
    strided = Problem(case, Arrays(*every_other))
    assert not strided.arguments.inputs.flags.c_contiguous
    assert bits(strided.run_forward()) == bits(problem.run_forward())
    assert bits(strided.run_backward()) == bits(problem.run_backward())
