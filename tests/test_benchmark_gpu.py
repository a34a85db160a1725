"""`python -m benchmarks.gpu` without a GPU: what it says, its table, and its layers' bookkeeping."""

from __future__ import annotations

import io
import pathlib
import sys

import pytest
from rich.console import Console

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks is no part of the installed package

from benchmarks import gpu
from benchmarks.cases import parse_shape
from benchmarks.implementations import INFERENCE
from benchmarks.problem import Problem


@pytest.fixture
def problem() -> Problem:
    return Problem(parse_shape("6x6x8 3x3x16 activation=relu", "one", 3), 2, "float16", INFERENCE, training=False)


def row(problem: Problem, ours: float, error: float = 1e-4) -> gpu.Row:
    return gpu.Row(problem, {"fusedconvbn": ours, "torch": 3e-6, "conv": 1e-6}, 1e-6, "tensor cores", error)


def test_without_torch_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpu.main(["--batch", "2"]) == gpu.EXIT_NOT_HERE
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--dtype", "float64"], ["--suite", "alexnet"]])
def test_bad_command_lines(arguments):
    with pytest.raises(SystemExit) as error:
        gpu.main(arguments)
    assert error.value.code == 2


def test_the_sum_counts_a_layer_as_often_as_the_network_holds_it(problem):
    once = Problem(parse_shape("6x6x8 1x1x8", "two"), 2, "float16", INFERENCE, training=False)
    console = Console(file=io.StringIO(), width=160)
    gpu._print(console, "title", [row(problem, 2e-6), row(once, 4e-6)])
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["one", "3", "2.0", "3.0", "1.0", "1.50", "2.00", "50%", "tensor", "cores"] in lines
    assert ["all", "10.0", "12.0", "4.0", "1.20", "2.50", "40%"] in lines


@pytest.mark.parametrize(("error", "wrong"), [(1e-4, False), (1e-2, True), (float("nan"), True)])
def test_a_wrong_output(problem, error, wrong):
    assert row(problem, 1e-6, error).wrong == wrong
