"""What conftest.py does on a machine that lacks instruction sets, which FUSEDCONVBN_ISA makes of any."""

import os
import subprocess
import sys
from pathlib import Path

SUITE = """
import pytest
from types import SimpleNamespace

@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_by_name(isa):
    assert isa == "generic"

@pytest.mark.parametrize("case", [SimpleNamespace(isa=isa) for isa in (None, "generic", "avx2")])
def test_by_attribute(case):
    assert case.isa != "avx2"

@pytest.mark.isa("avx512")
def test_by_mark():
    assert False

def test_others():
    pass
"""


def test_one_test_of_a_file_is_skipped(tmp_path):
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", tmp_path]
    environment = {**os.environ, "FUSEDCONVBN_ISA": "generic"}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    for name in ("one", "two"):
        assert f"this machine has no avx2, avx512: 4 tests of test_{name}.py" in printed
    assert "8 passed, 2 skipped, 6 deselected" in printed
