"""The guard itself: each way in which a kernel may touch memory that is not its own, by a core that does so."""

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import Case
from guarded import Guarded, GuardedCore, guarded
from raw_problem import Problem


def poke(array: np.ndarray, offset: int) -> None:
    """Writes a byte `offset` bytes behind the beginning of the array."""
    ctypes.memset(array.ctypes.data + offset, 0x55, 1)


class Core:
    """A core whose forward pass does what it is told to; it takes 2 arguments and gives RESULTS["forward"] results."""

    def __init__(self, act):
        self.forward = lambda plan, *arrays: act(*arrays)


class Plan:
    workspace_bytes = 128


def run(act, offset=0) -> list[np.ndarray]:
    arrays = [np.full((3, 5), float(i), np.float32) for i in range(8)]
    GuardedCore(Core(act), offset).forward(Plan, arrays[0], None, *arrays[2:], None)
    return arrays


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda *a: poke(a[3], -1), "1 bytes before array 3"),
        (lambda *a: poke(a[3], a[3].nbytes), "1 bytes behind array 3"),
        (lambda *a: poke(a[0], a[0].nbytes), "1 bytes behind array 0"),
        (lambda *a: poke(a[0], 4), "array 0 of forward was written"),
        (lambda *a: poke(a[-1], -1), "1 bytes before the workspace"),
        (lambda *a: poke(a[-1], 128), "1 bytes behind the workspace"),
    ],
)
def test_what_is_written_astray_shows(act, message):
    with pytest.raises(AssertionError, match=message):
        run(act)


def test_what_is_not_written_is_nan():
    def act(*arrays):
        assert np.isnan(arrays[-1].view(np.float32)).all()
        arrays[3][1:] = 7

    results = run(act)
    assert np.isnan(results[3][0]).all()
    assert (results[3][1:] == 7).all()
    assert np.isnan(results[4]).all()


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_where_arrays_begin(offset):
    def act(*arrays):
        assert {a.ctypes.data % 64 for a in arrays[:-1] if a is not None} == {offset * 4}
        assert arrays[-1].ctypes.data % 64 == 0
        assert (arrays[0] == 0).all()

    run(act, offset)


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16"])
def test_guards_are_nan(dtype):
    memory = Guarded(np.ones(4, Case(dtype=dtype).numpy_dtype), 0, True)
    assert np.isnan(memory.array.astype(np.float64)).all()


def test_results_within_are_those_without():
    problem = Problem(Case(training=True))

    class Counted(Guarded):
        made = 0

        def __init__(self, *arguments):
            super().__init__(*arguments)
            Counted.made += 1

    with guarded(3, Counted):
        within = problem.run_forward()
    assert Counted.made > len(within)
    for inside, outside in zip(within, problem.run_forward(), strict=True):
        np.testing.assert_array_equal(inside, outside)


@pytest.mark.parametrize(("memory", "element"), [("BeforePage", 100), ("BehindPage", -1)])
def test_reading_beyond_a_page_is_a_fault(memory, element):
    script = f"""
import ctypes, guarded, numpy as np
array = guarded.{memory}(np.zeros(100, np.float32), 0, True).array
print(*array[[0, 99]], flush=True)
ctypes.string_at(array.ctypes.data + 4 * {element}, 1)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "nan nan\n"), done.stderr
