# `make demo` trains a model and shows what it can do; `make test` runs the tests, the linter and the type checker.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint environment clean

demo: environment
	$(BIN)/python examples/demo.py

test: environment lint
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

environment: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo
