"""Medians, spreads and ratios of samples that were taken in the same rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def median(samples: Sequence[float]) -> float:
    """The middle sample."""
    return float(np.median(samples))


def spread(samples: Sequence[float]) -> float:
    """The interquartile range."""
    low, high = np.percentile(samples, [25, 75])
    return float(high - low)


def bootstrap_interval(samples: Sequence[float], level: float = 0.9, resamples: int = 2000) -> tuple[float, float]:
    """Where the median lies with this probability: quantiles of the medians of samples drawn again, with return."""
    drawn = np.random.default_rng(0).choice(np.asarray(samples, np.float64), (resamples, len(samples)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def round_ratios(baseline: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times faster ours was, round by round."""
    return [theirs / own for theirs, own in zip(baseline, ours, strict=True)]


def geometric_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """exp of the weighted mean of logarithms."""
    return math.exp(sum(w * math.log(v) for v, w in zip(values, weights, strict=True)) / sum(weights))
