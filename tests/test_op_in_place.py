"""Inference writes its result over a residual that nobody needs any more."""

import numpy as np
import pytest
import tensorflow as tf
from cases import Case, arrays
from raw_problem import planned

import fusedconvbn
from fusedconvbn import raw

CASES = {
    "dense": Case(height=13, width=14, in_channels=24, out_channels=40, residual=True, activation="relu"),
    "pointwise": Case(batch=2, kernel=(1, 1), height=11, in_channels=40, out_channels=72, residual=True),
    "few_channels": Case(height=20, width=31, out_channels=33, strides=(2, 2), residual=True, activation="silu"),
    "depthwise": Case(height=19, width=9, in_channels=37, out_channels=37, groups=37, residual=True),
    "channels_first": Case(data_format="NCHW", height=13, in_channels=20, out_channels=36, residual=True),
    "bf16": Case(dtype="bf16", height=13, in_channels=32, out_channels=64, residual=True, activation="relu"),
    "f16": Case(dtype="f16", height=13, in_channels=16, out_channels=40, residual=True),
}


def forward_rows(case: Case):
    for row in raw.kernels():
        if row.stage == "forward" and row.available:
            try:
                planned(case, "forward", kernel=row.name)
            except ValueError:  # it does not serve this problem
                continue
            yield row.name


RUNS = [(name, kernel) for name, case in CASES.items() for kernel in forward_rows(case)]


def address(tensor):
    return np.int64(tensor._numpy().ctypes.data)


def convolution(case: Case, training=False):
    """(address of the residual, a tensor of this function alone; that of the result; the result; the residual)."""
    *inputs, residual = (tf.constant(array) for array in arrays(case))

    @tf.function
    def call(half, again):
        own = half + half
        before = tf.py_function(address, [own], tf.int64)
        with tf.control_dependencies([before]):
            options = {**case.attributes, "training": training}
            output = fusedconvbn.fused_conv_bn(*inputs, own, **options).output
        after = tf.py_function(address, [output], tf.int64)
        with tf.control_dependencies([after]):
            return before, after, output, own - half if again else None

    return lambda again=False: call(residual / 2, again)


@pytest.mark.parametrize(("name", "kernel"), RUNS, ids=[f"{name}-{kernel}" for name, kernel in RUNS])
def test_the_same_bits_over_the_residual(name, kernel, monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_KERNEL", kernel)
    case = CASES[name]
    residual, result, output, _ = convolution(case)()
    assert residual == result
    expected = raw.forward(*arrays(case), **case.attributes, kernel=kernel).output
    assert output.numpy().tobytes() == expected.tobytes()


def test_not_in_training():
    residual, result, *_ = convolution(CASES["dense"], training=True)()
    assert residual != result


def test_a_residual_that_is_read_again_stays():
    case = CASES["dense"]
    residual, result, _, half = convolution(case)(again=True)
    assert residual != result
    np.testing.assert_array_equal(half, arrays(case).residual / 2)
