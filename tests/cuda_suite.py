"""The tests of the CUDA kernels against the oracle, for the host and for a GPU: who imports them defines two fixtures.

`library`: the CUDA library; `on_the_device`: `raw` runs its kernels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import Case, depthwise_cases, op_cases
from raw_problem import Problem

from fusedconvbn import raw

# Pixels of several ranges, of sums of channels (256 pixels) and of the filters' gradient (1024).
RANGES = [
    Case(
        data_format=data_format, batch=3, height=37, width=41, in_channels=c, out_channels=k, groups=groups,
        training=training, activation="relu", residual=True, dtype=dtype,
    )
    for data_format in ("NHWC", "NCHW")
    for c, k, groups, training, dtype in ((5, 9, 1, True, "f32"), (6, 6, 6, True, "bf16"), (4, 8, 2, False, "f64"))
]  # fmt: skip
FAST = 3  # every third case in `make test`


def tiers(cases: list[Case]) -> list:
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if i % FAST else []) for i, case in enumerate(cases)
    ]


ALL = [replace(case, isa=None) for case in op_cases() + depthwise_cases()[::9]]
CASES = tiers(ALL) + [pytest.param(case, id=str(case)) for case in RANGES]
TRAINED = [case for case in ALL + RANGES if case.training]

with_the_kernels = pytest.mark.usefixtures("on_the_device")


@with_the_kernels
@pytest.mark.parametrize("case", CASES)
def test_forward(case: Case):
    problem = Problem(case)
    problem.check_forward(problem.run_forward())


@with_the_kernels
@pytest.mark.parametrize("case", CASES)
def test_backward(case: Case):
    problem = Problem(case)
    problem.check_backward(problem.run_backward())


@with_the_kernels
@pytest.mark.parametrize("case", tiers(TRAINED[::5]))
def test_backward_computes_z_again(case: Case):
    problem = Problem(case, start="again")
    problem.saved["conv_out"] = None
    problem.check_backward(problem.run_backward(save="recompute"))


@with_the_kernels
@pytest.mark.parametrize("case", tiers([case for case in TRAINED if case.dtype == "f32"][::2]))
def test_z_in_bfloat16(case: Case):
    forward, backward = Problem(case), Problem(case, start="bfloat16")
    result = forward.run_forward(save="bfloat16")
    assert result.conv_out.ndim == 1
    forward.check_forward(result)
    backward.check_backward(backward.run_backward("bfloat16", save="bfloat16"))


@with_the_kernels
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("case", TRAINED[::59], ids=str)
def test_gradients_that_nobody_asks_for(case: Case, needs: tuple[bool, bool]):
    problem = Problem(case)
    result = problem.run_backward(needs_inputs=needs[0], needs_filters=needs[1])
    problem.check_backward(result, *needs)


@with_the_kernels
@pytest.mark.parametrize("ratio", [0, 10, 1e2, 1e3, 1e4])
def test_variance_under_a_large_mean(ratio: float):
    z = np.random.default_rng(7).normal(ratio, 1, (4, 31, 29, 5)).astype(np.float32)
    filters, ones = np.eye(5, dtype=np.float32)[None, None], np.ones(5, np.float32)
    result = raw.forward(z, filters, ones, ones, ones, ones, epsilon=0, training=True)
    np.testing.assert_allclose(result.inv_std.astype(np.float64) ** -2, z.astype(np.float64).var((0, 1, 2)), rtol=1e-6)


def test_images_that_are_too_large(library):
    params = raw._params(
        (1, 2**20, 2**20, 1), (1, 1, 1, 1), strides=1, dilations=1, padding="VALID", data_format="NHWC"
    )
    with pytest.raises(RuntimeError, match="more than 2\\^31 - 1 pixels has no GPU kernel"):
        library.forward(params, [0] * 13, 0, 0)
