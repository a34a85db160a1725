"""`python -m benchmarks.folding`: fusedconvbn.fold beside other tools, on the same frozen graphs.

Prints tables in Markdown. The models are those of the tests (tests/fold_models.py): with random weights and statistics
of their own, on small images; so are the small graphs (tests/fold_frozen.py). What the tools need is installed by
`pip install -e '.[bench,peers,test]' tf2onnx onnxsim`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks import machine
from benchmarks.folding_speed import speed_tables
from benchmarks.folding_tables import case_tables, model_table
from benchmarks.folding_tools import OURS, PEERS, Frozen, Tool
from benchmarks.options import positive
from benchmarks.paired import pair_table
from benchmarks.process import Worker, WorkerError, library_environment

EXIT_OK, EXIT_WRONG = 0, 1
MODELS = ("ResNet50", "MobileNetV2", "EfficientNetB0", "DenseNet121", "Xception", "InceptionV3", "NASNetMobile")
_DEFAULT_MODELS = MODELS[:3]
_TIMEOUT = 900.0  # seconds that one step may take
_EXTRA_PACKAGES = ("tf2onnx", "onnxsim", "onnx", "protobuf")
CRASHED = "crashed"


def _parser() -> argparse.ArgumentParser:
    peers = [tool.name for tool in PEERS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.folding",
        description="Folds batch norms with fusedconvbn and other tools, counts those that are left, compares what the "
        "results compute with the original, and times them. Exit code: 0, or 1 if fusedconvbn failed, 2 for a wrong "
        "command line.",
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, help=f"(default: {' '.join(_DEFAULT_MODELS)})")
    parser.add_argument("--case", nargs="*", metavar="NAME", help="small graphs of the tests (no name: all of them)")
    parser.add_argument("--peer", nargs="*", choices=peers, default=peers, help="(default: all; no name: none)")
    parser.add_argument("--speed", action="store_true", help="instead: ResNet-50 as a SavedModel, before and after")
    parser.add_argument("--image", type=positive, default=224, help="with --speed: pixels (default: 224)")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 16], help="with --speed (default: 1 16)")
    parser.add_argument("--rounds", type=positive, default=15, help="with --speed: interleaved (default: 15)")
    parser.add_argument("--threads", nargs="+", type=positive, default=[machine.cores()], help="(default: all cores)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything measured")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: its folder must exist. Received: {options.json}")
    errors = Console(stderr=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = _speed(options, folder) if options.speed else _measure(parser, options, folder, errors)
    except WorkerError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_WRONG
    report["machine"] = machine.describe()
    report["machine"]["versions"].update(_versions())
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(_text(report)))
    return EXIT_OK if _succeeded(report) else EXIT_WRONG


def _versions() -> dict[str, str]:
    found = {}
    for name in _EXTRA_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _text(report: dict[str, Any]) -> Iterable[str]:
    if "speed" in report:
        yield from pair_table(report["speed"])
    if report.get("models"):
        yield from model_table(report["models"])
    if report.get("cases"):
        yield from case_tables(report["cases"])
    for name, packages in report.get("not_installed", {}).items():
        yield f"{name} was not measured. Not installed: {', '.join(packages)}."
    yield machine.in_a_line(report["machine"])


def _succeeded(report: dict[str, Any]) -> bool:
    rows = [*report.get("models", []), *report.get("cases", [])]
    return all(row["results"][OURS.name]["status"] == "ok" for row in rows)


def _speed(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {"speed": speed_tables(folder, options.image, options.batch, options.rounds, options.threads, _TIMEOUT)}


def _measure(
    parser: argparse.ArgumentParser, options: argparse.Namespace, folder: str, console: Console
) -> dict[str, Any]:
    """Every tool on every graph: tool by tool, each in one process as long as it lives."""
    peers = [tool for tool in PEERS if tool.name in options.peer]
    missing = {tool.name: tool.missing() for tool in peers if tool.missing()}
    tools = [OURS, *(tool for tool in peers if tool.name not in missing)]
    models, cases = _make(parser, options, folder, console)
    report: dict[str, Any] = {"models": [_row(each) for each in models], "cases": [_row(each) for each in cases]}
    for tool in tools:
        process = _Process(tool, options.threads[0], folder)
        for frozen, row in track(
            list(zip([*models, *cases], [*report["models"], *report["cases"]])), tool.name, console=console,
            transient=True,
        ):  # fmt: skip
            row["results"][tool.name] = process.measure(frozen, timed=frozen in models)
        process.close()
    report["not_installed"] = missing
    return report


def _make(
    parser: argparse.ArgumentParser, options: argparse.Namespace, folder: str, console: Console
) -> tuple[list[Frozen], list[Frozen]]:
    """The models and the small graphs."""
    maker = _worker("Maker", (folder,), pathlib.Path(folder) / "maker.log")
    known = maker.call("cases")
    if unknown := sorted(set(options.case or []) - set(known)):
        parser.error(f"--case: must be of {', '.join(known)}. Received: {', '.join(unknown)}")
    names = known if options.case == [] else options.case or []
    chosen = options.model or (list(_DEFAULT_MODELS) if options.case is None else [])
    models = [maker.call("model", name) for name in track(chosen, "models", console=console, transient=True)]
    cases = [maker.call("case", name) for name in track(names, "small graphs", console=console, transient=True)]
    maker.close()
    return models, cases


def _row(frozen: Frozen) -> dict[str, Any]:
    return {"name": frozen.name, "batch_norms": frozen.batch_norms, "foldable": frozen.foldable, "results": {}}


def _worker(factory: str, arguments: tuple, log: pathlib.Path, fresh: dict[str, str] | None = None) -> Worker:
    worker = Worker(f"benchmarks.folding_worker:{factory}", arguments, log, _TIMEOUT, fresh)
    worker.wait()
    return worker


class _Process:
    """A tool in a process, and in another one after it crashed."""

    def __init__(self, tool: Tool, threads: int, folder: str):
        self._arguments = (tool.name, threads)
        self._log = pathlib.Path(folder) / f"{tool.name}.log"
        self._fresh = library_environment(threads) if tool.packages else None
        self._worker: Worker | None = None

    def measure(self, frozen: Frozen, timed: bool) -> dict[str, Any]:
        if self._worker is None:
            self._worker = _worker("Measured", self._arguments, self._log, self._fresh)
        try:
            return self._worker.call("measure", frozen, timed)
        except WorkerError as error:
            if error.dead:
                self._worker = None
            return {"status": CRASHED, "detail": str(error)}

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
