# `make demo` and `make test` set up everything they need; nothing but python3, pip and make is expected.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
endif

.PHONY: demo test campaign check clean

demo: $(VENV)/.cpu
	$(BIN)/pocketdiffusion generate "a red apple" --seed 0 --output demo.png

test: $(VENV)/.dev check
	$(BIN)/python -m pytest

# Hundreds of damaged folders and killed exports: half an hour, before a release.
campaign: $(VENV)/.dev
	$(BIN)/python -m pytest -m campaign

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Some systems ship venv without ensurepip; pip itself can then fill the environment.
$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV) || ($(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.cpu: pyproject.toml | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet --editable '.[cpu]'
	touch $@

# torch alone and first: resolved together with the rest it may be replaced by a build with several GB of CUDA packages.
$(VENV)/.dev: pyproject.toml | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[cpu,export,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
