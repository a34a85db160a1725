"""What one measurement is about; travels between processes, so it holds no TensorFlow."""

from __future__ import annotations

import dataclasses
import math

from benchmarks.cases import Case
from benchmarks.implementations import RUN_TIME_SWITCH, TRAIN_STEP

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

    @property
    def copies(self) -> int:
        """Layers in one graph, each with inputs of its own: a call of a tf.function costs 0.1-0.45 ms by itself."""
        return 8 if self.batch == 1 else 1

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


def problems_of(case: Case, mode: str, **common: object) -> list[Problem]:
    """The problems that `mode` makes of a layer: one, or one for each position of the run-time switch."""
    positions = {"inference": (False,), RUN_TIME_SWITCH: (True, False)}.get(mode, (True,))
    return [Problem(case, mode=mode, training=training, **common) for training in positions]  # type: ignore[arg-type]
