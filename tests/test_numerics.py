"""Numerics: what goes wrong in batch normalization when sums are taken carelessly."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import ACTIVATIONS, Arrays, Case, arrays
from raw_problem import Problem
from reference import BLOCK_ROWS

from fusedconvbn import raw

EPS = float(np.finfo(np.float32).eps)
CHANNELS = 24

# 1x1 convolutions that copy their input: z is the test's data to the last bit.
COPIES = {
    "dense": Case(batch=2, height=37, width=41, in_channels=CHANNELS, out_channels=CHANNELS, kernel=(1, 1)),
    "depthwise": Case(
        batch=2, height=37, width=41, in_channels=CHANNELS, out_channels=CHANNELS, kernel=(1, 1), groups=CHANNELS
    ),
}


def copy_filters(case: Case) -> np.ndarray:
    ones = np.ones if case.groups > 1 else lambda shape: np.eye(shape[2]).reshape(shape)
    return ones(case.filters_shape).astype(case.numpy_dtype)


def copying(kind: str, z: np.ndarray, **changes) -> Problem:
    """A problem in training whose z is the NHWC array `z`."""
    case = replace(COPIES[kind], batch=z.shape[0], height=z.shape[1], width=z.shape[2], training=True, **changes)
    image = z if case.data_format == "NHWC" else np.moveaxis(z, 3, 1)
    return Problem(case, replace(arrays(case), inputs=image.astype(case.numpy_dtype), filters=copy_filters(case)))


def batch_variance(problem: Problem) -> np.ndarray:
    """With momentum 0 the new moving variance is the variance of the batch."""
    return raw.forward(*problem.arguments, **{**problem.case.attributes, "momentum": 0.0}).moving_variance


def relative_variance_error(variance: np.ndarray, z: np.ndarray) -> float:
    exact = z.astype(np.float64).var(axis=(0, 1, 2))
    return float(np.max(np.abs(variance - exact) / exact))


def normal(mean: float = 0.0, shape=(2, 37, 41, CHANNELS)) -> np.ndarray:
    return (np.random.default_rng(7).standard_normal(shape) + mean).astype(np.float32)


@pytest.mark.parametrize("mean", [0, 10, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", COPIES)
def test_variance_is_as_good_as_stock_under_a_large_mean(kind, data_format, mean):
    tf = pytest.importorskip("tensorflow")
    z, count = normal(mean), 2 * 37 * 41
    ones = np.ones(CHANNELS, np.float32)
    stock = tf.compat.v1.nn.fused_batch_norm(z, ones, ones, is_training=True)[2].numpy() * (count - 1) / count
    ours = relative_variance_error(batch_variance(copying(kind, z, data_format=data_format)), z)
    assert ours <= max(3 * relative_variance_error(stock, z), 4 * EPS)


@pytest.mark.parametrize("kind", COPIES)
def test_output_under_a_large_mean(kind):
    """xhat errs by no more than the rounding of the mean: by eps mean / std."""
    z = normal(1e4)
    problem = copying(kind, z)
    exact = z.astype(np.float64)
    xhat = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + problem.case.epsilon)
    expected = problem.arguments.gamma * xhat + problem.arguments.beta
    error = np.abs(problem.run_forward().output - expected) / np.abs(problem.arguments.gamma)
    assert np.max(error) <= 2 * 1e4 * EPS


@pytest.mark.parametrize("position", [0, 1, 95, 96, 2 * 37 * 41 - 1])
@pytest.mark.parametrize("size", [1e4, 1e8, 1e15])
@pytest.mark.parametrize("kind", COPIES)
def test_variance_with_an_outlier(kind, size, position):
    """In the first row it would be the shift of a careless shifted sum. The others' squares, all alike, round alike."""
    z = normal()
    z.reshape(-1, CHANNELS)[position] = size
    assert relative_variance_error(batch_variance(copying(kind, z)), z) <= BLOCK_ROWS / 2 * EPS


