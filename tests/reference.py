"""The oracle of the tests: forward and all gradients in float64 by NumPy, from the formulas, with error bounds.

    z = conv(inputs, filters), rounded to the type of inputs in training
    mean, variance = training ? moments of z over N, H, W : moving_mean, moving_variance
    output = activation(gamma * xhat + beta + residual), xhat = (z - mean) / sqrt(variance + epsilon)

Every result is an `Expected`: a value and, per element, how far from it a correct implementation may lie that
accumulates in float32 (float64 for float64 inputs) and rounds its results to their types. A sum of K products p_i may
err by 4 sqrt(K) eps sqrt(sum p_i^2), by LOSS times that where transforms may be used, the rest is propagation of errors
(tests/uncertain.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from compare import Expected
from convolution import Convolution
from uncertain import Real, bilinear

LOSS = {"winograd2": 1, "winograd4": 3}  # of accuracy, by the transforms of an algorithm
BLOCK_ROWS = 96  # pixels that an implementation may add up one after the other in its computing type


class Forward(NamedTuple):
    """Results of `forward`; `near_kink` marks where rounding may decide on which side of a kink the activation is."""

    output: Expected
    moving_mean: Expected
    moving_variance: Expected
    batch_mean: Expected
    inv_std: Expected
    conv_out: Expected
    near_kink: np.ndarray


class Backward(NamedTuple):
    """Gradients of the arguments of `forward`; `residual` is None unless there is one."""

    inputs: Expected
    filters: Expected
    gamma: Expected
    beta: Expected
    moving_mean: Expected
    moving_variance: Expected
    residual: Expected | None


class Saved(NamedTuple):
    """What forward hands to backward, in its own precision; backward's bounds are then those of its own errors."""

    conv_out: np.ndarray
    batch_mean: np.ndarray
    inv_std: np.ndarray
    rounded: bool = False  # coarsely, so that the mean of conv_out is another one: dz owes nothing to the difference


def forward(inputs, filters, gamma, beta, moving_mean, moving_variance, residual=None, **attributes: Any) -> Forward:
    """Takes what `raw.forward` takes; `attributes` are `Case.attributes`, and maybe `stores_z=False`.

    That is of an implementation whose statistics are not those of a stored z, but of z before it would be rounded.
    """
    problem = _Problem(inputs, filters, gamma, beta, moving_mean, moving_variance, residual, attributes)
    statistics = problem.statistics
    z = problem.conv_out
    new_mean, new_variance = problem.moving_statistics(statistics)
    output = problem.activate(problem.argument(z, statistics))
    kinks = problem.near_kink(problem.argument(problem.conv_out_again(), statistics))
    return Forward(
        problem.image(output), problem.vector(new_mean), problem.vector(new_variance), problem.vector(statistics.mean),
        problem.vector(statistics.inv_std), problem.image(z), problem.order(kinks),
    )  # fmt: skip


def output_of(saved: Saved, inputs, filters, gamma, beta, moving_mean, moving_variance, residual=None, **attributes):
    """The output as it would be of z and the statistics that were saved, and `near_kink` of it."""
    problem = _Problem(inputs, filters, gamma, beta, moving_mean, moving_variance, residual, attributes)
    statistics, z = problem.saved(saved)
    u = problem.argument(z, statistics)
    return problem.image(problem.activate(u)), problem.order(problem.near_kink(u))


