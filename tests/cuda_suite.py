"""The tests of the CUDA kernels against the oracle, for the host and for a GPU: who imports them defines two fixtures.

`library`: the CUDA library; `on_the_device`: `raw` runs its kernels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import test_numerics
import test_numerics_gradients
from cases import ACTIVATIONS, Case, depthwise_cases, op_cases
from compare import assert_close
from raw_problem import Problem

from fusedconvbn import _load, raw

# Pixels of several ranges, of sums of channels (256 pixels) and of the filters' gradient (1024).
RANGES = [
    Case(
        data_format=data_format, batch=3, height=37, width=41, in_channels=c, out_channels=k, groups=groups,
        training=training, activation="relu", residual=True, dtype=dtype,
    )
    for data_format in ("NHWC", "NCHW")
    for c, k, groups, training, dtype in ((5, 9, 1, True, "f32"), (6, 6, 6, True, "bf16"), (4, 8, 2, False, "f64"))
]  # fmt: skip
# What tensor cores take: NHWC of 16 bits, channels of a group in eights; tiles of 128 pixels, of 64 or 128 channels and
# a depth of 32 that are full, or not; strides up to 4, whose phases the gradient by the inputs has one by one.
TENSOR = [
    Case(
        dtype=dtype, batch=n, height=h, width=w, in_channels=c, out_channels=k, groups=groups, kernel=kernel,
        strides=strides, dilations=dilations, padding=padding, training=training, activation=activation,
        residual=residual,
    )
    for dtype, n, h, w, c, k, groups, kernel, strides, dilations, padding, training, activation, residual in (
        ("f16", 1, 5, 7, 8, 8, 1, (1, 1), (1, 1), (1, 1), "VALID", False, None, False),
        ("bf16", 2, 9, 8, 40, 72, 1, (1, 1), (1, 1), (1, 1), "VALID", True, "relu", True),
        ("f16", 3, 8, 8, 64, 136, 1, (1, 1), (1, 1), (1, 1), "VALID", True, "relu6", False),
        ("bf16", 1, 13, 11, 16, 24, 1, (3, 3), (1, 1), (1, 1), "SAME", False, "gelu", True),
        ("f16", 2, 9, 10, 24, 16, 1, (3, 3), (2, 2), (1, 1), "SAME", True, "relu", False),
        ("bf16", 1, 7, 12, 8, 200, 1, (3, 2), (1, 2), (2, 1), ((1, 2), (0, 1)), True, "leaky_relu", True),
        ("f16", 2, 8, 9, 32, 64, 4, (3, 3), (2, 1), (1, 2), "SAME", False, "silu", True),
        ("bf16", 2, 6, 6, 48, 32, 2, (2, 3), (3, 4), (1, 1), "SAME", True, "elu", False),
        ("f16", 1, 12, 13, 16, 8, 1, (1, 1), (2, 2), (1, 1), "VALID", True, "hard_swish", True),
        ("bf16", 1, 4, 4, 8, 16, 1, (7, 7), (2, 2), (1, 1), ((3, 3), (3, 3)), False, None, False),
        ("f16", 2, 11, 10, 3, 16, 1, (7, 7), (2, 2), (1, 1), "SAME", True, "relu", False),
        ("bf16", 1, 6, 5, 13, 8, 1, (3, 3), (1, 1), (1, 1), "SAME", False, "relu", True),
        ("f16", 9, 12, 11, 8, 8, 1, (3, 3), (1, 1), (1, 1), "SAME", True, None, False),
    )
]  # fmt: skip
FAST = 3  # every third case in `make test`


def tiers(cases: list[Case]) -> list:
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if i % FAST else []) for i, case in enumerate(cases)
    ]


ALL = [replace(case, isa=None) for case in op_cases() + depthwise_cases()[::9]]
CASES = tiers(ALL) + [pytest.param(case, id=str(case)) for case in RANGES + TENSOR]


def on_tensor_cores(case: Case) -> bool:
    """`suits_tensor_cores` of cuda/tensor_convolve.cuh, of sizes that no number ends at."""
    channels = (case.in_channels // case.groups, case.out_channels // case.groups)
    eights = [number > 0 and number % 8 == 0 for number in channels]
    small = case.dtype in ("f16", "bf16") and case.data_format == "NHWC"
    return (
        small and (eights[0] or widened(case)) and eights[1] and max(case.strides) <= 4 and 0 not in case.output_shape
    )


def widened(case: Case) -> bool:
    """Whether tensor cores would read a copy whose channels are filled up to eights (cuda/widen.cuh)."""
    return case.groups == 1 and case.in_channels >= 3 and case.in_channels % 8 != 0


def problem_of(case: Case, start: str = "conv") -> Problem:
    return Problem(case, start=start, rounds_dz=on_tensor_cores(case))


TRAINED = [case for case in ALL + RANGES if case.training]

with_the_kernels = pytest.mark.usefixtures("on_the_device")


@pytest.mark.parametrize("case", [*ALL[::5], *RANGES, *TENSOR], ids=str)
def test_which_kernels(case: Case, monkeypatch, library):
    monkeypatch.setattr(_load, "cuda", lambda: library)
    names = {
        raw.plan(
            case.inputs_shape, case.filters_shape, dtype=case.numpy_dtype, residual=case.residual,
            direction=direction, device="gpu", **case.attributes,
        ).gpu
        for direction in ("forward", "backward")
    }  # fmt: skip
    depthwise = case.groups > 1 and case.in_channels == case.groups
    tiles = "128x64" if case.out_channels // case.groups <= 64 else "128x128"  # of few pixels
    tensor = "input channels filled up to eights" if widened(case) else f"forward in tiles of {tiles}"
    assert names == {f"tensor cores, {tensor}" if on_tensor_cores(case) else "depthwise" if depthwise else "plain"}


@with_the_kernels
@pytest.mark.parametrize("case", CASES)
def test_forward(case: Case):
    problem = problem_of(case)
    problem.check_forward(problem.run_forward())


@with_the_kernels
@pytest.mark.parametrize("case", CASES)
def test_backward(case: Case):
    problem = problem_of(case)
    problem.check_backward(problem.run_backward())


@with_the_kernels
@pytest.mark.parametrize("case", tiers(TRAINED[::5]))
def test_backward_computes_z_again(case: Case):
    problem = problem_of(case, "again")
    problem.saved["conv_out"] = None
    problem.check_backward(problem.run_backward(save="recompute"))


@with_the_kernels
@pytest.mark.parametrize("case", tiers([case for case in TRAINED if case.dtype == "f32"][::2]))
def test_z_in_bfloat16(case: Case):
    forward, backward = problem_of(case), problem_of(case, "bfloat16")
    result = forward.run_forward(save="bfloat16")
    assert result.conv_out.ndim == 1
    forward.check_forward(result)
    backward.check_backward(backward.run_backward("bfloat16", save="bfloat16"))


@with_the_kernels
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("case", TRAINED[::59], ids=str)
def test_gradients_that_nobody_asks_for(case: Case, needs: tuple[bool, bool]):
    problem = problem_of(case)
    result = problem.run_backward(needs_inputs=needs[0], needs_filters=needs[1])
    problem.check_backward(result, *needs)


@with_the_kernels
@pytest.mark.parametrize("ratio", [0, 10, 1e2, 1e3, 1e4])
def test_variance_under_a_large_mean(ratio: float):
    z = np.random.default_rng(7).normal(ratio, 1, (4, 31, 29, 5)).astype(np.float32)
    filters, ones = np.eye(5, dtype=np.float32)[None, None], np.ones(5, np.float32)
    result = raw.forward(z, filters, ones, ones, ones, ones, epsilon=0, training=True)
    np.testing.assert_allclose(result.inv_std.astype(np.float64) ** -2, z.astype(np.float64).var((0, 1, 2)), rtol=1e-6)


@with_the_kernels
@pytest.mark.parametrize("tiles", ["wide", "square", "narrow"])
@pytest.mark.parametrize("case", TENSOR[1:7], ids=str)
def test_tiles(case: Case, tiles: str, monkeypatch):
    """Each, where the problem would choose others."""
    monkeypatch.setenv("FUSEDCONVBN_GPU_TILES", tiles)
    problem = problem_of(case)
    problem.check_forward(problem.run_forward())
    problem.check_backward(problem.run_backward())


def test_large_problems_take_wide_tiles(library, monkeypatch):
    shapes = ((256, 28, 28, 512), (1, 1, 512, 128))
    monkeypatch.setattr(_load, "cuda", lambda: library)
    plan = raw.plan(*shapes, dtype="float16", device="gpu")
    assert plan.gpu == "tensor cores, forward in tiles of 256x128"
    monkeypatch.setenv("FUSEDCONVBN_GPU_TILES", "narrow")
    assert raw.plan(*shapes, dtype="float16", device="gpu").gpu == "tensor cores, forward in tiles of 128x64"


@with_the_kernels
def test_tiles_that_there_are_not(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_GPU_TILES", "round")
    with pytest.raises(RuntimeError, match="FUSEDCONVBN_GPU_TILES must be wide, square or narrow"):
        problem_of(TENSOR[0]).run_forward()


@with_the_kernels
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("ratio", [0, 10, 1e2, 1e3])
def test_statistics_on_tensor_cores_are_of_what_is_stored(ratio: float, dtype: str):
    """Tiles that are full, or not; a channel that is constant."""
    case = Case(dtype=dtype)
    z = np.random.default_rng(7).normal(ratio, 1, (3, 13, 17, 72)).astype(case.numpy_dtype)
    z[..., 5] = 7
    filters, ones = np.eye(72, dtype=z.dtype)[None, None], np.ones(72, np.float32)
    assert on_tensor_cores(replace(case, in_channels=72, out_channels=72, kernel=(1, 1)))
    result = raw.forward(z, filters, ones, ones, ones, ones, momentum=0, training=True)
    exact = z.astype(np.float64)
    np.testing.assert_allclose(result.batch_mean, exact.mean((0, 1, 2)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(result.moving_variance, exact.var((0, 1, 2)), rtol=2e-6, atol=1e-12)


@with_the_kernels
@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_inputs(activation: str | None, dtype: str):
    test_numerics.test_non_finite_inputs_in_inference(activation, None, dtype)


@with_the_kernels
@pytest.mark.parametrize("algorithm", ["direct", "depthwise"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_gradients(activation: str | None, training: bool, algorithm: str):
    test_numerics_gradients.test_gradients_of_a_non_finite_output_gradient(activation, training, "f32", algorithm)
    if not training and activation != "elu":
        test_numerics_gradients.test_gradients_of_a_non_finite_input_in_inference(activation, True, algorithm)


@with_the_kernels
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision(dtype: str):
    test_numerics.test_every_half_precision_number_is_read_and_written(dtype, "NHWC", None)
    test_numerics.test_half_precision_output_overflows_to_infinity()


@with_the_kernels
@pytest.mark.parametrize(("dtype", "value"), [("f32", 0.1), ("f32", -3e36), ("f64", 1e200), ("f64", -1234.567)])
def test_constant_channel(dtype: str, value: float):
    """The sum of a range may be beyond the type's largest number."""
    case = Case(dtype=dtype)
    z, ones = np.full((1, 13, 19, 2), value, case.numpy_dtype), np.ones(2, case.stat_dtype)
    result = raw.forward(z, np.eye(2, dtype=z.dtype)[None, None], ones, 0 * ones, ones, ones, training=True)
    np.testing.assert_allclose(result.batch_mean, z[0, 0, 0], rtol=2e-7 if dtype == "f32" else 1e-15)
    assert np.isfinite(result.output).all()
    if abs(value) < 1e30:
        np.testing.assert_allclose(result.inv_std, 1e-3**-0.5, rtol=1e-5)


