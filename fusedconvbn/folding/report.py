"""What folding tells: every batch norm and what became of it, counts, sizes, speed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusedconvbn.folding.planning import Folded, Kept
from fusedconvbn.folding.verifying import Comparison


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

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        pair = lambda value: None if value is None else {"before": value[0], "after": value[1]}  # noqa: E731
        return {
            "source": self.source,
            "destination": self.destination,
            "kind": self.kind,
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
        check = self.verification
        if check.verdict == "not run":
            lines.append("verification: not run")
        else:
            lines.append(f"verification: {check.verdict}, worst difference {check.worst:.1e} of {check.tolerance:.0e}")
        lines += [f"  {note}" for note in check.notes]
        return lines
