"""What one measurement is about; travels between processes, so it holds no TensorFlow."""

from __future__ import annotations

import dataclasses
import math

from benchmarks.cases import Case
from benchmarks.implementations import INFERENCE, RUN_TIME_SWITCH, TRAIN_STEP
from benchmarks.networks import outline

EPSILON, MOMENTUM = 1e-3, 0.99  # Keras's defaults, for everybody

DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer in a mode: the same for every implementation."""

    case: Case
    batch: int
    dtype: str
    mode: str
    training: bool  # in run-time-switch: the position of the switch
    algorithm: str = "auto"
    save: str = "conv"
    copies: int = 1  # layers in one graph, each with inputs of its own

    @property
    def times(self) -> int:
        """How often the network holds it."""
        return self.case.times

    @property
    def spec(self) -> str:
        """What --shape takes."""
        return self.case.spec()

    @property
    def name(self) -> str:
        if self.mode != RUN_TIME_SWITCH:
            return self.case.name
        return f"{self.case.name} ({'training' if self.training else 'inference'})"

    @property
    def pixels(self) -> int:
        """Elements a channel of the output."""
        return math.prod(self.case.output_shape(self.batch)[:3])

    @property
    def flops(self) -> int:
        """Of direct convolutions: the forward one, and in a training step two more of the same size."""
        return self.case.forward_flops(self.batch) * (3 if self.mode == TRAIN_STEP else 1)


@dataclasses.dataclass(frozen=True)
class NetworkProblem:
    """A whole network in a mode."""

    name: str
    image: int  # height and width
    width: float  # share of the network's channels
    batch: int
    dtype: str
    mode: str
    algorithm: str = "auto"
    save: str = "conv"

    copies = times = 1

    @property
    def training(self) -> bool:
        return self.mode != INFERENCE

    @property
    def spec(self) -> str:
        return f"{self.image}x{self.image}x3 width={self.width:g}"

    @property
    def cases(self) -> list[Case]:
        """Its convolutions."""
        return outline(self.name, self.image, self.width).cases

    @property
    def flops(self) -> int:
        """Of the convolutions, direct, and of the classifier; three times as many in a training step."""
        notes = outline(self.name, self.image, self.width)
        forward = sum(case.forward_flops(self.batch) for case in notes.cases) + self.batch * notes.dense_flops
        return forward * (3 if self.mode == TRAIN_STEP else 1)

    def layer(self, case: Case) -> Problem:
        """One of its convolutions."""
        return Problem(case, self.batch, self.dtype, self.mode, self.training, self.algorithm, self.save)


AnyProblem = Problem | NetworkProblem

_MOST_COPIES_OF_ONE_IMAGE, _MOST_COPIES = 8, 4  # the latter for the sake of memory
_LARGE_FLOPS = 16e9  # of all copies of a batch: many times what a call costs, 0.1-0.45 ms of a tf.function


def problems_of(case: Case, mode: str, batch: int, **common: object) -> list[Problem]:
    """The problems that `mode` makes of a layer: one, or one for each position of the run-time switch."""
    positions = {INFERENCE: (False,), RUN_TIME_SWITCH: (True, False)}.get(mode, (True,))
    problems = [Problem(case, batch, mode=mode, training=training, **common) for training in positions]  # type: ignore[arg-type]
    return [dataclasses.replace(problem, copies=_copies(problem)) for problem in problems]


def _copies(problem: Problem) -> int:
    if problem.batch == 1:
        return _MOST_COPIES_OF_ONE_IMAGE
    return int(max(1, min(_MOST_COPIES, _LARGE_FLOPS // problem.flops)))
