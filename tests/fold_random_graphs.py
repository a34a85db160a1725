"""Random graphs for the properties of folding: what a strategy draws, one operation after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import fold_norms
import numpy as np
import tensorflow as tf
from fold_nets import Net, Statistics
from hypothesis import strategies as st

v1 = tf.compat.v1

Draw = Callable[[st.SearchStrategy], Any]

_FUSED = ("fused_v1", "fused_v2", "fused_v3", "caffe_fused")
_ANY_SHAPE = ("standard", "standard_no_gamma", "standard_no_beta", "standard_neither", "spread", "swapped", "division",
              "division_only", "power", "caffe_add")  # fmt: skip
_OF_IMAGES = ("global_normalization", "global_normalization_no_scale", "caffe")


def _caffe_add(net: Net, z: Any) -> Any:
    """A normalization and a layer "scale" of elementwise operations."""
    s = net.statistics(0)
    return (z - s.mean) * tf.math.rsqrt(s.variance + 1e-5) * s.gamma + s.beta


def _constants_folded(net: Net, z: Any) -> Any:
    """What is left once constants have been folded."""
    s = net.statistics(0)
    return z * s.gamma + s.beta


NORMS = {**fold_norms.NORMS, "caffe_add": _caffe_add, "constants_folded": _constants_folded}


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor, and what the next operation has to know of it.

    `axis` is that of the channels. `norm` is "" or how the batch norm was written whose output this is.
    """

    tensor: Any
    axis: int = -1
    linear: bool = False
    norm: str = ""

    @property
    def shape(self) -> list[int]:
        return self.tensor.shape.as_list()

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 4 and self.axis == -1


@dataclasses.dataclass(repr=False)
class RandomGraph:
    """A frozen graph, what to feed it, and what folding has to tell of it.

    `alone` are the numbers of the batch norms that are not next to another one, whose nodes can thus be told apart.
    """

    graph_def: Any
    inputs: list[str]
    outputs: list[str]
    feeds: dict[str, np.ndarray]
    dtype: str
    batch_norms: int
    alone: set[int]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        small = lambda node: f"{node.name}={node.op}({', '.join(node.input)})"  # noqa: E731
        nodes = "\n  ".join(small(node) for node in self.graph_def.node)
        return f"{self.dtype} {[x.shape for x in self.feeds.values()]} -> {self.outputs}\n  {nodes}"


