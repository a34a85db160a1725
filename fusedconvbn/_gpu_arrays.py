"""Arrays on a GPU, CuPy's and torch's, and the CUDA kernels on them. Imports a library for arrays of its own only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from fusedconvbn import _arguments, _load

_PACKED_FILTERS = 7  # their position in `forward`


def library_of(array: Any, stream: Any) -> Any:
    """A `_arrays.Library`; None if the array is not on a GPU."""
    if _is_torch(array):
        return _Torch(array, stream) if array.is_cuda else None
    return _Cupy(array, stream) if hasattr(array, "__cuda_array_interface__") else None


def plan(params: Any, backward: bool, isa: Any, kernel: Any, threads: Any) -> Any:
    """Of the CUDA library; what the last three say is for CPUs."""
    for name, value in (("isa", isa), ("kernel", kernel), ("threads", None if threads == 1 else threads)):
        if value is not None:
            _arguments.refuse(ValueError, name, "left out for a GPU", value)
    return _load.cuda().plan(params, backward)


class _Gpu:
    """On the device of `array`, in the order of the stream: that given, else the library's current one."""

    def __init__(self, device: Any, stream: Any):
        self._device, self._stream = device, None if stream is None else _stream_address(stream)

    def plan(self, params: Any, backward: bool, isa: Any, kernel: Any, threads: Any) -> Any:
        return plan(params, backward, isa, kernel, threads)

    def forward(self, plan: Any, *arrays: Any) -> None:
        """The arguments of the core's, of which packed filters must be None."""
        self._run(_load.cuda().forward, plan, arrays[:_PACKED_FILTERS] + arrays[_PACKED_FILTERS + 1 :])

    def backward(self, plan: Any, *arrays: Any) -> None:
        self._run(_load.cuda().backward, plan, arrays)

    def _run(self, entry: Any, plan: Any, arrays: tuple) -> None:
        """The workspace goes back to the library, which hands it out in the order of the stream."""
        workspace = self.empty((plan.workspace_bytes,), "uint8")
        with self._scope() as stream:
            addresses = [0 if array is None else self._address(array) for array in arrays]
            entry(plan, addresses, self._address(workspace), stream)

    def _check_device(self, name: str, device: Any) -> None:
        if device != self._device:
            raise ValueError(f"`{name}` must be on the device of `inputs`, {self._device}. Received: one on {device}")


class _Cupy(_Gpu):
    """CuPy's arrays, and all others with a `__cuda_array_interface__` but torch's."""

    def __init__(self, array: Any, stream: Any):
        import cupy

        self._cupy = cupy
        super().__init__(cupy.asarray(array).device, stream)

    def asarray(self, name: str, value: Any) -> Any:
        if not hasattr(value, "__cuda_array_interface__"):
            raise TypeError(f"`{name}` must be an array on a GPU, as `inputs` is. Received: {type(value).__name__}")
        array = self._cupy.asarray(value)
        self._check_device(name, array.device)
        return array

    def dtype(self, array: Any) -> str:
        return array.dtype.name

    def contiguous(self, array: Any) -> Any:
        with self._scope():
            return self._cupy.ascontiguousarray(array)

    def empty(self, shape: Any, dtype: str) -> Any:
        with self._scope():
            return self._cupy.empty(tuple(shape), numpy_dtype(dtype))

    def zeros(self, size: int, dtype: str) -> Any:
        with self._scope():
            return self._cupy.zeros(size, dtype)

    def _address(self, array: Any) -> int:
        return array.__cuda_array_interface__["data"][0]

    @contextlib.contextmanager
    def _scope(self) -> Iterator[int]:
        cuda = self._cupy.cuda
        with self._device:
            if self._stream is None:
                yield cuda.get_current_stream().ptr
            else:
                with cuda.ExternalStream(self._stream):
                    yield self._stream


class _Torch(_Gpu):
    """torch's tensors; gradients of torch's own are not recorded."""

    def __init__(self, tensor: Any, stream: Any):
        self._torch = sys.modules["torch"]
        super().__init__(tensor.device, stream)

    def asarray(self, name: str, value: Any) -> Any:
        if not _is_torch(value):
            raise TypeError(f"`{name}` must be a torch tensor, as `inputs` is. Received: {type(value).__name__}")
        self._check_device(name, value.device)
        return value.detach()

    def dtype(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def contiguous(self, array: Any) -> Any:
        with self._scope():
            return array.contiguous()

    def empty(self, shape: Any, dtype: str) -> Any:
        with self._scope():
            return self._torch.empty(tuple(shape), dtype=getattr(self._torch, dtype), device=self._device)

    def zeros(self, size: int, dtype: str) -> Any:
        with self._scope():
            return self._torch.zeros(size, dtype=getattr(self._torch, dtype), device=self._device)

    def _address(self, array: Any) -> int:
        return array.data_ptr()

    def _torch_stream(self) -> Any:
        """An ExternalStream of address 0 would be a stream of torch's own."""
        cuda = self._torch.cuda
        return cuda.ExternalStream(self._stream) if self._stream else cuda.default_stream()

    @contextlib.contextmanager
    def _scope(self) -> Iterator[int]:
        cuda = self._torch.cuda
        with cuda.device(self._device):
            if self._stream is None:
                yield cuda.current_stream().cuda_stream
            else:
                with cuda.stream(self._torch_stream()):
                    yield self._stream


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _stream_address(stream: Any) -> int:
    """Of CuPy's or torch's stream object, or a cudaStream_t as an integer."""
    address = getattr(stream, "ptr", getattr(stream, "cuda_stream", stream))
    if isinstance(address, bool) or not isinstance(address, int) or address < 0:
        _arguments.refuse(TypeError, "stream", "None, a stream of CuPy or torch, or its address", stream)
    return address


def numpy_dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
