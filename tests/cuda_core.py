"""The CUDA kernels in the place of the core that `raw` calls: on a GPU, or on the host (cuda/host/fibers.h)."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fusedconvbn import _load

ROOT = Path(__file__).parent.parent
PACKED_FILTERS = 7  # their position in `forward`; GPUs do not read them


def has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def build(folder: Path, target: str, **options: str) -> None:
    """Builds a target of CMakeLists.txt, unless asked to without TensorFlow, into the folder; `options` are CMake's."""
    settings = {"FUSEDCONVBN_TF": "OFF", "FUSEDCONVBN_CUDA": "OFF", "FUSEDCONVBN_OUTPUT": folder}
    settings |= {"Python_EXECUTABLE": sys.executable, **options}
    cmake = [sys.executable, "-m", "cmake"]
    for command in (
        [*cmake, "-S", ROOT, "-B", folder / "build", *(f"-D{name}={value}" for name, value in settings.items())],
        [*cmake, "--build", folder / "build", "--target", target],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]


def build_host(folder: Path, **options: str) -> Path:
    """Builds the kernels for the host: the library's path."""
    build(folder, "cuda_host", **options)
    return folder / "libcuda_host.so"


class Core:
    """`forward` and `backward` of the core, by a CUDA library; `memory` is its device's."""

    def __init__(self, library: Any, memory: Memory):
        self._library, self._memory, self._core = library, memory, _load.core()

    def Params(self, **arguments: Any) -> Any:
        return self._core.Params(**arguments)

    def Plan(self, params: Any, *, backward: bool, **_: Any) -> Plan:
        return self._library.plan(params, backward)

    def forward(self, plan: Any, *arrays: np.ndarray | None) -> None:
        without_packed = [*arrays[:PACKED_FILTERS], *arrays[PACKED_FILTERS + 1 : -1]]
        self._run(self._library.forward, plan, without_packed, 7)

    def backward(self, plan: Any, *arrays: np.ndarray | None) -> None:
        self._run(self._library.backward, plan, list(arrays[:-1]), 14)

    def _run(self, entry: Any, plan: Any, arrays: list[np.ndarray | None], read: int) -> None:
        """Results and workspace hold NaN before: what is not written shows."""
        given = {id(array) for array in arrays[:read]}
        results = [array for array in arrays[read:] if array is not None]
        for array in results:
            if id(array) not in given:  # one may be an argument, too
                array.reshape(-1).view(np.uint8)[:] = 0xFF
        memory = self._memory
        buffers = {id(array): memory.copy_of(array) for array in arrays if array is not None}
        workspace = memory.copy_of(aligned(plan.workspace_bytes))
        addresses = [0 if array is None else memory.address(buffers[id(array)]) for array in arrays]
        entry(plan, addresses, memory.address(workspace), memory.stream)
        for array in results:
            memory.copy_from(memory.address(buffers[id(array)]), array)


class Memory:
    """The host's: nothing is copied."""

    stream = 0

    def copy_of(self, array: np.ndarray) -> Any:
        return array

    def address(self, buffer: Any) -> int:
        return buffer.ctypes.data

    def copy_from(self, address: int, array: np.ndarray) -> None:
        """What is there when all kernels have run."""
        if array.size and address != array.ctypes.data:
            ctypes.memmove(array.ctypes.data, address, array.nbytes)


class GpuMemory(Memory):
    """Bytes, as CuPy knows no bfloat16, each piece from CUDA, whose sanitizer sees it; a stream that waits for none."""

    def __init__(self, cupy: Any):
        cupy.cuda.set_allocator(None)
        self._cupy, self._stream = cupy, cupy.cuda.Stream(non_blocking=True)

    @property
    def stream(self) -> int:
        """When all that was copied is there."""
        self._cupy.cuda.Device().synchronize()
        return self._stream.ptr

    def copy_of(self, array: np.ndarray) -> Any:
        return self._cupy.asarray(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def address(self, buffer: Any) -> int:
        return buffer.data.ptr

    def copy_from(self, address: int, array: np.ndarray) -> None:
        self._stream.synchronize()
        if array.size:
            self._cupy.cuda.runtime.memcpy(array.ctypes.data, address, array.nbytes, 2)  # device to host


def aligned(size: int) -> np.ndarray:
    """So many bytes of NaN at a multiple of 256."""
    memory = np.full(size + 255, 0xFF, np.uint8)
    begin = -memory.ctypes.data % 256
    return memory[begin : begin + size]
