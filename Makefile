# make demo: install into .venv and answer a prompt.   make test: install for development and test.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check clean

demo: $(BIN)/python
	$(PIP) install --quiet .
	$(BIN)/edgellama run -p "Explain in two sentences why the sky is blue."

test: develop
	$(BIN)/python -m pytest

# Formatting, lint and types.  The strict editable install shows mypy where edgellama.kernels lies.
check: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH="$$(ls -d build/__editable__.edgellama-*)" $(BIN)/mypy

.PHONY: develop
develop: $(BIN)/python
	rm -rf build/__editable__.edgellama-*
	$(PIP) install --quiet --editable '.[dev]' --config-settings editable_mode=strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
