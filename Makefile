# `make setup` on a machine with Python 3.11+ and make; everything else builds on it.

PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.9
STAMP := $(VENV)/.installed
ARGS =

# What the environment is made from: it is made again when, and only when, this changes.
WANTED = cat requirements.lock pyproject.toml | cksum

# Modules are compiled once and not at each start, whatever the shell says: those of torch take most of a minute.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lowest lint style types imports docs lock clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\): .*## /  make \1\t/p' Makefile

setup:  ## make the environment in .venv, from the lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "holoslide needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo missing): install one and name it," \
	    "as in: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	@if [ -x $(BIN)/python ] && [ "$$(cat $(STAMP) 2>/dev/null)" = "$$($(WANTED))" ]; then exit 0; fi; \
	set -ex; \
	rm -f $(STAMP); \
	$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); \
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --require-hashes --requirement requirements.lock; \
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --no-deps --editable .; \
	$(WANTED) > $(STAMP)

demo: setup  ## draw slides, train on them, and write a report into demo/
	$(BIN)/holoslide demo --out demo

test: setup  ## run the tests, side by side; ARGS="tests/streaming -x" chooses some
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

lint: style types imports  ## check style, types and import contracts

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

docs: setup  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lock: setup  ## write requirements.lock from pyproject.toml: versions and hashes, no addresses
	$(UV) pip compile pyproject.toml --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet -o requirements.lock
	@if grep -n '://' requirements.lock; then echo "requirements.lock holds addresses" >&2; exit 1; fi

lowest: setup  ## run the tests, or ARGS, on the oldest releases that pyproject.toml allows: 3 GB to download
	$(UV) venv --quiet --clear $(LOWEST)
	VIRTUAL_ENV=$(CURDIR)/$(LOWEST) $(UV) pip install --quiet --resolution lowest-direct --group dev \
	  --editable '.[cluster,dicom,hub,onnx,stain,zarr]'
	$(LOWEST)/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal -W default $(ARGS)

clean:  ## remove the environment, caches and the demo
	rm -rf $(VENV) $(LOWEST) build dist demo site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
