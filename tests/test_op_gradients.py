"""Gradients of the op in float64: against differences, of the second order, and where there is nothing to sum over."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import op_problems
import pytest
import tensorflow as tf
from cases import ACTIVATIONS, Case
from op_problems import arguments, function_of, results_and_gradients
from processes import run_python

import fusedconvbn
from fusedconvbn import stock

SMALL = Case(dtype="f64", batch=2, height=4, width=5, in_channels=4, out_channels=6, kernel=(3, 2), padding="SAME")
DIFFERENTIABLE = [
    replace(SMALL, training=training, unbiased=training, residual=residual, activation=activation, groups=groups)
    for training, (residual, activation, groups) in itertools.product(
        (True, False), ((False, None, 1), (True, "elu", 2), (True, "silu", 1), (False, "gelu", 2))
    )
] + [
    replace(SMALL, training=True, data_format="NCHW", dilations=(1, 2), strides=(2, 1), activation="silu"),
    replace(SMALL, training=False, data_format="NCHW", padding=((2, 0), (1, 3)), out_channels=8, groups=4),
    replace(SMALL, training=True, kernel=(3, 3), algorithm="winograd2", residual=True, activation="gelu"),
    replace(SMALL, training=False, kernel=(3, 3), algorithm="winograd2", data_format="NCHW", activation="elu"),
]


def directions(case, count):
    rng = case.random("directions")
    return [tf.constant(rng.standard_normal(t.shape)) for t in arguments(case)], rng


def directional(function, tensors, steps, size=1e-5):
    """The derivative of the scalar `function` along `steps`, by a fourth-order central difference."""
    at = lambda h: float(function(*[t + h * s for t, s in zip(tensors, steps)]))  # noqa: E731
    return (8 * (at(size) - at(-size)) - (at(2 * size) - at(-2 * size))) / (12 * size)


def scalar(case):
    """A function of the op's arguments that depends on all three results, with the gradients `upstream`."""
    cotangents, call = op_problems.upstream(case), function_of(fusedconvbn.fused_conv_bn, case)
    return lambda *t: tf.add_n([tf.reduce_sum(r * c) for r, c in zip(call(*t), cotangents)])


def directional_gradients(function, tensors, steps):
    """The same derivative from gradients, for each argument alone."""
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(*tensors)
    return [float(tf.reduce_sum(g * s)) for g, s in zip(tape.gradient(value, tensors), steps)]


def only(index, steps):
    return [s if i == index else tf.zeros_like(s) for i, s in enumerate(steps)]


def check_directional(function, case):
    tensors = arguments(case)
    steps, _ = directions(case, len(tensors))
    expected = [directional(function, tensors, only(i, steps)) for i in range(len(tensors))]
    actual = directional_gradients(function, tensors, steps)
    scale = max(map(abs, expected))
    assert scale > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-8 * scale, err_msg=str(op_problems.NAMES))


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_differences(case):
    check_directional(scalar(case), case)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_differences_of_gradients(case):
    """Along the gradient of the gradient, which `FusedConvBNGrad` has from stock ops."""
    weights, function = directions(replace(case, momentum=0.8), 0)[0], scalar(case)

    def gradient_along(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        return tf.add_n([tf.reduce_sum(g * w) for g, w in zip(tape.gradient(value, tensors), weights)])

    check_directional(gradient_along, case)


def second_order(op, case):
    """Gradients of all arguments, and of all the upstream gradients, of a function of the op's gradients."""
    sources = [*arguments(case), *op_problems.upstream(case)]
    count = len(sources) - 3

    def gradients(*values):
        return results_and_gradients(function_of(op, case), values[:count], values[count:])

    rng = case.random("weights")
    weights = [tf.constant(rng.standard_normal(t.shape), t.dtype) for t in gradients(*sources)]
    return results_and_gradients(gradients, sources, weights)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["nores", "res"])
@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_second_order(activation, residual, training):
    case = replace(SMALL, training=training, activation=activation, residual=residual)
    actual, expected = second_order(fusedconvbn.fused_conv_bn, case), second_order(stock.fused_conv_bn, case)
    op_problems.assert_close(actual, expected, 1e-11)


