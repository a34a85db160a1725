"""The one list of what is measured, without importing TensorFlow: names, modes, and where each layer is built."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

INFERENCE, TRAIN_FORWARD, TRAIN_STEP, RUN_TIME_SWITCH = MODES = (
    "inference",
    "train-forward",
    "train-step",
    "run-time-switch",
)
_STATIC = (INFERENCE, TRAIN_FORWARD, TRAIN_STEP)  # the mode is known when the graph is traced


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute a layer."""

    name: str
    layer: str  # "module:function", called as function(problem, weights) -> workload.Layer
    what: str
    modes: tuple[str, ...] = _STATIC
    default_modes: tuple[str, ...] = _STATIC  # measured in these unless --baseline chooses
    jit: bool = False  # compiled by XLA
    frozen: bool = False  # its variables become constants

    def load(self) -> Callable[..., Any]:
        """The function that `layer` names."""
        module, _, function = self.layer.partition(":")
        return getattr(importlib.import_module(module), function)


OURS = Implementation(
    "fusedconvbn",
    "benchmarks.layers:ours",
    "fusedconvbn.fused_conv_bn, one op; tf.Variables, the moving statistics assigned in training",
    modes=MODES,
)

BASELINES = (
    Implementation(
        "frozen",
        "benchmarks.layers:raw",
        "the raw graph with its variables turned into constants, called through a tf.function",
        modes=(INFERENCE,),
        default_modes=(INFERENCE,),
        frozen=True,
    ),
    Implementation(
        "raw",
        "benchmarks.layers:raw",
        "tf.nn.conv2d + fused_batch_norm (+ add + activation) in one tf.function, tf.Variables, grappler on",
    ),
    Implementation(
        "keras",
        "benchmarks.layers:keras_layers",
        "Keras 3 Conv2D or DepthwiseConv2D + BatchNormalization (+ Add) + Activation under one tf.function",
    ),
    Implementation(
        "moments",
        "benchmarks.layers:moments",
        "tf.nn.conv2d + tf.nn.moments + tf.nn.batch_normalization (+ add + activation), written by hand",
        modes=MODES,
        default_modes=MODES,
    ),
    Implementation(
        "cond",
        "benchmarks.layers:cond",
        "tf.nn.conv2d + two fused_batch_norm subgraphs, one for each mode, under tf.cond",
        modes=(RUN_TIME_SWITCH,),
        default_modes=(RUN_TIME_SWITCH,),
    ),
    Implementation(
        "xla",
        "benchmarks.layers:raw",
        "the raw function under jit_compile=True (slow to compile: only on request)",
        default_modes=(),
        jit=True,
    ),
    Implementation(
        "conv",
        "benchmarks.layers:bare_conv",
        'tf.nn.conv2d alone, the reference line: "batch norm for free" is a ratio of 1.0',
        modes=MODES,
        default_modes=MODES,
    ),
)


def choose(mode: str, names: Sequence[str] | None) -> list[Implementation]:
    """The baselines called `names`, or the default ones of `mode`; a ValueError where a name does not fit."""
    known = {baseline.name: baseline for baseline in BASELINES if mode in baseline.modes}
    if names is None:
        return [baseline for baseline in known.values() if mode in baseline.default_modes]
    for name in names:
        if name not in known:
            raise ValueError(f"--baseline must be of {', '.join(known)} for --mode {mode}. Received: {name!r}")
    return [known[name] for name in dict.fromkeys(names)]
