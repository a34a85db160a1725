"""The convolution and its two gradients in NumPy, in the type of the arrays: a matrix product a tap. NHWC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


class Convolution:
    """The geometry of one convolution; all arguments as `fused_conv_bn` takes them, pairs given as pairs."""

    def __init__(self, inputs_shape, filters_shape, *, strides, dilations, padding: Any):
        self.inputs_shape, self.filters_shape = tuple(inputs_shape), tuple(filters_shape)
        self.strides, self.dilations = strides, dilations
        self.groups = self.inputs_shape[3] // self.filters_shape[2]
        self.window = [(size - 1) * d + 1 for size, d in zip(self.filters_shape[:2], dilations, strict=True)]
        self.pads = [self._pads(axis, padding) for axis in (0, 1)]
        self.out = [self._out(axis) for axis in (0, 1)]
        self.output_shape = (self.inputs_shape[0], *self.out, self.filters_shape[3])

    @property
    def padded(self) -> bool:
        return any(map(any, self.pads))

    def _pads(self, axis: int, padding: Any) -> tuple[int, int]:
        if not isinstance(padding, str):
            return tuple(padding[axis])
        if padding == "VALID":
            return 0, 0
        size, stride = self.inputs_shape[1 + axis], self.strides[axis]
        total = max(0, (-(-size // stride) - 1) * stride + self.window[axis] - size)
        return total // 2, (total + 1) // 2

    def _out(self, axis: int) -> int:
        padded = self.inputs_shape[1 + axis] + sum(self.pads[axis])
        return max(0, (padded - self.window[axis]) // self.strides[axis] + 1)

    def _taps(self) -> Iterator[tuple[tuple[int, int], tuple[slice, ...]]]:
        """Each tap of the filter, and the pixels of the padded input that it meets."""
        for tap in np.ndindex(*self.filters_shape[:2]):
            rows_and_columns = [
                slice(tap[a] * self.dilations[a], tap[a] * self.dilations[a] + self.out[a] * self.strides[a])
                for a in (0, 1)
            ]
            steps = [slice(s.start, s.stop, self.strides[a]) for a, s in enumerate(rows_and_columns)]
            yield tap, (slice(None), *steps)

    def _padded(self, inputs: np.ndarray) -> np.ndarray:
        return np.pad(inputs, [(0, 0), *self.pads, (0, 0)])

    def _grouped(self, image: np.ndarray) -> np.ndarray:
        """[..., channels] as [groups, pixels, channels of a group]."""
        return np.moveaxis(image.reshape(-1, self.groups, image.shape[-1] // self.groups), 1, 0)

    def _ungrouped(self, grouped: np.ndarray) -> np.ndarray:
        return np.moveaxis(grouped, 0, 1).reshape(*self.output_shape[:3], self.groups * grouped.shape[2])

    def _filters_of(self, filters: np.ndarray, tap: tuple[int, int]) -> np.ndarray:
        """One tap as [groups, in_channels / groups, out_channels / groups]."""
        return np.moveaxis(filters[tap].reshape(filters.shape[2], self.groups, -1), 1, 0)

    def forward(self, inputs: np.ndarray, filters: np.ndarray) -> np.ndarray:
        padded, result = self._padded(inputs), np.zeros(self.output_shape, inputs.dtype)
        for tap, pixels in self._taps():
            result += self._ungrouped(self._grouped(padded[pixels]) @ self._filters_of(filters, tap))
        return result

    def inputs_gradient(self, gradient: np.ndarray, filters: np.ndarray) -> np.ndarray:
        padded, grouped = self._padded(np.zeros(self.inputs_shape, gradient.dtype)), self._grouped(gradient)
        for tap, pixels in self._taps():
            padded[pixels] += self._ungrouped(grouped @ np.swapaxes(self._filters_of(filters, tap), 1, 2))
        (top, _), (left, _) = self.pads
        return padded[:, top : top + self.inputs_shape[1], left : left + self.inputs_shape[2]]

    def filters_gradient(self, gradient: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        padded, grouped = self._padded(inputs), self._grouped(gradient)
        result = np.zeros(self.filters_shape, inputs.dtype)
        for tap, pixels in self._taps():
            product = np.swapaxes(self._grouped(padded[pixels]), 1, 2) @ grouped  # [groups, C / groups, K / groups]
            result[tap] = np.moveaxis(product, 0, 1).reshape(self.filters_shape[2:])
        return result
