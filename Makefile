# Targets for users and developers. A fresh machine needs Python 3.11 or newer, pip, make and git.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= stdlib
METHOD ?= full
NAME   ?=
# Number of test processes. Each runs whole files, with one torch thread.
WORKERS ?= 2
# MODEL: a Hugging Face folder to extend instead of the model trained here. LENGTH: tokens to extend it
# to; empty: four times its own, or two times where memory or time do not allow it. MINUTES: for its
# training and evaluation; empty: 10 on a CPU, 60 on a GPU. LORA: the rank of LoRA adapters, 0 for none. WITH:
# overrides of configs/quickstart/extend.toml, such as WITH="optim.lr=2e-5 train.steps=500".
MODEL  ?=
LENGTH ?=
MINUTES ?=
LORA   ?= 0
WITH   ?=

# Of `make claims`. PROFILE: cpu, gpu or quick; JOBS: jobs at a time; TEXT: real text instead of Python's standard
# library; WITH: overrides of configs/claims/PROFILE.toml.
PROFILE ?= cpu
JOBS    ?= $(if $(filter cpu,$(PROFILE)),2,1)
TEXT    ?= stdlib

# Extras of the package: EXTRAS=deepspeed, or several, separated by commas.
EXTRAS ?=

.PHONY: extend claims test default-slurm test-fast test-all exhaustive exhaustive-slurm slurm-test checks chaos bench gpu-check docs docs-serve install clean

extend: install
	LCDIST_STARTER=make $(BIN)/python launch/extend.py --data "$(DATA)" --method "$(METHOD)" --name "$(NAME)" \
		--model "$(MODEL)" --length "$(LENGTH)" --minutes "$(MINUTES)" --lora "$(LORA)" $(WITH)

# Small models beside the papers' claims: about three hours on two cores. Run again, it goes on.
claims: install
	LCDIST_STARTER=make $(BIN)/lcdist claims --profile "$(PROFILE)" --workers "$(JOBS)" --text "$(TEXT)" $(WITH)

# All Slurm tests share one cluster, so they run in one process, after the others.
ONE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Files in the order of tests/conftest.py: xdist would begin with those of the most tests and end with
# those of one long test.
PYTEST := $(ONE) -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore=tests/slurm

# Lint, types and the default tests. The checks and the Slurm tests each leave a core idle, so they
# run side by side.
test: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs 2 checks default-slurm
	$(PYTEST) -m "not exhaustive"

default-slurm: $(VENV)/.dev
	$(ONE) -m "not exhaustive" tests/slurm

# The default tests without the slow ones, for use while editing.
test-fast: $(VENV)/.dev
	$(PYTEST) -m "not exhaustive and not slow"

# All tests: `test`, then full matrices, compile counts, long fuzzing, and the wheel in a fresh environment.
# The Slurm tests mostly wait, so they run beside the others.
test-all: test
	$(MAKE) --no-print-directory --jobs 2 exhaustive exhaustive-slurm

exhaustive: $(VENV)/.dev
	$(PYTEST) -m exhaustive --durations=40 --durations-min=8

exhaustive-slurm: $(VENV)/.dev
	$(ONE) -m exhaustive tests/slurm

# The tests that need Slurm, on a cluster made on this machine. Needs root; installs Debian packages.
slurm-test: $(VENV)/.dev
	tests/slurm/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

checks: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Kills of runs, damaged files and generated inputs, in full: an hour on two cores. Writes docs/chaos.md.
# WITH: other counts, such as WITH="--kills 20 --inputs-share 0.1".
chaos: $(VENV)/.dev
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -m tests.chaos $(WITH)

# Benchmarks: the kernels on a GPU, or the methods and a training step on a CPU.
bench: $(VENV)/.dev
	$(BIN)/python kernels/bench/bench_all.py

# Needs a GPU, torch, triton, numpy and pytest, and no network: nothing is installed.
gpu-check:
	$(PYTHON) kernels/bench/gpu_check.py --out gpu-check

# The documentation site, in build/site. A warning is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

# The same at http://127.0.0.1:8000, built again when a page changes.
docs-serve: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs serve

install: $(VENV)/.installed$(if $(EXTRAS),-$(EXTRAS))

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