@pytest.mark.parametrize("kind", COPIES)
def test_variance_of_a_million_pixels(kind):
    z = normal(3.0, (20, 240, 209, 4))
    problem = copying(kind, z, in_channels=4, out_channels=4, groups=min(4, COPIES[kind].groups))
    assert relative_variance_error(batch_variance(problem), z) <= 8 * EPS


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e15])
@pytest.mark.parametrize("kind", COPIES)
def test_constant_channel(kind, value):
    """Its variance is 0 or next to it, its output beta, its gradient 0; other channels do not notice."""
    z = normal()
    z[..., 5] = value
    problem = copying(kind, z)
    variance = float(batch_variance(problem)[5])
    assert 0 <= variance <= (EPS * value) ** 2
    if abs(value) > 1e4:
        return  # a bit of the mean is more than sqrt(epsilon)
    problem.check_forward(problem.run_forward())
    problem.check_backward(problem.run_backward())


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", COPIES)
def test_one_element_a_channel(kind, unbiased, data_format):
    problem = copying(kind, normal(shape=(1, 1, 1, CHANNELS)), unbiased=unbiased, data_format=data_format)
    result = problem.run_forward()
    np.testing.assert_array_equal(batch_variance(problem), np.zeros(CHANNELS))
    np.testing.assert_array_equal(result.output.ravel(), problem.arguments.beta)
    problem.check_forward(result)
    problem.check_backward(problem.run_backward())


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_inputs_in_inference(activation, isa, dtype, available_isas):
    """NaN and infinities come out exactly where the formula says so, relu(NaN) = NaN, whatever lies beside them."""
    if isa not in available_isas:
        pytest.skip(f"this machine has no {isa}")
    case = Case(dtype=dtype, batch=2, height=9, width=11, in_channels=5, out_channels=19, activation=activation)
    problem = Problem(case)
    inputs = problem.arguments.inputs
    inputs[0, 0, 0, 0], inputs[0, 4, 5, 1], inputs[1, 8, 10, 4], inputs[1, 4, 4, 2] = np.nan, np.inf, -np.inf, np.nan
    with np.errstate(all="ignore"):
        assert np.isnan(problem.forward.output.value).sum() >= 8 * 19
        problem.check_forward(problem.run_forward(isa=isa))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", COPIES)
def test_non_finite_channel_in_training(kind, bad):
    """It makes the statistics of its own channel non-finite, and of no other; a dense z mixes channels (0 * NaN)."""
    z = normal()
    z[1, 3, 5, 7] = bad
    result = copying(kind, z, activation="relu").run_forward()
    lost = [7] if kind == "depthwise" else list(range(CHANNELS))
    assert list(np.flatnonzero(~np.isfinite(result.batch_mean))) == lost
    assert np.isnan(result.output[..., lost]).all()
    assert np.isnan(result.moving_variance[lost]).all()
    kept = np.setdiff1d(np.arange(CHANNELS), lost)
    assert np.isfinite(result.output[..., kept]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_nan_infinity_and_zero_are_tensorflows(activation):
    tf = pytest.importorskip("tensorflow")
    stock = {
        None: tf.identity, "relu": tf.nn.relu, "relu6": tf.nn.relu6, "leaky_relu": tf.nn.leaky_relu, "elu": tf.nn.elu,
        "silu": tf.nn.silu, "gelu": lambda u: tf.nn.gelu(u, approximate=False),
        "hard_swish": lambda u: u * tf.nn.relu6(u + 3) / 6,
    }  # fmt: skip
    u = np.array([np.nan, np.inf, 100, 6, 1e-30, 0, -1e-30, -3, -20, -100], np.float32).reshape(1, 1, -1, 1)
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    ours = raw.forward(u, np.ones((1, 1, 1, 1), np.float32), one, zero, zero, one, activation=activation, epsilon=0.0)
    expected = stock[activation](u).numpy()
    np.testing.assert_allclose(ours.output, expected, rtol=1e-6, atol=1e-30 if activation != "gelu" else 2e-7)


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", COPIES)
def test_gradient_of_z_is_orthogonal_to_ones_and_to_xhat(kind, activation, mean):
    """With epsilon 0 a shift and a scale of z change nothing."""
    problem = copying(kind, normal(mean), activation=activation, epsilon=0.0)
    result = raw.backward(problem.upstream[0], *problem.arguments, **problem.saved, **problem.case.attributes)
    dz, z = (array.astype(np.float64) for array in (result.inputs, problem.arguments.inputs))
    xhat = (z - z.mean((0, 1, 2))) / z.std((0, 1, 2))
    size = np.abs(problem.arguments.gamma) * np.abs(problem.upstream[0]).astype(np.float64).sum((0, 1, 2))
    assert np.all(np.abs(dz.sum((0, 1, 2))) <= 4 * EPS * (1 + mean) * size)
    assert np.all(np.abs((dz * xhat).sum((0, 1, 2))) <= 4 * EPS * (1 + mean) * size)


@pytest.mark.parametrize("channels", [(15, 17), (31, 33), (33, 47), (5, 97)], ids=str)
@pytest.mark.parametrize("size", [(1, 95), (1, 97), (7, 7), (13, 29)], ids=str)
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_partial_tiles_under_asymmetric_padding(data_format, size, channels):
    """Odd sizes, channels that fill no vector, SAME with stride 2, which pads behind only where sizes are even."""
    case = Case(
        data_format=data_format, height=2 * size[0], width=2 * size[1], in_channels=channels[0], residual=True,
        out_channels=channels[1], strides=(2, 2), training=True, activation="leaky_relu",
    )  # fmt: skip
    problem = Problem(case)
    problem.check_forward(problem.run_forward())
    problem.check_backward(problem.run_backward())


def test_half_precision_output_overflows_to_infinity():
    """float16 ends at 65504; the sums behind it do not."""
    case = Case(dtype="f16", in_channels=4, out_channels=3, kernel=(1, 1))
    base = arrays(case)
    arguments = Arrays(base.inputs * 100, base.filters * 100, base.gamma * 100, *list(base)[3:])
    problem = Problem(case, arguments)
    with np.errstate(over="ignore"):
        result = problem.run_forward()
    exact = problem.forward.output.value
    assert (np.abs(exact) > 66000).any()
    np.testing.assert_array_equal(np.isinf(result.output), np.abs(exact) >= 65520)


def float32_samples(dtype: np.dtype) -> np.ndarray:
    """Every magnitude of the 16-bit `dtype`, the middle between each two, and their float32 neighbours."""
    exact = np.arange(0, 0x8000, dtype=np.uint16).view(dtype).astype(np.float32)
    exact = exact[np.isfinite(exact)]
    middles = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    edges = np.concatenate([exact, middles, np.float32([exact[-1] * (1 + 2**-9), np.inf, np.nan, 3e38])])
    return np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf)), -edges])


