"""Random Keras models for the properties of folding: what a strategy draws, one layer after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from fuse_models import policy
from hypothesis import strategies as st
from keras import layers

from fusedconvbn import FusedConvBN

Draw = Callable[[st.SearchStrategy], Any]

_IN_SPACE = ["conv"] * 4 + ["pointwise"] * 2 + ["transposed", "pool", "upsample", "pad", "crop", "global_pool",
             "permute", "flatten", "rows", "separable", "depthwise"]  # fmt: skip


@dataclasses.dataclass(repr=False)
class RandomModel:
    """A Keras model, what to feed it, and how many batch norms it has, FusedConvBN layers included."""

    model: keras.Model
    images: np.ndarray
    batch_norms: int

    def __repr__(self) -> str:
        lines = [f"{self.images.dtype} {self.images.shape}"]
        for layer in self.model._flatten_layers():
            config = {
                k: v
                for k, v in layer.get_config().items()
                if not k.endswith(("er", "nt", "ts", "layers", "put_layers"))
            }
            config = {k: v for k, v in config.items() if k not in ("dtype", "trainable", "momentum")}
            lines.append(f"{type(layer).__name__} {config}")
            if isinstance(layer, keras.Model) and not isinstance(layer, keras.Sequential):
                lines += [f"    {op.name}: {[t.name for t in keras.tree.flatten(op.input)]} -> {op.output}"
                          for op in layer.operations if len(op._inbound_nodes) == 1]  # fmt: skip
        return "\n  ".join(lines)


class Builder:
    """Adds random layers to values of a Functional model."""

    def __init__(self, draw: Draw, dtype: str, depth: int = 0) -> None:
        self.draw, self.dtype, self.depth = draw, dtype, depth
        self.norms: list[keras.layers.Layer] = []
        self.values: list[Any] = []
        self.used: set[int] = set()
        self._made: dict[Any, list[Any]] = {}

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """A layer that was made before for this key, or a new one."""
        known = self._made.setdefault(key, [])
        if known and self.integer(0, 2) == 0:
            return self.draw(st.sampled_from(known))
        known.append(make())
        return known[-1]

    def step(self) -> None:
        x = self.draw(st.sampled_from(self.values[::-1]))
        rank = len(x.shape)
        kinds = ["norm"] * 5 + ["activation", "dropout", "concat", "add", "dense"]
        if rank > 2:
            kinds += _IN_SPACE
        if rank == 3:
            kinds += ["causal"]
        if rank == 4 and self.dtype == "float32":
            kinds += ["fused"] * 2
        if self.depth == 0:
            kinds += ["nested"]
        y = getattr(self, f"_{self.pick(*kinds)}")(x)
        if y is not None:
            self.values.append(y)

    def of_rank(self, name: str, x: Any) -> Any:
        """The class of layers for that many axes."""
        return getattr(layers, name.replace("?", str(len(x.shape) - 2)), None)

    def read(self, *tensors: Any) -> Any:
        self.used.update(map(id, tensors))
        return tensors[0] if len(tensors) == 1 else list(tensors)

    def call(self, layer: Any, x: Any, **arguments: Any) -> Any:
        return layer(self.read(x), **arguments)

    def _norm(self, x: Any) -> Any:
        axis = self.pick(-1, -1, -1, -1, 1)

        def make() -> Any:
            arguments = {"epsilon": self.pick(1e-3, 1e-5), "center": self.integer(0, 4) > 0,
                         "scale": self.integer(0, 4) > 0, "axis": axis}  # fmt: skip
            self.norms.append(layers.BatchNormalization(**arguments))
            return self.norms[-1]

        layer = self.shared(("norm", len(x.shape), axis, x.shape[axis]), make)
        return self.call(layer, x, **self.pick({}, {}, {"training": False}))

    def _options(self, x: Any, size: int) -> dict[str, Any]:
        fits = all(n >= size for n in x.shape[1:-1])
        options = {"padding": self.pick("same", *["valid"] * 2 * fits), "use_bias": self.draw(st.booleans())}
        options["activation"] = self.pick(None, None, None, "relu")
        return options

    def _conv(self, x: Any) -> Any:
        size = self.integer(1, 3)
        options = self._options(x, size)
        groups = self.pick(*[g for g in (1, 1, 1, 2) if x.shape[-1] % g == 0])
        filters = groups * self.integer(1, 4 // groups)
        kind = self.pick("strides", "dilation_rate") if options["padding"] == "same" else "strides"
        options |= {kind: self.pick(1, 1, 2), "groups": groups}
        key = ("conv", len(x.shape), x.shape[-1], size, str(options), filters)
        return self.call(self.shared(key, lambda: self.of_rank("Conv?D", x)(filters, size, **options)), x)

    def _causal(self, x: Any) -> Any:
        return self.call(
            layers.Conv1D(self.integer(1, 4), self.integer(1, 3), padding="causal", dilation_rate=self.pick(1, 2)), x
        )

    def _pointwise(self, x: Any) -> Any:
        key = ("pointwise", len(x.shape), x.shape[-1])
        make = lambda: self.of_rank("Conv?D", x)(self.integer(1, 4), 1, use_bias=self.draw(st.booleans()))  # noqa: E731
        return self.call(self.shared(key, make), x)

    def _depthwise(self, x: Any) -> Any:
        cls, size = self.of_rank("DepthwiseConv?D", x), self.integer(1, 3)
        options = self._options(x, size) | {"strides": self.pick(1, 2), "depth_multiplier": self.integer(1, 2)}
        return None if cls is None else self.call(cls(size, **options), x)

    def _separable(self, x: Any) -> Any:
        cls, size = self.of_rank("SeparableConv?D", x), self.integer(1, 3)
        options = self._options(x, size) | {"depth_multiplier": self.integer(1, 2)}
        return None if cls is None else self.call(cls(self.integer(1, 4), size, **options), x)

    def _transposed(self, x: Any) -> Any:
        if max(x.shape[1:-1]) > 7:
            return None
        size, stride = self.integer(1, 3), self.pick(1, 2)
        options = {"padding": self.pick("same", "valid"), "use_bias": self.draw(st.booleans())}
        return self.call(self.of_rank("Conv?DTranspose", x)(self.integer(1, 4), size, strides=stride, **options), x)

    def _fused(self, x: Any) -> Any:
        def make() -> Any:
            arguments = {"padding": self.pick("same", "same", ((1, 1), (1, 1))), "use_bias": self.draw(st.booleans())}
            arguments["activation"] = self.pick(None, "relu")
            self.norms.append(FusedConvBN(self.integer(1, 4), self.pick(1, 3), **arguments))
            return self.norms[-1]

        layer = self.shared(("fused", x.shape[-1]), make)
        return self.call(layer, x)

    def _dense(self, x: Any) -> Any:
        make = lambda: layers.Dense(self.integer(1, 4), activation=self.pick(None, None, "relu"))  # noqa: E731
        return self.call(self.shared(("dense", x.shape[-1]), make), x)

    def _activation(self, x: Any) -> Any:
        return self.call(
            self.pick(layers.ReLU, lambda: layers.Activation("tanh"), lambda: layers.Activation("linear"))(), x
        )

    def _dropout(self, x: Any) -> Any:
        kinds = [lambda: layers.Dropout(0.5), lambda: layers.GaussianNoise(0.3), layers.Identity]
        return self.call(self.pick(*kinds)(), x)

    def _pool(self, x: Any) -> Any:
        kinds = ["MaxPooling?D", "AveragePooling?D"]
        if len(x.shape) == 5 and self.dtype == "float64":  # for which TensorFlow has no kernel
            return None
        cls = self.of_rank(self.pick(*kinds), x)
        return self.call(cls(2, strides=self.pick(1, 2), padding="same"), x)

    def _upsample(self, x: Any) -> Any:
        return self.call(self.of_rank("UpSampling?D", x)(2), x) if max(x.shape[1:-1]) < 5 else None

    def _pad(self, x: Any) -> Any:
        return self.call(self.of_rank("ZeroPadding?D", x)(1), x) if max(x.shape[1:-1]) < 8 else None

    def _crop(self, x: Any) -> Any:
        return self.call(self.of_rank("Cropping?D", x)(1), x) if min(x.shape[1:-1]) > 2 else None

    def _global_pool(self, x: Any) -> Any:
        cls = self.of_rank(self.pick("GlobalMaxPooling?D", "GlobalAveragePooling?D"), x)
        return self.call(cls(keepdims=self.draw(st.booleans())), x)

    def _permute(self, x: Any) -> Any:
        order = self.draw(st.permutations(range(1, len(x.shape))))
        return self.call(layers.Permute(tuple(order)), x)

    def _flatten(self, x: Any) -> Any:
        return self.call(layers.Flatten(), x)

    def _rows(self, x: Any) -> Any:
        return self.call(layers.Reshape((-1, x.shape[-1])), x)

    def _concat(self, x: Any) -> Any:
        others = [y for y in self.values[::-1] if y.shape[:-1] == x.shape[:-1]]
        return layers.Concatenate()(self.read(x, self.draw(st.sampled_from(others))))

    def _add(self, x: Any) -> Any:
        others = [y for y in self.values[::-1] if y.shape == x.shape]
        return self.pick(layers.Add, layers.Add, layers.Subtract)()(self.read(x, self.draw(st.sampled_from(others))))

    def _nested(self, x: Any) -> Any:
        return self.call(self.shared(("nested", x.shape), lambda: self._model(x.shape)), x)

    def _model(self, shape: tuple[int | None, ...]) -> keras.Model:
        inner = Builder(self.draw, self.dtype, self.depth + 1)
        model = inner.sequential(shape) if self.draw(st.booleans()) else inner.functional(shape, 4, 1)
        self.norms += inner.norms
        return model

    def functional(self, shape: tuple[int | None, ...], steps: int, outputs: int | None = None) -> keras.Model:
        """Of everything that nothing reads, or of the last value alone."""
        inputs = keras.Input(shape[1:], dtype=self.dtype)
        self.values = [inputs]
        for _ in range(self.integer(1, steps)):
            if outputs:
                self.values = self.values[-1:]
            self.step()
        ends = [v for v in self.values if id(v) not in self.used and v is not inputs]
        if outputs or not ends:
            return keras.Model(inputs, self.values[-1] if self.values[-1] is not inputs else layers.ReLU()(inputs))
        more = [v for v in self.values[1:] if all(v is not e for e in ends)]
        if more and self.integer(0, 3) == 0:
            ends.append(self.draw(st.sampled_from(more)))
        return keras.Model(inputs, ends[0] if len(ends) == 1 else ends)

    def sequential(self, shape: tuple[int | None, ...]) -> keras.Model:
        """Of the layers of a Functional model that is a chain."""
        model = self.functional(shape, 4, 1)
        chain = [layer for layer in model.layers if not isinstance(layer, layers.InputLayer)]
        alone = all(len(keras.tree.flatten(layer.input)) == 1 for layer in chain if len(layer._inbound_nodes) == 1)
        if (
            not alone
            or len(set(map(id, chain))) < len(model.operations) - 1
            or any(len(layer._inbound_nodes) != 1 for layer in chain)
        ):
            return model
        return keras.Sequential([keras.Input(shape[1:], dtype=self.dtype), *chain])


def randomize(draw: Draw, model: keras.Model) -> None:
    """Random weights; batch norms that do not shift, or turn signs, or switch channels off."""
    rng = np.random.default_rng(draw(st.integers(0, 3)))
    for layer in model._flatten_layers():
        kind = draw(st.sampled_from(["any", "any", "no shift", "positive", "zeros"])) if hasattr(layer, "gamma") else ""
        for weight in () if isinstance(layer, keras.Model) else layer.weights:
            weight.assign(_weight(rng, weight, kind))


def _weight(rng: np.random.Generator, weight: Any, kind: str) -> np.ndarray:
    if weight.dtype.startswith("uint") or not weight.shape:
        return weight.numpy()
    value = rng.normal(size=weight.shape)
    if weight.name == "moving_variance":
        return rng.uniform(0.3, 3, weight.shape)
    if weight.name == "gamma":
        value = np.where(value > 0, 1, -1) * rng.uniform(0.5, 1.5, weight.shape)
        value[: 1 if kind == "zeros" else 0] = 0
        return abs(value) if kind == "positive" else value
    if weight.name in ("beta", "moving_mean", "bias"):
        return value * (kind != "no shift")
    return value / np.sqrt(max(np.prod(weight.shape[:-1]), 1))


def random_model(draw: Draw, steps: int = 8) -> RandomModel:
    """Of up to `steps` layers, and of those of models within it.

    No strategy makes it, for Keras seeds its layers by Python's own random numbers.
    """
    keras.backend.clear_session()
    dtype = draw(st.sampled_from(["float64", "float32"]))
    space = draw(st.sampled_from([(), (5,), (4, 5), (4, 4), (6, 3), (3, 3, 3)]))
    shape = (None, *space, draw(st.integers(1, 4)))
    with policy(dtype):
        builder = Builder(draw, dtype)
        whole = draw(st.sampled_from(["functional", "functional", "sequential"]))
        model = builder.functional(shape, steps) if whole == "functional" else builder.sequential(shape)
        randomize(draw, model)
    held = {id(layer) for layer in model._flatten_layers()}
    count = sum(id(norm) in held for norm in builder.norms)
    images = np.random.default_rng(9).normal(size=(2, *shape[1:])).astype(dtype)
    return RandomModel(model, images, count)
