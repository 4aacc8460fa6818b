# `make export` and `make test` need Python 3.10 or newer and set up all the rest in .venv.

PYTHON ?= python3
# On a host without a GPU, PyTorch's CPU wheels save 4 GB:
#   make export TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Options for the virtual environment; where TensorRT comes from apt: VENV=--system-site-packages
VENV ?=
CHECKPOINT ?= models/pretrained/kws12.safetensors
DATA ?=
TASK ?=
README ?=
OUT ?= build/$(basename $(notdir $(CHECKPOINT)))

BIN := .venv/bin
PACKAGES := calibration export models runtime

.DEFAULT_GOAL := help
.PHONY: help export zoo test test-gpu lint types check fix dist clean

help:
	@echo "make export   trace, calibrate, quantize and compare a model (CHECKPOINT, DATA, TASK, OUT)"
	@echo "make zoo      a table of all models that come with the project (DATA, TASK, README)"
	@echo "make test     run the tests;  make check: lint and types as well;  make fix: format"
	@echo "make test-gpu run those that need a GPU and TensorRT;  VENV=--system-site-packages for apt's"
	@echo "make dist     build the wheel;  make clean: remove what was built, .venv too"

# A plain `export:` would be make's own directive.
$(or export): .venv/installed
	$(BIN)/cnngru-edge export $(CHECKPOINT) --out $(OUT) $(if $(DATA),--data $(DATA)) $(if $(TASK),--task $(TASK))

zoo: .venv/installed
	$(BIN)/python benchmarks/zoo.py $(if $(DATA),--data $(DATA)) $(if $(TASK),--task $(TASK)) $(if $(README),--readme $(README))

test: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest --gpu -m gpu

check: lint types test

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed-dev build/typing
	$(BIN)/mypy

fix: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dist: .venv/installed-dev
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist *.egg-info

.venv/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV) .venv
	$(BIN)/pip install --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/pip install --index-url $(TORCH_INDEX) 'torch==2.11.*' 'torchaudio==2.11.*')
	$(BIN)/pip install --editable '.[export]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --group dev
	touch $@

# mypy finds `cnngru_edge` here; pip and Python do not use it.
build/typing:
	mkdir -p $@/cnngru_edge
	for p in $(PACKAGES); do ln -sfn ../../../$$p $@/cnngru_edge/$$p; done
