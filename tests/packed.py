"""A convolution whose packed filters may be kept, and what its result has to be."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

import fusedconvbn
from fusedconvbn import raw

SHAPE = (3, 3, 32, 48)
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((1, 14, 14, 32), np.float32)
GAMMA, BETA, MEAN = RNG.standard_normal((3, 48), np.float32)
VARIANCE = RNG.uniform(0.5, 2, 48).astype(np.float32)
REST = (GAMMA, BETA, MEAN, VARIANCE)


def random_filters():
    return RNG.standard_normal(SHAPE, np.float32)


def variable(filters=None):
    """One in memory of TensorFlow's, not of an array: the result of an op."""
    return tf.Variable(1 * tf.constant(random_filters() if filters is None else filters))


def output(filters, inputs=INPUTS, **options):
    return fusedconvbn.fused_conv_bn(inputs, filters, *REST, padding="SAME", **options).output


def expected(filters, inputs=INPUTS, **options):
    return raw.forward(inputs, np.asarray(filters), *REST, padding="SAME", **options).output


def assert_right(result, filters, **options):
    np.testing.assert_array_equal(result, expected(filters, **options))


def write_unseen(filters):
    """Overwrites the memory of a variable without TensorFlow's knowledge, by a private function."""
    memory = filters.value()._numpy()
    memory[...] = random_filters()
    np.testing.assert_array_equal(filters.numpy(), memory)


def keeps(call, filters):
    """Whether `call` no longer reads the filters, having been called before."""
    before = call()
    write_unseen(filters)
    after = call()
    assert np.array_equal(after, before) != np.array_equal(after, expected(filters.numpy()))
    return np.array_equal(after, before)


def called(call, times=3):
    return [call() for _ in range(times)][-1]
