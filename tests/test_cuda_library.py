"""The CUDA kernels as nvcc compiles them, as far as a machine without a GPU can tell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cuda_core
import pytest
from cases import Case

import fusedconvbn
from fusedconvbn import _load, raw

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="this machine has no nvcc")
UNSTRIDED = {"strides": 1, "dilations": 1, "data_format": "NHWC"}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """The package's, else, of a build without CUDA, one of its own."""
    packaged = Path(fusedconvbn.__file__).parent / "_cuda.so"
    if packaged.exists():
        return packaged
    folder = tmp_path_factory.mktemp("cuda")
    cuda_core.build(folder, "_cuda", FUSEDCONVBN_CUDA="AUTO")
    return folder / "_cuda.so"


@pytest.fixture(scope="module")
def library(path):
    return _load.core().CudaLibrary(str(path))


def test_it_needs_nothing_of_cuda_to_be_loaded(path):
    """But the driver, which it looks for when it first runs a kernel."""
    needed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert "cuda" not in needed.replace(str(path), "")


def test_it_exports_the_entry_points_alone(path):
    symbols = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    names = {f"fcb_cuda_{direction}{part}" for direction in ("forward", "backward") for part in ("", "_workspace")}
    names.add("fcb_cuda_layout")
    assert {line.split()[-1] for line in symbols.splitlines()} == names


@pytest.mark.parametrize("training", [False, True])
def test_workspace(library, training):
    """Vectors and sums forward; backward z or its gradient, too, whole."""
    case = Case(batch=4, height=32, width=32, in_channels=8, out_channels=64)
    params = raw._params(case.inputs_shape, case.filters_shape, padding="SAME", training=training, **UNSTRIDED)
    image = 4 * 4 * 32 * 32 * 64
    assert library.plan(params, False).workspace_bytes < image / 8
    assert image <= library.plan(params, True).workspace_bytes <= 2.5 * image


@pytest.mark.skipif(cuda_core.has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(library):
    params = raw._params((1, 5, 5, 3), (1, 1, 3, 4), padding="SAME", **UNSTRIDED)
    with pytest.raises(RuntimeError, match=r"driver|no CUDA-capable device"):
        library.forward(library.plan(params, False), [0] * 13, 0, 0)


def test_a_library_that_is_none(tmp_path):
    with pytest.raises(ImportError, match="cannot open shared object"):
        _load.core().CudaLibrary(str(tmp_path / "none.so"))
    with pytest.raises(ImportError, match="no fcb_cuda_layout"):
        _load.core().CudaLibrary(_load.core().__file__)
