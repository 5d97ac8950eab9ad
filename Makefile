# Everything a person starts. A fresh machine needs Python 3.11 or newer, pip, make and git.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= stdlib
METHOD ?= full
NAME   ?=

.PHONY: extend test checks bench gpu-check install clean

extend: install
	$(BIN)/python launch/extend.py --data "$(DATA)" --method "$(METHOD)" --name "$(NAME)"

test: $(VENV)/.dev checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

checks: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.dev
	$(BIN)/python kernels/bench/bench_methods.py
	$(BIN)/python kernels/bench/bench_training.py

# Needs a GPU, torch, triton, numpy and pytest, and no network: nothing is installed.
gpu-check:
	$(PYTHON) kernels/bench/gpu_check.py --out gpu-check

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
