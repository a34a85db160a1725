"""Makes the frozen graphs of the tests, and measures one tool on them, in a process of its own."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.folding_graphs import batch_norms, of_tensorflow
from benchmarks.folding_tools import TOOLS, Arrays, Frozen, read, start
from benchmarks.statistics import median

TOLERANCE = 1e-3  # of an output's maximum
_ROUNDS = 15
_AGAIN_BELOW = 10.0  # seconds: what takes less is converted twice, and the faster time counts
_TESTS = str(pathlib.Path(__file__).parent.parent / "tests")
OK, WRONG, BROKEN, REFUSED = "ok", "wrong", "does not run", "refused"


def tests_on_path() -> None:
    """Lets the modules of the tests be imported: they make the models."""
    if _TESTS not in sys.path:
        sys.path.insert(0, _TESTS)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest value expected."""
    if found.shape != expected.shape:
        return float("inf")
    error = float(np.max(np.abs(found - expected)) / max(float(np.max(np.abs(expected))), 1e-30))
    return error if np.isfinite(error) else float("inf")


class Maker:
    """Writes frozen graphs."""

    def __init__(self, folder: str):
        tests_on_path()
        self._folder = pathlib.Path(folder)

    def cases(self) -> list[str]:
        from fold_frozen import FOLD_FROZEN

        return list(FOLD_FROZEN)

    def case(self, name: str) -> Frozen:
        from fold_frozen import FOLD_FROZEN

        return _frozen(name, FOLD_FROZEN[name](self._new(name)))

    def model(self, name: str) -> Frozen:
        import keras
        from fold_models import application, write_forms

        keras.backend.clear_session()
        frozen = _frozen(name, write_forms(application(name), self._new(name), forms=["pb"])["pb"])
        found = sum(len(batch_norms(graph)) for graph in of_tensorflow(read(frozen.path)))
        return dataclasses.replace(frozen, others=found - frozen.batch_norms)

    def _new(self, name: str) -> pathlib.Path:
        folder = self._folder / name
        folder.mkdir()
        return folder


def _frozen(name: str, file: Any) -> Frozen:
    fixed = tuple(file.constants)
    return Frozen(name, file.path, file.feeds, fixed, file.expected, file.batch_norms, file.foldable)


class Measured:
    """One tool."""

    def __init__(self, name: str, threads: int):
        self._tool, self._threads = TOOLS[name], threads

    def measure(self, frozen: Frozen, timed: bool) -> dict[str, Any]:
        """What came of a graph: `status`, `error` or `detail`, `left`; with `timed`, milliseconds of one image too."""
        try:
            converted, seconds = self._convert(frozen, timed)
        except Exception as error:
            return {"status": REFUSED, "detail": brief(error)}
        found = {"seconds": seconds, "left": _left(converted.graphs, frozen)}
        try:
            run, loaded = converted.load(self._threads)
            computed = run(frozen.feeds)
        except Exception as error:
            return {**found, "status": BROKEN, "detail": brief(error)}
        found["left_once_loaded"] = loaded if isinstance(loaded, int) or loaded is None else _left(loaded, frozen)
        found["error"] = max(distance(computed[name], value) for name, value in frozen.expected.items())
        found["status"] = OK if found["error"] <= TOLERANCE else WRONG
        if timed and found["status"] == OK:
            original = start(read(frozen.path), list(frozen.expected), self._threads)
            found["original_ms"], found["ms"] = _milliseconds([original, run], _one(frozen))
        return found

    def _convert(self, frozen: Frozen, timed: bool) -> tuple[Any, float]:
        seconds: list[float] = []
        while not seconds or (timed and len(seconds) < 2 and seconds[0] < _AGAIN_BELOW):
            began = time.perf_counter()
            converted = self._tool.convert(frozen)
            seconds.append(time.perf_counter() - began)
        return converted, min(seconds)


def _left(graphs: list[Any], frozen: Frozen) -> int:
    """The batch norms in these graphs; no more than the model has, where one has two branches or two layers."""
    found = sum(len(batch_norms(graph)) for graph in graphs)
    return min(max(found - frozen.others, 0), frozen.batch_norms)


def _one(frozen: Frozen) -> Arrays:
    return {name: value if name in frozen.fixed else value[:1] for name, value in frozen.feeds.items()}


def _milliseconds(runs: list[Callable[[Arrays], Arrays]], feeds: Arrays) -> list[float]:
    """The median of each, in interleaved rounds."""
    samples: list[list[float]] = [[] for _ in runs]
    for place in range(-2, _ROUNDS):
        for run, taken in zip(runs, samples):
            began = time.perf_counter()
            run(feeds)
            if place >= 0:
                taken.append((time.perf_counter() - began) * 1e3)
    return [median(taken) for taken in samples]


def brief(error: Exception) -> str:
    """The error's type, and the beginning of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
