"""ncnn on 3x3 layers of stride 1, which its Winograd kernels serve: a bare net of one convolution."""

from __future__ import annotations

import pathlib
import struct
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import ncnn
import numpy as np

from benchmarks.cases import Case
from benchmarks.folding import fold
from benchmarks.networks import Weights
from benchmarks.peers.engine import to_nchw, to_oihw

_MAGIC = 7767517
_LAYERS = "ncnn is measured on single layers"
_ACTIVATIONS = {None: 0, "relu": 1}  # ncnn's numbers
_FLOAT32 = struct.pack("<I", 0)  # before the weights: how they are stored


class Ncnn:
    """An Engine of one layer; its net takes one image, so a batch is as many calls."""

    def __init__(self, threads: int, dtype: str):
        if dtype != "float32":
            raise ValueError(f"ncnn is measured in float32. Received: {dtype}")
        self._net = ncnn.Net()
        options = self._net.opt
        options.num_threads = threads
        options.use_vulkan_compute = False
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False

    def input(self, shape: tuple[int, ...]) -> str:
        return "x"

    def conv_bn(self, x: str, case: Case, weights: Weights, residual: str | None) -> str:
        taps = (case.filter_height, case.filter_width, case.stride, case.dilation, case.groups)
        if taps != (3, 3, 1, 1, 1) or residual or case.activation not in _ACTIVATIONS:
            raise ValueError("ncnn is measured on 3x3 layers, stride 1, no residual, activation none or relu")
        filters, bias = fold(weights)
        top, bottom, left, right = case.pads
        convolution = (
            f"Convolution conv 1 1 x y 0={case.out_channels} 1=3 4={left} 15={right} 14={top} 16={bottom} 5=1 "
            f"6={filters.size} 9={_ACTIVATIONS[case.activation]}"
        )
        self._param = f"{_MAGIC}\n2 2\nInput x 0 1 x\n{convolution}\n"
        self._weights = _FLOAT32 + to_oihw(filters).tobytes() + bias.tobytes()
        return "y"

    def max_pool(self, x: str, window: Case) -> str:
        raise NotImplementedError(_LAYERS)

    def mean(self, x: str) -> str:
        raise NotImplementedError(_LAYERS)

    def dense(self, x: str, weights: np.ndarray, bias: np.ndarray, relu: bool) -> str:
        raise NotImplementedError(_LAYERS)

    def compile(self, output: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            param, weights = (pathlib.Path(folder) / name for name in ("net.param", "net.bin"))
            param.write_text(self._param, encoding="ascii")
            weights.write_bytes(self._weights)
            if self._net.load_param(str(param)) or self._net.load_model(str(weights)):
                raise RuntimeError("ncnn does not load its net")

    def bind(self, arrays: Sequence[np.ndarray]) -> Callable[[], Any]:
        [images] = arrays
        mats = [ncnn.Mat(image).clone() for image in to_nchw(images)]

        def call() -> list[Any]:
            outputs = []
            for mat in mats:
                extractor = self._net.create_extractor()
                extractor.input("x", mat)
                outputs.append(extractor.extract("y")[1])
            return outputs

        return call

    def result(self, output: Any) -> np.ndarray:
        return np.stack([np.array(mat).transpose(1, 2, 0) for mat in output])
