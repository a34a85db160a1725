"""What the report says that training keeps."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks is no part of the installed package

from benchmarks.cases import parse_shape
from benchmarks.implementations import OURS
from benchmarks.plans import kept_outputs
from benchmarks.problem import NetworkProblem, Problem
from benchmarks.report import make_report, tables
from benchmarks.session import OK, Outcome, Row

DENSE = Problem(parse_shape("4x4x8 3x3x16"), 2, "float32", "train-step", training=True)
EXPANDING = dataclasses.replace(DENSE, case=parse_shape("56x56x16 1x1x96"), batch=16)  # keeps moments, [18, 16]


def outputs(problem: Problem) -> int:
    return problem.pixels * problem.case.out_channels


def test_kept_outputs():
    assert kept_outputs([DENSE]) == 2
    assert kept_outputs([dataclasses.replace(DENSE, save="bfloat16")]) == 1.5
    assert kept_outputs([dataclasses.replace(DENSE, save="recompute")]) == 1
    assert kept_outputs([EXPANDING]) == 1 + 18 * 16 / outputs(EXPANDING)
    thrice = dataclasses.replace(DENSE, case=dataclasses.replace(DENSE.case, times=3))
    kept = 6 * outputs(DENSE) + outputs(EXPANDING) + 18 * 16
    assert kept_outputs([thrice, EXPANDING]) == kept / (3 * outputs(DENSE) + outputs(EXPANDING))


@pytest.mark.parametrize("network", ["resnet50", "resnet18", "vgg16", "mobilenet_v2"])
def test_networks_keep_1_6_outputs_a_layer_at_the_most(network):
    assert kept_outputs([NetworkProblem(network, 224, 1.0, 16, "float32", "train-step", save="bfloat16")]) <= 1.6


def test_kept_outputs_of_a_network():
    network = NetworkProblem("vgg16", 64, 0.25, 2, "float32", "train-step")
    assert kept_outputs([network]) == kept_outputs([network.layer(case) for case in network.cases])


@pytest.mark.parametrize(
    ("training", "device", "says"), [(True, "cpu", 2.0), (False, "cpu", None), (True, "gpu", None)]
)
def test_report_says_it_of_training_on_a_cpu(training, device, says):
    row = Row(dataclasses.replace(DENSE, training=training), {}, {"device": device}, 1e6, None)
    row.outcomes[OURS.name] = Outcome(OK, samples=[1.0], memory={"peak_bytes": 1, "working_bytes": 1})
    settings = {"mode": "train-step", "batch": 2, "dtype": "float32", "threads": 1}
    machine = {"cpu": "", "cores": 1, "isa": [], "tensorflow": "", "versions": {}}
    report = make_report([row], [OURS], settings, machine, "")
    assert report.get("kept_outputs") == says
    assert any("times its outputs" in str(part) for part in tables(report).renderables) == (says is not None)
