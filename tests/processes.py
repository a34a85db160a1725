"""Python in a process of its own, for what can be seen only there: imports, thread pools, a reload."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_python(script: str, *arguments: object, folder: Path | None = None) -> str:
    """What `script` prints. It finds the modules that this process finds, after those in `folder`, where it runs."""
    path = [*([str(folder)] if folder else []), *map(os.path.abspath, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
