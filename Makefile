# Two commands do everything: `make train` and `make test`. Each sets up .venv by itself, from constraints.txt.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
PIP_OPTIONS ?=
export OMP_NUM_THREADS ?= 1
SHELL := /bin/bash

.PHONY: help train test lint types check docs fuzz compatibility results-quick clean
.PHONY: gpu gpu-ready gpu-tests gpu-benchmark gpu-training gpu-report

help:
	@echo "make train   set up and train on the built-in images for about 2 minutes; results in runs/quickstart"
	@echo "make test    set up, lint, check types and run all tests"
	@echo "make lint | types | check   one part of that (check: the tests alone)"
	@echo "make docs    run the tutorials and build the site: docs/_build/index.html"
	@echo "make fuzz    ten minutes of hostile input for each reader; pip install '.[fuzz]' guides it by coverage"
	@echo "make results-quick   one row of the results anew in some minutes, and compared; archives in OMNIGLOT"
	@echo "make gpu     on a CUDA GPU: its tests, the benchmark of the kernels, 60 s of training; all in results/gpu/"
	@echo "make gpu-tests | gpu-benchmark | gpu-training | gpu-report   one part of that; BENCHMARK=--resume goes on"
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

# What measures seconds has the machine for itself; the other tests then share its cores, file by file.
check: $(READY)
	failed=0; \
	$(VENV)/bin/python -m pytest -m alone || failed=1; \
	$(VENV)/bin/python -m pytest -m "not alone and not exercise and not full" -n auto --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder || failed=1; \
	exit $$failed

docs: $(READY)
	$(VENV)/bin/python -m sphinx -W --keep-going -b html docs docs/_build
	@echo "Open docs/_build/index.html"

compatibility:
	tests/compatibility.sh

fuzz: $(READY)
	$(VENV)/bin/python -m tests.fuzz --minutes 10

# The folder that holds the two official archives.
OMNIGLOT ?= ../shared/data/omniglot

results-quick: $(READY)
	$(VENV)/bin/python results/omniglot/rows.py check 1shot-8ch-logits-brief --data-dir $(OMNIGLOT)

# Needs torch for CUDA in GPU_PYTHON. One of your own is taken as it is, with this package and '.[test]' installed.
GPU_PYTHON ?= $(VENV)/bin/python
GPU_READY = $(if $(filter $(VENV)/bin/python,$(GPU_PYTHON)),$(READY))
GPU_HT = $(GPU_PYTHON) -c "from mini_ht.cli import main; main()"
GPU_OUT = results/gpu/$(shell $(GPU_PYTHON) -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-'))" 2>/dev/null)
GPU_TESTS = $(shell grep -l '^pytestmark = pytest.mark.device' tests/test_*.py)
BENCHMARK ?=

# Nothing is timed while a test is red.
gpu:
	$(MAKE) gpu-tests
	$(MAKE) gpu-benchmark
	$(MAKE) gpu-training
	$(MAKE) gpu-report

gpu-ready: $(GPU_READY)
	@$(GPU_PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())" || \
	  { echo "make gpu needs a CUDA device, and torch sees none here."; exit 1; }
	mkdir -p $(GPU_OUT)

gpu-tests: gpu-ready
	set -o pipefail; $(GPU_PYTHON) -m pytest $(GPU_TESTS) -W default -n auto --maxprocesses 4 2>&1 | tee $(GPU_OUT)/tests.txt

gpu-benchmark: gpu-ready
	set -o pipefail; $(GPU_PYTHON) -m mini_ht.kernels.benchmark --out $(GPU_OUT) $(BENCHMARK) 2>&1 | \
	  tee $(if $(findstring --resume,$(BENCHMARK)),-a) $(GPU_OUT)/benchmark.txt

gpu-training: gpu-ready
	set -e -o pipefail; \
	for impl in auto torch; do for count in 16 64; do \
	  $(GPU_HT) bench train omniglot-20way-1shot-8ch --episodes-per-step $$count --impl $$impl --json; \
	done; done 2>&1 | tee $(GPU_OUT)/training_speed.txt; \
	$(GPU_HT) train omniglot-20way-1shot-8ch --minutes 1 --episodes-per-step 64 --data-dir $(OMNIGLOT) \
	  --run-dir $(GPU_OUT)/omniglot --overwrite 2>&1 | tee $(GPU_OUT)/training.txt

gpu-report: gpu-ready
	set -o pipefail; $(GPU_PYTHON) -m mini_ht.kernels.compile_report 2>&1 | tee $(GPU_OUT)/compile_report.txt

clean:
	rm -rf $(VENV) build docs/_build docs/tutorials *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
