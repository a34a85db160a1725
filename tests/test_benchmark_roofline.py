"""The limits of the machine and of a layer: what is counted, what bounds, what the report says."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks is no part of the installed package

from benchmarks.cases import parse_shape
from benchmarks.hardware import Bandwidth, Hardware, Limits, compiler, size_class
from benchmarks.implementations import OURS
from benchmarks.problem import NetworkProblem, Problem
from benchmarks.report import make_report
from benchmarks.roofline import bound, sizes, traffic
from benchmarks.session import OK, Outcome, Row

CASE = parse_shape("4x4x8 3x3x16 activation=relu residual=yes")
X, W, Y = 2 * 4 * 4 * 8, 3 * 3 * 8 * 16, 2 * 4 * 4 * 16  # elements with a batch of 2
SLOW = Limits("", 1e9, {size_class(1): Bandwidth(4.0, 2.0, 1.0)})


def _problem(mode: str, **values) -> Problem:
    common = {"batch": 2, "dtype": "float32", "mode": mode, "training": mode != "inference"}
    return Problem(**{"case": CASE, **common, **values})


@pytest.mark.parametrize(
    ("mode", "save", "read", "written"),
    [
        ("inference", "conv", X + W + Y, Y),
        ("train-forward", "conv", X + W + Y, 2 * Y),
        ("train-forward", "bfloat16", X + W + Y, Y + Y // 2),
        ("train-forward", "recompute", X + W + Y, Y),
        ("train-step", "conv", 2 * (X + W) + 4 * Y, X + W + 3 * Y),
    ],
)
def test_traffic_is_each_tensor_once(mode, save, read, written):
    assert traffic(_problem(mode, save=save)) == (4 * read, 4 * written)


def test_only_float32_is_saved_in_fewer_bits():
    for dtype in ("float64", "float16", "bfloat16"):
        kept, rounded = (traffic(_problem("train-step", save=save, dtype=dtype)) for save in ("conv", "bfloat16"))
        assert kept == rounded


def test_traffic_follows_the_type_and_the_residual():
    assert traffic(_problem("inference", dtype="bfloat16")) == (2 * (X + W + Y), 2 * Y)
    assert traffic(_problem("inference", case=dataclasses.replace(CASE, residual=False))) == (4 * (X + W), 4 * Y)


def test_size_class_holds_what_is_touched():
    assert size_class(1) == size_class(1 << 18) == 1 << 18
    assert size_class((1 << 18) + 1) == 1 << 20
    assert size_class(1 << 40) == 1 << 28


def test_sizes_of_a_problem_are_those_that_its_bound_wants():
    large = _problem("inference", case=parse_shape("224x224x64 3x3x64"), copies=8)
    assert sizes(_problem("inference")) == {size_class(1)}
    assert sizes(large) == {size_class(8 * sum(traffic(large)))}
    network = NetworkProblem("vgg16", 224, 1.0, 1, "float32", "inference")
    assert len(sizes(network)) > 1
    bound(network, Limits("", 1.0, dict.fromkeys(sizes(network), Bandwidth(1.0, 1.0, 1.0))))


def test_best_of_two_measurements_in_each_respect():
    one = Limits("", 1e9, {4: Bandwidth(8.0, 4.0, 2.0), 8: Bandwidth(4.0, 2.0, 1.0)})
    best = one.best(Limits("", 2e9, {4: Bandwidth(1.0, 9.0, 1.0), 6: Bandwidth(5.0, 1.0, 1.0)}))
    assert best.flops == 2e9
    assert best.bandwidths == {4: Bandwidth(8.0, 9.0, 2.0), 6: Bandwidth(5.0, 1.0, 1.0), 8: Bandwidth(4.0, 2.0, 1.0)}


def test_what_takes_longer_is_the_limit():
    read, written = traffic(_problem("inference"))
    memory = bound(_problem("inference"), SLOW)
    assert memory.by == "memory"
    assert memory.seconds == pytest.approx(2 * written / 1.0 + (read - written) / 4.0)
    slow = dataclasses.replace(SLOW, flops=1.0)
    assert bound(_problem("inference"), slow).seconds == CASE.forward_flops(2)
    assert bound(_problem("train-step"), slow).seconds == 3 * CASE.forward_flops(2)
    assert bound(_problem("inference"), slow).by == "compute"


def test_limit_of_a_network_is_the_sum_of_its_layers():
    network = NetworkProblem("resnet18", 64, 0.25, 2, "float32", "inference")
    fast = Limits("", 1e3, dict.fromkeys(sizes(network), Bandwidth(1e30, 1e30, 1e30)))
    assert bound(network, fast).seconds == pytest.approx(network.flops / 1e3)


def test_report_says_the_limit_and_the_share_of_it():
    limits = Limits("multiplications", 1e6, {size_class(1): Bandwidth(1e30, 1e30, 1e30)})
    row = Row(_problem("inference"), {OURS.name: Outcome(OK, samples=[1.0])}, {"device": "cpu"}, 1e6, limits)
    row.outcomes[OURS.name].memory = {"peak_bytes": 1, "working_bytes": 1}
    report = make_report([row], [OURS], {}, {}, "products of matrices")
    [layer] = report["layers"]
    assert layer["limited_by"] == "compute"
    assert layer["limit_ms"] == pytest.approx(CASE.forward_flops(2) / 1e3)
    fraction = layer["implementations"][OURS.name]["limit_fraction"]
    assert fraction == pytest.approx(CASE.forward_flops(2) / 1e6)
    assert report["peak"]["what"] == "multiplications"
    assert report["limits"]["bandwidths"][0]["bytes"] == size_class(1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_hardware_is_measured(threads, dtype):
    if compiler() is None:
        pytest.skip("no C compiler")
    limits = Hardware(threads, 1e-5).measure(dtype, [1 << 18, 1 << 22])
    assert limits.flops > 1e8
    assert list(limits.bandwidths) == [1 << 18, 1 << 22]
    assert all(min(dataclasses.astuple(each)) > 1e6 for each in limits.bandwidths.values())
