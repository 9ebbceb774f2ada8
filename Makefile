# make demo    set up, then generate with and without pykvcache and compare
# make test    set up, then run every test
# make help    the rest
#
# Variables: PYTHON (3.10 or newer), TORCH (a pip requirement), TORCH_INDEX (where pip looks for it,
# for example an index of CPU-only builds), MODEL (a name or folder for the demo), ARGS (more options
# of the demo or of gpu), WORKERS (test processes).

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
MODEL ?=
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(SOURCES) $(wildcard tests/cuda_host/*.cpp tests/cuda_host/*.h)
PACKAGING := setup.py setup_cuda.py pyproject.toml $(wildcard kernels/*/__init__.py)

# One stamp per finished step. Another TORCH has another stamp, so changing it installs it.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH) $(TORCH_INDEX)' | cksum | cut -d ' ' -f 1)
INSTALL_STAMP := $(VENV)/.installed
BUILD_STAMP := $(VENV)/.built
LINT_STAMP := $(VENV)/.lint

.DELETE_ON_ERROR:
.PHONY: help demo test gpu setup build bench lint format clean

help:
	@echo "make demo     generate with and without pykvcache and compare (MODEL=name-or-folder)"
	@echo "make test     run every test"
	@echo "make gpu      on a machine with a GPU: tests, sanitizers and measurements of its kernels"
	@echo "make setup    create $(VENV) and install pykvcache into it, editable"
	@echo "make build    compile what changed in csrc/"
	@echo "make bench    run the benchmarks of kernels and generation"
	@echo "make lint     ruff, mypy, clang-format"
	@echo "make format   let ruff and clang-format rewrite the sources"
	@echo "make clean    remove what was built, $(VENV) included"

demo: $(BUILD_STAMP)
	$(BIN)/python -m pykvcache demo $(if $(MODEL),--model '$(MODEL)') --plot demo-blocks.png $(ARGS)

test: $(BUILD_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal --timeout 600 tests

gpu: $(BUILD_STAMP)
	$(BIN)/python -m benchmarks.on_gpu $(ARGS)

setup build: $(BUILD_STAMP)

bench: $(BUILD_STAMP)
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.generate

lint: $(BUILD_STAMP) $(LINT_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(LINT_STAMP)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf $(VENV) build dist pykvcache.egg-info pykvcache/*.so demo-blocks.png

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || \
	  { echo "pykvcache: no '$(PYTHON)' here; name one with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "pykvcache: needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	      "name another with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "pykvcache: $(PYTHON) cannot make virtual environments;" \
	      "on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; \
	  sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || \
	  { echo "pykvcache: the headers of $(PYTHON) are missing;" \
	      "on Debian and Ubuntu: apt-get install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || \
	  { echo "pykvcache: no C++ compiler ($${CXX:-c++}); on Debian and Ubuntu: apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(BIN)/python
	$(PIP) 'setuptools>=77' ninja
	$(PIP) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'
	@rm -f $(VENV)/.torch-* && touch $@

$(INSTALL_STAMP): $(TORCH_STAMP) $(PACKAGING)
	$(PIP) --quiet --no-build-isolation --editable '.[test]'
	@touch $@

$(BUILD_STAMP): $(INSTALL_STAMP) $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(LINT_STAMP): pyproject.toml | $(INSTALL_STAMP)
	$(PIP) --quiet --no-build-isolation --editable '.[test,lint]'
	@touch $@
