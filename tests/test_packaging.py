"""What is built, what goes into the wheel, and that a wheel works where there is nothing else of this project."""

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fusedconvbn"
README_EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
RAW_EXAMPLE = """
import importlib.util
import numpy as np
from fusedconvbn import raw
assert importlib.util.find_spec("tensorflow") is None
inputs, filters = np.ones((1, 3, 3, 2), np.float32), np.ones((3, 3, 2, 4), np.float32)
ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
print(raw.forward(inputs, filters, ones, zeros, zeros, ones, epsilon=0.0).output.ravel())
"""
NOT_SOURCES = (".git", ".venv*", ".*_cache", "build", "dist", "artifacts", "*.egg-info", "*.so", "_build_info.py")


def libraries() -> list[Path]:
    return [PACKAGE / "_ops.so", PACKAGE / "_xla.so", *PACKAGE.glob("_core*.so"), *PACKAGE.glob("_cuda.so")]


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme_example_runs(tmp_path):
    assert run_python(README_EXAMPLE, folder=tmp_path).splitlines()[-1].startswith("(256, 30, 30, 16)")
    assert (tmp_path / "model.keras").exists()


def test_every_folder_of_the_package_is_packaged():
    listed = re.search(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert set(re.findall(r'"(.*?)"', listed)) == folders


def test_the_version_is_written_once():
    version = re.search(r'^__version__ = "(.*)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE).group(1)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    for path in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md"):
        assert version not in (ROOT / path).read_text()


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name.split(".")[0])
def test_library_exports_nothing_and_is_stripped(library):
    """But what it is opened for."""
    exported = run("nm", "-D", "--defined-only", library).split()[2::3]
    meant = {"_core": "PyInit__core", "_cuda": r"fcb_cuda_\w+", "_ops.": "none", "_xla.": "fusedconvbn_xla_error"}[
        library.name[:5]
    ]
    assert [name for name in exported if not re.fullmatch(meant, name)] == []
    assert run("nm", library) == ""


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name.split(".")[0])
def test_library_names_no_folder_of_this_machine(library):
    content = library.read_bytes()
    for folder in (ROOT, Path(sys.prefix).resolve(), Path.home()):
        assert f"{folder}/".encode() not in content
    assert "PATH" not in re.findall(r"\((\w+)\)", run("readelf", "-d", library))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by `pip wheel .` from a copy of the sources that then is gone."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ".", cwd=folder / "source")
    shutil.rmtree(folder / "source")
    return next(folder.glob("*.whl"))


def environment(folder: Path, requirement: str) -> Path:
    """The Python of a new environment that has `requirement`."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", requirement)
    return python


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name.removeprefix("fusedconvbn/") for name in names if name.startswith("fusedconvbn/")}
    assert packaged == {path.name for path in (*PACKAGE.glob("*.py"), *libraries(), PACKAGE / "py.typed")}
    assert all(re.match(r"fusedconvbn(-[\d.]+\.dist-info)?/", name) for name in names)
    assert re.search(r"-cp3\d+-cp3\d+-linux_\w+\.whl$", wheel.name)


@pytest.mark.slow
def test_wheel_runs_the_readme_example(wheel, tmp_path):
    python = environment(tmp_path / "environment", f"{wheel}[cpu]")
    assert run(python, "-c", README_EXAMPLE, cwd=tmp_path).splitlines()[-1].startswith("(256, 30, 30, 16)")


@pytest.mark.slow
def test_wheel_without_tensorflow(wheel, tmp_path):
    python = environment(tmp_path / "environment", str(wheel))
    assert run(python, "-c", RAW_EXAMPLE, cwd=tmp_path).strip() == "[18. 18. 18. 18.]"
