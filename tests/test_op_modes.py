"""One op, the same result in each way that TensorFlow can run it."""

import math

import numpy as np
import op_problems
import pytest
import tensorflow as tf
from cases import Case
from op_problems import HALF, MODES, NCHW, TRAINING, arguments, assert_same_bits, function_of, results_and_gradients
from processes import run_python

import fusedconvbn
from fusedconvbn import stock

every_mode = pytest.mark.parametrize("case", MODES, ids=str)


def eager(case):
    return results_and_gradients(
        function_of(fusedconvbn.fused_conv_bn, case), arguments(case), op_problems.upstream(case)
    )


def specification(tensors, shape_of):
    return [[tf.TensorSpec(shape_of(t), t.dtype) for t in tensors]]


@every_mode
@pytest.mark.parametrize(
    "shape_of", [lambda t: t.shape, lambda t: [None] * t.shape.rank, lambda t: None], ids=["known", "sizes", "rank"]
)
def test_function(case, shape_of):
    tensors, cotangents = arguments(case), op_problems.upstream(case)
    call = function_of(fusedconvbn.fused_conv_bn, case)
    function = tf.function(
        lambda values, upstream: results_and_gradients(call, values, upstream),
        input_signature=specification(tensors, shape_of) + specification(cotangents, shape_of),
    )
    assert_same_bits(function(tensors, cotangents), eager(case))


@every_mode
def test_gradient_outside_of_function(case):
    function = tf.function(function_of(fusedconvbn.fused_conv_bn, case))
    results = results_and_gradients(function, arguments(case), op_problems.upstream(case))
    assert_same_bits(results, eager(case))


@every_mode
def test_graph_and_session(case):
    tensors, cotangents = arguments(case), op_problems.upstream(case)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        fed = [tf.compat.v1.placeholder(t.dtype, [None] * t.shape.rank) for t in tensors]
        results = list(function_of(fusedconvbn.fused_conv_bn, case)(*fed))
        gradients = tf.gradients(results, fed, [tf.constant(c.numpy()) for c in cotangents])
        values = session.run(results + gradients, {f: t.numpy() for f, t in zip(fed, tensors)})
    assert_same_bits(values, eager(case))


@pytest.mark.parametrize("mode", ["function", "session"])
def test_training_is_read_at_run_time(mode):
    tensors = arguments(TRAINING)
    expected = {
        value: list(function_of(fusedconvbn.fused_conv_bn, TRAINING, training=value)(*tensors))
        for value in (True, False)
    }

    def call(training):
        return list(function_of(fusedconvbn.fused_conv_bn, TRAINING, training=training)(*tensors))

    if mode == "function":
        function = tf.function(call, input_signature=[tf.TensorSpec([], tf.bool)])
        actual = {value: function(tf.constant(value)) for value in (True, False, True)}
        assert function.experimental_get_tracing_count() == 1
    else:
        constants = [t.numpy() for t in tensors]
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            tensors = [tf.constant(c) for c in constants]
            training = tf.compat.v1.placeholder(tf.bool, [])
            results = call(training)
            actual = {value: session.run(results, {training: value}) for value in (True, False, True)}
    for value, results in actual.items():
        assert_same_bits(results, expected[value])
    assert np.any(np.asarray(actual[True][1]) != np.asarray(actual[False][1]))


@pytest.mark.parametrize("training", [True, np.True_, tf.constant(True), tf.Variable(True)], ids=type)
def test_kinds_of_training(training):
    results = function_of(fusedconvbn.fused_conv_bn, TRAINING, training=training)(*arguments(TRAINING))
    assert_same_bits(list(results), eager(TRAINING)[:3])


@pytest.mark.parametrize("kind", [tf.Variable, np.asarray, lambda t: t.numpy().tolist()], ids=["tf", "numpy", "list"])
def test_kinds_of_tensors(kind):
    tensors = arguments(TRAINING)
    results = function_of(fusedconvbn.fused_conv_bn, TRAINING)(*[kind(t) for t in tensors])
    assert_same_bits(list(results), eager(TRAINING)[:3])


