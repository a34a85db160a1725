"""A measurement as a JSON-able dictionary, and that dictionary as tables. docs/benchmarks.md describes its fields."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from benchmarks.hardware import Limits
from benchmarks.implementations import OURS, Implementation
from benchmarks.plans import kept_outputs
from benchmarks.roofline import Bound, bound
from benchmarks.session import OK, WRONG, Outcome, Row
from benchmarks.statistics import bootstrap_interval, geometric_mean, median, round_ratios, spread

SCHEMA = 1  # of the JSON file
INTERVAL = 0.9  # probability that a layer's ratio lies in its interval
_MIB = 1 << 20


def _outcome(outcome: Outcome, row: Row, peak: float, limit: Bound | None) -> dict[str, Any]:
    result: dict[str, Any] = {"status": outcome.status}
    if outcome.status != OK:
        return result | {"detail": outcome.detail}
    seconds = median(outcome.samples)
    ours = row.outcomes[OURS.name]
    flops = row.problem.flops / seconds
    result |= {
        "samples_ms": [sample * 1e3 for sample in outcome.samples],
        "median_ms": seconds * 1e3,
        "iqr_ms": spread(outcome.samples) * 1e3,
        "gflops": flops / 1e9,
        "peak_fraction": flops / peak,
        **outcome.memory,
    }
    if limit:
        result["limit_fraction"] = limit.seconds / seconds
    if outcome is not ours and ours.status == OK:
        ratios = round_ratios(outcome.samples, ours.samples)
        result |= {
            "ratio": median(ratios),
            "ratio_iqr": spread(ratios),
            "ratio_interval": bootstrap_interval(ratios, INTERVAL),
        }
    return result


def _layer(row: Row, peak: float, limits: Limits | None) -> dict[str, Any]:
    problem = row.problem
    limit = bound(problem, limits) if limits else None
    return {
        "name": problem.name,
        "peak_gflops": row.peak_flops / 1e9,
        "shape": problem.spec,
        "times": problem.times,
        "copies": problem.copies,
        "gflop": problem.flops / 1e9,
        **({"limit_ms": limit.seconds * 1e3, "limited_by": limit.by} if limit else {}),
        "implementations": {name: _outcome(outcome, row, peak, limit) for name, outcome in row.outcomes.items()},
    }


def _summary(name: str, what: str, layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals over the layers that both this implementation and ours have times for."""
    pairs = [
        (layer["times"], layer["implementations"][name], layer["implementations"][OURS.name])
        for layer in layers
        if layer["implementations"][name]["status"] == layer["implementations"][OURS.name]["status"] == OK
    ]
    result: dict[str, Any] = {"what": what, "layers": len(pairs)}
    if not pairs:
        return result
    result |= {
        "total_ms": sum(times * own["median_ms"] for times, own, _ in pairs),
        "ours_total_ms": sum(times * ours["median_ms"] for times, _, ours in pairs),
        "peak_bytes": max(own["peak_bytes"] for _, own, _ in pairs),
        "working_bytes": max(own["working_bytes"] for _, own, _ in pairs),
    }
    if name != OURS.name:
        ratios = [own["ratio"] for _, own, _ in pairs]
        result["geometric_mean"] = geometric_mean(ratios, [times for times, _, _ in pairs])
    return result


def _limits(rows: Sequence[Row]) -> Limits | None:
    """The best of the run."""
    found = [row.limits for row in rows if row.limits]
    return functools.reduce(Limits.best, found) if found else None


def _described(limits: Limits) -> dict[str, Any]:
    bandwidths = [
        {"bytes": size, **{f"{name}_gb": value / 1e9 for name, value in dataclasses.asdict(each).items()}}
        for size, each in limits.bandwidths.items()
    ]
    return {"gflops": limits.flops / 1e9, "bandwidths": bandwidths}


def make_report(
    rows: Sequence[Row],
    implementations: Sequence[Implementation],
    settings: dict[str, Any],
    machine: dict[str, Any],
    peak_what: str,
) -> dict[str, Any]:
    """Everything that was measured and where."""
    peak = max(row.peak_flops for row in rows)
    limits = _limits(rows)
    layers = [_layer(row, peak, limits) for row in rows]
    return {
        "schema": SCHEMA,
        "settings": settings,
        "machine": machine | rows[0].device,
        "peak": {"what": limits.what if limits else peak_what, "gflops": peak / 1e9},
        **({"limits": _described(limits)} if limits else {}),
        "layers": layers,
        **_kept(rows),
        "summary": {each.name: _summary(each.name, each.what, layers) for each in implementations},
    }


def _kept(rows: Sequence[Row]) -> dict[str, float]:
    """Of the CPU's kernels, in training."""
    problems = [row.problem for row in rows if row.problem.training]
    on_cpu = rows[0].device["device"] == "cpu"
    return {"kept_outputs": kept_outputs(problems)} if problems and on_cpu else {}


