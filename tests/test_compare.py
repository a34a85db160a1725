"""The comparator itself: each way in which comparators are known to let wrong results pass."""

import numpy as np
import pytest
from compare import Expected, assert_close


def expected(value, tolerance=1e-6):
    value = np.asarray(value, np.float64)
    return Expected(value, np.full(value.shape, tolerance))


def fails(actual, wanted, match, dtype=None):
    with pytest.raises(AssertionError, match=match):
        assert_close(np.asarray(actual), wanted, "y", dtype)


@pytest.fixture
def million():
    return np.random.default_rng(1).standard_normal(1_000_000)


def test_accepts_what_is_equal_and_what_is_within_tolerance():
    assert_close(np.array([1.0, np.nan, np.inf, -np.inf]), expected([1, np.nan, np.inf, -np.inf]))
    assert_close(np.array([1 + 5e-7, -2]), expected([1, -2]))
    assert_close(np.zeros((0, 3)), expected(np.zeros((0, 3))))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_where_a_number_is_expected(bad):
    fails([1, bad, 3], expected([1, 2, 3]), r"first difference at \(1,\)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_where_a_non_finite_is_expected(value):
    fails([1, 2, 3], expected([1, value, 3]), r"first difference at \(1,\)")


def test_infinity_of_the_wrong_sign():
    fails([-np.inf, 1], expected([np.inf, 1]), "inf at 0 places, expected at 1")


def test_nan_in_the_tolerance_accepts_nothing():
    fails([1.0], expected([1], np.nan), "beyond their tolerance")


def test_one_bad_element_in_a_million(million):
    actual = million.copy()
    actual[765_432] *= 1.001
    fails(actual, expected(million), r"1 of 1000000 elements .* worst at \(765432,\)")


def test_one_nan_in_a_million(million):
    actual = million.copy()
    actual[3] = np.nan
    fails(actual, expected(million), r"NaN at 1 places")


def test_all_elements_near_their_bound(million):
    fails(million + 0.9e-6, expected(million), "root mean square")


def test_equal_elements_near_their_bound(million):
    """They round alike, as one; a few others beside them do not help."""
    equal = np.full_like(million, 3.0)
    assert_close(equal + 0.9e-6, expected(equal))
    equal[:1000] = million[:1000]
    assert_close(equal + 0.9e-6, expected(equal))
    fails(equal + 1.1e-6, expected(equal), "beyond their tolerance")


@pytest.mark.parametrize(("actual", "wanted"), [([-2.0], [-1.0]), ([-1.0], [1.0]), ([-1e-3], [-2e-3])])
def test_negative_numbers(actual, wanted):
    fails(actual, expected(wanted), "beyond their tolerance")


@pytest.mark.parametrize("shape", [(4,), (2, 2, 1), (1, 2, 2)])
def test_shape_is_not_broadcast(shape):
    fails(np.ones(shape), expected(np.ones((2, 2))), "shape")


def test_scalar_for_an_array():
    fails(np.float64(1), expected(np.ones(3)), "shape")


def test_dtype():
    fails(np.ones(2, np.float64), expected(np.ones(2)), "dtype float64, expected float32", np.dtype(np.float32))


def test_message_names_the_worst_element_and_its_values():
    fails([[1.0, 2.5], [3.1, 4.0]], expected([[1, 2], [3, 4]]), r"y: 2 of 4 .* worst at \(0, 1\): .*2\.5.*2\.0")
