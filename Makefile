# `make demo` and `make test` work on a fresh machine: they set everything up themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test test-slow lint format bench clean

help:
	@echo "make setup      .venv from requirements.lock (every other target does this first)"
	@echo "make demo       the whole way in under 10 minutes: text, tokens, a model, its artifacts"
	@echo "make test       lint, types, tests"
	@echo "make test-slow  the checks that take minutes"
	@echo "make bench      the measurements behind docs/performance.md"

setup: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "x1 needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/x1 demo

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/python -m pytest -m slow

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: setup
	$(BIN)/python benchmarks/tokenize.py
	$(BIN)/python benchmarks/model.py
	$(BIN)/python benchmarks/spend.py
	$(BIN)/python benchmarks/laws.py
	$(BIN)/python benchmarks/stability.py
	$(BIN)/python benchmarks/telemetry.py
	$(BIN)/python benchmarks/mirror.py
	$(BIN)/python benchmarks/mirror_losses.py

clean:
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
