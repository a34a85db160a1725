"""Shape inference: what is known of the arguments is known of the results, whatever is unknown."""

import op_problems
import pytest
import tensorflow as tf
from cases import Case, op_cases

import fusedconvbn


def infer(inputs, filters, channels=(None,) * 4, residual=None, training=True, gradient=False, **attributes):
    """Shapes of the results, or of the gradients, in a graph whose arguments have the given shapes."""
    with tf.Graph().as_default():
        vectors = [None if size == "rank" else [size] for size in channels]
        shapes = [inputs, filters, *vectors] + ([] if residual is None else [residual])
        tensors = [tf.compat.v1.placeholder(tf.float32, shape) for shape in shapes]
        results = list(fusedconvbn.fused_conv_bn(*tensors, training=training, **attributes))
        return [r.shape.as_list() for r in (tf.gradients(results, tensors) if gradient else results)]


NHWC = [
    # inputs, filters, attributes, output
    ([2, 8, 9, 4], [3, 3, 4, 6], {}, [2, 6, 7, 6]),
    ([None, 8, 9, 4], [3, 3, 4, 6], {"padding": "SAME", "strides": 2}, [None, 4, 5, 6]),
    ([2, None, 9, 4], [3, 3, 4, 6], {}, [2, None, 7, 6]),
    ([2, 8, None, 4], [3, 3, 4, 6], {"dilations": 2}, [2, 4, None, 6]),
    ([2, 8, 9, None], [3, 3, 4, 6], {}, [2, 6, 7, 6]),
    ([None, None, None, None], [3, 3, 4, 6], {}, [None, None, None, 6]),
    ([2, 8, 9, 4], [None, 3, 4, 6], {}, [2, None, 7, 6]),
    ([2, 8, 9, 4], [None, None, None, 6], {"padding": "SAME"}, [2, 8, 9, 6]),
    ([2, 8, 9, 4], [3, 3, 2, None], {}, [2, 6, 7, None]),
    ([2, 8, 9, 4], [3, 3, None, 6], {"padding": [(1, 2), (0, 3)]}, [2, 9, 10, 6]),
    (None, [3, 3, 4, 6], {}, [None, None, None, 6]),
    ([2, 8, 9, 4], None, {}, [2, None, None, None]),
    ([2, 8, 9, 4], None, {"padding": "SAME"}, [2, 8, 9, None]),
    (None, None, {}, [None, None, None, None]),
    ([0, 8, 9, 4], [3, 3, 4, 6], {}, [0, 6, 7, 6]),
    ([2, 2, 9, 4], [3, 3, 4, 6], {}, [2, 0, 7, 6]),
]


def transposed(shape):
    return shape and [shape[0], shape[3], shape[1], shape[2]]


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("row", NHWC, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}".replace(" ", ""))
def test_output(row, data_format):
    inputs, filters, attributes, output = row
    if data_format == "NCHW":
        inputs, output = transposed(inputs), transposed(output)
    shapes = infer(inputs, filters, data_format=data_format, **attributes)
    channels = [filters and filters[3]]
    assert shapes == [output, channels, channels]


def test_channels_are_those_of_any_vector():
    assert infer([2, 8, 9, 4], [1, 1, 4, None], (None, "rank", 6, None))[:2] == [[2, 8, 9, 6], [6]]


def test_output_is_at_least_what_the_residual_is():
    assert infer([None, None, 9, 4], [3, 3, 4, 6], residual=[2, 5, None, None])[0] == [2, 5, 7, 6]


@pytest.mark.parametrize("training", [False, True])
def test_gradients_have_the_shapes_of_the_arguments(training):
    shapes = [[None, 8, 9, 4], [3, 3, 2, 6], [6], [6], [6], [6], [5, 6, 7, 6]]
    assert infer(*shapes[:2], (6,) * 4, shapes[6], training, gradient=True, activation="silu") == shapes


@pytest.mark.parametrize("case", op_cases()[::7], ids=str)
def test_inferred_shape_is_that_of_the_result(case: Case):
    tensors = op_problems.arguments(case)
    call = op_problems.function_of(fusedconvbn.fused_conv_bn, case)
    graph = tf.function(lambda: list(call(*tensors))).get_concrete_function()
    assert [r.shape for r in graph.outputs] == [r.shape for r in call(*tensors)]


def test_winograd_with_filters_of_unknown_size():
    assert infer([None] * 4, [None] * 4, algorithm="winograd2")[0] == [None] * 4
