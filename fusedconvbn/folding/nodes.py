"""A GraphDef that can be changed: nodes by name, tensors by "name:port", and names that stand for other tensors.

Control inputs are dropped, as inference needs none of them once its variables are constants; but for those that say in
which branch or frame of TensorFlow 1's control flow a node is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.function_pb2 import FunctionDef

NodeDef = tf.compat.v1.NodeDef
GraphDef = tf.compat.v1.GraphDef
AttrValue = tf.compat.v1.AttrValue

_OPS = tf.Graph()
_SMALL = 64  # elements: shapes and axes, which shape inference has to know, are fewer
_FLOW = {"Switch", "RefSwitch", "Merge", "RefMerge", "Enter", "RefEnter", "Exit", "RefExit", "NextIteration",
         "RefNextIteration", "LoopCond"}  # fmt: skip
_EXACTLY = "="  # before an input: this tensor itself, whatever stands for it


def canonical(tensor: str) -> str:
    """ "name:port" of a tensor that may be called "name" for short."""
    return tensor if ":" in tensor else f"{tensor}:0"


def node_of(tensor: str) -> str:
    """The name of the node that makes a tensor."""
    return tensor.rpartition(":")[0] if ":" in tensor else tensor


def port_of(tensor: str) -> int:
    """Which output of its node a tensor is."""
    return int(canonical(tensor).rpartition(":")[2])


def op_def(kind: str) -> object | None:
    """TensorFlow's OpDef of an op type, None for one that is not registered."""
    try:
        return _OPS.op_def_for_type(kind)
    except (KeyError, RuntimeError, ValueError):
        return None


def attribute(node: NodeDef, key: str) -> AttrValue:
    """An attribute, or its default where the node has none; to ask the node itself would give it an empty one."""
    if key in node.attr:
        return node.attr[key]
    signature = op_def(node.op)
    declared = () if signature is None else signature.attr
    return next((each.default_value for each in declared if each.name == key), AttrValue())


def is_float(dtype: np.dtype) -> bool:
    """Whether a type is one of floating-point numbers, bfloat16 among them."""
    return dtype.kind == "f" or dtype == tf.bfloat16.as_numpy_dtype


def output_counts(node: NodeDef, signature: object) -> list[tuple[str, int]]:
    """(name, number of tensors) of each output argument of `node`, whose op has that OpDef."""
    counts = []
    for arg in signature.output_arg:
        if arg.number_attr:
            counts.append((arg.name, attribute(node, arg.number_attr).i))
        elif arg.type_list_attr:
            counts.append((arg.name, len(attribute(node, arg.type_list_attr).list.type)))
        else:
            counts.append((arg.name, 1))
    return counts


def output_count(node: NodeDef) -> int | None:
    """How many tensors a node makes; None for an op that is not registered."""
    signature = op_def(node.op)
    return None if signature is None else sum(count for _, count in output_counts(node, signature))


def unique(name: str, taken: Container[str]) -> str:
    """`name`, or `name_1` and so on where it is taken."""
    found, count = name, 0
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    return found


