"""The CUDA kernels on the host: a fiber for each thread, one block after the other."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_core
import numpy as np
import pytest
from cases import Case
from cuda_suite import *  # noqa: F403
from cuda_suite import ALL, RANGES, TENSOR, problem_of, with_the_kernels
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
@pytest.mark.parametrize("case", [*ALL[::47], *RANGES[:3], *TENSOR[1:6]], ids=str)
def test_the_same_bits_whatever_the_order_of_threads(case: Case, monkeypatch):
    """A result that another thread has not written yet shows, where no barrier makes it wait."""
    problem = Problem(case)
    first = (*problem.run_forward(), *problem.run_backward())
    monkeypatch.setenv("FUSEDCONVBN_FIBERS", "reverse")
    for one, other in zip(first, (*problem.run_forward(), *problem.run_backward())):
        assert (one is None) == (other is None)
        assert one is None or one.tobytes() == other.tobytes()


class Shifted(cuda_core.Memory):
    """Copies that begin an element behind a multiple of 16 bytes, but for the workspace."""

    def copy_of(self, array: np.ndarray) -> np.ndarray:
        if array.dtype == np.uint8:
            return array
        memory = cuda_core.aligned(array.nbytes + 16)
        shifted = memory[array.itemsize : array.itemsize + array.nbytes]
        shifted[:] = array.reshape(-1).view(np.uint8)
        return shifted


@pytest.mark.parametrize("case", [*TENSOR[1:4], *RANGES], ids=str)
def test_buffers_that_begin_anywhere(case: Case, library, monkeypatch):
    """Nothing reads 16 bytes at once there."""
    core = cuda_core.Core(library, Shifted())
    monkeypatch.setattr(_load, "core", lambda: core)
    problem = problem_of(case)
    problem.check_forward(problem.run_forward())
    problem.check_backward(problem.run_backward())


KERNELS = """
#include "element.h"
#include "divisor.h"
#include "warp.cuh"
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
__global__ void a_lane_left_alone() {
  if (threadIdx.x != 7) __syncwarp();
}
__global__ void copies(const Eight* from, int* to, bool wait) {
  __shared__ Eight chunks[kThreads];
  copy_async(chunks + threadIdx.x, from + threadIdx.x, from);
  commit_copies();
  if (wait) wait_for_copies<0>();
  to[threadIdx.x] = chunks[threadIdx.x].elements[3];
}
int wrong_quotients() {
  int wrong = 0;
  const int most = 0x7fffffff;
  for (int d : {1, 2, 3, 5, 7, 8, 9, 56, 64, 100, 3136, 12544, 65535, 65537, 1 << 30, (1 << 30) + 1, most - 1, most}) {
    const Divisor divisor(d);
    for (int64_t near : {int64_t{0}, int64_t{d}, int64_t{d} * (most / d), int64_t{d} * (most / d / 3), int64_t{most}})
      for (int64_t n = near < 1000 ? 0 : near - 1000; n <= most && n < near + 1000; ++n) {
        const int number = static_cast<int>(n), quotient = divisor.quotient(number);
        wrong += quotient != number / d || divisor.rest(number, quotient) != number % d;
      }
  }
  return wrong;
}
int main(int, char** arguments) {
  static Eight from[kThreads];
  for (int i = 0; i < kThreads; ++i) from[i].elements[3] = i;
  int to[kThreads] = {}, sum = 0;
  const auto asked = [&](const char* word) { return std::strcmp(arguments[1], word) == 0; };
  if (asked("left alone")) launch(left_alone, 2, nullptr);
  else if (asked("a lane left alone")) launch(a_lane_left_alone, 1, nullptr);
  else if (asked("quotients")) to[0] = wrong_quotients();
  else if (asked("copies") || asked("no wait")) launch(copies, 1, nullptr, from, to, asked("copies"));
  else launch(neighbours, 1, nullptr, to, asked("barrier"));
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


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("left alone", "some threads of a block ended while others wait at __syncthreads()"),
        ("a lane left alone", "some threads of a warp went on while others wait at its barrier"),
    ],
)
def test_a_barrier_that_not_all_threads_reach(program: Path, word: str, message: str):
    done = subprocess.run([program, word], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(("word", "total"), [("copies", 255 * 256 // 2), ("no wait", 0), ("quotients", 0)])
def test_copies_and_quotients(program: Path, word: str, total: int):
    """A copy that nobody waits for has not taken place; no quotient is wrong."""
    assert int(subprocess.run([program, word], capture_output=True, check=True).stdout) == total
