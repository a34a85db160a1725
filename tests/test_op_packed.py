"""Packed filters that inference keeps between calls: where they are kept, and how many."""

import contextlib
import os

import numpy as np
import pytest
import tensorflow as tf
from packed import (
    INPUTS,
    REST,
    RNG,
    SHAPE,
    assert_right,
    called,
    keeps,
    output,
    variable,
    write_unseen,
)
from processes import run_python

import fusedconvbn
from fusedconvbn import raw


def test_filters_of_a_variable_are_kept(call):
    call, filters = call
    called(call)
    assert keeps(call, filters)


def test_the_first_call_keeps_nothing(call):
    call, filters = call
    called(call, 1)
    write_unseen(filters)
    assert_right(call(), filters.numpy())


def test_training_drops_them(call):
    call, filters = call
    called(call)
    output(filters, training=True)
    write_unseen(filters)
    assert_right(call(), filters.numpy())


class Module(tf.Module):
    def __init__(self):
        super().__init__()
        self.filters = variable()

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 32])])
    def __call__(self, inputs):
        return output(self.filters, inputs)


def test_a_reloaded_model(tmp_path):
    module = Module()
    called(lambda: module(INPUTS))
    tf.saved_model.save(module, tmp_path)
    loaded = tf.saved_model.load(tmp_path)
    for _ in range(3):
        assert_right(loaded(INPUTS), module.filters.numpy())
    loaded.filters.assign_add(tf.ones(SHAPE))
    for _ in range(3):
        assert_right(loaded(INPUTS), loaded.filters.numpy())
        assert_right(module(INPUTS), module.filters.numpy())
    assert keeps(lambda: loaded(INPUTS), loaded.filters)


def packing_kernels():
    """Those that pack filters of `SHAPE` in inference."""
    names = []
    for kernel in raw.kernels():
        if kernel.stage == "forward" and kernel.available:
            with contextlib.suppress(ValueError):  # it does not serve this problem
                if raw.plan(INPUTS.shape, SHAPE, kernel=kernel.name).packed_bytes > 0:
                    names.append(kernel.name)
    return names


def test_most_kernels_pack():
    assert {"forward_direct_generic", "forward_winograd2_generic"} <= set(packing_kernels())
    available = {kernel.name for kernel in raw.kernels() if kernel.available}
    if "forward_direct_amx" in available:
        assert raw.plan(INPUTS.shape, SHAPE, dtype="bfloat16").packed_bytes > 0
    assert raw.plan(INPUTS.shape, SHAPE, kernel="forward_reference").packed_bytes == 0


@pytest.mark.parametrize("kernel", packing_kernels())
def test_they_serve_images_of_all_sizes(kernel, monkeypatch):
    """What is packed for one size is right for another, with every kernel."""
    monkeypatch.setenv("FUSEDCONVBN_KERNEL", kernel)
    filters = variable()
    convolve = tf.function(lambda inputs: output(filters, inputs), reduce_retracing=True)
    sizes = [(1, 14, 14), (3, 9, 40), (1, 1, 1), (2, 56, 56), (40, 7, 7)]
    for size in sizes + sizes:
        inputs = RNG.standard_normal((*size, 32), np.float32)
        assert_right(convolve(inputs), filters.numpy(), inputs=inputs, kernel=kernel)
    assert keeps(lambda: convolve(INPUTS), filters)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 1, 40, 50), 1), ((3, 3, 1, 48), 48), ((3, 3, 4, 24), 6), ((7, 7, 3, 64), 1)],
    ids=["1x1", "depthwise", "grouped", "first"],
)
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.bfloat16, tf.float16], ids=lambda d: d.name)
def test_they_are_right_for_all_kinds_of_layers(shape, groups, dtype):
    stat = tf.float64 if dtype == tf.float64 else tf.float32
    rest = [tf.cast(t[: shape[3]] if len(t) >= shape[3] else np.resize(t, shape[3]), stat) for t in REST]
    filters = tf.Variable(tf.cast(tf.random.normal(shape), dtype))
    inputs = tf.cast(tf.random.normal([2, 12, 10, shape[2] * groups]), dtype)
    call = tf.function(lambda: fusedconvbn.fused_conv_bn(inputs, filters, *rest, padding="SAME").output)
    for _ in range(2):
        for _ in range(3):
            arrays = [t.numpy() for t in (inputs, filters, *rest)]
            np.testing.assert_array_equal(call(), raw.forward(*arrays, padding="SAME").output)
        filters.assign(filters * 2)


