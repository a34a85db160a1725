"""What folding tells: every batch norm and what became of it, counts, sizes, speed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusedconvbn.folding.planning import Folded, Kept
from fusedconvbn.folding.verifying import Comparison

_INCONCLUSIVE = (
    "nothing is known to be wrong, but these inputs could not show all that might be: verify on inputs of your own "
    "(verify={name: array} in Python), or compare the two models on your data before you use the result"
)


@dataclass
class Report:
    """Of one fold.

    Attributes:
        source, destination: As given; None for what is in memory.
        kind: Of the source.
        folded, kept: The batch norms of the inference graph, each in one of the lists.
        removed: How many nodes of which sort are gone.
        nodes, bytes, milliseconds: (before, after): ops of the graph, files, one example's inference; None where there
            is nothing to tell.
        bound: Inputs of the source that the result has no more, with the values that they have in inference.
        verification: The comparison of the two models.
        result: What was made: a "saved_model", "frozen", "checkpoint" or "keras" at `destination`, or in memory a
            "GraphDef" or "Keras model"; None where nothing was.
    """

    source: str | None
    destination: str | None
    kind: str
    folded: list[Folded] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    nodes: tuple[int, int] | None = None
    bytes: tuple[int, int] | None = None
    milliseconds: tuple[float, float] | None = None
    bound: dict[str, Any] = field(default_factory=dict)
    verification: Comparison = field(default_factory=lambda: Comparison("not run"))
    result: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        pair = lambda value: None if value is None else {"before": value[0], "after": value[1]}  # noqa: E731
        return {
            "source": self.source,
            "destination": self.destination,
            "kind": self.kind,
            "result": self.result,
            "folded": [{"name": entry.name, "into": list(entry.into)} for entry in self.folded],
            "kept": [{"name": entry.name, "reason": entry.reason} for entry in self.kept],
            "removed": self.removed,
            "nodes": pair(self.nodes),
            "bytes": pair(self.bytes),
            "milliseconds": pair(self.milliseconds),
            "bound": self.bound,
            "verification": {
                "verdict": self.verification.verdict,
                "tolerance": self.verification.tolerance,
                "worst": self.verification.worst,
                "outputs": self.verification.outputs,
                "sites": self.verification.sites,
                "limits": self.verification.limits,
                "notes": self.verification.notes,
            },
        }

    def __str__(self) -> str:
        lines = [f"{self.source or 'model'} ({self.kind}): {len(self.folded)} of {self._total} batch norms folded"]
        width = max((len(entry.name) for entry in (*self.folded, *self.kept)), default=0)
        lines += [f"  folded  {entry.name:<{width}}  into {', '.join(entry.into)}" for entry in self.folded]
        lines += [f"  kept    {entry.name:<{width}}  {entry.reason}" for entry in self.kept]
        if not self._total:
            lines.append("  there is no batch norm in the inference graph")
        lines += self._figures()
        return "\n".join(lines)

    @property
    def _total(self) -> int:
        return len(self.folded) + len(self.kept)

    def _figures(self) -> list[str]:
        lines = []
        if self.bound:
            lines.append(f"set for inference: {', '.join(f'{name}={value}' for name, value in self.bound.items())}")
        gone = [f"{count} {what}" for what, count in self.removed.items() if count]
        if gone:
            lines.append(f"removed: {', '.join(gone)}")
        figures = {
            "ops": (self.nodes, ",.0f"),
            "bytes": (self.bytes, ",.0f"),
            "ms an example": (self.milliseconds, ".2f"),
        }
        for name, (pair, form) in figures.items():
            if pair is not None:
                lines.append(f"{name}: {pair[0]:{form}} before, {pair[1]:{form}} after")
        if self.result is not None:
            lines.append(
                f"returned: a {self.result}"
                if self.destination is None
                else f"written: {self.destination} ({self.result})"
            )
        return lines + _of_comparison(self.verification)


def _of_comparison(check: Comparison) -> list[str]:
    """The verdict with the tensor that was nearest to its own limit, or furthest beyond it."""
    lines = [f"verification: {check.verdict}"]
    found = {**check.sites, **check.outputs}
    if check.limits:
        name = max(check.limits, key=lambda each: found[each] / check.limits[each])
        where = "furthest beyond" if check.verdict == "failed" else "nearest to"
        lines[0] += f"; {where} its limit: {name!r}, {found[name]:.1e} of {check.limits[name]:.1e}"
    lines += [f"  {note}" for note in check.notes]
    if check.verdict == "inconclusive":
        lines.append(f"  {_INCONCLUSIVE}")
    return lines
