"""The op, with its gradients, against the float64 oracle on the cases of `op_cases()` and some of Winograd's."""

from dataclasses import replace

import cases
import op_problems
import pytest


def test_there_are_enough_cases():
    assert len(cases.op_cases()) >= 200


WINOGRAD = [replace(case, isa=None) for case in cases.winograd_cases()[::7]]


@pytest.mark.parametrize("case", cases.op_cases() + WINOGRAD, ids=str)
def test_results_and_gradients(case):
    op_problems.assert_as_the_oracle(op_problems.results_and_gradients, case)
