"""`fold` on random graphs: what it computes, tells and leaves, whatever the graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from fold_random_found import FOUND, found
from fold_random_graphs import RandomGraph, random_graphs
from hypothesis import HealthCheck, given, settings

import fusedconvbn

v1 = tf.compat.v1

TOLERANCES = {"float64": 1e-9, "float32": 3e-4, "float16": 6e-2}
SCALES = {"Mul", "RealDiv", "Div", "FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3",
          "BatchNormWithGlobalNormalization"}  # fmt: skip

NAMES = {"Identity", "IdentityN"}  # that give results their names

few = settings(max_examples=60, derandomize=True, deadline=None, database=None,
               suppress_health_check=[*HealthCheck])  # fmt: skip
many = settings(few, max_examples=600)


def run(graph_def: Any, outputs: list[str], feeds: dict[str, np.ndarray], *, optimize: bool) -> list[np.ndarray]:
    """The outputs, by a session that may rewrite the graph."""
    config = v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = not optimize
    with tf.Graph().as_default() as graph, v1.Session(graph=graph, config=config) as session:
        tf.import_graph_def(graph_def, name="")
        return session.run(outputs, feeds)


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Relative to the maximum."""
    assert expected.shape == found.shape
    assert expected.dtype == found.dtype
    assert np.isfinite(expected).all()
    apart = np.abs(expected.astype("float64") - found.astype("float64"))
    largest = np.abs(expected.astype("float64")).max(initial=0)
    return float(apart.max(initial=0) / max(largest, 1e-2))


def fold(made: RandomGraph, graph_def: Any = None, **arguments: Any) -> tuple[Any, Any]:
    graph_def = made.graph_def if graph_def is None else graph_def
    return fusedconvbn.fold(graph_def, inputs=made.inputs, outputs=made.outputs, **arguments)


def number(entry: Any) -> int:
    """Of the batch norm that an entry tells of."""
    return int(entry.name.split("/")[0].removeprefix("norm_"))


def scales_of(graph_def: Any, index: int, outputs: list[str]) -> list[str]:
    """The nodes of one batch norm that multiply."""
    names = {name.partition(":")[0] for name in outputs}
    own = [node for node in graph_def.node if node.name.startswith(f"norm_{index}/") and node.op in SCALES]
    return [node.name for node in own if node.name not in names]


def computed(made: RandomGraph) -> list[int]:
    """The batch norms that the outputs are computed with."""
    nodes = {node.name: node for node in made.graph_def.node}
    pending, seen = [name.partition(":")[0] for name in made.outputs], set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += [each.lstrip("^").partition(":")[0] for each in nodes[name].input]
    scopes = [name.partition("/")[0] for name in seen if nodes[name].op in SCALES]
    return sorted({int(scope.removeprefix("norm_")) for scope in scopes if scope.startswith("norm_")})


def check(made: RandomGraph) -> None:
    """All properties, but for those of the comparison that `fold` itself makes."""
    written = made.graph_def.SerializeToString(deterministic=True)
    expected = run(made.graph_def, made.outputs, made.feeds, optimize=False)
    folded, report = fold(made, verify=False)
    assert made.graph_def.SerializeToString(deterministic=True) == written
    found = run(folded, made.outputs, made.feeds, optimize=False)
    for name, x, y in zip(made.outputs, expected, found):
        assert difference(x, y) < TOLERANCES[made.dtype], (name, str(report))
    assert [node.name for node in folded.node if node.op == "Placeholder"] == ["input"]
    check_report(made, folded, report)
    check_again(made, folded, found)


def check_report(made: RandomGraph, folded: Any, report: Any) -> None:
    """An entry for each batch norm; the kept ones are still there, the others not."""
    numbers = sorted(map(number, [*report.folded, *report.kept]))
    assert numbers == computed(made), str(report)
    for entry in report.folded:
        if number(entry) in made.alone:
            assert not scales_of(folded, number(entry), made.outputs), str(report)
    for entry in report.kept:
        if number(entry) in made.alone:
            assert scales_of(folded, number(entry), []), str(report)


def check_again(made: RandomGraph, folded: Any, expected: list[np.ndarray]) -> None:
    """Folding what is folded changes nothing."""
    again, report = fold(made, folded, verify=False)
    assert not report.folded, str(report)
    before, after = (Counter(node.op for node in graph.node if node.op not in NAMES) for graph in (folded, again))
    assert before == after
    for x, y in zip(expected, run(again, made.outputs, made.feeds, optimize=False)):
        np.testing.assert_array_equal(x, y)


def check_verified(made: RandomGraph) -> None:
    """What `fold` compares is equal too."""
    _, report = fold(made, verify=made.feeds)
    assert report.verification.verdict in ("ok", "inconclusive")


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    check(found(name))
    check_verified(found(name))


@few
@given(random_graphs())
def test_graph(made):
    check(made)


@settings(few, max_examples=15)
@given(random_graphs())
def test_graph_verified(made):
    check_verified(made)


@pytest.mark.slow
@many
@given(random_graphs(steps=16))
def test_graph_slow(made):
    check(made)


@pytest.mark.slow
@settings(many, max_examples=100)
@given(random_graphs(steps=16))
def test_graph_verified_slow(made):
    check_verified(made)
