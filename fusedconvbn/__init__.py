"""Convolution, batch normalization, residual and activation as one TensorFlow op, training and inference.

    output = activation(gamma * (conv(inputs, filters) - mean) / sqrt(variance + epsilon) + beta + residual)

`fused_conv_bn` is the op, `FusedConvBN` the Keras layer, `raw` the same kernels on NumPy arrays without TensorFlow.
For models that exist, `fuse` puts the layer in place of Keras's, `unfuse` goes back, and `fold` merges batch norms into
the convolutions of whatever was saved, for inference.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fusedconvbn import _load

if TYPE_CHECKING:
    from fusedconvbn import raw
    from fusedconvbn.folding.api import fold, inspect
    from fusedconvbn.folding.verifying import VerificationError
    from fusedconvbn.fusing import fuse, load_weights, unfuse
    from fusedconvbn.layer import FusedConvBN
    from fusedconvbn.ops import FusedConvBNOutput, fused_conv_bn

__all__ = [
    "FusedConvBN", "FusedConvBNOutput", "VerificationError", "fold", "fuse", "fused_conv_bn", "inspect", "load_weights",
    "raw", "unfuse",
]  # fmt: skip
__version__ = "0.1.0"

_EXPORTS = {
    "FusedConvBN": "layer",
    "FusedConvBNOutput": "ops",
    "VerificationError": "folding.verifying",
    "fold": "folding.api",
    "fuse": "fusing",
    "fused_conv_bn": "ops",
    "inspect": "folding.api",
    "load_weights": "fusing",
    "unfuse": "fusing",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for on first use: TensorFlow takes seconds, and `raw` does without it."""
    if name == "raw":
        return importlib.import_module("fusedconvbn.raw")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("keras", "tensorflow"):
            raise
        raise ImportError(
            f"fusedconvbn.{name} needs TensorFlow 2.21, which is not installed: "
            "`pip install tensorflow-cpu~=2.21.0` or `pip install 'tensorflow[and-cuda]~=2.21.0'`, then rebuild "
            "fusedconvbn. fusedconvbn.raw works without."
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_load.register_with_frameworks()
