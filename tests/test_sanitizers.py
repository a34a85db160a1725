"""The core under AddressSanitizer and UndefinedBehaviorSanitizer: tests of `raw` run on a build of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++")


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


def runtime(name: str) -> str:
    return run(CXX, f"-print-file-name={name}").strip()


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory) -> Path:
    """A folder with the package, whose `_core` is instrumented, and the tests."""
    folder = tmp_path_factory.mktemp("sanitizers")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py")
    for part in ("fusedconvbn", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    cmake = [sys.executable, "-m", "cmake"]
    options = {
        "FUSEDCONVBN_SANITIZE": "address,undefined",
        "FUSEDCONVBN_TF": "OFF",
        "FUSEDCONVBN_OUTPUT": folder / "fusedconvbn",
        "Python_EXECUTABLE": sys.executable,
    }
    run(*cmake, "-S", ROOT, "-B", folder / "build", *[f"-D{name}={value}" for name, value in options.items()])
    run(*cmake, "--build", folder / "build", "-j", os.cpu_count())
    return folder


# Python itself must find the runtime already there; libstdc++ too, or exceptions cannot be intercepted. Python keeps
# memory until it exits, which is no leak of ours.
def run_instrumented(folder: Path, *arguments: object) -> str:
    return run(
        *[sys.executable, *arguments],
        cwd=folder,
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=str(folder),  # before this package, which may be installed
    )


@pytest.mark.slow
def test_the_core_is_instrumented(instrumented):
    """Else the next test would pass whatever the core does."""
    script = "import fusedconvbn._core, sys; print(fusedconvbn._core.__file__); print(open('/proc/self/maps').read())"
    loaded = run_instrumented(instrumented, "-c", script)
    assert loaded.startswith(str(instrumented))
    assert "libubsan" in loaded
    assert b"__asan_report_store" in next(instrumented.glob("fusedconvbn/_core*.so")).read_bytes()


SUITES = ("test_raw*.py", "test_numerics*.py", "test_determinism_raw.py", "test_plan.py")


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_suite(instrumented, suite):
    """Without the tests that compare with TensorFlow, whose own code is not at stake."""
    files = sorted((instrumented / "tests").glob(suite))
    assert files
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-k", "not stock and not tensorflow"]
    printed = run_instrumented(instrumented, *arguments, "--rootdir", instrumented, *files)
    assert " passed" in printed.splitlines()[-1]
