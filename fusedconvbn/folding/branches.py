"""Takes the branch that inference takes: conditions on `training` that are constant once it is bound.

TensorFlow 1 writes `tf.cond` as Switch and Merge: a Switch with a constant predicate passes its data on at one output
and makes everything that depends on the other one dead; a Merge passes on what is alive. TensorFlow 2 writes it as If.
"""

from __future__ import annotations

import numpy as np

from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.inlining import inline_calls
from fusedconvbn.folding.nodes import NodeDef, Nodes, attribute, node_of

_IFS = ("If", "StatelessIf")
_CASES = ("Case", "StatelessCase")


def take_branches(graph: Nodes) -> None:
    """Resolves every condition of `graph` that is constant, those inside the taken branches too."""
    inline_calls(graph)
    while _take_functional(graph) or _take_switches(graph):
        inline_calls(graph)


def _take_functional(graph: Nodes) -> bool:
    """Makes calls of the If and Case nodes whose index is constant; whether there were any."""
    nodes = [node for node in graph.nodes.values() if node.op in _IFS + _CASES]
    constants = Constants(graph)
    constants.load(graph.inputs(node)[0] for node in nodes)
    taken = False
    for node in nodes:
        value = constants.value(graph.inputs(node)[0])
        if value is not None:
            _call_branch(graph, node, value)
            taken = True
    return taken


def _call_branch(graph: Nodes, node: NodeDef, value: np.ndarray) -> None:
    if node.op in _IFS:
        function = attribute(node, "then_branch" if bool(value) else "else_branch").func
    else:
        branches = attribute(node, "branches").list.func
        # As TensorFlow: an index that is out of range is the last branch.
        function = branches[int(value) if 0 <= int(value) < len(branches) else len(branches) - 1]
    call = NodeDef(name=node.name, op="PartitionedCall", input=graph.inputs(node)[1:])
    for key in ("Tin", "Tout"):
        call.attr[key].CopyFrom(node.attr[key])
    call.attr["f"].func.CopyFrom(function)
    graph.nodes[node.name] = call


def _take_switches(graph: Nodes) -> bool:
    """Removes Switch nodes with constant predicates and what is dead by them; whether there were any."""
    switches = [node for node in graph.nodes.values() if node.op in ("Switch", "RefSwitch")]
    constants = Constants(graph)
    constants.load(graph.inputs(node)[1] for node in switches)
    taken = {
        node.name: bool(value) for node in switches if (value := constants.value(graph.inputs(node)[1])) is not None
    }
    if not taken:
        return False
    dead: set[str] = set()
    for node in graph.topological():
        _propagate(graph, node, taken, dead)
    for name in taken:
        del graph.nodes[name]
    return True


def _propagate(graph: Nodes, node: NodeDef, taken: dict[str, bool], dead: set[str]) -> None:
    """Notes in `dead` what is dead of the outputs of `node`, a "name:port" or, for all, a name."""
    inputs = graph.inputs(node)
    alive = [tensor for tensor in inputs if not _is_dead(tensor, dead)]
    if node.op in ("Merge", "RefMerge"):
        loops = any(graph.nodes[node_of(t)].op in ("NextIteration", "RefNextIteration") for t in inputs)
        if loops and len(alive) < len(inputs):
            alive = []  # what enters the loop is dead, so what goes round in it is
        if len(alive) == 1 < len(inputs):
            index = graph.add_constant(f"{node.name}/index", np.int32(inputs.index(alive[0])))
            graph.replace(f"{node.name}:0", alive[0])
            graph.replace(f"{node.name}:1", index)
        if not alive:
            dead.add(node.name)
    elif len(alive) < len(inputs) or any(_is_dead(name[1:], dead) for name in node.input if name.startswith("^")):
        dead.add(node.name)
    elif node.name in taken:
        port = int(taken[node.name])
        graph.replace(f"{node.name}:{port}", inputs[0])
        dead.add(f"{node.name}:{1 - port}")


def _is_dead(tensor: str, dead: set[str]) -> bool:
    return tensor in dead or tensor.rpartition(":")[0] in dead
