# Every target makes the environment by itself when it is missing: Python >= 3.11 and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := OMP_WAIT_POLICY=passive $(BIN)/python

.PHONY: help demo test test-fast mutants bench app docs train-mini lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        images from prompts with the shipped model, plain and accelerated side by side"
	@echo "make test        the test suite"
	@echo "make test-fast   the tests without those marked slow; under four minutes on two cores"
	@echo "make mutants     plants mistakes in the library; the tests must find each (ten minutes on two cores)"
	@echo "make bench       outputs/report/index.html: speed and quality of accelerators on the shipped models (half an hour)"
	@echo "make app         the demo in the browser"
	@echo "make docs        site/index.html: the documentation as web pages"
	@echo "make train-mini  train the shipped models from nothing (eight hours on two cores; resumable)"
	@echo "make lint        ruff and mypy"

# The stamps stand for "the environment has this project's dependencies", for users and for developers.
$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("varaccel needs Python 3.11 or newer, this is %d.%d; set PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	@touch $@

$(VENV)/user.stamp: $(VENV)/pip.stamp pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/pip.stamp pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	@touch $@ $(VENV)/user.stamp

demo: $(VENV)/user.stamp
	$(RUN) -m varaccel demo --out outputs
	$(RUN) -m varaccel demo --model mini-var --out outputs/mini-var
	$(RUN) -m varaccel demo --model mini-mar --out outputs/mini-mar

# a process per core with one thread each: most tests are too small to share a matrix product
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

# tests in the browser measure time, so they have the machine for themselves, and are skipped where there is no Chromium
test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not browser" $(PARALLEL)
	$(RUN) -m pytest -m browser tests/app/test_browser.py

test-fast: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not browser" $(PARALLEL)

mutants: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(RUN) -m tests.mutants

bench: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(RUN) eval/pareto.py --model mini-llamagen --model mini-var --model mini-mar --out outputs/report

app: $(VENV)/dev.stamp
	$(RUN) -m varaccel app

# without --quiet, which would hide warnings from --strict, too
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# eight hours; with a GPU: pipelines/train_all.py --budget-minutes 8 --device cuda
train-mini: $(VENV)/dev.stamp
	$(RUN) pipelines/train_all.py --budget-minutes 480 --device cpu

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) outputs site build dist .mypy_cache .ruff_cache .pytest_cache
