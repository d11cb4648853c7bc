# make demo: install what drawing needs, draw twelve pictures, say where the sheet is.
# make test: install everything, run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DEMO ?= mmwudao-out/demo
# two processes of one thread each: faster than two threads, where several tests can run at a time; each has half of the
# files and takes from the other when it is done, so that few fixtures are made twice
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help install install-dev demo test test-slow check lint bench gpu-bench gpu-check clean

help:
	@echo "make demo       install, then draw pictures from three sentences"
	@echo "make test       install everything, then the tests (test-slow: also the slow ones)"
	@echo "make check      ruff, and the tests that take under a minute in all"
	@echo "make lint       ruff and mypy"
	@echo "make install    create $(VENV) with what drawing needs (install-dev: with everything)"
	@echo "make bench      the speed measurements in bench/, on the CPU"
	@echo "make gpu-bench  the same on a GPU, kept in bench/results/gpu.json"
	@echo "make gpu-check  the tests that need a CUDA device"

install: $(BASE)
install-dev: $(DEV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: mmwudao needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.11 $(MAKECMDGOALS)" % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV)

# --no-compile: bytecode is written for what is imported, not for all of PyTorch
PIP := -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

$(BASE): $(BIN)/python setup.cfg pyproject.toml constraints.txt
	@echo "installing into $(VENV) ..."
	@$(BIN)/python $(PIP) -e .
	@touch $@

$(DEV): $(BIN)/python setup.cfg pyproject.toml constraints.txt
	@echo "installing everything into $(VENV) ..."
	@$(BIN)/python $(PIP) -e ".[all,dev]"
	@touch $(BASE) $@

demo: install
	@$(BIN)/mmwudao generate "戴墨镜的笑脸" "a red apple" "ein schlafendes Gesicht" -n 4 --seed 0 -o $(DEMO)

test: install-dev
	$(PYTEST) -m "not slow"

test-slow: install-dev
	$(BIN)/python -m pytest

check: install-dev
	$(BIN)/python -m ruff check .
	$(PYTEST) -q -m "not slow" -k "not install and not extra" tests/house/test_house.py tests/house/test_names.py \
		tests/data tests/vqvae/test_quantizer.py tests/generation/test_rows.py

lint: install-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: install-dev
	$(BIN)/python bench/run_all.py cpu

gpu-bench: install-dev
	$(BIN)/python bench/run_all.py gpu -o bench/results/gpu.json

gpu-check: install-dev
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m pytest -m gpu; \
	else \
		echo "no CUDA device on this machine: the tests marked gpu were not run"; \
	fi

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
