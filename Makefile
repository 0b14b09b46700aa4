# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup quickstart check pure test test-slow lint docs clean bench-policy bench-training bench-ray gpu-check

help:
	@echo "make quickstart   set up, then search on a real small model for 0.2 hours"
	@echo "make test         set up, then run every check"
	@echo "make test-slow    set up, then what make test leaves out: every family of models, runs under load, ..."
	@echo "make check        set up, then style, types, layers and the pure tests: a minute"
	@echo "make bench-policy CURVES=FOLDER   compare budget policies on recorded curves"
	@echo "make bench-training   gangs against PEFT + Trainer, rungs, the useful share of a search; about 2 hours"
	@echo "make bench-ray    what share of their time 1 to 16 workers on Ray work; half an hour, mostly asleep"
	@echo "make gpu-check    ten minutes on a card: steps, memory, waits and losses against what is promised"
	@echo "make docs         build the documentation into site/"
	@echo "make setup        make .venv and install the project with its tools"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

quickstart: setup
	$(BIN)/budgetsearch run --gpu cpu --hours 0.2

PEERS := benchmarks/policy/.venv

$(PEERS)/.installed: benchmarks/policy/requirements.txt setup
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/policy/requirements.txt pydantic PyYAML rich
	$(PEERS)/bin/python -m pip install --quiet --no-deps neural-pipeline-search==0.17.0 --editable .
	@touch $@

SEEDS ?= 20
OUT ?= benchmarks/policy/results.json
BENCH := -m benchmarks.policy.run --curves $(CURVES) --seeds $(SEEDS) --out $(OUT)

bench-policy: setup $(PEERS)/.installed
	@test -d "$(CURVES)" || { echo "name a folder of recorded curves: make bench-policy CURVES=FOLDER"; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "onnxruntime>=1.20"
	$(BIN)/python $(BENCH)
	$(PEERS)/bin/python $(BENCH) --methods syne-tune-asha,syne-tune-bohb,dehb,neps-priorband,smac-hyperband
	$(BIN)/python benchmarks/policy/speed.py

DEVICE ?= cpu

bench-training: setup
	$(BIN)/python -m benchmarks.training.gangs --device $(DEVICE)
	$(BIN)/python -m benchmarks.training.search --minutes 10 --gpu $(if $(filter cpu,$(DEVICE)),cpu,auto)
	$(BIN)/python -m benchmarks.training.rungs --device $(DEVICE)

bench-ray: setup
	$(BIN)/python -m benchmarks.ray.efficiency

KERNELS := $(VENV)/.installed-gpu

$(KERNELS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gpu]"
	@touch $@

gpu-check: $(KERNELS)
	$(BIN)/python -m benchmarks.gpu.acceptance --device $(if $(filter cpu,$(DEVICE)),cuda:0,$(DEVICE))

docs: setup
	sed -i "/^| setting/,\$$d" docs/settings.md
	$(BIN)/python -c "from budgetsearch.run.settings import settings_table as t; print(t(), end='')" >> docs/settings.md
	$(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pure: setup
	$(BIN)/python -m pytest --quiet -m pure --numprocesses 2 tests/core tests/machine tests/sampler

check: setup
	$(MAKE) --jobs 2 lint pure

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/python -m pytest --numprocesses 2 -m slow

clean:
	rm -rf $(VENV) site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
