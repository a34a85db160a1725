"""The CUDA kernels against the oracle, on the host: a fiber for each thread, one block after the other."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import cuda_host
import numpy as np
import pytest
from cases import Case, depthwise_cases, op_cases
from raw_problem import Problem

from fusedconvbn import _load, raw

# Pixels of several ranges, of sums of channels (256 pixels) and of the filters' gradient (1024).
RANGES = [
    Case(
        data_format=data_format, batch=3, height=37, width=41, in_channels=c, out_channels=k, groups=groups,
        training=training, activation="relu", residual=True, dtype=dtype,
    )
    for data_format in ("NHWC", "NCHW")
    for c, k, groups, training, dtype in ((5, 9, 1, True, "f32"), (6, 6, 6, True, "bf16"), (4, 8, 2, False, "f64"))
]  # fmt: skip
FAST = 3  # every third case in `make test`


def tiers(cases: list[Case]) -> list:
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if i % FAST else []) for i, case in enumerate(cases)
    ]


ALL = [replace(case, isa=None) for case in op_cases() + depthwise_cases()[::9]]
CASES = tiers(ALL) + [pytest.param(case, id=str(case)) for case in RANGES]
TRAINED = [case for case in ALL + RANGES if case.training]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """FUSEDCONVBN_CUDA_HOST: one that is built already."""
    path = os.environ.get("FUSEDCONVBN_CUDA_HOST") or cuda_host.build_host(tmp_path_factory.mktemp("host"))
    return _load.core().CudaLibrary(str(path))


@pytest.fixture
def _on_the_host(library, monkeypatch):
    core = cuda_host.Core(library)
    monkeypatch.setattr(_load, "core", lambda: core)


on_the_host = pytest.mark.usefixtures("_on_the_host")


@on_the_host
@pytest.mark.parametrize("case", CASES)
def test_forward(case: Case):
    problem = Problem(case)
    problem.check_forward(problem.run_forward())


@on_the_host
@pytest.mark.parametrize("case", CASES)
def test_backward(case: Case):
    problem = Problem(case)
    problem.check_backward(problem.run_backward())


@on_the_host
@pytest.mark.parametrize("case", tiers(TRAINED[::5]))
def test_backward_computes_z_again(case: Case):
    problem = Problem(case, start="again")
    problem.saved["conv_out"] = None
    problem.check_backward(problem.run_backward(save="recompute"))


@on_the_host
@pytest.mark.parametrize("case", tiers([case for case in TRAINED if case.dtype == "f32"][::2]))
def test_z_in_bfloat16(case: Case):
    forward, backward = Problem(case), Problem(case, start="bfloat16")
    result = forward.run_forward(save="bfloat16")
    assert result.conv_out.ndim == 1
    forward.check_forward(result)
    backward.check_backward(backward.run_backward("bfloat16", save="bfloat16"))


@on_the_host
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("case", TRAINED[::59], ids=str)
def test_gradients_that_nobody_asks_for(case: Case, needs: tuple[bool, bool]):
    problem = Problem(case)
    result = problem.run_backward(needs_inputs=needs[0], needs_filters=needs[1])
    problem.check_backward(result, *needs)


@on_the_host
@pytest.mark.parametrize("case", [*ALL[::47], *RANGES[:2]], ids=str)
def test_the_same_bits_whatever_the_order_of_threads(case: Case, monkeypatch):
    """A result that another thread has not written yet shows, where no barrier makes it wait."""
    problem = Problem(case)
    first = (*problem.run_forward(), *problem.run_backward())
    monkeypatch.setenv("FUSEDCONVBN_FIBERS", "reverse")
    for one, other in zip(first, (*problem.run_forward(), *problem.run_backward())):
        assert (one is None) == (other is None)
        assert one is None or one.tobytes() == other.tobytes()


@on_the_host
@pytest.mark.parametrize("ratio", [0, 10, 1e2, 1e3, 1e4])
def test_variance_under_a_large_mean(ratio: float):
    z = np.random.default_rng(7).normal(ratio, 1, (4, 31, 29, 5)).astype(np.float32)
    filters, ones = np.eye(5, dtype=np.float32)[None, None], np.ones(5, np.float32)
    result = raw.forward(z, filters, ones, ones, ones, ones, epsilon=0, training=True)
    np.testing.assert_allclose(result.inv_std.astype(np.float64) ** -2, z.astype(np.float64).var((0, 1, 2)), rtol=1e-6)


def test_images_that_are_too_large(library):
    params = raw._params(
        (1, 2**20, 2**20, 1), (1, 1, 1, 1), strides=1, dilations=1, padding="VALID", data_format="NHWC"
    )
    with pytest.raises(RuntimeError, match="more than 2\\^31 - 1 pixels has no GPU kernel"):
        library.forward(params, [0] * 13, 0, 0)


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
    folder, cuda = tmp_path_factory.mktemp("fibers"), cuda_host.ROOT / "cuda"
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
