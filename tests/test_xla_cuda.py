"""XLA programs for a GPU: on the host, by the CUDA kernels that the C++ compiler made, and as the CUDA build of
TensorFlow sees them."""

import ctypes
import os
import pathlib
import subprocess
import sys

import cases
import cuda_core
import op_problems
import processes
import pytest
import tensorflow as tf
from cuda_suite import on_tensor_cores
from op_problems import MODES, TRAINING, arguments, assert_same_bits, function_of, upstream
from under_xla import program, under_xla, with_a_switch

import fusedconvbn
from fusedconvbn import _load


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Lets programs for the CPU call what is for a GPU."""
    assert _load.xla() is None
    folder = tmp_path_factory.mktemp("xla_harness")
    cuda_core.build(folder, "xla_harness", FUSEDCONVBN_TF="ON")
    library = ctypes.CDLL(str(folder / "libxla_harness.so"))
    library.harness_register.restype = ctypes.c_char_p
    assert library.harness_register() == b""


@pytest.fixture
def cuda_calls(harness, cuda_host, monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_CUDA_LIBRARY", str(cuda_host))  # opened at the first call, for good
    monkeypatch.setenv("FUSEDCONVBN_XLA", "cuda")


@pytest.mark.parametrize("case", cases.op_cases()[::6], ids=str)
def test_results_and_gradients(case, cuda_calls):
    op_problems.assert_as_the_oracle(under_xla, case, rounds_dz=on_tensor_cores(case))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", MODES, ids=str)
def test_training_at_run_time(case, training, cuda_calls):
    call = function_of(fusedconvbn.fused_conv_bn, case, training=training)
    expected = under_xla(call, arguments(case), upstream(case))
    assert_same_bits(with_a_switch(case)(tf.constant(training), arguments(case), upstream(case)), expected)


@pytest.mark.parametrize("save", ["recompute", "bfloat16"])
def test_what_is_saved_for_the_gradient(save, cuda_calls):
    call = function_of(fusedconvbn.fused_conv_bn, TRAINING, save=save)
    expected = op_problems.results_and_gradients(call, arguments(TRAINING), upstream(TRAINING))
    found = under_xla(call, arguments(TRAINING), upstream(TRAINING))
    op_problems.assert_close(found, expected, 2**-7 if save == "bfloat16" else 1e-5)


def test_programs_hold_calls_of_the_cuda_kernels(cuda_calls):
    text = program(TRAINING)
    assert text.count('custom_call_target="fusedconvbn_cuda_forward"') == 1
    assert text.count('custom_call_target="fusedconvbn_cuda_backward"') == 1


def test_kernels_that_a_gpu_does_not_have(cuda_calls):
    case = cases.Case(training=True)
    call = function_of(fusedconvbn.fused_conv_bn, case, algorithm="winograd2")
    with pytest.raises(tf.errors.InvalidArgumentError, match='algorithm must be "auto" or "direct" on a GPU'):
        under_xla(call, arguments(case), upstream(case))


def test_who_computes_is_one_of_those_that_are_known(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_XLA", "cudnn")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"FUSEDCONVBN_XLA must be .*Received: cudnn"):
        under_xla(function_of(fusedconvbn.fused_conv_bn, TRAINING), arguments(TRAINING), upstream(TRAINING))


@pytest.fixture(scope="module")
def tensorflow_for_cuda(request, tmp_path_factory) -> pathlib.Path:
    """A folder with TensorFlow's CUDA build, which needs no GPU to compile; FUSEDCONVBN_TF_CUDA: where it is."""
    built = os.environ.get("FUSEDCONVBN_TF_CUDA")
    if built:
        return pathlib.Path(built)
    if request.config.option.markexpr == "not slow":
        pytest.skip("fetches TensorFlow's CUDA build, of 570 MB: only in `make check`")
    folder = tmp_path_factory.mktemp("tensorflow")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", folder]
    done = subprocess.run([*pip, f"tensorflow=={tf.__version__}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


PROGRAMS = """
import os, sys
sys.path[:0] = [{tests!r}]
import tensorflow as tf
from op_problems import FROZEN, TRAINING
from under_xla import program
from fusedconvbn import _load

assert tf.test.is_built_with_cuda() and _load.xla() is None
for case, switch in ((TRAINING, None), (FROZEN, None), (TRAINING, tf.constant(True))):
    text = program(case, platform="GPU", switch=switch)
    words = ('"fusedconvbn_cuda_forward"', '"fusedconvbn_cuda_backward"', " conditional(", " convolution(")
    print(*(text.count(word) for word in words))
"""


@pytest.mark.parametrize(
    ("kernels", "counts"),
    [(True, ["1 1 0 0", "1 1 0 0", "2 2 2 0"]), (False, ["0 0 0 3", "0 0 0 4", "0 0 0 3"])],
    ids=["calls", "ops_of_xla"],
)
def test_programs_for_a_gpu(kernels, counts, tensorflow_for_cuda, cuda_host, monkeypatch):
    """Calls where there are CUDA kernels, else XLA's own ops, which compute z again where nothing is saved."""
    monkeypatch.setenv("FUSEDCONVBN_CUDA_LIBRARY", str(cuda_host if kernels else "/none"))
    script = PROGRAMS.format(tests=str(pathlib.Path(__file__).parent))
    assert processes.run_python(script, folder=tensorflow_for_cuda).splitlines() == counts
