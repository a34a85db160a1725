"""`raw` beside the oracle on one case: forward, then backward from what the oracle says forward saved.

What backward starts from: "conv", z as forward saved it; "bfloat16", z - mean rounded to bfloat16; "again", z that it
computes again, or moments of the inputs in its place: then its bounds hold forward's errors too.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import reference
from cases import Arrays, Case, arrays
from compare import Expected, assert_close

from fusedconvbn import raw


def planned(case: Case, direction: str, **options: Any) -> Any:
    return raw.plan(
        case.inputs_shape, case.filters_shape, dtype=case.numpy_dtype, residual=case.residual, direction=direction,
        **{**case.attributes, **options},
    )  # fmt: skip


def nhwc(case: Case, image: np.ndarray) -> np.ndarray:
    return image if case.data_format == "NHWC" else np.moveaxis(image, 1, 3)


def of_channels(case: Case, vector: np.ndarray) -> np.ndarray:
    """Of a shape that goes with images."""
    return vector if case.data_format == "NHWC" else vector[:, None, None]


def rounded(case: Case, z: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """z - mean as forward saves it in bfloat16: NHWC, two numbers in an element of float32."""
    centered = nhwc(case, z.astype(np.float64) - of_channels(case, mean)).astype(ml_dtypes.bfloat16)
    return np.append(centered, np.zeros(centered.size % 2, centered.dtype)).view(np.float32)


def centered(case: Case, packed: np.ndarray) -> np.ndarray:
    """What `rounded` was made of, NHWC in float64."""
    batch, *spatial, channels = nhwc(case, np.empty(case.output_shape, bool)).shape
    shape = (batch, *spatial, channels)
    return packed.view(ml_dtypes.bfloat16)[: math.prod(shape)].reshape(shape).astype(np.float64)


class Problem:
    """A case, its arguments and upstream gradients, and what the oracle makes of them, backward from `start`.

    `stores_z`: whether forward may round z, of which 16-bit rows by moments know nothing. `rounds_dz`: whether backward
    rounds the gradient of z to the data's type, as tensor cores want it.
    """

    def __init__(
        self, case: Case, arguments: Arrays | None = None, start: str = "conv", stores_z: bool = True,
        rounds_dz: bool = False,
    ):  # fmt: skip
        self.case, self.start = case, start if case.training else "conv"
        if not stores_z:
            self.start = "again"
        self.arguments = arguments or arrays(case)
        self.oracle = {**case.attributes, "stores_z": stores_z, "rounds_dz": rounds_dz}

    @cached_property
    def forward(self) -> reference.Forward:
        return reference.forward(*self.arguments, **self.oracle)

    @cached_property
    def upstream(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of output, moving mean and moving variance; none where the activation's own is in doubt."""
        case, rng = self.case, self.case.random("upstream")
        output = rng.standard_normal(case.output_shape)
        output[self.forward.near_kink] = 0
        if self.start == "bfloat16":
            output[self._of_rounded[1]] = 0
        vectors = rng.standard_normal((2, case.out_channels)).astype(case.stat_dtype)
        return output.astype(case.numpy_dtype), vectors[0], vectors[1]

    @cached_property
    def saved(self) -> dict[str, np.ndarray]:
        """The arguments of `raw.backward` that come from forward."""
        stat, data = self.case.stat_dtype, self.case.numpy_dtype
        saved = {"output": self.forward.output.value.astype(data)}
        if self.case.training:
            saved["conv_out"] = self.forward.conv_out.value.astype(data)
            saved["batch_mean"] = self.forward.batch_mean.value.astype(stat)
            saved["inv_std"] = self.forward.inv_std.value.astype(stat)
        if self.start == "bfloat16":
            saved["conv_out"] = self._conv_out_of_rounded
            saved["output"] = self._of_rounded[0].value.astype(data)
        return saved

    @cached_property
    def _conv_out_of_rounded(self) -> np.ndarray:
        """z for which z - mean is what bfloat16 holds: in float64, which holds that sum."""
        mean = of_channels(self.case, self.forward.batch_mean.value.astype(self.case.stat_dtype).astype(np.float64))
        z = self.forward.conv_out.value.astype(self.case.numpy_dtype)
        return mean + (z - mean).astype(ml_dtypes.bfloat16).astype(np.float64)

    @cached_property
    def _of_rounded(self) -> tuple[Expected, np.ndarray]:
        """The output that goes with it, and where rounding may decide on which side of a kink it lies."""
        stat = self.case.stat_dtype
        vectors = (self.forward.batch_mean.value.astype(stat), self.forward.inv_std.value.astype(stat))
        saved = reference.Saved(self._conv_out_of_rounded, *vectors)
        return reference.output_of(saved, *self.arguments, **self.case.attributes)

    @property
    def moments(self) -> np.ndarray:
        """What forward saves in place of z where it works by the moments of the inputs: scatter, mean, its rest.

        In the type of the statistics; those of an empty batch are 0.
        """
        dtype = self.case.stat_dtype
        if not self.arguments.inputs.size:
            return np.zeros((self.case.in_channels + 2, self.case.in_channels), dtype)
        strides = self.case.strides
        pixels = self.arguments.inputs[:, :: strides[0], :: strides[1]].reshape(-1, self.case.in_channels)
        pixels = pixels.astype(np.float64)
        mean = pixels.mean(0)
        centered = pixels - mean
        rounded = mean.astype(dtype)
        return np.vstack([centered.T @ centered, rounded, mean - rounded]).astype(dtype)

    @property
    def saved_moments(self) -> np.ndarray:
        """The same as `conv_out` holds it: 16-bit numbers in parts."""
        return self.moments.view(self.case.numpy_dtype).reshape(-1, self.case.in_channels)

    @cached_property
    def backward(self) -> reference.Backward:
        saved = None
        if self.case.training and self.start != "again":
            names = reference.Saved._fields[:3]
            saved = reference.Saved(*(self.saved[name] for name in names), rounded=self.start == "bfloat16")
        return reference.backward(
            self.upstream[0], *self.arguments, moving_mean_gradient=self.upstream[1],
            moving_variance_gradient=self.upstream[2], saved=saved, **self.oracle,
        )  # fmt: skip

    def run_forward(self, **options: Any) -> raw.ForwardResult:
        return raw.forward(*self.arguments, **{**self.case.attributes, **options})

    def run_backward(self, conv_out: str = "conv", **options: Any) -> raw.BackwardResult:
        """`conv_out`: what forward is to have saved, as `raw.plan` names it."""
        saved = self.saved
        if conv_out != "conv":
            saved = {**saved, "conv_out": self._saved_as(conv_out)}
        return raw.backward(
            self.upstream[0], *self.arguments, moving_mean_gradient=self.upstream[1],
            moving_variance_gradient=self.upstream[2], **{**saved, **self.case.attributes, **options},
        )  # fmt: skip

    def _saved_as(self, kind: str) -> np.ndarray | None:
        if kind == "bfloat16":
            return rounded(self.case, self.saved["conv_out"], self.saved["batch_mean"])
        return self.saved_moments if kind == "moments" else None

    def check_forward(self, result: raw.ForwardResult) -> None:
        image, stat = self.case.numpy_dtype, self.case.stat_dtype
        assert_close(result.output, self.forward.output, "output", image)
        for name in ("moving_mean", "moving_variance", "batch_mean", "inv_std"):
            assert_close(getattr(result, name), getattr(self.forward, name), name, stat)
        if self.case.training and result.conv_out is not None and result.conv_out.ndim == 2:
            size, moments = np.abs(self.moments).max(), result.conv_out.ravel().view(stat).reshape(self.moments.shape)
            if image != stat:  # the mean is subtracted from sums
                size += np.square(self.moments[-2]).max() * np.prod(self.case.output_shape[:3])
            np.testing.assert_allclose(moments[:-1], self.moments[:-1], rtol=1e-5, atol=1e-5 * size)
        elif self.case.training and result.conv_out is not None and result.conv_out.ndim == 1:
            z, mean = self.forward.conv_out, result.batch_mean.astype(np.float64)
            exact = nhwc(self.case, z.value) - mean
            rounding = nhwc(self.case, z.tolerance) + 2.0**-7 * np.abs(exact)  # to either neighbour
            assert_close(centered(self.case, result.conv_out), Expected(exact, rounding), "conv_out - mean")
        elif self.case.training and result.conv_out is not None:
            assert_close(result.conv_out, self.forward.conv_out, "conv_out", image)
        else:
            assert result.conv_out is None or self.case.training

    def check_backward(self, result: raw.BackwardResult, needs_inputs: bool = True, needs_filters: bool = True) -> None:
        needs = {"inputs": needs_inputs, "filters": needs_filters}
        for name, expected in self.backward._asdict().items():
            actual, expected = getattr(result, name), expected if needs.get(name, True) else None
            if expected is None or actual is None:
                assert expected is actual, name
                continue
            of_data = name in ("inputs", "filters", "residual")
            assert_close(actual, expected, f"d_{name}", self.case.numpy_dtype if of_data else self.case.stat_dtype)
