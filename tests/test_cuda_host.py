"""The CUDA kernels on the host: a fiber for each thread, one block after the other."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_core
import pytest
from cases import Case
from cuda_suite import *  # noqa: F403
from cuda_suite import ALL, RANGES, with_the_kernels
from raw_problem import Problem

from fusedconvbn import _load


@pytest.fixture(scope="module")
def library(cuda_host):
    return _load.core().CudaLibrary(str(cuda_host))


@pytest.fixture
def on_the_device(library, monkeypatch):
    core = cuda_core.Core(library, cuda_core.Memory())
    monkeypatch.setattr(_load, "core", lambda: core)
    return core


@with_the_kernels
@pytest.mark.parametrize("case", [*ALL[::47], *RANGES[:3]], ids=str)
def test_the_same_bits_whatever_the_order_of_threads(case: Case, monkeypatch):
    """A result that another thread has not written yet shows, where no barrier makes it wait."""
    problem = Problem(case)
    first = (*problem.run_forward(), *problem.run_backward())
    monkeypatch.setenv("FUSEDCONVBN_FIBERS", "reverse")
    for one, other in zip(first, (*problem.run_forward(), *problem.run_backward())):
        assert (one is None) == (other is None)
        assert one is None or one.tobytes() == other.tobytes()


KERNELS = """
#include "launch.h"
#include <cstdio>
#include <cstring>
using namespace fusedconvbn::cuda;
__global__ void neighbours(int* to, bool barrier) {
  __shared__ int numbers[kThreads];
  numbers[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  to[threadIdx.x] = numbers[(threadIdx.x + 1) % kThreads];
}
__global__ void left_alone() {
  if (threadIdx.x < 100) __syncthreads();
}
int main(int, char** arguments) {
  int to[kThreads] = {}, sum = 0;
  if (std::strcmp(arguments[1], "left alone") == 0) launch(left_alone, 2, nullptr);
  else launch(neighbours, 1, nullptr, to, std::strcmp(arguments[1], "barrier") == 0);
  for (int number : to) sum += number;
  std::printf("%d", sum);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder, cuda = tmp_path_factory.mktemp("fibers"), cuda_core.ROOT / "cuda"
    (folder / "kernels.cc").write_text(KERNELS)
    command = [os.environ.get("CXX", "c++"), "-std=c++17", f"-I{cuda}", folder / "kernels.cc", cuda / "host/fibers.cc"]
    subprocess.run([*map(str, command), "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.mark.parametrize(("order", "without"), [("forward", 0), ("reverse", 255 * 256 // 2)])
def test_a_missing_barrier_shows_in_one_of_two_orders(program: Path, order: str, without: int):
    """Each thread reads what its neighbour writes, which in one order has run before it."""
    environment = {**os.environ, "FUSEDCONVBN_FIBERS": order}
    sums = [
        int(subprocess.run([program, word], env=environment, capture_output=True, check=True).stdout)
        for word in ("barrier", "none")
    ]
    assert sums == [255 * 256 // 2, without]


def test_a_barrier_that_not_all_threads_reach(program: Path):
    done = subprocess.run([program, "left alone"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "some threads of a block ended while others wait" in done.stderr
