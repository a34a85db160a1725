"""The tables of `python -m benchmarks.folding`, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.tables import table

_NAMES = {
    "fusedconvbn": "`fold(verify=False)`",
    "verified": "`fold`, verified",
    "tensorflow": "`optimize_for_inference`",
    "openvino": "OpenVINO",
    "onnx": "tf2onnx + onnxsim",
}
_FAILURES = ("wrong", "does not run", "refused", "crashed")


def model_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line a model and tool."""
    heading = ("model", "tool", "batch norms left", "once loaded", "seconds", "largest error", "ms before", "ms after")
    return table(heading, (_model_row(row, tool, found) for row in rows for tool, found in row["results"].items()))


def _model_row(row: dict[str, Any], tool: str, found: dict[str, Any]) -> tuple[str, ...]:
    error = f"{found['error']:.1e}" if found["status"] == "ok" else f"{found['status']}: {found.get('detail', '')}"
    return (
        f"{row['name']} ({row['batch_norms']})",
        _NAMES[tool],
        _number(found.get("left"), ""),
        _number(found.get("left_once_loaded"), ""),
        _number(found.get("seconds"), ".2f"),
        f"{found['error']:.1e}, wrong" if found["status"] == "wrong" else error,
        _number(found.get("original_ms"), ".1f"),
        _number(found.get("ms"), ".1f"),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def case_tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line a tool, then the names of what failed.

    What a tool folds in graphs that then are wrong, or do not run, does not count: their batch norms are left.
    """
    total, foldable = (sum(row[key] for row in rows) for key in ("batch_norms", "foldable"))
    tools = [tool for tool in rows[0]["results"] if tool != "verified"]
    heading = ("tool", "graphs", f"left of {total} ({total - foldable} must stay)", "once loaded", *_FAILURES)
    yield from table(heading, (_case_row(rows, tool) for tool in tools))
    for tool in tools:
        for status in _FAILURES:
            if names := [row["name"] for row in rows if row["results"][tool]["status"] == status]:
                yield f"{_NAMES[tool]}, {status}: {', '.join(f'`{name}`' for name in names)}."
    yield ""


def _case_row(rows: Sequence[dict[str, Any]], tool: str) -> tuple[str, ...]:
    found = [row["results"][tool]["status"] for row in rows]
    left = [sum(_left(row, tool, key) for row in rows) for key in ("left", "left_once_loaded")]
    loads = any(row["results"][tool].get("left_once_loaded") is not None for row in rows)
    counts = [str(found.count(status)) for status in _FAILURES]
    return _NAMES[tool], str(len(rows)), str(left[0]), str(left[1]) if loads else "", *counts


def _left(row: dict[str, Any], tool: str, key: str) -> int:
    found = row["results"][tool]
    value = found.get(key)
    return value if found["status"] == "ok" and value is not None else row["batch_norms"]
