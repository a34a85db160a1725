"""Batch norm merged into the convolution before it, as one does by hand for inference.

`python -m benchmarks.folding` measures what does so in whole models: see folding_command.
"""

from __future__ import annotations

import sys

import numpy as np

from benchmarks.networks import Weights
from benchmarks.problem import EPSILON


def fold(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Filters and bias, of the filters' type, of a convolution that needs no batch norm behind it."""
    gamma, beta, mean, variance = (
        np.asarray(vector, np.float64)
        for vector in (weights.gamma, weights.beta, weights.moving_mean, weights.moving_variance)
    )
    scale = gamma / np.sqrt(variance + EPSILON)
    dtype = weights.filters.dtype
    return (weights.filters.astype(np.float64) * scale).astype(dtype), (beta - mean * scale).astype(dtype)


if __name__ == "__main__":
    from benchmarks.folding_command import main

    sys.exit(main())
