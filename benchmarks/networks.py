"""Whole networks, each written once over a small interface that every implementation and peer builds from.

A network is a function of a Net. The Net knows sizes, names layers and draws weights; a Builder makes the layers of a
framework. Classifiers are as published: a pooled image and one dense layer, of VGG-16 three.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from benchmarks.cases import Case

T = TypeVar("T")
CLASSES = 1000
_NARROWEST = 8  # channels of a scaled-down network are multiples of it


@dataclasses.dataclass(frozen=True)
class Weights:
    """Of a convolution with batch norm; filters in the problem's type, [K] vectors in the type of its statistics."""

    filters: np.ndarray  # [kh,kw,C/groups,K]
    gamma: np.ndarray
    beta: np.ndarray
    moving_mean: np.ndarray
    moving_variance: np.ndarray
    switch: Any = None  # run-time-switch: the tf.Variable that says whether to train


class Builder(Protocol[T]):
    """Makes a framework's layers; T is what stands for a tensor there. Weights are in NHWC order."""

    def conv_bn(self, x: T, case: Case, weights: Weights, residual: T | None) -> T:
        """Convolution, batch norm, addition of the residual, activation."""

    def max_pool(self, x: T, window: Case) -> T:
        """`window` tells size, stride and padding."""

    def mean(self, x: T) -> T:
        """Over the image: [N,C]."""

    def dense(self, x: T, weights: np.ndarray, bias: np.ndarray, relu: bool) -> T:
        """Weights are [inputs,units], or [height,width,channels,units] where x is an image."""


@dataclasses.dataclass(frozen=True)
class Node(Generic[T]):
    """A tensor with its sizes; of a vector, height and width are 1."""

    tensor: T
    height: int
    width: int
    channels: int
    image: bool = True


class Draw(Protocol):
    """Random weights; the same place gives the same ones."""

    def convolution(self, place: int, case: Case) -> Weights: ...

    def dense(self, place: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]: ...


class Net(Generic[T]):
    """What a network's definition is written with."""

    def __init__(self, builder: Builder[T], draw: Draw, width: float = 1.0):
        self._builder, self._draw, self._width = builder, draw, width
        self._layers = 0

    def _place(self) -> int:
        self._layers += 1
        return self._layers

    def _scaled(self, channels: int) -> int:
        return channels if self._width == 1 else max(1, round(channels * self._width / _NARROWEST)) * _NARROWEST

    def conv(
        self,
        x: Node[T],
        filters: int | None,
        size: int,
        stride: int = 1,
        activation: str | None = "relu",
        residual: Node[T] | None = None,
    ) -> Node[T]:
        """A convolution with batch norm; a depthwise one where `filters` is None."""
        out_channels, groups = (x.channels, x.channels) if filters is None else (self._scaled(filters), 1)
        place = self._place()
        case = Case(
            x.height, x.width, x.channels, size, size, out_channels, stride,
            groups=groups, activation=activation, residual=residual is not None, name=f"conv{place}",
        )  # fmt: skip
        weights = self._draw.convolution(place, case)
        tensor = self._builder.conv_bn(x.tensor, case, weights, residual.tensor if residual else None)
        return Node(tensor, case.out_height, case.out_width, out_channels)

    def max_pool(self, x: Node[T], size: int, stride: int) -> Node[T]:
        window = Case(x.height, x.width, x.channels, size, size, x.channels, stride)
        return Node(self._builder.max_pool(x.tensor, window), window.out_height, window.out_width, x.channels)

    def mean(self, x: Node[T]) -> Node[T]:
        return Node(self._builder.mean(x.tensor), 1, 1, x.channels, image=False)

    def hidden(self, x: Node[T], units: int) -> Node[T]:
        """A dense layer with relu."""
        return self._dense(x, self._scaled(units), relu=True)

    def classes(self, x: Node[T]) -> Node[T]:
        """The last layer: logits."""
        return self._dense(x, CLASSES, relu=False)

    def _dense(self, x: Node[T], units: int, relu: bool) -> Node[T]:
        shape = (x.height, x.width, x.channels, units) if x.image else (x.channels, units)
        weights, bias = self._draw.dense(self._place(), shape)
        return Node(self._builder.dense(x.tensor, weights, bias, relu), 1, 1, units, image=False)


def _bottleneck(net: Net[T], x: Node[T], filters: int, stride: int, project: bool) -> Node[T]:
    """The stride is in the 3x3 convolution: v1.5."""
    shortcut = net.conv(x, 4 * filters, 1, stride, activation=None) if project else x
    y = net.conv(x, filters, 1)
    y = net.conv(y, filters, 3, stride)
    return net.conv(y, 4 * filters, 1, residual=shortcut)


