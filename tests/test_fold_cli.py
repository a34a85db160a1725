"""The command line of folding: what it writes where, what it refuses, and how it says so."""

from __future__ import annotations

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from fold_frozen import FOLD_SOURCES

import fusedconvbn
from fusedconvbn.cli import main
from fusedconvbn.folding import verifying
from fusedconvbn.folding.report import Report
from fusedconvbn.folding.verifying import Comparison

v1 = tf.compat.v1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a frozen graph and the user's own files."""
    monkeypatch.chdir(tmp_path)
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, [None, 6, 5, 2], "input")
        z = tf.nn.conv2d(x, tf.constant(np.random.default_rng(0).normal(size=(3, 3, 2, 4)), tf.float32), 1, "SAME")
        parameters = [tf.constant(np.linspace(0.5, 1.5, 4), tf.float32) for _ in range(4)]
        tf.nn.relu(v1.nn.fused_batch_norm(z, *parameters, is_training=False)[0], name="output")
    (tmp_path / "a.pb").write_bytes(graph.as_graph_def().SerializeToString())
    (tmp_path / "mine.json").write_text('{"folded": 1}')
    (tmp_path / "mine.txt").write_bytes(b"\xff\xfe mine")
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *arguments) -> str:
    """The message of a command that fails, behind what it told of its progress."""
    assert main(list(map(str, arguments))) == 1
    _, name, message = capsys.readouterr().err.partition("fusedconvbn: ")
    assert name
    return message.removesuffix("\n")


class TestReport:
    @pytest.mark.parametrize(
        "report", ["a.pb", "./a.pb", "b.pb", "b.pb/r.json", "mine.json", "mine.txt", "mine.txt/r.json", "", "sub"]
    )
    def test_refused_before_any_work(self, report, folder, capsys):
        (folder / "sub").mkdir()
        before = contents(folder)
        assert "Received" in refused(capsys, "fold", "a.pb", "b.pb", "--report", report)
        assert contents(folder) == before

    @pytest.mark.parametrize("report", ["a.pb", "mine.txt"])
    def test_of_inspect(self, report, folder, capsys):
        before = contents(folder)
        refused(capsys, "inspect", "a.pb", "--report", report)
        assert contents(folder) == before

    @pytest.mark.parametrize("source", ["a.pb", "b.pb"])
    def test_models_are_not_replaced_by_overwriting(self, source, folder, capsys):
        before = contents(folder)
        assert "apart from the models" in refused(capsys, "fold", "a.pb", "b.pb", "--overwrite", "--report", source)
        assert contents(folder) == before

    def test_other_files_are_where_all_may_be(self, folder, capsys):
        assert main(["fold", "a.pb", "b.pb", "--no-verify", "--overwrite", "--report", "mine.txt"]) == 0
        assert json.loads((folder / "mine.txt").read_text())["destination"] == "b.pb"

    def test_reports_are_replaced(self, folder, capsys):
        assert main(["inspect", "a.pb", "--report", "new/deep/r.json"]) == 0
        assert main(["fold", "a.pb", "b.pb", "--no-verify", "--report", "new/deep/r.json"]) == 0
        assert json.loads((folder / "new/deep/r.json").read_text())["destination"] == "b.pb"

    @pytest.mark.parametrize("named", ["prefix", "prefix.index", "folder"])
    @pytest.mark.parametrize("part", [".meta", ".index", ".data-00000-of-00001"])
    def test_of_a_checkpoint(self, named, part, tmp_path, capsys):
        file = FOLD_SOURCES["checkpoint_reference_variables"](tmp_path)
        before = contents(tmp_path)
        source = {"prefix": file.path, "prefix.index": f"{file.path}.index", "folder": tmp_path}[named]
        target = tmp_path / f"{file.path}{part}"
        assert target.is_file()
        refused(capsys, "fold", source, tmp_path / "x" / "new", "--overwrite", "--report", target)
        refused(capsys, "fold", source, tmp_path / "new", "--report", tmp_path / f"new{part}")
        assert contents(tmp_path) == before


class TestVerification:
    """What the text of a report says of the comparison."""

    @staticmethod
    def line(verdict, limits, tolerance=1e-4, **found):
        comparison = Comparison(verdict, tolerance, limits=limits, **found)
        return str(Report(None, None, "frozen", verification=comparison)).partition("verification: ")[2]

    def test_ok_where_rounding_makes_more_than_the_tolerance(self):
        line = self.line("ok", {"a": 3e-4, "b": 1e-4}, sites={"a": 1.5e-4}, outputs={"b": 9e-5})
        assert line == "ok; nearest to its limit: 'b', 9.0e-05 of 1.0e-04"

    def test_failed_beside_a_larger_limit(self):
        line = self.line("failed", {"a": 1e-2, "b": 1e-4}, sites={"a": 5e-3}, outputs={"b": 1.7e-3}, tolerance=1e-2)
        assert line == "failed; furthest beyond its limit: 'b', 1.7e-03 of 1.0e-04"

    def test_inconclusive_without_numbers(self):
        first, *others = self.line("inconclusive", {}, notes=["inputs"]).splitlines()
        assert first == "inconclusive"
        assert others[0] == "  inputs"
        assert "your data" in others[1]

    def test_a_tensor_that_cannot_be_judged_is_not_named(self):
        limits = {"vague": float("inf"), "clear": 1e-4}
        result = Comparison("ok", sites={"vague": 0.1}, outputs={"clear": 5e-5})
        verifying._judge(result, limits, inconclusive=False)
        assert result.limits == {"clear": 1e-4}

    def test_of_a_run(self, folder, capsys):
        assert main(["fold", "a.pb", "b.pb", "--report", "r.json"]) == 0
        assert "verification: ok; nearest to its limit: " in capsys.readouterr().out
        told = json.loads((folder / "r.json").read_text())["verification"]
        assert told["limits"].keys() == {**told["outputs"], **told["sites"]}.keys()
        assert all(limit >= 1e-4 for limit in told["limits"].values())


