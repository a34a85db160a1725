"""The checker of the plan's choices: its layers, its bookkeeping, and one run."""

from __future__ import annotations

import json
import math
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks is no part of the installed package

from benchmarks import choice, stage_timer
from benchmarks.cases import parse_shape
from benchmarks.draw import draw
from benchmarks.stage_timer import Stage, StageTimer

CASE = parse_shape("6x6x8 3x3x16 activation=relu")


def test_drawn_layers_repeat_and_are_varied():
    drawn = draw(7, 200)
    assert drawn == draw(7, 200)
    assert drawn[:50] == draw(7, 50)
    assert drawn != draw(8, 200)
    cases = [case for case, _ in drawn]
    assert {case.filter_height for case in cases} == {1, 3, 5, 7}
    assert {case.stride for case in cases} == {1, 2}
    assert {batch for _, batch in drawn} == {1, 2, 4, 8, 16}
    assert any(case.depthwise for case in cases)
    assert any(case.groups > 1 and not case.depthwise for case in cases)
    assert any(case.channels == 3 for case in cases)
    assert all(parse_shape(case.spec()).forward_flops(1) == case.forward_flops(1) for case in cases)


def _loss(stage: str, value: float) -> choice.Loss:
    return choice.Loss(CASE, 1, Stage(stage, "slow", "fast", value, 0.0, {"slow": 1 + value, "fast": 1.0}))


def test_summary_is_the_geometric_mean_of_slowdowns():
    summary = choice.summarize([_loss("dgrad", 0.0), _loss("dgrad", 0.21), _loss("wgrad", 0.5)])
    assert summary["dgrad"] == (2, pytest.approx(math.sqrt(1.21) - 1), 0.21)
    assert summary["wgrad"][0] == 1


@pytest.mark.parametrize(("loss", "code"), [(0.04, choice.EXIT_OK), (0.06, choice.EXIT_MISSED)])
def test_exit_code_says_whether_the_goal_is_met(monkeypatch, loss, code):
    monkeypatch.setattr(choice, "_measure", lambda options, console: [_loss("dgrad", loss)])
    assert choice.main([]) == code


class Clock:
    """CPU time that passes only in calls."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(stage_timer.time, "thread_time", lambda: self.now)

    def taking(self, seconds: float):
        def call() -> None:
            self.now += seconds

        return call


@pytest.fixture
def timer(monkeypatch):
    monkeypatch.setattr(stage_timer, "keep_freed_memory", lambda: None)
    return StageTimer(rounds=3, sample_seconds=0.01)


def test_loss_of_a_stage_is_less_its_base(monkeypatch, timer):
    clock = Clock(monkeypatch)
    runs = {"chosen": clock.taking(0.005), "best": clock.taking(0.003), "hopeless": clock.taking(1.0)}
    stage = timer._stage("dgrad", "chosen", runs, base=clock.taking(0.001))
    assert (stage.chosen, stage.best) == ("chosen", "best")
    assert stage.loss == pytest.approx(1.0)  # 4 ms against 2 ms
    assert stage.lost_seconds == pytest.approx(0.002)
    assert set(stage.seconds) == {"chosen", "best"}


def test_every_stage_of_a_layer_is_timed(timer):
    stages = {stage.name: stage for stage in timer.measure(CASE, 2, "float32")}
    assert set(stages) == {"inference", "train-forward", "dgrad", "wgrad", "train-step"}
    for stage in stages.values():
        assert stage.chosen in stage.seconds
        assert min(stage.seconds.values()) > 0
        assert stage.loss >= 0
        assert not any("reference" in kernel for kernel in stage.seconds)


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    dump = tmp_path / "times.jsonl"
    code = choice.main(["--count", "2", "--rounds", "1", "--sample-ms", "1", "--seed", "5", "--dump", str(dump)])
    assert code in (choice.EXIT_OK, choice.EXIT_MISSED)
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"inference", "train-forward", "dgrad", "wgrad", "train-step"}
    assert all(line["ms"] > 0 and parse_shape(line["shape"]) for line in lines)
    assert "geo-mean loss" in capsys.readouterr().out
