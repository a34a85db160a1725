# make demo and make test do all that they need, from a fresh clone on: an environment in .venv, the build, the run.
# PYTHON=/path/to/python uses an environment of yours instead (docs/building.md says what it needs).

VENV := $(CURDIR)/.venv
ifneq ($(origin PYTHON), command line)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
BOOTSTRAP ?= python3
CLANG_FORMAT = $(dir $(PYTHON))clang-format
CPP = $(shell find csrc cuda -name '*.cc' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
PIP := $(PYTHON) -m pip --disable-pip-version-check install -qq --progress-bar off

export TF_CPP_MIN_LOG_LEVEL ?= 2
MAKEFLAGS += --no-print-directory

.PHONY: build venv demo test check lint format wheel clean

build: $(READY)
	@$(PYTHON) setup.py --quiet build_ext --inplace

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py tests/models.txt
	@echo "Installing into .venv (TensorFlow and tools, then this package in place)"
	@$(BOOTSTRAP) -m venv $(VENV)
	@$(PIP) $$($(PYTHON) tools/requirements.py)
	@$(PIP) --no-build-isolation --editable '.[cpu,dev]'
	@$(PIP) --no-deps --requirement tests/models.txt
	@touch $@

demo: build
	$(PYTHON) examples/demo.py

test: build
	$(PYTHON) -m pytest -m "not slow"

check: build lint
	$(PYTHON) -m pytest

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)

format: $(READY)
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

wheel: $(READY)
	$(PYTHON) -m pip --disable-pip-version-check wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist artifacts *.egg-info .pytest_cache .ruff_cache fusedconvbn/*.so fusedconvbn/_build_info.py
