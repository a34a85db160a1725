"""Whole networks and peers in the benchmarks: their definitions, their checks, short runs."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import math
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks is no part of the installed package

from benchmarks import implementations, options, run
from benchmarks.cases import parse_shape, read_suite, suites
from benchmarks.correctness import mismatch
from benchmarks.data import Data, make_data
from benchmarks.folding import fold
from benchmarks.implementations import OURS, PEERS, choose
from benchmarks.network_data import NetworkDraw
from benchmarks.networks import NETWORKS, Program, outline
from benchmarks.problem import EPSILON, NetworkProblem, Problem

QUICK = ["--quick", "--device", "cpu", "--batch", "2", "--threads", "1"]
SHAPE = "6x7x8 3x3x16 stride=2 activation=relu residual=yes"


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_network_holds_the_layers_of_its_suite(network):
    listed = collections.Counter()
    for case in read_suite(network):
        listed[dataclasses.replace(case, name="", times=1)] += case.times
    assert collections.Counter(dataclasses.replace(case, name="") for case in outline(network, 224, 1).cases) == listed


def test_every_suite_is_a_network():
    assert suites() == sorted(NETWORKS)


@pytest.mark.parametrize(
    ("network", "parameters"),  # published, in millions; of VGG-16 with batch norm less its biases of convolutions
    [("resnet50", 25.557), ("resnet18", 11.690), ("mobilenet_v2", 3.505), ("vgg16", 138.362)],
)
def test_network_has_the_published_size(network, parameters):
    notes = outline(network, 224, 1)
    filters = sum(math.prod(case.filter_shape) + 2 * case.out_channels for case in notes.cases)
    biases = {"vgg16": 4096 + 4096}.get(network, 0) + 1000
    assert (filters + notes.dense_flops // 2 + biases) / 1e6 == pytest.approx(parameters, abs=2e-3)


def test_program_runs_steps_in_order():
    program = Program()
    a, b = program.input(None), program.input(None)
    difference = program.add(lambda x, y: x - y, a, b)
    program.add(lambda x, y: x * y, difference, b)
    assert program.run(7, 3) == 12


def _problem(**values) -> NetworkProblem:
    return NetworkProblem("resnet18", 64, 0.25, 2, **{"dtype": "float32", "mode": "inference"} | values)


def test_flops_of_a_network():
    cases = _problem().cases
    classifier = 2 * 2 * 128 * 1000
    assert _problem().flops == sum(case.forward_flops(2) for case in cases) + classifier
    assert _problem(mode="train-step").flops == 3 * _problem().flops


def test_network_result_is_judged_by_the_length_of_its_error():
    right = np.random.default_rng(0).standard_normal(1000)
    assert mismatch(_problem(), "logits", right * (1 + 1e-5), right) is None
    assert "logits: the error's norm is 0.001" in mismatch(_problem(), "logits", right * 1.001, right)
    assert mismatch(_problem(), "d_conv1_filters", right * 1.001, right) is None
    assert "allowed 0.1" in mismatch(_problem(), "d_conv1_filters", np.zeros(1000), right)
    assert "norm is nan" in mismatch(_problem(), "logits", right * np.nan, right)


def _convolved_channel(data: Data, filters: np.ndarray) -> float:
    """One output element: all of the inputs times the filters of channel 0."""
    return float(np.sum(data.inputs[0].astype(np.float64) * filters[..., 0]))


def test_folded_convolution_is_convolution_and_batch_norm():
    data = make_data(Problem(parse_shape("3x3x4 3x3x8 padding=valid"), 1, "float64", "inference", training=False))
    w = data.weights
    filters, bias = fold(w)
    z = _convolved_channel(data, w.filters)
    normalized = w.gamma[0] * (z - w.moving_mean[0]) / math.sqrt(w.moving_variance[0] + EPSILON) + w.beta[0]
    assert _convolved_channel(data, filters) + bias[0] == pytest.approx(normalized, rel=1e-12)


def test_wide_weights_are_the_rounded_ones():
    case = parse_shape("8x8x4 3x3x8")
    rounded, wide = (NetworkDraw("bfloat16", wide).convolution(3, case) for wide in (False, True))
    assert wide.filters.dtype == np.float64
    np.testing.assert_array_equal(rounded.filters.astype(np.float64), wide.filters)
    np.testing.assert_array_equal(rounded.gamma, wide.gamma)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "alexnet"], "invalid choice: 'alexnet'"),
        (["--network", "vgg16", "--suite", "vgg16"], "not allowed with"),
        (["--network", "vgg16", "--mode", "train-forward"], "--network is for --mode inference and train-step"),
        (
            ["--network", "resnet18", "--quick", "--mode", "train-step", "--batch", "1"],
            "must be at least 8 in training",
        ),
        (["--network", "vgg16", "--baseline", "conv"], "for --mode inference of a network"),
        (["--network", "vgg16", "--peer", "ncnn"], "--peer must be of onnxruntime, openvino, torch for a network"),
        (["--shape", SHAPE, "--peer", "mxnet"], "--peer must be of onnxruntime, openvino, torch, ncnn. Received"),
        (["--shape", SHAPE, "--peer", "torch", "--mode", "train-step"], "--peer is for --mode inference"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_code:
        run.main(arguments)
    assert exit_code.value.code == run.EXIT_USAGE
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_missing_package_is_an_error_that_says_what_to_install(monkeypatch, capsys, peer):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        options.parse(["--shape", SHAPE, "--peer", peer.name])
    assert f"pip install {' '.join(peer.packages)}" in " ".join(capsys.readouterr().err.split())


def test_peers_alone_or_with_the_baselines_that_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    names = [each.name for each in options.parse(["--shape", SHAPE, "--peer", "torch"]).implementations]
    assert names == [OURS.name, "torch"]
    both = options.parse(["--shape", SHAPE, "--peer", "torch", "--baseline", "raw"]).implementations
    assert [each.name for each in both] == [OURS.name, "raw", "torch"]


def test_default_baselines_of_a_network():
    assert [each.name for each in choose("inference", None, network=True)] == ["frozen", "folded", "raw", "keras"]
    assert [each.name for each in choose("train-step", None, network=True)] == ["raw", "keras"]


def _results(tmp_path: pathlib.Path, *arguments: str) -> dict:
    """All of the first layer's results, none of them wrong."""
    path = tmp_path / "report.json"
    assert run.main([*QUICK, *arguments, "--json", str(path)]) == run.EXIT_OK
    [layer] = json.loads(path.read_text(encoding="utf-8"))["layers"]
    assert {name: each for name, each in layer["implementations"].items() if each["status"] != "ok"} == {}
    return layer["implementations"]


