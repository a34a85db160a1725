"""Numbers at the ends of their types: what is not finite, what rounds to half precision and how."""

import ml_dtypes
import numpy as np
import pytest
from cases import ACTIVATIONS, BFLOAT16_ISAS, Arrays, Case, arrays
from raw_problem import Problem

from fusedconvbn import raw


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_inputs_in_inference(activation, isa, dtype):
    """NaN and infinities come out exactly where the formula says so, relu(NaN) = NaN, whatever lies beside them."""
    channels = 8 if isa == "avx512_bf16" else 5
    case = Case(dtype=dtype, batch=2, height=9, width=11, in_channels=channels, out_channels=19, activation=activation)
    problem = Problem(case)
    inputs = problem.arguments.inputs
    inputs[0, 0, 0, 0], inputs[0, 4, 5, 1], inputs[1, 8, 10, 4], inputs[1, 4, 4, 2] = np.nan, np.inf, -np.inf, np.nan
    with np.errstate(all="ignore"):
        assert np.isnan(problem.forward.output.value).sum() >= 8 * 19
        problem.check_forward(problem.run_forward(isa=isa))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_non_finite_inputs_in_whole_tiles(activation, isa):
    """Where results are made of the sums in registers."""
    case = Case(batch=2, height=9, width=11, kernel=(1, 1), in_channels=5, out_channels=144, activation=activation)
    problem = Problem(case)
    inputs = problem.arguments.inputs
    inputs[0, 0, 0, 0], inputs[0, 4, 5, 1], inputs[1, 3, 10, 4], inputs[1, 4, 4, 2] = np.nan, np.inf, -np.inf, np.nan
    with np.errstate(all="ignore"):
        assert np.isnan(problem.forward.output.value).sum() == 2 * 144
        problem.check_forward(problem.run_forward(kernel=f"forward_direct_{isa}"))


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


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_deviations_in_inference_are_the_rounded_ones(isa, epsilon):
    """Of all sizes, at the ends of float32 too, in whole vectors and in a part of one."""
    spread = 10 ** np.random.default_rng(1).uniform(-38, 38, 4096 - 8 + 5)
    variance = np.r_[0, np.inf, np.nan, -1, 1e-45, 1e-38, 3e38, 1, spread].astype(np.float32)
    one, zero = np.ones_like(variance), np.zeros_like(variance)
    filters = np.ones((1, 1, 1, variance.size), np.float32)
    forward = raw.forward(filters[..., :1], filters, one, zero, zero, variance, epsilon=epsilon, isa=isa)
    with np.errstate(all="ignore"):
        exact = 1 / np.sqrt(variance.astype(np.float64) + epsilon)
    np.testing.assert_array_equal(forward.inv_std, exact.astype(np.float32))


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


INFERENCE_ROWS = [row for row in raw.kernels() if row.stage == "forward" and "moments" not in row.name]


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (dtype, row)
        for row in INFERENCE_ROWS
        for dtype in ("f16", "bf16")
        if row.isa not in BFLOAT16_ISAS or (dtype == "bf16" and "thirds" not in row.name)  # those serve float32
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_rounding_to_half_precision_is_to_nearest_even(dtype, kernel):
    """z = 0 whatever the algorithm and beta = what is to be rounded, so output = beta, rounded."""
    data = Case(dtype=dtype).numpy_dtype
    with np.errstate(all="ignore"):
        beta = float32_samples(data)
        expected = (beta + np.float32(0)).astype(data)
    zeros, ones = np.zeros_like(beta), np.ones_like(beta)
    channels = len(beta) if "depthwise" in kernel.name else 2 if "pairs" in kernel.name else 1
    depth = 1 if "depthwise" in kernel.name else channels
    inputs, filters = np.zeros((1, 1, 1, channels), data), np.ones((3, 3, depth, len(beta)), data)
    options = {"padding": "SAME", "epsilon": 0.0, "kernel": kernel.name}
    output = raw.forward(inputs, filters, ones, beta, zeros, ones, **options).output
    if kernel.isa == "amx":  # its instruction takes subnormals for 0
        expected[np.abs(beta) < ml_dtypes.finfo(data).smallest_normal] = 0
    np.testing.assert_array_equal(output.ravel().astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_half_precision_number_is_read_and_written(dtype, data_format, isa):
    data = Case(dtype=dtype).numpy_dtype
    shape = (1, 64, 64, 16) if data_format == "NHWC" else (1, 16, 64, 64)
    inputs = np.arange(0x10000, dtype=np.uint16).view(data).reshape(shape)
    zeros, ones = np.zeros(16, np.float32), np.ones(16, np.float32)
    filters = np.ones((1, 1, 1, 16), data)  # depthwise
    output = raw.forward(
        inputs, filters, ones, zeros, zeros, ones, epsilon=0.0, data_format=data_format, isa=isa
    ).output
    np.testing.assert_array_equal(output.astype(np.float32), inputs.astype(np.float32))
