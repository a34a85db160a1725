"""Every row of the dispatch table, the reference's among them, forced on problems of each kind."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from cases import (
    Case,
    depthwise_cases,
    expanding_cases,
    few_channels_cases,
    op_cases,
    pointwise_cases,
    sliding_cases,
    winograd_cases,
)  # fmt: skip
from guarded import BeforePage, BehindPage, guarded
from raw_problem import Problem, planned

from fusedconvbn import raw

KERNELS = raw.kernels()
CASES = op_cases()[::17]
AMX_CASES = [case for case in op_cases() if case.dtype == "bf16" and case.groups == 1]
FEW_CHANNELS_CASES = [replace(case, isa=None) for case in few_channels_cases()]
# Deep products, whose filters are read in parts, and rows that are no whole tiles.
AMX_DEEP = [
    Case(
        dtype="bf16", height=11, width=13, in_channels=608, out_channels=c, kernel=(1, 1), activation="relu", training=t
    )
    for c, t in ((72, False), (72, True), (640, True))
]
# Tiles that are emitted while the next is computed: some begin between two lines, some are streamed.
AMX_EMITTED = [
    Case(dtype="bf16", height=40, width=10, in_channels=40, out_channels=100, activation="relu", residual=True),
    Case(
        dtype="bf16", height=64, width=65, in_channels=12, out_channels=672, kernel=(1, 1), activation="relu",
        residual=True,
    ),
]  # fmt: skip
# Blocks of 32 rows that are emitted line by line: fewer rows, rows computed twice, rows between lines, a last panel
# alone, filters in turn for all rows or all filters for a block.
AMX_LINES = [
    Case(
        dtype="bf16", batch=n, height=h, width=w, in_channels=c, out_channels=k, kernel=kernel, strides=strides,
        activation=activation, residual=residual,
    )
    for n, h, w, c, k, kernel, strides, activation, residual in (
        (1, 5, 5, 40, 96, (1, 1), (1, 1), "relu", False),
        (1, 7, 7, 64, 128, (1, 1), (1, 1), "relu", True),
        (2, 8, 8, 30, 32, (1, 1), (1, 1), None, True),
        (3, 9, 7, 20, 96, (1, 1), (2, 1), "relu6", False),
        (1, 7, 7, 256, 2080, (1, 1), (1, 1), "relu", True),
        (2, 14, 14, 48, 96, (3, 3), (1, 1), "relu6", True),
        (1, 9, 13, 33, 64, (3, 3), (1, 1), None, False),
        (2, 40, 1, 16, 32, (3, 3), (1, 1), "relu", False),
        (1, 2, 70, 16, 32, (3, 2), (1, 1), "relu", True),
        (1, 20, 21, 24, 64, (3, 3), (2, 2), "relu", False),
        (1, 34, 41, 3, 64, (7, 7), (2, 2), "relu", False),
        (1, 6, 7, 256, 256, (3, 3), (1, 1), "relu", False),
    )
]  # fmt: skip
# More filters than L2 holds, whose taps pass chunk by chunk: in blocks of 64 rows, of 32, by tiles.
AMX_TAPS_INNER = [
    Case(
        dtype="bf16", batch=n, height=h, width=w, in_channels=c, out_channels=k, strides=(s, s), activation=activation,
        residual=residual, training=training,
    )
    for n, h, w, c, k, s, activation, residual, training in (
        (1, 7, 7, 512, 352, 1, "relu", True, False),
        (2, 13, 11, 420, 448, 2, "relu6", False, False),
        (1, 10, 11, 384, 480, 1, None, False, False),
        (1, 9, 4, 400, 450, 1, "elu", True, False),
        (2, 6, 7, 330, 544, 1, "relu", False, True),
        (1, 9, 10, 512, 352, 2, "relu", False, True),
    )
]  # fmt: skip
# Sums in several passes, and more filters than a pass over the planes takes.
DEEP = Case(batch=1, height=5, width=6, in_channels=290, out_channels=525, algorithm="winograd4", training=True)
# More windows than L2 has room for: their filters are transformed before.
MANY = Case(batch=3, height=40, width=41, in_channels=40, out_channels=35, activation="relu")
# Images in whose last line and column Winograd's F(4x4) has windows of two outputs: of all kinds, of only small ones.
EDGES = [
    Case(batch=b, height=h, width=w, in_channels=c, out_channels=35, training=t, algorithm="winograd4")
    for b, h, w, c, t in ((5, 14, 10, 70, True), (1, 18, 13, 21, False), (9, 2, 1, 40, True), (3, 1, 6, 24, True))
]
# The same of several tasks, whose blocks of windows hold whole ones and some of two outputs.
EDGES += [replace(EDGES[0], batch=3, height=29, width=30, in_channels=40, training=t) for t in (True, False)]
# Deep and wide products in thirds, in blocks of fewer rows or pixels; strides, odd sizes, few pixels.
THIRDS = [case for case in op_cases() if case.dtype == "f32" and case.groups == 1 and case.data_format == "NHWC"]
THIRDS_DEEP = [
    Case(height=11, width=13, in_channels=c, out_channels=k, kernel=(1, 1), activation="relu", training=t)
    for c, k, t in ((680, 72, True), (72, 680, True), (70, 33, True), (650, 40, False), (33, 1, True))
]
# Gradients of a residual past the caches, one and two cache lines of a row at a time.
AMX_STREAMED = [replace(AMX_EMITTED[1], out_channels=channels, training=True) for channels in (672, 640)]
# What moments serve on AMX: activations whose derivative is 0 or 1, and pixels enough for their variance.
AMX_EXPANDING = [
    replace(case, isa=None, dtype="bf16", activation=activation)
    for case, activation in zip(expanding_cases(), itertools.cycle((None, "relu", "relu6")))
    if case.strides == (1, 1) and np.prod(case.output_shape[:3]) >= 16
]
# Strided convolutions of few channels, whose phases are computed at once where they divide the image.
AMX_PHASES = [
    Case(
        dtype="bf16", height=h, width=w, in_channels=c, out_channels=k, kernel=kernel, strides=strides, padding=padding,
        dilations=dilations, training=True, activation="relu",
    )
    for h, w, c, k, kernel, strides, dilations, padding in (
        (32, 30, 3, 64, (7, 7), (2, 2), (1, 1), "SAME"),
        (33, 30, 3, 64, (7, 7), (2, 2), (1, 1), "SAME"),
        (30, 42, 3, 40, (5, 3), (3, 2), (1, 1), "VALID"),
        (16, 121, 8, 16, (3, 3), (2, 1), (1, 2), "SAME"),
        (12, 40, 1, 33, (2, 9), (1, 4), (1, 1), ((0, 0), (8, 3))),
        (20, 20, 2, 48, (1, 1), (4, 4), (1, 1), "SAME"),
    )
]  # fmt: skip
# Products of pairs: all that the direct algorithm has, of an even number of channels a group.
PAIRS = [
    case
    for case in AMX_CASES[1::2] + AMX_DEEP + AMX_EMITTED + AMX_LINES + AMX_TAPS_INNER
    if case.in_channels % 2 == 0 and case.data_format == "NHWC"
] + [
    Case(
        dtype="bf16", height=13, width=11, in_channels=c, out_channels=k, groups=groups, kernel=(3, 3), strides=strides,
        dilations=dilations, padding=padding, activation="elu", residual=True, training=training,
    )
    for c, k, groups, strides, dilations, padding in (
        (24, 36, 2, (1, 1), (1, 1), "SAME"),
        (32, 16, 4, (2, 1), (1, 1), "VALID"),
        (6, 130, 1, (1, 1), (2, 1), "SAME"),
        (2, 40, 1, (1, 2), (1, 1), ((0, 3), (2, 0))),
    )
    for training in (False, True)
]  # fmt: skip
SPECIAL_CASES = {  # by a word in the names of the rows that serve no others
    "moments_thirds": [replace(case, isa=None) for case in expanding_cases() if case.dtype == "f32"][::4]
    + [
        Case(height=h, width=13, in_channels=c, out_channels=k, kernel=(1, 1), activation="relu6", training=True)
        for h, c, k in ((31, 64, 130), (9, 96, 200), (40, 70, 145))
    ],
    "wgrad_thirds": THIRDS_DEEP
    + [replace(case, isa=None) for case in pointwise_cases() if case.dtype == "f32" and case.isa == "avx2"],
    "thirds": THIRDS_DEEP + THIRDS[::5],
    "dgrad_pairs": [
        replace(case, training=True, data_format=data_format)
        for case, data_format in zip(PAIRS, itertools.cycle(("NHWC", "NHWC", "NCHW")))
        if case.out_channels // case.groups % 2 == 0
    ],
    "pairs": PAIRS,
    "moments_amx": AMX_EXPANDING,
    "backward_direct_amx": [
        case
        for case in AMX_CASES + AMX_DEEP + AMX_STREAMED + AMX_PHASES + AMX_TAPS_INNER
        if case.training and case.data_format == "NHWC"
    ],
    "amx": AMX_CASES[::2] + AMX_DEEP + AMX_EMITTED + AMX_LINES + AMX_TAPS_INNER,
    "winograd": [replace(case, isa=None) for case in winograd_cases()[::23]] + [DEEP, MANY, *EDGES],
    "depthwise": [replace(case, isa=None) for case in depthwise_cases()[::5] + sliding_cases()],
    "backward_few_channels": [case for case in FEW_CHANNELS_CASES if case.training][::3],
    "few_channels": FEW_CHANNELS_CASES[::4],
    "columns": [case for case in op_cases() if case.groups == 1][::13],
    "moments": [replace(case, isa=None) for case in expanding_cases()[::7]],
    "pointwise": [replace(case, isa=None) for case in pointwise_cases()[::5]],
}


def cases_of(row):
    return next((cases for word, cases in SPECIAL_CASES.items() if word in row.name), CASES)


POINTWISE = next(case for case in SPECIAL_CASES["pointwise"] if case.dtype == "f32")
RUNS = [(row, case) for row in KERNELS for case in cases_of(row)]


def test_cases_hold_each_kind():
    assert {case.dtype for case in CASES} == {"f32", "f64", "f16", "bf16"}
    assert {(case.data_format, case.training) for case in CASES} == {(f, t) for f in ("NHWC", "NCHW") for t in (0, 1)}
    assert any(case.groups == case.in_channels > 1 for case in CASES)


def test_each_stage_has_rows_for_each_isa_and_a_reference():
    rows = {(row.stage, row.isa) for row in KERNELS}
    assert rows >= {(stage, "generic") for stage in ("forward", "reduce", "dgrad", "wgrad", "backward")}
    assert [row.name for row in KERNELS][-2:] == ["forward_reference", "backward_reference"]
    assert len({row.name for row in KERNELS}) == len(KERNELS)


@pytest.mark.parametrize(("kernel", "case"), RUNS, ids=[f"{row.name}-{case}" for row, case in RUNS])
def test_forced_kernel(kernel, case):
    problem = Problem(case, stores_z=not kernel.name.endswith("moments_amx"))
    if kernel.stage == "forward":
        assert planned(case, "forward", kernel=kernel.name).kernels == [kernel.name]
        result = problem.run_forward(kernel=kernel.name)
        problem.check_forward(result)
        check_packed(problem, kernel.name, result)
    saved = "moments" if kernel.name.startswith("backward_moments") else "conv"
    if kernel.name in planned(case, "backward", kernel=kernel.name, saved=saved).kernels:
        problem.check_backward(problem.run_backward(saved, kernel=kernel.name))
    else:
        assert kernel.stage == "forward"


@pytest.mark.parametrize("memory", [BeforePage, BehindPage])
@pytest.mark.parametrize("case", AMX_LINES, ids=str)
def test_rows_computed_twice_lie_within_the_arrays(case, memory):
    with guarded(memory=memory):
        Problem(case).run_forward(threads=2)


ROUNDED = [(row, case) for row, case in RUNS if case.training and case.dtype == "f32" and "moments" not in row.name]


@pytest.mark.parametrize(("kernel", "case"), ROUNDED, ids=[f"{row.name}-{case}" for row, case in ROUNDED])
def test_forced_kernel_with_z_in_bfloat16(kernel, case):
    problem = Problem(case, start="bfloat16")
    if kernel.stage == "forward":
        result = problem.run_forward(kernel=kernel.name, save="bfloat16")
        assert result.conv_out.shape == ((result.output.size + 1) // 2,)
        problem.check_forward(result)
    if kernel.name in planned(case, "backward", kernel=kernel.name, saved="bfloat16").kernels:
        problem.check_backward(problem.run_backward("bfloat16", kernel=kernel.name))


def test_each_kernel_that_reads_or_writes_z_does_in_bfloat16():
    names = {row.name for row, _ in ROUNDED}
    of_bfloat16 = ("amx", "pairs")
    assert {row.name for row in KERNELS if not any(word in row.name for word in ("moments", *of_bfloat16))} <= names


def check_packed(problem, kernel, result):
    """Filters packed before change no bit."""
    plan = planned(problem.case, "forward", kernel=kernel)
    if plan.packed_bytes:
        packed = raw.pack_filters(plan, problem.arguments.filters)
        again = problem.run_forward(kernel=kernel, packed_filters=packed)
        assert [a is None or a.tobytes() for a in again] == [a is None or a.tobytes() for a in result]


@pytest.mark.parametrize("needs_filters", [False, True])
@pytest.mark.parametrize("needs_inputs", [False, True])
@pytest.mark.parametrize(
    ("training", "kernel"),
    [*itertools.product((False, True), (None, "backward_reference")), (True, "backward_pointwise_generic")],
)
def test_only_the_gradients_that_are_needed(training, kernel, needs_inputs, needs_filters):
    case = replace(POINTWISE if kernel and "pointwise" in kernel else CASES[0], training=training, residual=True)
    problem = Problem(case)
    result = problem.run_backward(kernel=kernel, needs_inputs=needs_inputs, needs_filters=needs_filters)
    assert (result.inputs is None, result.filters is None) == (not needs_inputs, not needs_filters)
    problem.check_backward(
        result._replace(
            inputs=result.inputs if needs_inputs else problem.run_backward().inputs,
            filters=result.filters if needs_filters else problem.run_backward().filters,
        )
    )
