"""What tests share: what a machine without their instruction set does with them, a convolution by a variable."""

import os
import pathlib
import tempfile

import pytest

# Hypothesis would keep what it learns of the code in this folder, among the files that the rules are about.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a file's tests that want an instruction set that this machine lacks, one stays, which says so by its skip."""
    wanted = {item: isa for item in items if (isa := _isa(item))}
    available = _available() if wanted else set()
    lacking: dict[pathlib.Path, list[pytest.Item]] = {}
    for item, isa in wanted.items():
        if isa not in available:
            lacking.setdefault(item.path, []).append(item)
    for path, tests in lacking.items():
        isas = ", ".join(sorted({wanted[item] for item in tests}))
        tests[0].add_marker(pytest.mark.skip(reason=f"this machine has no {isas}: {len(tests)} tests of {path.name}"))
    removed = {item for tests in lacking.values() for item in tests[1:]}
    items[:] = [item for item in items if item not in removed]
    config.hook.pytest_deselected(items=[*removed])


def _isa(item: pytest.Item) -> str | None:
    """What the mark `isa` says, or the parameter of that name, or a parameter's attribute: a case's, a kernel's."""
    marks = [name for mark in item.iter_markers("isa") for name in mark.args]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    attributes = [getattr(value, "isa", None) for value in parameters.values()]
    return next((isa for isa in (*marks, parameters.get("isa"), *attributes) if isa), None)


def _available() -> set[str]:
    from fusedconvbn import raw

    return {row.isa for row in raw.kernels() if row.available}


@pytest.fixture(scope="session")
def cuda_host(tmp_path_factory) -> pathlib.Path:
    """The CUDA kernels for the host; FUSEDCONVBN_CUDA_HOST: where they are built already."""
    import cuda_core

    built = os.environ.get("FUSEDCONVBN_CUDA_HOST")
    return pathlib.Path(built) if built else cuda_core.build_host(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture(params=["eager", "function"])
def call(request):
    """(a function of nothing that convolves by `filters`, filters)"""
    import packed
    import tensorflow as tf

    filters = packed.variable()
    convolve = lambda: packed.output(filters)  # noqa: E731
    if request.param == "eager":
        return convolve, filters
    return tf.function(convolve, jit_compile=request.param == "xla"), filters
