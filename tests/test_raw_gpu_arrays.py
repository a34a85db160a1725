"""`raw` on arrays of a GPU, by stand-ins for their libraries and for CUDA: which memory, which stream, which errors."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from cases import Case
from cuda_suite import ALL, problem_of
from raw_problem import Problem

from fusedconvbn import _load, raw

CASES = [
    *(case for case in ALL[::29] if case.batch),
    Case(residual=True, activation="silu", training=True, dtype="bf16"),
    Case(residual=True, activation="relu", training=True, data_format="NCHW"),
]


class Recorded:
    """A CUDA library, and the streams of its calls."""

    def __init__(self, library: Any):
        self._library, self.streams = library, []
        self.plan = library.plan

    def forward(self, *arguments: Any) -> None:
        self.streams.append(arguments[-1])
        self._library.forward(*arguments)

    def backward(self, *arguments: Any) -> None:
        self.streams.append(arguments[-1])
        self._library.backward(*arguments)


@pytest.fixture
def cuda(cuda_host, monkeypatch) -> Recorded:
    library = Recorded(_load.core().CudaLibrary(str(cuda_host)))
    monkeypatch.setattr(_load, "cuda", lambda: library)
    return library


@pytest.fixture(params=["cupy", "torch"])
def arrays(request, cuda, monkeypatch) -> Any:
    module = {"cupy": fake_gpu.Cupy, "torch": fake_gpu.Torch}[request.param]()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def on_the_gpu(arrays: Any, values: dict[str, Any], device: int = 0) -> dict[str, Any]:
    return {name: arrays.array(v, device) if isinstance(v, np.ndarray) else v for name, v in values.items()}


def forward(arrays: Any, problem: Problem, device: int = 0, **options: Any) -> raw.ForwardResult:
    names = ("inputs", "filters", "gamma", "beta", "moving_mean", "moving_variance", "residual")
    values = on_the_gpu(arrays, dict(zip(names, problem.arguments)), device)
    return raw.forward(**values, **{**problem.case.attributes, **options})


def backward(arrays: Any, problem: Problem, device: int = 0, **options: Any) -> raw.BackwardResult:
    names = ("inputs", "filters", "gamma", "beta", "moving_mean", "moving_variance", "residual")
    upstream = ("output_gradient", "moving_mean_gradient", "moving_variance_gradient")
    values = {**dict(zip(upstream, problem.upstream)), **dict(zip(names, problem.arguments)), **problem.saved}
    return raw.backward(**{**on_the_gpu(arrays, values, device), **problem.case.attributes, **options})


def on_the_host(result: Any) -> Any:
    return result._make(None if array is None else array.host for array in result)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(arrays, case: Case):
    problem = problem_of(case)
    result = forward(arrays, problem)
    assert {type(array) for array in result} <= {type(arrays.array(problem.arguments.inputs)), type(None)}
    problem.check_forward(on_the_host(result))
    problem.check_backward(on_the_host(backward(arrays, problem)))


@pytest.mark.parametrize("given", ["none", "address", "object", "default"])
def test_memory_and_kernels_are_in_the_order_of_one_stream(arrays, cuda, given: str):
    """On the device of the arguments, whatever is current. One is not contiguous: its copy is memory, too."""
    stream = {"none": None, "address": 12, "object": fake_gpu.Stream(12), "default": 0}[given]
    problem = Problem(Case(training=True))
    problem.arguments = replace(problem.arguments, gamma=np.repeat(problem.arguments.gamma, 2)[::2])
    result = forward(arrays, problem, device=1, stream=stream)
    backward(arrays, problem, device=1, stream=stream)
    expected = {"none": fake_gpu.CURRENT_STREAM, "default": 0}.get(given, 12)
    assert cuda.streams == [expected] * 2
    assert set(arrays.state.allocations) == {(1, expected)}
    assert (arrays.state.device, arrays.state.stream) == (0, fake_gpu.CURRENT_STREAM)
    problem.check_forward(on_the_host(result))


def test_gradients_of_statistics_are_zero_by_default(arrays):
    problem = Problem(Case(training=True))
    zeros = np.zeros(problem.case.out_channels, problem.case.stat_dtype)
    problem.upstream = (problem.upstream[0], zeros, zeros)
    names = {"moving_mean_gradient": None, "moving_variance_gradient": None}
    problem.check_backward(on_the_host(backward(arrays, problem, **names)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isa": "avx2"}, "`isa` must be left out for a GPU. Received: isa='avx2'"),
        ({"kernel": "forward_reference"}, "`kernel` must be left out for a GPU"),
        ({"threads": 2}, "`threads` must be left out for a GPU"),
        ({"algorithm": "winograd4"}, "algorithm must be .* on a GPU"),
        ({"stream": -1}, "`stream` must be None, a stream of CuPy or torch, or its address. Received: stream=-1"),
        ({"stream": "main"}, "`stream` must be None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_a_gpu_does_not_take(arrays, options: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        forward(arrays, Problem(Case(kernel=(3, 3))), **options)


def test_packed_filters(arrays):
    problem = Problem(Case(kernel=(3, 3)))
    plan = raw.plan(problem.case.inputs_shape, problem.case.filters_shape, **problem.case.attributes)
    packed = raw.pack_filters(plan, problem.arguments.filters)
    with pytest.raises(ValueError, match="`packed_filters` must be"):
        forward(arrays, problem, packed_filters=packed)


def test_arrays_of_different_places(arrays):
    problem = Problem(Case())
    arguments = [arrays.array(array) for array in problem.arguments if array is not None]
    with pytest.raises(TypeError, match=r"`gamma` must be .*, as `inputs` is\. Received: ndarray"):
        raw.forward(*arguments[:2], problem.arguments.gamma, *arguments[3:], **problem.case.attributes)
    with pytest.raises(ValueError, match=r"`beta` must be on the device of `inputs`, .* Received: one on .*1"):
        raw.forward(*arguments[:3], arrays.array(problem.arguments.beta, 1), *arguments[4:], **problem.case.attributes)


def test_wrong_arrays(arrays):
    """The same words as for NumPy's."""
    problem = Problem(Case())
    problem.arguments = replace(problem.arguments, gamma=problem.arguments.gamma.astype(np.float64))
    with pytest.raises(
        TypeError, match=r"`gamma` must be an array of dtype float32. Received: shape \(\d+,\), dtype f"
    ):
        forward(arrays, problem)
    problem.arguments = replace(problem.arguments, gamma=np.zeros(99, np.float32))
    with pytest.raises(ValueError, match=r"`gamma` must be an array of shape .* Received: shape \(99,\)"):
        forward(arrays, problem)


