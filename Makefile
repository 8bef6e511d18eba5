# Two commands do everything: `make train` and `make test`. Each sets up .venv by itself, from constraints.txt.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
PIP_OPTIONS ?=
export OMP_NUM_THREADS ?= 1

.PHONY: help train test lint types check clean

help:
	@echo "make train   set up and train on the built-in images for about 2 minutes; results in runs/quickstart"
	@echo "make test    set up, lint, check types and run all tests"
	@echo "make lint | types | check   one part of that (check: the tests alone)"
	@echo "make clean   remove .venv and caches; runs/ stays"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e ".[test]"
	@touch $(READY)

train: $(READY)
	$(VENV)/bin/mini-ht train quickstart --overwrite

test: lint types check

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

check: $(READY)
	$(VENV)/bin/python -m pytest

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
