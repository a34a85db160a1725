"""Stand-ins for CuPy and torch with two devices, both the host: as much of them as `raw` uses.

They note on which device and stream they allocate, and what they hand out holds NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

CURRENT_STREAM = 7


class State:
    """The current device and stream, and each (device, stream) at which memory was asked for."""

    def __init__(self) -> None:
        self.device, self.stream = 0, CURRENT_STREAM
        self.allocations: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def on(self, **now: int) -> Iterator[None]:
        before = {name: getattr(self, name) for name in now}
        self.__dict__.update(now)
        yield
        self.__dict__.update(before)

    def allocate(self, shape: Any, dtype: np.dtype, fill: int = 0xFF) -> np.ndarray:
        self.allocations.append((self.device, self.stream))
        array = np.empty(shape, dtype)
        memory = np.full(array.nbytes + 256, fill, np.uint8)
        start = -memory.ctypes.data % 256
        return memory[start : start + array.nbytes].view(dtype).reshape(shape)


class Array:
    """On the device that was current, `host` to those who look."""

    def __init__(self, library: Any, host: np.ndarray, device: int | None = None):
        self.library, self.host = library, host
        self.number = library.state.device if device is None else device
        self.shape, self.ndim = host.shape, host.ndim


class CupyArray(Array):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.dtype, self.device = self.host.dtype, self.library.Device(self.number)

    @property
    def __cuda_array_interface__(self) -> dict:
        return self.host.__array_interface__


class Cupy:
    """The module."""

    def __init__(self) -> None:
        self.state, self.cuda = State(), self

    def array(self, host: np.ndarray, device: int = 0) -> CupyArray:
        return CupyArray(self, host, device)

    def asarray(self, array: CupyArray) -> CupyArray:
        return array

    def ascontiguousarray(self, array: CupyArray) -> CupyArray:
        if array.host.flags.c_contiguous:
            return array
        copy = self.empty(array.shape, array.dtype)
        copy.host[...] = array.host
        return copy

    def empty(self, shape: Any, dtype: Any) -> CupyArray:
        return CupyArray(self, self.state.allocate(shape, np.dtype(dtype)))

    def zeros(self, shape: Any, dtype: Any) -> CupyArray:
        return CupyArray(self, self.state.allocate(shape, np.dtype(dtype), 0))

    def Device(self, number: int) -> Device:
        return Device(self.state, number)

    def get_current_stream(self) -> Stream:
        return Stream(self.state.stream)

    def ExternalStream(self, pointer: int) -> Any:
        return self.state.on(stream=pointer)


class Device:
    def __init__(self, state: State, number: int):
        self._state, self.number = state, number

    def __str__(self) -> str:
        return f"<CUDA Device {self.number}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.number == other.number

    def __enter__(self) -> None:
        self._on = self._state.on(device=self.number)
        self._on.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._on.__exit__(*error)


class Stream:
    def __init__(self, pointer: int):
        self.ptr = self.cuda_stream = pointer


class Tensor(Array):
    """A torch tensor."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.dtype, self.device, self.is_cuda = f"torch.{self.host.dtype.name}", f"cuda:{self.number}", True

    def detach(self) -> Tensor:
        return self

    def contiguous(self) -> Tensor:
        if self.host.flags.c_contiguous:
            return self
        copy = self.library.empty(self.shape, dtype=self.host.dtype, device=self.device)
        copy.host[...] = self.host
        return copy

    def data_ptr(self) -> int:
        return self.host.ctypes.data


class Torch:
    """The module."""

    Tensor = Tensor
    float32, float64, float16, uint8 = (np.dtype(name) for name in ("float32", "float64", "float16", "uint8"))
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def __init__(self) -> None:
        self.state, self.cuda = State(), self

    def array(self, host: np.ndarray, device: int = 0) -> Tensor:
        return Tensor(self, host, device)

    def empty(self, shape: Any, *, dtype: np.dtype, device: str) -> Tensor:
        assert device == f"cuda:{self.state.device}"
        return Tensor(self, self.state.allocate(shape, dtype))

    def zeros(self, size: int, *, dtype: np.dtype, device: str) -> Tensor:
        return Tensor(self, self.state.allocate(size, dtype, 0))

    def device(self, device: str) -> Any:
        return self.state.on(device=int(device[-1]))

    def current_stream(self) -> Stream:
        return Stream(self.state.stream)

    def ExternalStream(self, pointer: int) -> int:
        return pointer or 99  # a stream of the pool

    def default_stream(self) -> int:
        return 0

    def stream(self, pointer: int) -> Any:
        return self.state.on(stream=pointer)
