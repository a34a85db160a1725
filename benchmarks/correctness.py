"""Whether a result is right: the tolerance, derived from the length of the sums, and the comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from benchmarks.problem import AnyProblem, NetworkProblem, Problem

_EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_WINOGRAD = 10  # F(4x4,3x3) loses this much on a direct convolution
# Of a whole network, error over result, as lengths: 10 times what stock TensorFlow errs by in ResNet-50. Behind each
# rounding some relu falls on the other side of its kink, so gradients lose half of the digits, 16-bit ones all but the
# direction: there the layers' own checks must do.
_LOGITS = {"float32": 1e-4, "float64": 1e-9, "float16": 2e-2, "bfloat16": 1e-1}
_GRADIENTS = {"float32": 1e-1, "float64": 1e-4, "float16": 0.9, "bfloat16": 0.9}
_CHUNK = 1 << 22  # elements compared at a time


def _terms(problem: Problem, name: str) -> int:
    """How many products are summed for one element of the result called `name`."""
    case = problem.case
    taps = case.filter_height * case.filter_width
    if name == "d_inputs":
        return taps * case.out_channels // case.groups
    if name in ("d_filters", "d_gamma", "d_beta", "moving_mean", "moving_variance", "moving_variance_unbiased"):
        return problem.pixels
    return taps * case.channels // case.groups


def bound(problem: Problem, name: str) -> float:
    """The error allowed relative to an element plus the root mean square of its tensor: sums are in float32 at least,
    their errors random (so sqrt), and a result and what it is made of are rounded to the problem's type a few times.
    """
    sums = _EPS["float64" if problem.dtype == "float64" else "float32"]
    # Whatever is normalized by the batch's statistics has the error of their sums too: that of stock fused_batch_norm's
    # variance is 2e-6 of it for 3136 pixels a channel, 6e-5 for 200704.
    statistics = problem.pixels if problem.training and name != "conv_output" else 0
    lengths = _WINOGRAD * math.sqrt(_terms(problem, name)) + math.sqrt(statistics)
    rounded = problem.save == "bfloat16" and problem.dtype == "float32" and name.startswith("d_")  # z, for backward
    return 4 * lengths * sums + 4 * _EPS[problem.dtype] + (_EPS["bfloat16"] if rounded else 0)


def mismatch(problem: AnyProblem, name: str, actual: np.ndarray, expected: np.ndarray) -> str | None:
    """What is wrong with `actual`, or None."""
    if actual.size != expected.size:
        return f"{name} has {actual.size} elements, expected {expected.size}"
    if not expected.size:
        return None
    if isinstance(problem, NetworkProblem):
        return _network_mismatch(problem, name, actual, expected)
    return _layer_mismatch(problem, name, actual, expected)


def _network_mismatch(problem: NetworkProblem, name: str, actual: np.ndarray, expected: np.ndarray) -> str | None:
    """Of a whole network only the length of the error counts."""
    pairs = [(float(np.sum(np.square(a - e))), float(np.sum(np.square(e)))) for a, e in _chunks(actual, expected)]
    error, size = (math.sqrt(sum(squares)) for squares in zip(*pairs, strict=True))
    allowed = (_LOGITS if name == "logits" else _GRADIENTS)[problem.dtype]
    if error <= allowed * size:
        return None
    return (
        f"{name}: the error's norm is {error / size if size else math.inf:.3g} of the result's, allowed {allowed:.3g}"
    )


def _layer_mismatch(problem: Problem, name: str, actual: np.ndarray, expected: np.ndarray) -> str | None:
    """No element may be off by more than bound() allows, nor the root mean square
    of the error by more than half of it (which finds a small error everywhere).
    """
    allowed = bound(problem, name)
    rms = math.sqrt(sum(float(np.sum(np.square(e))) for _, e in _chunks(expected, expected)) / expected.size)
    error_squares = 0.0
    for chunk, (a, e) in enumerate(_chunks(actual, expected)):
        error = np.abs(a - e)
        wrong = ~(error <= allowed * (rms + np.abs(e)))  # a NaN is wrong
        if wrong.any():
            at = int(np.argmax(np.where(wrong, np.nan_to_num(error, nan=np.inf), -1)))
            return f"{name}: element {chunk * _CHUNK + at} is {a[at]:.8g}, expected {e[at]:.8g} (rms {rms:.3g})"
        error_squares += float(np.sum(np.square(error)))
    error_rms = math.sqrt(error_squares / expected.size)
    if error_rms > allowed / 2 * rms:
        return f"{name}: the error's root mean square is {error_rms:.3g}, that of the result {rms:.3g}"
    return None


def _chunks(actual: np.ndarray, expected: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of flat float64 pieces, so that big results are never held twice."""
    actual, expected = actual.reshape(-1), expected.reshape(-1)
    for start in range(0, expected.size, _CHUNK):
        piece = slice(start, start + _CHUNK)
        yield actual[piece].astype(np.float64), expected[piece].astype(np.float64)
