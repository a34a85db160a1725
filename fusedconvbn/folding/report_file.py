"""The file that a report is written to, which never takes a model's place, nor that of another file unasked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fusedconvbn._arguments import refuse
from fusedconvbn.folding.checkpoint import prefix_of
from fusedconvbn.folding.report import Report
from fusedconvbn.folding.sources import is_part, refuse_blocked


def check_report(path: str, source: str, destination: str | None = None, *, overwrite: bool = False) -> None:
    """Checks where a report is to go, before there is one.

    Raises:
        ValueError: It would be a part of the source or of the destination, or in the way of the latter.
        FileExistsError: There is something else than a report, and it is not to be overwritten.
        NotADirectoryError, PermissionError: Its folder cannot be made.
    """
    models = [name for name in (source, prefix_of(source), destination) if name is not None]
    if any(is_part(path, model) for model in models) or (destination is not None and is_part(destination, path)):
        refuse(ValueError, "report", "a file apart from the models", path)
    if os.path.isdir(path):
        refuse(FileExistsError, "report", "a file, not a folder", path)
    if os.path.isfile(path) and not overwrite and not _is_report(path):
        refuse(FileExistsError, "report", "a new file or a report to replace", path)
    refuse_blocked("report", path)


def write_report(report: Report, path: str) -> None:
    """Writes a report as JSON; missing folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")


def _is_report(path: str) -> bool:
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no text
        return False
    return isinstance(found, dict) and {"folded", "kept"} <= found.keys()
