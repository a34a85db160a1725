"""The algebra of folding: affine maps of channels, and linear ops that absorb them. Knows no graph and no TensorFlow.

A batch norm in inference is one such map. With a convolution `z = W * x + b` next to it, the map moves into `W` and
`b`: behind the convolution,

    gamma * (z - mean) / sqrt(variance + epsilon) + beta  =  (s W) * x + (s b + t)
    s = gamma / sqrt(variance + epsilon),  t = beta - s * mean                    (Ioffe and Szegedy, 2015, 3.1)

and before it, `W * (s x + t) + b = (W s) * x + (b + W t)`, where `s` scales the weights of each input channel.
Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class Blocked(Exception):
    """An affine map cannot move further; the message says why, in words for the report."""


@dataclass(frozen=True)
class AffineMap:
    """`x -> scale * x + shift`, channel by channel.

    Attributes:
        scale: `[C]`, or `[1]` for the same in every channel; float64.
        shift: The same.
    """

    scale: np.ndarray
    shift: np.ndarray

    @staticmethod
    def of(scale: object = 1.0, shift: object = 0.0) -> AffineMap:
        """From vectors or scalars."""
        return AffineMap(*(np.atleast_1d(np.asarray(value, np.float64)) for value in (scale, shift)))

    @staticmethod
    def of_batch_norm(
        gamma: np.ndarray | None, beta: np.ndarray | None, mean: np.ndarray, variance: np.ndarray, epsilon: float
    ) -> AffineMap:
        """Of a batch norm in inference; its vectors are `[C]`, no gamma is 1, no beta 0.

        Raises:
            Blocked: A number is not finite, or `variance + epsilon` not positive.
        """
        mean, variance = (np.asarray(value, np.float64) for value in (mean, variance))
        if not (variance + epsilon > 0).all():
            raise Blocked("variance + epsilon is not positive in every channel")
        scale = (1.0 if gamma is None else np.asarray(gamma, np.float64)) / np.sqrt(variance + epsilon)
        shift = (0.0 if beta is None else np.asarray(beta, np.float64)) - mean * scale
        found = AffineMap.of(scale, shift)
        if not found.is_finite:
            raise Blocked("its parameters are not all finite")
        return found

    @property
    def is_finite(self) -> bool:
        """Whether all its numbers are."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return bool((self.scale == 1).all() and not self.shift.any())

    @property
    def channels(self) -> int:
        """C, or 1 where all channels are treated alike."""
        return max(self.scale.size, self.shift.size)

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        """The map of `x`, whose last axis is that of the channels."""
        return self.scale * x + self.shift

    def after(self, first: AffineMap) -> AffineMap:
        """`x -> self(first(x))`."""
        return AffineMap(self.scale * first.scale, self.scale * first.shift + self.shift)

    def scaling(self) -> AffineMap:
        """Without the shift."""
        return AffineMap(self.scale, np.zeros(1))

    def part(self, begin: int, end: int) -> AffineMap:
        """Of the channels from `begin` to `end`."""
        return AffineMap(*(v if v.size == 1 else v[begin:end] for v in (self.scale, self.shift)))

    def over(self, begin: int, end: int, channels: int) -> AffineMap:
        """Applied to the channels from `begin` to `end` of `channels`, of which it leaves the others as they are."""
        scale, shift = np.ones(channels), np.zeros(channels)
        scale[begin:end], shift[begin:end] = self.scale, self.shift
        return AffineMap(scale, shift)

    def preimage(self, value: float) -> float:
        """The one number that every channel maps to `value`.

        Raises:
            Blocked: There is none: it differs between channels, or a scale is 0.
        """
        if (self(value) == value).all():
            return value
        if not self.scale.all():
            raise Blocked("a scale is 0, so no padding maps to the padding's value")
        found = np.broadcast_to((value - self.shift) / self.scale, (self.channels,))
        return _the_one(found)

    def image(self, value: float) -> float:
        """The one number that every channel makes of `value`.

        Raises:
            Blocked: It differs between channels.
        """
        return _the_one(np.broadcast_to(self(value), (self.channels,)))

    def reshaped(self, axis: int, before: Sequence[int], after: Sequence[int]) -> tuple[AffineMap, int]:
        """The same map on a tensor that was reshaped from `before` to `after`, sizes without the batch's.

        Args:
            axis: Of the channels before, counted from the end (-1 is the last).
            before, after: Sizes of all axes but the first.

        Returns: The map and the axis of its channels, counted from the end.

        Raises:
            Blocked: Afterwards no one axis tells the channels apart.
        """
        if self.channels == 1:
            return self, -1
        if -axis > len(before) or int(np.prod(before)) != int(np.prod(after)):
            raise Blocked("a reshape in between mixes its channels")
        tensors = []
        for vector in (self.scale, self.shift):
            shape = [1] * len(before)
            shape[axis] = vector.size
            tensors.append(np.broadcast_to(vector.reshape(shape), before).reshape(after))
        for new in range(-1, -len(after) - 1, -1):
            firsts = [np.moveaxis(tensor, new, -1).reshape(-1, tensor.shape[new]) for tensor in tensors]
            if all((rows == rows[:1]).all() for rows in firsts):
                return AffineMap(*(rows[0].copy() for rows in firsts)), new
        raise Blocked("a reshape in between mixes its channels")


def _the_one(found: np.ndarray) -> float:
    """The number that `found` holds, in every element but for rounding of the parameters, which are float32."""
    value, spread = float(found.mean()), float(np.ptp(found))
    if spread > 1e-6 * abs(value):
        raise Blocked("its shift would need a padding of another value in each channel")
    return value


@dataclass
class Weights:
    """The weights of a linear op, in one form for every op.

    Attributes:
        values: `[taps..., Cin / groups, K]`, float64. A depthwise filter `[kh, kw, C, M]` is `[kh, kw, 1, C * M]` with
            C groups; a dense layer has no taps.
        bias: `[K]`, or None for zeros.
        groups: Of channels; output channel k reads those of group `k // (K / groups)`.
    """

    values: np.ndarray
    bias: np.ndarray | None = None
    groups: int = 1

    @property
    def inputs(self) -> int:
        """Cin."""
        return self.values.shape[-2] * self.groups

    @property
    def outputs(self) -> int:
        """K."""
        return self.values.shape[-1]

    def followed_by(self, m: AffineMap) -> Weights:
        """Of the op with `m` behind it."""
        bias = m(0.0 if self.bias is None else self.bias)
        return Weights(self.values * m.scale, self._bias(bias), self.groups)

    def preceded_by(self, m: AffineMap) -> Weights:
        """Of the op with `m` before it. Where `m` shifts, every tap must have met an element of the input."""
        taps = tuple(range(self.values.ndim - 2))
        added = (self.values * self._of_inputs(m.shift)).sum(axis=(*taps, -2))
        bias = added + (0.0 if self.bias is None else self.bias)
        return Weights(self.values * self._of_inputs(m.scale), self._bias(bias), self.groups)

    def _of_inputs(self, vector: np.ndarray) -> np.ndarray:
        """`[Cin]` as `[Cin / groups, K]`: what belongs to each weight."""
        grouped = np.broadcast_to(vector, (self.inputs,)).reshape(self.groups, -1)
        return np.repeat(grouped.T, self.outputs // self.groups, axis=1)

    def _bias(self, bias: np.ndarray) -> np.ndarray | None:
        bias = np.broadcast_to(bias, (self.outputs,))
        return bias if self.bias is not None or bias.any() else None
