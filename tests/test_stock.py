"""`fused_conv_bn` of stock ops: against the oracle, in the modes that the op leaves to it, and its hook for moments."""

from dataclasses import replace

import cases
import numpy as np
import op_problems
import pytest
import reference
import tensorflow as tf
from compare import assert_close
from op_problems import arguments, function_of, results_and_gradients

from fusedconvbn import stock

FULL_PRECISION = [case for case in cases.op_cases() if case.dtype in ("f32", "f64")]


@pytest.mark.parametrize("case", FULL_PRECISION[::2], ids=str)
def test_results(case):
    expected = reference.forward(*cases.arrays(case), **case.attributes)
    actual = function_of(stock.fused_conv_bn, case)(*arguments(case))
    for name, a, e in zip(actual._fields, actual, expected):
        assert_close(a.numpy(), e, name, case.numpy_dtype if name == "output" else case.stat_dtype)


@pytest.mark.parametrize("case", [c for c in FULL_PRECISION if c.dtype == "f64"][::4], ids=str)
def test_gradients(case):
    near_kink = reference.forward(*cases.arrays(case), **case.attributes).near_kink
    output_gradient, *moving = (c.numpy() for c in op_problems.upstream(case))
    output_gradient = np.where(near_kink, 0, output_gradient)
    results = results_and_gradients(
        function_of(stock.fused_conv_bn, case), arguments(case), [tf.constant(g) for g in (output_gradient, *moving)]
    )
    expected = reference.backward(
        output_gradient, *cases.arrays(case), moving_mean_gradient=moving[0], moving_variance_gradient=moving[1],
        **case.attributes,
    )  # fmt: skip
    for name, a, e in zip(expected._fields, results[3:], expected):
        assert_close(a.numpy(), e, name, case.numpy_dtype)


@pytest.mark.parametrize("case", op_problems.MODES, ids=str)
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_function_with_training_at_run_time(case, jit_compile):
    """Unknown sizes too, where it is not XLA that compiles."""
    tensors = arguments(case)
    shapes = [t.shape if jit_compile or t.shape.rank == 1 else [None, None, None, t.shape[3]] for t in tensors]
    if case.groups > 1:
        shapes[1] = tensors[1].shape
    function = tf.function(
        lambda values, training: function_of(stock.fused_conv_bn, case, training=training)(*values),
        input_signature=[[tf.TensorSpec(s, t.dtype) for s, t in zip(shapes, tensors)], tf.TensorSpec([], tf.bool)],
        jit_compile=jit_compile,
    )
    tolerance = 1e-5 if case.dtype == "f32" else 2**-7
    for training in (True, False):
        expected = reference.forward(*cases.arrays(case), **{**case.attributes, "training": training})
        results = function(tensors, tf.constant(training))
        op_problems.assert_close(results, [e.value for e in expected[:3]], tolerance)


def test_inference_chosen_at_run_time_with_an_infinite_input():
    """What the statistics of the batch would be, NaN, is not in the gradients."""
    case = replace(op_problems.FROZEN, activation=None)
    inputs, *rest = arguments(case)
    inputs = tf.tensor_scatter_nd_update(inputs, [[0, 2, 2, 0]], [np.inf])
    gradients = tf.function(
        lambda training: results_and_gradients(
            function_of(stock.fused_conv_bn, case, training=training), [inputs, *rest], op_problems.upstream(case)
        ),
        autograph=False,
    )
    frozen, expected = gradients(tf.constant(False)), gradients(False)
    for a, e in zip(frozen, expected):
        np.testing.assert_array_equal(a, e)
    assert np.isfinite(frozen[3]).all()


@pytest.mark.parametrize("case", op_problems.MODES[:1] + op_problems.MODES[2:3], ids=str)
def test_moments_of_the_callers(case):
    """Statistics of another batch: the results are those of frozen statistics of that value."""
    rng = case.random("moments")
    mean, variance = (tf.constant(rng.uniform(0.5, 2, case.out_channels).astype(np.float32)) for _ in range(2))
    tensors, moments = arguments(case), stock.Moments(mean, variance, tf.constant(5.0))
    results = function_of(stock.fused_conv_bn, case, moments=lambda z: moments)(*tensors)
    frozen = replace(case, training=False)
    expected = function_of(stock.fused_conv_bn, frozen)(*tensors[:4], mean, variance, *tensors[6:])
    moving = [case.momentum * old + (1 - case.momentum) * new for old, new in zip(tensors[4:6], (mean, variance))]
    op_problems.assert_close(results, [expected.output, *moving], 1e-6)


def test_moments_are_stable():
    """A mean of ten thousand standard deviations."""
    z = tf.random.stateless_normal([4, 8, 8, 3], seed=[1, 2])
    moments, shifted = stock.batch_moments(z), stock.batch_moments(z + 1e4)
    np.testing.assert_allclose(shifted.variance, moments.variance, rtol=1e-3)
    assert float(moments.count) == 256


GOOD = {
    "inputs": [2, 6, 7, 4], "filters": [3, 3, 2, 6], "gamma": [6], "beta": [6], "moving_mean": [6],
    "moving_variance": [6], "residual": [2, 4, 5, 6],
}  # fmt: skip


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("gamma", [1]), ("beta", []), ("moving_mean", [1]), ("moving_variance", [2, 1, 1, 6]),
     ("residual", [1, 4, 5, 6]), ("filters", [9, 3, 4, 6])],
    ids=str,
)  # fmt: skip
def test_shapes_that_stock_ops_would_take(name, shape, jit_compile):
    tensors = {key: tf.random.normal(size) for key, size in (GOOD | {name: shape}).items()}

    @tf.function(jit_compile=jit_compile)
    def run():
        return stock.fused_conv_bn(**tensors)

    with pytest.raises(ValueError, match=f"`{name}` must be .*Received"):
        run()


def test_training_that_is_no_scalar():
    with pytest.raises(ValueError, match="`training` must be of shape"):
        stock.fused_conv_bn(**{k: tf.ones(v) for k, v in GOOD.items()}, training=tf.constant([True]))
