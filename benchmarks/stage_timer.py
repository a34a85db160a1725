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
from benchmarks.kernel_calls import Call, KernelCalls
from benchmarks.problem import Problem
from benchmarks.statistics import median
from fusedconvbn import raw

_REFERENCE = "*_reference"  # naive loops, the oracle of the tests
_HOPELESS = 3.0  # times as slow as the fastest in its first call: not timed again
_DOUBTFUL = 0.02  # a loss beyond this is measured once more: the least of several noisy times is too low


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of one problem: what each kernel takes, and what the choice loses against the best of them."""

    name: str  # inference, train-forward, dgrad, wgrad, train-step
    chosen: str
    best: str
    loss: float  # time of the chosen kernel / time of the best one - 1
    lost_seconds: float
    seconds: dict[str, float]  # by kernel


Samples = dict[str, list[float]]


def _name(forward: Any, backward: Any) -> str:
    return " + ".join([*forward.kernels, *backward.kernels])


def _both(forward: Call, backward: Call) -> Call:
    def call() -> None:
        forward()
        backward()

    return call


class StageTimer:
    """Interleaved medians of bare kernel calls.

    Of one thread the CPU time, so that other processes count little; of several the time that passes.
    """

    def __init__(self, rounds: int, sample_seconds: float, excluded: Iterable[str] = (), threads: int = 1):
        self._rounds, self._sample_seconds, self._threads = rounds, sample_seconds, threads
        patterns = [_REFERENCE, *excluded]
        usable = [row for row in raw.kernels() if row.available]
        self._rows = [row for row in usable if not any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]

    def measure(self, case: Case, batch: int, dtype: str) -> list[Stage]:
        """All stages of the layer, in inference and in training."""
        common = {"case": case, "batch": batch, "dtype": dtype}
        inference = Problem(**common, mode=INFERENCE, training=False)
        forward = Problem(**common, mode=TRAIN_FORWARD, training=True)
        step = Problem(**common, mode=TRAIN_STEP, training=True)
        return [*self._forward(inference), *self._forward(forward), *self._step(step)]

    def _sample(self, call: Call, repeats: int) -> float:
        """Seconds a call."""
        clock = time.thread_time if self._threads == 1 else time.perf_counter
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    def _plan(self, calls: KernelCalls, direction: str, kernel: str | None = None, saved: str = "conv") -> Any:
        return calls.plan(direction, kernel, saved, self._threads)

    def _plans(self, calls: KernelCalls, direction: str, stage: str, saved: str = "conv") -> dict[str, Any]:
        """A plan for each row of the stage that supports the problem."""
        plans = {}
        for row in self._rows:
            if row.stage == stage:
                try:
                    plans[row.name] = self._plan(calls, direction, row.name, saved)
                except ValueError:  # does not support it
                    continue
        return plans

    def _forward(self, problem: Problem) -> list[Stage]:
        """In training, of the rows that leave the same for backward as the chosen one: the step judges the others."""
        calls = KernelCalls(problem)
        chosen = self._plan(calls, "forward")
        plans = self._plans(calls, "forward", "forward")
        same = {name: plan for name, plan in plans.items() if plan.saved == chosen.saved}
        runs = {name: calls.forward(plan, calls.packed(plan)) for name, plan in same.items()}
        [name] = chosen.kernels
        return [self._stage(problem.mode, name, runs)] if name in runs else []

    def _step(self, problem: Problem) -> list[Stage]:
        """The stages of backward from a saved convolution, and the whole step."""
        calls = KernelCalls(problem)
        stages = self._stages_of_backward(calls)
        lost = {stage.chosen: stage.lost_seconds for stage in stages}
        return [*stages, self._whole(calls, lost)]

    def _stages_of_backward(self, calls: KernelCalls) -> list[Stage]:
        """Of each: the time with it less the time of the reduction alone."""
        plans = self._plans(calls, "forward", "forward").values()
        calls.forward(next(plan for plan in plans if plan.saved == "conv"))()
        reduction = self._staged(calls, "conv")
        base = calls.backward(reduction, "conv", needs_inputs=False, needs_filters=False)
        stages = []
        for stage, needs in (("dgrad", (True, False)), ("wgrad", (False, True))):
            [chosen] = [name for name in reduction.kernels if name.startswith(stage)]
            plans = self._plans(calls, "backward", stage)
            runs = {name: calls.backward(plan, "conv", *needs) for name, plan in plans.items()}
            if chosen in runs:
                stages.append(self._stage(stage, chosen, runs, base))
        return stages

    def _staged(self, calls: KernelCalls, saved: str) -> Any:
        """A plan of backward in stages, whatever the choice is: a reduction is forced."""
        return next(iter(self._plans(calls, "backward", "reduce", saved).values()))

    def _whole(self, calls: KernelCalls, lost: Mapping[str, float]) -> Stage:
        """Forward with each row, then backward in every way from what it leaves; `lost` by the choice in its stages."""
        runs = {}
        for forward in self._plans(calls, "forward", "forward").values():
            saved = forward.saved
            in_one = self._plans(calls, "backward", "backward", saved).values()
            for backward in (self._plan(calls, "backward", saved=saved), self._staged(calls, saved), *in_one):
                name = _name(forward, backward)
                runs[name] = _both(calls.forward(forward), calls.backward(backward, saved))
        forward = self._plan(calls, "forward")
        backward = self._plan(calls, "backward", saved=forward.saved)
        chosen = _name(forward, backward)
        if chosen not in runs:  # it is excluded
            runs[chosen] = _both(calls.forward(forward), calls.backward(backward, forward.saved))
        stage = self._stage(TRAIN_STEP, chosen, runs)
        lost_seconds = sum(lost.get(kernel, 0.0) for kernel in backward.kernels)
        least = min(stage.seconds[stage.best], stage.seconds[stage.chosen] - lost_seconds)
        loss = max(stage.loss, stage.seconds[stage.chosen] / least - 1 if lost_seconds else 0.0)
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
        first = {name: min(self._sample(run, 1), self._sample(run, 1)) for name, run in runs.items()}
        limit = _HOPELESS * min(first.values())
        return {name: run for name, run in runs.items() if name == chosen or first[name] <= limit}

    def _interleave(self, runs: Mapping[str, Call], base: Call | None) -> Samples:
        """Rounds of samples, less those of `base` in the same round."""
        repeats = {
            name: max(1, math.ceil(self._sample_seconds / max(self._sample(run, 1), 1e-6)))
            for name, run in runs.items()
        }
        samples: Samples = {name: [] for name in runs}
        for _ in range(self._rounds):
            spent = self._sample(base, max(repeats.values())) if base else 0.0
            for name, run in runs.items():
                samples[name].append(max(self._sample(run, repeats[name]) - spent, 1e-9))
        return samples
