# `make export` and `make test` need Python 3.10 to 3.13 and set up all the rest in .venv.

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
.PHONY: help export zoo test test-slow test-gpu lint types check fix lock newest oldest dist clean

help:
	@echo "make export   trace, calibrate, quantize and compare a model (CHECKPOINT, DATA, TASK, OUT)"
	@echo "make zoo      a table of all models that come with the project (DATA, TASK, README)"
	@echo "make test     run the tests;  make check: lint and types as well;  make fix: format"
	@echo "make test-slow run the slow ones too"
	@echo "make test-gpu run those that need a GPU and TensorRT;  VENV=--system-site-packages for apt's"
	@echo "make lock     choose the newest versions that pyproject.toml allows, for all of locks/"
	@echo "make newest   try the newest versions of everything, allowed or not;  make oldest: the oldest"
	@echo "make dist     build the wheel;  make clean: remove what was built, .venv too"

# A plain `export:` would be make's own directive.
$(or export): .venv/installed
	$(BIN)/cnngru-edge export $(CHECKPOINT) --out $(OUT) $(if $(DATA),--data $(DATA)) $(if $(TASK),--task $(TASK))

zoo: .venv/installed
	$(BIN)/python benchmarks/zoo.py $(if $(DATA),--data $(DATA)) $(if $(TASK),--task $(TASK)) $(if $(README),--readme $(README))

test: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --slow

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
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	rm -rf build/lib build/bdist.* *.egg-info  # else Python finds these requirements here, also when they are old

clean:
	rm -rf .venv .venv-newest .venv-oldest build dist *.egg-info

# Exact versions with hashes, from the registry that pip is set up with. The wheels of TORCH_INDEX are
# others under the same versions, so that these alone have no hashes.
PIP = $(BIN)/python -m pip --disable-pip-version-check
LOCKED = $(PIP) install --no-deps --require-hashes --no-build-isolation
TORCH := $(shell grep -oE '^torch(audio)?==[0-9.]+' locks/torch.txt)

.venv/installed: pyproject.toml $(wildcard locks/*.txt)
	$(PYTHON) -m venv $(VENV) .venv
	$(LOCKED) -r locks/build.txt
	$(if $(TORCH_INDEX),$(PIP) install --no-deps --index-url $(TORCH_INDEX) $(TORCH),$(LOCKED) -r locks/torch.txt)
	$(LOCKED) -r locks/export.txt
	@# Without setuptools' warning of every editable install.
	PYTHONWARNINGS=ignore::UserWarning $(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(LOCKED) -r locks/dev.txt
	touch $@

# Everything is resolved at once; the other files are parts of that. Torch, and what only its CUDA
# wheels need, stand in torch.txt, so that TORCH_INDEX can take their place.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-header
HOST := pyproject.toml --extra export --extra train
OF_TORCH := ^(torch|torchaudio|triton|cuda-toolkit|nvidia-[a-z0-9-]+)==
lock: .venv/installed-dev
	rm -rf build/lock && mkdir -p build/lock
	$(COMPILE) $(HOST) --group dev -o build/lock/dev.txt
	$(COMPILE) $(HOST) -c build/lock/dev.txt -o build/lock/export.txt
	$(COMPILE) --group build -c build/lock/dev.txt -o locks/build.txt
	awk '/^[a-z]/ {apart = /$(OF_TORCH)/} apart' build/lock/export.txt > locks/torch.txt
	for name in export dev; do awk '/^[a-z]/ {apart = /$(OF_TORCH)/} !apart' build/lock/$$name.txt > locks/$$name.txt; done

newest oldest: .venv/installed-dev
	$(BIN)/python tests/versions.py $@

# mypy finds `cnngru_edge` here; pip and Python do not use it.
build/typing:
	mkdir -p $@/cnngru_edge
	for p in $(PACKAGES); do ln -sfn ../../../$$p $@/cnngru_edge/$$p; done