def test_a_stream_for_arrays_on_the_cpu():
    with pytest.raises(ValueError, match="`stream` must be None for arrays that are not on a GPU"):
        Problem(Case()).run_forward(stream=0)


@pytest.mark.usefixtures("cuda")
def test_plan():
    plan = raw.plan((2, 8, 8, 4), (3, 3, 4, 6), training=True, device="gpu")
    assert str(plan) == f"plain; workspace {plan.workspace_bytes} bytes of a GPU's memory"
    assert (plan.saved, plan.conv_out_shape, plan.packed_bytes) == ("conv", [2, 6, 6, 6], 0)
    assert raw.plan((2, 8, 8, 4), (3, 3, 4, 6), direction="backward", training=True, device="gpu").workspace_bytes > 0
    with pytest.raises(ValueError, match="`device` must be 'cpu' or 'gpu'"):
        raw.plan((2, 8, 8, 4), (3, 3, 4, 6), device="cuda")


def test_a_build_without_cuda(monkeypatch):
    monkeypatch.setattr(_load, "CUDA_LIBRARY", Path("none.so"))
    _load.cuda.cache_clear()
    with pytest.raises(
        ImportError, match=r"no CUDA kernels: not built\. In a clone: with nvcc on the PATH, `make build`"
    ):
        raw.plan((2, 8, 8, 4), (3, 3, 4, 6), device="gpu")
