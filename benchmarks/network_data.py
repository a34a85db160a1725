"""What a whole network computes with: random weights, images, labels, the same in every process."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.cases import Case
from benchmarks.data import DTYPES, normal
from benchmarks.networks import CLASSES, Weights
from benchmarks.problem import NetworkProblem

_RESIDUAL_GAMMA = 0.3  # where a residual is added: as in trained networks, else the activations of deep ones grow


class NetworkDraw:
    """A network's weights (networks.Draw), scaled so that activations keep their size from layer to layer; rounded to
    `dtype`, as float64 if `wide`.
    """

    def __init__(self, dtype: str, wide: bool = False):
        self._dtype, self._as = DTYPES[dtype], np.float64 if wide else DTYPES[dtype]
        self._vector = np.float64 if wide or dtype == "float64" else np.float32
        self._wide = "float64" if dtype == "float64" else "float32"

    def _rounded(self, array: np.ndarray) -> np.ndarray:
        return array.astype(self._dtype).astype(self._as, copy=False)

    def _normal(self, place: int, part: int, shape: tuple[int, ...]) -> np.ndarray:
        return normal([place, part], shape, self._wide)

    def _kernel(self, place: int, shape: tuple[int, ...]) -> np.ndarray:
        gain = math.sqrt(2 / math.prod(shape[:-1]))  # a relu halves the mean square
        return self._rounded(self._normal(place, 0, shape) * np.asarray(gain, self._wide))

    def convolution(self, place: int, case: Case) -> Weights:
        gamma, beta, mean, variance = (self._normal(place, part, (case.out_channels,)) for part in (1, 2, 3, 4))
        vectors = {
            "gamma": (1 + 0.1 * gamma) * (_RESIDUAL_GAMMA if case.residual else 1),
            "beta": 0.1 * beta,
            "moving_mean": 0.1 * mean,
            "moving_variance": 0.5 + np.abs(variance),
        }
        wide = {name: vector.astype(self._vector) for name, vector in vectors.items()}
        return Weights(filters=self._kernel(place, case.filter_shape), **wide)

    def dense(self, place: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return self._kernel(place, shape), self._rounded(0.1 * self._normal(place, 1, shape[-1:]))


def network_images(problem: NetworkProblem) -> np.ndarray:
    return normal([0], (problem.batch, problem.image, problem.image, 3), problem.dtype)


def network_labels(problem: NetworkProblem) -> np.ndarray:
    return np.random.default_rng(1).integers(CLASSES, size=problem.batch)
