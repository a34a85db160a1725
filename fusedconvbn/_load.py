"""Opens the libraries of the package when they are first needed, after checking that they fit."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARY = Path(__file__).with_name("_ops.so")
XLA_LIBRARY = Path(__file__).with_name("_xla.so")
CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")

_REBUILD = "`pip install --no-build-isolation --force-reinstall --no-deps PATH`, PATH being a clone of fusedconvbn"


@functools.cache
def ops() -> ModuleType:
    """The functions of the registered TensorFlow ops: `fused_conv_bn`, `fused_conv_bn_grad`.

    Raises:
        ImportError: The library was not built, or it was built for another minor version of TensorFlow.
    """
    import tensorflow as tf

    built_for = _build_info().TENSORFLOW_VERSION if _built("_build_info") else None
    if built_for is None or not LIBRARY.exists():
        raise _not_built("TensorFlow ops", "with TensorFlow installed, ")
    if _minor(built_for) != _minor(tf.__version__):
        raise ImportError(
            f"The TensorFlow ops of fusedconvbn were built for TensorFlow {built_for}; TensorFlow {tf.__version__} is "
            f"installed. Install a TensorFlow of that minor version, or rebuild them for this one: {_REBUILD} (in a "
            "clone: `make build`)."
        )
    return tf.load_op_library(str(LIBRARY))


@functools.cache
def xla() -> str | None:
    """Registers what XLA compiles the ops to; None, or why XLA cannot compile them.

    It uses what TensorFlow promises nothing of, so the ops do without where it fails.

    Raises:
        ImportError: As `ops`.
    """
    import tensorflow as tf

    ops()
    if not XLA_LIBRARY.exists():
        return "not built"
    try:
        tf.load_op_library(str(XLA_LIBRARY))
    except (tf.errors.OpError, OSError) as error:
        return str(error).splitlines()[0]
    why_not = ctypes.CDLL(str(XLA_LIBRARY)).fusedconvbn_xla_error
    why_not.restype = ctypes.c_char_p
    if refused := why_not().decode():
        return f"refused: {refused}"
    if tf.config.list_physical_devices("GPU") and not CUDA_LIBRARY.exists():
        return "no CUDA kernels: not built"  # XLA's own ops would do, but those widen 16-bit data
    return None


@functools.cache
def core() -> ModuleType:
    """The extension module behind `fusedconvbn.raw`.

    Raises:
        ImportError: It was not built, or for another version of Python.
    """
    if not _built("_core"):
        raise _not_built("extension module")
    return importlib.import_module("fusedconvbn._core")


@functools.cache
def cuda() -> Any:
    """The CUDA kernels, for arrays on a GPU.

    Raises:
        ImportError: They were not built.
    """
    if not CUDA_LIBRARY.exists():
        raise _not_built("CUDA kernels", "with nvcc on the PATH, ")
    return core().CudaLibrary(str(CUDA_LIBRARY))


def register_with_frameworks() -> None:
    """Registers the ops with TensorFlow and the layer with Keras: now, where these are there, else after their import.

    So a SavedModel or a `.keras` file loads wherever fusedconvbn was imported, in whichever order, though that import
    alone loads nothing.
    """
    for framework, last, register in (
        ("tensorflow", "load_op_library", _register_ops),
        ("keras", "saving", _register_layer),
    ):
        if hasattr(sys.modules.get(framework), last):
            register()
        else:
            sys.meta_path.insert(0, _AfterImport(framework, register))


def _register_ops() -> None:
    """An op library that does not fit is an error for whoever calls an op, not for whoever imports TensorFlow."""
    try:
        importlib.import_module("fusedconvbn.ops").register()
    except ImportError as error:
        warnings.warn(str(error), ImportWarning, stacklevel=2)


def _register_layer() -> None:
    """With another backend of Keras the layer is of no use: it is not worth importing TensorFlow for."""
    if sys.modules["keras"].config.backend() == "tensorflow":
        importlib.import_module("fusedconvbn.layer")


def _not_built(what: str, condition: str = "") -> ImportError:
    return ImportError(
        f"fusedconvbn: no {what}: not built. In a clone: {condition}`make build`; elsewhere: {condition}{_REBUILD}."
    )


def _built(module: str) -> bool:
    return importlib.util.find_spec(f"fusedconvbn.{module}") is not None


def _build_info() -> Any:
    return importlib.import_module("fusedconvbn._build_info")


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the finders behind it find the module `name`, and calls `action` at the end of its first import."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action, self.searching = name, action, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_act(module: ModuleType) -> None:
                load(module)
                sys.meta_path.remove(self)  # not before: who asks for a spec may import nothing
                self.action()

            spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec
