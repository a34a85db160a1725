"""The layers that are measured: one convolution with batch normalization each, written as one line of text.

    INPUT FILTER [KEY=VALUE ...]        56x56x64 3x3x128 stride=2 padding=same activation=relu residual=yes

INPUT is height x width x channels, FILTER is height x width x output channels. The keys, with their defaults:
stride=1, dilation=1, padding=same (or valid, or TOP,BOTTOM,LEFT,RIGHT), groups=1, activation=none, residual=no.
A line of a shape file (benchmarks/shapes/<network>.txt) is the same behind two words: the layer's name and how often
the network holds it. "#" begins a comment.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

from fusedconvbn._arguments import ACTIVATIONS

SHAPES = pathlib.Path(__file__).parent / "shapes"
_ACTIVATIONS = {activation or "none": activation for activation in ACTIVATIONS}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, NHWC, without its batch."""

    height: int
    width: int
    channels: int
    filter_height: int
    filter_width: int
    out_channels: int
    stride: int = 1
    dilation: int = 1
    padding: str | tuple[int, int, int, int] = "SAME"  # or "VALID" or (top, bottom, left, right)
    groups: int = 1
    activation: str | None = None
    residual: bool = False
    name: str = "layer"
    times: int = 1  # how often the network holds it

    def __post_init__(self) -> None:
        if self.channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups must divide the input's channels ({self.channels}) and the filter's ({self.out_channels}). "
                f"Received: groups={self.groups}"
            )
        if min(self.out_height, self.out_width) < 1:
            raise ValueError(
                f"the filter, dilated, must fit into the padded input. Received: input {self.height}x{self.width}, "
                f"filter {self.filter_height}x{self.filter_width}, dilation={self.dilation}, padding={self.padding}"
            )

    @property
    def out_height(self) -> int:
        return self._out_size(self.height, self.filter_height, 0)

    @property
    def out_width(self) -> int:
        return self._out_size(self.width, self.filter_width, 2)

    def _out_size(self, size: int, taps: int, side: int) -> int:
        if self.padding == "SAME":
            return math.ceil(size / self.stride)
        pad = sum(self.padding[side : side + 2]) if isinstance(self.padding, tuple) else 0
        return (size + pad - (taps - 1) * self.dilation - 1) // self.stride + 1

    @property
    def depthwise(self) -> bool:
        """Each filter sees one channel: TensorFlow has an op of its own for it."""
        return self.groups == self.channels and self.groups > 1

    @property
    def op_padding(self) -> str | list[tuple[int, int]]:
        """What `fused_conv_bn` takes as `padding`."""
        if not isinstance(self.padding, tuple):
            return self.padding
        return [self.padding[:2], self.padding[2:]]

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Top, bottom, left, right; of SAME, the odd element goes behind."""
        if isinstance(self.padding, tuple):
            return self.padding
        if self.padding == "VALID":
            return (0, 0, 0, 0)
        sides = []
        for size, taps in ((self.height, self.filter_height), (self.width, self.filter_width)):
            covered = (math.ceil(size / self.stride) - 1) * self.stride + (taps - 1) * self.dilation + 1
            total = max(covered - size, 0)
            sides += [total // 2, total - total // 2]
        return tuple(sides)

    @property
    def filter_shape(self) -> tuple[int, int, int, int]:
        return (self.filter_height, self.filter_width, self.channels // self.groups, self.out_channels)

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return (batch, self.height, self.width, self.channels)

    def output_shape(self, batch: int) -> tuple[int, int, int, int]:
        return (batch, self.out_height, self.out_width, self.out_channels)

    def forward_flops(self, batch: int) -> int:
        """Multiplications and additions of the convolution done directly; batch normalization counts nothing."""
        return 2 * math.prod(self.output_shape(batch)) * math.prod(self.filter_shape[:3])

    def spec(self) -> str:
        """The line that parse_shape() reads back."""
        pads = self.padding.lower() if isinstance(self.padding, str) else ",".join(map(str, self.padding))
        return (
            f"{self.height}x{self.width}x{self.channels} {self.filter_height}x{self.filter_width}x{self.out_channels} "
            f"stride={self.stride} dilation={self.dilation} padding={pads} groups={self.groups} "
            f"activation={self.activation or 'none'} residual={'yes' if self.residual else 'no'}"
        )


def _sizes(what: str, text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise ValueError(f"{what} must be three positive sizes like 56x56x64. Received: {text!r}")
    return [int(size) for size in text.split("x")]


def _positive(key: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError(f"{key} must be a positive integer. Received: {text!r}")
    return int(text)


def _padding(key: str, text: str) -> str | tuple[int, ...]:
    if text.upper() in ("SAME", "VALID"):
        return text.upper()
    if re.fullmatch(r"\d+(,\d+){3}", text):
        return tuple(int(size) for size in text.split(","))
    raise ValueError(f"{key} must be same, valid or TOP,BOTTOM,LEFT,RIGHT. Received: {text!r}")


def _choice(choices: dict[str, Any]) -> Callable[[str, str], Any]:
    def parse(key: str, text: str) -> Any:
        if text not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}. Received: {text!r}")
        return choices[text]

    return parse


_KEYS: dict[str, Callable[[str, str], Any]] = {
    "stride": _positive,
    "dilation": _positive,
    "padding": _padding,
    "groups": _positive,
    "activation": _choice(_ACTIVATIONS),
    "residual": _choice({"no": False, "yes": True}),
}


def _option(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if key not in _KEYS or not equals:
        raise ValueError(f"an option must be KEY=VALUE with a key of {', '.join(_KEYS)}. Received: {word!r}")
    return key, _KEYS[key](key, text)


def parse_shape(text: str, name: str | None = None, times: int = 1) -> Case:
    """The Case that `text` describes, by itself its name; a ValueError says what is wrong with it."""
    words = text.split()
    if len(words) < 2:
        raise ValueError(f"a shape must begin with INPUT FILTER, like 56x56x64 3x3x128. Received: {text!r}")
    options = [_option(word) for word in words[2:]]
    if len(dict(options)) < len(options):
        raise ValueError(f"an option must be given once. Received: {text!r}")
    return Case(
        *_sizes("INPUT", words[0]),
        *_sizes("FILTER", words[1]),
        **dict(options),
        name=name or " ".join(words),
        times=times,
    )


def _parse_line(line: str) -> Case:
    words = line.split(maxsplit=2)
    if len(words) < 3:
        raise ValueError(f"a line must be NAME TIMES INPUT FILTER [KEY=VALUE ...]. Received: {line!r}")
    return parse_shape(words[2], name=words[0], times=_positive("TIMES", words[1]))


def read_shapes(path: pathlib.Path) -> list[Case]:
    """The layers of a shape file; a ValueError names the file and the line."""
    cases: dict[str, Case] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.partition("#")[0].strip()
        try:
            if line:
                case = _parse_line(line)
                if case.name in cases:
                    raise ValueError(f"a layer's name must be given once. Received: {case.name!r}")
                cases[case.name] = case
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not cases:
        raise ValueError(f"{path}: a shape file must hold at least one layer")
    return list(cases.values())


def suites() -> list[str]:
    """The networks whose shapes are at hand."""
    return sorted(path.stem for path in SHAPES.glob("*.txt"))


def read_suite(name: str) -> list[Case]:
    """The layers of the network `name`."""
    return read_shapes(SHAPES / f"{name}.txt")
