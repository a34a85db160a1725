"""Runs CMake where setuptools would compile extensions. Everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class BuildWithCMake(build_ext):
    """Builds into the package of the wheel, or in place (`make build`, `pip install --editable`)."""

    def run(self) -> None:
        package = ROOT / "fusedconvbn" if self.inplace else Path(self.build_lib).resolve() / "fusedconvbn"
        build = ROOT / "build" / f"{'inplace' if self.inplace else 'wheel'}-{sys.implementation.cache_tag}"
        package.mkdir(parents=True, exist_ok=True)
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DFUSEDCONVBN_OUTPUT={package}"]
        # The defaults, not what an earlier build was given.
        options += ["-DFUSEDCONVBN_TF=AUTO", "-DFUSEDCONVBN_SANITIZE=", "-DFUSEDCONVBN_CUDA=AUTO"]
        options += os.environ.get("FUSEDCONVBN_CMAKE_ARGS", "").split()
        self._cmake("--log-level=NOTICE", "-S", str(ROOT), "-B", str(build), *options)
        self._cmake("--build", str(build), "-j", str(os.cpu_count() or 1))

    def _cmake(self, *arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "cmake", *arguments], check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "fusedconvbn"
        return [str(path) for path in (*package.glob("*.so"), package / "_build_info.py")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# The extension names no source: it makes setuptools run build_ext and tag the wheel for this platform.
setup(ext_modules=[Extension("fusedconvbn._core", sources=[])], cmdclass={"build_ext": BuildWithCMake})
