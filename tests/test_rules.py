"""Rules of this project that a machine can check."""

import re
from pathlib import Path

import pytest

from fusedconvbn import raw

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "benchmarks", "cmake", "csrc", "cuda", "docs", "examples", "fusedconvbn", "tests", "tools")
CPP = {".cc", ".cu", ".cuh", ".h", ".inl"}
SUFFIXES = CPP | {"", ".cmake", ".in", ".md", ".py", ".toml", ".txt", ".yaml"}
PRIVATE_IMPORTS = {  # nothing public tells it
    ("stock.py", "tensorflow.python.ops"),
}


def files(*folders: str) -> list[Path]:
    """Text files of the project, relative to its root."""
    apart = {"LICENSE", ".git"}  # .git is a file in a worktree
    top = [path for path in ROOT.iterdir() if not folders and path.is_file() and path.name not in apart]
    below = [path for folder in folders or FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path.relative_to(ROOT) for path in top + below if path.suffix in SUFFIXES)


def text(path: Path) -> str:
    return (ROOT / path).read_text()


def included(path: Path) -> set[str]:
    """What a C++ file includes, directly."""
    return set(re.findall(r'^\s*#include [<"](.*?)[>"]', text(path), re.MULTILINE))


def is_core(path: Path) -> bool:
    return path.suffix in CPP and path.parts[1] not in {"tf", "xla", "python", "harness"}


@pytest.mark.parametrize("path", [p for p in files("csrc", "cuda") if is_core(p)], ids=str)
def test_the_core_knows_no_framework(path):
    foreign = re.compile(r"^(tensorflow|tsl|xla|absl|pybind11|Python\.h|numpy|Eigen|unsupported/Eigen|omp\.h|thread$)")
    assert [name for name in included(path) if foreign.match(name)] == []


@pytest.mark.parametrize("unit", [p for p in files("csrc/cpu") if re.match(r"isa_.*\.cc", p.name)], ids=str)
def test_isa_units_include_no_standard_library(unit):
    """A template of it that is instantiated for AVX-512 could be linked into code for every machine."""
    pending, seen = [unit], set()
    while pending:
        path = pending.pop()
        seen.add(path)
        for name in included(path):
            local = (ROOT / path.parent / name).resolve()
            if local.exists() and local.relative_to(ROOT) not in seen:
                pending.append(local.relative_to(ROOT))
            elif not local.exists():
                assert name in {"stdint.h", "stddef.h", "cstdint", "cstddef", "immintrin.h"}, path


@pytest.mark.parametrize("path", [p for p in files("fusedconvbn") if p.suffix == ".py"], ids=str)
def test_private_modules_of_others_are_not_imported(path):
    imports = re.findall(
        r"^\s*(?:from|import) ((?:tensorflow\.python|keras\.src|tf_keras)\S*)", text(path), re.MULTILINE
    )
    assert {(path.name, name) for name in imports} <= PRIVATE_IMPORTS


def test_files_are_short():
    code = [path for path in files() if path.suffix in CPP | {".py", ".cmake"}]
    assert {str(path): lines for path in code if (lines := text(path).count("\n")) >= 400} == {}


@pytest.mark.parametrize(
    "pattern", [r"(?<![\w.])/(home|root|work|tmp|Users)/", r"\b(TODO|FIXME|XXX)\b", r"[ \t]+$", r"<{7} |>{7} "]
)
def test_no_file_contains(pattern):
    """Paths of one machine, things left undone, blanks at the end of a line, marks of a merge."""
    found = re.compile(pattern, re.MULTILINE)
    this = Path(__file__).relative_to(ROOT)
    assert [str(path) for path in files() if path != this and found.search(text(path))] == []


def test_every_kernel_is_documented():
    documented = text(Path("docs/architecture.md"))
    expanded = {
        f"{start}{isa}{end}"
        for start, isas, end in re.findall(r"`(\w+)\{(.*?)\}(\w*)`", documented)
        for isa in isas.split(",")
    } | set(re.findall(r"`(\w+)`", documented))
    assert {row.name for row in raw.kernels()} <= expanded


@pytest.mark.parametrize("path", [p for p in files() if p.suffix == ".md"], ids=str)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text(path)):
        assert (ROOT / path.parent / link).exists(), link


def test_ci_runs_make_test():
    assert text(Path(".ci/run")).rstrip().endswith("make test")
