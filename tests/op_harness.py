"""The GPU kernels of the op library in the place of the core that `raw` calls, by csrc/harness/kernel_harness.cc."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cuda_core
import numpy as np

from fusedconvbn import _arguments, _load

DTYPES = {"float32": 1, "float64": 2, "float16": 19, "bfloat16": 14}  # of TensorFlow's `enum DataType`, in raw's order
SIZES = {1: 4, 2: 8, 19: 2, 14: 2}
BOOL = 10
BACKWARD = (
    "output_gradient", "moving_mean_gradient", "moving_variance_gradient", "inputs", "filters", "gamma", "beta",
    "moving_mean", "moving_variance", "residual", "output", "batch_mean", "inv_std", "conv_out",
)  # fmt: skip


class Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("rank", ctypes.c_int32), ("sizes", ctypes.c_int64 * 4),
    )  # fmt: skip


class Output(NamedTuple):
    shape: tuple[int, ...]
    content: np.ndarray  # bytes


ALLOCATE, RELEASE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t), ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Harness:
    """csrc/harness/kernel_harness.cc, `library`, and the op library that it loads, `ops`; `memory` is the device's."""

    def __init__(self, library: Path, ops: Path, memory: cuda_core.Memory):
        self._library, self._memory = ctypes.CDLL(str(library)), memory
        for name in ("load", "create", "run"):
            getattr(self._library, f"harness_{name}").restype = ctypes.c_char_p
        self._library.harness_release.restype = None
        self._call("load", str(ops).encode())

    def run(self, node: str, inputs: list[np.ndarray], training: bool, wanted: list[bool]) -> list[Output | None]:
        """Runs the node's kernel for a GPU. Memory holds NaN before; None for what is not wanted, or not there."""
        memory, owned = self._memory, {}

        def allocate(size: int) -> int:
            buffer = memory.copy_of(cuda_core.aligned(size))
            owned[memory.address(buffer)] = buffer
            return memory.address(buffer)

        callbacks = ALLOCATE(allocate), RELEASE(lambda address: owned.pop(address) and None)
        kernel, flag = ctypes.c_void_p(), cuda_core.aligned(1)
        flag[:] = training
        buffers = [memory.copy_of(array) for array in inputs]
        given = [_array(memory.address(buffer), DTYPES[a.dtype.name], a.shape) for buffer, a in zip(buffers, inputs)]
        given.append(_array(flag.ctypes.data, BOOL, ()))
        outputs = (Array * len(wanted))(*(Array(dtype=int(want)) for want in wanted))
        self._call("create", b"GPU", node.encode(), *callbacks, ctypes.byref(kernel))
        try:
            stream = ctypes.c_void_p(memory.stream)
            self._call("run", kernel, (Array * len(given))(*given), len(given), stream, outputs)
            return [self._output(output) if want else None for output, want in zip(outputs, wanted)]
        finally:
            self._library.harness_release(kernel)
            assert not owned, "memory that the kernel did not give back"

    def _output(self, output: Array) -> Output:
        shape = tuple(output.sizes[: output.rank])
        content = np.empty(math.prod(shape) * SIZES[output.dtype], np.uint8)
        self._memory.copy_from(output.data or 0, content)
        return Output(shape, content)

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._library, f"harness_{name}")(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())


def start(framework: Path, library: Path, ops: Path, gpu: bool) -> None:
    """What a process does first that runs kernels."""
    global harness
    ctypes.CDLL(str(framework), mode=ctypes.RTLD_GLOBAL)
    if gpu:
        import cupy
    harness = Harness(library, ops, cuda_core.GpuMemory(cupy) if gpu else cuda_core.Memory())


def beside(folder: Path, ops: Path, cuda: Path | None) -> Path:
    """A copy of the op library, in a folder of its own with this CUDA library."""
    shutil.copy(ops, folder / "_ops.so")
    if cuda is not None:
        shutil.copy(cuda, folder / "_cuda.so")
    return folder / "_ops.so"


def run(*arguments: Any) -> list[Output | None]:
    """`Harness.run` of this process."""
    return harness.run(*arguments)


