"""The command line of folding: what it writes where, what it refuses, and how it says so."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from fold_frozen import FOLD_SOURCES

from fusedconvbn.cli import main

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
    """The message of a command that fails."""
    assert main(list(map(str, arguments))) == 1
    message = capsys.readouterr().err
    assert message.startswith("fusedconvbn: ")
    return message


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
