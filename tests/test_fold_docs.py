"""The code in the pages on folding runs, from top to bottom, and prints what its comments say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "page", ["fold", "fold-keras", "fold-saved-model", "fold-frozen", "fold-checkpoint", "fold-formula"]
)
def test_snippets(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(snippet, namespace)
        printed = capsys.readouterr().out
        for expected in re.findall(r"# (\[.*\])$", snippet, re.MULTILINE):
            assert expected in printed