def process(**arguments: Any) -> ProcessPoolExecutor:
    """Of its own: another copy of the op library may have registered kernels in this one. Takes what `start` takes."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=partial(start, **arguments))


def conv_out_shape(arguments: dict[str, Any], output: list[int]) -> list[int]:
    """Of what forward saves; the arguments of the core's `Params`."""
    save = _arguments.SAVES[arguments["save"]]
    if not arguments["training"] or save == "recompute":
        return []
    in_bfloat16 = save == "bfloat16" and arguments["dtype"] == 0
    return [(math.prod(output) + 1) // 2] if in_bfloat16 else output


class Plan(NamedTuple):
    """What `raw` asks of a plan."""

    params: Any
    arguments: dict[str, Any]
    conv_out_shape: list[int]
    packed_form: None = None


class Core:
    """`forward` and `backward` of the core, by the op library's kernels for a GPU, in such a process."""

    def __init__(self, process: ProcessPoolExecutor):
        self._process, self._core = process, _load.core()

    def Params(self, **arguments: Any) -> Any:
        self._arguments = arguments
        return self._core.Params(**arguments)

    def Plan(self, params: Any, **_: Any) -> Plan:
        return Plan(params, self._arguments, conv_out_shape(self._arguments, params.output_shape))

    def forward(self, plan: Plan, *arrays: np.ndarray | None) -> None:
        arrays = [*arrays[:7], *arrays[8:-1]]  # without packed filters and threads
        attributes = {"num_residual": int(plan.arguments["residual"])}
        self._run("FusedConvBN", plan, attributes, arrays[:7], arrays[7:])

    def backward(self, plan: Plan, *arrays: np.ndarray | None) -> None:
        given, results = dict(zip(BACKWARD, arrays)), arrays[14:-1]
        has_residual = given["residual"] is not None
        if not plan.params.needs_residual:
            given["residual"] = None
        if not plan.params.needs_output:
            given["output"] = None
        unread = np.full(plan.arguments["filters_shape"][3], np.nan, given["gamma"].dtype)
        for name in ("batch_mean", "inv_std"):
            given[name] = unread if given[name] is None else given[name]
        if given["conv_out"] is None:
            given["conv_out"] = np.empty((0, 0, 0, 0), given["inputs"].dtype)
        attributes = {
            "num_residual": int(plan.params.needs_residual), "num_output": int(given["output"] is not None),
            "has_residual": has_residual, "num_residual_gradient": int(results[-1] is not None),
            "needs_inputs": results[0] is not None, "needs_filters": results[1] is not None,
        }  # fmt: skip
        if results[-1] is None:
            results = results[:-1]  # an empty list
        self._run("FusedConvBNGrad", plan, attributes, [*given.values()], results)

    def _run(self, op: str, plan: Plan, attributes: dict, arrays: list, results: list[np.ndarray | None]) -> None:
        inputs, wanted = [a for a in arrays if a is not None], [a is not None for a in results]
        text = node(op, len(inputs) + 1, {**attributes, **_attributes(plan.arguments)})
        training = plan.arguments["training"]
        for output, array in zip(self._process.submit(run, text, inputs, training, wanted).result(), results):
            if array is not None:
                assert output.shape == array.shape
                array.reshape(-1).view(np.uint8)[:] = output.content


def _array(address: int, dtype: int, shape: tuple[int, ...]) -> Array:
    return Array(address, dtype, len(shape), (ctypes.c_int64 * 4)(*shape))


def _attributes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of the op, from the core's numbers for them; types by their names."""
    dtype = ("DT_FLOAT", "DT_DOUBLE", "DT_HALF", "DT_BFLOAT16")[arguments["dtype"]]

    def image(height: list, width: list, rest: list) -> list:
        nhwc = arguments["data_format"] == 0
        return [*rest, *height, *width, *rest] if nhwc else [*rest, *rest, *height, *width]

    def steps(pair: tuple[int, int]) -> list[int]:
        return image([pair[0]], [pair[1]], [1])

    top, bottom, left, right = arguments["explicit_padding"]
    explicit = arguments["padding"] == 2
    return {
        "T": dtype, "U": "DT_DOUBLE" if dtype == "DT_DOUBLE" else "DT_FLOAT",
        "strides": steps(arguments["strides"]), "dilations": steps(arguments["dilations"]),
        "padding": ("VALID", "SAME", "EXPLICIT")[arguments["padding"]],
        "explicit_paddings": image([top, bottom], [left, right], [0, 0]) if explicit else [],
        "data_format": _arguments.DATA_FORMATS[arguments["data_format"]],
        "activation": _arguments.ACTIVATIONS[arguments["activation"]] or "none",
        "algorithm": _arguments.ALGORITHMS[arguments["algorithm"]], "save": _arguments.SAVES[arguments["save"]],
        **{name: arguments[name] for name in ("epsilon", "momentum", "unbiased_moving_variance")},
    }  # fmt: skip


def node(op: str, inputs: int, attributes: dict[str, Any]) -> str:
    """A NodeDef as text."""

    def value(attribute: Any) -> str:
        if isinstance(attribute, list):
            return f"list {{ {' '.join(f'i: {number}' for number in attribute)} }}"
        if isinstance(attribute, str):
            return f"type: {attribute}" if attribute.startswith("DT_") else f's: "{attribute}"'
        if isinstance(attribute, bool):
            return f"b: {str(attribute).lower()}"
        return f"i: {attribute}" if isinstance(attribute, int) else f"f: {attribute!r}"

    lines = [f'name: "node" op: "{op}"', *(f'input: "input{i}"' for i in range(inputs))]
    lines += [f'attr {{ key: "{name}" value {{ {value(a)} }} }}' for name, a in attributes.items()]
    return "\n".join(lines)
