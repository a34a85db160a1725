"""Graphs that random ones found folding to fail on, or that are too rare among those; FOUND has them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from fold_nets import Net, channels
from fold_random_graphs import RandomGraph

v1 = tf.compat.v1

SHAPE = [2, 4, 4, 2]


class Exact(Net):
    """Weights of float64, and batch norms that are numbered."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = 0

    def keep(self, kind: str, value: np.ndarray) -> Any:
        self.count += 1
        return self.store(f"{kind}_{self.count}", np.asarray(value, "float64"))

    def norm(self, x: Any, axis: int = -1, **arguments: bool) -> Any:
        self.norms += 1
        with tf.name_scope(f"norm_{self.norms}"):
            s = self.statistics(x.shape[axis], **arguments)
            gamma, beta, mean, variance = (tf.reshape(v, [-1] + [1] * (-1 - axis)) for v in s)
            return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)

    def conv(self, x: Any, filters: int = 4, **arguments: Any) -> Any:
        arguments = {"strides": 1, "padding": "SAME", **arguments}
        return tf.nn.conv2d(x, self.kernel(3, 3, channels(x), filters), **arguments)


def bias_before_split_and_concat(net: Exact, x: Any) -> list[Any]:
    """Both parts of the concatenation come from one bias."""
    parts = tf.split(tf.nn.bias_add(net.conv(x), net.bias(4)), 2, 3)
    return [net.norm(tf.concat(parts[::-1], 3))]


def norms_of_a_split(net: Exact, x: Any) -> list[Any]:
    """Their outputs are the graph's; each then is a part of the split."""
    return [net.norm(part) for part in tf.split(net.conv(x), 2, 3)]


def scaling_before_padded(net: Exact, x: Any) -> list[Any]:
    """One channel: a norm that only scales, and one that shifts, before a convolution that pads."""
    x = net.norm(tf.reduce_sum(x, -1, keepdims=True), shift=False)
    return [net.conv(net.norm(tf.transpose(x, [0, 2, 1, 3])))]


def kernel_as_output(net: Exact, x: Any) -> list[Any]:
    kernel = net.kernel(3, 3, 2, 4)
    return [net.norm(tf.nn.conv2d(x, kernel, 1, "SAME")), kernel]


def scalar_between_transposed(net: Exact, x: Any) -> list[Any]:
    """A number is added to channels that come first."""
    z = tf.transpose(net.conv(x), [0, 3, 1, 2]) + net.keep("scalar", np.asarray(3.0))
    return [net.norm(tf.reshape(z, [-1, 4, 16]), -2)]


def square(net: Exact, x: Any) -> list[Any]:
    """The batch norm is read twice by one op."""
    y = net.norm(net.conv(x))
    return [y * y]


def one_inverse(net: Exact, x: Any) -> list[Any]:
    """Two batch norms of one square root, added."""
    s = net.statistics(4)
    inverse, parts = tf.math.rsqrt(s.variance + 1e-3) * s.gamma, []
    for _ in range(2):
        net.norms += 1
        z = net.conv(x)
        with tf.name_scope(f"norm_{net.norms}"):
            parts.append(z * inverse + s.beta)
    return [parts[0] + parts[1]]


FOUND: dict[str, Callable[[Exact, Any], list[Any]]] = {
    build.__name__: build
    for build in (
        bias_before_split_and_concat, norms_of_a_split, scaling_before_padded, kernel_as_output,
        scalar_between_transposed, square, one_inverse,
    )
}  # fmt: skip


def found(name: str) -> RandomGraph:
    """One of them."""
    net = Exact()
    with tf.Graph().as_default() as graph:
        outputs = FOUND[name](net, v1.placeholder("float64", [None, *SHAPE[1:]], name="input"))
        graph_def = graph.as_graph_def()
    names, feeds = [output.name for output in outputs], {"input:0": np.random.default_rng(9).normal(size=SHAPE)}
    alone = set() if name in ("scaling_before_padded", "one_inverse") else {*range(1, net.norms + 1)}
    return RandomGraph(graph_def, ["input:0"], names, feeds, "float64", net.norms, alone)
