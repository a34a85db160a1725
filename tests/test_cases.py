"""The list of problems itself: it holds what the tests over it say it holds."""

import itertools

import pytest
from cases import BFLOAT16_ISAS, FACTORS, MODES, op_cases, raw_cases


def levels(case):
    """Of the factors that can be read off a case: all but sizes, which follow from several of them."""
    mode = ("unbiased" if case.unbiased else "training") if case.training else "inference"
    return {
        "dtype": case.dtype, "data_format": case.data_format, "isa": case.isa, "kernel": case.kernel,
        "channels": (case.in_channels, case.out_channels, case.groups), "strides": case.strides,
        "dilations": case.dilations, "padding": case.padding, "activation": case.activation,
        "residual": case.residual, "mode": mode,
    }  # fmt: skip


@pytest.mark.parametrize("cases", [raw_cases, op_cases], ids=lambda cases: cases.__name__)
def test_every_pair_of_levels_is_there(cases):
    listed = [levels(case) for case in cases()]
    for first, second in itertools.combinations(listed[0], 2):
        alone = [{case[name] for case in listed} for name in (first, second)]
        pairs = {(case[first], case[second]) for case in listed}
        wanted = set(itertools.product(*alone))
        if (first, second) == ("dtype", "isa"):
            wanted -= set(itertools.product(("f32", "f64", "f16"), BFLOAT16_ISAS))
        assert pairs == wanted, (first, second)


def test_every_level_is_there():
    listed = [levels(case) for case in raw_cases()]
    for name in ("channels", "kernel", "strides", "dilations", "padding", "activation", "residual"):
        assert {case[name] for case in listed} == set(FACTORS[name])
    assert {(case["dtype"], case["data_format"], case["isa"]) for case in listed} == set(FACTORS["target"])
    assert {case["mode"] for case in listed} == set(MODES)


def test_each_isa_sees_half_precision_in_both_layouts_and_modes():
    wanted = set(itertools.product(("f16", "bf16"), ("NHWC", "NCHW"), (False, True), ("generic", "avx2", "avx512")))
    assert wanted <= {(case.dtype, case.data_format, case.training, case.isa) for case in raw_cases()}
