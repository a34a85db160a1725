"""The tests of the ops' kernels for a GPU: who imports them defines the fixture `process` (op_harness.process)."""

from __future__ import annotations

import op_harness
import pytest
from cases import Case
from cuda_suite import ALL, RANGES, TENSOR, TRAINED, problem_of
from raw_problem import Problem

from fusedconvbn import _load

CASES = [*ALL[::11], *RANGES, *TENSOR[:3]]


@pytest.fixture
def core(process, monkeypatch):
    core = op_harness.Core(process)
    monkeypatch.setattr(_load, "core", lambda: core)
    return core


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case):
    problem = problem_of(case)
    problem.check_forward(problem.run_forward())


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case):
    problem = problem_of(case)
    problem.check_backward(problem.run_backward())


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("save", ["bfloat16", "recompute"])
@pytest.mark.parametrize("case", [case for case in TRAINED if case.dtype == "f32"][::9], ids=str)
def test_what_forward_saves(case: Case, save: str):
    forward, backward = problem_of(case), problem_of(case, "bfloat16" if save == "bfloat16" else "again")
    result = forward.run_forward(save=save)
    assert (result.conv_out is None) == (save == "recompute")
    forward.check_forward(result)
    backward.check_backward(backward.run_backward("nothing" if save == "recompute" else save, save=save))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_that_nobody_asks_for(needs: tuple[bool, bool]):
    problem = problem_of(TRAINED[0])
    problem.check_backward(problem.run_backward(needs_inputs=needs[0], needs_filters=needs[1]), *needs)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("training", [False, True])
def test_no_pixels(training: bool):
    problem = Problem(Case(batch=0, in_channels=4, training=training))
    problem.check_forward(problem.run_forward())
    problem.check_backward(problem.run_backward())


@pytest.mark.usefixtures("core")
def test_moments_that_another_device_saved():
    """The gradient computes z again."""
    problem = Problem(Case(training=True, kernel=(1, 1), in_channels=6, out_channels=24), start="again")
    problem.check_backward(problem.run_backward("moments"))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("algorithm", ["winograd2", "winograd4"])
def test_algorithms_that_a_gpu_has_not(algorithm: str):
    problem = Problem(Case(kernel=(3, 3)))
    for run in (problem.run_forward, problem.run_backward):
        with pytest.raises(RuntimeError, match=f"INVALID_ARGUMENT: algorithm must be .* on a GPU.*: .{algorithm}"):
            run(algorithm=algorithm)


@pytest.mark.usefixtures("core")
def test_what_the_kernels_refuse():
    """An error of the library is the op's."""
    with pytest.raises(RuntimeError, match="INTERNAL: strides, paddings or filters of more than"):
        Problem(Case(kernel=(1, 1), strides=(2**32, 1))).run_forward()
