"""Times every kernel that supports a stage of a problem against the plan's choice. Runs in a process of its own."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.cases import Case
from benchmarks.implementations import INFERENCE, TRAIN_FORWARD, TRAIN_STEP
from benchmarks.kernel_calls import Call, KernelCalls, keep_freed_memory
from benchmarks.problem import Problem
from benchmarks.statistics import median
from fusedconvbn import raw

_REFERENCE = "*_reference"  # naive loops, the oracle of the tests
_HOPELESS = 3.0  # times as slow as the fastest in its first call: not timed again
_DOUBTFUL = 0.02  # a loss beyond this is measured once more: the least of several noisy times is too low


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of one problem: what each kernel takes, and what the choice loses against the best of them."""

    name: str  # inference, train-forward, dgrad, wgrad, backward
    chosen: str
    best: str
    loss: float  # time of the chosen kernel / time of the best one - 1
    lost_seconds: float
    seconds: dict[str, float]  # by kernel


Samples = dict[str, list[float]]


def _sample(call: Call, repeats: int) -> float:
    """Seconds of CPU time a call: one thread, so that other processes count little."""
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


class StageTimer:
    """Interleaved medians of bare kernel calls on one thread."""

    def __init__(self, rounds: int, sample_seconds: float, excluded: Iterable[str] = ()):
        keep_freed_memory()
        self._rounds, self._sample_seconds = rounds, sample_seconds
        patterns = [_REFERENCE, *excluded]
        usable = [row for row in raw.kernels() if row.available]
        self._rows = [row for row in usable if not any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]

    def measure(self, case: Case, batch: int, dtype: str) -> list[Stage]:
        """All stages of the layer, in inference and in training."""
        common = {"case": case, "batch": batch, "dtype": dtype}
        inference = Problem(**common, mode=INFERENCE, training=False)
        forward = Problem(**common, mode=TRAIN_FORWARD, training=True)
        step = Problem(**common, mode=TRAIN_STEP, training=True)
        return [*self._forward(inference), *self._forward(forward), *self._backward(step)]

    def _plans(self, calls: KernelCalls, direction: str, stage: str) -> dict[str, Any]:
        """A plan for each row of the stage that supports the problem."""
        plans = {}
        for row in self._rows:
            if row.stage == stage:
                try:
                    plans[row.name] = calls.plan(direction, row.name)
                except ValueError:  # does not support it
                    continue
        return plans

    def _forward(self, problem: Problem) -> list[Stage]:
        calls = KernelCalls(problem)
        [chosen] = calls.plan("forward").kernels
        runs = {name: calls.forward(plan) for name, plan in self._plans(calls, "forward", "forward").items()}
        return [self._stage(problem.mode, chosen, runs)] if chosen in runs else []

    def _backward(self, problem: Problem) -> list[Stage]:
        """Of a stage inside the backward plan: the time with it less the time of the reduction alone."""
        calls = KernelCalls(problem)
        calls.forward(calls.plan("forward"))()
        reduction = next(iter(self._plans(calls, "backward", "reduce").values()))  # forced, so that stages are used
        base = calls.backward(reduction, needs_inputs=False, needs_filters=False)
        stages = []
        for stage, needs in (("dgrad", (True, False)), ("wgrad", (False, True))):
            [chosen] = [name for name in reduction.kernels if name.startswith(stage)]
            plans = self._plans(calls, "backward", stage)
            runs = {name: calls.backward(plan, *needs) for name, plan in plans.items()}
            if chosen in runs:
                stages.append(self._stage(stage, chosen, runs, base))
        return [*stages, self._whole(calls, reduction, sum(stage.lost_seconds for stage in stages))]

    def _whole(self, calls: KernelCalls, staged: Any, lost: float) -> Stage:
        """All of backward: its stages, with what their choice lost, against rows that do it in one."""
        in_stages = " + ".join(staged.kernels)
        runs = {in_stages: calls.backward(staged, True, True)}
        for name, plan in self._plans(calls, "backward", "backward").items():
            runs[name] = calls.backward(plan, True, True)
        chosen = calls.plan("backward").kernels
        stage = self._stage("backward", chosen[0] if len(chosen) == 1 else in_stages, runs)
        least = min(stage.seconds[stage.best], stage.seconds[in_stages] - lost)
        loss = stage.seconds[stage.chosen] / least - 1 if lost else stage.loss
        return dataclasses.replace(stage, loss=loss, lost_seconds=loss * least)

    def _stage(self, name: str, chosen: str, runs: Mapping[str, Call], base: Call | None = None) -> Stage:
        samples = self._interleave(self._contenders(chosen, runs), base)
        seconds = {kernel: median(values) for kernel, values in samples.items()}
        best = min(seconds, key=seconds.__getitem__)
        loss = seconds[chosen] / seconds[best] - 1
        if loss > _DOUBTFUL:
            again = self._interleave({kernel: runs[kernel] for kernel in (chosen, best)}, base)
            seconds |= {kernel: median(values) for kernel, values in again.items()}
            loss = max(0.0, seconds[chosen] / seconds[best] - 1)
        return Stage(name, chosen, best, loss, loss * seconds[best], seconds)

    def _contenders(self, chosen: str, runs: Mapping[str, Call]) -> dict[str, Call]:
        """Those that are not hopeless; also warms everything up."""
        first = {name: min(_sample(run, 1), _sample(run, 1)) for name, run in runs.items()}
        limit = _HOPELESS * min(first.values())
        return {name: run for name, run in runs.items() if name == chosen or first[name] <= limit}

    def _interleave(self, runs: Mapping[str, Call], base: Call | None) -> Samples:
        """Rounds of samples, less those of `base` in the same round."""
        repeats = {
            name: max(1, math.ceil(self._sample_seconds / max(_sample(run, 1), 1e-6))) for name, run in runs.items()
        }
        samples: Samples = {name: [] for name in runs}
        for _ in range(self._rounds):
            spent = _sample(base, max(repeats.values())) if base else 0.0
            for name, run in runs.items():
                samples[name].append(max(_sample(run, repeats[name]) - spent, 1e-9))
        return samples
