"""`python -m benchmarks.choice`: what the plan's choice of kernels loses against trying them all, on random layers."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.draw import draw
from benchmarks.options import positive, positive_number
from benchmarks.problem import DTYPES
from benchmarks.process import SMALL_PAGES, Worker, WorkerError
from benchmarks.stage_timer import Stage

EXIT_OK, EXIT_MISSED = 0, 1
_MEAN_GOAL, _WORST_GOAL = 0.05, 0.20
_LISTED = 10  # of the largest losses
_TIMEOUT = 600.0  # seconds for one layer


class Loss(NamedTuple):
    """A stage of a layer."""

    case: Case
    batch: int
    stage: Stage


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choice",
        description="Draws layers, times every kernel that supports each of their stages, and reports "
        "how much slower the plan's own choice is than the fastest. Exit code: 0, or 1 if the geometric mean of the "
        f"losses of a stage exceeds {_MEAN_GOAL:.0%} or one of them {_WORST_GOAL:.0%}, 2 for a wrong command line.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the layers")
    parser.add_argument("--count", type=positive, default=60, help="how many layers (default: 60)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=positive, default=1, help="of each call (default: 1); several by wall time")
    parser.add_argument("--rounds", type=positive, default=7, help="interleaved (default: 7)")
    parser.add_argument("--sample-ms", type=positive_number, default=20.0, help="of a sample (default: 20)")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="kernels to leave out, like '*_generic'"
    )
    parser.add_argument("--dump", type=pathlib.Path, metavar="FILE", help="write each time as a line of JSON")
    return parser


def _lines(loss: Loss) -> list[dict[str, Any]]:
    """The times of a stage, one line a kernel."""
    common = {"shape": loss.case.spec(), "batch": loss.batch, "stage": loss.stage.name}
    return [
        {**common, "kernel": kernel, "ms": seconds * 1e3, "chosen": kernel == loss.stage.chosen}
        for kernel, seconds in loss.stage.seconds.items()
    ]


def summarize(losses: Sequence[Loss]) -> dict[str, tuple[int, float, float]]:
    """Of each stage: how many layers, the geometric mean of their losses, the worst."""
    stages: dict[str, list[float]] = {}
    for loss in losses:
        stages.setdefault(loss.stage.name, []).append(loss.stage.loss)
    return {
        name: (len(values), math.exp(sum(math.log1p(value) for value in values) / len(values)) - 1, max(values))
        for name, values in stages.items()
    }


def _tables(losses: Sequence[Loss]) -> list[Table]:
    worst = Table(box=box.SIMPLE_HEAD, title="the largest losses")
    for heading in ("stage", "batch", "layer", "chosen", "best", "chosen ms", "best ms", "loss"):
        worst.add_column(heading, overflow="fold")
    for case, batch, stage in sorted(losses, key=lambda loss: -loss.stage.loss)[:_LISTED]:
        times = [f"{stage.seconds[kernel] * 1e3:.3f}" for kernel in (stage.chosen, stage.best)]
        worst.add_row(stage.name, str(batch), case.spec(), stage.chosen, stage.best, *times, f"{stage.loss:.1%}")
    summary = Table(box=box.SIMPLE_HEAD, title=f"goal: geo-mean {_MEAN_GOAL:.0%}, worst {_WORST_GOAL:.0%} at most")
    for heading in ("stage", "layers", "geo-mean loss", "worst loss"):
        summary.add_column(heading, justify="right")
    for name, (count, mean, largest) in summarize(losses).items():
        summary.add_row(name, str(count), f"{mean:.1%}", f"{largest:.1%}")
    return [worst, summary]


def _measure(options: argparse.Namespace, console: Console) -> list[Loss]:
    drawn = draw(options.seed, options.count)
    losses: list[Loss] = []
    with tempfile.TemporaryDirectory() as folder:
        setup = (options.rounds, options.sample_ms / 1e3, options.exclude, options.threads)
        log = pathlib.Path(folder) / "log"
        worker = Worker("benchmarks.stage_timer:StageTimer", setup, log, _TIMEOUT, fresh=SMALL_PAGES)
        worker.wait()
        for case, batch in track(drawn, "layers", console=console, transient=True):
            found = [Loss(case, batch, stage) for stage in worker.call("measure", case, batch, options.dtype)]
            losses += found
            if options.dump:
                with options.dump.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for loss in found for line in _lines(loss))
        worker.close()
    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    errors = Console(stderr=True)
    if options.dump:
        options.dump.write_text("", encoding="utf-8")
    try:
        losses = _measure(options, errors)
    except WorkerError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_MISSED
    Console(width=None if sys.stdout.isatty() else 200).print(*_tables(losses))
    goals = [mean <= _MEAN_GOAL and worst <= _WORST_GOAL for _, mean, worst in summarize(losses).values()]
    return EXIT_OK if all(goals) else EXIT_MISSED


if __name__ == "__main__":
    sys.exit(main())
