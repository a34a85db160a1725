"""Little graphs of TensorFlow 1 for the tests of folding: random weights, as constants or as variables of each kind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from fold_files import ModelFile, random_image, run_in

v1 = tf.compat.v1

Store = Callable[[str, np.ndarray], Any]  # a name and a value to a tensor


def constant(name: str, value: np.ndarray) -> Any:
    return tf.constant(value, name=name)


def reference_variable(name: str, value: np.ndarray) -> Any:
    return v1.get_variable(name, initializer=value, use_resource=False)


def resource_variable(name: str, value: np.ndarray) -> Any:
    return v1.get_variable(name, initializer=value, use_resource=True)


def partitioned_variable(name: str, value: np.ndarray) -> Any:
    """Kernels in three parts by filters; all else in one."""
    if value.ndim < 2:
        return reference_variable(name, value)

    def part(shape: Any, dtype: Any = None, partition_info: Any = None) -> Any:
        begin = partition_info.var_offset
        return tf.constant(value[tuple(slice(b, b + n) for b, n in zip(begin, shape))], dtype)

    split = v1.fixed_size_partitioner(3, axis=value.ndim - 1)
    found = v1.get_variable(name, value.shape, initializer=part, partitioner=split, use_resource=False)
    return tf.convert_to_tensor(found)


class Statistics(NamedTuple):
    """Weights and moving statistics of a batch norm, as tensors."""

    gamma: Any
    beta: Any
    mean: Any
    variance: Any


class Net:
    """The random weights of one graph, kept in what `store` makes of them."""

    def __init__(self, store: Store = constant, seed: int = 0):
        self.store = store
        self.rng = np.random.default_rng(seed)
        self.count = 0

    def keep(self, kind: str, value: np.ndarray) -> Any:
        """A weight with a name of its own."""
        self.count += 1
        return self.store(f"{kind}_{self.count}", value.astype("float32"))

    def kernel(self, *shape: int) -> Any:
        """The weights of a convolution that about keeps its inputs' scale."""
        return self.keep("kernel", self.rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))

    def bias(self, filters: int) -> Any:
        return self.keep("bias", self.rng.normal(size=filters))

    def statistics(self, filters: int, *, positive: bool = False, shift: bool = True) -> Statistics:
        """Of both signs unless `positive`; without `shift`, mean and beta are zeros."""
        signs = np.ones(filters) if positive else np.where(np.arange(filters) % 3 == 1, -1, 1)
        gamma = signs * self.rng.uniform(0.5, 1.5, filters)
        beta, mean = (shift * self.rng.normal(size=filters) for _ in range(2))
        return self.keep_statistics(gamma, beta, mean, self.rng.uniform(0.3, 3, filters))

    def keep_statistics(self, gamma: Any, beta: Any, mean: Any, variance: Any) -> Statistics:
        names = Statistics._fields
        return Statistics(*(self.keep(name, np.asarray(x)) for name, x in zip(names, (gamma, beta, mean, variance))))


def channels(x: Any) -> int:
    """The last size, which is known."""
    return int(x.shape[-1])


def conv(net: Net, x: Any, filters: int = 6, size: int = 3, *, bias: bool = False, **arguments: Any) -> Any:
    """tf.nn.conv2d and tf.nn.bias_add."""
    arguments = {"strides": 1, "padding": "SAME", **arguments}
    z = tf.nn.conv2d(x, net.kernel(size, size, channels(x), filters), **arguments)
    return tf.nn.bias_add(z, net.bias(filters)) if bias else z


def fused(net: Net, x: Any, *, epsilon: float = 1e-3, **statistics: bool) -> Any:
    """The batch norm of most graphs: FusedBatchNormV3."""
    s = net.statistics(channels(x), **statistics)
    return v1.nn.fused_batch_norm(x, s.gamma, s.beta, s.mean, s.variance, epsilon, is_training=False)[0]


@dataclasses.dataclass(frozen=True)
class Little:
    """A graph from `input` on, and what folding has to do with it.

    `build` returns the output, or a list of outputs: `output:0`, then `output_1:0` and so on.
    """

    build: Callable[[Net, Any], Any]
    batch_norms: int = 1
    foldable: int = 1
    shape: tuple[int | None, ...] = (None, 9, 8, 4)


@contextlib.contextmanager
def session_of(little: Little, store: Store = constant, seed: int = 0) -> Iterator[tuple[Any, ModelFile]]:
    """A session with the graph and its weights, and all about it that no file is needed for."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, little.shape, name="input")
        built = little.build(Net(store, seed), x)
        for output in built if isinstance(built, list) else [built]:
            tf.identity(output, name="output")
        session.run(v1.global_variables_initializer())
        yield session, facts_of(session, little)


def facts_of(session: Any, little: Little, constants: dict[str, np.ndarray] | None = None) -> ModelFile:
    """What a file of this session's graph is to hold."""
    names = [op.name for op in session.graph.get_operations() if op.name.split("_")[0] == "output"]
    outputs = [f"{name}:0" for name in names]
    facts = ModelFile(
        path=None,
        kind="",
        inputs={"input:0": little.shape},
        outputs=outputs,
        images={"input:0": random_image(little.shape)},
        expected={},
        batch_norms=little.batch_norms,
        foldable=little.foldable,
        constants=constants or {},
    )
    return dataclasses.replace(facts, expected=run_in(session, outputs, facts.feeds))