def _basic(net: Net[T], x: Node[T], filters: int, stride: int, project: bool) -> Node[T]:
    shortcut = net.conv(x, filters, 1, stride, activation=None) if project else x
    y = net.conv(x, filters, 3, stride)
    return net.conv(y, filters, 3, residual=shortcut)


def _resnet(net: Net[T], x: Node[T], block: Callable[..., Node[T]], blocks: tuple[int, ...], widens: bool) -> Node[T]:
    x = net.max_pool(net.conv(x, 64, 7, stride=2), 3, stride=2)
    for stage, count in enumerate(blocks):
        for place in range(count):
            first = place == 0
            project = first and (stage > 0 or widens)
            x = block(net, x, 64 << stage, 2 if first and stage > 0 else 1, project)
    return net.classes(net.mean(x))


def resnet50(net: Net[T], x: Node[T]) -> Node[T]:
    return _resnet(net, x, _bottleneck, (3, 4, 6, 3), widens=True)


def resnet18(net: Net[T], x: Node[T]) -> Node[T]:
    return _resnet(net, x, _basic, (2, 2, 2, 2), widens=False)


_INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2(net: Net[T], x: Node[T]) -> Node[T]:
    x, before = net.conv(x, 32, 3, stride=2, activation="relu6"), 32
    for expansion, filters, blocks, first_stride in _INVERTED:
        for block in range(blocks):
            y = net.conv(x, expansion * before, 1, activation="relu6") if expansion > 1 else x
            y = net.conv(y, None, 3, 1 if block else first_stride, activation="relu6")
            x = net.conv(y, filters, 1, activation=None, residual=x if block else None)
            before = filters
    return net.classes(net.mean(net.conv(x, 1280, 1, activation="relu6")))


def vgg16(net: Net[T], x: Node[T]) -> Node[T]:
    for filters, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            x = net.conv(x, filters, 3)
        x = net.max_pool(x, 2, stride=2)
    return net.classes(net.hidden(net.hidden(x, 4096), 4096))


NETWORKS: dict[str, Callable[[Net[Any], Node[Any]], Node[Any]]] = {
    network.__name__: network for network in (mobilenet_v2, resnet18, resnet50, vgg16)
}


def assemble(name: str, builder: Builder[T], draw: Draw, x: T, image: int, width: float) -> T:
    """What stands for the logits of the network `name`, for images [N,image,image,3]."""
    return NETWORKS[name](Net(builder, draw, width), Node(x, image, image, 3)).tensor


class Program:
    """A list of functions to run in order, for frameworks that compute eagerly or trace; a tensor is its number."""

    def __init__(self) -> None:
        self.examples: list[Any] = []  # of each input
        self._steps: list[tuple[Callable[..., Any], tuple[int, ...]]] = []

    def input(self, example: Any) -> int:
        """Inputs come before all steps."""
        self.examples.append(example)
        return len(self.examples) - 1

    def add(self, function: Callable[..., Any], *inputs: int) -> int:
        self._steps.append((function, inputs))
        return len(self.examples) + len(self._steps) - 1

    def run(self, *inputs: Any) -> Any:
        """The last result."""
        values = list(inputs)
        for function, places in self._steps:
            values.append(function(*(values[place] for place in places)))
        return values[-1]


@dataclasses.dataclass
class Outline:
    """A builder that only takes notes, and draws nothing."""

    cases: list[Case] = dataclasses.field(default_factory=list)
    dense_flops: int = 0  # for one image

    def conv_bn(self, x: None, case: Case, weights: None, residual: None) -> None:
        self.cases.append(case)

    def max_pool(self, x: None, window: Case) -> None:
        return None

    def mean(self, x: None) -> None:
        return None

    def dense(self, x: None, weights: tuple[int, ...], bias: None, relu: bool) -> None:
        self.dense_flops += 2 * math.prod(weights)


class _Nothing:
    """Draws shapes."""

    def convolution(self, place: int, case: Case) -> None:
        return None

    def dense(self, place: int, shape: tuple[int, ...]) -> tuple[tuple[int, ...], None]:
        return shape, None


def outline(name: str, image: int, width: float) -> Outline:
    """The convolutions of a network in order, and what its classifier counts."""
    notes = Outline()
    assemble(name, notes, _Nothing(), None, image, width)  # type: ignore[arg-type]
    return notes
