"""The ops' kernels for a GPU, with the CUDA kernels on the host, as TensorFlow would call them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cuda_core
import op_harness
import pytest
import tensorflow as tf
from cases import Case
from cuda_suite import ALL, RANGES, TENSOR, TRAINED, problem_of
from processes import run_python
from raw_problem import Problem

import fusedconvbn
from fusedconvbn import _load

PACKAGE = Path(fusedconvbn.__file__).parent
FRAMEWORK = Path(tf.sysconfig.get_lib()) / "libtensorflow_framework.so.2"
CASES = [*ALL[::11], *RANGES, *TENSOR[:3]]


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> Path:
    """FUSEDCONVBN_KERNEL_HARNESS: one that is built already."""
    built = os.environ.get("FUSEDCONVBN_KERNEL_HARNESS")
    if built:
        return Path(built)
    folder = tmp_path_factory.mktemp("harness")
    cuda_core.build(folder, "kernel_harness", FUSEDCONVBN_TF="ON")
    return folder / "libkernel_harness.so"


@pytest.fixture(scope="module")
def ops(cuda_host, tmp_path_factory) -> Path:
    """The op library beside the kernels on the host."""
    return beside(tmp_path_factory.mktemp("ops"), cuda_host)


def beside(folder: Path, cuda: Path | None) -> Path:
    """The op library, in a folder of its own with this CUDA library."""
    shutil.copy(PACKAGE / "_ops.so", folder)
    if cuda is not None:
        shutil.copy(cuda, folder / "_cuda.so")
    return folder / "_ops.so"


@pytest.fixture(scope="module")
def process(harness, ops):
    with op_harness.process(framework=FRAMEWORK, library=harness, ops=ops, gpu=False) as process:
        yield process


@pytest.fixture
def core(process, monkeypatch):
    core = op_harness.Core(process)
    monkeypatch.setattr(_load, "core", lambda: core)
    return core


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case):
    problem = problem_of(case)
    problem.check_forward(problem.run_forward())


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case):
    problem = problem_of(case)
    problem.check_backward(problem.run_backward())


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("save", ["bfloat16", "recompute"])
@pytest.mark.parametrize("case", [case for case in TRAINED if case.dtype == "f32"][::9], ids=str)
def test_what_forward_saves(case: Case, save: str):
    forward, backward = problem_of(case), problem_of(case, "bfloat16" if save == "bfloat16" else "again")
    result = forward.run_forward(save=save)
    assert (result.conv_out is None) == (save == "recompute")
    forward.check_forward(result)
    backward.check_backward(backward.run_backward("nothing" if save == "recompute" else save, save=save))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_that_nobody_asks_for(needs: tuple[bool, bool]):
    problem = problem_of(TRAINED[0])
    problem.check_backward(problem.run_backward(needs_inputs=needs[0], needs_filters=needs[1]), *needs)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("training", [False, True])
def test_no_pixels(training: bool):
    problem = Problem(Case(batch=0, in_channels=4, training=training))
    problem.check_forward(problem.run_forward())
    problem.check_backward(problem.run_backward())


@pytest.mark.usefixtures("core")
def test_moments_that_another_device_saved():
    """The gradient computes z again."""
    problem = Problem(Case(training=True, kernel=(1, 1), in_channels=6, out_channels=24), start="again")
    problem.check_backward(problem.run_backward("moments"))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("algorithm", ["winograd2", "winograd4"])
def test_algorithms_that_a_gpu_has_not(algorithm: str):
    problem = Problem(Case(kernel=(3, 3)))
    for run in (problem.run_forward, problem.run_backward):
        with pytest.raises(RuntimeError, match=f"INVALID_ARGUMENT: algorithm must be .* on a GPU.*: .{algorithm}"):
            run(algorithm=algorithm)


@pytest.mark.usefixtures("core")
def test_what_the_kernels_refuse():
    """An error of the library is the op's."""
    with pytest.raises(RuntimeError, match="INTERNAL: strides, paddings or filters of more than"):
        Problem(Case(kernel=(1, 1), strides=(2**32, 1))).run_forward()


def test_a_library_that_cannot_be_opened(harness, tmp_path, monkeypatch):
    """When the first kernel is made: the error says which."""
    (tmp_path / "no").write_text("a library")
    ops = beside(tmp_path, tmp_path / "no")
    with op_harness.process(framework=FRAMEWORK, library=harness, ops=ops, gpu=False) as process:
        core = op_harness.Core(process)
        monkeypatch.setattr(_load, "core", lambda: core)
        with pytest.raises(RuntimeError, match=r"INTERNAL: .*_cuda\.so"):
            Problem(Case()).run_forward()


DEVICES = """
from tensorflow.python.framework import kernels
import tensorflow as tf
tf.load_op_library({!r})
for op in ("FusedConvBN", "FusedConvBNGrad"):
    registered = kernels.get_registered_kernels_for_op(op).kernel
    print(*sorted(f"{{k.device_type}}:{{len(k.host_memory_arg)}}" for k in registered))
"""


@pytest.mark.parametrize("with_cuda", [False, True])
def test_kernels_are_there_for_a_gpu_where_the_library_is(with_cuda, ops, tmp_path):
    """A kernel for each type; `training` is in the host's memory."""
    library = ops if with_cuda else beside(tmp_path, None)
    devices = ["CPU:1"] * 4 + ["GPU:1"] * (4 if with_cuda else 0)
    assert run_python(DEVICES.format(str(library))).split() == devices * 2