@pytest.mark.parametrize("kernel", [row for row in raw.kernels() if row.stage == "forward"], ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_rounding_to_half_precision_is_to_nearest_even(dtype, kernel):
    """One pixel under the middle of 3x3 filters: z = 1, gamma = what is to be rounded, so output = gamma, rounded."""
    if not kernel.available:
        pytest.skip(f"this machine has no {kernel.isa}")
    if kernel.isa == "amx" and dtype != "bf16":
        pytest.skip("for bfloat16 only")
    data = Case(dtype=dtype).numpy_dtype
    with np.errstate(all="ignore"):
        gamma = float32_samples(data)
        expected = (gamma + np.float32(0)).astype(data)
    zeros, ones = np.zeros_like(gamma), np.ones_like(gamma)
    inputs, filters = np.ones((1, 1, 1, 1), data), np.zeros((3, 3, 1, len(gamma)), data)
    filters[1, 1] = 1
    options = {"padding": "SAME", "epsilon": 0.0, "kernel": kernel.name}
    output = raw.forward(inputs, filters, gamma, zeros, zeros, ones, **options).output
    if kernel.isa == "amx":  # its instruction takes subnormals for 0
        expected[np.abs(gamma) < ml_dtypes.finfo(data).smallest_normal] = 0
    np.testing.assert_array_equal(output.ravel().astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_half_precision_number_is_read_and_written(dtype, data_format, isa, available_isas):
    if isa not in available_isas:
        pytest.skip(f"this machine has no {isa}")
    data = Case(dtype=dtype).numpy_dtype
    shape = (1, 64, 64, 16) if data_format == "NHWC" else (1, 16, 64, 64)
    inputs = np.arange(0x10000, dtype=np.uint16).view(data).reshape(shape)
    zeros, ones = np.zeros(16, np.float32), np.ones(16, np.float32)
    filters = np.ones((1, 1, 1, 16), data)  # depthwise
    output = raw.forward(
        inputs, filters, ones, zeros, zeros, ones, epsilon=0.0, data_format=data_format, isa=isa
    ).output
    np.testing.assert_array_equal(output.astype(np.float32), inputs.astype(np.float32))
