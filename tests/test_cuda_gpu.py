"""The CUDA kernels on a GPU, without TensorFlow: FUSEDCONVBN_CUDA_LIBRARY is the library, else that of the package."""

from __future__ import annotations

import os
from pathlib import Path

import cuda_core
import pytest
from cases import Case
from cuda_suite import *  # noqa: F403
from cuda_suite import ALL, RANGES, TENSOR, problem_of, with_the_kernels
from raw_problem import Problem

import fusedconvbn
from fusedconvbn import _load, raw

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


@pytest.mark.parametrize("module", ["cupy", "torch"])
@pytest.mark.parametrize("case", [case for case in ALL if case.dtype != "bf16"][::29], ids=str)
def test_arrays_of_cupy_and_torch(case: Case, module: str, library, monkeypatch):
    """On the current stream, and on another one."""
    monkeypatch.setattr(_load, "cuda", lambda: library)
    arrays, problem = pytest.importorskip(module), Problem(case)
    take = cupy.asarray if module == "cupy" else lambda array: arrays.from_numpy(array.copy()).cuda()
    arguments = [None if array is None else take(array) for array in problem.arguments]
    arrays.cuda.Device().synchronize() if module == "cupy" else arrays.cuda.synchronize()
    for stream in (None, 0, cupy.cuda.Stream(non_blocking=True)):
        result = raw.forward(*arguments, **case.attributes, stream=stream)
        cupy.cuda.Device().synchronize()
        problem.check_forward(result._make(None if a is None else on_the_host(a) for a in result))


def on_the_host(array):
    return cupy.asnumpy(array) if isinstance(array, cupy.ndarray) else array.cpu().numpy()


@with_the_kernels
@pytest.mark.parametrize("case", [*ALL[::7], *RANGES, *TENSOR], ids=str)
def test_the_same_bits_again(case: Case):
    problem = problem_of(case)
    first = (*problem.run_forward(), *problem.run_backward())
    for one, other in zip(first, (*problem.run_forward(), *problem.run_backward())):
        assert (one is None) == (other is None)
        assert one is None or one.tobytes() == other.tobytes()
