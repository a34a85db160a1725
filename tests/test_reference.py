"""The oracle itself: its gradients against finite differences of its forward pass, its convolution against a loop."""

from dataclasses import replace

import numpy as np
import pytest
import reference
from cases import ACTIVATIONS, Case, arrays, op_cases
from convolution import Convolution
from raw_problem import Problem

ARGUMENTS = ("inputs", "filters", "gamma", "beta", "moving_mean", "moving_variance", "residual")
BASE = Case(dtype="f64", batch=2, height=4, width=5, in_channels=4, out_channels=6, groups=2, strides=(2, 1),
            dilations=(1, 2), kernel=(3, 2), padding=((1, 2), (0, 1)), residual=True)  # fmt: skip
CASES = [
    replace(BASE, activation=activation, training=mode != "inference", unbiased=mode == "unbiased")
    for activation in ACTIVATIONS
    for mode in ("inference", "training", "unbiased")
] + [
    replace(BASE, data_format="NCHW", padding="SAME", training=True, groups=1),
    replace(BASE, padding="VALID", training=True, groups=4, out_channels=4, residual=False),
]


def loss(problem: Problem, arguments) -> float:
    """A weighted sum of all results of forward, whose gradients `problem.upstream` are."""
    results = reference.forward(*arguments, **problem.case.attributes)[:3]
    return sum(np.sum(weight * result.value) for weight, result in zip(problem.upstream, results, strict=True))


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_forward(case, name):
    problem = Problem(case)
    gradient = getattr(problem.backward, name)
    if gradient is None:
        assert not case.residual
        return
    direction = case.random("direction").standard_normal(gradient.value.shape)
    step = 1e-6
    losses = [
        loss(problem, replace(problem.arguments, **{name: getattr(problem.arguments, name) + sign * step * direction}))
        for sign in (-1, 1)
    ]
    expected = np.sum(gradient.value * direction)
    assert (losses[1] - losses[0]) / (2 * step) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("case", [replace(c, dtype="f64", data_format="NHWC") for c in op_cases()[::40]], ids=str)
def test_convolution_is_a_sum_over_taps_and_channels(case):
    x, w = arrays(case).inputs, arrays(case).filters
    convolution = Convolution(x.shape, w.shape, **{k: v for k, v in case.convolution.items() if k != "data_format"})
    result = convolution.forward(x, w)
    assert result.shape == case.output_shape
    (top, _), (left, _) = convolution.pads
    rng = case.random("pixels")
    for _ in range(10):
        n, i, j, k = (int(rng.integers(size)) for size in result.shape)
        first = k // (case.out_channels // case.groups) * (case.in_channels // case.groups)
        total = 0.0
        for a, b, c in np.ndindex(w.shape[:3]):
            h, v = i * case.strides[0] + a * case.dilations[0] - top, j * case.strides[1] + b * case.dilations[1] - left
            if 0 <= h < case.height and 0 <= v < case.width:
                total += x[n, h, v, first + c] * w[a, b, c, k]
        assert result[n, i, j, k] == pytest.approx(total, rel=1e-12, abs=1e-12)
