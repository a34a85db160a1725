"""Products of float32 numbers that are cut in three: what is not finite, what is large, how much they err."""

import numpy as np
import pytest
from cases import Case
from raw_problem import Problem

from fusedconvbn import raw

pytestmark = pytest.mark.isa("amx")
CASE = Case(batch=2, height=9, width=11, in_channels=70, out_channels=90, kernel=(1, 1))
BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["inputs", "filters", "both"])
def test_non_finite_arguments(where, bad):
    """They come out exactly where the formula says so: infinity times a number with thirds of 0 is infinity."""
    problem = Problem(CASE)
    inputs, filters = problem.arguments.inputs, problem.arguments.filters
    inputs[0, 1, 2, :8], filters[0, 0, :8] = np.arange(8) - 4, np.round(filters[0, 0, :8] * 4) / 4
    if where != "filters":
        inputs[0, 1, 2, 3], inputs[1, 7, 8, 69] = bad, -bad
    if where != "inputs":
        filters[0, 0, 3, 5], filters[0, 0, 69, 80] = bad, bad
    with np.errstate(all="ignore"):
        assert (~np.isfinite(problem.forward.output.value)).sum() >= 90
        problem.check_forward(problem.run_forward(kernel="forward_thirds_amx"))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("row", ["dgrad_thirds_amx", "wgrad_thirds_amx"])
def test_gradients_of_what_is_not_finite(row, bad):
    problem = Problem(CASE)
    output_gradient = problem.upstream[0].copy()
    output_gradient[0, 3, 4, 2], output_gradient[1, 0, 0, 7] = bad, -bad
    problem.__dict__["upstream"] = (output_gradient, *problem.upstream[1:])
    problem.arguments.inputs[0, 5, 5, 5] = bad
    with np.errstate(all="ignore"):
        expected, result = problem.backward, problem.run_backward(kernel=row)
        for name in ("inputs", "filters"):
            actual, right = getattr(result, name), getattr(expected, name).value
            np.testing.assert_array_equal(np.isnan(actual), np.isnan(right))
            np.testing.assert_array_equal(np.isinf(actual), np.isinf(right))
            assert (~np.isfinite(right)).any()


def random_product(depth: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(depth)
    inputs = (rng.standard_normal((1, 8, 12, depth)) * scale).astype(np.float32)
    filters = rng.standard_normal((1, 1, depth, 64)).astype(np.float32)
    return inputs, filters, inputs.astype(np.float64)[0] @ filters.astype(np.float64)[0, 0]


def rms_error(inputs: np.ndarray, filters: np.ndarray, exact: np.ndarray, kernel: str) -> float:
    ones, zeros = np.ones(64, np.float32), np.zeros(64, np.float32)
    output = raw.forward(inputs, filters, ones, zeros, zeros, ones, epsilon=0.0, kernel=kernel).output
    return float(np.sqrt(np.mean((output[0] - exact) ** 2) / np.mean(exact**2)))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e37])
@pytest.mark.parametrize("depth", [32, 200, 960])
def test_errs_no_more_than_the_direct_algorithm(depth, scale):
    product = random_product(depth, scale)
    error = rms_error(*product, "forward_thirds_amx")
    assert error <= 1.05 * rms_error(*product, "forward_direct_generic")
    assert error > 0


def test_takes_the_largest_numbers():
    """Whose upper half rounded to nearest would be infinite."""
    inputs = np.full((1, 1, 1, 64), 0, np.float32)
    inputs[..., 3] = np.finfo(np.float32).max
    filters = np.full((1, 1, 64, 64), 0, np.float32)
    filters[0, 0, 3] = 0.5
    error = rms_error(
        inputs, filters, inputs.astype(np.float64)[0] @ filters.astype(np.float64)[0, 0], "forward_thirds_amx"
    )
    assert error <= np.finfo(np.float32).eps
