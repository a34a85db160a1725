"""The comparator of the tests: nothing that differs passes, and a failure says where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Expected:
    """A float64 array, and for each element how far from it a correct result may lie (see tests/reference.py)."""

    value: np.ndarray
    tolerance: np.ndarray

    def like(self, value: np.ndarray) -> Expected:
        """Another value within the same tolerance."""
        return Expected(value, self.tolerance)


def assert_close(actual: np.ndarray, expected: Expected, name: str = "result", dtype: np.dtype | None = None) -> None:
    """Fails unless `actual` has the dtype, the shape, the infinities and NaNs, and the numbers of `expected`.

    Numbers are held twice: each within its tolerance, and all together (root mean square) within half of it, since the
    tolerance is a bound of the error, which a correct result keeps well clear of on the whole.
    """
    actual = np.asarray(actual)
    if dtype is not None:
        assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {dtype}"
    assert actual.shape == expected.value.shape, f"{name}: shape {actual.shape}, expected {expected.value.shape}"
    actual = actual.astype(np.float64)
    _assert_same_where(np.isnan(actual), np.isnan(expected.value), actual, expected.value, f"{name}: NaN")
    for kind, infinity in (("inf", np.inf), ("-inf", -np.inf)):
        _assert_same_where(actual == infinity, expected.value == infinity, actual, expected.value, f"{name}: {kind}")
    finite = np.isfinite(expected.value)
    difference = np.abs(np.where(finite, actual, 0) - np.where(finite, expected.value, 0))
    tolerance = np.where(finite, np.broadcast_to(expected.tolerance, actual.shape), 0)
    _assert_each(difference, tolerance, actual, expected.value, name)
    _assert_all(difference[finite], tolerance[finite], np.broadcast_to(expected.value, actual.shape)[finite], name)


def _assert_same_where(actual_mask, expected_mask, actual, expected, what: str) -> None:
    wrong = actual_mask != expected_mask
    if wrong.any():
        index = tuple(map(int, np.argwhere(wrong)[0]))
        raise AssertionError(
            f"{what} at {actual_mask.sum()} places, expected at {expected_mask.sum()}; first difference at {index}: "
            f"{actual[index]}, expected {expected[index]}"
        )


def _assert_each(difference, tolerance, actual, expected, name: str) -> None:
    beyond = ~(difference <= tolerance)  # also where the tolerance is NaN
    if beyond.any():
        excess = np.where(beyond, difference / np.maximum(tolerance, np.finfo(np.float64).tiny), 0)
        index = tuple(map(int, np.unravel_index(np.argmax(excess), excess.shape)))
        raise AssertionError(
            f"{name}: {beyond.sum()} of {beyond.size} elements beyond their tolerance; worst at {index}: "
            f"{actual[index]!r}, expected {expected[index]!r}, difference {difference[index]:.3g}, "
            f"tolerance {tolerance[index]:.3g}"
        )


def _assert_all(difference, tolerance, expected, name: str) -> None:
    squares = np.square(tolerance / max(tolerance.max(initial=0), np.finfo(np.float64).tiny))
    if not squares.any():
        return  # empty, or all held to be exact
    error, size = _rms(difference), _rms(tolerance)
    if error > _share(squares) * size:
        _, same = np.unique(expected, return_inverse=True)
        limit = _share(np.bincount(same.ravel(), squares.ravel())) * size  # what is equal rounds alike
        assert error <= limit, f"{name}: root mean square error {error:.3g}, limit {limit:.3g}"


def _share(squares: np.ndarray) -> float:
    """Of the tolerance; a few elements may all happen to lie near theirs."""
    weight = squares.sum() ** 2 / np.square(squares).sum()  # how many the large tolerances belong to
    return min(1.0, 0.5 + 2 / np.sqrt(weight))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