def backward(
    output_gradient, inputs, filters, gamma, beta, moving_mean, moving_variance, residual=None, *,
    moving_mean_gradient=None, moving_variance_gradient=None, saved: Saved | None = None, **attributes: Any,
) -> Backward:  # fmt: skip
    """Takes what `raw.backward` takes. Without `saved` the bounds hold forward's errors too."""
    problem = _Problem(inputs, filters, gamma, beta, moving_mean, moving_variance, residual, attributes)
    zeros = np.zeros(len(gamma))
    g_mean, g_variance = (
        problem.exact(zeros if g is None else g) for g in (moving_mean_gradient, moving_variance_gradient)
    )
    statistics, z = problem.saved(saved)
    scale = problem.gamma * statistics.inv_std
    recentred = problem.uses_batch and saved is not None and saved.rounded
    mean = problem.exact(z.value.mean((0, 1, 2))) if recentred else statistics.mean
    xhat = (z - mean) * statistics.inv_std
    du = problem.exact_image(output_gradient) * problem.slope(problem.argument(z, statistics))
    d_beta, d_gamma = du.sum(), (du * xhat).sum()
    if problem.uses_batch:
        dz = problem.through_batch_statistics(du, xhat, scale, d_beta, d_gamma, statistics, g_mean, g_variance)
        d_mean, d_variance = g_mean * problem.momentum, g_variance * problem.momentum
    else:
        dz = scale * du
        d_mean = g_mean - scale * d_beta
        d_variance = g_variance - scale * statistics.inv_std * d_gamma * 0.5
    lost = None
    on_amx = problem.dtype == ml_dtypes.bfloat16 and problem.uses_batch
    if on_amx or problem.rounds_dz:  # as stock ops do
        lost, dz = dz.rounded(problem.dtype).value - dz.value, dz.widened(problem.dtype)
    convolution = problem.convolution
    taps = np.prod(convolution.filters_shape[:2])
    terms = taps * problem.group_out
    d_inputs = bilinear(convolution.inputs_gradient, terms, dz, problem.filters, problem.by_transforms(dz, axis=3))
    if problem.uses_batch and not problem.stores_z:  # what du gives and the rest are rounded apart
        for part in (scale * du, dz - scale * du):
            term = bilinear(convolution.inputs_gradient, terms, part.widened(problem.dtype), problem.filters)
            d_inputs = Real(d_inputs.value, d_inputs.error + term.widened(problem.dtype).error, d_inputs.eps)
    mixed = problem.by_transforms_over_pixels(problem.inputs, dz)
    d_filters = bilinear(convolution.filters_gradient, problem.count, dz, problem.inputs, mixed)
    if lost is not None:  # equal dz round alike, and z of few channels has few values
        if not convolution.padded and not problem.rounds_dz:
            lost = lost - lost.mean((0, 1, 2))  # where this counts, taps that read no padding restore it
        systematic = np.abs(convolution.filters_gradient(lost, problem.inputs.value))
        d_filters = Real(d_filters.value, d_filters.error + systematic, d_filters.eps)
    return Backward(
        problem.image(d_inputs), d_filters.expected(problem.dtype), problem.vector(d_gamma), problem.vector(d_beta),
        problem.vector(d_mean), problem.vector(d_variance), None if residual is None else problem.image(du),
    )  # fmt: skip


class _Statistics(NamedTuple):
    mean: Real
    variance: Real
    inv_std: Real