def test_second_order_where_z_is_saved_in_bfloat16():
    """Gradients of the gradients come from stock ops, which know nothing of it."""
    case = replace(SMALL, training=True, activation="relu", dtype="f32")
    actual = second_order(partial(fusedconvbn.fused_conv_bn, save="bfloat16"), case)
    op_problems.assert_close(actual, second_order(stock.fused_conv_bn, case), 2**-8)


@pytest.mark.parametrize("case", op_problems.MODES[:3], ids=str)
def test_second_order_in_a_function_and_a_session(case):
    """With `training` known only at run time, so that the gradients of the gradients contain a tf.cond."""
    case = replace(case, dtype="f64")
    expected = second_order(stock.fused_conv_bn, case)

    def op(*tensors, training, **attributes):
        training = tf.compat.v1.placeholder_with_default(training, [])
        return fusedconvbn.fused_conv_bn(*tensors, training=training, **attributes)

    op_problems.assert_close(tf.function(lambda: second_order(op, case))(), expected, 1e-11)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        op_problems.assert_close(session.run(second_order(op, case)), expected, 1e-11)


@pytest.mark.slow
def test_second_order_with_the_control_flow_of_tensorflow_1():
    script = """
        import tensorflow.compat.v1 as tf1
        tf1.disable_v2_behavior()
        import test_op_gradients as tests
        from fusedconvbn import fused_conv_bn, stock
        for case in tests.op_problems.MODES[:3]:
            case = tests.replace(case, dtype="f64")
            arrays = [array for array in tests.op_problems.cases.arrays(case) if array is not None]
            results = []
            for op in (fused_conv_bn, stock.fused_conv_bn):
                with tf1.Graph().as_default(), tf1.Session() as session:
                    training = tf1.placeholder(tf1.bool, [])
                    fed = [tf1.placeholder(array.dtype, array.shape) for array in arrays]
                    first = list(tests.function_of(op, case, training=training)(*fed))
                    second = tf1.gradients([tf1.sin(r) for r in first], fed)
                    third = tf1.gradients([tf1.sin(r) for r in second], fed)
                    values = {**dict(zip(fed, arrays)), training: case.training}
                    results.append(session.run(first + second + third, values))
            tests.op_problems.assert_close(*results, 1e-11)
        print("done")
    """
    assert run_python(script) == "done"


def test_third_order():
    case = replace(SMALL, training=True, activation="silu", in_channels=2, out_channels=2)
    tensors = arguments(case)

    def third(op):
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            gradients = second_order_of_values(function_of(op, case), tensors)
            total = tf.add_n([tf.reduce_sum(tf.sin(g)) for g in gradients])
        return outer.gradient(total, tensors)

    op_problems.assert_close(third(fusedconvbn.fused_conv_bn), third(stock.fused_conv_bn), 1e-10)


def second_order_of_values(function, tensors):
    with tf.GradientTape() as outer:
        outer.watch(tensors)
        with tf.GradientTape() as inner:
            inner.watch(tensors)
            total = tf.add_n([tf.reduce_sum(tf.sin(r)) for r in function(*tensors)])
        first = tf.add_n([tf.reduce_sum(tf.sin(g)) for g in inner.gradient(total, tensors)])
    return outer.gradient(first, tensors)


EMPTY = {
    "batch": replace(SMALL, batch=0),
    "height": replace(SMALL, height=0),
    "window": replace(SMALL, height=2, padding="VALID"),
}


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("dtype", ["f64", "bf16"])
@pytest.mark.parametrize("op", [fusedconvbn.fused_conv_bn, stock.fused_conv_bn], ids=["op", "stock"])
@pytest.mark.parametrize("name", EMPTY)
def test_empty(name, op, dtype, training):
    """Nothing to sum over: an empty output, the old statistics, and gradients of zeros."""
    case = replace(EMPTY[name], dtype=dtype, training=training, residual=True, activation="silu")
    tensors, cotangents = arguments(case), op_problems.upstream(case)
    output, *results = results_and_gradients(function_of(op, case), tensors, cotangents)
    expected = [*tensors[4:6], *[tf.zeros_like(t) for t in tensors[:4]], *cotangents[1:], tensors[6]]
    assert output.shape == case.output_shape
    assert output.shape.num_elements() == 0
    op_problems.assert_close(results, expected, 0)
