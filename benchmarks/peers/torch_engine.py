"""PyTorch: a traced module, frozen and optimized for inference (which folds batch norm), images in channels_last."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.cases import Case
from benchmarks.networks import Program, Weights
from benchmarks.peers.engine import dense_nchw, to_nchw, to_nhwc, to_oihw
from benchmarks.problem import EPSILON

_ACTIVATIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda u: u,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "leaky_relu": lambda u: functional.leaky_relu(u, 0.2),
    "elu": functional.elu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "hard_swish": functional.hardswish,
}


def _tensor(array: np.ndarray) -> torch.Tensor:
    """In the array's type; images in channels_last."""
    if array.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.contiguous(memory_format=torch.channels_last) if array.ndim == 4 else tensor


def _pad(x: torch.Tensor, case: Case, value: float = 0.0) -> torch.Tensor:
    """What the layers do not do themselves: other padding behind than before."""
    top, bottom, left, right = case.pads
    return x if (top, left) == (bottom, right) else functional.pad(x, (left, right, top, bottom), value=value)


def _own_padding(case: Case) -> tuple[int, int]:
    top, bottom, left, right = case.pads
    return (top, left) if (top, left) == (bottom, right) else (0, 0)


class _Module(nn.Module):
    """The program as a module: what tracing and freezing want."""

    def __init__(self, program: Program, layers: list[nn.Module]):
        super().__init__()
        self.layers, self._program = nn.ModuleList(layers), program

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._program.run(*inputs)


class Torch:
    """An Engine whose tensors are numbers of a Program."""

    def __init__(self, threads: int, dtype: str):
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self._program, self._layers = Program(), []
        self._dtype = getattr(torch, dtype)

    def input(self, shape: tuple[int, ...]) -> int:
        n, h, w, c = shape
        example = torch.zeros(n, c, h, w, dtype=self._dtype).contiguous(memory_format=torch.channels_last)
        return self._program.input(example)

    def _keep(self, layer: nn.Module, **values: np.ndarray) -> nn.Module:
        layer.load_state_dict({name: _tensor(value) for name, value in values.items()}, strict=False)
        self._layers.append(layer.to(self._dtype))
        return layer

    def conv_bn(self, x: int, case: Case, weights: Weights, residual: int | None) -> int:
        size = (case.filter_height, case.filter_width)
        bare = nn.Conv2d(
            case.channels, case.out_channels, size, case.stride, _own_padding(case), case.dilation, case.groups, False
        )
        conv = self._keep(bare, weight=to_oihw(weights.filters))
        norm = self._keep(
            nn.BatchNorm2d(case.out_channels, EPSILON), weight=weights.gamma, bias=weights.beta,
            running_mean=weights.moving_mean, running_var=weights.moving_variance,
        )  # fmt: skip
        activate = _ACTIVATIONS[case.activation]

        def forward(inputs: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
            y = norm(conv(_pad(inputs, case)))
            return activate(y if added is None else y + added)

        return self._program.add(forward, x, *([] if residual is None else [residual]))

    def max_pool(self, x: int, window: Case) -> int:
        def forward(image: torch.Tensor) -> torch.Tensor:
            padded = _pad(image, window, value=-torch.inf)
            return functional.max_pool2d(padded, window.filter_height, window.stride, _own_padding(window))

        return self._program.add(forward, x)

    def mean(self, x: int) -> int:
        return self._program.add(lambda image: image.mean((2, 3)), x)

    def dense(self, x: int, weights: np.ndarray, bias: np.ndarray, relu: bool) -> int:
        inputs, units = dense_nchw(weights).shape
        matrix = np.ascontiguousarray(dense_nchw(weights).T)
        layer = self._keep(nn.Linear(inputs, units), weight=matrix, bias=bias)
        activate = functional.relu if relu else _ACTIVATIONS[None]
        return self._program.add(lambda vector: activate(layer(torch.flatten(vector, 1))), x)

    def compile(self, output: int) -> None:
        module = _Module(self._program, self._layers).eval()
        module = module.to(memory_format=torch.channels_last)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and folds and fuses without a compiler
            traced = torch.jit.trace(module, tuple(self._program.examples), check_trace=False)
            self._model = torch.jit.optimize_for_inference(torch.jit.freeze(traced))

    def bind(self, arrays: Sequence[np.ndarray]) -> Callable[[], Any]:
        tensors = [_tensor(to_nchw(array)) for array in arrays]

        def call() -> torch.Tensor:
            with torch.inference_mode():
                return self._model(*tensors)

        return call

    def result(self, output: Any) -> np.ndarray:
        return to_nhwc(output.float().numpy())
