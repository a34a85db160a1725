"""The kernels, through `raw`, on the covering cases against the float64 oracle: forward and backward."""

import pytest
from cases import depthwise_cases, raw_cases, winograd_cases
from raw_problem import Problem


def test_there_are_enough_cases():
    assert len(raw_cases()) >= 600
    assert len({str(case) for case in raw_cases()}) == len(raw_cases())


@pytest.mark.parametrize("case", raw_cases() + winograd_cases() + depthwise_cases(), ids=str)
def test_forward_and_backward(case):
    problem = Problem(case)
    problem.check_forward(problem.run_forward(isa=case.isa))
    problem.check_backward(problem.run_backward(isa=case.isa))
