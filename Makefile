# Lalia. `make` lists the targets. Each one makes .venv itself, once.
# PYTHON: the Python (3.10 or newer) that .venv is made from.  PIP_ARGS: more arguments for pip, such as an index of CPU builds.
# MODEL, PORT: what `make serve` serves, and where.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.lalia-installed
EXTRAS := dev,asr,synth,bench,serve,lora,gguf
MODEL ?= runs/demo
PORT ?= 7860

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install Lalia into it, pinned (again only when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here. Install Python 3.10 or newer (Debian: apt-get install python3 python3-venv), or: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version) is too old, Lalia needs 3.10 or newer: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version): some minutes, most of them for torch"
	@started=$$(date +%s); \
	test -x $(RUN) || $(PYTHON) -m venv $(VENV); \
	$(RUN) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[$(EXTRAS)]"; \
	echo $$(( $$(date +%s) - started )) > $@

demo: setup ## real speech -> trained voice -> speech you can play, and runs/demo/report.html (about 15 minutes)
	@$(RUN) -m lalia demo --install-seconds "$$(cat $(STAMP))"

serve: setup ## a trained run (MODEL=runs/demo) as a web page and OpenAI's routes on http://127.0.0.1:7860 (PORT=7860)
	@$(RUN) -m lalia serve $(MODEL) --port $(PORT)

test: setup check ## style, types and all tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

check: setup ## ruff and mypy
	$(RUN) -m ruff check src tests benchmarks tools
	$(RUN) -m mypy

bench: setup ## Lalia against what else one would run; writes benchmarks/results.json
	OMP_NUM_THREADS=1 $(RUN) benchmarks

clean: ## remove caches and .venv; data and runs stay
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
