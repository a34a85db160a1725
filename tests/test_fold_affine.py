"""The algebra of folding, against convolutions written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fusedconvbn.folding.affine import AffineMap, Blocked, Weights
from fusedconvbn.folding.linear_nodes import same_padding

RNG = np.random.default_rng(5)


def random_map(channels: int) -> AffineMap:
    return AffineMap.of(RNG.normal(size=channels), RNG.normal(size=channels))


def convolve(weights: Weights, x: np.ndarray) -> np.ndarray:
    """Without padding and strides, [N, L, Cin] with [taps, Cin / groups, K]."""
    taps, depth, filters = weights.values.shape
    per_group = filters // weights.groups
    length = x.shape[1] - taps + 1
    out = np.zeros((x.shape[0], length, filters))
    for k in range(filters):
        first = (k // per_group) * depth
        for t in range(taps):
            out[:, :, k] += x[:, t : t + length, first : first + depth] @ weights.values[t, :, k]
    return out if weights.bias is None else out + weights.bias


def random_weights(groups: int, bias: bool, taps: int = 3, depth: int = 2, per_group: int = 3) -> Weights:
    filters = groups * per_group
    return Weights(RNG.normal(size=(taps, depth, filters)), RNG.normal(size=filters) if bias else None, groups)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_a_map_behind_goes_into_the_weights(groups, bias):
    weights = random_weights(groups, bias)
    m, x = random_map(weights.outputs), RNG.normal(size=(2, 7, weights.inputs))
    np.testing.assert_allclose(convolve(weights.followed_by(m), x), m(convolve(weights, x)), rtol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_a_map_before_goes_into_the_weights(groups, bias):
    weights = random_weights(groups, bias)
    m, x = random_map(weights.inputs), RNG.normal(size=(2, 7, weights.inputs))
    np.testing.assert_allclose(convolve(weights.preceded_by(m), x), convolve(weights, m(x)), rtol=1e-11)


def test_one_number_for_all_channels():
    weights, m = random_weights(2, True), AffineMap.of(0.3, -2.0)
    x = RNG.normal(size=(2, 7, weights.inputs))
    np.testing.assert_allclose(convolve(weights.followed_by(m), x), m(convolve(weights, x)), rtol=1e-12)
    np.testing.assert_allclose(convolve(weights.preceded_by(m), x), convolve(weights, m(x)), rtol=1e-11)


def test_no_bias_where_there_is_none():
    weights, m = random_weights(1, False), AffineMap.of(RNG.normal(size=3))
    assert weights.followed_by(m).bias is None
    assert weights.preceded_by(AffineMap.of(RNG.normal(size=2))).bias is None


def test_batch_norm_divides_by_the_square_root():
    gamma, beta, mean, variance = (RNG.uniform(0.5, 2, 4) for _ in range(4))
    m, x = AffineMap.of_batch_norm(gamma, beta, mean, variance, 0.1), RNG.normal(size=(3, 4))
    np.testing.assert_allclose(m(x), gamma * (x - mean) / np.sqrt(variance + 0.1) + beta, rtol=1e-12)
    bare = AffineMap.of_batch_norm(None, None, mean, variance, 0.1)
    np.testing.assert_allclose(bare(x), (x - mean) / np.sqrt(variance + 0.1), rtol=1e-12)


@pytest.mark.parametrize("variance", [-1.0, -1e-3, np.nan])
def test_batch_norm_of_no_variance(variance):
    with pytest.raises(Blocked, match="variance"):
        AffineMap.of_batch_norm(None, None, np.zeros(2), np.array([1.0, variance]), 1e-3)


@pytest.mark.parametrize("name", ["gamma", "beta", "mean"])
def test_batch_norm_of_what_is_not_finite(name):
    vectors = {"gamma": np.ones(2), "beta": np.ones(2), "mean": np.ones(2)}
    vectors[name] = np.array([1.0, np.nan])
    with pytest.raises(Blocked, match="finite"):
        AffineMap.of_batch_norm(**vectors, variance=np.ones(2), epsilon=1e-3)


def test_composition():
    first, second, x = random_map(3), random_map(3), RNG.normal(size=(5, 3))
    np.testing.assert_allclose(second.after(first)(x), second(first(x)), rtol=1e-12)


def test_parts():
    m, x = random_map(5), RNG.normal(size=(2, 5))
    np.testing.assert_array_equal(m.part(1, 3)(x[:, 1:3]), m(x)[:, 1:3])
    whole = m.part(1, 3).over(1, 3, 5)(x)
    np.testing.assert_array_equal(whole[:, 1:3], m(x)[:, 1:3])
    np.testing.assert_array_equal(np.delete(whole, [1, 2], 1), np.delete(x, [1, 2], 1))


def test_the_padding_that_maps_to_zero():
    assert AffineMap.of([2.0, -4.0], [1.0, -2.0]).preimage(0.0) == -0.5
    assert AffineMap.of([2.0, 3.0]).preimage(0.0) == 0.0
    assert AffineMap.of([2.0, 2.0], [1.0, 1.0]).image(3.0) == 7.0


@pytest.mark.parametrize(("scale", "shift"), [([1.0, 2.0], [1.0, 1.0]), ([1.0, 0.0], [0.5, 0.0]), ([0.0], [1.0])])
def test_no_padding_maps_to_zero(scale, shift):
    with pytest.raises(Blocked, match="padding"):
        AffineMap.of(scale, shift).preimage(0.0)


@pytest.mark.parametrize(
    ("axis", "before", "after", "new"),
    [(-1, (4, 5, 3), (60,), -1), (-3, (3, 4, 5), (60,), -1), (-1, (6,), (1, 1, 6), -1), (-2, (3, 4), (3, 2, 2), -3)],
)
def test_reshape(axis, before, after, new):
    m, x = random_map(before[axis]), RNG.normal(size=(2, *before))
    moved, at = m.reshaped(axis, before, after)
    assert at == new
    mapped = np.moveaxis(m(np.moveaxis(x, axis, -1)), -1, axis).reshape(2, *after)
    y = x.reshape(2, *after)
    np.testing.assert_array_equal(np.moveaxis(moved(np.moveaxis(y, new, -1)), -1, new), mapped)


def test_reshape_that_mixes_channels():
    with pytest.raises(Blocked, match="reshape"):
        random_map(60).reshaped(-1, (60,), (4, 5, 3))


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(
    ("taps", "stride", "dilation"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (5, 3, 1), (3, 1, 2), (1, 4, 1)]
)
def test_same_padding_is_tensorflows(size, taps, stride, dilation):
    import tensorflow as tf

    x = np.arange(1.0, size + 1, dtype="float32").reshape(1, 1, size, 1)
    w = RNG.normal(size=(1, taps, 1, 1)).astype("float32")
    dilations = [1, 1, dilation, 1]
    same = tf.nn.conv2d(x, w, [1, 1, stride, 1], "SAME", dilations=dilations)
    pads = [[0, 0], [0, 0], list(same_padding(taps, stride, dilation, size)), [0, 0]]
    explicit = tf.nn.conv2d(tf.pad(x, pads), w, [1, 1, stride, 1], "VALID", dilations=dilations)
    np.testing.assert_allclose(same, explicit, rtol=1e-6)
