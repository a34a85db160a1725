"""Layers on a GPU by torch's memory, streams and events: our kernels, and what torch has for the same.

Each implementation of a layer is a function `call(i)` that queues the work on the i-th of several sets of tensors, so
that none is still in a cache, on the current stream.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from benchmarks.cases import Case
from benchmarks.implementations import INFERENCE, TRAIN_FORWARD, TRAIN_STEP
from benchmarks.problem import EPSILON, MOMENTUM, Problem
from benchmarks.roofline import traffic
from fusedconvbn import _load, raw

Call = Callable[[int], Any]
_ACTIVATIONS = {None: lambda y: y, "relu": functional.relu_, "relu6": functional.relu6}
_BEYOND_CACHES, _MOST_SETS = 160 << 20, 16  # bytes of all sets, three times the L2 of an H100
_MOST_CALLS, _SAMPLE_SECONDS = 20, 0.1  # in a graph
_COLORS = 3  # channels of an image: nobody wants its gradient


def symmetric(case: Case) -> Case:
    """With the padding that torch knows: of a strided layer one pixel further to the left than TensorFlow's."""
    pads = ((case.filter_height - 1) * case.dilation // 2, (case.filter_width - 1) * case.dilation // 2)
    return dataclasses.replace(case, padding=(pads[0], pads[0], pads[1], pads[1]))


class Tensors:
    """One set of a layer's tensors, images [N,H,W,C], filters [kh,kw,C/groups,K]; never zeros."""

    def __init__(self, problem: Problem, seed: int):
        case, generator = problem.case, torch.Generator("cuda").manual_seed(seed)
        dtype = getattr(torch, problem.dtype)

        def drawn(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(shape, generator=generator, device="cuda")).to(dtype)

        self.inputs = drawn(case.input_shape(problem.batch), dtype)
        fan_in = math.prod(case.filter_shape[:3])
        self.filters = drawn(case.filter_shape, dtype, fan_in**-0.5)
        output = case.output_shape(problem.batch)
        self.residual = drawn(output, dtype) if case.residual else None
        self.output_gradient = drawn(output, dtype)
        self.gamma, self.beta, self.mean = (drawn((case.out_channels,), torch.float32) for _ in range(3))
        self.variance = drawn((case.out_channels,), torch.float32).square() + 0.5


def sets_of(problem: Problem) -> list[Tensors]:
    touched = sum(traffic(problem))
    return [Tensors(problem, seed) for seed in range(max(1, min(_MOST_SETS, math.ceil(_BEYOND_CACHES / touched))))]


class Ours:
    """The entry points of the CUDA library, on memory that was allocated before, as TensorFlow's allocator has it."""

    def __init__(self, problem: Problem, sets: list[Tensors]):
        self.problem, self.sets, case = problem, sets, problem.case
        self.library = _load.cuda()
        options = {
            "dtype": problem.dtype, "strides": case.stride, "dilations": case.dilation, "padding": case.op_padding,
            "activation": case.activation, "residual": case.residual, "training": problem.training,
            "epsilon": EPSILON, "momentum": MOMENTUM,
        }  # fmt: skip
        shapes = (case.input_shape(problem.batch), case.filter_shape)
        plans = {d: raw.plan(*shapes, direction=d, device="gpu", **options) for d in ("forward", "backward")}
        self.plan, self.backward_plan = plans["forward"], plans["backward"]
        bytes_needed = max(plan.workspace_bytes for plan in plans.values())
        self.workspace = torch.empty(bytes_needed, dtype=torch.uint8, device="cuda")
        image = case.output_shape(problem.batch)
        dtype = sets[0].inputs.dtype
        self.outputs = [torch.empty(image, dtype=dtype, device="cuda") for _ in sets]
        self.conv_outs = [torch.empty(image, dtype=dtype, device="cuda") if problem.training else None for _ in sets]
        self.vectors = [torch.empty(case.out_channels, device="cuda") for _ in range(8)]
        self.zeros = torch.zeros(case.out_channels, device="cuda")
        if problem.mode == TRAIN_STEP:
            images = [None if case.channels == _COLORS else torch.empty_like(t.inputs) for t in sets]
            self.gradients = [(image, torch.empty_like(t.filters)) for image, t in zip(images, sets)]
            self.d_residuals = [None if t.residual is None else torch.empty_like(t.residual) for t in sets]

    def __call__(self, i: int) -> torch.Tensor:
        t, output = self.sets[i], self.outputs[i]
        primary = [t.inputs, t.filters, t.gamma, t.beta, t.mean, t.variance, t.residual]
        statistics = self.vectors[:4] if self.problem.training else [None] * 4
        self._run(self.library.forward, self.plan, [*primary, output, *statistics, self.conv_outs[i]])
        if self.problem.mode == TRAIN_STEP:
            saved = [output if t.residual is not None else None, *statistics[2:], self.conv_outs[i]]
            given = [t.output_gradient, self.zeros, self.zeros, *primary, *saved]
            results = [*self.gradients[i], *self.vectors[4:8], self.d_residuals[i]]
            self._run(self.library.backward, self.backward_plan, [*given, *results])
        return output

    def _run(self, entry: Any, plan: Any, tensors: list[torch.Tensor | None]) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        entry(plan, addresses, self.workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)


class Torch:
    """torch in channels_last: the convolution, batch norm, the addition and the activation, each an op of its own."""

    def __init__(self, problem: Problem, sets: list[Tensors]):
        self.problem, self.sets, case = problem, sets, problem.case
        self.inputs = [t.inputs.permute(0, 3, 1, 2) for t in sets]
        self.filters = [t.filters.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last) for t in sets]
        self.residuals = [None if t.residual is None else t.residual.permute(0, 3, 1, 2) for t in sets]
        self.upstream = [t.output_gradient.permute(0, 3, 1, 2) for t in sets]
        self.parameters = [(t.gamma.clone(), t.beta.clone()) for t in sets]
        self.convolution = {
            "stride": case.stride, "dilation": case.dilation, "groups": case.groups, "padding": case.padding[1::2],
        }  # fmt: skip

    def __call__(self, i: int) -> Any:
        """The output; in a training step the gradients of what `leaves` names, too."""
        arguments = [self.inputs[i], self.filters[i], *self.parameters[i], self.residuals[i]]
        if self.problem.mode != TRAIN_STEP:
            with torch.no_grad():
                return self.layer(i, *arguments)
        arguments = [None if argument is None else argument.detach() for argument in arguments]
        leaves = [arguments[j].requires_grad_() for j in self.leaves() if arguments[j] is not None]
        output = self.layer(i, *arguments)
        return output, torch.autograd.grad(output, leaves, self.upstream[i])

    def leaves(self) -> range:
        """Of the arguments."""
        return range(int(self.problem.case.channels == _COLORS), 5)

    def layer(self, i: int, inputs: Any, filters: Any, gamma: Any, beta: Any, residual: Any) -> torch.Tensor:
        t = self.sets[i]
        z = functional.conv2d(inputs, filters, **self.convolution)
        y = functional.batch_norm(z, t.mean, t.variance, gamma, beta, self.problem.training, 1 - MOMENTUM, EPSILON)
        if residual is not None:
            y = y + residual
        return _ACTIVATIONS[self.problem.case.activation](y)


