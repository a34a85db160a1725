"""Numerics of Winograd's kernels: their statistics are those of z as stored, and what is not finite stays local."""

from dataclasses import replace

import numpy as np
import pytest
from cases import ACTIVATIONS, Case, arrays
from compare import Expected, assert_close
from raw_problem import Problem

from fusedconvbn import raw

EPS = float(np.finfo(np.float32).eps)
CASE = Case(batch=2, height=39, width=43, in_channels=24, out_channels=24, padding="VALID", training=True)
TILES = {"winograd2": 2, "winograd4": 4}  # pixels of an output tile, in each dimension
ROUNDING = {"winograd2": 0, "winograd4": 8}  # of the copy of a pixel, at most, in EPS
ALGORITHMS = pytest.mark.parametrize("algorithm", TILES)
ISAS = pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])


def copying(z: np.ndarray, **changes) -> Problem:
    """Filters that copy the pixel in their middle, so that z is `z` without its border, but for rounding."""
    case = replace(CASE, batch=z.shape[0], height=z.shape[1], width=z.shape[2], **changes)
    filters = np.zeros(case.filters_shape)
    filters[1, 1] = np.eye(24)
    image = z if case.data_format == "NHWC" else np.moveaxis(z, 3, 1)
    inputs = image.astype(case.numpy_dtype)
    return Problem(case, replace(arrays(case), inputs=inputs, filters=filters.astype(case.numpy_dtype)))


def normal(mean: float = 0.0, shape=(2, 39, 43, 24)) -> np.ndarray:
    return (np.random.default_rng(7).standard_normal(shape) + mean).astype(np.float32)


def variance_and_z(problem: Problem, **options) -> tuple[np.ndarray, np.ndarray]:
    """Of the batch, by kernels of Winograd's; z as NHWC."""
    attributes = {**problem.case.attributes, "momentum": 0.0}
    result = raw.forward(*problem.arguments, **attributes, **options)
    z = result.conv_out if problem.case.data_format == "NHWC" else np.moveaxis(result.conv_out, 1, 3)
    return result.moving_variance, z


def relative_variance_error(variance: np.ndarray, z: np.ndarray) -> float:
    exact = z.astype(np.float64).var(axis=(0, 1, 2))
    return float(np.max(np.abs(variance - exact) / exact))


@ALGORITHMS
@pytest.mark.parametrize("mean", [0, 10, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_variance_is_as_good_as_stock_under_a_large_mean(data_format, mean, algorithm):
    tf = pytest.importorskip("tensorflow")
    variance, z = variance_and_z(copying(normal(mean), data_format=data_format, algorithm=algorithm))
    count, ones = z.size // 24, np.ones(24, np.float32)
    stock = tf.compat.v1.nn.fused_batch_norm(z, ones, ones, is_training=True)[2].numpy() * (count - 1) / count
    assert relative_variance_error(variance, z) <= max(3 * relative_variance_error(stock, z), 4 * EPS)


@ALGORITHMS
@ISAS
@pytest.mark.parametrize("position", [(0, 1, 1), (1, 20, 20), (1, 37, 41)], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e15])
def test_variance_with_an_outlier(size, position, isa, algorithm):
    image = normal()
    image[position] = size
    assert relative_variance_error(*variance_and_z(copying(image, algorithm=algorithm), isa=isa)) <= 48 * EPS


@ALGORITHMS
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_constant_channel(value, algorithm):
    image = normal()
    image[..., 5] = value
    problem = copying(image, algorithm=algorithm)
    variance, z = variance_and_z(problem)
    rounding = ROUNDING[algorithm] * EPS * abs(value)
    assert np.ptp(z[..., 5]) <= 2 * rounding
    assert 0 <= variance[5] <= max(rounding, EPS * abs(value)) ** 2
    problem.check_forward(problem.run_forward())
    problem.check_backward(problem.run_backward())


@ALGORITHMS
@pytest.mark.parametrize("unbiased", [False, True])
def test_one_element_a_channel(unbiased, algorithm):
    problem = copying(normal(shape=(1, 3, 3, 24)), unbiased=unbiased, algorithm=algorithm)
    result = problem.run_forward()
    np.testing.assert_array_equal(result.output.ravel(), problem.arguments.beta)
    problem.check_forward(result)
    problem.check_backward(problem.run_backward())


@ALGORITHMS
@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(training, algorithm):
    case = replace(CASE, batch=0, training=training, algorithm=algorithm)
    arguments = arrays(case)
    result = raw.forward(*arguments, **case.attributes)
    assert result.output.shape == (0, 37, 41, 24)
    np.testing.assert_array_equal(result.moving_mean, arguments.moving_mean)
    saved = {name: getattr(result, name) for name in ("output", "batch_mean", "inv_std", "conv_out")}
    gradients = raw.backward(result.output, *arguments, **saved, **case.attributes)
    assert gradients.inputs.shape == case.inputs_shape
    for gradient in (gradients.filters, gradients.gamma, gradients.beta):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def tiles_that_read(bad: np.ndarray, tile: int) -> np.ndarray:
    """The square tiles of an output [N,H,W] that read one of the marked pixels, by 3x3 filters and SAME padding."""
    lost = np.zeros_like(bad)
    for n, h, w in np.argwhere(bad):
        rows, columns = (slice(max(0, (at - 1) // tile * tile), (at + 1) // tile * tile + tile) for at in (h, w))
        lost[n, rows, columns] = True  # tile t reads pixels t * tile - 1 to t * tile + tile
    return lost


@ALGORITHMS
@ISAS
@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_inputs_in_inference(activation, dtype, isa, algorithm):
    """Wherever the formula gives NaN so do we; what else is not as it should be lies in tiles that read such inputs."""
    case = Case(
        dtype=dtype, batch=2, height=9, width=11, in_channels=5, out_channels=19, algorithm=algorithm,
        activation=activation,
    )  # fmt: skip
    finite = Problem(case)
    bad = finite.arguments.inputs.copy()
    bad[0, 0, 0, 0], bad[0, 4, 5, 1], bad[1, 8, 10, 4], bad[1, 4, 4, 2] = np.nan, np.inf, -np.inf, np.nan
    problem = Problem(case, replace(finite.arguments, inputs=bad))
    with np.errstate(all="ignore"):
        output, formula = problem.run_forward(isa=isa).output.astype(np.float64), problem.forward.output.value
    lost = tiles_that_read(~np.isfinite(bad.astype(np.float64)).all(-1), TILES[algorithm])
    assert np.isnan(formula).sum() >= 8 * 19
    assert np.isnan(output[np.isnan(formula)]).all()
    assert not np.isfinite(output[np.isinf(formula)]).any()
    expected = finite.forward.output
    assert_close(output[~lost], Expected(expected.value[~lost], expected.tolerance[~lost]))
