"""Runs the kernels on guarded memory: whatever they read that nobody wrote is NaN, whatever they write astray shows.

Each array of a call lies between bytes that are all ones, NaN in every type. Results and workspace are such bytes at
first, so that a result that is not written, or made of scratch that is not, is NaN too. Where AddressSanitizer runs, it
reports whoever touches the bytes around. It does not see what tiles of AMX load, nor what vectors do with a mask:
arrays at the end or the beginning of a page, beside one that nobody may touch, make reading astray a fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fusedconvbn import _load

RESULTS = {"forward": 6, "backward": 7, "pack_filters": 1}  # of the arrays of a call, the last before the workspace
LINE = 64  # bytes: results begin there, unless they are to be off it
GUARD = 4 * LINE


class _Sanitizer:
    """AddressSanitizer's own marks on memory; nothing, where the process runs without it."""

    def __init__(self):
        process = ctypes.CDLL(None)
        self.forbid = getattr(process, "__asan_poison_memory_region", self._nothing)
        self.allow = getattr(process, "__asan_unpoison_memory_region", self._nothing)

    @staticmethod
    def _nothing(address: ctypes.c_void_p, size: ctypes.c_size_t) -> None:
        pass


SANITIZER = _Sanitizer()


class Guarded:
    """A copy of `array` that begins `offset` elements behind a cache line; of a result the size only is taken."""

    def __init__(self, array: np.ndarray, offset: int, is_result: bool):
        self.original, self.is_result = array, is_result
        self._memory, start = self._allocate(array, offset)
        self._around = (slice(0, start), slice(start + array.nbytes, None))
        self.array = self._memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        if not is_result:
            self.array[...] = array

    def _allocate(self, array: np.ndarray, offset: int) -> tuple[np.ndarray, int]:
        """Bytes, and where among them the array is to begin."""
        memory = np.full(array.nbytes + 2 * GUARD + LINE, 0xFF, np.uint8)
        return memory, -memory.ctypes.data % LINE + GUARD + offset * array.itemsize

    def mark(self, act: Callable[[ctypes.c_void_p, ctypes.c_size_t], None]) -> None:
        """Forbids or allows access to what is around."""
        for around in self._around:
            memory = self._memory[around]
            act(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes))

    def check(self, what: str) -> None:
        for side, around in zip(("before", "behind"), self._around):
            touched = np.flatnonzero(self._memory[around] != 0xFF)
            assert not touched.size, f"{touched.size} bytes {side} {what} were written"
        if not self.is_result:
            same = np.array_equal(self.array.view(np.uint8), np.ascontiguousarray(self.original).view(np.uint8))
            assert same, f"{what} was written"

    def copy_back(self) -> None:
        if self.is_result:
            self.original[...] = self.array


class BeforePage(Guarded):
    """An array whose last byte is its page's last, as far as its alignment allows; `offset` is ignored."""

    def _allocate(self, array: np.ndarray, offset: int) -> tuple[np.ndarray, int]:
        memory = self._between_pages(array.nbytes)
        alignment = LINE if array.dtype == np.uint8 else array.itemsize  # bytes: a workspace, packed filters
        return memory, (memory.size - array.nbytes) // alignment * alignment

    @staticmethod
    def _between_pages(size: int) -> np.ndarray:
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        everything = np.frombuffer(mmap.mmap(-1, size + 2 * mmap.PAGESIZE), np.uint8)
        memory, no_access = everything[mmap.PAGESIZE : mmap.PAGESIZE + size], 0
        memory[...] = 0xFF
        for page in (everything[: mmap.PAGESIZE], everything[mmap.PAGESIZE + size :]):
            address, extent = ctypes.c_void_p(page.ctypes.data), ctypes.c_size_t(page.nbytes)
            assert ctypes.CDLL(None).mprotect(address, extent, no_access) == 0
        return memory

    def mark(self, act: Callable[[ctypes.c_void_p, ctypes.c_size_t], None]) -> None:
        """The pages around are enough."""


class BehindPage(BeforePage):
    """An array whose first byte is its page's first."""

    def _allocate(self, array: np.ndarray, offset: int) -> tuple[np.ndarray, int]:
        return self._between_pages(array.nbytes), 0


class GuardedCore:
    """fusedconvbn._core with guarded calls."""

    def __init__(self, core: Any, offset: int, memory: type[Guarded] = Guarded):
        self._core, self._offset, self._memory = core, offset, memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def forward(self, plan: Any, *arrays: np.ndarray | None) -> None:
        self._run("forward", plan, arrays[:-1])

    def backward(self, plan: Any, *arrays: np.ndarray | None) -> None:
        self._run("backward", plan, arrays[:-1])

    def pack_filters(self, plan: Any, *arrays: np.ndarray | None) -> None:
        self._run("pack_filters", plan, arrays[:-1])

    def _offset_of(self, array: np.ndarray) -> int:
        """Packed filters, the only bytes, begin at a cache line."""
        return 0 if array.dtype == np.uint8 else self._offset

    def _run(self, direction: str, plan: Any, arrays: tuple[np.ndarray | None, ...]) -> None:
        first_result = len(arrays) - RESULTS[direction]
        guarded = [
            None if array is None else self._memory(array, self._offset_of(array), position >= first_result)
            for position, array in enumerate(arrays)
        ]
        workspace = self._memory(np.empty(plan.workspace_bytes, np.uint8), 0, True)
        everything = [*filter(None, guarded), workspace]
        for memory in everything:
            memory.mark(SANITIZER.forbid)
        try:
            getattr(self._core, direction)(plan, *(g and g.array for g in guarded), workspace.array)
        finally:
            for memory in everything:
                memory.mark(SANITIZER.allow)
        for position, g in enumerate(guarded):
            if g is not None:
                g.check(f"array {position} of {direction}")
                g.copy_back()
        workspace.check("the workspace")


@contextlib.contextmanager
def guarded(offset: int = 0, memory: type[Guarded] = Guarded) -> Iterator[None]:
    """Within it, calls of `raw` run on guarded memory whose arrays begin `offset` elements behind a cache line."""
    load, core = _load.core, GuardedCore(_load.core(), offset, memory)
    _load.core = lambda: core
    try:
        yield
    finally:
        _load.core = load
