"""The op, with its gradients, against the float64 oracle on the cases of `op_cases()` and some of Winograd's."""

from dataclasses import replace

import cases
import numpy as np
import op_problems
import pytest
import reference
import tensorflow as tf
from compare import assert_close

import fusedconvbn


def test_there_are_enough_cases():
    assert len(cases.op_cases()) >= 200


WINOGRAD = [replace(case, isa=None) for case in cases.winograd_cases()[::7]]


@pytest.mark.parametrize("case", cases.op_cases() + WINOGRAD, ids=str)
def test_results_and_gradients(case):
    arrays = list(cases.arrays(case))
    expected = reference.forward(*arrays, **case.attributes)
    output_gradient, *moving_gradients = (c.numpy() for c in op_problems.upstream(case))
    output_gradient = np.where(expected.near_kink, 0, output_gradient).astype(case.numpy_dtype)
    gradients = reference.backward(
        output_gradient, *arrays, moving_mean_gradient=moving_gradients[0],
        moving_variance_gradient=moving_gradients[1], **case.attributes,
    )  # fmt: skip
    names = fusedconvbn.FusedConvBNOutput._fields + tuple(f"gradient of {name}" for name in op_problems.NAMES)
    actual = op_problems.results_and_gradients(
        op_problems.function_of(fusedconvbn.fused_conv_bn, case),
        op_problems.arguments(case),
        [tf.constant(g) for g in (output_gradient, *moving_gradients)],
    )
    wanted = [*expected[:3], *(g for g in gradients if g is not None)]
    assert len(actual) == len(wanted)
    for name, a, e in zip(names, actual, wanted):
        is_data = name.split()[-1] in ("output", "inputs", "filters", "residual")
        assert_close(a.numpy(), e, name, case.numpy_dtype if is_data else case.stat_dtype)