@pytest.mark.parametrize("source", range(3), ids=["output", "moving_mean", "moving_variance"])
@pytest.mark.parametrize("case", [TRAINING, NCHW], ids=str)
def test_gradient_of_one_result(case, source):
    """The other results have no gradient upstream, which is the same as zeros."""
    tensors, cotangents = arguments(case), op_problems.upstream(case)
    call = function_of(fusedconvbn.fused_conv_bn, case)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        result = call(*tensors)[source]
    gradients = tape.gradient(
        result, tensors, output_gradients=cotangents[source], unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    zeroed = [c if i == source else tf.zeros_like(c) for i, c in enumerate(cotangents)]
    assert_same_bits(gradients, results_and_gradients(call, tensors, zeroed)[3:])


@pytest.mark.parametrize("wanted", [[0], [1], [2, 3], [6], [0, 1, 2, 3, 4, 5, 6]], ids=str)
def test_gradient_computes_what_is_asked_for(wanted):
    """The gradients of some arguments are those among all; of the large ones the op is told which are not needed."""
    tensors = arguments(TRAINING)
    call = function_of(fusedconvbn.fused_conv_bn, TRAINING)

    @tf.function
    def gradients():
        sources = [tensors[i] for i in wanted]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            results = list(call(*tensors))
        return tape.gradient(results, sources, output_gradients=op_problems.upstream(TRAINING))

    assert_same_bits(gradients(), [eager(TRAINING)[3 + i] for i in wanted])
    (node,) = [o for o in gradients.get_concrete_function().graph.get_operations() if o.type == "FusedConvBNGrad"]
    assert [bool(node.get_attr(name)) for name in ("needs_inputs", "needs_filters", "num_residual_gradient")] == [
        i in wanted for i in (0, 1, 6)
    ]


@pytest.mark.parametrize("save", ["conv", "bfloat16", "recompute"])
def test_what_is_kept_for_the_gradient(save):
    tensors = arguments(TRAINING)
    sizes = {}
    for training in (True, False):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            output = function_of(fusedconvbn.fused_conv_bn, TRAINING, training=training, save=save)(
                *[tf.constant(t.numpy()) for t in tensors]
            ).output
            sizes[training] = session.run(tf.shape(output.op.outputs[-1])).tolist()
    half = (math.prod(TRAINING.output_shape) + 1) // 2
    kept = {"conv": list(TRAINING.output_shape), "bfloat16": [half], "recompute": [0, 0, 0, 0]}
    assert sizes == {True: kept[save], False: [0, 0, 0, 0]}


def test_while_loop():
    """Three steps of the op on its own output, its moving statistics carried along; gradients through the loop."""
    case = Case(in_channels=4, out_channels=4, training=True, activation="elu")
    tensors, cotangents = arguments(case), op_problems.upstream(case)
    call = function_of(fusedconvbn.fused_conv_bn, case)

    def step(filters, gamma, beta, state):
        return list(call(state[0], filters, gamma, beta, *state[1:]))

    def unrolled(inputs, filters, gamma, beta, mean, variance):
        state = [inputs, mean, variance]
        for _ in range(3):
            state = step(filters, gamma, beta, state)
        return state

    def looped(inputs, filters, gamma, beta, mean, variance):
        body = lambda i, state: (i + 1, step(filters, gamma, beta, state))  # noqa: E731
        return tf.while_loop(lambda i, _: i < 3, body, (0, [inputs, mean, variance]))[1]

    results = tf.function(lambda *t: results_and_gradients(looped, t, cotangents))(*tensors)
    assert_same_bits(results, results_and_gradients(unrolled, tensors, cotangents))


def test_vectorized_map():
    tensors = arguments(NCHW)
    call = function_of(fusedconvbn.fused_conv_bn, NCHW)
    batches = tf.stack([tensors[0], 2 * tensors[0], -tensors[0]])
    mapped = tf.vectorized_map(lambda x: call(x, *tensors[1:]).output, batches)
    assert_same_bits(list(mapped), [call(x, *tensors[1:]).output for x in batches])


def test_xla_context_is_seen_where_it_is():
    seen = []
    tf.function(lambda: seen.append(stock.in_xla_context()))()
    tf.function(lambda: seen.append(stock.in_xla_context()), jit_compile=True)()
    assert [stock.in_xla_context(), *seen] == [False, False, True]


def test_saved_model(tmp_path):
    """A process that imports the package, and TensorFlow after it, loads the model and differentiates it."""
    case, module = HALF, tf.Module()
    tensors, cotangents = arguments(case), op_problems.upstream(case)
    module.filters = tf.Variable(tensors[1])
    call = function_of(fusedconvbn.fused_conv_bn, case)
    module.call = tf.function(
        lambda x, rest: list(call(x, module.filters, *rest)),
        input_signature=[
            tf.TensorSpec([None, None, None, case.in_channels], tensors[0].dtype),
            [tf.TensorSpec(t.shape, t.dtype) for t in tensors[2:]],
        ],
    )
    tf.saved_model.save(module, str(tmp_path / "model"))
    wide = [tf.cast(t, tf.float32).numpy() for t in [*tensors, *cotangents]]
    np.savez(tmp_path / "in.npz", *wide)
    script = """
        import sys
        import fusedconvbn
        import numpy as np
        import tensorflow as tf
        arrays = list(np.load(sys.argv[1] + "/in.npz").values())
        model = tf.saved_model.load(sys.argv[1] + "/model")
        half = lambda a: tf.cast(a, tf.bfloat16)
        inputs, rest = half(arrays[0]), [*map(tf.constant, arrays[2:6]), half(arrays[6])]
        with tf.GradientTape() as tape:
            tape.watch([inputs, rest])
            results = model.call(inputs, rest)
        sources = [inputs, model.filters, *rest]
        gradients = tape.gradient(results, sources, output_gradients=[half(arrays[7]), *map(tf.constant, arrays[8:])])
        np.savez(sys.argv[1] + "/out.npz", *[tf.cast(t, tf.float32).numpy() for t in [*results, *gradients]])
    """
    run_python(script, tmp_path)
    expected = [tf.cast(t, tf.float32).numpy() for t in eager(case)]
    assert_same_bits(list(np.load(tmp_path / "out.npz").values()), expected)
