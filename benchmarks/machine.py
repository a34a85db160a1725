"""What a reader needs to judge the numbers: processor, memory, versions, load."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import fusedconvbn

_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "onnxruntime", "openvino", "torch", "ncnn")
_ISAS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
_ROOT = pathlib.Path(__file__).parent.parent


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty on systems without it."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "fusedconvbn": fusedconvbn.__version__, **found}


def _revision() -> str | None:
    """The commit of this clone, "-dirty" where it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe() -> dict[str, Any]:
    """The machine at the beginning of a run."""
    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "isa": [isa for isa in _ISAS if isa in flags],
        "cores": cores(),
        "memory_bytes": pages,
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
        "versions": _versions(),
        "revision": _revision(),
    }


def in_a_line(found: dict[str, Any]) -> str:
    """What `describe` found, without the load."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['cpu']}, {found['cores']} cores, {' '.join(found['isa'])}; {versions}."