class Convolution(Torch):
    """torch's convolution alone; in a training step with both of its gradients."""

    def layer(self, i: int, inputs: Any, filters: Any, gamma: Any, beta: Any, residual: Any) -> torch.Tensor:
        return functional.conv2d(inputs, filters, **self.convolution)

    def leaves(self) -> range:
        return range(int(self.problem.case.channels == _COLORS), 2)


IMPLEMENTATIONS = {"fusedconvbn": Ours, "torch": Torch, "conv": Convolution}


def error_of(problem: Problem, sets: list[Tensors], ours: Ours) -> float:
    """||ours - exact|| / ||exact|| of the first output; exact: torch in float64, statistics of z as it is stored."""
    ours(0)
    mode = problem.mode if problem.mode == INFERENCE else TRAIN_FORWARD
    double = dataclasses.replace(problem, dtype="float64", mode=mode)
    exact = Torch(double, [_in_double(sets[0])])(0).permute(0, 2, 3, 1)
    return float((ours.outputs[0].double() - exact).norm() / exact.norm())


def _in_double(tensors: Tensors) -> Tensors:
    copy = object.__new__(Tensors)
    for name, value in vars(tensors).items():
        setattr(copy, name, None if value is None else value.double())
    return copy


class Timer:
    """A call's device time, in seconds: some of them in a graph, replayed between two events.

    Results of as many calls as there are sets stay: memory that was just freed would be in a cache.
    """

    def __init__(self, call: Call, sets: int):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # loads the kernels, and lets cuDNN choose
            for i in range(max(3, sets)):
                call(i % sets)
        torch.cuda.synchronize()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        once = self._seconds(lambda: call(0))
        self._calls = max(sets, min(_MOST_CALLS, int(_SAMPLE_SECONDS / once)))
        self._graph, self._results = torch.cuda.CUDAGraph(), collections.deque(maxlen=sets)
        with torch.cuda.graph(self._graph):
            for i in range(self._calls):
                self._results.append(call(i % sets))

    def sample(self) -> float:
        """Behind another replay, so that no launch is waited for."""
        self._graph.replay()
        return self._seconds(self._graph.replay) / self._calls

    def _seconds(self, queue: Callable[[], Any]) -> float:
        begin, end = self._events
        begin.record()
        queue()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def limits(dtype: str) -> tuple[float, float]:
    """What this device reaches: bytes a second of a large copy, read and written, and FLOP/s of a matrix product."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = Timer(lambda _: target.copy_(source), 1)
    a, b = (torch.randn(8192, 8192, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    product = Timer(lambda _: torch.mm(a, b, out=out), 1)
    fastest = [min(timer.sample() for _ in range(5)) for timer in (copy, product)]
    return 2 * source.nbytes / fastest[0], 2 * 8192**3 / fastest[1]
