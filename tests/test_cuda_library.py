"""The CUDA kernels as nvcc compiles them, as far as a machine without a GPU can tell."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
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
    names |= {"fcb_cuda_layout", "fcb_cuda_kernels"}
    assert {line.split()[-1] for line in symbols.splitlines()} == names


@pytest.mark.parametrize("training", [False, True])
def test_workspace(library, training):
    """Vectors and sums forward; backward z or its gradient, too, whole."""
    case = Case(batch=4, height=32, width=32, in_channels=8, out_channels=64)
    params = raw._params(case.inputs_shape, case.filters_shape, padding="SAME", training=training, **UNSTRIDED)
    image = 4 * 4 * 32 * 32 * 64
    assert library.plan(params, False).workspace_bytes < image / 8
    assert image <= library.plan(params, True).workspace_bytes <= 2.5 * image


INSTANCES = """
#include "element.h"
#include "tensor_convolve.cuh"
using namespace fusedconvbn;
using namespace fusedconvbn::cuda;
#define INSTANCE(SHAPE, ...) template __global__ void cuda::tensor_multiply<__VA_ARGS__, SHAPE>(__VA_ARGS__);
namespace fusedconvbn {
INSTANCE(SquareTiles, TensorForward<Half, Normalize<Half>>)
INSTANCE(WideTiles, TensorForward<BFloat16, MeasureZ<BFloat16>>)
INSTANCE(NarrowTiles, TensorDgrad<BFloat16>)
INSTANCE(WideTiles, TensorWgrad<BFloat16>)
}
"""


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def instances(request, tmp_path_factory) -> tuple[Path, str]:
    """Some kernels for tensor cores: machine code, and what ptxas says of it."""
    folder, include = tmp_path_factory.mktemp("instances"), cuda_core.ROOT / "cuda"
    (folder / "instances.cu").write_text(INSTANCES)
    command = ["nvcc", "-std=c++17", f"-arch={request.param}", f"-I{include}", "-Xptxas", "-v", "-cubin"]
    command += [str(folder / "instances.cu"), "-o", str(folder / "instances.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder / "instances.cubin", done.stdout + done.stderr


def test_tensor_kernels_spill_nothing(instances):
    """And of square and narrow tiles two blocks of 256 threads find registers."""
    report = instances[1]
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", report) == [("0", "0")] * 4
    kernels = re.findall(
        r"Compiling entry function '\w*?TensorShapeILi(\d+)E.*?Used (\d+) registers", report, re.DOTALL
    )
    assert sorted(rows for rows, _ in kernels) == ["128", "128", "256", "256"]
    assert all(int(registers) <= (128 if rows == "128" else 255) for rows, registers in kernels)


# (HMMA, LDSM, LDGSTS) by a tile's rows and columns: products of 16 x 8 and a depth of 16, for a depth of 32; what they
# read, four matrices at once; what a thread copies of a stage, before the loop and in it.
INSTRUCTIONS = {("128", "128"): (32, 12, 8), ("128", "64"): (16, 8, 6), ("256", "128"): (64, 16, 12)}


def test_tensor_kernels_are_made_of_tensor_instructions(instances):
    packaged = next(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm"), None)
    tool = shutil.which("nvdisasm") or packaged
    if tool is None:
        pytest.skip("this machine has no nvdisasm")
    code = subprocess.run([tool, "-c", instances[0]], capture_output=True, text=True, check=True).stdout
    kernels = [part for part in code.split(".section\t") if part.startswith(".text")]
    assert len(kernels) == 4
    for kernel in kernels:
        tile = re.search(r"TensorShapeILi(\d+)ELi(\d+)E", kernel).groups()
        counts = Counter(re.findall(r"\b(HMMA|LDSM|LDGSTS|LDL|STL)\b", kernel))
        assert counts == dict(zip(("HMMA", "LDSM", "LDGSTS"), INSTRUCTIONS[tile])), tile


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
