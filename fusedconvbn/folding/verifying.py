"""Runs the original and the folded model on the same inputs and compares what they compute."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf

from fusedconvbn._arguments import refuse
from fusedconvbn.folding.nodes import is_float

TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
"""Of the largest difference, relative to a tensor's own maximum, by the least exact type that a model computes in."""

# An output that changes by less with another input would pass whatever is wrong: so many times its limit, or by so much
# of its maximum if that is less.
_DEPENDS, _DEPENDS_ENOUGH = 10, 0.05
_ROUNDINGS = 4  # how many times what one rounding of all weights does to a tensor all roundings may do to it
_LARGEST_NOISE = 0.05  # relative: what rounding may change by more is not compared at all
_BATCH = 2
_UNKNOWN_SIZES = (96, 224)  # pixels, tried in turn


class VerificationError(Exception):
    """The folded model does not compute what the original computes. Nothing has been written."""


@dataclass
class Comparison:
    """Of two models.

    Attributes:
        verdict: "ok", "failed", "inconclusive" or "not run".
        tolerance: That differences were held against, where rounding alone does not make larger ones.
        outputs: The difference at each output, relative to its maximum.
        sites: The same where batch norms were folded, by the names of the original's tensors.
        limits: What each of these may differ by, but for those that rounding alone changes too much to tell.
        notes: What else there is to know, such as which outputs do not depend on the input.
    """

    verdict: str
    tolerance: float = 0.0
    outputs: dict[str, float] = field(default_factory=dict)
    sites: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest difference."""
        return max([*self.outputs.values(), *self.sites.values()], default=0.0)


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference relative to the maximum of `expected`; of other types than floats the part that differs.

    Infinite for other shapes, types or non-finite values.
    """
    expected, found = np.asarray(expected), np.asarray(found)
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return np.inf
    if not is_float(expected.dtype):
        return float(np.mean(expected != found)) if expected.size else 0.0
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return np.inf
    if not finite.any():
        return 0.0
    largest = np.abs(expected[finite]).max()
    error = np.abs(expected[finite] - found[finite]).max()
    return float(error / largest) if largest else float(error)


def random_values(shape: Sequence[int], dtype: tf.DType, rng: np.random.Generator) -> np.ndarray | None:
    """Numbers to feed; None for a type of which none can be made up."""
    if dtype.is_floating:
        return rng.normal(size=shape).astype(dtype.as_numpy_dtype)
    if dtype == tf.bool:
        return rng.integers(2, size=shape).astype(bool)
    if dtype.is_integer:
        return rng.integers(256 if dtype == tf.uint8 else 4, size=shape).astype(dtype.as_numpy_dtype)
    return None


