"""Problems drawn by a seed, and the runs that bring every kernel that supports one to run on it.

Sizes lie on, and one off, the multiples of register tiles and vectors; a draw is of one of the kinds that kernels are
made for, all else is drawn freely. Nothing here names a kernel: the rows of `raw.kernels()` are tried one by one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from cases import ACTIVATIONS, Case, input_size, window

from fusedconvbn import raw

TILES = (1, 2, 4, 6, 8, 12, 16, 32, 48, 64, 96)
PRIMES = (2, 3, 5, 7, 11, 13, 17, 23, 29, 37, 53, 61, 97, 127)
SMALL_FILTERS = ((3, 3), (3, 3), (5, 5), (1, 3), (3, 1), (2, 2), (1, 7), (7, 7), (4, 3), (1, 1))
STRIDES = ((1, 1), (1, 1), (2, 2), (2, 2), (1, 2), (2, 1), (3, 1), (3, 3))
DILATIONS = ((1, 1), (1, 1), (1, 1), (2, 2), (1, 3), (2, 1))


@dataclass(frozen=True)
class Draw:
    """A problem, and how it is called: arrays begin `offset` elements behind a cache line, filters may be packed."""

    case: Case
    offset: int = 0
    needs_inputs: bool = True
    needs_filters: bool = True
    packed: bool = False  # before forward, where the kernel can

    def __str__(self) -> str:
        """As an expression that gives it again."""
        case = ", ".join(
            f"{field.name}={value!r}"
            for field in fields(Case)
            if (value := getattr(self.case, field.name)) != field.default
        )
        own = "".join(f", {f.name}={v}" for f in fields(Draw)[1:] if (v := getattr(self, f.name)) != f.default)
        return f"Draw(Case({case}){own})"


def draw(seed: int, work: int = 1_200_000) -> Draw:
    """The problem of a seed, of at most `work` multiply-adds forward."""
    rng = random.Random(seed)
    kind = rng.choices(list(KINDS), KINDS.values())[0]
    case, training = kind(rng), rng.random() < 0.6
    case = replace(
        case, dtype=rng.choices(("f32", "bf16", "f16", "f64"), (5, 2, 2, 1))[0],
        data_format=rng.choices(("NHWC", "NCHW"), (7, 3))[0], activation=rng.choice(ACTIVATIONS),
        residual=rng.random() < 0.5, training=training, unbiased=training and rng.random() < 0.25,
        epsilon=rng.choice((1e-3, 1e-5)), momentum=rng.choice((0.9, 0.99, 0.0, 1.0)), padding=_padding(rng, case),
        inputs_mean=rng.choices((0.0, 10.0, 300.0), (8, 1, 1))[0],
    )  # fmt: skip
    if kind in TRAINED:
        drawn = rng.random()
        trained = next((attributes for below, attributes in TRAINED[kind].items() if drawn < below), {})
        case = replace(case, **trained)
    case = _sized(rng, case, work)
    if case.dtype == "f16":
        case = replace(case, inputs_mean=min(case.inputs_mean, 10.0))  # or d_filters would overflow
    needs = rng.choices(((True, True), (True, False), (False, True)), (8, 1, 1))[0]
    return Draw(case, rng.choice((0, 0, 0, 1, 3, 8)), *needs, rng.random() < 0.5)


def _size(rng: random.Random, most: int = 128) -> int:
    """Around a multiple of a tile, or a prime."""
    if rng.random() < 0.2:
        size = rng.choice(PRIMES)
    else:
        size = rng.choice(TILES) * rng.choice((1, 1, 1, 2, 3)) + rng.choice((-1, 0, 0, 0, 1))
    return max(1, min(size, most))


def _dense(rng: random.Random) -> Case:
    kernel, strides, dilations = rng.choice(SMALL_FILTERS), rng.choice(STRIDES), rng.choice(DILATIONS)
    return Case(in_channels=_size(rng), out_channels=_size(rng), kernel=kernel, strides=strides, dilations=dilations)


def _pointwise(rng: random.Random) -> Case:
    strides = rng.choices(((1, 1), (2, 2), (1, 3)), (8, 2, 1))[0]
    return Case(in_channels=_size(rng), out_channels=_size(rng, 256), kernel=(1, 1), strides=strides)


def _expanding(rng: random.Random) -> Case:
    in_channels = _size(rng, 64)
    return Case(
        in_channels=in_channels, out_channels=in_channels * rng.choice((2, 4)) + rng.choice((0, 0, 1)), kernel=(1, 1)
    )


def _half_precision(rng: random.Random) -> Case:
    return rng.choice((_dense, _pointwise))(rng)


def _three_by_three(rng: random.Random) -> Case:
    return Case(in_channels=_size(rng), out_channels=_size(rng), kernel=(3, 3))


def _grouped(rng: random.Random) -> Case:
    groups = rng.choice((2, 3, 4, 8))
    return replace(
        _dense(rng), in_channels=groups * _size(rng, 33), out_channels=groups * _size(rng, 33), groups=groups
    )


def _depthwise(rng: random.Random) -> Case:
    channels = _size(rng, 200)
    multiplier = rng.choices((1, 2, 3, 4), (6, 2, 1, 1))[0]
    dilations = rng.choices(((1, 1), (2, 2), (1, 3)), (5, 1, 1))[0]
    return replace(
        _dense(rng), in_channels=channels, out_channels=channels * multiplier, groups=channels, dilations=dilations
    )


def _first_layer(rng: random.Random) -> Case:
    kernel, strides = rng.choice((((7, 7), (2, 2)), ((3, 3), (2, 2)), ((3, 3), (1, 1)), ((5, 5), (1, 1))))
    return Case(in_channels=rng.choice((1, 2, 3, 3, 3, 4)), out_channels=_size(rng, 97), kernel=kernel, strides=strides)


KINDS = {
    _dense: 3, _pointwise: 3, _expanding: 5, _half_precision: 3, _three_by_three: 5, _grouped: 2, _depthwise: 4,
    _first_layer: 2,
}  # fmt: skip
TRAINED = {  # as networks train them, by a number below which they are drawn: there are kernels for just that
    _expanding: {
        0.45: {"dtype": "f32", "data_format": "NHWC", "training": True, "padding": "SAME"},
        0.7: {"dtype": "bf16", "data_format": "NHWC", "training": True, "activation": "relu"},
    },
    _half_precision: {0.7: {"dtype": "bf16", "data_format": "NHWC", "training": True}},
}


def _padding(rng: random.Random, case: Case) -> Any:
    kind = rng.choices(("SAME", "VALID", "explicit"), (4, 2, 2))[0]
    if kind != "explicit":
        return kind
    return tuple((rng.randint(0, size), rng.randint(0, size)) for size in window(case))


def _sized(rng: random.Random, case: Case, work: int) -> Case:
    """With a batch and an image; of a few the batch or the output is empty, or a single pixel."""
    shape = [rng.choice((1, 1, 2, 3, 5)), _size(rng, 97), _size(rng, 97)]
    each = math.prod(case.kernel) * case.in_channels * case.out_channels // case.groups
    while math.prod(shape) > max(1, work // each):
        largest = shape.index(max(shape))
        shape[largest] = max(1, shape[largest] * 2 // 3)
    odd = rng.random()
    if odd < 0.03:
        shape = [1, 1, 1]
    batch, *output = [0, *shape[1:]] if 0.03 <= odd < 0.06 else shape
    remainder = rng.choice((0, 1))
    height, width = (input_size(case, axis, output[axis], remainder) for axis in (0, 1))
    if 0.06 <= odd < 0.1 and window(case)[0] > 1:
        # no position for the filter
        case, height, width = replace(case, padding="VALID"), window(case)[0] - 1, max(width, window(case)[1])
    return replace(case, batch=batch, height=height, width=width)


class Run(NamedTuple):
    """A direction of a draw by a plan: a forced row runs among others, whose `algorithm` is its own."""

    direction: str
    kernel: str | None
    isa: str | None
    algorithm: str
    save: str
    saved: str  # what forward leaves for backward
    planned: tuple[str, ...]  # rows

    @property
    def forced(self) -> dict[str, str | None]:
        """As arguments of `raw.forward` or `raw.backward`."""
        return {"kernel": self.kernel, "isa": self.isa, "algorithm": self.algorithm, "save": self.save}

    @property
    def transforms(self) -> str:
        """The algorithm by whose error the results are to be measured."""
        return max(map(algorithm_of, self.planned), default="direct")

    @property
    def start(self) -> str:
        """What backward starts from, as `raw_problem.Problem` names it."""
        again = self.saved in ("nothing", "moments")
        return "conv" if self.direction == "forward" else "again" if again else self.saved

    @property
    def stores_z(self) -> bool:
        """Whether what it computes is of a rounded z, as elsewhere in training."""
        return not any(row.endswith("moments_amx") for row in self.planned)

    def __str__(self) -> str:
        chosen = "" if self.kernel else " (the plan's own choice)"
        return f"{self.direction} by {' -> '.join(self.planned)}{chosen}, save={self.save}, saved={self.saved}"


SAVES = ("conv", "recompute", "bfloat16")


def algorithm_of(row: str) -> str:
    """What the `algorithm` argument calls a row: "direct", unless it is one of Winograd's."""
    name = row.split("_")[1]
    return name if name.startswith("winograd") else "direct"