def problems_found(report: dict[str, Any]) -> list[str]:
    """One line for each result that is wrong, and for each failure; a baseline may fail, that is not our error."""
    return [
        f"{layer['name']}: {name} {result['status'].upper()}: {result['detail']}"
        for layer in report["layers"]
        for name, result in layer["implementations"].items()
        if result["status"] != OK
    ]


def succeeded(report: dict[str, Any]) -> bool:
    """Whether nobody was wrong and ours did not fail."""
    outcomes = [pair for layer in report["layers"] for pair in layer["implementations"].items()]
    return all(result["status"] == OK or (result["status"] != WRONG and name != OURS.name) for name, result in outcomes)


def too_slow(report: dict[str, Any], fail_below: float) -> list[str]:
    """One line for each layer whose ratio to a baseline is below `fail_below`, the whole of its interval."""
    return [
        f"{layer['name']}: {result['ratio']:.3f}x as fast as {name}, {INTERVAL:.0%} interval "
        f"{_interval(result)}, is below {fail_below:g}"
        for layer in report["layers"]
        for name, result in layer["implementations"].items()
        if "ratio" in result and result["ratio_interval"][1] < fail_below
    ]


def _interval(result: dict[str, Any]) -> str:
    return "-".join(f"{end:.3f}" for end in result["ratio_interval"])


def _cell(result: dict[str, Any], gate: bool) -> str:
    if result["status"] != OK:
        return f"[bold red]{result['status'].upper()}[/]" if result["status"] == WRONG else "[dim]failed[/]"
    time = f"{result['median_ms']:.3f}"
    if "ratio" not in result:
        return time
    color = "green" if result["ratio"] >= 1 else "yellow"
    interval = f" [dim]{_interval(result)}[/]" if gate else ""
    return f"{time} [{color}]{result['ratio']:.2f}x[/]{interval}"


def _own_cells(result: dict[str, Any]) -> list[str]:
    if result["status"] != OK:
        return [_cell(result, gate=False), *[""] * 4]
    return [
        f"{result['median_ms']:.3f}",
        f"{result['iqr_ms']:.3f}",
        f"{result['gflops']:.1f}",
        f"{result['peak_fraction']:.0%}",
        f"{result['limit_fraction']:.0%}" if "limit_fraction" in result else "",
    ]


def _layer_table(report: dict[str, Any]) -> Table:
    baselines = [name for name in report["summary"] if name != OURS.name]
    gate = report["settings"].get("fail_below") is not None
    table = Table(box=box.SIMPLE_HEAD, title="milliseconds a layer; 1.50x: fusedconvbn is 1.5 times as fast")
    table.add_column("layer", no_wrap=True)
    for heading in ("times", "GFLOP", OURS.name, "IQR", "GFLOP/s", "of peak", "of limit", "limit", *baselines):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report["layers"]:
        results = layer["implementations"]
        table.add_row(
            escape(layer["name"]),
            str(layer["times"]),
            f"{layer['gflop']:.3f}",
            *_own_cells(results[OURS.name]),
            f"{layer['limit_ms']:.3f} {layer['limited_by']}" if "limit_ms" in layer else "",
            *(_cell(results[name], gate) for name in baselines),
        )
    return table


def _summary_table(report: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="weighted by how often a layer occurs")
    table.add_column("implementation", no_wrap=True)
    for heading in ("layers", "total ms", "fusedconvbn ms", "geo-mean", "largest working MiB", "peak process MiB"):
        table.add_column(heading, justify="right")
    for name, summary in report["summary"].items():
        if not summary["layers"]:
            table.add_row(name, "0", *[""] * 5)
            continue
        mean = f"{summary['geometric_mean']:.2f}x" if "geometric_mean" in summary else ""
        times = [f"{summary[key]:.2f}" for key in ("total_ms", "ours_total_ms")]
        memory = [f"{summary[key] / _MIB:.1f}" for key in ("working_bytes", "peak_bytes")]
        table.add_row(name, str(summary["layers"]), *times, mean, *memory)
    return table


def tables(report: dict[str, Any]) -> RenderableType:
    """What the run prints."""
    machine, settings, peak = report["machine"], report["settings"], report["peak"]
    device = machine.get("gpu") or f"{machine['cpu']} ({machine['cores']} cores, {', '.join(machine['isa'])})"
    head = (
        f"{settings['mode']}, batch {settings['batch']}, {settings['dtype']}, {settings['threads']} thread(s) on "
        f"{device}; TensorFlow {machine['tensorflow']}, Keras {machine['versions'].get('keras')}\n"
        f"peak: {peak['gflops']:.0f} GFLOP/s, {peak['what']}"
    )
    parts = [head, _layer_table(report), _summary_table(report)]
    if "kept_outputs" in report:
        parts.append(f"fusedconvbn keeps {report['kept_outputs']:.2f} times its outputs for backward, these among it")
    return Group(*parts)
