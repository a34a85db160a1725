"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Two columns of names at the left, numbers at the right; an empty line at the end."""
    yield f"| {' | '.join(heading)} |"
    yield f"| {' | '.join(['---'] * 2 + ['---:'] * (len(heading) - 2))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
