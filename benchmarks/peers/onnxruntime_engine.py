"""ONNX Runtime's CPU provider, all graph optimizations: it folds batch norm by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.data import DTYPES
from benchmarks.peers.engine import to_nchw, to_nhwc
from benchmarks.peers.onnx_model import OnnxBuilder


class OnnxRuntime(OnnxBuilder):
    """An Engine; calls use bound memory, so that nothing is copied or converted."""

    def __init__(self, threads: int, dtype: str):
        super().__init__(np.dtype(DTYPES[dtype]))
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.inter_op_num_threads = 1
        self._options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        self._options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._options.log_severity_level = 3

    def compile(self, output: str) -> None:
        self._session = onnxruntime.InferenceSession(
            self.model(output), self._options, providers=["CPUExecutionProvider"]
        )

    def bind(self, arrays: Sequence[np.ndarray]) -> Callable[[], Any]:
        binding = self._session.io_binding()
        for place, array in zip(self._session.get_inputs(), arrays, strict=True):
            binding.bind_ortvalue_input(place.name, onnxruntime.OrtValue.ortvalue_from_numpy(to_nchw(array)))
        [output] = self._session.get_outputs()
        binding.bind_output(output.name)
        self._session.run_with_iobinding(binding)  # allocates the output
        [value] = binding.get_outputs()
        binding.bind_ortvalue_output(output.name, value)

        def call() -> Any:
            self._session.run_with_iobinding(binding)
            return value

        return call

    def result(self, output: Any) -> np.ndarray:
        return to_nhwc(output.numpy())
