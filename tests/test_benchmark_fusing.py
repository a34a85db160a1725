"""`python -m benchmarks.fusing`: a run of it on a small model, and its bad command lines."""

import json

import pytest

from benchmarks import fusing

QUICK = ["--model", "MobileNetV2", "--image", "64", "--batch", "4", "--rounds", "2", "--threads", "1"]


def test_end_to_end(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert fusing.main([*QUICK, "--json", str(path)]) == fusing.EXIT_OK
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["call"] for row in rows] == ["predict_on_batch", "train_on_batch"]
    for row in rows:
        assert row["error"] < 1e-4
        assert all(len(taken) == 2 and min(taken) > 0 for taken in row["samples_ms"])
    table = capsys.readouterr().out
    assert table.count("| MobileNetV2, 64 x 64 |") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "AlexNet"], "invalid choice: 'AlexNet'"),
        (["--batch", "0"], "--batch"),
        (["--json", "no/such/folder/x.json"], "--json: its folder must exist"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_code:
        fusing.main(arguments)
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err