class RandomNet(Net):
    """Weights that a strategy chooses the kind of, and sometimes shares."""

    def __init__(self, draw: Draw, dtype: str) -> None:
        super().__init__(seed=draw(st.integers(0, 3)))
        self.draw, self.dtype = draw, dtype
        self.along: tuple[int, ...] = ()  # the shape that statistics are to have
        self.fused = False  # whether they are for an op that wants float32
        self.scales = False  # whether gammas of ones alone would be no batch norm's
        self._made: dict[Any, list[Any]] = {}

    def keep(self, kind: str, value: np.ndarray) -> Any:
        self.count += 1
        wanted = "float32" if self.fused else self.dtype
        return self.store(f"{kind}_{self.count}", np.asarray(value).astype(wanted))

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made before for this key, or a new one."""
        known = self._made.setdefault(key, [])
        if known and self.draw(st.booleans()):
            return self.draw(st.sampled_from(known))
        known.append(make())
        return known[-1]

    def kernel(self, *shape: int) -> Any:
        return self.shared(("kernel", shape), lambda: super(RandomNet, self).kernel(*shape))

    def statistics(self, filters: int, **arguments: Any) -> Statistics:
        return self.shared(("statistics", self.along, self.fused, self.scales), self._statistics)

    def _statistics(self) -> Statistics:
        size, rng = max(self.along), self.rng
        signs = self.draw(st.sampled_from(["both", "positive", "negative", "zero", *["ones"] * (not self.scales)]))
        gamma = rng.uniform(0.5, 1.5, size) * np.where(np.arange(size) % 2 == 1, -1, 1)
        gamma = {"positive": abs(gamma), "negative": -abs(gamma), "ones": np.ones(size)}.get(signs, gamma)
        gamma[: 1 if signs == "zero" else 0] = 0
        mean, beta, variance = rng.normal(size=size), rng.normal(size=size), rng.uniform(0.3, 3, size)
        shift = self.draw(st.sampled_from(["any", "none", "beta", "mean", "alike"]))
        if shift == "alike":  # every channel maps the same number to 0
            mean, beta = np.full(size, 0.25), np.zeros(size)
        mean, beta = mean * (shift in ("any", "mean", "alike")), beta * (shift in ("any", "beta"))
        values = (x.reshape(self.along) for x in (gamma, beta, mean, variance))
        return Statistics(*(self.keep(name, x) for name, x in zip(Statistics._fields, values)))


class Builder:
    """Adds random operations to the graph that is the default one."""

    def __init__(self, draw: Draw, dtype: str) -> None:
        self.draw, self.dtype = draw, dtype
        self.net = RandomNet(draw, dtype)
        self.values: list[Value] = []
        self.norms = 0
        self.alone: set[int] = set()

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def step(self) -> None:
        """One more operation on one of the values."""
        value = self.draw(st.sampled_from(self.values[::-1]))
        kinds = [*_ANYWHERE]
        if value.is_image:
            kinds += _ON_IMAGES
        elif len(value.shape) == 2:
            kinds += _ON_VECTORS
        else:
            kinds += ["back"]
        if value.linear:
            kinds += ["bias", "bias"]
        if not value.norm.startswith("constants_folded"):
            kinds += ["norm"] * 4
        made = getattr(self, f"_{self.pick(*kinds)}")(value)
        self.values += made if isinstance(made, list) else [] if made is None else [made]

    def _conv(self, x: Value) -> Value | None:
        height, width, channels = x.shape[1:]
        size = [self.integer(1, 3), self.integer(1, 3)]
        steps = self.pick((1, 1), (1, 1), (2, 1), (2, 2), (1, 2))
        strides, dilations = ((1, 1), steps) if self.draw(st.booleans()) else (steps, (1, 1))
        padding = self._padding(size, dilations, height, width)
        groups = self.pick(*[g for g in (1, 1, 1, 2, 3) if channels % g == 0])
        filters = groups * self.integer(1, 4 // groups)
        kernel = self.net.kernel(*size, channels // groups, filters)
        return Value(tf.nn.conv2d(x.tensor, kernel, strides, padding, dilations=dilations), linear=True)

    def _padding(self, size: list[int], dilations: tuple[int, int], height: int, width: int) -> Any:
        fits = all((k - 1) * d < n for k, d, n in zip(size, dilations, (height, width)))
        kind = self.pick(*["SAME"] * 2, *["VALID"] * 2 * fits, *["EXPLICIT"] * fits)
        around = [[self.integer(0, 1), self.integer(0, 1)] for _ in range(2)] if kind == "EXPLICIT" else []
        return [[0, 0], *around, [0, 0]] if any(map(any, around)) else "VALID" if kind == "EXPLICIT" else kind

    def _pointwise(self, x: Value) -> Value:
        kernel = self.net.kernel(1, 1, x.channels, self.integer(1, 4))
        return Value(tf.nn.conv2d(x.tensor, kernel, 1, self.pick("SAME", "VALID")), linear=True)

    def _depthwise(self, x: Value) -> Value:
        size, stride = [self.integer(1, 3), self.integer(1, 3)], self.pick(1, 2)
        padding = self._padding(size, (1, 1), *x.shape[1:3])
        kernel = self.net.kernel(*size, x.channels, self.integer(1, 2))
        return Value(tf.nn.depthwise_conv2d(x.tensor, kernel, [1, stride, stride, 1], padding), linear=True)

    def _transposed(self, x: Value) -> Value:
        size, stride, padding = self.integer(1, 3), self.pick(1, 2), self.pick("SAME", "VALID")
        filters = self.integer(1, 4)
        space = [n * stride if padding == "SAME" else (n - 1) * stride + size for n in x.shape[1:3]]
        if padding == "VALID" and stride > size:
            padding, space = "SAME", [n * stride for n in x.shape[1:3]]
        batch = tf.raw_ops.Shape(input=x.tensor)[0]  # tf.shape would be a constant
        kernel = self.net.kernel(size, size, filters, x.channels)
        made = tf.nn.conv2d_transpose(x.tensor, kernel, tf.stack([batch, *space, filters]), stride, padding)
        made.set_shape([x.shape[0], *space, filters])
        return Value(made, linear=True)

    def _dense(self, x: Value) -> Value:
        units, transposed = self.integer(1, 4), self.draw(st.booleans())
        kernel = self.net.kernel(*((units, x.channels) if transposed else (x.channels, units)))
        return Value(tf.matmul(x.tensor, kernel, transpose_b=transposed), linear=True)

    def _bias(self, x: Value) -> Value:
        vector = self.net.rng.normal(size=x.channels)
        kind = self.pick("BiasAdd", "add", "add_left", "whole", "scalar", "sub")
        if kind == "scalar":
            return Value(x.tensor + self.net.keep("scalar", vector[:1].reshape(self.pick((), (1,)))), x.axis)
        if x.axis == 1:
            return Value(x.tensor + self.net.keep("bias", vector.reshape(-1, 1, 1)), 1)
        bias = self.net.keep("bias", vector.reshape([1] * (len(x.shape) - 1) + [-1]) if kind == "whole" else vector)
        if kind == "BiasAdd":
            return Value(tf.nn.bias_add(x.tensor, bias))
        if kind == "sub":
            return Value(x.tensor - bias)
        return Value(bias + x.tensor if kind == "add_left" else x.tensor + bias)

    def _norm(self, x: Value) -> Value:
        spellings = [*_ANY_SHAPE]
        if x.is_image:
            spellings += _OF_IMAGES
            spellings += {"float32": _FUSED * 2, "float16": ("fused_v2", "fused_v3")}.get(self.dtype, ())
        if x.channels > 1 and not x.norm and x.axis == -1:
            spellings += ["constants_folded"]
        spelling = self.pick(*spellings)
        plain = spelling in (*_OF_IMAGES, *_FUSED, "constants_folded")
        ranks = (1,) if plain or len(x.shape) == 2 else (1, 4)
        rank = self.pick(*ranks) if x.axis == -1 else self.pick(3, 4)
        behind = 0 if x.axis == -1 else 2
        self.net.along = (1,) * (rank - 1 - behind) + (x.channels,) + (1,) * behind
        self.net.fused, self.net.scales = spelling in _FUSED, spelling == "constants_folded"
        self.norms += 1
        with tf.name_scope(f"norm_{self.norms}"):
            made = NORMS[spelling](self.net, x.tensor)
        self.net.fused = False
        if not x.norm:
            self.alone.add(self.norms)
        return Value(made, x.axis, norm=f"{spelling}_{self.norms}")

    def _activation(self, x: Value) -> Value:
        return Value(self.pick(tf.nn.relu, tf.nn.tanh, tf.nn.relu6)(x.tensor), x.axis)

    def _pass_on(self, x: Value) -> Value:
        through = self.pick(tf.identity, tf.stop_gradient, lambda y: tf.nn.dropout(y, tf.constant(0.0, y.dtype)))
        return dataclasses.replace(x, tensor=through(x.tensor))

    def _scalar(self, x: Value) -> Value:
        factor = self.pick(2.0, -0.5)
        return Value(x.tensor * self.net.keep("factor", np.asarray(factor)), x.axis)

    def _pad(self, x: Value) -> Value:
        pads = [[0, 0], *([self.integer(0, 1), self.integer(0, 2)] for _ in range(2)), [0, 0]]
        if self.integer(0, 7) == 0:
            pads[self.pick(0, 3)] = [0, 1]
        value = self.pick(0, 0, 0, 0.5)
        return Value(tf.pad(x.tensor, pads, constant_values=value))

    def _pool(self, x: Value) -> Value:
        pool, size, stride = self.pick(tf.nn.max_pool2d, tf.nn.avg_pool2d), self.integer(1, 2), self.pick(1, 2)
        size = min(size, *x.shape[1:3])
        return Value(pool(x.tensor, size, stride, self.pick("SAME", "VALID")))

    def _concat(self, x: Value) -> Value:
        axis = self.draw(st.sampled_from([x.axis % len(x.shape), x.axis % len(x.shape), *range(1, len(x.shape))]))
        without = lambda shape: shape[:axis] + shape[axis + 1 :]  # noqa: E731
        fits = lambda y: len(y.shape) == len(x.shape) and without(y.shape) == without(x.shape)  # noqa: E731
        others = [y for y in self.values[::-1] if y.axis == x.axis and fits(y)]
        parts = [x, *(self.draw(st.sampled_from(others)) for _ in range(self.integer(1, 2)))]
        return Value(tf.concat([part.tensor for part in parts], axis), x.axis)

    def _split(self, x: Value) -> list[Value] | None:
        axes = [axis for axis in (x.axis % len(x.shape), *range(1, len(x.shape))) if x.shape[axis] > 1]
        if not axes:
            return None
        axis = self.draw(st.sampled_from(axes))
        if self.draw(st.booleans()) and x.shape[axis] % 2 == 0:
            parts = tf.split(x.tensor, 2, axis)
        else:
            parts = tf.split(x.tensor, [1, x.shape[axis] - 1], axis)
        return [Value(part, x.axis) for part in parts]

    def _split_and_concat(self, x: Value) -> Value | None:
        parts = self._split(x) or [x]
        return Value(tf.concat([part.tensor for part in parts[::-1]], x.axis)) if _alike(parts, x.axis) else None

    def _add(self, x: Value) -> Value:
        others = [y for y in self.values[::-1] if y.shape == x.shape and y.axis == x.axis]
        other = self.draw(st.sampled_from(others))
        made = self.pick(tf.add, tf.add, lambda a, b: tf.add_n([a, b]), lambda a, b: a - b, tf.maximum)
        return Value(made(x.tensor, other.tensor), x.axis)

    def _crop(self, x: Value) -> Value | None:
        return Value(x.tensor[:, 1:, :-1]) if min(x.shape[1:3]) > 1 else None

    def _to_channels_first(self, x: Value) -> Value:
        return Value(tf.transpose(x.tensor, [0, 3, 1, 2]), 1, x.linear)

    def _swap_space(self, x: Value) -> Value:
        return Value(tf.transpose(x.tensor, [0, 2, 1, 3]), linear=x.linear)

    def _back(self, x: Value) -> Value:
        return Value(tf.transpose(x.tensor, [0, 2, 3, 1]), linear=x.linear)

    def _flatten(self, x: Value) -> Value:
        return Value(tf.reshape(x.tensor, [-1, int(np.prod(x.shape[1:]))]), linear=x.linear)

    def _rows(self, x: Value) -> Value:
        """Images of one row."""
        return Value(tf.reshape(x.tensor, [-1, 1, x.shape[1] * x.shape[2], x.channels]), linear=x.linear)

    def _mean(self, x: Value) -> Value:
        keep = self.draw(st.booleans())
        return Value(tf.reduce_mean(x.tensor, [1, 2], keepdims=keep))

    def _to_image(self, x: Value) -> Value:
        return Value(tf.reshape(x.tensor, [-1, 1, 1, x.channels]), linear=x.linear)


_ANYWHERE = ["activation", "pass_on", "scalar", "concat", "split", "add"]
_ON_IMAGES = ["conv"] * 4 + ["pointwise"] * 2 + ["depthwise", "transposed", "pad", "pool", "crop", "to_channels_first",
              "swap_space", "flatten", "rows", "mean", "split_and_concat"]  # fmt: skip
_ON_VECTORS = ["dense"] * 3 + ["to_image"]


def _alike(parts: list[Value], axis: int) -> bool:
    without = [part.shape[:axis] + part.shape[axis:][1:] for part in parts]
    return all(shape == without[0] for shape in without)


@st.composite
def random_graphs(draw: Draw, steps: int = 10) -> RandomGraph:
    """Graphs of up to `steps` operations, every batch norm of which is needed for an output."""
    dtype = draw(st.sampled_from(["float64", "float64", "float32", "float32", "float16"]))
    shape = [2, draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 4))]
    with tf.Graph().as_default() as graph:
        builder = Builder(draw, dtype)
        builder.values.append(Value(v1.placeholder(dtype, shape, name="input")))
        for _ in range(draw(st.integers(1, steps))):
            builder.step()
        ends = [v.tensor for v in builder.values if not v.tensor.consumers()] or [builder.values[-1].tensor]
        more = draw(st.lists(st.sampled_from(builder.values), max_size=1)) if draw(st.booleans()) else []
        outputs = list(dict.fromkeys(t.name for t in [*ends, *(v.tensor for v in more)]))
        graph_def = graph.as_graph_def()
    _forget_sizes(draw, graph_def)
    feeds = {"input:0": np.random.default_rng(9).normal(size=shape).astype(dtype)}
    return RandomGraph(graph_def, ["input:0"], outputs, feeds, dtype, builder.norms, builder.alone)


def _forget_sizes(draw: Draw, graph_def: Any) -> None:
    """The graph then knows less of its input than was known when it was written."""
    unknown = draw(st.sampled_from([(), (0,), (1, 2), (0, 1, 2)]))
    node = next(node for node in graph_def.node if node.name == "input")
    for axis in unknown:
        node.attr["shape"].shape.dim[axis].size = -1
