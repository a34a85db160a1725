"""`python -m benchmarks.run`. docs/benchmarks.md says how the numbers are made."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks.options import Run, described, parse
from benchmarks.process import WorkerError
from benchmarks.report import make_report, problems_found, succeeded, tables, too_slow
from benchmarks.session import Row, measure, steps
from fusedconvbn import _load

EXIT_OK, EXIT_WRONG, EXIT_USAGE = 0, 1, 2
_BUSY = 0.5  # load average a core from which timings are not to be trusted


def _warn_if_busy(console: Console, found: dict[str, Any]) -> None:
    load = found["load_average"]
    if load > _BUSY * found["cores"]:
        console.print(f"[yellow]warning: the load average is {load:.1f}: something else runs here, and timings suffer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    run = parse(arguments)
    errors = Console(stderr=True)
    if not _load.LIBRARY.exists():
        errors.print("error: this clone is not built: run `make build`", style="red", highlight=False)
        return EXIT_WRONG
    found = machine.describe()
    _warn_if_busy(errors, found)
    try:
        rows = _measure(run, errors)
    except WorkerError as error:
        _print_errors(errors, [f"error: {error}"])
        return EXIT_WRONG
    square = f"{run.settings.peak_size}x{run.settings.peak_size} {run.options.dtype} matrices"
    peak_what = f"the fastest tf.matmul of {square}, same threads and device, this run"
    report = make_report(rows, run.implementations, described(run.options, run.settings), found, peak_what)
    return _deliver(report, run, errors)


def _measure(run: Run, console: Console) -> list[Row]:
    """measure() under a progress bar."""
    work = (run.problems, run.implementations, run.settings)
    doing_column = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), doing_column)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=steps(*work))
        return measure(*work, lambda doing: progress.update(task, advance=1, description=doing))


def _deliver(report: dict[str, Any], run: Run, errors: Console) -> int:
    """Prints and writes the report."""
    options = run.options
    console = Console(width=None if sys.stdout.isatty() else 200)  # a file wants whole lines
    console.print(tables(report))
    slow = too_slow(report, options.fail_below) if options.fail_below is not None else []
    _print_errors(errors, [*problems_found(report), *slow])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        from benchmarks.plot import save_plot

        save_plot(report, options.plot)
    return EXIT_OK if succeeded(report) and not slow else EXIT_WRONG


def _print_errors(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
