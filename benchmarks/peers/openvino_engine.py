"""OpenVINO's CPU plugin in one stream. Its images are NHWC, as TensorFlow's, which it also computes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino
from openvino.preprocess import PrePostProcessor

from benchmarks.data import DTYPES
from benchmarks.peers.onnx_model import OnnxBuilder

_TYPES = {"float32": openvino.Type.f32, "float16": openvino.Type.f16, "bfloat16": openvino.Type.bf16}


class OpenVino(OnnxBuilder):
    """An Engine. Models are float32; it converts them to the type asked for, which its inputs and outputs have."""

    def __init__(self, threads: int, dtype: str):
        super().__init__(np.dtype(np.float32))
        self._dtype_name, self._type = dtype, _TYPES[dtype]
        self._properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": self._type,
        }

    def compile(self, output: str) -> None:
        core = openvino.Core()
        processor = PrePostProcessor(core.read_model(self.model(output)))
        for place in range(len(self.inputs)):
            tensor = processor.input(place).tensor()
            tensor.set_element_type(self._type).set_layout(openvino.Layout("NHWC"))
            processor.input(place).model().set_layout(openvino.Layout("NCHW"))
        result = processor.output()
        result.tensor().set_element_type(self._type)
        if self.image(output):
            result.tensor().set_layout(openvino.Layout("NHWC"))
            result.model().set_layout(openvino.Layout("NCHW"))
        self._compiled = core.compile_model(processor.build(), "CPU", self._properties)

    def bind(self, arrays: Sequence[np.ndarray]) -> Callable[[], Any]:
        request = self._compiled.create_infer_request()
        tensors = [_tensor(array, self._type) for array in arrays]  # they do not keep their memory alive
        for place, (tensor, _) in enumerate(tensors):
            request.set_input_tensor(place, tensor)

        def call() -> Any:
            request.infer()
            return request.get_output_tensor(), tensors

        return call

    def result(self, output: Any) -> np.ndarray:
        tensor, _ = output
        return np.array(tensor.data).view(DTYPES[self._dtype_name])


def _tensor(array: np.ndarray, kind: openvino.Type) -> tuple[openvino.Tensor, np.ndarray]:
    """A tensor that lies in the array, and the array."""
    array = np.ascontiguousarray(array)
    plain = array.view(np.int16) if array.dtype.itemsize == 2 else array
    return openvino.Tensor(plain, list(array.shape), kind), array
