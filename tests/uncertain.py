"""Arithmetic that carries error bounds along: what the oracle computes with.

A `Real` is an array of a type wider than what implementations compute in (float64; for those that compute in float64
the platform's long double) and, per element, how far a correct implementation may be from it. Each operation adds what
its operands err by, to first order, and its own rounding, `eps` relative to what it adds or multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from compare import Expected


@dataclass(frozen=True)
class Real:
    """`value` within `error`; `eps` is the machine epsilon of the type that implementations compute in."""

    value: np.ndarray
    error: np.ndarray
    eps: float

    __array_ufunc__ = None  # array * Real is an error, not an array of objects

    @classmethod
    def exact(cls, value, eps: float) -> Real:
        value = np.asarray(value).astype(np.float64 if eps > np.finfo(np.float64).eps else np.longdouble)
        return cls(value, np.zeros(value.shape), eps)

    def _of(self, other: Real | float) -> Real:
        return other if isinstance(other, Real) else Real.exact(other, self.eps)

    def __add__(self, other: Real | float) -> Real:
        other = self._of(other)
        rounding = self.eps * (np.abs(self.value) + np.abs(other.value))
        return Real(self.value + other.value, self.error + other.error + rounding, self.eps)

    def __neg__(self) -> Real:
        return Real(-self.value, self.error, self.eps)

    def __sub__(self, other: Real | float) -> Real:
        return self + -self._of(other)

    def __mul__(self, other: Real | float) -> Real:
        other = self._of(other)
        product = self.value * other.value
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.eps * np.abs(product)
        return Real(product, error, self.eps)

    def apply(self, function: Callable[[np.ndarray], np.ndarray], own_error: np.ndarray | float = 0.0) -> Real:
        """function(self), for a function monotone within the error; `own_error` is that of evaluating it."""
        value = function(self.value)
        sides = [np.abs(function(self.value + sign * self.error) - value) for sign in (-1, 1)]
        return Real(value, np.maximum(*sides) + own_error, self.eps)

    def sum(self) -> Real:
        """Over all axes but the last."""
        axes = tuple(range(self.value.ndim - 1))
        terms = np.prod([self.value.shape[axis] for axis in axes])
        error = summation_error(terms, np.sum(self.value**2, axes), np.sum(self.error**2, axes), self.eps)
        # In more than float64: many equal terms, as padding makes them, round alike, and float64 cases would see it.
        return Real(self.value.sum(axes, dtype=np.longdouble).astype(np.float64), error, self.eps)

    def rounded(self, dtype: np.dtype) -> Real:
        """Stored in `dtype` and read again: what is off by one unit only because it lies near the middle of two."""
        value = _round(self.value, dtype)
        sides = [np.abs(_round(self.value + sign * self.error, dtype) - value) for sign in (-1, 1)]
        return Real(value, np.maximum(*sides), self.eps)

    def widened(self, dtype: np.dtype) -> Real:
        """With the error of rounding to `dtype`: half a unit, and flushing of what float32 holds as subnormal."""
        info = ml_dtypes.finfo(dtype)
        flushed = max(float(info.smallest_subnormal), float(np.finfo(np.float32).tiny))
        return Real(self.value, self.error + 0.5 * float(info.eps) * np.abs(self.value) + flushed, self.eps)

    def expected(self, dtype: np.dtype) -> Expected:
        """As a result of type `dtype`. Where the bound is not finite (relu(-inf)) the value is to be met exactly."""
        result = self.widened(dtype)
        return Expected(result.value, np.where(np.isfinite(result.error), result.error, 0.0))


def summation_error(terms: float, squares: np.ndarray, squared_errors: np.ndarray | float, eps: float) -> np.ndarray:
    """Of a sum of `terms` numbers, from the sum of their squares and of the squares of their errors.

    sqrt(squares) is the size that a sum of random signs has; its partial sums err by eps of it, and there are `terms`.
    """
    return 4 * (eps * np.sqrt(terms * squares) + np.sqrt(squared_errors))


def bilinear(
    operation: Callable[..., np.ndarray], terms: int, a: Real, b: Real, by_transforms: np.ndarray | None = None
) -> Real:
    """operation(a, b), each element of which is a sum of at most `terms` products of an element of each.

    `by_transforms`, if given, is a sum of squared products that no element errs less than: transforms mix the elements
    of a tile.
    """
    a_error, a_square, b_error, b_square = (
        np.square(array.astype(np.float64)) for array in (a.error, a.value, b.error, b.value)
    )
    squared_errors: np.ndarray | float = 0.0
    if a_error.any():
        squared_errors = squared_errors + operation(a_error, b_square)
    if b_error.any():
        squared_errors = squared_errors + operation(a_square, b_error)
    squares = operation(a_square, b_square)
    if by_transforms is not None and squares.size:
        squares = np.maximum(squares, by_transforms)
    error = summation_error(terms, squares, squared_errors, a.eps)
    return Real(operation(a.value, b.value), error, a.eps)


def _round(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return value.astype(dtype).astype(value.dtype)
