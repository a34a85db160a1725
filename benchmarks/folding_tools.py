"""What merges batch norms into convolutions: fusedconvbn.fold, and converters of frozen graphs that do so on their way.

Each tool converts a frozen graph in memory; `Converted` counts what it left, and runs it where it is to be run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.folding_graphs import Graph, batch_norms, of_onnx, of_openvino, of_tensorflow

Arrays = dict[str, np.ndarray]
_LINEAR = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "GroupConvolution"}  # OpenVINO's, compiled


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen graph's file; tensors are named as in it."""

    name: str
    path: str
    feeds: Arrays
    fixed: tuple[str, ...]  # those of `feeds` that are no batches: is_training
    expected: Arrays
    batch_norms: int
    foldable: int
    others: int = 0  # that are counted too: the preprocessing of a model


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a tool made of a frozen graph."""

    graphs: list[Graph]
    load: Callable[[int], tuple[Callable[[Arrays], Arrays], list[Graph] | int | None]]
    """Of a number of threads: what runs it, and what it is once loaded, or how many batch norms it then has."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """Converts a frozen graph."""

    name: str
    what: str
    convert: Callable[[Frozen], Converted]
    packages: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def read(path: str) -> Any:
    """The GraphDef in a .pb or a .pbtxt."""
    import tensorflow as tf
    from google.protobuf import text_format

    graph_def = tf.compat.v1.GraphDef()
    content = pathlib.Path(path).read_bytes()
    if path.endswith(".pbtxt"):
        text_format.Parse(content, graph_def)
    else:
        graph_def.ParseFromString(content)
    return graph_def


def start(graph_def: Any, outputs: list[str], threads: int) -> Callable[[Arrays], Arrays]:
    """What runs it in a session of its own; tensors that it does not have are not fed."""
    import tensorflow as tf

    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=1)
    session = tf.compat.v1.Session(graph=graph, config=config)
    names = {f"{node.name}:0" for node in graph_def.node}

    def run(feeds: Arrays) -> Arrays:
        found = session.run(outputs, {name: value for name, value in feeds.items() if name in names})
        return dict(zip(outputs, found))

    return run


def _tensorflow(graph_def: Any, frozen: Frozen) -> Converted:
    return Converted(of_tensorflow(graph_def), lambda n: (start(graph_def, list(frozen.expected), n), None))


def _ours(frozen: Frozen) -> Converted:
    import fusedconvbn

    graph_def, _ = fusedconvbn.fold(frozen.path, outputs=list(frozen.expected), verify=False)
    return _tensorflow(graph_def, frozen)


def _ours_verified(frozen: Frozen) -> Converted:
    import fusedconvbn

    graph_def, _ = fusedconvbn.fold(frozen.path, outputs=list(frozen.expected))
    return _tensorflow(graph_def, frozen)


def _optimize_for_inference(frozen: Frozen) -> Converted:
    import tensorflow as tf
    from tensorflow.python.tools.optimize_for_inference_lib import optimize_for_inference

    inputs, outputs = ([name.split(":")[0] for name in names] for names in (frozen.feeds, frozen.expected))
    types = [tf.as_dtype(value.dtype).as_datatype_enum for value in frozen.feeds.values()]
    return _tensorflow(optimize_for_inference(read(frozen.path), inputs, outputs, types), frozen)


def _openvino(frozen: Frozen) -> Converted:
    import openvino

    model = openvino.convert_model(frozen.path)
    graphs = of_openvino(model)

    def load(threads: int) -> tuple[Callable[[Arrays], Arrays], int]:
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(model, "CPU", hints)
        return _run_openvino(compiled, list(frozen.expected)), _separate(compiled, graphs)

    return Converted(graphs, load)


def _run_openvino(compiled: Any, outputs: list[str]) -> Callable[[Arrays], Arrays]:
    names = set().union(*(port.get_names() for port in compiled.inputs))
    ports = {name: compiled.output(name) for name in outputs}

    def run(feeds: Arrays) -> Arrays:
        found = compiled({name: value for name, value in feeds.items() if name in names})
        return {name: found[port] for name, port in ports.items()}

    return run


def _separate(compiled: Any, graphs: list[Graph]) -> int:
    """How many of the batch norms are not merged into convolutions where the model runs."""
    counted = {name for graph in graphs for name in batch_norms(graph)}
    separate = 0
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) not in _LINEAR:
            separate += len(counted.intersection(facts["originalLayersNames"].astype(str).split(",")))
    return separate


def _onnx(frozen: Frozen) -> Converted:
    import onnxsim
    import tf2onnx

    graph_def = read(frozen.path)
    names = {"input_names": list(frozen.feeds), "output_names": list(frozen.expected)}
    with contextlib.redirect_stdout(sys.stderr):  # where onnxsim's remarks belong
        model, right = onnxsim.simplify(tf2onnx.convert.from_graph_def(graph_def, **names)[0])
    if not right:
        raise RuntimeError("onnxsim says that its result differs")
    return Converted(of_onnx(model), lambda threads: _load_onnx(model, list(frozen.expected), threads))


def _load_onnx(model: Any, outputs: list[str], threads: int) -> tuple[Callable[[Arrays], Arrays], list[Graph]]:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    content, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(content, options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # its own file
        options.optimized_model_filepath = str(pathlib.Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(content, options, providers=providers)
        graphs = of_onnx(onnx.load(options.optimized_model_filepath))
    names = {value.name for value in session.get_inputs()}

    def run(feeds: Arrays) -> Arrays:
        found = session.run(outputs, {name: value for name, value in feeds.items() if name in names})
        return dict(zip(outputs, found))

    return run, graphs


OURS = Tool("fusedconvbn", "fusedconvbn.fold(path, verify=False)", _ours)
VERIFIED = Tool("verified", "fusedconvbn.fold(path), which runs both and compares", _ours_verified)
PEERS = (
    VERIFIED,
    Tool("tensorflow", "optimize_for_inference of tensorflow.python.tools", _optimize_for_inference),
    Tool("openvino", "openvino.convert_model", _openvino, ("openvino",)),
    Tool("onnx", "tf2onnx, then onnxsim", _onnx, ("tf2onnx", "onnxsim", "onnxruntime")),
)
TOOLS: Mapping[str, Tool] = {tool.name: tool for tool in (OURS, *PEERS)}
