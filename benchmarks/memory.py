"""The memory of this process, or of its GPU, in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
import resource
from typing import Any

_STATUS, _CLEAR_REFS = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets VmHWM to VmRSS


class HostMemory:
    """Resident memory; where the kernel does not let a process reset its peak, the peak is that since its start."""

    what = "resident memory of the process"
    steady = False  # TensorFlow's allocator keeps what it has: only the first call shows what a call needs

    def reset(self) -> None:
        """Gives free memory back to the system and makes the present use the peak."""
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text(_RESET_PEAK)

    def used(self) -> int:
        return _status("VmRSS")

    def peak(self) -> int:
        return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(key: str) -> int:
    """A line of /proc/self/status, which counts in kB; 0 on systems without it."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


class GpuMemory:
    """What TensorFlow's allocator has handed out on the first GPU."""

    what = "memory allocated on the GPU"
    steady = True  # exact in every call, and the first one tries kernels out

    def reset(self) -> None:
        _experimental().reset_memory_stats("GPU:0")

    def used(self) -> int:
        return _experimental().get_memory_info("GPU:0")["current"]

    def peak(self) -> int:
        return _experimental().get_memory_info("GPU:0")["peak"]


def _experimental() -> Any:
    import tensorflow as tf

    return tf.config.experimental