@with_the_kernels
def test_infinite_statistics_stay_infinite():
    z, ones = np.random.default_rng(3).normal(size=(2, 9, 11, 3)).astype(np.float32), np.ones(3, np.float32)
    z[1, 2, 3, 1] = np.inf
    with np.errstate(all="ignore"):
        result = raw.forward(z, np.ones((1, 1, 1, 3), np.float32), ones, ones, ones, ones, training=True)
    assert list(result.batch_mean[[0, 2]]) == [
        pytest.approx(z[..., 0].mean(), abs=1e-6),
        pytest.approx(z[..., 2].mean(), abs=1e-6),
    ]
    assert result.batch_mean[1] == np.inf


@with_the_kernels
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("empty", [{"batch": 0}, {"height": 2, "width": 2, "padding": "VALID"}], ids=str)
def test_no_pixels(empty: dict, training: bool):
    """Unchanged statistics, gradients of zeros."""
    problem = Problem(Case(**{"in_channels": 4, "training": training, **empty}))
    assert 0 in problem.case.output_shape
    problem.check_forward(problem.run_forward())
    problem.check_backward(problem.run_backward())


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_output_in_the_memory_of_the_residual(on_the_device, data_format: str):
    """And no statistics, which nobody may want in inference."""
    case = Case(data_format=data_format, residual=True, activation="relu")
    problem = problem_of(case)
    *arguments, residual = problem.arguments
    params = raw._params(
        case.inputs_shape, case.filters_shape, dtype=case.numpy_dtype, residual=True, activation="relu",
        **case.convolution, epsilon=case.epsilon,
    )  # fmt: skip
    output = residual.copy()
    plan = on_the_device.Plan(params, backward=False)
    on_the_device.forward(plan, *arguments, output, None, output, *[None] * 6)
    assert_close(output, problem.forward.output, "output", case.numpy_dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_shape": (1, 2**20, 2**20, 1)}, "an image of more than"),
        ({"strides": 2**32}, "strides, paddings or filters of more than"),
        ({"padding": [(2**32, 0), (0, 0)], "strides": 2**26}, "strides, paddings or filters of more than"),
    ],
)
def test_what_is_too_large(library, arguments: dict, message: str):
    default = {"inputs_shape": (1, 3, 1, 1), "filters_shape": (1, 1, 1, 1), "strides": 1, "padding": "VALID"}
    params = raw._params(**{**default, **arguments}, dilations=1, data_format="NHWC")
    with pytest.raises(RuntimeError, match=message):
        library.forward(library.plan(params, False), [0] * 13, 0, 0)
