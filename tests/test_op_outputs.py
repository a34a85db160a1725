"""In inference the op returns tensors for what the graph reads, and no others."""

import numpy as np
import op_problems
import pytest
import tensorflow as tf
from cases import Case, arrays
from test_op_in_place import forward_rows

import fusedconvbn
from fusedconvbn import raw

CASES = {
    "dense": Case(height=13, width=14, in_channels=24, out_channels=40, activation="relu"),
    "residual": Case(kernel=(1, 1), height=11, in_channels=40, out_channels=72, residual=True),
    "depthwise": Case(height=19, width=9, in_channels=37, out_channels=37, groups=37),
    "channels_first": Case(data_format="NCHW", height=13, in_channels=20, out_channels=36),
    "bf16": Case(dtype="bf16", height=13, in_channels=32, out_channels=64, activation="relu"),
    "f64": Case(dtype="f64", height=7, in_channels=5, out_channels=20),
    "empty": Case(batch=0, height=7, in_channels=5, out_channels=20),
}
RUNS = [(name, kernel) for name, case in CASES.items() for kernel in forward_rows(case)]


def call_of(case, training=False):
    """Of what `choose` takes from the results of the op, in a graph."""
    tensors = op_problems.arguments(case)
    op = op_problems.function_of(fusedconvbn.fused_conv_bn, case, training=training)
    return lambda choose: tf.function(lambda *tensors: choose(op(*tensors)))(*tensors)


@pytest.mark.parametrize(("name", "kernel"), RUNS, ids=[f"{name}-{kernel}" for name, kernel in RUNS])
def test_the_output_alone(name, kernel, monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_KERNEL", kernel)
    case = CASES[name]
    expected = raw.forward(*arrays(case), **case.attributes, kernel=kernel).output
    output = call_of(case)(lambda results: results.output)
    assert output.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("read", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_any_of_the_results(name, training, read):
    case = CASES[name]
    call = call_of(case, training)
    some, all_of_them = (call(lambda results, read=read: [results[i] for i in read]) for read in (read, range(3)))
    for i, result in zip(read, some, strict=True):
        assert result.numpy().tobytes() == all_of_them[i].numpy().tobytes()


def test_moving_statistics_are_copies():
    """An update in place does not show in what was returned before it, not even of a variable that does not copy."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        mean, variance = (
            tf.compat.v1.get_variable(name, initializer=tf.ones(8), use_resource=False) for name in ("mean", "variance")
        )
        inputs, filters = tf.ones([1, 4, 4, 8]), tf.ones([1, 1, 8, 8])
        results = fusedconvbn.fused_conv_bn(inputs, filters, tf.ones(8), tf.zeros(8), mean, variance)
        with tf.control_dependencies(results):
            updates = [tf.compat.v1.assign_add(each, tf.ones(8)) for each in (mean, variance)]
        with tf.control_dependencies(updates):
            later = [tf.stack([each]) for each in results[1:]]
        session.run(tf.compat.v1.global_variables_initializer())
        for turn in (1, 2):
            for values in session.run(later):
                np.testing.assert_array_equal(values, np.full((1, 8), turn))


def test_the_gradient_without_training():
    """It needs no statistics of forward, whose tensors are then not there."""
    case = CASES["residual"]
    tensors, op = op_problems.arguments(case), op_problems.function_of(fusedconvbn.fused_conv_bn, case)

    def both(*tensors):
        output = op_problems.upstream(case)[:1]
        return op_problems.results_and_gradients(lambda *given: op(*given)[:1], tensors, output)

    op_problems.assert_same_bits(tf.function(both)(*tensors), both(*tensors))


@pytest.mark.parametrize(("training", "made"), [(False, [0, 2]), (True, [0, 1, 2, 3, 4, 5])])
def test_what_is_not_read_is_not_made(training, made):
    """As the runtime's trace of the op tells."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        inputs = tf.compat.v1.placeholder(tf.float32, [1, 4, 4, 8])
        ones = tf.ones(8)
        results = fusedconvbn.fused_conv_bn(inputs, tf.ones([1, 1, 8, 8]), *[ones] * 4, training=training)
        read = [tf.reduce_sum(results[i]) for i in (0, 2)]
        options = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.FULL_TRACE)
        trace = tf.compat.v1.RunMetadata()
        session.run(read, {inputs: np.ones(inputs.shape)}, options=options, run_metadata=trace)
        name = results.output.op.name
    nodes = [node for device in trace.step_stats.dev_stats for node in device.node_stats if node.node_name == name]
    assert [sorted(output.slot for output in node.output) for node in nodes] == [made]
