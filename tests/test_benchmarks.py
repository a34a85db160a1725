"""The benchmark runner: what it reads, how it reckons, and that it never times a wrong result."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import implementations, run  # noqa: E402
from benchmarks.cases import parse_shape  # noqa: E402
from benchmarks.correctness import bound, mismatch  # noqa: E402
from benchmarks.implementations import BASELINES, MODES, OURS, choose  # noqa: E402
from benchmarks.problem import Problem, problems_of  # noqa: E402
from benchmarks.process import Worker, WorkerError  # noqa: E402
from benchmarks.report import make_report, problems_found, succeeded, too_slow  # noqa: E402
from benchmarks.session import FAILED, OK, WRONG, Outcome, Row, Settings, _time  # noqa: E402
from benchmarks.statistics import bootstrap_interval, geometric_mean, median, round_ratios, spread  # noqa: E402

SHAPE = "6x7x8 3x3x16 stride=2 activation=relu residual=yes"
PROBLEM = Problem(parse_shape(SHAPE), batch=4, dtype="float32", mode="train-step", training=True)
SETTINGS = Settings(threads=1, device="cpu", rounds=3, sample_seconds=1e-3, peak_size=64, clock="wall", timeout=60)


# -------------------------------------------------------------------------------------------------------- statistics


def test_ratio_is_taken_round_by_round():
    ours, theirs = [1.0, 2.0, 8.0], [3.0, 4.0, 8.0]  # the machine slows down meanwhile
    assert round_ratios(theirs, ours) == [3.0, 2.0, 1.0]
    assert median(round_ratios(theirs, ours)) == 2.0


def test_spread_is_the_interquartile_range():
    assert spread([5.0, 1.0, 2.0, 3.0, 100.0]) == 3.0


def test_geometric_mean_is_weighted():
    assert geometric_mean([2.0, 0.5], [1, 1]) == pytest.approx(1.0)
    assert geometric_mean([8.0, 1.0], [1, 2]) == pytest.approx(2.0)


def test_bootstrap_interval_holds_the_median_and_narrows_with_samples():
    ratios = np.random.default_rng(3).normal(1.0, 0.1, 400)
    few, many = bootstrap_interval(ratios[:15]), bootstrap_interval(ratios)
    assert few[0] < median(ratios[:15]) < few[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2
    assert bootstrap_interval([2.0] * 15) == (2.0, 2.0)
    assert bootstrap_interval(ratios[:15]) == few  # the same in every run


def _row(times: int, ours: Outcome, raw: Outcome) -> Row:
    case = dataclasses.replace(PROBLEM.case, times=times)
    return Row(dataclasses.replace(PROBLEM, case=case), {OURS.name: ours, "raw": raw}, {"device": "cpu"}, 2e9)


def _outcome(*seconds: float) -> Outcome:
    return Outcome(OK, samples=list(seconds), memory={"peak_bytes": 2, "working_bytes": 1})


def _report(*rows: Row) -> dict:
    return make_report(rows, [OURS, *choose("train-step", ["raw"])], {}, {}, "peak")


def test_report_weights_layers_by_their_number():
    report = _report(_row(1, _outcome(1, 1), _outcome(8, 8)), _row(2, _outcome(2, 2), _outcome(2, 2)))
    summary = report["summary"]["raw"]
    assert summary["geometric_mean"] == pytest.approx(2.0)
    assert summary["total_ms"] == pytest.approx(12e3)
    assert summary["ours_total_ms"] == pytest.approx(5e3)
    ours = report["layers"][0]["implementations"][OURS.name]
    assert ours["gflops"] == pytest.approx(3 * PROBLEM.case.forward_flops(4) / 1e9)
    assert ours["peak_fraction"] == pytest.approx(ours["gflops"] / 2)
    assert succeeded(report)


@pytest.mark.parametrize(
    ("ours", "raw", "success"),
    [
        (Outcome(WRONG, "off"), _outcome(1), False),
        (Outcome(FAILED, "off"), _outcome(1), False),
        (_outcome(1), Outcome(WRONG, "off"), False),
        (_outcome(1), Outcome(FAILED, "off"), True),  # stock TensorFlow lacks some kernels: not our error
    ],
)
def test_report_of_a_layer_without_a_time(ours, raw, success):
    report = _report(_row(1, ours, raw), _row(1, _outcome(1), _outcome(2)))
    assert succeeded(report) is success
    assert report["summary"]["raw"]["layers"] == 1
    assert report["summary"]["raw"]["geometric_mean"] == pytest.approx(2.0)
    assert len(problems_found(report)) == 1
    assert "ratio" not in report["layers"][0]["implementations"]["raw"]


@pytest.mark.parametrize(
    ("ours", "fails"),
    [
        ((1.10, 1.12, 1.11), True),  # all of the interval is below
        ((1.10, 1.00, 1.11), False),  # the upper end is not
        ((0.90, 0.91, 0.92), False),
    ],
)
def test_gate_looks_at_the_upper_end(ours, fails):
    lines = too_slow(_report(_row(1, _outcome(*ours), _outcome(1, 1, 1))), 0.95)
    assert len(lines) == fails
    assert all("as fast as raw, 90% interval" in line for line in lines)


# ------------------------------------------------------------------------------------------------------- correctness


@pytest.fixture
def result():
    return np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)


def test_rounding_is_no_mismatch(result):
    rounded = result + bound(PROBLEM, "output") / 4 * np.random.default_rng(1).uniform(-1, 1, result.shape)
    assert mismatch(PROBLEM, "output", rounded, result) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_one_bad_element_is_found(result, value):
    at = int(np.argmin(result))  # a negative one
    bad = result.copy()
    bad[at] = value
    assert f"element {at} is" in mismatch(PROBLEM, "output", bad, result)


def test_small_error_everywhere_is_found(result):
    assert "root mean square" in mismatch(PROBLEM, "output", result * (1 + 0.9 * bound(PROBLEM, "output")), result)


def test_error_of_the_statistics_grows_with_the_pixels(result):
    depthwise = parse_shape("112x112x32 3x3x32 padding=same groups=32")
    problem = {batch: Problem(depthwise, batch, dtype="float32", mode="train-step", training=True) for batch in (1, 16)}
    erring = result * (1 + 6e-5)  # twice the error of stock fused_batch_norm at batch 16
    assert mismatch(problem[16], "output", erring, result) is None
    assert "root mean square" in mismatch(problem[1], "output", erring, result)
    assert mismatch(problem[16], "conv_output", erring, result)


def test_gradients_from_a_rounded_z_may_err_by_the_unit_of_bfloat16(result):
    problem = dataclasses.replace(PROBLEM, mode="train-step", training=True, save="bfloat16")
    erring = result * (1 + 2**-8)
    assert mismatch(problem, "d_inputs", erring, result) is None
    assert mismatch(problem, "output", erring, result)
    assert mismatch(dataclasses.replace(problem, save="conv"), "d_inputs", erring, result)
    assert mismatch(problem, "d_inputs", result * (1 + 2**-6), result)


def test_wrong_number_of_elements_is_found(result):
    assert "elements" in mismatch(PROBLEM, "output", result[1:], result)


# -------------------------------------------------------------------------------------------------------- processes


class Fragile:
    """What a worker may hold; needs no TensorFlow."""

    def add(self, a, b):
        return a + b

    def fail(self):
        raise KeyError("no such thing")

    def die(self):
        os._exit(3)

    def hang(self):
        time.sleep(60)


@pytest.fixture
def fragile(tmp_path):
    worker = Worker(f"{__name__}:Fragile", (), tmp_path / "log", timeout=10)
    worker.wait()
    yield worker
    worker.close()


def test_worker_answers_and_survives_an_error(fragile):
    assert fragile.call("add", 1, 2) == 3
    with pytest.raises(WorkerError, match=r"KeyError: .*no such thing") as error:
        fragile.call("fail")
    assert not error.value.dead
    assert fragile.call("add", 3, 4) == 7


def test_worker_death_is_an_error_now_and_later(fragile):
    for _ in range(2):
        with pytest.raises(WorkerError, match="exit code 3") as error:
            fragile.call("die")
        assert error.value.dead


def test_worker_that_hangs_is_ended(fragile):
    fragile._timeout = 0.2
    with pytest.raises(WorkerError, match=r"no answer in 0\.2 s"):
        fragile.call("hang")


class FakeWorker:
    """Counts its samples into a common list; fails from a given one on."""

    def __init__(self, name, calls, fails_at=math.inf):
        self.name, self.calls, self.fails_at, self.taken = name, calls, fails_at, 0

    def call(self, method, *arguments):
        self.calls.append(self.name)
        self.taken += 1
        if self.taken >= self.fails_at:
            raise WorkerError("gone")
        return float(self.taken)


def test_rounds_interleave_and_only_right_results_are_timed():
    calls = []
    workers = {"a": FakeWorker("a", calls), "b": FakeWorker("b", calls), "wrong": FakeWorker("wrong", calls)}
    outcomes = {"a": Outcome(OK), "b": Outcome(OK), "wrong": Outcome(WRONG, "off")}
    _time(PROBLEM, workers, outcomes, SETTINGS, lambda doing: None)
    assert calls == ["a", "b"] * (1 + SETTINGS.rounds)  # the first samples say how often to repeat
    assert outcomes["a"].samples == [2.0, 3.0, 4.0]
    assert outcomes["wrong"].samples == []


def test_failure_in_a_round_drops_the_samples():
    workers = {"a": FakeWorker("a", []), "b": FakeWorker("b", [], fails_at=3)}
    outcomes = {"a": Outcome(OK), "b": Outcome(OK)}
    _time(PROBLEM, workers, outcomes, SETTINGS, lambda doing: None)
    assert (outcomes["b"].status, outcomes["b"].detail, outcomes["b"].samples) == (FAILED, "gone", [])
    assert len(outcomes["a"].samples) == SETTINGS.rounds


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --suite --network --shape is required"),
        (["--suite", "alexnet"], "invalid choice: 'alexnet'"),
        (["--suite", "vgg16", "--shape", SHAPE], "not allowed with"),
        (["--shape", "8x8x8"], "must begin with INPUT FILTER"),
        (["--shape", SHAPE, "--mode", "training"], "invalid choice: 'training'"),
        (["--shape", SHAPE, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--shape", SHAPE, "--batch", "0"], "argument --batch: must be a positive integer. Received: '0'"),
        (["--shape", SHAPE, "--threads", "two"], "argument --threads: must be a positive integer. Received: 'two'"),
        (["--shape", SHAPE, "--rounds", "-1"], "--rounds"),
        (["--shape", SHAPE, "--sample-ms", "0"], "must be a positive number. Received: '0'"),
        (
            ["--shape", SHAPE, "--baseline", "torch"],
            "must be of frozen, folded, raw, keras, moments, xla, ours_xla, kernels, conv",
        ),
        (["--shape", SHAPE, "--mode", "train-step", "--baseline", "frozen"], "for --mode train-step. Received"),
        (["--shape", "2x2x4 1x1x4", "--mode", "train-forward", "--batch", "1"], "must be at least 8 in training"),
        (["--shape", SHAPE, "--clock", "cpu", "--threads", "2"], "--clock cpu is for --threads 1"),
        (["--shape", SHAPE, "--fail-below", "0.95"], "--fail-below needs --baseline"),
        (["--shape", SHAPE, "--json", "no/such/folder/x.json"], "--json: its folder must exist"),
        (["--shape", SHAPE, "--plot", "x.pdf"], "--plot must be a .png file"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_code:
        run.main(arguments)
    assert exit_code.value.code == run.EXIT_USAGE
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("mode", MODES)
def test_default_baselines(mode):
    names = [baseline.name for baseline in choose(mode, None)]
    assert "conv" in names
    assert "xla" not in names
    assert ("frozen" in names) == (mode == "inference")
    assert ("cond" in names) == (mode == "run-time-switch")
    assert all(mode in baseline.modes for baseline in BASELINES if baseline.name in names)


def test_switch_is_measured_in_both_positions():
    common = {"batch": 2, "dtype": "float32"}
    assert [p.training for p in problems_of(PROBLEM.case, "run-time-switch", **common)] == [True, False]
    assert [p.training for p in problems_of(PROBLEM.case, "inference", **common)] == [False]
    assert [p.training for p in problems_of(PROBLEM.case, "train-forward", **common)] == [True]


def _check_report(report: dict, baselines: list[str], layers: int, rounds: int) -> None:
    assert report["schema"] == 1
    assert report["machine"]["cores"] >= 1
    assert {"python", "numpy"} <= set(report["machine"]["versions"])
    assert report["peak"]["gflops"] > 0
    assert list(report["summary"]) == [OURS.name, *baselines]
    assert len(report["layers"]) == layers
    for layer in report["layers"]:
        assert parse_shape(layer["shape"]).forward_flops(1) > 0
        for name, result in layer["implementations"].items():
            assert result["status"] == OK, result
            assert len(result["samples_ms"]) == rounds
            assert min(result["samples_ms"]) > 0
            assert result["median_ms"] == pytest.approx(float(np.median(result["samples_ms"])))
            assert result["gflops"] == pytest.approx(layer["gflop"] / result["median_ms"] * 1e3)
            assert result["peak_bytes"] > 10 << 20  # a process with TensorFlow in it
            assert ("ratio" in result) == (name != OURS.name)


def _run(tmp_path: pathlib.Path, *arguments: str) -> dict:
    """Runs the command as a user does; its report."""
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--device", "cpu", "--json", str(path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == run.EXIT_OK, done.stdout + done.stderr
    assert "geo-mean" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


def test_end_to_end(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "ratios.png"
    arguments = ["--shape", SHAPE, "--batch", "4", "--threads", "1", "--mode", "train-step", "--plot", str(plot)]
    report = _run(tmp_path, *arguments, "--baseline", "raw")
    _check_report(report, ["raw"], layers=1, rounds=3)
    assert report["settings"]["threads"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype", "batch", "layers"),
    [
        ("inference", "float32", "1", 1),
        ("inference", "bfloat16", "2", 1),
        ("train-forward", "float32", "4", 1),
        ("train-step", "bfloat16", "4", 1),
        ("train-step", "float32", "1", 1),
        ("run-time-switch", "float16", "4", 2),
    ],
)
def test_end_to_end_of_every_mode(tmp_path, mode, dtype, batch, layers):
    report = _run(tmp_path, "--shape", SHAPE, "--mode", mode, "--dtype", dtype, "--batch", batch)
    _check_report(report, [baseline.name for baseline in choose(mode, None)], layers, rounds=3)


@pytest.mark.slow
def test_end_to_end_of_a_depthwise_layer(tmp_path):
    shape = "7x7x8 3x3x16 groups=8 stride=2 padding=0,1,1,0 activation=relu6"
    report = _run(tmp_path, "--shape", shape, "--mode", "train-step", "--batch", "4")
    _check_report(report, ["raw", "keras", "moments", "conv"], layers=1, rounds=3)


def wrong_layers(problem, weights):
    """Raw layers whose gamma is off by a hundredth."""
    from benchmarks import layers

    return layers.raw(problem, dataclasses.replace(weights, gamma=weights.gamma * 1.01))


def test_wrong_result_is_never_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(implementations, "OURS", dataclasses.replace(OURS, layer=f"{__name__}:wrong_layers"))
    path = tmp_path / "report.json"
    arguments = ["--shape", SHAPE, "--batch", "4", "--quick", "--device", "cpu", "--json", str(path)]
    code = run.main([*arguments, "--mode", "train-forward", "--baseline", "raw"])
    results = json.loads(path.read_text(encoding="utf-8"))["layers"][0]["implementations"]
    assert code == run.EXIT_WRONG
    assert results[OURS.name]["status"] == WRONG
    assert "samples_ms" not in results[OURS.name]
    assert "output: element" in results[OURS.name]["detail"]
    assert results["raw"]["status"] == OK
    assert "ratio" not in results["raw"]
    assert "WRONG" in capsys.readouterr().out
