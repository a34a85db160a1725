"""`python -m benchmarks.folding`: what it counts, and a run of it with our tool alone."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks is no part of the installed package

from benchmarks import folding_command
from benchmarks.folding_graphs import Op, batch_norms
from benchmarks.folding_tables import case_tables
from benchmarks.folding_worker import distance

CONV = {"x": Op("Placeholder", ()), "w": Op("Const", (), 4), "conv": Op("Conv2D", ("x", "w"))}
VECTOR, SCALAR = Op("Const", (), 1), Op("Const", (), 0)


def test_counts_the_spellings_of_a_batch_norm():
    fused = {**CONV, "v": VECTOR, "norm": Op("FusedBatchNormV3", ("conv", "v", "v", "v", "v"))}
    assert batch_norms(fused) == ["norm"]
    inv = {**CONV, "v": VECTOR, "epsilon": SCALAR, "sum": Op("AddV2", ("v", "epsilon")), "inv": Op("Rsqrt", ("sum",))}
    scaled = {**inv, "mul": Op("Mul", ("conv", "inv")), "add": Op("AddV2", ("mul", "v"))}
    assert batch_norms(scaled) == ["mul"]
    again = {**scaled, "mul_1": Op("Mul", ("v", "add")), "relu": Op("Relu", ("mul_1",))}
    assert batch_norms(again) == ["mul"]  # scale and shift in two layers
    assert batch_norms({**again, "mul_2": Op("Mul", ("relu", "v"))}) == ["mul", "mul_2"]


def test_counts_moments_but_neither_biases_nor_scalars():
    assert batch_norms({**CONV, "v": VECTOR, "bias": Op("AddV2", ("conv", "v"))}) == []
    assert batch_norms({**CONV, "half": SCALAR, "mul": Op("Mul", ("half", "conv"))}) == []
    assert batch_norms({**CONV, "square": Op("Mul", ("conv", "conv"))}) == []
    moments = {**CONV, "moment": Op("Mean", ("conv",)), "root": Op("Rsqrt", ("moment",))}
    assert batch_norms({**moments, "mul": Op("Mul", ("conv", "root"))}) == ["root"]


def test_distance_is_infinite_where_nothing_compares():
    x = np.array([1.0, -2.0])
    assert distance(np.array([1.0, -1.5]), x) == 0.25
    assert distance(x[:1], x) == distance(np.array([np.nan, -2.0]), x) == float("inf")


def test_what_fails_leaves_its_batch_norms():
    results = [{"status": "ok", "left": 1}, {"status": "wrong", "left": 0, "error": 1.0}]
    rows = [{"name": "abc"[i], "batch_norms": 2, "foldable": 1, "results": {"onnx": r}} for i, r in enumerate(results)]
    text = "\n".join(case_tables(rows))
    assert "left of 4 (2 must stay)" in text
    assert "| tf2onnx + onnxsim | 2 | 3 |  | 1 | 0 | 0 | 0 |" in text
    assert "wrong: `b`." in text


def test_end_to_end_with_our_tool_alone(tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = ["--case", "norm_standard", "--peer", "--threads", "1", "--json", str(path)]
    assert folding_command.main(arguments) == folding_command.EXIT_OK
    (row,) = json.loads(path.read_text(encoding="utf-8"))["cases"]
    found = row["results"]["fusedconvbn"]
    assert (row["batch_norms"], found["status"], found["left"]) == (2, "ok", 0)
    assert found["error"] < 1e-4
    assert "| `fold(verify=False)` | 1 | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "AlexNet"], "invalid choice: 'AlexNet'"),
        (["--peer", "nobody"], "invalid choice: 'nobody'"),
        (["--json", "no/such/folder/x.json"], "--json: its folder must exist"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_code:
        folding_command.main(arguments)
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err
