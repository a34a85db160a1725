"""Reads the nodes that are linear in their input: what their weights are in the common form, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fusedconvbn.folding.affine import Weights
from fusedconvbn.folding.nodes import NodeDef, attribute, is_float
from fusedconvbn.folding.ops import Linear
from fusedconvbn.folding.shapes import Shapes


@dataclass(frozen=True)
class Layout:
    """Of a linear op's operands.

    Attributes:
        data: Index of the input that it is linear in.
        weights: Index of its weights.
        common: Turns the weights as they are stored into `[taps..., Cin / groups, K]`.
        stored: The inverse, for the shape that was stored.
        transposed: Whether it is a convolution's gradient.
        depthwise: Whether each channel is a group.
    """

    data: int
    weights: int
    common: Callable[[np.ndarray], np.ndarray]
    stored: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    transposed: bool = False
    depthwise: bool = False


def _swapped(values: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
    return np.swapaxes(values, -1, -2)


def _merged(values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape[:-2], 1, -1)


def _as_is(values: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
    return values


_PLAIN = Layout(0, 1, _as_is, _as_is)
_TRANSPOSED = Layout(2, 1, _swapped, _swapped, transposed=True)
_LAYOUTS = {
    "Conv2D": _PLAIN,
    "Conv3D": _PLAIN,
    "DepthwiseConv2dNative": Layout(0, 1, _merged, lambda values, shape: values.reshape(shape), depthwise=True),
    "Conv2DBackpropInput": _TRANSPOSED,
    "Conv3DBackpropInput": _TRANSPOSED,
    "Conv3DBackpropInputV2": _TRANSPOSED,
}
_PRODUCTS = {
    "MatMul": ("transpose_a", "transpose_b"),
    "BatchMatMul": ("adj_x", "adj_y"),
    "BatchMatMulV2": ("adj_x", "adj_y"),
}


def layout_of(node: NodeDef) -> Layout | None:
    """Of a node; None if it is not linear in one of its inputs."""
    if node.op in _PRODUCTS:
        left, right = (attribute(node, key).b for key in _PRODUCTS[node.op])
        if left:
            return None
        return Layout(0, 1, _swapped, _swapped) if right else _PLAIN
    return _LAYOUTS.get(node.op)


def read_linear(node: NodeDef, inputs: Sequence[str], values: np.ndarray, shapes: Shapes) -> Linear | None:
    """The op of `node` with those weights; None where it is not one that folding understands.

    Args:
        node: One with a layout.
        inputs: The tensors that it reads.
        values: Its weights, as they are stored.
        shapes: Of the graph.
    """
    layout = layout_of(node)
    product = node.op in _PRODUCTS
    if not is_float(values.dtype) or values.ndim < 2 or (product and values.ndim != 2):
        return None
    channels_first = not product and attribute(node, "data_format").s.startswith(b"NC")
    common = layout.common(values.astype(np.float64))
    axis = 1 - values.ndim if channels_first else -1
    groups = values.shape[-2] if layout.depthwise else _groups(common, shapes.size(inputs[layout.data], axis))
    if groups is None or (layout.transposed and groups != 1):
        return None
    return Linear(
        node.name, node.op, [inputs[layout.data]], [f"{node.name}:0"], Weights(common, None, groups), axis,
        [] if product else padding_of(node, values.shape, shapes.of(inputs[layout.data])), not layout.transposed,
    )  # fmt: skip


def _groups(common: np.ndarray, channels: int | None) -> int | None:
    """From what an op's input has and what each filter reads; one group where the former is not known."""
    if channels is None:
        return 1
    return None if channels % common.shape[-2] else channels // common.shape[-2]


def padding_of(
    node: NodeDef, filters: tuple[int, ...], shape: Sequence[int | None] | None
) -> list[tuple[int, int]] | None:
    """(before, after) of each axis of space; None where it depends on a size that is not known.

    TensorFlow's rule for SAME: as many positions as strides fit into the input, the odd element behind.
    """
    mode = attribute(node, "padding").s.decode()
    space = len(filters) - 2
    if mode == "VALID":
        return [(0, 0)] * space
    first = 2 if attribute(node, "data_format").s.startswith(b"NC") else 1
    if mode == "EXPLICIT":
        pads = list(attribute(node, "explicit_paddings").list.i)
        return [(pads[2 * axis], pads[2 * axis + 1]) for axis in range(first, first + space)]
    strides = list(attribute(node, "strides").list.i)[first : first + space]
    dilations = (list(attribute(node, "dilations").list.i) or [1] * (space + 2))[first : first + space]
    sizes = [None] * space if shape is None else list(shape)[first : first + space]
    pads = [same_padding(*each) for each in zip(filters, strides, dilations, sizes)]
    return None if None in pads else pads


def same_padding(taps: int, stride: int, dilation: int, size: int | None) -> tuple[int, int] | None:
    """(before, after) of one axis; None where it depends on a size that is not known."""
    window = (taps - 1) * dilation + 1
    if stride == 1:
        total = window - 1
    elif window <= 1:
        total = 0
    elif size is None:
        return None
    else:
        total = max(0, (-(-size // stride) - 1) * stride + window - size)
    return total // 2, total - total // 2
