"""The code in docs/fuse.md runs, from top to bottom, and prints what its comments say; the example works too."""

import re
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).parents[1]


def test_snippets(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "fuse.md").read_text(), re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets:
        exec(snippet, namespace)
        printed = capsys.readouterr().out
        for expected in re.findall(r"# (\[.*\])$", snippet, re.MULTILINE):
            assert expected in printed


@pytest.mark.slow
def test_example_fuses_trains_and_restores():
    printed = run_python("import fuse_model; fuse_model.main()", folder=ROOT / "examples")
    assert "behind_an_activation: kept, 'conv2d' applies an activation before it" in printed
    (start, end), (fused_start, fused_end) = re.findall(r"loss (\S+) -> (\S+),", printed)
    assert start == fused_start
    assert abs(float(end) - float(fused_end)) < 0.1
    assert float(end) < 0.7 * float(start)
    assert printed.strip().endswith("the layers are those of the start")
