"""What training saves for backward: the convolution, moments of the inputs, or nothing."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import Case, expanding_cases, op_cases, output_size
from raw_problem import Problem

from fusedconvbn import raw

RECOMPUTED = [case for case in op_cases() if case.training][::5]
# Of one or two pixels z - mean is a difference of nearly equal numbers, and no tolerance for it follows from z.
EXPANDING = [case for case in expanding_cases() if case.batch * np.prod(output_size(case)) > 8]


def results(case, forward_options, backward_options, threads=1, stores_z=True):
    """Forward, then backward from what it saved."""
    problem, attributes = Problem(case, stores_z=stores_z), case.attributes
    forward = raw.forward(*problem.arguments, **attributes, **forward_options, threads=threads)
    problem.check_forward(forward)
    saved = {name: getattr(forward, name) for name in ("output", "batch_mean", "inv_std", "conv_out")}
    upstream = dict(zip(("moving_mean_gradient", "moving_variance_gradient"), problem.upstream[1:]))
    backward = raw.backward(
        problem.upstream[0], *problem.arguments, **saved, **upstream, **attributes, **backward_options, threads=threads
    )
    return problem, forward, backward


@pytest.mark.parametrize("case", RECOMPUTED, ids=str)
def test_nothing_saved_changes_no_result(case):
    options = {"save": "recompute"}
    _, forward, backward = results(case, options, options)
    assert forward.conv_out is None
    _, saving, expected = results(case, {}, {})
    for name, one, other in zip(raw.ForwardResult._fields[:-1], forward[:-1], saving[:-1]):
        np.testing.assert_array_equal(one, other, name)
    # By other rows, where depthwise or of few channels: they add up in another order.
    for name, one, other in zip(raw.BackwardResult._fields, backward, expected):
        eps = float(ml_dtypes.finfo(one.dtype).eps) if one is not None else 0
        if eps and one.size:
            np.testing.assert_allclose(one, other, atol=32 * eps * np.abs(other).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("case", EXPANDING, ids=str)
def test_moments(case):
    forward, backward = ({"kernel": f"{stage}_moments_{case.isa}"} for stage in ("forward", "backward"))
    problem, result, gradients = results(replace(case, isa=None), forward, backward)
    assert result.conv_out.shape == (case.in_channels + 2, case.in_channels)
    problem.check_backward(gradients)


@pytest.mark.parametrize("isa", ["amx"])
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in EXPANDING
        if case.strides == (1, 1)
        and case.activation in (None, "relu", "relu6")
        and np.prod(case.output_shape[:3]) >= 16
    ],
    ids=str,
)
def test_moments_of_bfloat16(case, isa):
    forward, backward = ({"kernel": f"{stage}_moments_{isa}"} for stage in ("forward", "backward"))
    problem, result, gradients = results(replace(case, isa=None, dtype="bf16"), forward, backward, stores_z=False)
    assert result.conv_out.shape == (2 * (case.in_channels + 2), case.in_channels)
    problem.check_backward(gradients)


@pytest.mark.parametrize("case", [case for case in EXPANDING if case.activation and not case.residual][:4], ids=str)
def test_moments_without_the_output_recompute(case):
    problem = Problem(replace(case, isa=None))
    saved = {**problem.saved, "conv_out": problem.moments, "output": None}
    upstream = dict(zip(("moving_mean_gradient", "moving_variance_gradient"), problem.upstream[1:]))
    result = raw.backward(problem.upstream[0], *problem.arguments, **saved, **upstream, **problem.case.attributes)
    without = problem.run_backward()
    np.testing.assert_allclose(result.filters, without.filters, rtol=1e-3, atol=1e-3 * np.abs(without.filters).max())


def test_large_expanding_layers_save_moments():
    case = Case(batch=4, height=56, width=56, in_channels=64, out_channels=256, kernel=(1, 1), training=True)
    shapes = case.inputs_shape, case.filters_shape
    assert raw.plan(*shapes, training=True, activation="relu").conv_out_shape == [66, 64]
    assert raw.plan(*shapes, training=True, activation="silu").conv_out_shape == [4, 56, 56, 256]
    assert raw.plan(*shapes, training=True, algorithm="direct").conv_out_shape == [4, 56, 56, 256]
    assert raw.plan(*shapes, training=True, activation="silu", save="recompute").conv_out_shape == []
    assert raw.plan(*shapes).conv_out_shape == []


@pytest.mark.parametrize("isa", ["amx"])
def test_large_expanding_layers_of_bfloat16_save_moments(isa):
    case = Case(batch=4, height=56, width=56, in_channels=64, out_channels=256, kernel=(1, 1), training=True)
    shapes, options = (case.inputs_shape, case.filters_shape), {"dtype": ml_dtypes.bfloat16, "training": True}
    assert raw.plan(*shapes, activation="relu", isa=isa, **options).conv_out_shape == [132, 64]
    assert raw.plan(*shapes, activation="relu", isa="generic", **options).conv_out_shape == [4, 56, 56, 256]
    assert raw.plan(*shapes, activation="elu", isa=isa, **options).conv_out_shape == [4, 56, 56, 256]


@pytest.mark.parametrize("isa", ["generic", "amx"])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_moments_give_the_same_bits_for_any_threads(threads, isa):
    case = Case(batch=3, height=29, width=31, in_channels=40, out_channels=120, kernel=(1, 1), training=True,
                residual=True, activation="relu", dtype="bf16" if isa == "amx" else "f32")  # fmt: skip
    options = {"kernel": f"forward_moments_{isa}"}, {"kernel": f"backward_moments_{isa}"}
    *_, forward, backward = results(case, *options, stores_z=isa != "amx")
    *_, again, backward_again = results(case, *options, threads=threads, stores_z=isa != "amx")
    for one, other in zip((*forward, *backward), (*again, *backward_again)):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(("mean", "isa"), [*((m, "generic") for m in (0, 10, 100, 1e3, 1e4)), (0, "amx"), (4, "amx")])
def test_variance_by_moments_under_a_large_mean(mean, isa):
    """At most 3 times the error that direct sums over z make, or 1e-5."""
    case = Case(batch=4, height=28, width=28, in_channels=24, out_channels=96, kernel=(1, 1), training=True,
                dtype="bf16" if isa == "amx" else "f32")  # fmt: skip
    problem = Problem(case)
    problem.arguments.inputs[:] += case.numpy_dtype.type(mean)
    z = problem.arguments.inputs.astype(np.float64) @ problem.arguments.filters[0, 0].astype(np.float64)
    inv_std = 1 / np.sqrt(z.var((0, 1, 2)) + case.epsilon)

    def error(row):
        result = raw.forward(*problem.arguments, **case.attributes, kernel=row)
        return np.abs(result.inv_std / inv_std - 1).max()

    assert error(f"forward_moments_{isa}") < max(1e-5, 3 * error(f"forward_direct_{isa}"))


@pytest.mark.parametrize("spread", [1, 1e-1, 1e-2, 1e-3, 1e-4])
def test_variance_by_moments_of_inputs_that_move_together(spread):
    """z is a small difference of inputs that are nearly equal: its variance must not be one of theirs."""
    case = Case(batch=4, height=28, width=28, in_channels=24, out_channels=96, kernel=(1, 1), training=True,
                epsilon=0.0)  # fmt: skip
    problem = Problem(case)
    inputs, filters = problem.arguments.inputs, problem.arguments.filters
    inputs[:] = spread * inputs + problem.case.random("common").standard_normal((*inputs.shape[:3], 1))
    filters -= filters.mean(2, keepdims=True)
    variance = (inputs.astype(np.float64) @ filters[0, 0].astype(np.float64)).var((0, 1, 2))

    def error(row):
        result = raw.forward(*problem.arguments, **case.attributes, kernel=row)
        return np.abs(np.square(result.inv_std.astype(np.float64)) * variance - 1).max()

    assert error("forward_moments_generic") < max(1e-5, 3 * error("forward_direct_generic"))
