"""The op on the cases of `cases.py`: arguments, results and gradients as lists, for the tests of the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cases
import compare
import numpy as np
import reference
import tensorflow as tf

import fusedconvbn

NAMES = ("inputs", "filters", "gamma", "beta", "moving_mean", "moving_variance", "residual")

# What the modes of execution are compared on; the kernels themselves are compared on `cases.op_cases()`.
TRAINING = cases.Case(batch=2, training=True, strides=(2, 1), activation="relu", residual=True)
FROZEN = replace(TRAINING, training=False, activation="silu", padding=((1, 2), (0, 1)))
NCHW = replace(TRAINING, data_format="NCHW", groups=3, out_channels=6, residual=False, activation=None)
HALF = replace(TRAINING, dtype="bf16", padding="VALID", activation="gelu", unbiased=True)
MODES = (TRAINING, FROZEN, NCHW, HALF)


def arguments(case: cases.Case) -> list[tf.Tensor]:
    """The op's tensors, without those that the case does not have."""
    return [tf.constant(array) for array in cases.arrays(case) if array is not None]


def upstream(case: cases.Case) -> list[tf.Tensor]:
    """Gradients of the three results."""
    rng = case.random("upstream")
    shapes = [case.output_shape, (case.out_channels,), (case.out_channels,)]
    types = [case.numpy_dtype, case.stat_dtype, case.stat_dtype]
    return [tf.constant(rng.standard_normal(s).astype(t)) for s, t in zip(shapes, types)]


def function_of(op: Callable[..., Any], case: cases.Case, **overrides: Any) -> Callable[..., Any]:
    """`op` with the case's attributes: a function of `arguments(case)`."""
    return lambda *tensors: op(*tensors, **{**case.attributes, **overrides})


def results_and_gradients(
    function: Callable[..., Any], tensors: Sequence[tf.Tensor], cotangents: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """The results of `function(*tensors)` and the gradients of all tensors."""
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        results = list(function(*tensors))
    return results + tape.gradient(results, list(tensors), output_gradients=list(cotangents))


def assert_as_the_oracle(run: Callable[..., Sequence[Any]], case: cases.Case, *, rounds_dz: bool = False) -> None:
    """What the op returns, and its gradients, are those of the float64 oracle.

    `run` is `results_and_gradients`, or what does the same elsewhere; `rounds_dz` as in `reference.backward`.
    """
    arrays = list(cases.arrays(case))
    expected = reference.forward(*arrays, **case.attributes)
    output_gradient, *moving_gradients = (c.numpy() for c in upstream(case))
    output_gradient = np.where(expected.near_kink, 0, output_gradient).astype(case.numpy_dtype)
    gradients = reference.backward(
        output_gradient, *arrays, moving_mean_gradient=moving_gradients[0],
        moving_variance_gradient=moving_gradients[1], rounds_dz=rounds_dz, **case.attributes,
    )  # fmt: skip
    names = fusedconvbn.FusedConvBNOutput._fields + tuple(f"gradient of {name}" for name in NAMES)
    cotangents = [tf.constant(g) for g in (output_gradient, *moving_gradients)]
    actual = run(function_of(fusedconvbn.fused_conv_bn, case), arguments(case), cotangents)
    wanted = [*expected[:3], *(g for g in gradients if g is not None)]
    assert len(actual) == len(wanted)
    for name, a, e in zip(names, actual, wanted):
        is_data = name.split()[-1] in ("output", "inputs", "filters", "residual")
        compare.assert_close(a.numpy(), e, name, case.numpy_dtype if is_data else case.stat_dtype)


def assert_same_bits(actual: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected)):
        a, e = np.asarray(a), np.asarray(e)
        assert a.dtype == e.dtype, index
        assert a.shape == e.shape, index
        assert a.tobytes() == e.tobytes(), f"result {index} differs by {np.max(np.abs(a - e))}"


def assert_close(actual: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    """Each result within `tolerance` of the largest absolute value of what is expected."""
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected)):
        a, e = np.asarray(a).astype(np.float64), np.asarray(e).astype(np.float64)
        assert a.shape == e.shape, index
        scale = max(1.0, np.max(np.abs(e), initial=0))
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale, err_msg=f"result {index}")
