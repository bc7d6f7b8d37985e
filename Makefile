# Every target makes what it needs: a virtual environment in .venv, the package in it (editable), and the native modules.
# Stamp files in .venv record what is installed and when the native modules were built, so nothing is done twice.
#   make test ARGS='-k cache'      ARGS is passed to pytest, to a benchmark or to the demo
#   make test ARGS='-n0 --pdb'     in one process; by default, one process per core, four at most, shares the tests
#   make build PYTHON=python3.13   another interpreter than the first suitable one on the PATH

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules
# Tests start hundreds of Pythons: without bytecode files each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

ARGS ?=
CC ?= cc
VENV := .venv
FRAMEWORKS := .venv-integration
ARRAYS := .venv-arrays
AZURITE := .venv-azurite
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest
NATIVE_SOURCES := $(wildcard csrc/*.c csrc/*.h src/tiercache/_native/*.pyx src/tiercache/_native/*.pxd)
PYX := $(wildcard src/tiercache/_native/*.pyx)
UNBUILT := $(foreach pyx,$(PYX),$(if $(wildcard $(pyx:.pyx=.*.so)),,$(pyx)))
# The developer's packages include those of the demo.
DEMO_STAMP := $(if $(wildcard $(VENV)/stamp-dev),$(VENV)/stamp-dev,$(VENV)/stamp-demo)

.PHONY: FORCE
.PHONY: build test lint stress fuzz bench bench-peers integration docs demo dist clean distclean help

help:
	@echo 'make build | test | lint | stress | fuzz | bench | bench-peers | integration | docs | demo | dist | clean | distclean'

build: $(VENV)/stamp-dev $(VENV)/stamp-native

test: build
	$(PYTEST) -n auto --maxprocesses=4 --dist worksteal -m 'not stress and not fuzz and not integration' $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/lint_source.py
	$(CC) -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -Wno-unused-parameter -Icsrc -fsyntax-only $(wildcard csrc/*.c tests/stress/*.c)

stress: build
	$(PYTEST) -m stress -o faulthandler_timeout=1800 $(ARGS)

# All property tests with many more examples, and the tests with long random inputs.
fuzz: build
	$(PYTEST) -m '(fuzz or hypothesis) and not stress and not integration' --hypothesis-profile=fuzz --timeout=1800 $(ARGS)

bench: build
	@mkdir -p benchmarks/out
	set -e; for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python "$$bench" $(ARGS); done

# Comparison with other libraries, each in its own environment below benchmarks/out/envs; docs/benchmarks.md describes the method.
bench-peers: build
	cd benchmarks && ../$(BIN)/python -m peers $(ARGS)

# Tests with frameworks that are too large for the development environment, in an environment of their own.
integration: build $(FRAMEWORKS)/stamp $(ARRAYS)/stamp $(AZURITE)/stamp
	$(PYTEST) -m integration tests/flow/store $(ARGS)
	$(FRAMEWORKS)/bin/python -m pytest -m integration tests/integration --ignore=tests/integration/test_jax_and_tf_data.py $(ARGS)
	$(ARRAYS)/bin/python -m pytest -m integration tests/integration/test_jax_and_tf_data.py tests/integration/test_pack_peers.py $(ARGS)

# The docs are plain Markdown. The tests check that their links resolve and that their examples run.
docs: build
	$(PYTEST) tests/flow/test_docs.py $(ARGS)

demo: $(DEMO_STAMP) $(VENV)/stamp-native
	$(BIN)/tiercache demo $(ARGS)

# Build an sdist and a wheel from it, and check the wheel in an empty environment without torch.
dist: build
	.ci/check-dist $(BIN)/python

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/out src/*.egg-info
	rm -f src/tiercache/_native/*.so src/tiercache/_native/*.c $(VENV)/stamp-native
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(FRAMEWORKS) $(ARRAYS) $(AZURITE)

# Use the first interpreter that is 3.11 or newer, can make a virtual environment and can compile extensions.
$(BIN)/python:
	@ok='import sys, ensurepip, sysconfig, pathlib; sys.exit(sys.version_info < (3, 11) or not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())'; \
	for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	    if command -v "$$python" >/dev/null && "$$python" -c "$$ok" 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo 'tiercache needs Python 3.11 or newer with venv and headers (Debian: python3-venv python3-dev); none is on the PATH. Name one: make PYTHON=/path/to/python3' >&2; exit 1; \
	fi; \
	if ! command -v $(CC) >/dev/null; then echo 'tiercache needs a C11 compiler ($(CC) was not found); name one: make CC=gcc' >&2; exit 1; fi; \
	echo "making $(VENV) with $$("$$found" --version)"; "$$found" -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25'    # the pip of Python 3.11 finds no compatible versions of boto3, s3fs and fsspec

# The installation builds the native modules too, so it also sets the stamp of the native build.
$(VENV)/stamp-%: pyproject.toml setup.py | $(BIN)/python
	@echo 'installing tiercache-data[$*] into $(VENV) (minutes, the first time)'
	@# torch is installed first and alone: together with boto3 and aiobotocore, pip backtracks to builds of torchvision that do not match torch.
	@$(if $(filter dev,$*),$(PIP) install torch torchvision)
	@$(PIP) install --editable '.[$*]'
	@touch $@ $(VENV)/stamp-native

# The native modules are those of `make build`, because interpreter and sources are the same.
$(FRAMEWORKS)/stamp: pyproject.toml setup.py | $(BIN)/python
	@echo 'installing tiercache-data[integration] into $(FRAMEWORKS) (minutes, the first time)'
	@$(BIN)/python -m venv $(FRAMEWORKS)
	@$(FRAMEWORKS)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade 'pip>=25'
	@$(FRAMEWORKS)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[integration]'
	@touch $@

# JAX and TensorFlow, without torch.
$(ARRAYS)/stamp: pyproject.toml setup.py | $(BIN)/python
	@echo 'installing tiercache-data[arrays] into $(ARRAYS) (minutes, the first time)'
	@$(BIN)/python -m venv $(ARRAYS)
	@$(ARRAYS)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade 'pip>=25'
	@$(ARRAYS)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[arrays]'
	@touch $@

# Microsoft's emulator of Azure, for tests of the real protocol; they are skipped where there is no npm.
$(AZURITE)/stamp:
	@mkdir -p $(AZURITE)
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix $(AZURITE) azurite@3; else echo 'no npm: the tests with Azurite are skipped'; fi
	@touch $@

# Runs after an installation (order-only prerequisite), which may have built everything, so the recipe checks again whether a source is newer or a module is missing.
$(VENV)/stamp-native: $(NATIVE_SOURCES) $(if $(UNBUILT),FORCE) | $(if $(filter demo,$(MAKECMDGOALS)),$(DEMO_STAMP),$(VENV)/stamp-dev)
	@stale="$$(find $(NATIVE_SOURCES) -newer $@ 2>/dev/null || echo all)"; \
	for pyx in $(PYX); do compgen -G "$${pyx%.pyx}.*.so" >/dev/null || stale="$$stale $$pyx"; done; \
	if [ -n "$$stale" ]; then \
	    echo 'building the native modules'; \
	    if $(BIN)/python -c 'import Cython, setuptools' 2>/dev/null; \
	    then $(BIN)/python setup.py --quiet build_ext --inplace; \
	    else $(PIP) install --no-deps --editable .; fi; \
	fi
	@touch $@
