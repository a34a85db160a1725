"""The code in docs/layer.md runs, from top to bottom, and prints what its comments say; the examples work too."""

import re
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).parents[1]


def test_snippets(capsys):
    namespace = {}
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "layer.md").read_text(), re.DOTALL)
    assert len(snippets) > 5
    for snippet in snippets:
        exec(snippet, namespace)
        printed = capsys.readouterr().out
        for expected in re.findall(r"# (\[.*\])$", snippet, re.MULTILINE):
            assert expected in printed


def example(name: str) -> str:
    return run_python(f"import {name}; {name}.main()", folder=ROOT / "examples")


@pytest.mark.slow
def test_demo_agrees_with_keras_and_writes_a_plot(tmp_path):
    """It checks itself: losses, accuracies, what is reloaded and what is served."""
    script = "import sys; sys.path.append(sys.argv[1]); import demo; print('exit code', demo.main())"
    printed = run_python(script, ROOT / "examples", folder=tmp_path)
    assert printed.endswith("exit code 0"), printed
    assert printed.count("  ok  ") == 5
    assert (tmp_path / "artifacts" / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quantization_aware_training_regains_accuracy():
    exact, rounded, retrained = map(float, re.findall(r"0\.\d{3}", example("quantization_aware")))
    assert exact > 0.9
    assert retrained > rounded + 0.02


@pytest.mark.slow
def test_frozen_batch_norm_beats_statistics_of_one_image():
    rows = re.findall(r"(0\.\d{3}) +(\w+)", example("finetune_frozen_batch_norm"))
    assert [state for _, state in rows] == ["unchanged", "changed"]
    assert float(rows[0][0]) > float(rows[1][0]) + 0.1
