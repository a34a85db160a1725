"""Threads and memory: the same bits whoever computes them, no hang, no leak."""

import os
from dataclasses import replace

import numpy as np
import op_problems
import pytest
import tensorflow as tf
from cases import Case
from op_problems import arguments, assert_same_bits, function_of, results_and_gradients
from processes import run_python
from raw_problem import planned
from threads import in_threads

import fusedconvbn

# Large enough to be split among threads, in training and in inference, with sizes that no tile divides.
LARGE = Case(batch=5, height=27, width=31, in_channels=19, out_channels=37, training=True, activation="silu")
MANY = [
    LARGE,
    replace(LARGE, training=False, residual=True, activation="relu"),
    replace(LARGE, data_format="NCHW", in_channels=32, out_channels=32, groups=32, strides=(2, 2)),
    replace(LARGE, dtype="bf16", residual=True, kernel=(1, 1)),
    replace(LARGE, dtype="f64", in_channels=8, out_channels=12, groups=4),
    replace(LARGE, in_channels=32, out_channels=72, activation="relu"),  # by Winograd's algorithm
]


EIGHT = [replace(LARGE, height=13, width=11, batch=batch) for batch in range(2, 10)]


@pytest.mark.parametrize("case", [*MANY, *EIGHT], ids=str)
def test_these_are_split_among_threads(case):
    assert planned(case, "forward", threads=2).useful_threads == 2


def concrete_function(case):
    """Results and gradients with unknown batch and spatial sizes."""
    call = function_of(fusedconvbn.fused_conv_bn, case)
    tensors, cotangents = arguments(case), op_problems.upstream(case)
    spec = lambda t: tf.TensorSpec([None, None, None, t.shape[3]] if t.shape.rank == 4 else t.shape, t.dtype)  # noqa: E731
    function = tf.function(lambda t, c: results_and_gradients(call, t, c))
    return function.get_concrete_function([spec(t) for t in tensors], [spec(c) for c in cotangents])


def test_eight_threads_on_one_function():
    function = concrete_function(EIGHT[0])
    calls = [(arguments(case), op_problems.upstream(case)) for case in EIGHT]
    expected = [function(*call) for call in calls]
    for i, results in enumerate(in_threads(8, lambda i: [function(*calls[i]) for _ in range(5)])):
        for result in results:
            assert_same_bits(result, expected[i])


def test_many_ops_at_once():
    """Six threads, twelve independent ops each: more than any pool has threads, some called on threads of the pool."""
    case = replace(LARGE, batch=2)
    tensors, call = arguments(case), function_of(fusedconvbn.fused_conv_bn, case)
    branches = tf.function(lambda scales: [call(s * tensors[0], *tensors[1:]).output for s in tf.unstack(scales)])
    scales = tf.range(1.0, 13.0)
    expected = branches(scales)
    for result in in_threads(6, lambda _: branches(scales)):
        assert_same_bits(result, expected)


def test_inside_of_a_data_set():
    tensors, call = arguments(LARGE), function_of(fusedconvbn.fused_conv_bn, LARGE)
    images = tf.stack([tensors[0] * scale for scale in range(1, 7)])
    data = tf.data.Dataset.from_tensor_slices(images).map(lambda x: call(x, *tensors[1:]).output, tf.data.AUTOTUNE)
    assert_same_bits(list(data), [call(x, *tensors[1:]).output for x in images])


@pytest.fixture(scope="module")
def with_threads(tmp_path_factory):
    """Results of MANY in a process whose pool has so many threads."""
    script = """
        import sys
        import numpy as np
        import tensorflow as tf
        tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
        import test_op_threads as tests
        results = [tests.concrete_function(c)(tests.arguments(c), tests.op_problems.upstream(c)) for c in tests.MANY]
        bits = [np.frombuffer(r.numpy().tobytes(), np.uint8) for result in results for r in result]
        np.savez(sys.argv[2], *bits)
    """

    def run(threads):
        path = tmp_path_factory.mktemp("threads") / f"{threads}.npz"
        run_python(script, threads, path)
        return list(np.load(path).values())

    return run


def test_same_bits_for_any_number_of_threads(with_threads):
    one, two = (with_threads(count) for count in (1, 2))
    assert len(one) == sum(3 + len(arguments(case)) for case in MANY)
    assert_same_bits(two, one)


def test_same_bits_for_denormal_numbers():
    """Results far below 1e-38 are zeros, as TensorFlow's threads compute them, whichever thread computes them."""
    case = replace(LARGE, training=False, activation=None)
    inputs, filters, gamma, _, mean, variance = arguments(case)
    tensors = (1e-30 * inputs, 1e-12 * filters, gamma, 0 * mean, 0 * mean, variance)
    assert np.unique(function_of(fusedconvbn.fused_conv_bn, case)(*tensors).output).tolist() == [0]


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["eager", "function"])
def test_memory_does_not_grow(kind):
    """A thousand calls that each lost as little as one output of 8 channels would be noticed."""
    case = Case(height=16, width=16, in_channels=8, out_channels=8, training=True, activation="relu")
    batches = [replace(case, batch=batch) for batch in range(1, 11)]
    calls = [(arguments(b), op_problems.upstream(b)) for b in batches]
    call = function_of(fusedconvbn.fused_conv_bn, case)
    step = concrete_function(case) if kind == "function" else lambda t, c: results_and_gradients(call, t, c)
    for i in range(200):
        step(*calls[i % 10])
    before = resident_bytes()
    for i in range(1000):
        step(*calls[i * 7 % 10])
    assert resident_bytes() - before < 8 << 20


PLACEMENT = """
    import os, time
    import tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(2)
    import test_op_threads as tests
    def threads():
        return [int(thread) for thread in os.listdir("/proc/self/task")]
    def allow(cpus):
        for thread in threads():
            os.sched_setaffinity(thread, cpus)
    given = set(sorted(os.sched_getaffinity(0))[:2])
    tensors, call = tests.arguments(tests.LARGE), tests.function_of(tests.fusedconvbn.fused_conv_bn, tests.LARGE)
    expected = call(*tensors).output
    for _ in range(30):
        allow({min(given)})  # all on one
        tests.assert_same_bits(call(*tensors).output, expected)
        allow(given)
        tests.assert_same_bits(call(*tensors).output, expected)
    time.sleep(1)  # a helper that came too late for the last call may still be moving
    print([thread for thread in threads() if os.sched_getaffinity(thread) != given])
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors"
)
def test_threads_may_run_where_they_might_before():
    """A helper that leaves its caller's processor is free to come back."""
    assert run_python(PLACEMENT) == "[]"
