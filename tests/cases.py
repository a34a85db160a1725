"""The one list of problems that every test of the op runs over.

`raw_cases()` covers every pair of levels of the factors below (and, as (dtype, layout, ISA) and (channels, groups) are
factors of their own, many triples and quintuples); `op_cases()` does so without the ISA; `winograd_cases()`,
`depthwise_cases()`, `sliding_cases()` (3x3), `expanding_cases()` and `pointwise_cases()` for what Winograd's kernels,
depthwise ones, those by moments and those of 1x1 filters can do.
Sizes are those that break kernels: prime, one off a tile, smaller than any tile.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
LAYOUTS = ("NHWC", "NCHW")
ISAS, BFLOAT16_ISAS = ("generic", "avx2", "avx512"), ("avx512_bf16", "amx")  # of all types, of bfloat16 alone
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "elu", "silu", "hard_swish", "gelu")
PADDINGS = ("SAME", "VALID", ((1, 2), (0, 1)), ((0, 3), (2, 0)))
STRIDES = ((1, 1), (2, 2), (1, 2), (3, 1))
DILATIONS = ((1, 1), (2, 2), (1, 3))
KERNELS = ((1, 1), (3, 3), (5, 5), (1, 7), (2, 2), (7, 7))
MODES = ("inference", "training", "unbiased")

# (in, out, groups): dense around 8, 16 and 32 and their multiples, two groups, depthwise, depthwise with a multiplier.
CHANNELS = (
    (1, 1, 1), (1, 33, 1), (3, 8, 1), (3, 64, 1), (8, 15, 1), (15, 16, 1), (16, 17, 1), (17, 31, 1), (31, 32, 1),
    (32, 33, 1), (33, 1, 1), (64, 96, 1), (96, 3, 1), (16, 16, 1), (48, 64, 1),
    (2, 6, 2), (16, 32, 2), (34, 30, 2), (64, 32, 2), (12, 8, 4),
    (3, 3, 3), (16, 16, 16), (17, 17, 17), (33, 33, 33), (96, 96, 96),
    (1, 8, 1), (3, 6, 3), (8, 16, 8), (17, 51, 17),
)  # fmt: skip

# (batch, height, width) of the output: pixels around multiples of 6, 12 and 96, one pixel, prime sizes.
OUTPUTS = (
    (1, 1, 1), (2, 1, 1), (1, 1, 11), (1, 3, 4), (1, 1, 13), (5, 1, 5), (1, 5, 7), (2, 6, 4), (1, 5, 19), (1, 8, 12),
    (1, 1, 97), (2, 7, 7), (3, 5, 13), (1, 17, 17),
)  # fmt: skip

MAX_MULTIPLY_ADDS = 2_000_000  # of one case: the reference kernel takes a few nanoseconds for each


@dataclass(frozen=True)
class Case:
    """One problem. Sizes are in elements, pairs are (height, width)."""

    dtype: str = "f32"
    data_format: str = "NHWC"
    isa: str | None = None
    batch: int = 1
    height: int = 5
    width: int = 7
    in_channels: int = 3
    out_channels: int = 8
    groups: int = 1
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    padding: Any = "SAME"
    activation: str | None = None
    residual: bool = False
    training: bool = False
    unbiased: bool = False
    epsilon: float = 1e-3
    momentum: float = 0.9
    algorithm: str = "auto"
    inputs_mean: float = 0.0

    def __str__(self) -> str:
        """The test id."""
        padding = self.padding.lower() if isinstance(self.padding, str) else f"pad{_digits(sum(self.padding, ()))}"
        parts = [
            self.dtype, self.data_format, f"n{self.batch}h{self.height}w{self.width}c{self.in_channels}",
            f"k{self.kernel[0]}x{self.kernel[1]}x{self.out_channels}", f"g{self.groups}", f"s{_digits(self.strides)}",
            f"d{_digits(self.dilations)}", padding, self.activation or "linear", "res" if self.residual else "nores",
            ("unbiased" if self.unbiased else "train") if self.training else "infer", self.isa,
            None if self.algorithm == "auto" else self.algorithm,
            f"mean{self.inputs_mean:g}" if self.inputs_mean else None,
        ]  # fmt: skip
        return "-".join(part for part in parts if part)

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(DTYPES[self.dtype])

    @property
    def stat_dtype(self) -> np.dtype:
        """Of gamma, beta and all statistics."""
        return np.dtype(np.float64 if self.dtype == "f64" else np.float32)

    @property
    def inputs_shape(self) -> tuple[int, int, int, int]:
        return _ordered(self.data_format, self.batch, self.height, self.width, self.in_channels)

    @property
    def filters_shape(self) -> tuple[int, int, int, int]:
        return (*self.kernel, self.in_channels // self.groups, self.out_channels)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        height, width = output_size(self)
        return _ordered(self.data_format, self.batch, height, width, self.out_channels)

    @property
    def convolution(self) -> dict[str, Any]:
        """The keyword arguments that decide the convolution."""
        padding = self.padding if isinstance(self.padding, str) else [list(side) for side in self.padding]
        return {
            "strides": self.strides, "dilations": self.dilations, "padding": padding, "data_format": self.data_format,
        }  # fmt: skip

    @property
    def attributes(self) -> dict[str, Any]:
        """The keyword arguments that `fused_conv_bn`, `raw.forward` and the oracle have in common."""
        return {
            **self.convolution, "epsilon": self.epsilon, "momentum": self.momentum,
            "unbiased_moving_variance": self.unbiased, "activation": self.activation, "training": self.training,
            "algorithm": self.algorithm,
        }  # fmt: skip

    def random(self, salt: str = "") -> np.random.Generator:
        """A generator seeded by the test id."""
        return np.random.default_rng(zlib.crc32(f"{self}{salt}".encode()))


def _digits(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))


def _ordered(data_format: str, batch: int, height: int, width: int, channels: int) -> tuple[int, int, int, int]:
    return (batch, height, width, channels) if data_format == "NHWC" else (batch, channels, height, width)


def window(case: Case) -> tuple[int, int]:
    """(height, width) of the dilated filter."""
    (kh, kw), (dh, dw) = case.kernel, case.dilations
    return (kh - 1) * dh + 1, (kw - 1) * dw + 1


def output_size(case: Case) -> tuple[int, int]:
    """(height, width) of the output."""
    sizes = []
    for axis, size in enumerate((case.height, case.width)):
        stride = case.strides[axis]
        if case.padding == "SAME":
            sizes.append(-(-size // stride))
        else:
            pads = 0 if case.padding == "VALID" else sum(case.padding[axis])
            sizes.append((size + pads - window(case)[axis]) // stride + 1)
    return sizes[0], sizes[1]


@dataclass(frozen=True)
class Arrays:
    """The arguments of forward, in their order; `residual` is None unless the case has one."""

    inputs: np.ndarray
    filters: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    moving_mean: np.ndarray
    moving_variance: np.ndarray
    residual: np.ndarray | None

    def __iter__(self):
        return iter(vars(self).values())


def arrays(case: Case) -> Arrays:
    """Random arguments of a case, the same at every call: z of variance near 1, gamma of both signs."""
    rng = case.random()
    dtype, stat, channels = case.numpy_dtype, case.stat_dtype, case.out_channels
    fan_in = case.kernel[0] * case.kernel[1] * case.in_channels // case.groups
    return Arrays(
        inputs=(rng.standard_normal(case.inputs_shape) + case.inputs_mean).astype(dtype),
        filters=(rng.standard_normal(case.filters_shape) / np.sqrt(fan_in)).astype(dtype),
        gamma=(rng.uniform(0.3, 2, channels) * rng.choice([-1, 1, 1], channels)).astype(stat),
        beta=rng.standard_normal(channels).astype(stat),
        moving_mean=(0.5 * rng.standard_normal(channels)).astype(stat),
        moving_variance=rng.uniform(0.3, 2, channels).astype(stat),
        residual=rng.standard_normal(case.output_shape).astype(dtype) if case.residual else None,
    )


# As networks have them: many blocks of pixels, sums over ranges of blocks, long sums.
LAYERS = {
    "stem": Case(batch=2, height=66, width=67, kernel=(7, 7), strides=(2, 2), out_channels=64, activation="relu"),
    "expand": Case(batch=2, height=29, width=31, kernel=(1, 1), in_channels=16, out_channels=208, residual=True),
    "panels": Case(batch=2, height=20, width=21, kernel=(1, 1), in_channels=24, out_channels=144, activation="relu6"),
    "reduce": Case(batch=3, height=14, width=15, kernel=(1, 1), in_channels=515, out_channels=130, activation="silu"),
    "winograd": Case(batch=2, height=29, width=31, in_channels=40, out_channels=72, residual=True, activation="relu"),
    "many_windows": Case(height=49, width=47, in_channels=64, out_channels=528),
    "strided": Case(dtype="bf16", batch=3, height=57, width=55, in_channels=24, out_channels=40, strides=(2, 2)),
    "grouped": Case(dtype="f16", batch=2, height=33, width=35, in_channels=48, out_channels=96, groups=4),
    "depthwise": Case(batch=2, height=57, width=59, in_channels=96, out_channels=96, groups=96, activation="relu6"),
    "channels_first": Case(data_format="NCHW", batch=2, height=23, width=25, in_channels=20, out_channels=80,
                           dilations=(2, 2), activation="elu"),
    "float64": Case(dtype="f64", batch=2, height=31, width=29, in_channels=33, out_channels=65, padding="VALID"),
    "wide": Case(batch=2, height=21, width=25, kernel=(1, 1), in_channels=284, out_channels=525, activation="relu6"),
}  # fmt: skip
# Inputs or outputs above 2 MiB, in rows of whole lines: where aligned, these, gradients and z go past the caches.
STREAMED = {
    "direct": Case(batch=2, height=59, width=61, kernel=(1, 1), in_channels=16, out_channels=304, residual=True,
                   activation="relu"),
    "direct_inputs": Case(batch=2, height=59, width=61, kernel=(1, 1), in_channels=304, out_channels=16),
    "strided_inputs": Case(batch=4, height=59, width=61, kernel=(1, 1), strides=(2, 2), in_channels=304,
                           out_channels=16),
    "winograd": Case(batch=2, height=180, width=183, in_channels=5, out_channels=32, algorithm="winograd2"),
    "winograd_inputs": Case(batch=2, height=180, width=183, in_channels=32, out_channels=5, algorithm="winograd2"),
    "float64": Case(dtype="f64", height=59, width=61, kernel=(1, 1), in_channels=8, out_channels=304),
}  # fmt: skip

FACTORS: dict[str, Sequence[Any]] = {
    "target": (*itertools.product(DTYPES, LAYOUTS, ISAS), *itertools.product(("bf16",), LAYOUTS, BFLOAT16_ISAS)),
    "channels": CHANNELS,
    "output": OUTPUTS,
    "kernel": KERNELS,
    "strides": STRIDES,
    "dilations": DILATIONS,
    "padding": PADDINGS,
    "activation": ACTIVATIONS,
    "residual": (False, True),
    "mode": MODES,
    "remainder": (0, 1),
    "algorithm": ("auto",),
}
WINOGRAD = {
    "channels": tuple(channels for channels in CHANNELS if channels[2] == 1),
    "kernel": ((3, 3),), "strides": ((1, 1),), "dilations": ((1, 1),), "remainder": (0,),
    "algorithm": ("winograd2", "winograd4"),
}  # fmt: skip

# 1x1 filters with at least twice as many outputs as inputs: what the second moments of the inputs can serve.
EXPANDING = {
    "target": tuple(itertools.product(("f32", "f64"), ("NHWC",), ISAS)),
    "channels": ((1, 2, 1), (1, 33, 1), (3, 8, 1), (3, 64, 1), (8, 16, 1), (12, 24, 1), (16, 70, 1), (31, 64, 1),
                 (33, 96, 1), (48, 100, 1)),
    "kernel": ((1, 1),), "padding": ("SAME", "VALID"), "activation": (None, "relu", "relu6", "leaky_relu", "elu"),
    "mode": ("training", "unbiased"),
    "output": (*OUTPUTS, (2, 25, 28)),
}  # fmt: skip
POINTWISE = {
    **EXPANDING,
    "channels": ((1, 1, 1), (2, 1, 1), (33, 1, 1), (8, 15, 1), (16, 16, 1), (17, 31, 1), (31, 32, 1), (64, 24, 1),
                 (96, 33, 1), (144, 24, 1)),
    "strides": ((1, 1),), "activation": ACTIVATIONS,
}  # fmt: skip
# As a network's first layer: few inputs; lines of one and of several blocks of 96; whole panels of outputs and parts.
FEW_CHANNELS = {
    "channels": ((1, 1, 1), (1, 32, 1), (2, 8, 1), (2, 64, 1), (3, 31, 1), (3, 32, 1), (3, 64, 1), (3, 80, 1),
                 (4, 33, 1), (4, 96, 1), (17, 32, 1)),
    "kernel": ((7, 7), (3, 3), (1, 1), (5, 5), (1, 7), (2, 2), (11, 11)),
    "strides": ((1, 1), (2, 2), (1, 2), (3, 1), (4, 4)),
    "output": ((1, 1, 1), (2, 1, 5), (1, 3, 12), (2, 5, 13), (1, 33, 15), (3, 4, 23), (1, 7, 47), (2, 5, 96),
               (1, 3, 97), (1, 2, 201)),
}  # fmt: skip
DEPTHWISE = {
    # Around panels of 32 channels; multipliers that divide a panel, that do not, that fill one.
    "channels": ((2, 2, 2), (3, 3, 3), (16, 16, 16), (31, 31, 31), (32, 32, 32), (33, 33, 33), (96, 96, 96),
                 (3, 6, 3), (8, 16, 8), (17, 51, 17), (6, 42, 6), (3, 96, 3)),
    "strides": (*STRIDES, (2, 1), (4, 5)),
    # Besides those of OUTPUTS: several groups of lines, strips of columns, both, bands of lines.
    "output": ((1, 1, 1), (2, 1, 1), (1, 3, 4), (5, 1, 5), (2, 6, 4), (1, 8, 12), (1, 1, 97), (2, 7, 7), (3, 5, 13),
               (1, 17, 17), (1, 3, 193), (2, 37, 5), (17, 2, 3)),
}  # fmt: skip
SLIDING = {  # what windows that slide along lines in place can do, and just more than that
    **DEPTHWISE, "kernel": ((3, 3),), "dilations": ((1, 1),), "channels": tuple((c,) * 3 for c in (8, 16, 32, 48, 96)),
    "target": tuple(itertools.product(("f32", "f64", "f16", "bf16"), ("NHWC",), ISAS)),
    "padding": ("SAME", "VALID", ((1, 1), (1, 1)), ((2, 0), (1, 0)), ((0, 2), (2, 1))),
}  # fmt: skip


def _from_levels(levels: dict[str, Any]) -> Case:
    dtype, data_format, isa = levels["target"]
    in_channels, out_channels, groups = levels["channels"]
    case = Case(
        dtype=dtype, data_format=data_format, isa=isa, batch=levels["output"][0], in_channels=in_channels,
        out_channels=out_channels, groups=groups, kernel=levels["kernel"], strides=levels["strides"],
        dilations=levels["dilations"], padding=levels["padding"], activation=levels["activation"],
        residual=levels["residual"], training=levels["mode"] != "inference", unbiased=levels["mode"] == "unbiased",
        algorithm=levels["algorithm"],
    )  # fmt: skip
    height, width = (input_size(case, axis, levels["output"][1 + axis], levels["remainder"]) for axis in (0, 1))
    return replace(case, height=height, width=width)


def input_size(case: Case, axis: int, output: int, remainder: int) -> int:
    """The input size that gives `output` window positions, with `remainder` rows to spare where the stride allows."""
    span = (output - 1) * case.strides[axis] + min(remainder, case.strides[axis] - 1)
    if case.padding == "SAME":
        return span + 1
    pads = 0 if case.padding == "VALID" else sum(case.padding[axis])
    return max(1, span + window(case)[axis] - pads)


def _work(name: str, level: Any) -> int:
    """What a level of a factor contributes to the multiply-adds of the forward convolution; they multiply."""
    if name == "channels":
        return level[0] * level[1] // level[2]
    return math.prod(level) if name in ("output", "kernel") else 1


def covering(factors: dict[str, Sequence[Any]], limit: int = MAX_MULTIPLY_ADDS, seed: int = 1) -> list[Case]:
    """Cases that hold every pair of levels of any two factors, found greedily; deterministic.

    Each case starts from a pair that no case before it has, and takes for each other factor, in random order, the level
    that adds most such pairs, among those that keep the multiply-adds of the case within `limit`.
    """
    rng = random.Random(seed)
    levels = list(factors.values())
    work = [[_work(name, level) for level in factors[name]] for name in factors]
    missing = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(range(len(levels)), 2)
        for i, j in itertools.product(range(len(levels[a])), range(len(levels[b])))
    }
    cases = []
    while missing:
        chosen = _complete(dict(next(iter(missing))), work, limit, missing, rng)
        for pair in itertools.combinations(sorted(chosen.items()), 2):
            missing.pop(pair, None)
        cases.append(_from_levels({name: factors[name][chosen[i]] for i, name in enumerate(factors)}))
    return list(dict.fromkeys(cases))


def _complete(
    chosen: dict[int, int], work: list[list[int]], limit: int, missing: dict, rng: random.Random
) -> dict[int, int]:
    """{factor: level} for all factors, from a pair of them."""
    rest = [factor for factor in range(len(work)) if factor not in chosen]
    rng.shuffle(rest)
    for factor in rest:
        budget = limit // math.prod(work[other][level] for other, level in chosen.items())
        levels = [level for level, amount in enumerate(work[factor]) if amount <= budget]
        rng.shuffle(levels)
        gains = [_new_pairs((factor, level), chosen, missing) for level in levels]
        chosen[factor] = levels[gains.index(max(gains))]
    return chosen


def _new_pairs(item: tuple[int, int], chosen: dict[int, int], missing: dict) -> int:
    return sum(((item, other) if item < other else (other, item)) in missing for other in chosen.items())


@functools.cache
def raw_cases() -> list[Case]:
    """At least 600 cases, each for one ISA: for `raw`."""
    return covering(FACTORS)


@functools.cache
def op_cases() -> list[Case]:
    """At least 200 cases for the TensorFlow op, whose ISA is the machine's."""
    return covering({**FACTORS, "target": tuple(itertools.product(DTYPES, LAYOUTS, (None,)))})


