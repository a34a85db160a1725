"""Layers of the sizes that networks have, against the float64 oracle."""

from dataclasses import replace

import numpy as np
import pytest
from cases import LAYERS, Case
from raw_problem import Problem, planned

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


# Panels of filters of more than 128 KiB, which the direct kernel multiplies by parts.
IN_PARTS = {
    "taps": Case(height=25, width=27, in_channels=200, out_channels=72, strides=(2, 2), activation="relu"),
    "depth": Case(height=9, width=12, in_channels=1100, out_channels=70, kernel=(1, 1), residual=True),
    "both": Case(height=5, width=3, in_channels=600, out_channels=33, kernel=(1, 2), residual=True, activation="elu"),
    "many_blocks": Case(batch=5, height=10, width=10, in_channels=1100, out_channels=130, kernel=(1, 1)),
    "channels_first": Case(data_format="NCHW", height=9, width=12, in_channels=600, out_channels=70, kernel=(2, 1)),
    "float64": Case(dtype="f64", height=9, width=12, in_channels=300, out_channels=70, kernel=(2, 1)),
    # In training these read filters where they lie, all columns of a part.
    "rows": Case(height=7, width=7, in_channels=150, out_channels=1040, kernel=(1, 1), activation="relu"),
    "rows_of_taps": Case(height=9, width=11, in_channels=80, out_channels=1024, strides=(2, 2), residual=True),
    "rows_of_blocks": Case(batch=3, height=7, width=9, in_channels=1100, out_channels=240, kernel=(1, 1)),
    "rows_of_float64": Case(dtype="f64", height=5, width=7, in_channels=150, out_channels=520, kernel=(1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("name", IN_PARTS)
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_panels_in_parts(name, training, isa):
    problem, kernel = Problem(replace(IN_PARTS[name], training=training)), f"forward_direct_{isa}"
    result = problem.run_forward(kernel=kernel)
    problem.check_forward(result)
    plan = planned(problem.case, "forward", kernel=kernel)
    packed = raw.pack_filters(plan, problem.arguments.filters) if plan.packed_bytes else None
    assert (
        problem.run_forward(kernel=kernel, threads=2, packed_filters=packed).output.tobytes() == result.output.tobytes()
    )


# Thirds of filters of more than 1 MiB, which are fetched a panel ahead, and read once where the windows are few.
FAR_FILTERS = {
    "one_block": Case(height=14, width=13, in_channels=140, out_channels=900, kernel=(1, 1), residual=True),
    "three_blocks": Case(height=14, width=14, in_channels=600, out_channels=300, kernel=(1, 1), activation="relu"),
    "taps": Case(height=13, width=14, in_channels=40, out_channels=226, strides=(2, 2), activation="elu"),
}


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("isa", ["amx"])
@pytest.mark.parametrize("name", FAR_FILTERS)
def test_far_filters_in_thirds(name, training, isa):
    problem, kernel = Problem(replace(FAR_FILTERS[name], training=training)), f"forward_thirds_{isa}"
    one, many = (problem.run_forward(kernel=kernel, threads=threads) for threads in (1, 7))
    problem.check_forward(one)
    assert one.output.tobytes() == many.output.tobytes()
    problem.check_backward(problem.run_backward(kernel=f"dgrad_thirds_{isa}"))


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
@pytest.mark.parametrize("channels", [(690, 709), (709, 690), (704, 768), (768, 704)], ids=str)
def test_filter_gradient_in_thirds_by_parts(channels, isa):
    """Parts are stored from L2; either image is the narrower one; the last two gradients go past the caches."""
    case = Case(height=9, width=13, in_channels=channels[0], out_channels=channels[1], kernel=(1, 1), training=True)
    problem, kernel = Problem(case), f"wgrad_thirds_{isa}"
    one, many = (problem.run_backward(kernel=kernel, threads=threads) for threads in (1, 7))
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
