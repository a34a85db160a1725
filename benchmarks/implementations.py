"""The one list of what is measured, without importing TensorFlow: names, modes, and where each layer is built."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
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
    networks: bool = True  # computes what a layer computes, so that networks can be made of it
    default_networks: bool = False  # measured in whole networks unless --baseline chooses
    jit: bool = False  # compiled by XLA
    frozen: bool = False  # its variables become constants
    worker: str = ""  # a measured.Measured in a process without TensorFlow, as "module:Class"
    packages: tuple[str, ...] = ()  # what a peer needs

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

FROZEN = dataclasses.replace(OURS, what="fusedconvbn.fused_conv_bn, its variables turned into constants", frozen=True)

BASELINES = (
    Implementation(
        "frozen",
        "benchmarks.layers:raw",
        "the raw graph with its variables turned into constants, called through a tf.function",
        modes=(INFERENCE,),
        default_modes=(INFERENCE,),
        default_networks=True,
        frozen=True,
    ),
    Implementation(
        "folded",
        "benchmarks.layers:folded",
        "batch norm folded by hand into the filters: conv2d + bias_add (+ add + activation), frozen",
        modes=(INFERENCE,),
        default_modes=(),
        default_networks=True,
        frozen=True,
    ),
    Implementation(
        "raw",
        "benchmarks.layers:raw",
        "tf.nn.conv2d + fused_batch_norm (+ add + activation) in one tf.function, tf.Variables, grappler on",
        default_networks=True,
    ),
    Implementation(
        "keras",
        "benchmarks.layers:keras_layers",
        "Keras 3 Conv2D or DepthwiseConv2D + BatchNormalization (+ Add) + Activation under one tf.function",
        default_networks=True,
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
        networks=False,
    ),
    Implementation(
        "xla",
        "benchmarks.layers:raw",
        "the raw function under jit_compile=True (slow to compile: only on request)",
        default_modes=(),
        jit=True,
    ),
    Implementation(
        "ours_xla",
        "benchmarks.layers:ours",
        "fusedconvbn's op under jit_compile=True: a ratio of 1.0 is XLA costing nothing (only on request)",
        modes=MODES,
        default_modes=(),
        jit=True,
    ),
    Implementation(
        "kernels",
        "",
        "fusedconvbn's own kernels called bare, without TensorFlow: a ratio of 1.0 is an op that costs nothing",
        default_modes=(),
        networks=False,
        worker="benchmarks.kernel_calls:MeasuredKernels",
    ),
    Implementation(
        "conv",
        "benchmarks.layers:bare_conv",
        'tf.nn.conv2d alone, the reference line: "batch norm for free" is a ratio of 1.0',
        modes=MODES,
        default_modes=MODES,
        networks=False,
    ),
)


_PEER = "benchmarks.peers.engine:MeasuredPeer"  # `layer` is its engine

PEERS = (
    Implementation(
        "onnxruntime",
        "benchmarks.peers.onnxruntime_engine:OnnxRuntime",
        "ONNX Runtime, CPU provider, all graph optimizations, bound memory",
        worker=_PEER,
        packages=("onnx", "onnxruntime"),
    ),
    Implementation(
        "openvino",
        "benchmarks.peers.openvino_engine:OpenVino",
        "OpenVINO, CPU plugin, one stream, NHWC images",
        worker=_PEER,
        packages=("onnx", "openvino"),
    ),
    Implementation(
        "torch",
        "benchmarks.peers.torch_engine:Torch",
        "PyTorch, traced, frozen, optimized for inference, channels_last",
        worker=_PEER,
        packages=("torch",),
    ),
    Implementation(
        "ncnn",
        "benchmarks.peers.ncnn_engine:Ncnn",
        "ncnn, one Convolution with activation, an image a call; batch norm folded by hand",
        networks=False,
        worker=_PEER,
        packages=("ncnn",),
    ),
)


def choose_ours(freeze: bool, others: Sequence[Implementation]) -> Implementation:
    """Frozen or with variables; a ValueError where one of the `others` would be at a disadvantage."""
    for other in others if freeze else ():
        if not other.frozen and not other.worker:
            raise ValueError(f"--freeze is for what is frozen as well, and peers. Received: --baseline {other.name}")
    return FROZEN if freeze else OURS


def choose_peers(mode: str, names: Sequence[str], network: bool) -> list[Implementation]:
    """The peers called `names`; a ValueError where one does not fit or its package is not installed."""
    known = {peer.name: peer for peer in PEERS if peer.networks or not network}
    if names and mode != INFERENCE:
        raise ValueError(f"--peer is for --mode {INFERENCE}. Received: --mode {mode}")
    for name in names:
        if name not in known:
            raise ValueError(f"--peer must be of {', '.join(known)}{' for a network' * network}. Received: {name!r}")
        missing = [package for package in known[name].packages if importlib.util.find_spec(package) is None]
        if missing:
            raise ValueError(
                f"--peer {name} needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}, or "
                "all peers with pip install -e '.[peers]' in the clone"
            )
    return [known[name] for name in dict.fromkeys(names)]


def choose(mode: str, names: Sequence[str] | None, network: bool = False) -> list[Implementation]:
    """The baselines called `names`, or the default ones of `mode` for layers or for whole networks; a ValueError where
    a name does not fit.
    """
    fitting = (each for each in BASELINES if mode in each.modes and (each.networks or not network))
    known = {baseline.name: baseline for baseline in fitting}
    if names is None:
        return [each for each in known.values() if (each.default_networks if network else mode in each.default_modes)]
    for name in names:
        if name not in known:
            what = f"--mode {mode}" + (" of a network" if network else "")
            raise ValueError(f"--baseline must be of {', '.join(known)} for {what}. Received: {name!r}")
    return [known[name] for name in dict.fromkeys(names)]
