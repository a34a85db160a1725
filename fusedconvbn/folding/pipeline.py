"""From a graph with constants for variables to the folded one: the steps between reading a format and writing it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from fusedconvbn.folding.affine_nodes import Chain
from fusedconvbn.folding.branches import take_branches
from fusedconvbn.folding.cleaning import fold_constants, remove_identities
from fusedconvbn.folding.constants import Constants
from fusedconvbn.folding.dropout import remove_dropout
from fusedconvbn.folding.expanding import expand_fused
from fusedconvbn.folding.nodes import Nodes, canonical, node_of
from fusedconvbn.folding.ops import Affine, Linear
from fusedconvbn.folding.planning import Folded, Kept, fold_batch_norms, merged
from fusedconvbn.folding.reading import Reading, read
from fusedconvbn.folding.writing import Frozen, finish, write


@dataclass
class Outcome:
    """What folding a graph came to.

    Attributes:
        frozen: The folded graph.
        before: The graph as it was, its training parts apart; what `sites` names is in it.
        entries: One for each batch norm.
        sites: Tensors of `before` and those of the folded graph that must equal them.
        results: For each tensor that the folded graph returns, that of `before`.
        removed: How many nodes of which sort are gone.
    """

    frozen: Frozen
    before: Nodes
    entries: list[Folded | Kept]
    sites: dict[str, str]
    results: dict[str, str]
    removed: dict[str, int] = field(default_factory=dict)


def for_inference(frozen: Frozen) -> dict[str, int]:
    """Leaves of `frozen` what inference needs; how many dropouts and other nodes are gone."""
    graph = frozen.graph
    total = len(graph.nodes)
    graph.prune([*frozen.results, *frozen.inputs])
    take_branches(graph)
    graph.prune([*frozen.results, *frozen.inputs])
    dropouts = len(remove_dropout(graph))
    remove_identities(graph)
    graph.prune([*frozen.results, *frozen.inputs])
    return {"dropouts": dropouts, "nodes that inference does not need": total - len(graph.nodes)}


def fold_graph(frozen: Frozen) -> Outcome:
    """Folds `frozen`, which changes, and of which only what inference needs is left."""
    removed = for_inference(frozen)
    before = frozen.graph.copy()
    results = {canonical(name): frozen.graph.resolve(name) for name in frozen.results}
    fused, kept = expand_fused(frozen.graph)
    frozen.graph.prune([*frozen.results, *frozen.inputs])
    reading = read(frozen.graph, frozen.results, fused)
    entries = _by_batch_norm(frozen, reading, fold_batch_norms(reading.graph))
    write(frozen, reading)
    frozen.graph.prune([*frozen.results, *frozen.inputs])
    apart = set(frozen.variables) | _parameters_of_kept(frozen.graph, reading)
    removed["constants"] = fold_constants(frozen.graph, [*frozen.results, *frozen.inputs], apart=apart)
    finish(frozen, _told(reading))
    frozen.variables = {name: v for name, v in frozen.variables.items() if name in frozen.graph}
    sites = {old: frozen.graph.resolve(new) for old, new in reading.graph.sites().items() if node_of(old) in before}
    sites = {old: new for old, new in sites.items() if node_of(new) in frozen.graph}
    return Outcome(frozen, before, [*entries, *reading.kept, *kept], sites, results, removed)


def _told(reading: Reading) -> set[str]:
    """The nodes that the report names."""
    ops = reading.graph.ops
    linear = {op.name for op in ops if isinstance(op, Linear) and op.changed}
    return linear | {step.node for chain in reading.chains.values() if chain.is_batch_norm for step in chain.steps}


def _by_batch_norm(frozen: Frozen, reading: Reading, entries: list[Folded | Kept]) -> list[Folded | Kept]:
    """One entry for each batch norm, which several signatures, or calls of a layer, may compute.

    Args:
        frozen: As it was read.
        entries: Those of the affine ops of `reading` that are batch norms, in their order.
    """
    graph = frozen.graph
    ops = [op for op in reading.graph.ops if isinstance(op, Affine) and op.batch_norm]
    found: dict[object, Folded | Kept] = {}
    nodes: dict[object, str] = {}
    for op, entry in zip(ops, entries):
        chain = reading.chains[node_of(op.outputs[0])]
        key = _variables_of(frozen, chain) or chain.identity(graph.origins)
        nodes.setdefault(key, chain.fused or chain.last)
        if isinstance(entry, Folded):
            into = dict.fromkeys(graph.origins.get(name, ("", name))[1] for name in entry.into)
            entry = Folded(entry.name, tuple(into))
        found[key] = merged(found.get(key), entry)
    names = Counter(entry.name for entry in found.values())
    return [replace(e, name=nodes[key]) if names[e.name] > 1 else e for key, e in found.items()]


def _variables_of(frozen: Frozen, chain: Chain) -> frozenset[str]:
    """The variables that a batch norm is computed with."""
    graph = frozen.graph
    tensors = [t for step in chain.steps for t in graph.inputs(step.node) if t != step.data]
    return frozenset(frozen.variables.keys() & graph.ancestors(tensors))


def _parameters_of_kept(graph: Nodes, reading: Reading) -> set[str]:
    """The constant nodes that batch norms which stay are computed with: those stay as they are."""
    kept = [
        step.node for chain in reading.chains.values() if chain.is_batch_norm and chain.steps[0].node in graph
        for step in chain.steps if step.node in graph
    ]  # fmt: skip
    constants = Constants(graph)
    return {name for node in kept for tensor in graph.inputs(node) if constants.is_constant(tensor)
            for name in graph.ancestors([tensor])}  # fmt: skip