@pytest.mark.parametrize("shape", [(3, 3, 3, 40), (1, 1, 16, 32), (3, 3, 40, 33)], ids=["first", "1x1", "3x3"])
def test_bfloat16_is_packed_alike_for_all_geometries(shape):
    """With few channels the taps of a filter line merge, if no dilation parts them."""
    rest = [tf.constant(np.resize(t, shape[3])) for t in REST]
    filters = tf.Variable(tf.cast(tf.random.normal(shape), tf.bfloat16))
    for _ in range(3):
        for size, strides, dilations in [(12, 1, 1), (12, 1, 2), (9, 2, 1), (56, 1, 1), (3, 1, 3)]:
            inputs = tf.cast(tf.random.normal([2, size, size, shape[2]]), tf.bfloat16)
            options = {"strides": strides, "dilations": dilations, "padding": "SAME"}
            arrays = [t.numpy() for t in (inputs, filters, *rest)]
            result = fusedconvbn.fused_conv_bn(inputs, filters, *rest, **options).output
            np.testing.assert_array_equal(result, raw.forward(*arrays, **options).output)


LIMITED = """
    import tensorflow as tf
    import packed as tests
    many = [tests.variable() for _ in range(20)]  # more than a megabyte, packed
    calls = [tf.function(lambda f=f: tests.output(f)) for f in many]
    for _ in range(3):
        for call in calls: call()
    print(tests.keeps(calls[0], many[0]), tests.keeps(calls[-1], many[-1]))
    used_long = tf.function(lambda: [tests.output(many[-1]) for _ in range(300)])
    for _ in range(5): used_long()
    print(tests.keeps(calls[-1], many[-1]))
"""


@pytest.mark.parametrize(
    ("limit", "printed"), [("0", "False False\nFalse"), ("1", "True False\nTrue"), ("", "True True\nTrue")]
)
def test_they_take_no_more_memory_than_allowed(limit, printed, monkeypatch):
    """The first ones stay, until others have been used for long."""
    monkeypatch.setenv("FUSEDCONVBN_PACKED_MEGABYTES", limit)
    assert run_python(LIMITED) == printed


@pytest.mark.parametrize("limit", ["much", "-1", "1.5", "64 MB", "17592186044416", "1" * 30])
def test_a_limit_that_is_no_number_of_megabytes(limit, monkeypatch):
    """Each op that is made looks, whatever the limit was that the process began with."""
    monkeypatch.setenv("FUSEDCONVBN_PACKED_MEGABYTES", limit)
    filters = variable()
    accepted = "FUSEDCONVBN_PACKED_MEGABYTES must be a whole number of megabytes, from 0 to 17592186044415"
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{accepted}\. Received: {limit}"):
        tf.function(lambda: output(filters))()


def whole(filters):
    return filters


def slices(filters):
    return tf.split(filters, 1, axis=0)[0]


@pytest.mark.parametrize("sizes", [(4,), (4, 28)], ids=["one row", "two rows"])
@pytest.mark.parametrize("of", [whole, slices])
def test_memory_of_old_values_is_given_back(sizes, of):
    """A hundred values of 2.4 MB, each of which was kept, in as many forms as rows read it."""
    filters = tf.Variable(tf.random.normal([3, 3, 256, 256]))
    inputs = [tf.random.normal([1, size, size, 256]) for size in sizes]
    zeros, ones = tf.zeros(256), tf.ones(256)

    def outputs():
        return [fusedconvbn.fused_conv_bn(x, of(filters), ones, zeros, zeros, ones, padding="SAME").output
                for x in inputs]  # fmt: skip

    call = tf.function(outputs)

    def step():
        filters.assign_add(tf.ones_like(filters))
        for _ in range(3):
            call()

    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(5):
        step()
    before = resident_bytes()
    for _ in range(100):
        step()
    assert resident_bytes() - before < 48 << 20


def test_filters_of_many_sizes_side_by_side():
    """What is dropped makes room for others; nobody's filters change meanwhile."""
    sizes = RNG.integers(1, 300, 24)
    rests = [[tf.constant(np.resize(t, size)) for t in REST] for size in sizes]
    many = [tf.Variable(1 * tf.random.normal([3, 3, 32, size])) for size in sizes]

    @tf.function
    def call():
        return [fusedconvbn.fused_conv_bn(INPUTS, f, *rest, padding="SAME").output for f, rest in zip(many, rests)]

    for _ in range(6):
        for filters in RNG.permutation(len(many))[:10]:
            many[filters].assign(tf.random.normal(many[filters].shape))
        for _ in range(3):
            results = call()
        for filters, rest, result in zip(many, rests, results, strict=True):
            arrays = [t.numpy() for t in (filters, *rest)]
            np.testing.assert_array_equal(result, raw.forward(INPUTS, *arrays, padding="SAME").output)
