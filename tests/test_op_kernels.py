"""The op runs the kernels that `raw` runs: the same bits, for every instruction set, past the caches or not."""

from dataclasses import replace

import numpy as np
import op_problems
import pytest
from cases import LAYERS, STREAMED, Case, arrays

import fusedconvbn
from fusedconvbn import raw

PROBLEMS = {**LAYERS, **{f"streamed_{name}": case for name, case in STREAMED.items()}}
SAVED = ("output", "batch_mean", "inv_std", "conv_out")


def results_of_raw(case: Case, **options) -> list[np.ndarray]:
    """In the order of `op_problems.results_and_gradients`."""
    cotangents = [tensor.numpy() for tensor in op_problems.upstream(case)]
    forward = raw.forward(*arrays(case), **case.attributes, **options)
    gradients = raw.backward(
        cotangents[0], *arrays(case), **{name: getattr(forward, name) for name in SAVED},
        moving_mean_gradient=cotangents[1], moving_variance_gradient=cotangents[2], **case.attributes, **options,
    )  # fmt: skip
    return [*forward[:3], *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_bits_as_raw(name, training, isa, monkeypatch):
    """TensorFlow's tensors begin at cache lines, NumPy's large arrays do not: only the former are streamed."""
    case = replace(PROBLEMS[name], training=training)
    monkeypatch.setenv("FUSEDCONVBN_ISA", isa)
    call = op_problems.function_of(fusedconvbn.fused_conv_bn, case)
    results = op_problems.results_and_gradients(call, op_problems.arguments(case), op_problems.upstream(case))
    op_problems.assert_same_bits(results, results_of_raw(case, isa=isa))


@pytest.mark.parametrize("isa", ["generic", "avx512"])
@pytest.mark.parametrize("save", ["bfloat16", "recompute"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_bits_as_raw_whatever_is_saved(name, save, isa, monkeypatch):
    case = replace(PROBLEMS[name], training=True)
    monkeypatch.setenv("FUSEDCONVBN_ISA", isa)
    call = op_problems.function_of(fusedconvbn.fused_conv_bn, case, save=save)
    results = op_problems.results_and_gradients(call, op_problems.arguments(case), op_problems.upstream(case))
    op_problems.assert_same_bits(results, results_of_raw(case, save=save, isa=isa))


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_tensors_are_what_the_rule_asks_for(name):
    """Size and alignment, of one of them at least (`Image::streams`)."""
    case = STREAMED[name]
    call = op_problems.function_of(fusedconvbn.fused_conv_bn, case)
    results = op_problems.results_and_gradients(call, op_problems.arguments(case), op_problems.upstream(case))
    large = [array for array in map(np.asarray, (results[0], results[3])) if array.nbytes > 8 << 20]
    assert large
    for array in large:
        assert array.ctypes.data % 64 == 0
        assert array.shape[3] * array.itemsize % 64 == 0


@pytest.mark.parametrize("kernel", ["forward_reference", "forward_direct_generic"])
def test_kernel_by_environment(kernel, monkeypatch):
    case = op_problems.TRAINING
    monkeypatch.setenv("FUSEDCONVBN_KERNEL", kernel)
    results = op_problems.function_of(fusedconvbn.fused_conv_bn, case)(*op_problems.arguments(case))
    monkeypatch.delenv("FUSEDCONVBN_KERNEL")
    expected = raw.forward(*arrays(case), **case.attributes, kernel=kernel)
    op_problems.assert_same_bits(list(results), expected[:3])
