# Everything a person starts. A fresh machine needs Python 3.11 or newer, pip, make and git.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= stdlib
METHOD ?= full
NAME   ?=
BESIDE := tests/attention tests/convert tests/data tests/kernels tests/stand_in
# A Hugging Face folder to extend in the place of a model trained here, the rank of LoRA adapters (0:
# none), and settings over configs/quickstart/extend.toml, as in WITH="optim.lr=2e-5 train.steps=500".
MODEL  ?=
LORA   ?= 0
WITH   ?=

.PHONY: extend test slurm-test checks bench gpu-check install clean

extend: install
	$(BIN)/python lcdist/commands/extend.py --data "$(DATA)" --method "$(METHOD)" --name "$(NAME)" \
		--model "$(MODEL)" --lora "$(LORA)" $(WITH)

# Two halves side by side, of about the same length: mostly tests of one process, and tests of many, which
# wait for one another half of the time. What the first half says comes last.
test: $(VENV)/.dev checks
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest $(BESIDE) > $(VENV)/beside.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest $(BESIDE:%=--ignore=%); rest=$$?; \
	wait $$beside; beside=$$?; cat $(VENV)/beside.log; exit $$((beside | rest))

# A Slurm cluster on this machine, for the time of the tests. Needs root and Debian's packages, which it
# installs.
slurm-test: $(VENV)/.dev
	tests/slurm/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

checks: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The kernels on a GPU where there is one, else the methods and a training step on the CPU.
bench: $(VENV)/.dev
	$(BIN)/python kernels/bench/bench_all.py

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
