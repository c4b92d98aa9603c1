# `make train` and `make test` need Python 3.11+ and make; they set up everything else in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: train test test-slow lint types doctest docs benchmark clean

train: $(VENV)/.train
	$(BIN)/python experiments/mnist.py --repeats 5 --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

doctest: $(VENV)/.dev
	$(BIN)/python -m pytest -q --doctest-modules nnkit

docs: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m docs -n 2 tests/test_docs.py

benchmark: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks.epoch

clean:
	rm -rf $(VENV) runs

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nnkit needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[experiments]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.train

$(VENV)/.benchmarks: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[benchmarks]'
	@touch $@
