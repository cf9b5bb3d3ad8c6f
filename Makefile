# Each target sets up what it needs in .venv on first use. Afterwards nothing is fetched.
#   make demo    QLoRA DPO, plain and with AlphaToken, on a small model trained here (CPU, some minutes)
#   make test    ruff, mypy and the tests that take no more than a few seconds each
#   make test-slow  the others: scripts and recipes, several processes, threads and interrupts
#   make docs    the pages as a site, in site/
#   make figures write the tables of README and docs from benchmarks/results/
#   make test-tools  Axolotl, LLaMA-Factory and others, each in an environment of its own (.tools/, some GB each)
# One tool: make TOOLS=axolotl test-tools
# Another interpreter: make PYTHON=python3.12 test    Options for pip: make PIP_FLAGS="--index-url ..." test

PYTHON ?= python3
PIP_FLAGS ?=
TOOLS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-tools lint docs figures bench clean

help:
	@sed -n 's/^#  *make/make/p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools  # first and pinned, so that no requirement below picks another build of torch
	$(PIP) --no-build-isolation -e '.[dev,plots,docs]'
	@touch $@

demo: $(READY)
	$(BIN)/python recipes/dpo_qlora.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) --dist worksteal -m "not slow"

test-slow: $(READY)
	$(PYTEST) --dist loadfile -m slow  # what a file sets up for its tests is made once

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The pages are in site/index.html."

figures: $(READY)
	$(BIN)/python benchmarks/figures.py

test-tools: $(READY)
	PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python benchmarks/tools.py $(TOOLS)

bench: $(READY)
	$(BIN)/python benchmarks/step_cost.py

clean:
	rm -rf $(VENV) .tools build dist outputs site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