class Nodes:
    """The nodes of a graph, and its function library.

    Attributes:
        nodes: By name, in an order of no meaning.
        functions: The library's FunctionDefs by name.
        origins: For each node that was inlined, the function that it comes from and its name there.
    """

    def __init__(self, graph_def: GraphDef) -> None:
        self.nodes: dict[str, NodeDef] = {}
        self.functions = {function.signature.name: function for function in graph_def.library.function}
        self.origins: dict[str, tuple[str, str]] = {}
        self._arrays: dict[str, np.ndarray] = {}  # the values of constants: as protos they would be copied all the time
        self._versions = graph_def.versions
        self._stands_for: dict[str, str] = {}
        for node in graph_def.node:
            self.insert(node)

    def __contains__(self, name: str) -> bool:
        return name in self.nodes

    def __getitem__(self, name: str) -> NodeDef:
        return self.nodes[name]

    def insert(self, node: NodeDef) -> None:
        """Adds a copy of a node, or puts it in the place of the one of its name."""
        if node.op == "Const" and node.attr["value"].tensor.dtype != tf.string.as_datatype_enum:
            self.set_value(node.name, tf.make_ndarray(node.attr["value"].tensor))
            self.nodes[node.name].input.extend(node.input)
            return
        copy = NodeDef()
        copy.CopyFrom(node)
        strip(copy)
        self.nodes[node.name] = copy
        self._arrays.pop(node.name, None)

    def set_value(self, name: str, value: np.ndarray) -> None:
        """Makes a node a constant of that value."""
        node = NodeDef(name=name, op="Const")
        node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
        self.nodes[name] = node
        self._arrays[name] = value

    def value(self, name: str) -> np.ndarray:
        """Of a Const node."""
        return self._arrays[name] if name in self._arrays else tf.make_ndarray(self.nodes[name].attr["value"].tensor)

    def copy(self) -> Nodes:
        """Another one, which shares the values of constants."""
        other = Nodes(self.graph_def(with_values=False))
        other._arrays = {name: value for name, value in self._arrays.items() if name in other.nodes}
        for name in other._arrays:
            other.nodes[name] = self.nodes[name]
        return other

    def resolve(self, tensor: str) -> str:
        """The tensor that `tensor` stands for by now, as "name:port"."""
        tensor = canonical(tensor)
        path = []
        while tensor in self._stands_for:
            path.append(tensor)
            tensor = self._stands_for[tensor]
        for passed in path[:-1]:
            self._stands_for[passed] = tensor
        return tensor

    def replace(self, tensor: str, by: str) -> None:
        """Whoever reads `tensor` reads `by` from now on."""
        by, tensor = self.resolve(by), canonical(tensor)
        if by != tensor:
            self._stands_for[tensor] = by

    def inputs(self, node: NodeDef | str) -> list[str]:
        """The tensors that a node reads."""
        node = self.nodes[node] if isinstance(node, str) else node
        return [
            tensor[1:] if tensor.startswith(_EXACTLY) else self.resolve(tensor)
            for tensor in node.input
            if not tensor.startswith("^")
        ]

    def control(self, node: NodeDef | str) -> list[str]:
        """The nodes that say in which branch or frame of TensorFlow 1's control flow a node is.

        Where TensorFlow has lowered functional control flow to that, by way of a NoOp for the whole function.
        """
        node = self.nodes[node] if isinstance(node, str) else node
        pending = [name[1:] for name in node.input if name.startswith("^")]
        found: dict[str, bool] = {}  # whether it is one, of each that was met
        while pending:
            name = pending.pop(0)
            if name in found:
                continue
            found[name] = self.is_flow(name)
            if not found[name] and name in self.nodes and self.nodes[name].op == "NoOp":
                pending += [before[1:] for before in self.nodes[name].input if before.startswith("^")]
        return [name for name, is_flow in found.items() if is_flow]

    def is_flow(self, name: str) -> bool:
        """Whether a node is one of TensorFlow 1's control flow, or tells of which branch it is."""
        node = self.nodes.get(name)
        if node is not None and node.op == "Identity":
            source = self.source(self.inputs(node)[0])
            return source is not None and source.op in ("Switch", "RefSwitch")
        return node is not None and node.op in _FLOW

    def pivots(self) -> set[str]:
        """The nodes that others name as `control`."""
        return {name for node in self.nodes.values() for name in self.control(node)}

    def source(self, tensor: str) -> NodeDef | None:
        """The node that makes a tensor."""
        return self.nodes.get(node_of(self.resolve(tensor)))

    def readers(self) -> dict[str, list[tuple[str, int]]]:
        """For each tensor the (node, index of its input) that read it."""
        found: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for node in self.nodes.values():
            for index, tensor in enumerate(self.inputs(node)):
                found[tensor].append((node.name, index))
        return found

    def unique(self, name: str) -> str:
        """`name`, or `name_1` and so on where there is such a node."""
        return unique(name, self.nodes)

    def add(self, kind: str, name: str, inputs: Iterable[str], **attributes: object) -> NodeDef:
        """A new node with `name` or one like it; attributes are AttrValues, or what they hold: types, ints, strings."""
        node = NodeDef(name=self.unique(name), op=kind, input=list(inputs))
        for key, value in attributes.items():
            set_attribute(node, key, value)
        self.nodes[node.name] = node
        return node

    def add_constant(self, name: str, value: np.ndarray) -> str:
        """The tensor of a new constant."""
        name = self.unique(name)
        self.set_value(name, np.asarray(value))
        return f"{name}:0"

    def set_input(self, node: NodeDef, index: int, tensor: str) -> None:
        """Lets a node read `tensor` itself, also where another one stands for it."""
        node.input[index] = _EXACTLY + canonical(tensor)

    def rename(self, old: str, new: str) -> None:
        """Gives a node another name; its own is free then, and what is called by it is found under the new one."""
        self._stands_for.pop(f"{new}:0", None)
        node = self.nodes[new] = self.nodes.pop(old)
        node.name = new
        for table in (self._arrays, self.origins):
            if old in table:
                table[new] = table.pop(old)
        for reader in self.nodes.values():
            for index, tensor in enumerate(self.inputs(reader)):
                if node_of(tensor) == old:
                    self.set_input(reader, index, f"{new}:{port_of(tensor)}")
        for tensor, by in self._stands_for.items():
            if node_of(by) == old:
                self._stands_for[tensor] = f"{new}:{port_of(by)}"
        if f"{old}:0" not in self._stands_for:
            self._stands_for[f"{old}:0"] = f"{new}:0"

    def define(self, kind: str, name: str, inputs: list[str], **attributes: object) -> None:
        """A node whose outputs are what tensors of its name are from now on; it reads exactly `inputs`."""
        if name in self.nodes:
            self.rename(name, self.unique(f"{name}/inner"))
        node = self.add(kind, name, [_EXACTLY + tensor for tensor in inputs], **attributes)
        for port in range(len(inputs)):
            self._stands_for.pop(f"{node.name}:{port}", None)

    def ancestors(self, tensors: Iterable[str], *, control: bool = False) -> set[str]:
        """Names of the nodes that `tensors` are computed from, their own included."""
        pending = [node_of(self.resolve(tensor)) for tensor in tensors]
        found: set[str] = set()
        while pending:
            name = pending.pop()
            if name in found or name not in self.nodes:
                continue
            found.add(name)
            pending += [node_of(tensor) for tensor in self.inputs(name)]
            named = [tensor[1:] for tensor in self.nodes[name].input if tensor.startswith("^")]
            pending += named if control else self.control(name) if named else []
        return found

    def prune(self, tensors: Iterable[str], *, control: bool = False) -> None:
        """Drops the nodes that `tensors` do not need."""
        needed = self.ancestors(tensors, control=control)
        for name in () if control else needed:
            self._name_flow(self.nodes[name])
        self.nodes = {name: node for name, node in self.nodes.items() if name in needed}
        self._arrays = {name: value for name, value in self._arrays.items() if name in needed}

    def _name_flow(self, node: NodeDef) -> None:
        """Lets a node name what its `control` is by itself: NoOps between go."""
        named = [tensor for tensor in node.input if tensor.startswith("^")]
        if named:
            flow = [f"^{name}" for name in self.control(node)]
            node.input[:] = [tensor for tensor in node.input if not tensor.startswith("^")] + flow

    def topological(self) -> list[NodeDef]:
        """Each node after those that it reads; edges back to the head of a TensorFlow 1 loop do not count."""
        done: set[str] = set()
        order: list[NodeDef] = []
        for root in self.nodes:
            stack: list[tuple[str, Iterator[str]]] = [(root, self._before(root))] if root not in done else []
            done.add(root)
            while stack:
                name, before = stack[-1]
                following = next((n for n in before if n not in done and n in self.nodes), None)
                if following is None:
                    order.append(self.nodes[name])
                    stack.pop()
                else:
                    done.add(following)
                    stack.append((following, self._before(following)))
        return order

    def _before(self, name: str) -> Iterator[str]:
        names = [*(node_of(tensor) for tensor in self.inputs(name)), *self.control(name)]
        if self.nodes[name].op in ("Merge", "RefMerge"):
            backward = ("NextIteration", "RefNextIteration")
            names = [n for n in names if n in self.nodes and self.nodes[n].op not in backward]
        return iter(names)

    def graph_def(self, only: set[str] | None = None, *, with_values: bool = True) -> GraphDef:
        """As a GraphDef, without control inputs.

        Args:
            only: Names of the nodes that are wanted; None: all.
            with_values: Whether constants are such; else they are Placeholders of their shapes.
        """
        result = GraphDef(versions=self._versions)
        for name, node in self.nodes.items():
            if only is not None and name not in only:
                continue
            copy = result.node.add()
            if name in self._arrays:
                copy.CopyFrom(self._constant(name, with_values))
                copy.input.extend(f"^{each}" for each in self.control(node))
                continue
            copy.CopyFrom(node)
            del copy.input[:]
            copy.input.extend(_short(tensor) for tensor in self.inputs(node))
            copy.input.extend(f"^{each}" for each in self.control(node))
        result.library.function.extend(self._called(result.node))
        return result

    def _called(self, nodes: Iterable[NodeDef]) -> list[FunctionDef]:
        """The functions that nodes call, and those that these call."""
        pending, found = [*nodes], {}
        while pending:
            node = pending.pop()
            held = node.attr.values()
            names = [f.name for value in held for f in (value.func, *value.list.func) if f.name] + [node.op]
            for name in names:
                if name in self.functions and name not in found:
                    found[name] = self.functions[name]
                    pending += found[name].node_def
        return list(found.values())

    def _constant(self, name: str, with_value: bool) -> NodeDef:
        value = self._arrays[name]
        node = NodeDef(name=name, op="Const" if with_value or value.size <= _SMALL else "Placeholder")
        node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
        if node.op == "Const":
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
        else:
            node.attr["shape"].shape.CopyFrom(tf.TensorShape(value.shape).as_proto())
        return node

    def feeds(self, only: set[str]) -> dict[str, np.ndarray]:
        """What to feed to a graph without values, for the nodes that are in it."""
        arrays = {name: self._arrays[name] for name in only & self._arrays.keys()}
        return {f"{name}:0": value for name, value in arrays.items() if value.size > _SMALL}


def _short(tensor: str) -> str:
    """As GraphDefs call it."""
    return tensor.removesuffix(":0")


def strip(node: NodeDef) -> None:
    """Takes from a node what only the graph that it was written in gives a meaning: devices, colocation, old shapes."""
    node.device = ""
    for key in ("_class", "_output_shapes", "_XlaMustCompile", "_tpu_replicate"):
        node.attr.pop(key, None)


def set_attribute(node: NodeDef, key: str, value: object) -> None:
    """Sets an attribute from an AttrValue, a tf.DType, an int, a bool, a string or a list of ints."""
    held = node.attr[key]
    if isinstance(value, AttrValue):
        held.CopyFrom(value)
    elif isinstance(value, tf.DType):
        held.type = value.as_datatype_enum
    elif isinstance(value, bool):
        held.b = value
    elif isinstance(value, int):
        held.i = value
    elif isinstance(value, str):
        held.s = value.encode()
    elif isinstance(value, (list, tuple)):
        held.list.i.extend(value)
    else:
        raise TypeError(f"an attribute of no known kind. Received: {key}={value!r}")
