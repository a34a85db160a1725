"""`python -m benchmarks.gpu`: our CUDA kernels beside torch and cuDNN, layer by layer, where there is no TensorFlow."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cases import read_suite, suites
from benchmarks.implementations import INFERENCE, TRAIN_FORWARD, TRAIN_STEP
from benchmarks.options import positive
from benchmarks.problem import Problem
from benchmarks.roofline import traffic
from benchmarks.statistics import median

EXIT_OK, EXIT_WRONG, EXIT_NOT_HERE = 0, 1, 2
MODES = (INFERENCE, TRAIN_FORWARD, TRAIN_STEP)
DTYPES = ("float16", "bfloat16", "float32")
_ERROR = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-3}  # of an output, as a whole


class Row(NamedTuple):
    """A layer: seconds of each implementation, the least that memory and arithmetic allow, and our error."""

    problem: Problem
    seconds: dict[str, float]
    bound: float
    kernels: str
    error: float

    @property
    def wrong(self) -> bool:
        return not self.error <= _ERROR[self.problem.dtype]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Times the layers of a network on this machine's GPU, by torch's events, inputs rotated beyond its "
        "caches: ours, torch's convolution + batch norm + activation (channels_last), and cuDNN's convolution alone. "
        "Exit code: 0; 1 if an output of ours is wrong; 2 without torch, a GPU or the CUDA kernels.",
    )
    parser.add_argument("--suite", choices=suites(), default="resnet50")
    parser.add_argument("--batch", type=positive, nargs="+", default=[32, 256])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--rounds", type=positive, default=7, help="interleaved (default: 7)")
    parser.add_argument("--only", metavar="WORD", help="layers whose name holds it")
    parser.add_argument("--tf32", action="store_true", help="let torch round float32 to TF32")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all numbers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console, errors = Console(width=None if sys.stdout.isatty() else 160), Console(stderr=True)
    missing = _missing()
    if missing:
        errors.print(f"error: {missing}", style="red", highlight=False)
        return EXIT_NOT_HERE
    tables = [
        _table(options, batch, dtype, mode, console, errors)
        for dtype in options.dtype
        for batch in options.batch
        for mode in options.mode
    ]
    if options.json:
        options.json.write_text(json.dumps({"device": _device(), "tables": tables}, indent=1))
    return EXIT_WRONG if any(row["wrong"] for table in tables for row in table["rows"]) else EXIT_OK


def _missing() -> str:
    """What this machine lacks; empty: nothing."""
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("fusedconvbn._load").cuda()
    except ImportError as error:
        return str(error)
    return "" if torch.cuda.is_available() else "torch finds no GPU here"


def _device() -> dict[str, str]:
    import torch

    cudnn = torch.backends.cudnn.version()
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cudnn": str(cudnn),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _table(
    options: Any, batch: int, dtype: str, mode: str, console: Console, errors: Console
) -> dict[str, Any]:  # fmt: skip
    """Measures and prints one."""
    from benchmarks import gpu_layers

    gpu_layers.torch.backends.cudnn.benchmark = True
    gpu_layers.torch.backends.cudnn.allow_tf32 = gpu_layers.torch.backends.cuda.matmul.allow_tf32 = options.tf32
    bandwidth, flops = gpu_layers.limits(dtype)
    cases = [case for case in read_suite(options.suite) if (options.only or "") in case.name]
    rows = []
    for case in track(cases, f"{dtype}, batch {batch}, {mode}", console=errors, transient=True):
        problem = Problem(gpu_layers.symmetric(case), batch, dtype, mode, training=mode != INFERENCE)
        bound = max(sum(traffic(problem)) / bandwidth, problem.flops / flops)
        rows.append(_measure(problem, bound, options.rounds))
        gpu_layers.torch.cuda.empty_cache()
    _print(console, f"{options.suite}, {dtype}, batch {batch}, {mode}", rows)
    console.print(f"copy {bandwidth / 1e12:.2f} TB/s, product {flops / 1e12:.0f} TFLOP/s, this run")
    return {
        "dtype": dtype, "batch": batch, "mode": mode, "bandwidth": bandwidth, "flops": flops,
        "rows": [
            {
                "layer": row.problem.name, "times": row.problem.times, "seconds": row.seconds, "bound": row.bound,
                "kernels": row.kernels, "error": row.error, "wrong": row.wrong,
            }
            for row in rows
        ],
    }  # fmt: skip


def _measure(problem: Problem, bound: float, rounds: int) -> Row:
    """Medians of interleaved samples."""
    from benchmarks import gpu_layers

    sets = gpu_layers.sets_of(problem)
    calls = {name: make(problem, sets) for name, make in gpu_layers.IMPLEMENTATIONS.items()}
    ours = calls["fusedconvbn"]
    error = gpu_layers.error_of(problem, sets, ours)
    timers = {name: gpu_layers.Timer(call, len(sets)) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer.sample())
    return Row(problem, {name: median(times) for name, times in samples.items()}, bound, ours.plan.gpu, error)


def _print(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for column in ("layer", "x", "ours us", "torch us", "conv us", "torch/ours", "ours/conv", "of limit", "kernels"):
        table.add_column(column, justify="left" if column in ("layer", "kernels") else "right", no_wrap=True)
    for row in rows:
        table.add_row(row.problem.name, str(row.problem.times), *_cells(row.seconds, row.bound), row.kernels)
        if row.wrong:
            console.print(f"{row.problem.name}: WRONG, relative error {row.error:.3g}", style="red")
    total = {name: sum(row.problem.times * row.seconds[name] for row in rows) for name in rows[0].seconds}
    table.add_row("all", "", *_cells(total, sum(row.problem.times * row.bound for row in rows)), "")
    console.print(table)


def _cells(seconds: dict[str, float], bound: float) -> list[str]:
    ours, peer, convolution = (seconds[name] for name in ("fusedconvbn", "torch", "conv"))
    return [
        *(f"{1e6 * time:.1f}" for time in (ours, peer, convolution)),
        f"{peer / ours:.2f}", f"{ours / convolution:.2f}", f"{bound / ours:.0%}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
