"""What a benchmark's worker builds in TensorFlow, and which of ours it compares."""

from __future__ import annotations

import contextlib
import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks is no part of the installed package

from benchmarks.implementations import OURS, choose, choose_ours
from benchmarks.workload import becomes_constant, looped


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_loop_in_the_graph_computes_what_it_is_told(count):
    turns, image = tf.Variable(0), tf.random.normal([200])

    def body(images: list[tf.Tensor]) -> list[tf.Tensor]:
        return [turns.assign_add(1), 2.0 * images[0]]

    done, doubled = looped(OURS, body, [[image]])(count)
    assert int(done) == int(turns) == count
    np.testing.assert_array_equal(doubled, 2 * image.numpy())


@pytest.mark.parametrize(
    ("others", "accepted"),
    [(["frozen"], True), (["frozen", "folded", "kernels"], True), (["frozen", "raw"], False), (["keras"], False)],
)
def test_ours_is_frozen_only_beside_what_is_frozen(others, accepted):
    chosen = choose("inference", others)
    assert choose_ours(False, chosen).frozen is False
    with contextlib.nullcontext() if accepted else pytest.raises(ValueError, match=r"--freeze .*Received: --baseline"):
        assert choose_ours(True, chosen).frozen


@pytest.mark.parametrize("elements", [1, 128, 129, 4096])
def test_what_a_function_would_take_for_a_constant_is_an_argument(elements):
    large, tensor = tf.random.normal([4096]), tf.random.normal([elements])
    captures = tf.function(lambda: tf.tanh(tensor), autograph=False).get_concrete_function().graph.get_operations()
    assert becomes_constant([[large], [], [tensor]]) == (captures[0].type == "Const")
