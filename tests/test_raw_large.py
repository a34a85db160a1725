"""Layers of the sizes that networks have, against the float64 oracle."""

from dataclasses import replace

import pytest
from cases import LAYERS
from raw_problem import Problem

from fusedconvbn import raw


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward(name, training):
    problem = Problem(replace(LAYERS[name], training=training))
    problem.check_forward(problem.run_forward(threads=2))
    problem.check_backward(problem.run_backward(threads=2))


def test_the_algorithm_is_chosen_by_the_sizes():
    kernels = {
        name: raw.plan(
            case.inputs_shape, case.filters_shape, dtype=case.numpy_dtype, residual=case.residual, direction="backward",
            **case.attributes,
        ).kernels
        for name, case in LAYERS.items()
    }  # fmt: skip
    by_transforms = {name for name, names in kernels.items() if any("winograd" in kernel for kernel in names)}
    assert by_transforms == {"winograd", "float64"}
