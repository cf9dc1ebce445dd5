# Two commands are all a newcomer needs: `make check` runs the main job, `make test` the tests.
# Each creates .venv from nothing if need be and does nothing twice. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: check test lint bench clean

check: .venv/installed
	@echo "make check: every model and TP size against the oracle ($(BIN)/moe-harness check)"
	@$(BIN)/moe-harness check

test: .venv/installed
	@echo "make test: the test suite, one process a core ($(BIN)/pytest -n auto)"
	@$(BIN)/pytest -n auto

lint: .venv/installed-lint
	@echo "make lint: ruff check, ruff format, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: .venv/installed
	@$(BIN)/moe-harness bench

clean:
	rm -rf .venv

.venv/bin/python:
	@echo "make: creating .venv with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is older than Python 3.11. Type: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "make: installing moe-harness and its tests into .venv (torch and transformers: about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

.venv/installed-lint: .venv/installed
	@echo "make: installing ruff and mypy into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint]'
	@touch $@
