"""The command line of `python -m benchmarks.run`: parsed, checked, and turned into what is to be measured."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from benchmarks import machine
from benchmarks.cases import Case, parse_shape, read_suite, suites
from benchmarks.implementations import (
    BASELINES,
    INFERENCE,
    MODES,
    PEERS,
    TRAIN_STEP,
    Implementation,
    choose,
    choose_ours,
    choose_peers,
)
from benchmarks.measured import CLOCKS
from benchmarks.networks import NETWORKS, outline
from benchmarks.problem import DTYPES, AnyProblem, NetworkProblem, problems_of
from benchmarks.session import Settings
from fusedconvbn._arguments import ALGORITHMS, SAVES

_QUICK_LAYERS = 3
_FEWEST_ELEMENTS = 8  # a channel of a training batch: below, its gradients are differences of nearly equal numbers
_DEFAULTS = {"rounds": 7, "sample_ms": 100.0}  # --help names them too
_QUICK = {"rounds": 3, "sample_ms": 10.0}
_GATE_ROUNDS = 15  # an interval of fewer says little
_NETWORK_SIZE = {False: (224, 1.0), True: (64, 0.25)}  # pixels, and share of the channels, by --quick
_PEAK_SIZE = {False: 2048, True: 512}  # by --quick


def positive(text: str) -> int:
    """A positive integer."""
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"must be a positive integer. Received: {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """A positive number."""
    if not re.fullmatch(r"\d*\.?\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"must be a positive number. Received: {text!r}")
    return float(text)


def _shape(text: str) -> Case:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(baseline.name for baseline in BASELINES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Checks fusedconvbn.fused_conv_bn against a float64 reference, then times it against stock "
        "TensorFlow doing the same work. Exit code: 0, or 1 if a result was wrong, fusedconvbn failed, or --fail-below "
        "found a slow layer, 2 for a wrong command line.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=suites(), help="the layers of a network")
    what.add_argument("--network", choices=sorted(NETWORKS), help="a whole network")
    what.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="'INPUT FILTER [KEY=VALUE ...]'",
        help="one layer, as '56x56x64 3x3x128 stride=2 padding=same groups=1 activation=relu residual=yes'; repeatable",
    )
    parser.add_argument("--mode", choices=MODES, default=INFERENCE)
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="16-bit types: Keras runs its mixed policy")
    parser.add_argument("--threads", type=positive, default=machine.cores(), help="of one op (default: all cores)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: the GPU where there is one to use"
    )
    parser.add_argument(
        "--baseline", action="append", metavar="NAME", help=f"{names}; repeatable (default: those of the mode, no xla)"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{', '.join(peer.name for peer in PEERS)}; repeatable; without --baseline, the peers alone",
    )
    parser.add_argument(
        "--freeze",
        action="store_true",
        help="turn fusedconvbn's variables into constants too: for comparisons with frozen, folded and peers",
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="auto", help="of fusedconvbn")
    parser.add_argument("--save", choices=SAVES, default="conv", help="of fusedconvbn, for backward")
    parser.add_argument("--rounds", type=positive, help="interleaved (default: 7; with --fail-below 15)")
    parser.add_argument(
        "--sample-ms", type=positive_number, help=f"length of one sample (default: {_DEFAULTS['sample_ms']:.0f})"
    )
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: CPU time of the process, for one thread on a busy machine",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"the {_QUICK_LAYERS} smallest layers, few and short rounds: a smoke test"
    )
    parser.add_argument(
        "--fail-below",
        type=positive_number,
        metavar="RATIO",
        help="exit code 1 if a layer is slower than this share of a baseline's speed, the whole of its interval",
    )
    parser.add_argument("--timeout", type=positive_number, default=1800.0, help="seconds that one step may take")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="write a chart of the ratios")
    return parser


def _cases(options: argparse.Namespace) -> list[Case]:
    """The layers to measure; none where it is a whole network."""
    if options.network:
        return []
    cases = read_suite(options.suite) if options.suite else options.shape
    if options.quick:
        smallest = sorted(cases, key=lambda case: case.forward_flops(1))[:_QUICK_LAYERS]
        return [case for case in cases if case in smallest]
    return cases


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """What argparse cannot see; ends with exit code 2."""
    for case in cases or outline(options.network, *_NETWORK_SIZE[options.quick]).cases:
        elements = options.batch * case.out_height * case.out_width
        if options.mode != INFERENCE and elements < _FEWEST_ELEMENTS:
            parser.error(
                f"--batch x output height x width must be at least {_FEWEST_ELEMENTS} in training, or the statistics "
                f"mean nothing. Received: {elements} for {case.spec()!r}"
            )
    if options.fail_below is not None and options.baseline is None and not options.peer:
        parser.error("--fail-below needs --baseline or --peer: whose speed is the measure")
    if options.clock == "cpu" and options.threads > 1:
        parser.error(
            f"--clock cpu is for --threads 1: it adds the threads' times. Received: --threads {options.threads}"
        )
    if options.network and options.mode not in (INFERENCE, TRAIN_STEP):
        parser.error(f"--network is for --mode {INFERENCE} and {TRAIN_STEP}. Received: {options.mode}")
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{option}: its folder must exist. Received: {path}")
    if options.plot is not None and options.plot.suffix != ".png":
        parser.error(f"--plot must be a .png file. Received: {options.plot}")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")


def _settings(options: argparse.Namespace) -> Settings:
    defaults = _QUICK if options.quick else _DEFAULTS
    return Settings(
        threads=options.threads,
        device=options.device,
        rounds=options.rounds or (_GATE_ROUNDS if options.fail_below is not None else defaults["rounds"]),
        sample_seconds=(options.sample_ms or defaults["sample_ms"]) / 1e3,
        peak_size=_PEAK_SIZE[options.quick],
        clock=options.clock,
        timeout=options.timeout,
    )


def described(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The options as the JSON file holds them."""
    names = ("mode", "batch", "dtype", "threads", "algorithm", "save", "freeze", "clock", "quick", "fail_below")
    return {
        "what": options.suite or options.network or "shapes",
        **{name: getattr(options, name) for name in names},
        "rounds": settings.rounds,
        "sample_ms": settings.sample_seconds * 1e3,
    }


@dataclasses.dataclass(frozen=True)
class Run:
    """What a command line asks for."""

    options: argparse.Namespace
    problems: list[AnyProblem]
    implementations: list[Implementation]  # ours first
    settings: Settings


def parse(arguments: Sequence[str] | None) -> Run:
    """What to measure; ends with exit code 2 for a wrong command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    cases = _cases(options)
    _check_options(parser, options, cases)
    try:
        network = bool(options.network)
        peers = choose_peers(options.mode, options.peer, network)
        baselines = [] if peers and options.baseline is None else choose(options.mode, options.baseline, network)
        ours = choose_ours(options.freeze, [*baselines, *peers])
    except ValueError as error:
        parser.error(str(error))
    return Run(options, _problems(options, cases), [ours, *baselines, *peers], _settings(options))


def _problems(options: argparse.Namespace, cases: Sequence[Case]) -> list[AnyProblem]:
    common = {name: getattr(options, name) for name in ("mode", "batch", "dtype", "algorithm", "save")}
    if options.network:
        return [NetworkProblem(options.network, *_NETWORK_SIZE[options.quick], **common)]
    return [problem for case in cases for problem in problems_of(case, **common)]