def test_end_to_end_of_a_network(tmp_path):
    results = _results(tmp_path, "--network", "resnet18", "--baseline", "folded")
    assert list(results) == [OURS.name, "folded"]
    assert min(results["folded"]["samples_ms"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "train-step"])
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_end_to_end_of_every_network(tmp_path, network, mode):
    results = _results(tmp_path, "--network", network, "--mode", mode)
    assert list(results) == [OURS.name, *(each.name for each in choose(mode, None, network=True))]


def test_wrong_network_is_never_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(implementations, "OURS", dataclasses.replace(OURS, layer="test_benchmarks:wrong_layers"))
    path = tmp_path / "report.json"
    code = run.main([*QUICK, "--network", "resnet18", "--baseline", "raw", "--json", str(path)])
    results = json.loads(path.read_text(encoding="utf-8"))["layers"][0]["implementations"]
    assert code == run.EXIT_WRONG
    assert (results[OURS.name]["status"], results["raw"]["status"]) == ("wrong", "ok")
    assert "samples_ms" not in results[OURS.name]


@pytest.mark.parametrize("mode", ["inference", "train-step"])
def test_end_to_end_of_bare_kernels_by_cpu_time(tmp_path, mode):
    results = _results(tmp_path, "--shape", SHAPE, "--mode", mode, "--baseline", "kernels", "--clock", "cpu")
    assert min(results["kernels"]["samples_ms"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_end_to_end_of_a_peer(tmp_path, peer):
    for package in peer.packages:
        pytest.importorskip(package)
    layers = ["7x6x8 3x3x16 activation=relu"]
    if peer.networks:
        layers += [SHAPE, "7x6x8 3x3x8 groups=8 activation=relu6", "7x6x8 5x3x8 groups=2 padding=1,0,2,1"]
    for shape in layers:
        assert list(_results(tmp_path, "--shape", shape, "--peer", peer.name)) == [OURS.name, peer.name]
    for network in sorted(NETWORKS) if peer.networks else ():
        _results(tmp_path, "--network", network, "--peer", peer.name)
