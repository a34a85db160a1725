"""The arrays that `raw` takes and returns: NumPy's on the CPU, others' on a GPU (_gpu_arrays.py); checks of them."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from fusedconvbn import _arguments, _gpu_arrays, _load

DTYPES = ("float32", "float64", "float16", "bfloat16")  # in the order of the core's `enum class DType`
ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
_MAX_THREADS = 1024


class Library(Protocol):
    """Of arrays, and where kernels run that read them."""

    def asarray(self, name: str, value: Any) -> Any: ...
    def dtype(self, array: Any) -> str: ...
    def contiguous(self, array: Any) -> Any: ...
    def empty(self, shape: Any, dtype: str) -> Any: ...
    def zeros(self, size: int, dtype: str) -> Any: ...
    def plan(self, params: Any, backward: bool, isa: Any, kernel: Any, threads: Any) -> Any: ...
    def forward(self, plan: Any, *arrays: Any) -> None: ...
    def backward(self, plan: Any, *arrays: Any) -> None: ...


def library_of(array: Any, stream: Any = None) -> Library:
    """The library of the first argument, which all others must have, too."""
    on_gpu = _gpu_arrays.library_of(array, stream)
    if on_gpu is None and stream is not None:
        _arguments.refuse(ValueError, "stream", "None for arrays that are not on a GPU", stream)
    return on_gpu or Numpy()


class Numpy:
    """On the CPU. Results begin at a cache line, as TensorFlow's do: large ones can then be streamed to memory."""

    def asarray(self, name: str, value: Any) -> np.ndarray:
        return np.asarray(value)

    def dtype(self, array: np.ndarray) -> str:
        return array.dtype.name if array.dtype.isnative else f"{array.dtype.name} of the other byte order"

    def contiguous(self, array: np.ndarray) -> np.ndarray:
        return np.require(array, requirements=["C", "A"])

    def empty(self, shape: Any, dtype: str) -> np.ndarray:
        line, kind = 64, _gpu_arrays.numpy_dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        memory = np.empty(size + line, np.uint8)
        start = -memory.ctypes.data % line
        return memory[start : start + size].view(kind).reshape(shape)

    def zeros(self, size: int, dtype: str) -> np.ndarray:
        return np.zeros(size, dtype)

    def plan(self, params: Any, backward: bool, isa: Any, kernel: Any, threads: Any) -> Any:
        if isa is not None and isa not in ISAS:
            _arguments.refuse(ValueError, "isa", "None or one of " + ", ".join(map(repr, ISAS)), isa)
        if kernel is not None and not isinstance(kernel, str):
            _arguments.refuse(TypeError, "kernel", "None or a name that raw.kernels() lists", kernel)
        threads = _arguments.integer("threads", threads, 1, _MAX_THREADS)
        return _load.core().Plan(params, backward=backward, isa=isa or "", kernel=kernel or "", threads=threads)

    def forward(self, plan: Any, *arrays: Any) -> None:
        _load.core().forward(plan, *arrays, None)

    def backward(self, plan: Any, *arrays: Any) -> None:
        _load.core().backward(plan, *arrays, None)


class Data:
    """Inputs and filters as contiguous arrays, and the checks of all others against their dtype and channels."""

    def __init__(self, inputs: Any, filters: Any, stream: Any = None):
        self.library = library_of(inputs, stream)
        inputs = self.library.asarray("inputs", inputs)
        self.dtype = self.library.dtype(inputs)
        if self.dtype not in DTYPES:
            refuse(self.library, TypeError, "inputs", "of dtype float16, bfloat16, float32 or float64", inputs)
        self.stat_dtype = "float64" if self.dtype == "float64" else "float32"
        self.inputs = self.array("inputs", inputs, self.dtype, rank=4)
        self.filters = self.array("filters", filters, self.dtype, rank=4)
        self.channels = self.filters.shape[3]

    def vectors(self, **vectors: Any) -> list[Any]:
        """Each as a contiguous array [K] of the statistics' type."""
        return [self.array(name, value, self.stat_dtype, shape=(self.channels,)) for name, value in vectors.items()]

    def vector_or_zeros(self, name: str, value: Any) -> Any:
        """As `vectors`; zeros for None."""
        return self.library.zeros(self.channels, self.stat_dtype) if value is None else self.vectors(**{name: value})[0]

    def saved(self, shape: Any, batch_mean: Any, inv_std: Any, conv_out: Any) -> list[Any]:
        """What forward must have returned in training; `shape` is conv_out's, None if it may be missing."""
        vectors = self.vectors(batch_mean=batch_mean, inv_std=inv_std)
        return [*vectors, None if shape is None else self.image("conv_out", conv_out, shape, required=True)]

    def image(self, name: str, value: Any, shape: Any, required: bool = False) -> Any:
        """A contiguous array of this shape and the inputs' dtype; None if there is none."""
        if value is None and not required:
            return None
        return self.array(name, value, self.dtype, shape=tuple(shape))

    def empty(self, shape: Any) -> Any:
        return self.library.empty(shape, self.dtype)

    def empty_vector(self) -> Any:
        return self.library.empty((self.channels,), self.stat_dtype)

    def array(self, name: str, value: Any, dtype: str, **required: Any) -> Any:
        return array(self.library, name, value, dtype, **required)


def array(library: Library, name: str, value: Any, dtype: str, *, rank: int | None = None, shape: Any = None) -> Any:
    """`value` as an aligned C-contiguous array, copied only if it is none."""
    if value is None:
        _arguments.refuse(TypeError, name, f"an array of dtype {dtype}", value)
    result = library.asarray(name, value)
    if library.dtype(result) != dtype:
        refuse(library, TypeError, name, f"of dtype {dtype}", result)
    if rank is not None and result.ndim != rank:
        refuse(library, ValueError, name, f"of rank {rank}", result)
    if shape is not None and tuple(result.shape) != shape:
        refuse(library, ValueError, name, f"of shape {shape}", result)
    return library.contiguous(result)


def refuse(library: Library, error: type[Exception], name: str, accepted: str, array: Any) -> None:
    received = f"shape {tuple(array.shape)}, dtype {library.dtype(array)}"
    raise error(f"`{name}` must be an array {accepted}. Received: {received}")
