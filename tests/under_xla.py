"""Functions of the op as XLA compiles them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cases
import op_problems
import tensorflow as tf

import fusedconvbn


def jitted(function: Callable[..., Any]) -> Callable[..., list[tf.Tensor]]:
    """`results_and_gradients` of the function."""
    return tf.function(
        lambda tensors, cotangents: op_problems.results_and_gradients(function, tensors, cotangents), jit_compile=True
    )


def under_xla(
    function: Callable[..., Any], tensors: Sequence[tf.Tensor], cotangents: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """As `op_problems.results_and_gradients`."""
    return jitted(function)(tensors, cotangents)


def with_a_switch(case: cases.Case) -> Callable[..., list[tf.Tensor]]:
    """A function of `training` and what `under_xla` takes."""

    @tf.function(jit_compile=True)
    def run(switch, tensors, cotangents):
        call = op_problems.function_of(fusedconvbn.fused_conv_bn, case, training=switch)
        return op_problems.results_and_gradients(call, tensors, cotangents)

    return run


def program(case: cases.Case, platform: str | None = None, switch: tf.Tensor | None = None) -> str:
    """What XLA is given of the op and its gradients; `switch`: `training`, of which only run time tells."""

    @tf.function(jit_compile=True)
    def run(tensors, cotangents, switch):
        training = case.training if switch is None else switch
        call = op_problems.function_of(fusedconvbn.fused_conv_bn, case, training=training)
        return op_problems.results_and_gradients(call, tensors, cotangents)

    given = op_problems.arguments(case), op_problems.upstream(case), switch
    return run.experimental_get_compiler_ir(*given)(stage="hlo", platform_name=platform)
