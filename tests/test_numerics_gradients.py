"""Numerics of the gradients: under a large mean of the inputs, and where something is not finite."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import ACTIVATIONS, Case, arrays
from raw_problem import Problem
from reference import backward

from fusedconvbn import raw

EPS = float(np.finfo(np.float32).eps)
LAYERS = {
    "pointwise": Case(kernel=(1, 1), in_channels=24, out_channels=40),
    "strided": Case(in_channels=16, out_channels=24, strides=(2, 2), padding="VALID"),
    "winograd2": Case(in_channels=32, out_channels=32, padding="VALID", algorithm="winograd2"),
    "winograd4": Case(in_channels=32, out_channels=32, padding="VALID", algorithm="winograd4"),
    "depthwise": Case(in_channels=24, out_channels=24, groups=24, padding="VALID"),
    "channels_first": Case(in_channels=24, out_channels=24, data_format="NCHW", padding="VALID"),
}


def relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(actual - exact)) / np.mean(np.square(exact))))


def stock_gradients(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Of inputs and filters, by stock ops in float32."""
    import tensorflow as tf

    from fusedconvbn import stock

    tensors = [tf.constant(array) for array in problem.arguments if array is not None]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        results = list(stock.fused_conv_bn(*tensors, **problem.case.attributes))
    gradients = tape.gradient(results, tensors[:2], output_gradients=[tf.constant(g) for g in problem.upstream])
    return tuple(gradient.numpy() for gradient in gradients)


@pytest.mark.parametrize("mean", [0, 300, 3000])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_as_good_as_stock_under_a_large_mean_of_the_inputs(layer, mean):
    """The sum of z's gradient is 0 but for rounding, and d_filters is `mean` times what is left of it."""
    pytest.importorskip("tensorflow")
    case = replace(LAYERS[layer], batch=4, height=27, width=21, training=True)
    base = arrays(case)
    problem = Problem(case, replace(base, inputs=base.inputs + np.float32(mean)))
    exact = backward(
        problem.upstream[0], *problem.arguments, moving_mean_gradient=problem.upstream[1],
        moving_variance_gradient=problem.upstream[2], **case.attributes,
    )  # fmt: skip
    saved = problem.run_forward()._asdict()
    problem.__dict__["saved"] = {name: saved[name] for name in ("conv_out", "batch_mean", "inv_std")}
    ours = problem.run_backward()
    for name, stock in zip(("inputs", "filters"), stock_gradients(problem)):
        truth = getattr(exact, name).value
        assert relative_error(getattr(ours, name), truth) <= 2 * relative_error(stock, truth) + 8 * EPS, name


UNPADDED = {
    "pointwise": LAYERS["pointwise"],
    "strided": LAYERS["strided"],
    "shortcut": Case(kernel=(1, 1), in_channels=40, out_channels=24, strides=(2, 2)),
    "first": Case(in_channels=3, out_channels=24, strides=(2, 2), padding="VALID"),
}


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("layer", UNPADDED)
def test_bfloat16_filters_gradients_under_a_large_mean_of_the_inputs(layer, momentum):
    """z takes few different values, whose dz round alike: times the mean that would be 2 % of d_filters and more."""
    case = replace(
        UNPADDED[layer], batch=4, height=27, width=21, training=True, activation="relu", dtype="bf16", inputs_mean=300,
        momentum=momentum,
    )  # fmt: skip
    problem = Problem(case)
    assert relative_error(problem.run_backward().filters.astype(float), problem.backward.filters.value) <= 2**-8


NON_FINITE = Case(batch=2, height=9, width=11, in_channels=5, out_channels=19)
LOST = {"winograd2": 2, "winograd4": 8}  # pixels of tiles that one pixel's 3x3 may reach into, as multiples of 9
ALGORITHMS = pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4", "depthwise"])


def non_finite(algorithm: str, **changes) -> Case:
    """NON_FINITE with changes, for an algorithm; depthwise has no name, but is the one for its problems."""
    case = replace(NON_FINITE, **changes)
    if algorithm == "depthwise":
        return replace(case, in_channels=case.out_channels, groups=case.out_channels)
    return replace(case, algorithm=algorithm)


def not_finite(array: np.ndarray) -> np.ndarray:
    return ~np.isfinite(array.astype(np.float64))


def assert_not_finite_where_the_formula_is_not(problem: Problem) -> None:
    """At each gradient; those of images may lose tiles to Winograd's transforms, at once or with a z computed again."""
    with np.errstate(all="ignore"):
        actual, expected = problem.run_backward(), problem.backward
    for name, wanted in expected._asdict().items():
        if wanted is None:
            continue
        ours, theirs = not_finite(getattr(actual, name)), not_finite(wanted.value)
        if name in ("inputs", "residual") and problem.case.algorithm in LOST:
            assert ours[theirs].all()
            assert ours.sum() <= LOST[problem.case.algorithm] * theirs.sum()
        else:
            np.testing.assert_array_equal(ours, theirs, name)


@ALGORITHMS
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_a_non_finite_output_gradient(activation, training, dtype, algorithm):
    """Also where the activation's derivative is 0, as in TensorFlow: 0 times NaN."""
    problem = Problem(non_finite(algorithm, activation=activation, training=training, dtype=dtype))
    output_gradient = problem.upstream[0].copy()
    output_gradient[0, 3, 4, 2], output_gradient[1, 0, 0, 7] = np.nan, np.inf
    problem.__dict__["upstream"] = (output_gradient, *problem.upstream[1:])
    assert_not_finite_where_the_formula_is_not(problem)


# elu is left out: TensorFlow takes its derivative at NaN for 1, the formula for NaN.
@ALGORITHMS
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "silu", "hard_swish", "gelu"])
def test_gradients_of_a_non_finite_input_in_inference(activation, residual, algorithm):
    """Frozen statistics: where the derivative does not depend on z, nor do the gradients of inputs and filters."""
    problem = Problem(non_finite(algorithm, activation=activation, residual=residual))
    problem.arguments.inputs[0, 4, 5, 1] = np.nan
    assert_not_finite_where_the_formula_is_not(problem)


@pytest.mark.parametrize("mean", [1, 10, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_frozen_16_bit_gradients_are_those_of_the_forward_pass(dtype, mean):
    """z is not rounded in inference, so neither may be the one that the gradient recomputes."""
    rng = np.random.default_rng(mean)
    small = np.dtype(dtype if dtype == "float16" else ml_dtypes.bfloat16)

    def rounded(*shape, offset=0.0):
        return (rng.normal(size=shape) + offset).astype(small)

    images, filters, dy = rounded(4, 9, 7, 16, offset=mean), rounded(3, 3, 16, 8), rounded(4, 7, 5, 8)
    statistics = [rng.normal(size=8).astype("float32") for _ in range(3)] + [np.full(8, 0.5, "float32")]

    def d_gamma(data, stat):
        arrays = [array.astype(data) for array in (dy, images, filters)] + [a.astype(stat) for a in statistics]
        return raw.backward(*arrays, activation="silu").gamma

    exact = d_gamma("float64", "float64")
    np.testing.assert_allclose(d_gamma(small, "float32"), exact, atol=3e-4 * np.abs(exact).max())
