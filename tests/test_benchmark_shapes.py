"""The layers of the benchmarks: their one-line syntax, the shape files, the networks that come with them."""

from __future__ import annotations

import math
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks is no part of the installed package

from benchmarks.cases import parse_shape, read_shapes, read_suite, suites


@pytest.mark.parametrize(
    ("text", "output", "filters", "pads"),
    [
        ("56x56x64 3x3x128", (2, 56, 56, 128), (3, 3, 64, 128), (1, 1, 1, 1)),
        ("224x224x3 7x7x64 stride=2", (2, 112, 112, 64), (7, 7, 3, 64), (2, 3, 2, 3)),
        ("9x8x4 3x2x6 padding=valid", (2, 7, 7, 6), (3, 2, 4, 6), (0, 0, 0, 0)),
        ("9x8x4 3x3x6 padding=0,2,1,0 stride=2", (2, 5, 4, 6), (3, 3, 4, 6), (0, 2, 1, 0)),
        ("9x9x8 3x3x16 groups=8 dilation=2", (2, 9, 9, 16), (3, 3, 1, 16), (2, 2, 2, 2)),
        ("7x7x8 1x1x16 groups=2 stride=3", (2, 3, 3, 16), (1, 1, 4, 16), (0, 0, 0, 0)),
    ],
)
def test_shape_sizes(text, output, filters, pads):
    case = parse_shape(text)
    assert case.output_shape(2) == output
    assert case.filter_shape == filters
    assert case.pads == pads
    assert case.forward_flops(2) == 2 * math.prod(output) * math.prod(filters[:3])


def test_shape_options():
    case = parse_shape("5x5x4 3x3x4 groups=4 activation=hard_swish residual=yes padding=valid dilation=2 stride=1")
    assert (case.groups, case.activation, case.residual) == (4, "hard_swish", True)
    assert (case.padding, case.dilation, case.stride, case.depthwise) == ("VALID", 2, 1, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with INPUT FILTER"),
        ("56x56x64", "must begin with INPUT FILTER"),
        ("56x56 3x3x64", "INPUT must be three positive sizes.*'56x56'"),
        ("56x56x64 3x3x0", "FILTER must be three positive sizes.*'3x3x0'"),
        ("56x56x64 3x3x64 stride=0", "stride must be a positive integer.*'0'"),
        ("56x56x64 3x3x64 stride=2.5", "stride must be a positive integer"),
        ("56x56x64 3x3x64 strides=2", "KEY=VALUE with a key of stride.*'strides=2'"),
        ("56x56x64 3x3x64 residual", "KEY=VALUE"),
        ("56x56x64 3x3x64 residual=true", "residual must be one of no, yes"),
        ("56x56x64 3x3x64 activation=tanh", "activation must be one of none, relu.*'tanh'"),
        ("56x56x64 3x3x64 padding=1,1", "padding must be same, valid or TOP,BOTTOM,LEFT,RIGHT"),
        ("56x56x64 3x3x64 stride=2 stride=2", "given once"),
        ("56x56x64 3x3x64 groups=3", r"groups must divide.*\(64\).*groups=3"),
        ("2x2x4 3x3x4 padding=valid", "must fit into the padded input"),
    ],
)
def test_bad_shape(text, message):
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


@pytest.mark.parametrize(
    ("network", "layers", "gflop"),  # multiplications and additions for one image, as published (twice the MACs)
    [("resnet50", 53, 8.174), ("resnet18", 20, 3.627), ("mobilenet_v2", 52, 0.599), ("vgg16", 13, 30.693)],
)
def test_suite(network, layers, gflop):
    cases = read_suite(network)
    assert sum(case.times for case in cases) == layers
    assert sum(case.times * case.forward_flops(1) for case in cases) / 1e9 == pytest.approx(gflop, abs=1e-3)
    assert all(parse_shape(case.spec(), case.name, case.times) == case for case in cases)


def test_suites_are_those_of_the_command_line():
    assert suites() == ["mobilenet_v2", "resnet18", "resnet50", "vgg16"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 8x8x4 3x3x4\n\nb x 8x8x4 3x3x4", ":3: TIMES must be a positive integer"),
        ("# comment\na 1", ":2: a line must be NAME TIMES INPUT FILTER"),
        ("a 1 8x8x4 3x3x4 # one\na 2 8x8x4 1x1x4", ":2: a layer's name must be given once.*'a'"),
        ("a 1 8x8x4 3x3x4 stride=-1", ":1: stride must be"),
        ("# nothing", "must hold at least one layer"),
    ],
)
def test_bad_shape_file(tmp_path, text, message):
    path = tmp_path / "network.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"network.txt.*{message}"):
        read_shapes(path)