class TestResult:
    def test_of_files(self, folder, capsys):
        assert main(["fold", "a.pb", "b", "--to", "saved_model", "--no-verify", "--report", "r.json"]) == 0
        assert "written: b (saved_model)" in capsys.readouterr().out
        assert json.loads((folder / "r.json").read_text())["result"] == "saved_model"
        assert main(["inspect", "a.pb", "--report", "r.json"]) == 0
        assert json.loads((folder / "r.json").read_text())["result"] is None

    def test_in_memory(self, folder):
        _, report = fusedconvbn.fold(folder / "a.pb", verify=False)
        assert report.result == "GraphDef"
        assert "returned: a GraphDef" in str(report)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        _, report = fusedconvbn.fold(model, verify=False)
        assert report.result == "Keras model"
        path, report = fusedconvbn.fold(model, folder / "b.keras", verify=False)
        assert f"written: {path} (keras)" in str(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fold", "a.pb", "mine.txt"], "DST must not exist, or --overwrite be given. Received: 'mine.txt'"),
        (
            ["fold", "a.pb", "b"],
            "DST must be a path that ends with .pb or .pbtxt .*, or --to another kind. Received: 'b'",
        ),
        (["fold", "a.pb", "b", "--to", "checkpoint", "--freeze"], "--freeze must be left out .* Received: True"),
        (["fold", "a.pb", "b.pb", "--tags", "serve"], r"--tags must be left out .* Received: \['serve'\]"),
        (["inspect", "a.pb", "--set", "x=1"], "--set must be .* Received: 'x'"),
        (["inspect", "a.pb", "--outputs", "x"], "--outputs must be .* Received: 'x'"),
        (["inspect", "a.pb", "--inputs", "x"], "--inputs must be .* Received: 'x'"),
        (["inspect", "a.pb", "--inputs", "input:1,2"], r"--inputs input must be .* Received: \(1, 2\)"),
        (["inspect", "b.pb"], "SRC must be .* Received: 'b.pb'"),
        (["inspect", "a.pb", "--report", "a.pb"], "--report must be .* Received: 'a.pb'"),
        (["fold", "a.pb", "b.pb", "--tolerance", "-1"], "--tolerance must be .* Received: -1.0"),
    ],
)
def test_errors_name_flags(arguments, message, folder, capsys):
    assert re.fullmatch(message, refused(capsys, *arguments))


def test_an_unknown_op_asks_for_a_flag(folder, capsys):
    graph = v1.GraphDef.FromString((folder / "a.pb").read_bytes())
    graph.node.add(name="strange", op="NoSuchOp", input=["output"])
    (folder / "strange.pb").write_bytes(graph.SerializeToString())
    assert "--no-verify must be given" in refused(capsys, "fold", "strange.pb", "b.pb")


def test_help_tells_the_exit_status(capsys):
    with pytest.raises(SystemExit):
        main(["fold", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert 'Exit status: 0 where DST was written: verification found no difference ("ok")' in text
    assert '"inconclusive": compare on data of your own' in text


class TestDestination:
    def test_a_file_is_in_the_way(self, folder, capsys):
        message = refused(capsys, "fold", "a.pb", "mine.txt/deep/b.pb")
        assert "mine.txt' is a file" in message

    def test_a_folder_that_may_not_be_written_to(self, folder, capsys, monkeypatch):
        monkeypatch.setattr("os.access", lambda path, mode: False)
        assert str(folder) in refused(capsys, "fold", "a.pb", "new/b.pb")


@pytest.mark.parametrize("text", ["input:1,a,3,2", "input:1,", "input:", "in put", "input:1:x"])
def test_malformed_inputs(text, folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "a.pb", "--inputs", text])
    assert ended.value.code == 2
    assert "NAME:SHAPE" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["input", "input:0", "input:?,6,5,2", "input:0:-1,6,5,2", "input:1,6,5,2"])
def test_inputs(text, folder, capsys):
    assert main(["inspect", "a.pb", "--inputs", text]) == 0
    assert "1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite", "notes.txt", "noending"])
@pytest.mark.parametrize("data", [b"", b"\x1c\x00\x00\x00TFL3 and more", b"text"])
def test_files_of_no_kind(name, data, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    message = refused(capsys, "inspect", tmp_path / name)
    assert all(kind in message for kind in (".keras", ".pb", "SavedModel", ".meta"))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and no more"])
@pytest.mark.parametrize("name", ["a.keras", "a.h5"])
def test_damaged_keras_files(name, data, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    message = refused(capsys, "inspect", tmp_path / name)
    assert "a whole Keras model" in message
    assert "File not found" not in message
