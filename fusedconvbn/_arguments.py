"""Checks and normalises the arguments that `ops`, `layer` and `raw` share, so that each is accepted or refused alike.

Every function takes what the user passed and returns it in one normal form, or raises a `TypeError` (not the kind of
thing that is accepted) or a `ValueError` (the right kind, out of range) that names the argument, says what is accepted
and ends with "Received: ...". Limits that depend on more than one argument are checked by the core.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, NoReturn

ACTIVATIONS: tuple[str | None, ...] = (
    None, "relu", "relu6", "leaky_relu", "elu", "silu", "hard_swish", "gelu",
)  # fmt: skip
"""In the order of the core's `enum class Activation`."""

ALGORITHMS = ("auto", "direct", "winograd2", "winograd4")
SAVES = ("conv", "bfloat16", "recompute")
DATA_FORMATS = ("NHWC", "NCHW")

_MAX_INT = 2**63 - 1  # of the op's attributes and of the core


def refuse(error: type[Exception], name: str, accepted: str, value: Any) -> NoReturn:
    """Raises `error` in the one wording of this package."""
    raise error(f"`{name}` must be {accepted}. Received: {name}={value!r}")


def _integer(name: str, element: Any, minimum: int, accepted: str, value: Any) -> int:
    """`element` of the argument `value` as an int; NumPy's integers are accepted, bools and floats are not."""
    try:
        if isinstance(element, bool):
            raise TypeError
        result = operator.index(element)
    except TypeError:
        refuse(TypeError, name, accepted, value)
    if not minimum <= result <= _MAX_INT:
        refuse(ValueError, name, accepted, value)
    return result


def _is_sequence(value: Any) -> bool:
    """True for lists, tuples, arrays of rank 1 and the like; strings, dicts, sets and scalars are none."""
    return isinstance(value, Iterable) and hasattr(value, "__len__") and hasattr(value, "__getitem__") \
        and not isinstance(value, (str, bytes, dict)) and getattr(value, "shape", (0,)) != ()  # fmt: skip


def pair(name: str, value: Any) -> tuple[int, int]:
    """`strides`, `dilations` and the like: a positive int, or two of them, as (height, width)."""
    accepted = "a positive integer or a pair (height, width) of positive integers"
    elements = list(value) if _is_sequence(value) else [value, value]
    if len(elements) != 2:
        refuse(ValueError, name, accepted, value)
    return (_integer(name, elements[0], 1, accepted, value), _integer(name, elements[1], 1, accepted, value))


def positive_integer(name: str, value: Any) -> int:
    """A count, such as of filters: an int of at least 1."""
    return _integer(name, value, 1, "a positive integer", value)


def padding(value: Any) -> tuple[str, tuple[int, int, int, int]]:
    """("SAME" | "VALID" | "EXPLICIT", (top, bottom, left, right)); the numbers are zeros unless EXPLICIT."""
    accepted = '"SAME", "VALID" or [(top, bottom), (left, right)] with integers of at least 0'
    if isinstance(value, str):
        if value.upper() not in ("SAME", "VALID"):
            refuse(ValueError, "padding", accepted, value)
        return value.upper(), (0, 0, 0, 0)
    if not _is_sequence(value) or not all(_is_sequence(side) for side in value):
        refuse(TypeError, "padding", accepted, value)
    if [len(side) for side in value] != [2, 2]:
        refuse(ValueError, "padding", accepted, value)
    top, bottom, left, right = (_integer("padding", n, 0, accepted, value) for side in value for n in side)
    return "EXPLICIT", (top, bottom, left, right)


def _one_of(name: str, value: Any, choices: tuple[str | None, ...]) -> Any:
    accepted = "one of " + ", ".join(repr(choice) for choice in choices)
    if value is not None and not isinstance(value, str):
        refuse(TypeError, name, accepted, value)
    if value not in choices:
        refuse(ValueError, name, accepted, value)
    return value


def activation(value: Any) -> str | None:
    """One of `ACTIVATIONS`."""
    return _one_of("activation", value, ACTIVATIONS)


def data_format(value: Any) -> str:
    """One of `DATA_FORMATS`."""
    return _one_of("data_format", value, DATA_FORMATS)


def algorithm(value: Any) -> str:
    """One of `ALGORITHMS`."""
    return _one_of("algorithm", value, ALGORITHMS)


def save(value: Any) -> str:
    """One of `SAVES`."""
    return _one_of("save", value, SAVES)


def _number(name: str, value: Any, maximum: float, accepted: str) -> float:
    """`value` as a float from 0 to `maximum`; ints and NumPy's scalars are accepted, strings and bools are not."""
    if isinstance(value, (bool, str, bytes)) or getattr(value, "shape", ()) != ():
        refuse(TypeError, name, accepted, value)
    try:
        result = float(value)
    except (TypeError, ValueError):
        refuse(TypeError, name, accepted, value)
    except OverflowError:  # an int that no float holds
        refuse(ValueError, name, accepted, value)
    if not (math.isfinite(result) and 0 <= result <= maximum):
        refuse(ValueError, name, accepted, value)
    return result


def epsilon(value: Any) -> float:
    """What is added to the variance: a finite number, at least 0."""
    return _number("epsilon", value, math.inf, "a finite number, at least 0")


def momentum(value: Any) -> float:
    """The weight of the old moving statistics: a number from 0 to 1."""
    return _number("momentum", value, 1.0, "a number from 0 to 1")


def flag(name: str, value: Any) -> bool:
    """A bool, Python's or NumPy's."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        refuse(TypeError, name, "True or False", value)
    return bool(value)


def integer(name: str, value: Any, minimum: int, maximum: int) -> int:
    """An int from `minimum` to `maximum`."""
    accepted = f"an integer from {minimum} to {maximum}"
    result = _integer(name, value, minimum, accepted, value)
    return result if result <= maximum else refuse(ValueError, name, accepted, value)


def shape(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """A shape of `rank` sizes, each at least 0."""
    accepted = f"of rank {rank}, its shape a sequence of integers of at least 0"
    if not _is_sequence(value):
        refuse(TypeError, name, accepted, value)
    sizes = list(value)
    if len(sizes) != rank:
        refuse(ValueError, name, accepted, value)
    return tuple(_integer(name, size, 0, accepted, value) for size in sizes)