def runs(case: Case) -> Iterator[Run]:
    """Plans that force a row, of them all that hold one that none before did, and the plans that nobody forces.

    Backward starts from each of what forward may leave.
    """
    left: dict[str, str] = {}
    for save in SAVES[: 1 if not case.training else 3 if case.dtype == "f32" else 2]:
        for run in _runs(case, "forward", save, "conv"):
            left.setdefault(run.saved, save)
            yield run
    for saved, save in left.items():
        yield from _runs(case, "backward", save, saved)


def _runs(case: Case, direction: str, save: str, saved: str) -> Iterator[Run]:
    seen: set[Any] = set()
    tried = [(row.name, row.isa, algorithm_of(row.name)) for row in raw.kernels() if row.available]
    for kernel, isa, algorithm in [*tried, (None, None, "auto")]:
        run = _planned(case, Run(direction, kernel, isa, algorithm, save, saved, ()))
        wanted = (run.transforms, kernel) if kernel else run.planned
        if kernel in (None, *run.planned) and wanted not in seen:
            seen |= {(run.transforms, name) for name in run.planned} | {run.planned}
            yield run


def _planned(case: Case, run: Run) -> Run:
    """With the names of its rows, and of forward what it leaves; as it is where the forced row cannot do it."""
    try:
        plan = raw.plan(
            case.inputs_shape, case.filters_shape, dtype=case.numpy_dtype, residual=case.residual,
            direction=run.direction, saved=run.saved, **{**case.attributes, **run.forced},
        )  # fmt: skip
    except ValueError as error:
        if run.kernel and ("does not support this problem" in str(error) or "algorithm must be" in str(error)):
            return run
        raise
    saved = plan.saved if run.direction == "forward" and case.training else run.saved
    return run._replace(planned=tuple(plan.kernels), saved=saved)
