# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin

# Data sets that lie beside the checkout; tests that need others skip and say so.
DATA := $(abspath $(wildcard ../shared/data))
ifneq ($(DATA),)
export TFDS_DATA_DIR ?= $(DATA)/tensorflow_datasets
export CLINC150_DIR ?= $(DATA)/clinc150
export MOLECULES_DIR ?= $(DATA)/molecules
endif

.PHONY: install demo test test-slow coverage check docs build clean

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

.venv/documented: .venv/installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

demo: install
	$(BIN)/jmeta train --out runs/demo --resume

test: install check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

coverage: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		--cov jmeta --cov-branch --cov-report term:skip-covered

test-slow: install
	XLA_FLAGS= $(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/documented
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

build: install
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf .venv build dist docs/_build *.egg-info
