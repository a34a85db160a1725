"""Layers of the sizes that networks have, against the float64 oracle."""

from dataclasses import replace

import numpy as np
import pytest
from cases import LAYERS, Case
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
    assert by_transforms == {"winograd", "many_windows", "float64"}


@pytest.mark.parametrize(
    "case",
    [
        Case(height=7, width=9, in_channels=1048, out_channels=1072, kernel=(1, 1)),
        Case(batch=2, height=13, width=15, in_channels=136, out_channels=520, strides=(2, 2)),
    ],
    ids=["channels", "taps"],
)
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_filter_gradient_in_parts(case, isa):
    """Rows and columns beyond one part's, and parts that begin within a tap."""
    problem = Problem(replace(case, isa=isa, training=True))
    one, many = (problem.run_backward(threads=threads) for threads in (1, 7))
    problem.check_backward(one)
    assert one.filters.tobytes() == many.filters.tobytes()


@pytest.mark.parametrize("isa", ["amx"])
def test_filter_gradient_of_amx_beyond_its_cache(isa):
    """Sums of more than 4 MiB go by groups of strips of pixels, the last of which is shorter here."""
    case = Case(dtype="bf16", height=8, width=25, in_channels=1024, out_channels=1056, kernel=(1, 1), training=True)
    problem = Problem(case)
    forward = problem.run_forward()
    saved = {name: getattr(forward, name) for name in ("output", "batch_mean", "inv_std", "conv_out")}
    amx, direct = (
        raw.backward(forward.output, *problem.arguments, **saved, **case.attributes, isa=which).filters
        for which in (isa, "avx512")
    )
    difference = amx.astype(np.float64) - direct.astype(np.float64)
    assert np.sqrt(np.square(difference).mean() / np.square(direct.astype(np.float64)).mean()) < 1e-2
