"""The CUDA kernels on a GPU, without TensorFlow: FUSEDCONVBN_CUDA_LIBRARY is the library, else that of the package."""

from __future__ import annotations

import os
from pathlib import Path

import cuda_core
import pytest
from cases import Case
from cuda_suite import *  # noqa: F403
from cuda_suite import ALL, RANGES, with_the_kernels
from raw_problem import Problem

import fusedconvbn
from fusedconvbn import _load

if not cuda_core.has_gpu():
    pytest.skip("this machine has no GPU", allow_module_level=True)
cupy = pytest.importorskip("cupy")


@pytest.fixture(scope="module")
def library():
    path = os.environ.get("FUSEDCONVBN_CUDA_LIBRARY") or Path(fusedconvbn.__file__).parent / "_cuda.so"
    return _load.core().CudaLibrary(str(path))


@pytest.fixture
def on_the_device(library, monkeypatch):
    core = cuda_core.Core(library, cuda_core.GpuMemory(cupy))
    monkeypatch.setattr(_load, "core", lambda: core)
    return core


@with_the_kernels
@pytest.mark.parametrize("case", [*ALL[::7], *RANGES], ids=str)
def test_the_same_bits_again(case: Case):
    problem = Problem(case)
    first = (*problem.run_forward(), *problem.run_backward())
    for one, other in zip(first, (*problem.run_forward(), *problem.run_backward())):
        assert (one is None) == (other is None)
        assert one is None or one.tobytes() == other.tobytes()