class _Problem:
    """The arguments of the op as NHWC `Real`s, and the steps of the formula."""

    def __init__(self, inputs, filters, gamma, beta, moving_mean, moving_variance, residual, attributes):
        self.dtype, self.stat_dtype = np.asarray(inputs).dtype, np.asarray(gamma).dtype
        self.eps = float(np.finfo(np.float64 if self.dtype == np.float64 else np.float32).eps)
        self.nhwc = attributes["data_format"] == "NHWC"
        self.epsilon, self.momentum = attributes["epsilon"], attributes["momentum"]
        self.unbiased, self.training = attributes["unbiased_moving_variance"], attributes["training"]
        self.stores_z = self.training and attributes.get("stores_z", True)
        self.rounds_dz = attributes.get("rounds_dz", False)
        self.activation = ACTIVATIONS[attributes["activation"]]
        self.inputs, self.filters = self.exact_image(inputs), self.exact(filters)
        self.gamma, self.beta = self.exact(gamma), self.exact(beta)
        self.moving_mean, self.moving_variance = self.exact(moving_mean), self.exact(moving_variance)
        self.residual = None if residual is None else self.exact_image(residual)
        geometry = {name: attributes[name] for name in ("strides", "dilations", "padding")}
        self.convolution = Convolution(self.inputs.value.shape, self.filters.value.shape, **geometry)
        self.loss = self.transforms_loss(attributes)
        self.count = int(np.prod(self.convolution.output_shape[:3]))
        self.group_out = self.filters.value.shape[3] // self.convolution.groups
        self.uses_batch = self.training and self.count > 0

    def transforms_loss(self, attributes) -> float:
        """Of `LOSS`, 0 where the algorithm has no transforms. "auto" may use the worst of them where they apply."""
        convolution = self.convolution
        apply = convolution.filters_shape[:2] == (3, 3) and convolution.groups == 1
        apply = apply and all(tuple(attributes[name]) == (1, 1) for name in ("strides", "dilations"))
        pay = apply and min(convolution.filters_shape[2:]) >= 16
        algorithm = attributes.get("algorithm", "auto")
        return max(LOSS.values()) if algorithm == "auto" and pay else LOSS.get(algorithm, 0)

    def by_transforms(self, image: Real, axis: int) -> np.ndarray | None:
        """For `bilinear` of an image and the filters, whose `axis` is summed: all taps count, also those in padding.

        The error is of a tile's size, and a tile of few channels may lie well above the mean of all: they count more.
        """
        if not self.loss or not image.value.size:
            return None
        squares = (image.value**2 + image.error**2).mean((0, 1, 2))
        squares *= 1 + 3 / squares.size
        return self.loss**2 * np.tensordot(squares, np.square(self.filters.value).sum((0, 1)), (0, axis - 2))

    def by_transforms_over_pixels(self, inputs: Real, dz: Real) -> np.ndarray | None:
        """The same for `bilinear` of two images; the transforms of one tile mix as many elements as a filter has."""
        if not self.loss or not self.count or not inputs.value.size:
            return None
        squares = [(image.value**2 + image.error**2).mean((0, 1, 2)) for image in (inputs, dz)]
        return self.loss**2 * max(self.count, 9) * np.multiply.outer(*squares)

    def exact(self, array) -> Real:
        return Real.exact(array, self.eps)

    def exact_image(self, array) -> Real:
        return self.exact(array if self.nhwc else np.moveaxis(np.asarray(array), 1, 3))

    def order(self, image: np.ndarray) -> np.ndarray:
        return image if self.nhwc else np.moveaxis(image, 3, 1)

    def image(self, image: Real) -> Expected:
        expected = image.expected(self.dtype)
        return Expected(self.order(expected.value), self.order(expected.tolerance))

    def vector(self, vector: Real) -> Expected:
        return vector.expected(self.stat_dtype)

    @property
    def terms(self) -> int:
        """Products that an element of z is the sum of."""
        return int(np.prod(self.filters.value.shape[:3]))

    @cached_property
    def sums(self) -> Real:
        """z before it is rounded."""
        mixed = self.by_transforms(self.inputs, axis=2)
        return bilinear(self.convolution.forward, self.terms, self.inputs, self.filters, mixed)

    @cached_property
    def conv_out(self) -> Real:
        """z as the output is made of it: stored in training, if at all."""
        return self.sums.rounded(self.dtype) if self.stores_z else self.sums

    def conv_out_again(self) -> Real:
        """z as backward sees it: in inference recomputed, and maybe stored in between."""
        z = self.conv_out
        return z if self.training else z.widened(self.dtype)

    @cached_property
    def statistics(self) -> _Statistics:
        mean, variance = self.moving_mean, self.moving_variance
        if self.uses_batch:
            z = self.conv_out
            mean = z.sum() * (1 / self.count)
            if self.loss:  # transformed filters are rounded once for all pixels: an error that does not average out
                mean = Real(mean.value, mean.error + self.sums.error.mean((0, 1, 2)) / np.sqrt(self.terms), self.eps)
            # A correct variance owes nothing to the mean's error. Equal terms round alike, and padding makes many: rows
            # summed one by one err by up to rows * eps / 4. The mean of a block errs by eps * mean, and its distance
            # from the mean of all, about std / sqrt(rows), by as much.
            centred = Real(z.value - mean.value, z.error, self.eps)
            squares = centred * centred  # and to second order: what is rounded the other way may lie near the mean
            squares = Real(squares.value, squares.error + np.square(z.error), self.eps)
            variance = squares.sum() * (1 / self.count)
            rounding = min(self.count, BLOCK_ROWS) / 4 * self.eps * variance.value
            rounding += 2 * self.eps * np.abs(mean.value) * np.sqrt(variance.value / self.count)
            if self.loss:  # transforms make different errors of equal pixels, and a variance of them
                rounding = rounding + np.square(z.error / 4).mean((0, 1, 2))
            variance = Real(variance.value, variance.error + rounding, self.eps)
        return _Statistics(mean, variance, self.inverse_root(variance))

    def inverse_root(self, variance: Real) -> Real:
        inv_std = variance.apply(lambda v: 1 / np.sqrt(np.maximum(v, 0) + self.epsilon))
        return inv_std * 1.0

    def saved(self, saved: Saved | None) -> tuple[_Statistics, Real]:
        """The statistics and z that backward starts from."""
        statistics = None if saved is not None and self.uses_batch else self.statistics
        if statistics is not None:
            return statistics, self.conv_out_again()
        inv_std = self.exact(saved.inv_std)
        variance = self.exact(1 / np.square(inv_std.value) - self.epsilon)
        return _Statistics(self.exact(saved.batch_mean), variance, inv_std), self.exact_image(saved.conv_out)

    @property
    def correction(self) -> float:
        return self.count / (self.count - 1) if self.unbiased and self.count > 1 else 1.0

    def moving_statistics(self, batch: _Statistics) -> tuple[Real, Real]:
        if not self.uses_batch:
            return self.moving_mean, self.moving_variance
        new, old = 1 - self.momentum, self.momentum
        return self.moving_mean * old + batch.mean * new, (
            self.moving_variance * old + batch.variance * self.correction * new
        )

    def argument(self, z: Real, statistics: _Statistics) -> Real:
        """u = gamma * xhat + beta + residual."""
        u = self.gamma * statistics.inv_std * (z - statistics.mean) + self.beta
        return u if self.residual is None else u + self.residual

    def activate(self, u: Real) -> Real:
        return u.apply(self.activation.value, 4 * self.eps * self.activation.size(u.value))

    def slope(self, u: Real) -> Real:
        """activation'(u); taken from the stored output where that is enough and there is a residual."""
        own = 4 * self.eps * self.activation.curved
        if self.activation.curved and self.activation.from_output and self.residual is not None:
            own = own + 0.5 * float(Real.exact(1.0, self.eps).widened(self.dtype).error) * 2
        return u.apply(self.activation.slope, own * np.maximum(1, np.abs(u.value)))

    def near_kink(self, u: Real) -> np.ndarray:
        near = np.zeros(u.value.shape, bool)
        for kink in self.activation.kinks:
            stored = Real.exact(kink, self.eps).widened(self.dtype)  # an output near 6 may be stored as 6
            near |= np.abs(u.value - kink) <= 2 * u.error + 2 * stored.error
        return near

    def through_batch_statistics(self, du, xhat, scale, d_beta, d_gamma, statistics, g_mean, g_variance) -> Real:
        """dz in training: z acts directly, through its statistics, and on the returned moving statistics."""
        share = 1 / self.count
        dz = scale * (du - d_beta * share - xhat * (d_gamma * share))
        std = statistics.inv_std.apply(lambda inv: 1 / inv)
        decay = (1 - self.momentum) * share
        return dz + g_mean * decay + g_variance * (2 * self.correction * decay) * xhat * std