@functools.cache
def winograd_cases() -> list[Case]:
    """Dense 3x3 convolutions of stride 1, by the algorithm that `algorithm` names, each for one ISA."""
    return covering({**FACTORS, **WINOGRAD}, limit=16_000_000)


@functools.cache
def expanding_cases() -> list[Case]:
    """Training of 1x1 convolutions with few inputs and many outputs, each for one ISA."""
    return covering({**FACTORS, **EXPANDING}, limit=16_000_000)


@functools.cache
def pointwise_cases() -> list[Case]:
    """Training of 1x1 convolutions of stride 1, each for one ISA."""
    return covering({**FACTORS, **POINTWISE}, limit=16_000_000)


@functools.cache
def few_channels_cases() -> list[Case]:
    """Convolutions of few input channels, each for one ISA."""
    return covering({**FACTORS, **FEW_CHANNELS}, limit=4_000_000)


@functools.cache
def depthwise_cases() -> list[Case]:
    """Convolutions of groups of one input channel, each for one ISA."""
    return covering({**FACTORS, **DEPTHWISE})


@functools.cache
def sliding_cases() -> list[Case]:
    """3x3 depthwise convolutions whose taps are neighbours, in rows of whole vectors, each for one ISA."""
    return covering({**FACTORS, **SLIDING})
