"""Checks, then times: every implementation in a process of its own, only one of them busy at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.correctness import mismatch
from benchmarks.hardware import Limits, compiler
from benchmarks.implementations import Implementation
from benchmarks.problem import AnyProblem, NetworkProblem
from benchmarks.process import Worker, WorkerError, library_environment
from benchmarks.roofline import sizes

_HARDWARE_SECONDS = 0.002  # of a sample of what the machine can do: short, for the best of many
_PAUSE_SECONDS = 0.05  # before a sample: an engine's threads look for more work for a while, on cores that it needs
OK, WRONG, FAILED = "ok", "wrong", "failed"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure."""

    threads: int
    device: str
    rounds: int
    sample_seconds: float  # a sample repeats its call until it takes about this long
    peak_size: int  # of the matrices whose product is the peak
    clock: str  # of measured.CLOCKS
    timeout: float  # seconds that a worker may take for one answer


@dataclasses.dataclass
class Outcome:
    """What became of one implementation of one problem; only a right one has samples."""

    status: str
    detail: str = ""  # why it is not ok
    samples: list[float] = dataclasses.field(default_factory=list)  # seconds a layer, one a round
    memory: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Row:
    """One problem with the outcome of each implementation, by name."""

    problem: AnyProblem
    outcomes: dict[str, Outcome]
    device: dict[str, str]  # where TensorFlow ran
    peak_flops: float  # a second, measured just before: of the limits, else of a product of matrices
    limits: Limits | None = None  # of the processor; None on a GPU and without a C compiler


def measure(
    problems: Sequence[AnyProblem],
    implementations: Sequence[Implementation],
    settings: Settings,
    advance: Callable[[str], None] = lambda doing: None,
) -> list[Row]:
    """Measures each problem; calls advance() steps() times. WorkerError: no reference, so nothing can be checked."""
    rows = []
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hardware = stack.enter_context(_hardware(settings, folder))
        for problem in problems:
            with tempfile.TemporaryDirectory(dir=folder) as own:
                rows.append(_measure_one(problem, implementations, settings, hardware, pathlib.Path(own), advance))
    return rows


@contextlib.contextmanager
def _hardware(settings: Settings, folder: pathlib.Path) -> Iterator[Worker | None]:
    """Measures the machine; None where nothing compiles its loops."""
    if compiler() is None or settings.device == "gpu":
        yield None
        return
    setup = (settings.threads, _HARDWARE_SECONDS)
    with contextlib.closing(
        Worker("benchmarks.hardware:Hardware", setup, folder / "hardware.log", settings.timeout, fresh={})
    ) as worker:
        worker.wait()
        yield worker


def steps(problems: Sequence[AnyProblem], implementations: Sequence[Implementation], settings: Settings) -> int:
    """How often measure() calls advance()."""
    return len(problems) * (1 + len(implementations) + settings.rounds)


def _measure_one(
    problem: AnyProblem,
    implementations: Sequence[Implementation],
    settings: Settings,
    hardware: Worker | None,
    folder: pathlib.Path,
    advance: Callable[[str], None],
) -> Row:
    def start(name: str, factory: str, *arguments: Any, fresh: dict[str, str] | None = None) -> Worker:
        setup = (settings.threads, settings.device, *arguments)
        return Worker(factory, setup, folder / f"{name}.log", settings.timeout, fresh)

    def start_measured(each: Implementation) -> Worker:
        if each.worker:
            return start(each.name, each.worker, each, fresh=library_environment(settings.threads))
        return start(each.name, stock_factory, each)

    reference_factory, stock_factory = _factories(problem)
    advance(f"{problem.name}: reference")
    with contextlib.closing(start("reference", reference_factory)) as reference:
        reference.wait()
        reference.call("expect", problem, folder / "expected")
        device = reference.call("describe")
        limits = (
            hardware.call("measure", problem.dtype, sizes(problem)) if hardware and device["device"] == "cpu" else None
        )
        peak = limits.flops if limits else reference.call("peak_flops", problem.dtype, settings.peak_size)
    with contextlib.ExitStack() as stack:
        workers, outcomes = {}, {}
        for each in implementations:
            advance(f"{problem.name}: checking {each.name}")
            worker = workers[each.name] = stack.enter_context(contextlib.closing(start_measured(each)))
            outcomes[each.name] = _check(problem, worker, folder / "expected", folder / each.name)
        _time(problem, workers, outcomes, settings, advance)
    return Row(problem, outcomes, device, peak, limits)


def _factories(problem: AnyProblem) -> tuple[str, str]:
    """What says what is right, and what is measured."""
    if isinstance(problem, NetworkProblem):
        return "benchmarks.network_workload:NetworkReference", "benchmarks.network_workload:MeasuredNetwork"
    return "benchmarks.workload:Reference", "benchmarks.workload:MeasuredLayer"


def _check(problem: AnyProblem, worker: Worker, expected: pathlib.Path, results: pathlib.Path) -> Outcome:
    """Runs the implementation once and compares what it returns with the reference."""
    try:
        worker.wait()
        names = worker.call("prepare", problem, expected, results)
        outcome = Outcome(OK, memory=worker.call("memory_of_a_call"))
    except WorkerError as error:
        return Outcome(FAILED, str(error))
    for name in names:
        actual, right = (np.load(folder / f"{name}.npy", mmap_mode="r") for folder in (results, expected))
        wrong = mismatch(problem, name, actual, right)
        if wrong:
            return Outcome(WRONG, wrong)
    shutil.rmtree(results)
    return outcome


def _time(
    problem: AnyProblem,
    workers: dict[str, Worker],
    outcomes: dict[str, Outcome],
    settings: Settings,
    advance: Callable[[str], None],
) -> None:
    """Interleaved rounds, A B C A B C: a drift of the machine's speed meets everybody alike."""
    right = {name: worker for name, worker in workers.items() if outcomes[name].status == OK}
    repeats = {}
    for name, worker in right.items():
        with _failure_in(outcomes[name]):
            seconds = worker.call("sample", 1, settings.clock) * problem.copies
            repeats[name] = max(1, math.ceil(settings.sample_seconds / seconds))
    for round_number in range(settings.rounds):
        advance(f"{problem.name}: round {round_number + 1}")
        for name, count in repeats.items():
            if outcomes[name].status == OK:
                time.sleep(_PAUSE_SECONDS)
                with _failure_in(outcomes[name]):
                    outcomes[name].samples.append(right[name].call("sample", count, settings.clock))


@contextlib.contextmanager
def _failure_in(outcome: Outcome) -> Iterator[None]:
    """A WorkerError inside becomes the outcome, in place of samples."""
    try:
        yield
    except WorkerError as error:
        outcome.status, outcome.detail, outcome.samples = FAILED, str(error), []
