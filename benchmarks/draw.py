"""Random layers in the ranges that real networks have, for judging the choice of kernels."""

from __future__ import annotations

import math
import random

from benchmarks.cases import Case

_CHANNELS = (16, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 144, 160, 192, 224, 256, 320, 384, 480, 512, 640, 728, 768,
             832, 960, 1024)  # fmt: skip
_KINDS = {"1x1": 8, "3x3": 7, "depthwise": 3, "large": 2, "first": 1, "grouped": 1}  # and how likely
_BATCHES = (1, 1, 2, 4, 8, 16)
_SPATIAL = (7, 224)
_LARGEST_IMAGE = 224 * 224 * 64  # elements: high resolutions have few channels
_LARGEST_TENSOR = 1 << 24  # elements: 64 MiB of float32
_FLOPS = (5e6, 8e9)  # below, a call's overhead shows; above, a run takes too long


def _spatial(rng: random.Random) -> int:
    """Small sizes are as likely as large ones; every other one is a multiple of 7, as image sizes are."""
    low, high = (math.log(size) for size in _SPATIAL)
    size = round(math.exp(rng.uniform(low, high)))
    return max(7, size // 7 * 7) if rng.random() < 0.5 else size


def _candidate(rng: random.Random) -> Case:
    kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    channels, out_channels, groups = rng.choice(_CHANNELS), rng.choice(_CHANNELS), 1
    size = {"1x1": 1, "large": rng.choice((5, 7)), "depthwise": rng.choice((3, 3, 5))}.get(kind, 3)
    if kind == "first":
        channels, size, out_channels = 3, rng.choice((3, 7)), rng.choice((16, 24, 32, 64))
    if kind == "depthwise":
        groups = out_channels = channels
    if kind == "grouped":
        groups = rng.choice([g for g in (2, 4, 8, 32) if channels % g == 0])
        out_channels = channels
    spatial = _spatial(rng)
    stride = 2 if rng.random() < 0.25 else 1
    residual = stride == 1 and rng.random() < 0.2
    return Case(
        spatial, spatial, channels, size, size, out_channels, stride, groups=groups,
        activation=rng.choice((None, "relu", "relu", "relu6")), residual=residual,
    )  # fmt: skip


def _realistic(case: Case, batch: int) -> bool:
    tensors = [math.prod(case.input_shape(batch)), math.prod(case.output_shape(batch))]
    return (
        max(tensors) <= min(_LARGEST_TENSOR, batch * _LARGEST_IMAGE)
        and _FLOPS[0] <= case.forward_flops(batch) <= _FLOPS[1]
        and case.height >= case.filter_height
    )


def draw(seed: int, count: int) -> list[tuple[Case, int]]:
    """So many layers, each with a batch size; the same ones for the same seed."""
    rng = random.Random(seed)
    drawn: list[tuple[Case, int]] = []
    while len(drawn) < count:
        case, batch = _candidate(rng), rng.choice(_BATCHES)
        if _realistic(case, batch):
            drawn.append((case, batch))
    return drawn
