"""The limits of this machine, measured: multiplications a second, bytes a second by the size that is touched."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

_SOURCE = pathlib.Path(__file__).with_name("hardware.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
_SIZES = tuple(1 << power for power in range(18, 29, 2))  # bytes: 256 KiB to 256 MiB, caches to memory
_GRAIN = 1 << 14  # the loops' streams are multiples of a page
_FEWEST, _MOST = 5, 15  # samples, of which the best counts: what the machine can do
_BUDGET = 20  # times the length of a sample, for all but the fewest


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """Bytes a second; of a copy, those read and those written."""

    read: float
    write: float
    copy: float

    def best(self, other: Bandwidth) -> Bandwidth:
        return Bandwidth(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the threads reach together."""

    what: str
    flops: float  # a second
    bandwidths: dict[int, Bandwidth]  # by the bytes touched

    def best(self, other: Limits) -> Limits:
        """The better of two measurements in each respect."""
        merged = dict(sorted((self.bandwidths | other.bandwidths).items()))
        both = self.bandwidths.keys() & other.bandwidths.keys()
        merged |= {size: self.bandwidths[size].best(other.bandwidths[size]) for size in both}
        return Limits(self.what, max(self.flops, other.flops), merged)


def size_class(size: int) -> int:
    """The smallest of the sizes whose bandwidth is measured that holds so many bytes, else the largest."""
    return min((each for each in _SIZES if each >= size), default=max(_SIZES))


def compiler() -> str | None:
    """What compiles the loops; None where there is none, and so no limits."""
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


class Hardware:
    """Runs the loops. A worker's object: fresh, without TensorFlow."""

    def __init__(self, threads: int, sample_seconds: float):
        self._threads, self._seconds = threads, sample_seconds
        self._loops = _compiled()
        self._pool = ThreadPoolExecutor(threads)
        self._memory = [mmap.mmap(-1, max(_SIZES) // threads) for _ in range(threads)]  # pages as TensorFlow's: small
        self._addresses = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self._memory]

    def measure(self, dtype: str, sizes: Iterable[int]) -> Limits:
        """The limits for data of a type: 16-bit ones are computed in float32, bfloat16 by AMX or pairs if faster."""
        loop, what = (
            self._loops.fma_float64 if dtype == "float64" else self._loops.fma_float32,
            "fused multiply-adds of registers",
        )
        if dtype == "bfloat16" and self._loops.amx_bfloat16(1):
            loop, what = self._loops.amx_bfloat16, "AMX products of bfloat16 tiles"
        flops = self._flops(loop)
        if dtype == "bfloat16" and self._loops.pairs_bfloat16(1):  # on AMD's cores twice as fast, on Intel's half
            pairs = self._flops(self._loops.pairs_bfloat16)
            flops, what = max((flops, what), (pairs, "products of bfloat16 pairs"))
        return Limits(what, flops, {size: self._bandwidth(size) for size in sorted(sizes)})

    def _flops(self, loop: Callable[[int], float]) -> float:
        rounds = 1 << 16
        rounds = math.ceil(rounds * self._seconds / self._best(lambda address: loop(rounds)))
        return loop(rounds) * self._threads / self._best(lambda address: loop(rounds))

    def _bandwidth(self, size: int) -> Bandwidth:
        half = max(size // 2 // self._threads // _GRAIN, 1) * _GRAIN
        whole, loops = 2 * half, self._loops
        return Bandwidth(
            self._rate(whole, lambda at: loops.read_memory(at, whole)),
            max(self._rate(whole, lambda at, way=way: loops.write_memory(at, whole, way)) for way in (0, 1)),
            max(self._rate(whole, lambda at, way=way: loops.copy_memory(at, at + half, half, way)) for way in (0, 1)),
        )

    def _rate(self, size: int, touch: Callable[[int], object]) -> float:
        """Bytes a second of all threads, each calling `touch` with the address of memory of its own."""
        repeats = max(1, round(self._seconds / self._best(touch)))

        def often(address: int) -> None:
            for _ in range(repeats):
                touch(address)

        return size * self._threads * repeats / self._best(often)

    def _best(self, work: Callable[[int], object]) -> float:
        """Seconds of the slowest thread, the best of several times."""
        seconds: list[float] = []
        while len(seconds) < _FEWEST or (len(seconds) < _MOST and sum(seconds) < _BUDGET * self._seconds):
            seconds.append(max(self._pool.map(lambda address: _timed(work, address), self._addresses)))
        return min(seconds)


def _timed(work: Callable[[int], object], address: int) -> float:
    start = time.perf_counter()
    work(address)
    return time.perf_counter() - start


def _compiled() -> ctypes.CDLL:
    """The loops of hardware.c, for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "hardware.so"
        subprocess.run([str(compiler()), *_FLAGS, "-o", str(library), str(_SOURCE)], check=True)
        loops = ctypes.CDLL(str(library))
    address, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name in ("fma_float32", "fma_float64", "amx_bfloat16", "pairs_bfloat16"):
        loop = getattr(loops, name)
        loop.argtypes, loop.restype = [integer], ctypes.c_double
    loops.read_memory.argtypes = [address, integer]
    loops.write_memory.argtypes = [address, integer, flag]
    loops.copy_memory.argtypes = [address, address, integer, flag]
    return loops
