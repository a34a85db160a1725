"""Packed filters that inference keeps between calls are never out of date."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from packed import (
    INPUTS,
    SHAPE,
    assert_right,
    called,
    expected,
    keeps,
    output,
    random_filters,
    variable,
)
from threads import in_threads

import fusedconvbn
from fusedconvbn import raw


def raw_apply(use_locking):
    return lambda filters: tf.raw_ops.ResourceApplyGradientDescent(
        var=filters.handle, alpha=0.5, delta=tf.ones(SHAPE), use_locking=use_locking
    )


def raw_scatter(use_locking):
    return lambda filters: tf.raw_ops.ResourceScatterNdUpdate(
        ref=filters.handle, indices=[[1, 2]], updates=tf.random.normal([1, *SHAPE[2:]]), use_locking=use_locking
    )


UPDATES = {
    "assign": lambda filters: filters.assign(filters * 2),
    "assign_random": lambda filters: filters.assign(tf.random.normal(SHAPE)),
    "assign_add": lambda filters: filters.assign_add(tf.ones(SHAPE)),
    "assign_sub": lambda filters: filters.assign_sub(tf.ones(SHAPE)),
    "assign_slice": lambda filters: filters[1].assign(tf.random.normal(SHAPE[1:])),
    "scatter_update": lambda filters: filters.scatter_update(tf.IndexedSlices(tf.random.normal([1, *SHAPE[1:]]), [2])),
    "scatter_add": lambda filters: filters.scatter_add(tf.IndexedSlices(tf.ones([1, *SHAPE[1:]]), [0])),
    "scatter_nd_update": lambda filters: filters.scatter_nd_update([[0, 1]], tf.random.normal([1, *SHAPE[2:]])),
    "scatter_nd_add": lambda filters: filters.scatter_nd_add([[0, 1]], tf.ones([1, *SHAPE[2:]])),
    "raw_scatter": raw_scatter(False),
    "raw_scatter_locked": raw_scatter(True),
    "apply_gradient_descent": raw_apply(False),
    "apply_gradient_descent_locked": raw_apply(True),
    "compiled": tf.function(lambda filters: filters.assign_add(tf.ones(SHAPE)).value(), jit_compile=True),
}


def as_function(update):
    def run(filters):
        update(filters)

    return tf.function(run)


everywhere = pytest.mark.parametrize("call", ["eager", "function", "xla"], indirect=True)


@everywhere
@pytest.mark.parametrize("wrap", [lambda update: update, as_function], ids=["eager", "function"])
@pytest.mark.parametrize("update", UPDATES)
def test_updates_are_seen(update, wrap, call):
    """Several, as an update in place needs an earlier one that has left the memory to the variable alone."""
    call, filters = call
    update = wrap(UPDATES[update])
    for _ in range(4):
        old = filters.numpy()
        update(filters)
        assert not np.array_equal(filters.numpy(), old)
        for _ in range(3):
            assert_right(call(), filters.numpy())


@everywhere
@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.Lion])
def test_optimizer_steps_are_seen(optimizer, call):
    call, filters = call
    optimizer = optimizer(0.1)
    for _ in range(3):
        optimizer.apply([tf.ones(SHAPE)], [filters])
        for _ in range(3):
            assert_right(call(), filters.numpy())


@everywhere
def test_sparse_updates_after_sparse_reads(call):
    """A variable that was read sparsely is copied by dense reads: the very first kept tensor is not written either."""
    call, filters = call
    called(call)
    for step in range(4):
        tf.gather(filters, [0])
        filters.scatter_update(tf.IndexedSlices(tf.fill([1, *SHAPE[1:]], float(step)), [step % 3]))
        for _ in range(3):
            assert_right(call(), filters.numpy())


def test_a_layer_that_learns_between_predictions():
    model = keras.Sequential([keras.Input((14, 14, 32)), fusedconvbn.FusedConvBN(48, 3, padding="same")])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    kernel, outputs = model.layers[0].kernel, []
    for _ in range(3):
        for _ in range(3):
            outputs.append(model.predict(INPUTS, verbose=0))
            statistics = [w.numpy() for w in model.layers[0].weights[1:]]
            result = raw.forward(INPUTS, kernel.numpy(), *statistics, padding="SAME").output
            np.testing.assert_array_equal(outputs[-1], result)
        model.train_on_batch(INPUTS, np.zeros_like(outputs[-1]))
    assert not np.array_equal(outputs[0], outputs[-1])


def test_two_variables_of_one_shape():
    one, two = variable(), variable()
    both = tf.function(lambda: (output(one), output(two)))
    for _ in range(3):
        for result, filters in zip(both(), (one, two)):
            assert_right(result, filters.numpy())
    one.assign(two)  # now both refer to the same memory
    for _ in range(3):
        for result in both():
            assert_right(result, two.numpy())
    for _ in range(3):
        two.assign_add(tf.ones(SHAPE))
        for _ in range(3):
            for result, filters in zip(both(), (one, two)):
                assert_right(result, filters.numpy())


def test_one_function_for_many_tensors():
    """Their memory is freed and allocated again, at the same addresses."""
    convolve = tf.function(lambda filters: output(filters))
    for function in (output, convolve):
        for _ in range(30):
            filters = tf.random.normal(SHAPE)
            for _ in range(2):
                assert_right(function(filters), filters)
            del filters


def aligned(values):
    """A copy at a multiple of 64, which TensorFlow may take over as it is."""
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


def test_arrays_changed_in_place_eager():
    array = aligned(random_filters())
    for _ in range(3):
        array[...] = random_filters()
        assert_right(output(array), array)
        shared = tf.raw_ops.Identity(input=array)  # a tensor in the array's memory
        for _ in range(3):
            array += 1
            assert_right(output(shared), shared.numpy())
            assert_right(output(shared), shared.numpy())


@everywhere
def test_a_variable_in_the_memory_of_an_array(call):
    call, filters = call
    array = aligned(random_filters())
    tf.raw_ops.AssignVariableOp(resource=filters.handle, value=array)
    for _ in range(4):
        array += 1
        np.testing.assert_array_equal(filters.numpy(), array)
        assert_right(call(), array)


@pytest.mark.parametrize("fed", ["filters", "variable"])
def test_a_fed_array_changed_in_place(fed):
    array = aligned(random_filters())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        feed = tf.compat.v1.placeholder(tf.float32, SHAPE)
        filters = tf.compat.v1.get_variable("filters", initializer=array, use_resource=True)
        session.run(filters.initializer)
        session.run(filters.assign(feed), {feed: array})
        result = output(feed if fed == "filters" else filters)
        value = tf.identity(feed if fed == "filters" else filters)
        for _ in range(4):
            array += 1
            assert_right(*session.run((result, value), {feed: array}))


@pytest.mark.parametrize("use_resource", [False, True], ids=["reference", "resource"])
def test_variables_of_tensorflow_1(use_resource):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        filters = tf.compat.v1.get_variable("filters", initializer=random_filters(), use_resource=use_resource)
        updates = [
            tf.compat.v1.assign(filters, 2 * filters),
            tf.compat.v1.assign_add(filters, tf.ones(SHAPE)),
            tf.compat.v1.scatter_update(filters, [1], tf.zeros([1, *SHAPE[1:]])),
            tf.compat.v1.train.GradientDescentOptimizer(0.5).apply_gradients([(tf.ones(SHAPE), filters)]),
        ]
        result = output(filters)
        session.run(filters.initializer)
        for update in [*updates, *updates]:
            for _ in range(3):
                np.testing.assert_array_equal(session.run(result), expected(session.run(filters)))
            session.run(update)
            np.testing.assert_array_equal(session.run(result), expected(session.run(filters)))


def test_a_reference_variable_that_a_function_reads():
    """What a function is given may be a reference variable's, whatever it looks like inside."""
    convolve = tf.function(lambda filters: output(tf.identity(filters)))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        filters = tf.compat.v1.get_variable("filters", initializer=random_filters(), use_resource=False)
        result, update = convolve(filters), tf.compat.v1.assign_add(filters, tf.ones(SHAPE))
        session.run(filters.initializer)
        for _ in range(4):
            np.testing.assert_array_equal(session.run(result), expected(session.run(filters)))
            session.run(update)


def test_a_restored_checkpoint(tmp_path, call):
    call, filters = call
    checkpoint = tf.train.Checkpoint(filters=filters)
    first = checkpoint.write(tmp_path / "first")
    original, result = filters.numpy(), called(call)
    filters.assign_add(tf.ones(SHAPE))
    assert not np.array_equal(called(call), result)
    checkpoint.read(first)
    assert_right(called(call), original)
    assert keeps(call, filters)


def test_eight_threads_read_what_is_being_updated():
    """Each result is of one of the values, and after its own update each thread sees that."""
    values = [tf.constant(random_filters()) for _ in range(4)]
    results = {expected(value).tobytes() for value in values}
    shared, own = variable(values[0]), [variable(values[0]) for _ in range(8)]
    convolve = [tf.function(lambda f=f: output(f)) for f in (*own, shared)]

    def work(index):
        for step in range(12):
            value = values[(index + step) % 4]
            if index == 0:
                shared.assign(value)
            own[index].assign(value)
            for _ in range(3):
                assert_right(convolve[index](), value)
                assert convolve[8]().numpy().tobytes() in results

    in_threads(8, work)
    assert_right(convolve[8](), shared.numpy())
