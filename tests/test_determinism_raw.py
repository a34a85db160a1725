"""The same bits for any number of threads, any alignment of the arrays, and at every repetition."""

from dataclasses import replace

import numpy as np
import pytest
from cases import Arrays, Case, depthwise_cases, raw_cases, winograd_cases
from raw_problem import Problem

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
    replace(LARGE, dtype="f64", padding="VALID", dilations=(2, 1)),
    replace(LARGE, dtype="f16", kernel=(7, 7), in_channels=3, strides=(2, 2)),
    replace(LARGE, in_channels=33, out_channels=70, algorithm="winograd2"),
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


COVERING = raw_cases() + winograd_cases() + depthwise_cases()


@pytest.mark.parametrize("case", [case for case in COVERING if case.isa == "avx512"][::40], ids=str)
def test_threads_on_covering_cases(case, available_isas):
    if case.isa not in available_isas:
        pytest.skip(f"this machine has no {case.isa}")
    problem = Problem(case)
    assert bits(problem.run_forward(threads=3, isa=case.isa)) == bits(problem.run_forward(isa=case.isa))
    assert bits(problem.run_backward(threads=3, isa=case.isa)) == bits(problem.run_backward(isa=case.isa))


def shifted(array: np.ndarray | None) -> np.ndarray | None:
    """A copy that begins one element behind an address that is a multiple of 64."""
    if array is None:
        return None
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + array.itemsize
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    assert copy.ctypes.data % 64 == array.itemsize
    return copy


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_one_element_off_alignment(case):
    problem = Problem(case)
    moved = Problem(case, Arrays(*(shifted(array) for array in problem.arguments)))
    moved.__dict__["saved"] = {name: shifted(array) for name, array in problem.saved.items()}
    moved.__dict__["upstream"] = tuple(shifted(array) for array in problem.upstream)
    assert bits(moved.run_forward()) == bits(problem.run_forward())
    assert bits(moved.run_backward()) == bits(problem.run_backward())


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_strided_arrays(case):
    problem = Problem(case)
    every_other = (a if a is None else np.repeat(a, 2, axis=-1)[..., ::2] for a in problem.arguments)
    strided = Problem(case, Arrays(*every_other))
    assert not strided.arguments.inputs.flags.c_contiguous
    assert bits(strided.run_forward()) == bits(problem.run_forward())
    assert bits(strided.run_backward()) == bits(problem.run_backward())