@dataclass
class Runnable:
    """A graph in a session, and what to feed to it besides inputs."""

    session: tf.compat.v1.Session
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)

    def run(self, fetches: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The values of tensors."""
        return self.session.run(list(fetches), {**feeds, **self.constants})


class Models:
    """The original, the original with training parts removed, and the folded model, to be fed alike.

    Attributes:
        inputs: The tensors that are fed.
        outputs: Those that are returned.
    """

    def __init__(
        self, original: Runnable, before: Runnable, folded: Runnable, inputs: Sequence[str], results: Mapping[str, str],
        sites: Mapping[str, str],
    ) -> None:  # fmt: skip
        """`results` and `sites` are (after, before) and (before, after): tensors of the third and of the second."""
        self._original, self._before, self._folded = original, before, folded
        self.inputs, self.outputs = list(inputs), list(results)
        self._results, self._sites = dict(results), dict(sites)

    def types(self) -> set[str]:
        """Names of the types that the original computes in."""
        operations = self._before.session.graph.get_operations()
        return {tensor.dtype.name for operation in operations for tensor in operation.outputs}

    def feeds(self, rng: np.random.Generator, batch: int, size: int) -> dict[str, np.ndarray] | None:
        """Random inputs, unknown sizes being `batch` along the first axis and `size` elsewhere."""
        made = {}
        for name in self.inputs:
            tensor = self._folded.session.graph.get_tensor_by_name(name)
            if tensor.shape.rank is None:
                return None
            shape = tensor.shape.as_list()
            sizes = [batch if i == 0 else size for i in range(len(shape))]
            value = random_values([s if d is None else d for s, d in zip(sizes, shape)], tensor.dtype, rng)
            if value is None:
                return None
            made[name] = value
        return made

    def original(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The original's outputs."""
        return self._original.run(self.outputs, feeds)

    def folded(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The folded model's outputs."""
        return self._folded.run(self.outputs, feeds)

    def before(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values at the sites and of the outputs in the original, its training parts removed."""
        return self._all_before(self._before, feeds)

    def disturbed(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same, its weights rounded once more."""
        return self._all_before(Runnable(self._before.session, disturbed(self._before.constants)), feeds)

    def after(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same in the folded model."""
        fetched = [*self._sites.values(), *self.outputs]
        return dict(zip([*self._sites, *self.outputs], self._folded.run(fetched, feeds)))

    def _all_before(self, model: Runnable, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fetched = [*self._sites, *self._results.values()]
        return dict(zip([*self._sites, *self.outputs], model.run(fetched, feeds)))

    def close(self) -> None:
        """Ends the sessions."""
        for model in (self._original, self._before, self._folded):
            model.session.close()


def compare(
    models: Any, *, tolerance: float | None = None, given: Mapping[str, np.ndarray] | None = None, dropped: bool = False
) -> Comparison:
    """Compares two models on random inputs, or on those `given`.

    Args:
        models: `Models`, or what has its methods.
        tolerance: None: of `TOLERANCES`, by the model's types.
        given: By names of inputs.
        dropped: Whether dropout was removed that the original may still do.

    Raises:
        VerificationError: The original does not run on such inputs.
        ValueError: `given` does not name the inputs.
    """
    feeds, other = _two_inputs(models, given)
    if feeds is None:
        note = "inputs of this type, or of no known rank, cannot be made up: give some by verify="
        return Comparison("inconclusive", notes=[note])
    expected, again = models.original(feeds), models.original(feeds)
    before, after = models.before(feeds), models.after(feeds)
    if tolerance is None:
        tolerance = max(TOLERANCES.get(name, 0.0) for name in {*models.types(), "float32"})
    noise = {name: _ROUNDINGS * difference(before[name], v) for name, v in models.disturbed(disturbed(feeds)).items()}
    limits = {name: max(tolerance, each) for name, each in noise.items()}
    result = Comparison("ok", tolerance)
    sites = [name for name in before if name not in models.outputs]
    result.sites = {name: difference(before[name], after[name]) for name in sites}
    is_random = any(difference(a, b) > limits[n] for n, a, b in zip(models.outputs, expected, again))
    drops = dropped and any(difference(before[n], a) > limits[n] for n, a in zip(models.outputs, expected))
    if is_random or drops:
        expected, elsewhere = ([run[name] for name in models.outputs] for run in (before, models.before(other)))
        note = "drops in inference too: compared with it without that" if dropped else "is random: not compared with it"
        result.notes.append(f"the original {note}")
    else:
        elsewhere = models.original(other)
    result.outputs = {n: difference(a, after[n]) for n, a in zip(models.outputs, expected)}
    changes = {n: difference(a, b) for n, a, b in zip(models.outputs, expected, elsewhere)}
    blind = [n for n, change in changes.items() if change < _least_change(limits[n])]
    if blind:
        result.notes.append(f"hardly depends on the input: {', '.join(blind)}")
    vague = [name for name, each in noise.items() if each > _LARGEST_NOISE]
    if vague:
        result.notes.append(f"rounding alone changes it much: {', '.join(vague[:5])}")
        limits |= dict.fromkeys(vague, np.inf)
    _judge(result, limits, inconclusive=bool(blind or vague) or (is_random and not dropped))
    return result


def _least_change(limit: float) -> float:
    return max(limit, min(_DEPENDS * limit, _DEPENDS_ENOUGH))


def _judge(result: Comparison, limits: Mapping[str, float], *, inconclusive: bool) -> None:
    """Sets the verdict."""
    found = {**result.sites, **result.outputs}
    wrong = [name for name, difference in found.items() if difference > limits[name]]
    result.limits = {name: limit for name, limit in limits.items() if np.isfinite(limit)}
    if wrong:
        result.notes.append(f"differs at {', '.join(wrong[:5])}")
    result.verdict = "failed" if wrong else "inconclusive" if inconclusive else "ok"


def disturbed(values: Mapping[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """Values that differ by as much as rounding would make them: what that does to a tensor, rounding may do to it."""
    rng = np.random.default_rng(7)
    found = dict(values)
    for name, value in values.items():
        if is_float(value.dtype):
            step = float(ml_dtypes.finfo(value.dtype).eps)
            found[name] = (value.astype(np.float64) * (1 + step * rng.uniform(-1, 1, value.shape))).astype(value.dtype)
    return found


def _two_inputs(
    models: Models, given: Mapping[str, np.ndarray] | None
) -> tuple[dict[str, np.ndarray] | None, dict[str, np.ndarray] | None]:
    """Two feeds that the original runs on; of given inputs the second is the first in another order, or random."""
    if given is not None and set(given) != set(models.inputs):
        refuse(ValueError, "verify", f"arrays for the inputs {', '.join(models.inputs)}", list(given))
    rng = np.random.default_rng(20171101)
    failure: Exception | None = None
    for size in _UNKNOWN_SIZES:
        feeds = dict(given) if given is not None else models.feeds(rng, _BATCH, size)
        if feeds is None:
            return None, None
        other = {name: rng.permuted(value.reshape(-1)).reshape(value.shape) if given is not None else None
                 for name, value in feeds.items()}  # fmt: skip
        if given is None:
            other = models.feeds(rng, _BATCH, size)
        try:
            models.original(feeds)
        except (tf.errors.OpError, ValueError, TypeError) as error:
            failure = error
        else:
            return feeds, other
    shapes = {name: value.shape for name, value in feeds.items()}
    raise VerificationError(
        f"the original does not run on random inputs of shapes {shapes}; give shapes by inputs=, data by verify=, or "
        f"verify=False: {failure}"
    ) from failure


def milliseconds(models: Models, *, rounds: int = 7, seconds: float = 3.0) -> tuple[float, float] | None:
    """Medians of one example's inference, original and folded, in turn; None if there are no inputs to feed."""
    rng = np.random.default_rng(3)
    feeds = models.feeds(rng, 1, _UNKNOWN_SIZES[0])
    if feeds is None:
        return None
    try:
        models.original(feeds), models.folded(feeds)
    except tf.errors.OpError:
        return None
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < rounds and (len(times) < 3 or time.perf_counter() - start < seconds):
        times.append((_seconds(models.original, feeds), _seconds(models.folded, feeds)))
    return tuple(float(1e3 * np.median(column)) for column in zip(*times))


def _seconds(run: object, feeds: Mapping[str, np.ndarray]) -> float:
    start = time.perf_counter()
    run(feeds)
    return time.perf_counter() - start
