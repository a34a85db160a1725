"""The command line: `fusedconvbn fold SRC DST`, `inspect SRC`, `info`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_FLAGS = {
    "source": "SRC", "destination": "DST", "inputs": "--inputs", "outputs": "--outputs", "values": "--set",
    "tags": "--tags", "to": "--to", "freeze": "--freeze", "tolerance": "--tolerance", "report": "--report",
}  # fmt: skip
"""What the arguments of `fold` and `inspect` are called here."""

_NODE = r"[\w.][\w./\\>-]*"
_SIZE = r"(?:\?|-1|\d+)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 for an error (on standard error), 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's own messages would drown the report
    try:
        return options.run(options)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        return _fail(error)


def _fail(error: Exception) -> int:
    print(f"fusedconvbn: {_in_flags(str(error))}", file=sys.stderr)
    return 1


def _in_flags(message: str) -> str:
    """What Python's interface says, with the words of the command line for its arguments."""
    names = "|".join(_FLAGS)
    message = message.replace("`verify` must be False", "--no-verify must be given")
    message = re.sub(rf"`({names})(?:\['(.*?)'\])?`", lambda m: f"{_FLAGS[m[1]]} {m[2] or ''}".rstrip(), message)
    message = re.sub(rf"Received: (?:{names}|verify)(?:\['.*?'\])?=", "Received: ", message)
    message = message.replace("overwrite=True", "--overwrite").replace("verify=False", "--no-verify")
    return re.sub(r"\bby inputs=", "by --inputs", message).replace("by verify=", "by verify= in Python")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusedconvbn", description="Convolution and batch normalization as one op.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fold = commands.add_parser(
        "fold",
        help="merge a model's batch norms into its convolutions",
        epilog="Lists of names go behind SRC and DST. Exit status: 0 where DST was written: verification found no "
        'difference ("ok"), or none on inputs that could not have shown every one ("inconclusive": compare on data of '
        "your own), or --no-verify left it out; 1 for an error, told on standard error; 2 for wrong usage.",
    )
    _add_source(fold)
    fold.add_argument(
        "destination",
        metavar="DST",
        help="what to write: of the kind of its suffix or else of SRC, unless --to says another",
    )
    fold.add_argument("--to", choices=("saved_model", "frozen", "checkpoint", "keras"), help="the kind to write")
    fold.add_argument("--freeze", action="store_true", help="write constants for variables, to a SavedModel")
    fold.add_argument("--overwrite", action="store_true", help="replace what is at DST, and at --report")
    fold.add_argument("--no-verify", action="store_true", help="do not run and compare the two models")
    fold.add_argument("--tolerance", type=float, metavar="X", help="of differences, relative to a tensor's maximum")
    fold.add_argument("--report", metavar="FILE.json", help="also write the report as JSON")
    fold.set_defaults(run=_fold)
    inspect = commands.add_parser(
        "inspect",
        help="say what a model's batch norms would fold into; nothing is written",
        epilog="Exit status: 0, 1 for an error, told on standard error, 2 for wrong usage.",
    )
    _add_source(inspect)
    inspect.add_argument("--report", metavar="FILE.json", help="also write the report as JSON")
    inspect.set_defaults(run=_inspect)
    info = commands.add_parser("info", help="say what is installed: versions, instruction sets, devices")
    info.set_defaults(run=_info)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=".keras, .h5, .pb, .pbtxt, SavedModel folder, checkpoint prefix")
    parser.add_argument(
        "--inputs",
        nargs="+",
        type=_input,
        metavar="NAME[:SHAPE]",
        help="tensors to feed, such as x:1,299,299,3 or x:?,8",
    )
    parser.add_argument("--outputs", nargs="+", metavar="NAME", help="tensors to compute")
    parser.add_argument(
        "--set", nargs="+", type=_value, default=[], metavar="NAME=VALUE", help="values of placeholders"
    )
    parser.add_argument("--tags", type=lambda text: text.split(","), metavar="TAG,...", help="of a SavedModel's graph")


def _input(text: str) -> tuple[str, tuple[int | None, ...] | None]:
    """A name, which may end with a port, and sizes between commas, unknown ones as question marks."""
    match = re.fullmatch(rf"({_NODE}(?::[1-9]\d*(?=:))?)(?::0)?(?::({_SIZE}(?:,{_SIZE})*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"NAME or NAME:SHAPE, such as x:1,299,299,3. Received: {text!r}")
    name, shape = match.groups()
    sizes = None if shape is None else tuple(None if s in ("?", "-1") else int(s) for s in shape.split(","))
    return name, sizes


def _value(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"NAME=VALUE, such as keep_prob=1. Received: {text!r}")
    try:
        return name, json.loads(value.lower())
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"a value that is true, false, a number or a list. Received: {text!r}"
        ) from error


def _ends(options: argparse.Namespace) -> dict[str, Any]:
    inputs = None if options.inputs is None else dict(options.inputs)
    outputs = None if options.outputs is None else [name for text in options.outputs for name in text.split(",")]
    return {"inputs": inputs, "outputs": outputs, "values": dict(options.set), "tags": options.tags}


def _fold(options: argparse.Namespace) -> int:
    import tensorflow as tf

    from fusedconvbn.folding.api import fold
    from fusedconvbn.folding.report_file import check_report
    from fusedconvbn.folding.verifying import VerificationError

    if options.report is not None:
        check_report(options.report, options.source, options.destination, overwrite=options.overwrite)
    try:
        with _progress():
            _, report = fold(
                options.source, options.destination, to=options.to, freeze=options.freeze, overwrite=options.overwrite,
                verify=not options.no_verify, tolerance=options.tolerance, **_ends(options),
            )  # fmt: skip
    except (VerificationError, tf.errors.OpError) as error:
        return _fail(error)
    return _tell(report, options.report)


@contextmanager
def _progress() -> Iterator[None]:
    """Tells on standard error what `fold` is at."""
    log, handler = logging.getLogger("fusedconvbn"), logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _inspect(options: argparse.Namespace) -> int:
    from fusedconvbn.folding.api import inspect
    from fusedconvbn.folding.report_file import check_report

    if options.report is not None:
        check_report(options.report, options.source)
    return _tell(inspect(options.source, **_ends(options)), options.report)


def _tell(report: Any, file: str | None) -> int:
    from fusedconvbn.folding.report_file import write_report

    print(_in_flags(str(report)))
    if file is not None:
        write_report(report, file)
    return 0


def _info(options: argparse.Namespace) -> int:
    import fusedconvbn
    from fusedconvbn import raw

    print(f"fusedconvbn {fusedconvbn.__version__}, Python {platform.python_version()}, {platform.machine()}")
    isas = {row.isa: row.available for row in raw.kernels()}
    print(f"instruction sets: {', '.join(isa for isa, available in isas.items() if available)}")
    lacking = [isa for isa, available in isas.items() if not available]
    if lacking:
        print(f"kernels for what this machine lacks: {', '.join(lacking)}")
    _print_tensorflow()
    return 0


def _print_tensorflow() -> None:
    """What the op needs, and why it is not there if it is not."""
    from fusedconvbn import _load

    try:
        import keras
        import tensorflow as tf

        print(f"tensorflow {tf.__version__}, keras {keras.__version__}")
        _load.ops()
        print(f"op: registered; devices: {', '.join(d.device_type for d in tf.config.list_physical_devices())}")
        why_not = _load.xla()
        print("XLA: compiles the op" if why_not is None else f"XLA: stock ops in the op's place: {why_not}")
    except ImportError as error:
        print(f"op: not available: {error}")
