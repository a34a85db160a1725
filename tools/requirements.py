"""Prints what building needs, from pyproject.toml: `pip install $(python tools/requirements.py)`.

An environment that holds these builds with `--no-build-isolation`, against the TensorFlow that it has.
"""

from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
print(*pyproject["build-system"]["requires"])
