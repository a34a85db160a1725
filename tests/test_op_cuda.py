"""The ops' kernels for a GPU, with the CUDA kernels on the host, as TensorFlow would call them."""

from __future__ import annotations

import os
from pathlib import Path

import cuda_core
import op_harness
import pytest
import tensorflow as tf
from cases import Case
from op_cuda_suite import *  # noqa: F403
from processes import run_python
from raw_problem import Problem

from fusedconvbn import _load

OPS = _load.LIBRARY
FRAMEWORK = Path(tf.sysconfig.get_lib()) / "libtensorflow_framework.so.2"


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
    return op_harness.beside(tmp_path_factory.mktemp("ops"), OPS, cuda_host)


@pytest.fixture(scope="module")
def process(harness, ops):
    with op_harness.process(framework=FRAMEWORK, library=harness, ops=ops, gpu=False) as process:
        yield process


def test_a_library_that_cannot_be_opened(harness, tmp_path, monkeypatch):
    """When the first kernel is made: the error says which."""
    (tmp_path / "no").write_text("a library")
    ops = op_harness.beside(tmp_path, OPS, tmp_path / "no")
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
    library = ops if with_cuda else op_harness.beside(tmp_path, OPS, None)
    devices = ["CPU:1"] * 4 + ["GPU:1"] * (4 if with_cuda else 0)
    assert run_python(DEVICES.format(str(library))).split() == devices * 2