@dataclass(frozen=True)
class _Activation:
    """`size`: what evaluating it errs by, in eps; `kinks`: where the derivative jumps."""

    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]
    kinks: tuple[float, ...] = ()
    curved: bool = False
    from_output: bool = True

    def size(self, u: np.ndarray) -> np.ndarray | float:
        return np.maximum(np.abs(u), 1) if self.curved else np.abs(self.value(u))


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _sigmoid(u):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-u))


def _normal_density(u):
    return np.exp(-0.5 * u * u) / np.sqrt(2 * np.pi)


def _normal_distribution(u):
    return 0.5 * _erfc(-u / np.sqrt(2))


ACTIVATIONS = {
    None: _Activation(lambda u: u, np.ones_like),
    "relu": _Activation(lambda u: np.maximum(u, 0), lambda u: np.where(u > 0, 1.0, 0.0), kinks=(0,)),
    "relu6": _Activation(
        lambda u: np.clip(u, 0, 6), lambda u: np.where((u > 0) & (u < 6), 1.0, 0.0), kinks=(0, 6)
    ),
    "leaky_relu": _Activation(lambda u: np.where(u > 0, u, 0.2 * u), lambda u: np.where(u > 0, 1.0, 0.2), kinks=(0,)),
    "elu": _Activation(
        lambda u: np.where(u < 0, np.expm1(np.minimum(u, 0)), u), lambda u: np.exp(np.minimum(u, 0)), curved=True
    ),
    "silu": _Activation(
        lambda u: u * _sigmoid(u), lambda u: _sigmoid(u) * (1 + u * (1 - _sigmoid(u))), curved=True, from_output=False
    ),
    "hard_swish": _Activation(
        lambda u: u * np.clip(u + 3, 0, 6) / 6,
        lambda u: np.where(u <= -3, 0.0, np.where(u >= 3, 1.0, (2 * u + 3) / 6)),
        kinks=(-3, 3), curved=True, from_output=False,
    ),
    "gelu": _Activation(
        lambda u: u * _normal_distribution(u),
        lambda u: _normal_distribution(u) + u * _normal_density(u),
        curved=True, from_output=False,
    ),
}  # fmt: skip
